"""Forty ways to hand over something that is not an EfficientNet: one clear line, exit code 2, nothing written."""

import argparse
import gzip
import io
import json
import os
import pickle
import struct
import sys
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from random_weights import random_state
from safetensors.torch import load_file, save, save_file

from effnet_hf import EfficientNetNVConfig
from effnet_hf.cli import run
from effnet_hf.commands import convert
from effnet_hf.conversion import load_foreign, write_folder
from effnet_hf.conversion.nvidia import NVIDIA
from effnet_hf.conversion.timm import TIMM
from effnet_hf.manifest import write_manifest


ROOT = Path(__file__).parents[2]
CONFIG = EfficientNetNVConfig.from_variant("b0", num_labels=3)


@pytest.fixture(scope="module")
def state():
    return NVIDIA.write(random_state(CONFIG), CONFIG)


class Options(argparse.Namespace):
    pass


class Evil:
    def __reduce__(self):
        return (print, ("this ran",))


def raw(content: bytes):
    return lambda path, state: path.write_bytes(content)


def pickled(change):
    """A .pth of what `change` makes of a good state dict."""

    def write(path, state):
        torch.save(change(dict(state)), path)

    return write


def safetensors(change):
    def write(path, state):
        path.write_bytes(change(save({key: tensor.contiguous() for key, tensor in state.items()})))

    return write


def lying_header(content: bytes) -> bytes:
    """One tensor claims to end a million bytes further than the file does."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    header[name]["data_offsets"][1] += 1_000_000
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def truncated_zip(path, state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path.write_bytes(buffer.getvalue()[:-200_000])


def edited_after(name):
    """A folder with a manifest, one byte of whose file was changed."""

    def write(path, state):
        path.mkdir()
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, path / "model.safetensors")
        if name == "pytorch_model.bin":
            torch.save(state, path / name)
        write_manifest(path)
        if name == "pytorch_model.bin":
            (path / "model.safetensors").unlink()
        else:
            with open(path / name, "r+b") as file:
                file.seek(-3, io.SEEK_END)
                file.write(b"\x01")

    return write


def other_zip(path, state):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def tar(path, state):
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("weights.bin")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"12345"))


def folder(**files):
    """A folder of text files, and of weights where a value is None."""

    def write(path, state):
        path.mkdir()
        for name, content in files.items():
            name = name.replace("__", ".")
            if content is None:
                save_file({key: tensor.contiguous() for key, tensor in state.items()}, path / name)
            else:
                (path / name).write_text(content)

    return write


def without(*names):
    return pickled(lambda state: {key: tensor for key, tensor in state.items() if key not in names})


def renamed(old, new):
    return pickled(lambda state: {key.replace(old, new): tensor for key, tensor in state.items()})


def with_(**tensors):
    return pickled(lambda state: {**state, **{key.replace("__", "."): tensor for key, tensor in tensors.items()}})


def timm_names(path, state):
    torch.save(TIMM.write(random_state(CONFIG), CONFIG), path)


def timm_folder(config):
    def write(path, state):
        path.mkdir()
        save_file(TIMM.write(random_state(CONFIG), CONFIG), path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(config))

    return write


def compressed(path, state):
    """A torch file whose zip is packed: 4 MB of zeros in some kilobytes."""
    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(1_000_000)}, buffer)
    with zipfile.ZipFile(buffer) as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))


def many_views(state):
    numbers = torch.zeros(100_000)
    return {**state, **{f"view{i}": numbers[: 100_000 - i] for i in range(400)}}


NAN = torch.full((32, 3, 3, 3), float("nan"))
GOOD = pickled(lambda state: state)

# name: (how to write the source, its file name, flags, words of the message)
CASES = {
    "no such file": (lambda path, state: None, "x.pth", (), "No file or folder"),
    "0 bytes": (raw(b""), "x.pth", (), "empty (0 bytes)"),
    "html": (raw(b"\n<!DOCTYPE html><html><body>403</body></html>"), "x.pth", (), "a web page"),
    "xml error": (raw(b'<?xml version="1.0"?><Error/>'), "x.safetensors", (), "a web page"),
    "json": (raw(b'{"error": "not found"}'), "x.pth", (), "a JSON text"),
    "git lfs pointer": (
        raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "x.pth",
        (),
        "git lfs pull",
    ),
    "text": (raw(b"these are no weights at all"), "x.pth", (), "neither a PyTorch file nor a safetensors file"),
    "binary noise": (raw(bytes(range(7, 200))), "x.pth", (), "neither a PyTorch file nor a safetensors file"),
    "gzip": (raw(gzip.compress(b"x" * 100)), "x.pth", (), "gzip archive"),
    "tar": (tar, "x.pth.tar", (), "tar archive"),
    "hdf5": (raw(b"\x89HDF\r\n\x1a\n" + b"\0" * 100), "x.h5", (), "HDF5 file"),
    "truncated zip": (truncated_zip, "x.pth", (), "damaged or cut short"),
    "another zip": (other_zip, "x.pth", (), "damaged or cut short"),
    "pickled code": (raw(pickle.dumps(Evil())), "x.pth", (), "refused"),
    "pickled code in a torch file": (pickled(lambda state: {**state, "x": Evil()}), "x.pth", (), "refused"),
    "pickled class of a trainer's own": (
        pickled(lambda state: {"state_dict": state, "args": Options(lr=1)}),
        "x.pth",
        (),
        "Options besides plain tensors",
    ),
    "whole module": (pickled(lambda state: torch.nn.Linear(1, 1)), "x.pth", (), "refused"),
    "truncated pickle": (raw(pickle.dumps({"a": 1})[:-3]), "x.pth", (), "x.pth"),
    "list": (pickled(lambda state: list(state.values())), "x.pth", (), "a list, not a dictionary"),
    "tensor": (pickled(lambda state: torch.zeros(3)), "x.pth", (), "a Tensor, not a dictionary"),
    "empty dictionary": (pickled(lambda state: {}), "x.pth", (), "it is empty"),
    "numbers": (pickled(lambda state: {"epoch": 1, "lr": 0.1}), "x.pth", (), "epoch is a int"),
    "safetensors cut short": (safetensors(lambda content: content[:-1000]), "x.safetensors", (), "damaged safetensors"),
    "safetensors header lies": (safetensors(lying_header), "x.safetensors", (), "damaged safetensors"),
    "safetensors header too long": (
        safetensors(lambda content: struct.pack("<Q", 2**62) + content[8:]),
        "x.safetensors",
        (),
        "damaged safetensors",
    ),
    "safetensors header no JSON": (
        safetensors(lambda content: content[:9] + b"#" + content[10:]),
        "x.safetensors",
        (),
        "damaged safetensors",
    ),
    "another network": (
        pickled(lambda state: {"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.weight": torch.zeros(10, 512)}),
        "x.pth",
        (),
        "No EfficientNet that we know",
    ),
    "torchvision's MobileNet": (
        pickled(lambda state: {f"features.{i}.0.weight": torch.zeros(32, 3, 3, 3) for i in range(12)}),
        "x.pth",
        (),
        "not the shapes of an EfficientNet",
    ),
    "missing tensor": (without("stem.bn.running_mean"), "x.pth", (), "1 missing stem.bn.running_mean"),
    "half a classifier": (
        without("classifier.fc.weight"),
        "x.pth",
        (),
        "1 missing classifier.fc.weight",
    ),
    "renamed keys": (
        renamed("layer3.block1.proj", "layer3.block1.project"),
        "x.pth",
        (),
        "6 unexpected layer3.block1.project.conv.weight",
    ),
    "extra tensor": (with_(extra__weight=torch.zeros(3)), "x.pth", (), "1 unexpected extra.weight"),
    "wrong shape": (
        with_(stem__bn__weight=torch.zeros(31)),
        "x.pth",
        (),
        "stem.bn.weight is (31,), should be (32,)",
    ),
    "NaN": (with_(stem__conv__weight=NAN), "x.pth", (), "stem.conv.weight holds NaN"),
    "integers": (with_(stem__conv__weight=torch.zeros(32, 3, 3, 3, dtype=torch.int8)), "x.pth", (), "torch.int8"),
    "complex numbers": (
        with_(classifier__fc__weight=torch.zeros(3, 1280, dtype=torch.complex64)),
        "x.pth",
        (),
        "not a plain tensor",
    ),
    "a million million numbers": (
        with_(stem__conv__weight=torch.zeros(1).expand(10**6, 10**6)),
        "x.pth",
        (),
        "stem.conv.weight claims 1,000,000,000,000 numbers of 4 bytes; it was expanded",
    ),
    "an expanded average": (
        pickled(lambda state: {"state_dict": state, "state_dict_ema": {"a": torch.zeros(1).expand(10**12)}}),
        "x.pth",
        (),
        "state_dict_ema.a claims",
    ),
    "expanded optimizer state": (
        pickled(lambda state: {"state_dict": state, "optimizer": {"state": {0: {"m": torch.zeros(1).expand(10**12)}}}}),
        "x.pth",
        (),
        "optimizer.state.0.m claims",
    ),
    "float8": (
        with_(x=torch.zeros(3).to(torch.float8_e4m3fn)),
        "x.pth",
        (),
        "x is not a plain tensor but torch.strided",
    ),
    "float64 beyond float32": (
        with_(stem__conv__weight=torch.full((32, 3, 3, 3), 1e300, dtype=torch.float64)),
        "x.pth",
        (),
        "stem.conv.weight holds NaN or infinity",
    ),
    "a negative variance": (with_(stem__bn__running_var=-torch.ones(32)), "x.pth", (), "running_var holds negative"),
    "a counter beyond int64": (
        with_(stem__bn__num_batches_tracked=torch.tensor(1e30)),
        "x.pth",
        (),
        "stem.bn.num_batches_tracked is no count of batches",
    ),
    "weights that changed after their manifest": (
        edited_after("model.safetensors"),
        "x",
        (),
        "model.safetensors is not what was written",
    ),
    "weights gone that a manifest names": (edited_after("pytorch_model.bin"), "x", (), "model.safetensors is missing"),
    "many views of one tensor": (pickled(many_views), "x.pth", (), "many times what it holds"),
    "a packed zip": (compressed, "x.pth", (), "unpacks to 4,00"),
    "meta tensor": (
        with_(stem__conv__weight=torch.zeros(32, 3, 3, 3, device="meta")),
        "x.pth",
        (),
        "_rebuild_meta_tensor_no_storage besides plain tensors",
    ),
    "sparse tensor": (with_(x=torch.eye(3).to_sparse()), "x.pth", (), "x.pth "),
    "pipe": (lambda path, state: os.mkfifo(path), "x.pth", (), "is no regular file"),
    "key with an escape": (with_(**{"\x1b[2J": torch.zeros(3)}), "x.pth", (), r"\x1b[2J"),
    "empty folder": (folder(), "x", (), "there are none"),
    "folder without weights": (folder(config__json="{}"), "x", (), "there are none"),
    "folder with two files": (
        folder(a__safetensors=None, b__safetensors=None),
        "x",
        (),
        "a.safetensors, b.safetensors",
    ),
    "damaged config.json": (folder(model__safetensors=None, config__json="{"), "x", (), "config.json is not JSON"),
    "config.json is a list": (folder(model__safetensors=None, config__json="[]"), "x", (), "not a list"),
    "config.json of ours with nonsense": (
        folder(model__safetensors=None, config__json='{"model_type": "efficientnet_nv", "se_ratio": "many"}'),
        "x",
        (),
        "se_ratio",
    ),
    "timm names alone": (timm_names, "x.pth", (), "--arch efficientnet_b0 (symmetric padding) or --arch tf_eff"),
    "timm names, wrong architecture": (timm_names, "x.pth", ("--arch", "efficientnet_b4"), "does not fit the weights"),
    "timm folder of another network": (timm_folder({"architecture": "resnet50"}), "x", (), "resnet50 does not fit"),
    "timm folder with other layers": (
        timm_folder({"architecture": "efficientnet_b0", "model_args": {"act_layer": "gelu"}}),
        "x",
        (),
        "builds efficientnet_b0 with act_layer",
    ),
    "variant that it is not": (GOOD, "x.pth", ("--arch", "b4"), "is a b0, not a b4"),
    "dialect that it is not": (GOOD, "x.pth", ("--from", "timm"), "under a known name (timm conv_stem.weight)"),
    "averaged weights that are not there": (GOOD, "x.pth", ("--ema",), "no averaged (EMA) weights"),
    "image size of 0": (GOOD, "x.pth", ("--image_size", "0"), "image_size"),
    "negative epsilon": (GOOD, "x.pth", ("--batch_norm_eps", "-1"), "batch_norm_eps"),
    "warm start from no Lite": (GOOD, "x.pth", ("--warm_start", "b0", "--images", "."), "begins from a Lite model"),
}


def test_there_are_forty_cases():
    assert len(CASES) >= 40


@pytest.mark.parametrize("name", CASES)
def test_malformed_input(name, state, tmp_path, capsys, monkeypatch):
    write, file, flags, words = CASES[name]
    write(tmp_path / file, state)
    before = sorted(tmp_path.rglob("*"))
    line = [str(tmp_path / file), "--output_dir", str(tmp_path / "out"), *flags]
    monkeypatch.setattr(sys, "argv", ["convert.py", *line])
    with pytest.raises(SystemExit) as stop:
        run(convert.main)
    out, error = capsys.readouterr()
    assert stop.value.code == 2
    assert error.startswith("convert.py: error: ") and error.count("\n") == 1 and words in error, error
    assert len(error) < 700, error
    assert "this ran" not in out and out == ""
    assert sorted(tmp_path.rglob("*")) == before


def endless() -> list:
    itself: list = []
    itself += [itself, itself]
    return itself


def test_lists_within_lists_take_no_time(state, tmp_path):
    content = {"args": endless(), "epoch": OrderedDict(a=endless()), "optimizer": {"param_groups": endless()}}
    torch.save({"state_dict": state, **content}, tmp_path / "x")
    found = load_foreign(tmp_path / "x")
    assert found.trainer_state is None and any("Its epoch" in note and len(note) < 300 for note in found.notes)


@pytest.mark.parametrize("value", [True, -1, 1.5, float("nan"), "3", [3], {}, 10**12, torch.tensor([1, 2]), "\x1b[2J"])
def test_an_epoch_that_is_none_is_left_out_and_said(value, state, tmp_path):
    torch.save({"state_dict": state, "epoch": value, "best_prec1": 70.5}, tmp_path / "x.pth")
    found = load_foreign(tmp_path / "x.pth")
    assert found.trainer_state.epoch is None and found.trainer_state.best_top1 == 70.5 and not found.can_be_resumed
    assert any("Its epoch" in note and "is no whole number" in note and note.isprintable() for note in found.notes)


@pytest.mark.parametrize("value", [-1, 101, float("inf"), "70", {}])
def test_a_best_figure_that_is_none_is_left_out_and_said(value, state, tmp_path):
    torch.save({"state_dict": state, "epoch": torch.tensor(3), "best_prec1": value}, tmp_path / "x.pth")
    found = load_foreign(tmp_path / "x.pth")
    assert found.trainer_state.epoch == 3 and found.trainer_state.best_top1 is None
    assert any("Its best_prec1" in note for note in found.notes)


def test_two_names_of_one_tensor_become_two(state, tmp_path):
    shared = {**state, "stem.bn.running_var": state["stem.bn.weight"]}
    torch.save(shared, tmp_path / "x.pth")
    write_folder(load_foreign(tmp_path / "x.pth"), tmp_path / "out")
    assert (
        load_file(tmp_path / "out/model.safetensors")["efficientnet.encoder.stem.bn.running_var"].sum()
        == state["stem.bn.weight"].sum()
    )


def test_the_good_one_passes(state, tmp_path, capsys, monkeypatch):
    GOOD(tmp_path / "x.pth", state)
    monkeypatch.setattr(sys, "argv", ["convert.py", str(tmp_path / "x.pth"), "--output_dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        run(convert.main)
    assert stop.value.code == 0 and "the same function" in capsys.readouterr().out
    assert (tmp_path / "out" / "config.json").is_file()
