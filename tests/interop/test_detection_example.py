"""examples/detection: a set is drawn, both detectors train on it for some steps, open again and go to ONNX."""

import importlib
import json
import sys
from pathlib import Path

import pytest


EXAMPLE = Path(__file__).resolve().parents[2] / "examples/detection"
# All 84 places of such an image are queries, since which ones an untrained network takes depends on rounding.
FLAGS = {"image_size": 64, "width": 32, "queries": 84, "batch_size": 2, "num_workers": 0, "minutes": 1}


@pytest.fixture
def script(monkeypatch):
    pytest.importorskip("torchvision", reason="the example reads images with torchvision")
    pytest.importorskip("torchmetrics", reason="the example measures with torchmetrics")
    pytest.importorskip("pycocotools", reason="torchmetrics measures detectors with pycocotools")
    monkeypatch.syspath_prepend(str(EXAMPLE))

    def run(name: str, *words, **flags):
        module = importlib.import_module(name)
        typed = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words), *typed])
        if hasattr(module, "clock"):  # a minute has three steps
            monkeypatch.setattr(module, "clock", iter(range(0, 999, 20)).__next__)
        module.main()

    yield run
    for name in ("coco", "train_detector", "draw_set", "export_detector"):
        sys.modules.pop(name, None)


@pytest.fixture
def coco(script, tmp_path):
    import numpy as np
    from PIL import Image

    for number, name in enumerate(("apple", "pear")):
        (tmp_path / "images").mkdir(exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (40, 60, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / f"{name}.png")
    script("draw_set", tmp_path / "images", tmp_path / "set", train=6, val=3, image_size=64)
    file = tmp_path / "set/train/annotations.json"
    content = json.loads(file.read_text())
    content["annotations"] = [box for box in content["annotations"] if box["image_id"] != 2]  # one without objects
    content["categories"][1]["id"] = 7  # numbers with gaps, as COCO's own
    for box in content["annotations"]:
        box["category_id"] = {1: 1, 2: 7}[box["category_id"]]
    file.write_text(json.dumps(content))
    held_out = tmp_path / "set/val/annotations.json"
    held_out.write_text(
        held_out.read_text()
        .replace('"category_id": 2', '"category_id": 7')
        .replace('{"id": 2, "name"', '{"id": 7, "name"')
    )
    return tmp_path / "set"


@pytest.fixture
def checkpoint(tiny_config, tmp_path):
    import torch

    from effnet_hf import EfficientNetNVForImageClassification, EfficientNetNVImageProcessor

    shape = {"strides": [1, 2, 2, 2, 2], "kernel_sizes": [3] * 5, "num_block_repeats": [1] * 5}
    shape |= {"expand_ratios": [1] + [4] * 4, "out_channels": [16, 24, 32, 40, 48]}
    torch.manual_seed(0)
    EfficientNetNVForImageClassification(tiny_config(image_size=64, **shape)).save_pretrained(tmp_path / "pretrained")
    EfficientNetNVImageProcessor().save_pretrained(tmp_path / "pretrained")
    return tmp_path / "pretrained"


@pytest.mark.client(
    "RT-DETR, trained by Accelerate", "accelerate", "torchmetrics", "onnxruntime", group="Detection", step="", limit=""
)
def test_rtdetr_trains_opens_again_and_goes_to_onnx(script, coco, checkpoint, tmp_path, capsys):
    from transformers import AutoModelForObjectDetection, pipeline

    pytest.importorskip("onnxruntime", reason="the example checks its ONNX file")
    out = tmp_path / "out"
    script("train_detector", detector="rtdetr", backbone=checkpoint, data_dir=coco, output_dir=out, **FLAGS)
    results = json.loads((out / "results.json").read_text())
    assert results["steps"] == 3 and results["names"] == ["apple", "pear"] and 0 <= results["map"] <= results["map_50"]
    assert (out / "boxes.png").stat().st_size > 1000
    assert AutoModelForObjectDetection.from_pretrained(out).config.id2label == {0: "apple", 1: "pear"}
    found = pipeline("object-detection", model=str(out), threshold=0.0)(str(coco / "val/00000.jpg"))
    assert len(found) == 84 and {one["label"] for one in found} <= {"apple", "pear"}
    script("export_detector", out, coco)
    assert " boxes in 3 images within" in capsys.readouterr().out and (out / "model.onnx").stat().st_size > 10_000


@pytest.mark.client(
    "RetinaNet, trained by Accelerate", "torchvision", "accelerate", "torchmetrics", "onnxruntime",
    group="Detection", step="", limit="",
)  # fmt: skip
def test_retinanet_trains_opens_again_and_goes_to_onnx(script, coco, checkpoint, tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="the example checks its ONNX file")
    out = tmp_path / "out"
    script("train_detector", detector="retinanet", backbone=checkpoint, data_dir=coco, output_dir=out, **FLAGS)
    results = json.loads((out / "results.json").read_text())
    assert results["steps"] == 3 and 0 <= results["map"] <= results["map_50"]
    script("export_detector", out, coco)
    assert " boxes in 3 images within" in capsys.readouterr().out and (out / "model.onnx").stat().st_size > 10_000


def test_what_is_wrong_is_said_before_training(script, coco, checkpoint, tmp_path):
    from effnet_hf.errors import UserError

    flags = {"detector": "rtdetr", "backbone": checkpoint, "output_dir": tmp_path / "out", **FLAGS}
    with pytest.raises(UserError, match="has 0 annotation files of 'train', not one"):
        script("train_detector", data_dir=checkpoint, **flags)
    file = coco / "val/annotations.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"categories": content["categories"][:1], "annotations": []}))
    with pytest.raises(UserError, match="the categories of train and val differ"):
        script("train_detector", data_dir=coco, **flags)
    file.write_text(json.dumps({"images": []}))
    with pytest.raises(UserError, match="is not in COCO's format: KeyError 'categories'"):
        script("train_detector", data_dir=coco, **flags)
    with pytest.raises(UserError, match="has no results.json"):
        script("export_detector", tmp_path, coco)
    assert not (tmp_path / "out").exists()


def test_a_set_of_some_classes(script, tmp_path, coco):
    from effnet_hf.errors import UserError

    script("draw_set", tmp_path / "images", tmp_path / "pears", classes="pear", train=1, val=1, image_size=64)
    content = json.loads((tmp_path / "pears/train/annotations.json").read_text())
    assert [one["name"] for one in content["categories"]] == ["pear"] and content["annotations"]
    with pytest.raises(UserError, match="has no classes plum"):
        script("draw_set", tmp_path / "images", tmp_path / "plums", classes="plum")


def test_the_same_seed_draws_the_same_set(script, tmp_path, coco):
    script("draw_set", tmp_path / "images", tmp_path / "again", train=6, val=3, image_size=64)
    for split in ("train", "val"):
        for file in (coco / split).glob("*.jpg"):
            assert file.read_bytes() == (tmp_path / "again" / split / file.name).read_bytes()
