"""What others wrote is data: code planted into any file that a command may open does not run, and nobody is asked to.

A planted file is a pickle (as `pickle` writes it, and as torch writes it, new and old) or a module that makes a marker
file when it runs. What comes of it is a sentence or a success.
"""

import argparse
import builtins
import io
import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch

from effnet_hf import EfficientNetNVConfig, EfficientNetNVForImageClassification, EfficientNetNVImageProcessor
from effnet_hf.cli import run as run_command
from effnet_hf.commands import classify, convert, export, qat, scan, validate
from effnet_hf.commands import train as train_command
from effnet_hf.conversion import TRAINER_FILE, load_foreign, to_foreign, write_folder
from effnet_hf.errors import UserError
from effnet_hf.manifest import write_manifest
from effnet_hf.training import build_run, restore_run, start_accelerator, train

from .training.workbench import small_recipe, write_squares


class Payload:
    """Makes the marker when it is unpickled."""

    marker = ""

    def __reduce__(self):
        return exec, (f"open({self.marker!r}, 'w').close()",)


def old_torch(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def new_torch(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


KINDS = {"pickle": lambda content: pickle.dumps(content, 2), "text pickle": lambda content: pickle.dumps(content, 0),
         "torch": new_torch, "old torch": old_torch}  # fmt: skip
# What lies beside the weights in somebody's folder, and libraries open by themselves.
PICKLES = (
    "pytorch_model.bin", "model.pth", "model.pt", "model.pt2", "model.ckpt", "checkpoint.pth.tar", "adapter_model.bin",
    "training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.bin", "scaler.pt", "random_states_0.pkl",
    "custom_checkpoint_0.pkl", "rng_state.pth", "trainer_state.pt", "model.pkl", "flax_model.msgpack", "tf_model.h5",
)  # fmt: skip
MODULES = (
    "configuration.py", "modeling_efficientnet_nv.py", "image_processing_efficientnet_nv.py", "evil.py", "__init__.py",
    "quantization_efficientnet_nv.py", "eager_efficientnet_nv.py", "sitecustomize.py", "conftest.py", "pipeline.py",
    "custom_generate/generate.py",
    "tokenization.py", "processing.py", "data.py",
)  # fmt: skip
AUTO_MAP = {
    name: f"evil.{name}"
    for name in ("AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoImageProcessor", "AutoBackbone")
}
TEXTS = {
    "adapter_config.json": {"base_model_name_or_path": "evil", "peft_type": "LORA", "auto_mapping": AUTO_MAP},
    "generation_config.json": {"custom_generate": "evil.py"},
    "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "chat_template": "{{ evil() }}"},
    "processor_config.json": {"auto_map": {"AutoProcessor": "evil.Processor"}},
    "video_preprocessor_config.json": {"auto_map": AUTO_MAP},
}


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """The file that a payload makes; nobody is asked anything."""
    marker = tmp_path / "it-ran"
    monkeypatch.setattr(Payload, "marker", str(marker))

    def asked(*words):
        raise AssertionError(f"asked: {words}")

    monkeypatch.setattr(builtins, "input", asked)
    monkeypatch.chdir(tmp_path)
    yield marker
    assert not marker.exists()


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("squares"), per_class=4, size=16, validation=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny network's folder."""
    folder = tmp_path_factory.mktemp("models") / "model"
    config = EfficientNetNVConfig(
        image_size=16, kernel_sizes=[3], strides=[2], num_block_repeats=[1], expand_ratios=[2], out_channels=[16],
        stem_channels=16, head_channels=32, id2label={0: "blue", 1: "green", 2: "red"},
    )  # fmt: skip
    EfficientNetNVForImageClassification(config).save_pretrained(folder)
    EfficientNetNVImageProcessor.for_image_size(16, margin=0).save_pretrained(folder)
    return folder


@pytest.fixture
def planted(model, tmp_path, marker):
    """A copy of it in which everything but configuration, processor and weights is a payload."""
    folder = tmp_path / "planted"
    shutil.copytree(model, folder)
    for number, name in enumerate(PICKLES):
        (folder / name).write_bytes(list(KINDS.values())[number % len(KINDS)](Payload()))
    for name in MODULES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"open({str(marker)!r}, 'w').close()\n")
    for name, content in TEXTS.items():
        (folder / name).write_text(json.dumps(content))
    for name in ("config.json", "preprocessor_config.json"):
        change(folder / name, auto_map=AUTO_MAP, custom_pipelines={"image-classification": {"impl": "evil.Pipeline"}})
    return folder


def change(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def small(squares, output_dir, **changes):
    plain = {"augmentation": "none", "mixup": 0.0, "ema_decay": 0.0, "epochs": 1, "warmup_epochs": 0}
    return small_recipe(squares, output_dir, **{**plain, **changes})


@pytest.fixture
def commands(squares, tmp_path, monkeypatch, capsys):
    """Opens a model folder with every command, yields name, exit code and what was said."""

    def call(folder, only=None):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(small(squares, tmp_path / "unused").to_yaml())
        quant = tmp_path / "quant.yaml"
        quant.write_text(small(squares, tmp_path / "unused", placement="nvidia", epochs=0).to_yaml())
        image = str(squares / "val/red/0.png")
        for name, main, words in (
            ("train", train_command.main, ["--config", recipe, "--model", folder]),
            ("teacher", train_command.main, ["--config", recipe, "--teacher", folder, "--distillation_weight", "0.5"]),
            ("qat", qat.main, ["--config", quant, "--model", folder]),
            ("validate", validate.main, ["--model", folder, "--data_dir", squares, "--num_workers", "0"]),
            ("classify", classify.main, ["--model", folder, image]),
            ("export", export.main, ["--model", folder, "--num_images", "2"]),
            ("convert", convert.main, [folder]),
            ("scan", scan.main, [folder, "--num_workers", "0"]),
        ):
            if only is not None and name not in only:
                continue
            if name not in ("validate", "classify", "scan"):
                words = [*words, "--output_dir", tmp_path / f"out-{name}"]
            monkeypatch.setattr(sys, "argv", [f"{main.__module__.split('.')[-1]}.py", *map(str, words)])
            with pytest.raises(SystemExit) as ended:
                run_command(main)
            yield name, ended.value.code, "".join(capsys.readouterr())

    return call


def test_the_payloads_would_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Payload, "marker", str(tmp_path / "it-ran"))
    for name, kind in KINDS.items():
        content = io.BytesIO(kind(Payload()))
        torch.load(content, weights_only=False) if "torch" in name else pickle.load(content)
        (tmp_path / "it-ran").unlink()


def test_nothing_beside_the_weights_runs(planted, commands):
    ends = {name: code for name, code, _ in commands(planted, ("train", "validate", "classify", "export", "convert"))}
    assert ends == dict.fromkeys(ends, 0) and len(ends) == 5


def test_an_export_opens_without_what_lies_beside_it(planted, commands, tmp_path):
    from effnet_hf.export import ONNXEfficientNet

    assert [code for _, code, _ in commands(planted, ("export",))] == [0]
    out = tmp_path / "out-export"
    assert "evil" not in (out / "config.json").read_text()  # nor is it passed on
    for path in planted.iterdir():
        if path.is_file() and not (out / path.name).exists():
            shutil.copy(path, out)
    for name in ("config.json", "preprocessor_config.json"):
        change(out / name, auto_map=AUTO_MAP)
    assert len(ONNXEfficientNet.from_pretrained(out).config.id2label) == 3


def test_what_is_trained_or_converted_from_it_does_not_pass_it_on(planted, commands, tmp_path):
    for name, code, _ in commands(planted, ("train", "convert")):
        assert code == 0
        for file in ("config.json", "preprocessor_config.json"):
            assert "evil" not in (tmp_path / f"out-{name}" / file).read_text()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_weights_that_are_a_payload_are_refused(name, kind, planted, commands):
    (planted / "model.safetensors").unlink()
    (planted / name).write_bytes(KINDS[kind]({"classifier.weight": Payload()}))
    for command, code, said in commands(planted):
        assert code == 2 and said.count("error: ") == 1 and "Traceback" not in said, (command, said)
        assert command == "scan" or name in said or "pytorch_model.bin" in said, (command, said)


@pytest.mark.parametrize("weight_map", [{"a": "../../evil.safetensors"}, {"a": "pytorch_model.bin"}, {"a": 3}, 7])
def test_an_index_names_files_beside_it_only(weight_map, planted, commands, model):
    (planted / "model.safetensors").unlink()
    shutil.copy(model / "model.safetensors", planted.parents[1] / "evil.safetensors")
    (planted / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    ((name, code, said),) = commands(planted, ("validate",))
    assert code == 2 and "should name .safetensors files beside it, and no others" in said


def test_another_architecture_is_refused_without_a_question(planted, commands):
    change(planted / "config.json", model_type="evil", architectures=["Evil"])
    for command, code, said in commands(planted):
        if command in ("convert", "scan"):  # which look at weights, and at images
            continue
        assert code == 2 and "is a 'evil' model, not one of ours" in said and "[y/N]" not in said, (command, said)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", ["alone", "beside weights", "in a namespace", "as a namespace's setter"])
def test_a_file_to_convert_is_refused(kind, content, marker, tmp_path, model):
    weights = EfficientNetNVForImageClassification.from_pretrained(model).state_dict()
    settings = {
        "beside weights": Payload(), "in a namespace": argparse.Namespace(a=argparse.Namespace(b=[Payload()])),
        "as a namespace's setter": argparse.Namespace(__setstate__=exec, __reduce__=Payload()),
    }  # fmt: skip
    content = Payload() if content == "alone" else {"state_dict": weights, "args": settings[content]}
    (tmp_path / "x.pth").write_bytes(KINDS[kind](content))
    with pytest.raises(UserError, match="refused|neither a PyTorch file|damaged"):
        load_foreign(tmp_path / "x.pth")


# Checkpoints of a training.


def resumed(squares, model, output_dir, **changes):
    return small(squares, output_dir, model=str(model), ema_decay=0.9, epochs=2, **changes)


@pytest.fixture(scope="module")
def trained(squares, model, tmp_path_factory):
    """The newest checkpoint of a run that has an average and has not finished."""
    recipe = resumed(squares, model, tmp_path_factory.mktemp("run") / "run", run_epochs=1)
    assert train(recipe) == 0
    return sorted(Path(recipe.output_dir).glob("checkpoints/update-*"))[-1]


OLD_NAMES = (
    "optimizer.bin", "scaler.pt", "random_states_0.pkl", "custom_checkpoint_0.pkl", "pytorch_model.bin",
    "scheduler.bin", "sampler.bin", "pytorch_model/mp_rank_00_model_states.pt",
)  # fmt: skip


def test_no_file_of_a_checkpoint_runs(trained, squares, model, marker, tmp_path):
    names = [path.relative_to(trained).as_posix() for path in trained.rglob("*") if path.is_file()]
    assert {"model.safetensors", "progress.json", "recipe.yaml", "manifest.json"} <= set(names)
    refused = set()
    for number, name in enumerate([*(name for name in names if not name.endswith(".py")), *OLD_NAMES]):
        folder = tmp_path / "checkpoint"
        shutil.copytree(trained, folder)
        for code in [name, *folder.rglob("*.py")]:
            (folder / code).parent.mkdir(exist_ok=True)
            (folder / code).unlink(missing_ok=True)
            (folder / code).write_text(f"open({str(marker)!r}, 'w').close()\n")
        (folder / name).write_bytes(list(KINDS.values())[number % len(KINDS)](Payload()))
        if name != "manifest.json":
            write_manifest(folder)  # as somebody would who means it
        recipe, accelerator, _ = start_accelerator(resumed(squares, model, tmp_path / "again", resume=str(folder)))
        try:
            run = build_run(recipe, accelerator)
            restore_run(run)
            run.loaders.close()
            run.report.close()
        except UserError as error:
            refused.add(name)
            assert "\n" not in str(error)
        assert not marker.exists(), name
        shutil.rmtree(folder)
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
    # The others are read by people, or by nobody.
    assert refused >= {name for name in names if name.endswith((".safetensors", ".yaml"))} - {"best/model.safetensors"}
    assert {"progress.json", "manifest.json"} <= refused
    assert not refused & set(OLD_NAMES)


@pytest.mark.parametrize("kind", KINDS)
def test_no_trainer_state_runs(kind, squares, marker, tmp_path):
    ours = EfficientNetNVForImageClassification(EfficientNetNVConfig.from_variant("b0", num_labels=3))
    torch.save({"epoch": 1, "state_dict": to_foreign(ours, "nvidia")}, tmp_path / "checkpoint.pth.tar")
    write_folder(load_foreign(tmp_path / "checkpoint.pth.tar"), tmp_path / "converted")
    for name in ("trainer_state.pt", TRAINER_FILE):
        (tmp_path / "converted" / name).write_bytes(KINDS[kind](Payload()))
    write_manifest(tmp_path / "converted")
    with pytest.raises(UserError, match=r"trainer_state\.safetensors (is neither a PyTorch file|is damaged|refused)"):
        train(small(squares, tmp_path / "run", resume=str(tmp_path / "converted")))
