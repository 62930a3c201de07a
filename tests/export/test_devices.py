"""Files for devices, as far as it goes without their packages: what is refused, what the card says, how tools fail."""

import ast
import os
import re

import numpy as np
import pytest
import torch

from effnet_hf import EfficientNetNVImageProcessor
from effnet_hf.checkpoint import open_checkpoint
from effnet_hf.errors import UserError
from effnet_hf.export import ExportOptions, api, export_model, options
from effnet_hf.export.devices import DEVICES
from effnet_hf.export.devices.bench import Bench
from effnet_hf.export.devices.cards import device_usage
from effnet_hf.export.devices.proof import FromBytes, distinct, size_on_disk

from ..data.torture import photo
from .conftest import make_checkpoint


@pytest.fixture
def all_installed(monkeypatch):
    monkeypatch.setattr(options, "installed", lambda package: True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"format": "ncnn", "int8": "xnnpack"}, "--int8 xnnpack: --format ncnn is written in float only"),
        ({"format": "coreml", "int8": "xnnpack"}, "--int8 xnnpack: --format coreml goes with --int8 weights"),
        ({"format": "executorch", "int8": "ort-cpu"}, "--format executorch goes with --int8 xnnpack"),
        ({"format": "litert", "dtype": "fp16"}, "--dtype fp16: --format litert goes with --dtype fp32"),
        ({"format": "coreml", "dtype": "bf16"}, "goes with --dtype fp32 or --dtype fp16"),
        ({"format": "ncnn", "opset": 19}, "--format ncnn goes without --opset"),
        ({"format": "ncnn", "exporter": "dynamo"}, "--format ncnn goes without --exporter"),
        ({"format": "litert", "with_preprocessing": True}, "--format litert goes without --with_preprocessing"),
        ({"format": "coreml", "dynamic_image_size": True}, "--format coreml goes without --dynamic_image_size"),
        ({"format": "executorch", "layout": "transformers.js"}, "--format executorch goes without --layout"),
        ({"format": "onnx", "int8": "xnnpack"}, "--int8 xnnpack goes with --format executorch or --format litert"),
        ({"int8": "weights"}, "--int8 weights goes with --format coreml or --format litert"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_one_line(settings, words, all_installed):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        ExportOptions(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", DEVICES)
def test_a_missing_package_names_its_extra(format, monkeypatch):
    monkeypatch.setattr(options, "installed", lambda package: package not in DEVICES[format].packages)
    with pytest.raises(UserError, match=rf"is not installed: pip install 'effnet-hf\[{format}\]'"):
        ExportOptions(format=format)


def test_a_quantized_checkpoint_is_refused(checkpoint, all_installed, monkeypatch):
    opened = open_checkpoint(str(checkpoint))
    monkeypatch.setattr(type(opened), "quantized", True)
    with pytest.raises(UserError, match="quantized checkpoint; --format litert takes the float one .* --int8 weights"):
        api._refuse(opened, ExportOptions(format="litert"), None)


def test_ranges_need_images(checkpoint, all_installed, tmp_path):
    with pytest.raises(UserError, match="--int8 xnnpack needs --data_dir DIR"):
        export_model(checkpoint, tmp_path / "out", format="executorch", int8="xnnpack")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("normalized", [True, False])
def test_core_ml_s_front_is_the_processor(normalized):
    processor = EfficientNetNVImageProcessor.for_image_size(64, do_normalize=normalized)
    images = [photo(1, 90, 110)]
    raw = np.stack(processor(images, do_rescale=False, do_normalize=False)["pixel_values"])
    assert raw.max() > 2  # bytes
    found = FromBytes(torch.nn.Identity(), processor)(torch.from_numpy(raw.astype(np.float32)))
    torch.testing.assert_close(found, torch.from_numpy(np.stack(processor(images)["pixel_values"])))


def test_class_names_that_occur_twice_can_be_told_apart():
    assert distinct(["crane", "cat", "crane"]) == ["crane", "cat", "crane (2)"]
    assert distinct(["crane", "crane (2)", "crane"]) == ["crane", "crane (2)", "crane (2)'"]


def test_size_counts_all_that_belongs_to_the_file(tmp_path):
    (tmp_path / "a.mlpackage/Data").mkdir(parents=True)
    (tmp_path / "a.mlpackage/Data/x").write_bytes(b"12")
    (tmp_path / "a.mlpackage/Manifest.json").write_bytes(b"3")
    (tmp_path / "m.ncnn.param").write_bytes(b"1")
    (tmp_path / "m.ncnn.bin").write_bytes(b"1234")
    assert [size_on_disk(tmp_path / name) for name in ("a.mlpackage", "m.ncnn.param")] == [3, 5]


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("resized", [True, False])
@pytest.mark.parametrize("format", DEVICES)
def test_the_card_s_lines_are_whole(format, resized, several, all_installed, tmp_path):
    processor = EfficientNetNVImageProcessor.for_image_size(64, do_resize=resized)
    more = {"problem_type": "multi_label_classification"} if several else {}
    folder = make_checkpoint(tmp_path / "model", processor, **more)
    text = device_usage(open_checkpoint(str(folder)), ExportOptions(format=format), "HERE", "1.2.3")
    blocks = dict(re.findall(r"```(\w+)\n(.*?)```", text, re.S))
    ast.parse(blocks.pop("python"))
    ((language, lines),) = blocks.items()
    assert language == {"executorch": "kotlin", "litert": "kotlin", "coreml": "swift", "ncnn": "cpp"}[format]
    for opening, closing in ("()", "{}", "[]"):
        assert lines.count(opening) == lines.count(closing), lines
    assert not re.search(r"\{\w+\}|\bNone\b", lines)
    assert ("96" in lines) == resized and "64" in lines  # scaled to 96, of which the middle 64 are left
    if format != "coreml":
        assert "123.675" in lines and "0.01712475" in lines
    assert ("threshold" in lines) == several


DAMAGED = {
    "an import that fails": ("import nothing_of_this_name", "--format ncnn cannot be used: No module named"),
    "a crash": ("import os; os.kill(os.getpid(), 11)", "--format ncnn ended .killed by SIGSEGV"),
    "an end": ("raise SystemExit('the licence has run out')", "--format ncnn ended .exit code 1.* the licence has run"),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_damaged_tool_is_one_line_and_leaves_nothing(fault, checkpoint, tmp_path, monkeypatch):
    code, words = DAMAGED[fault]
    for package in DEVICES["ncnn"].packages:
        (tmp_path / "tools" / package).mkdir(parents=True)
        (tmp_path / "tools" / package / "__init__.py").write_text(code + "\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "tools"))
    monkeypatch.syspath_prepend(str(tmp_path / "tools"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=words) as caught:
        export_model(checkpoint, "out", format="ncnn", num_images=2)
    assert "\n" not in str(caught.value)
    assert [name for name in os.listdir() if not name.endswith(".lock")] == []


def test_the_process_ends_with_its_bench(tmp_path):
    with Bench("ncnn", tmp_path, tmp_path / "file") as bench:
        process = bench._process
        assert process.poll() is None
    assert process.poll() is not None
