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
    said = capsys.readouterr().out
    assert (
        " boxes in 3 images within" in said and " 0 boxes" not in said and (out / "model.onnx").stat().st_size > 10_000
    )


@pytest.mark.client(
    "RetinaNet, trained by Accelerate", "torchvision", "accelerate", "torchmetrics", "onnxruntime",
    group="Detection", step="", limit="",
)  # fmt: skip
def test_retinanet_trains_opens_again_and_goes_to_onnx(script, coco, checkpoint, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    from effnet_hf.errors import UserError

    pytest.importorskip("onnxruntime", reason="the example checks its ONNX file")
    out = tmp_path / "out"
    script("train_detector", detector="retinanet", backbone=checkpoint, data_dir=coco, output_dir=out, **FLAGS)
    results = json.loads((out / "results.json").read_text())
    assert results["steps"] == 3 and 0 <= results["map"] <= results["map_50"]
    with pytest.raises(UserError, match="nothing is found in these images"):
        script("export_detector", out, coco)
    assert not (out / "model.onnx").exists()
    weights = load_file(out / "model.safetensors")
    bias = weights["head.classification_head.cls_logits.bias"]
    bias.fill_(-9)
    bias[-1] = 0  # one of 9 anchors is a pear, wherever it is: fewer boxes than the 100 of an image
    save_file(weights, out / "model.safetensors")
    script("export_detector", out, coco)
    said = capsys.readouterr().out
    assert (
        " boxes in 3 images within" in said and " 0 boxes" not in said and (out / "model.onnx").stat().st_size > 10_000
    )


def test_what_is_wrong_is_said_before_training(script, coco, checkpoint, tmp_path):
    from effnet_hf.errors import UserError

    flags = {"detector": "rtdetr", "backbone": checkpoint, "output_dir": tmp_path / "out", **FLAGS}
    with pytest.raises(UserError, match="has 0 annotation files of 'train', not one"):
        script("train_detector", data_dir=checkpoint, **flags)
    file = coco / "val/annotations.json"
    content = json.loads(file.read_text())
    first, images = content["annotations"][0], content["images"]
    for change, told in (
        ({"categories": [*content["categories"], {"id": 9, "name": "plum"}]}, "the categories of train and val differ"),
        ({"annotations": []}, "has no box of a pixel or more; bbox is left, top, width, height in pixels"),
        ({"annotations": [first | {"bbox": [0.1, 0.1, 0.5, 0.5]}]}, "has no box of a pixel or more"),
        ({"annotations": [first | {"bbox": [1, 2, float("nan"), 4]}]}, "annotation 1 has the box"),
        ({"annotations": [first | {"bbox": [1, 2, -3, 4]}]}, "annotation 1 has the box"),
        ({"annotations": [first | {"bbox": [1, 2, 3]}]}, "is not in COCO's format: ValueError: not enough values"),
        (
            {"annotations": [first | {"category_id": 99}]},
            "annotation 1 is of a category or an image that is not listed",
        ),
        ({"annotations": [first | {"image_id": 99}]}, "annotation 1 is of a category or an image that is not listed"),
        ({"images": [*images, images[0]]}, "has two images of one id"),
        ({"images": [*images, {"id": 99, "file_name": "x.jpg"}]}, "x.jpg is missing, and .*annotations.json lists it"),
        ({"images": None}, "is not in COCO's format: TypeError"),
    ):
        file.write_text(json.dumps(content | change))
        with pytest.raises(UserError, match=told):
            script("train_detector", data_dir=coco, **flags)
    file.write_text(json.dumps({"images": []}))
    with pytest.raises(UserError, match="is not in COCO's format: KeyError: 'categories'"):
        script("train_detector", data_dir=coco, **flags)
    for change, told in (
        ({"image_size": 50}, "RT-DETR needs a multiple of 32"),
        ({"queries": 85}, "RT-DETR has 84 places at --image_size 64"),
        ({"width": 36}, "must be a multiple of 8"),
    ):
        with pytest.raises(UserError, match=told):
            script("train_detector", data_dir=coco, **flags | change)
    with pytest.raises(UserError, match="has no results.json"):
        script("export_detector", tmp_path, coco)
    assert not (tmp_path / "out").exists()


def test_pictures_are_read_as_elsewhere_and_bad_ones_are_named(script, coco):
    import numpy as np
    from PIL import Image

    from effnet_hf.errors import UserError

    dataset = importlib.import_module("coco").Coco(coco, "val", 64)
    ramp = np.tile(np.linspace(0, 65535, 64), (64, 1)).astype(np.uint16)
    Image.fromarray(ramp).save(coco / "val/00000.jpg", format="PNG")
    assert abs(dataset[0][0].mean().item() - 0.5) < 0.01
    Image.new("RGB", (64, 32)).save(coco / "val/00000.jpg")
    with pytest.raises(UserError, match="00000.jpg has 64 x 32 pixels, and its annotations are of"):
        dataset[0]
    (coco / "val/00001.jpg").write_bytes((coco / "val/00001.jpg").read_bytes()[:200])
    with pytest.raises(UserError, match="00001.jpg cannot be read as a picture"):
        dataset[1]


def test_nothing_is_replaced_unasked(script, coco, checkpoint, tmp_path):
    from effnet_hf.errors import UserError

    for output, more in ((checkpoint, []), (tmp_path / "images", ["--overwrite"]), (coco, [])):
        before = sorted(output.rglob("*"))
        with pytest.raises(UserError):
            script("draw_set", tmp_path / "images", output, *more, train=1, val=1, image_size=64)
        assert sorted(output.rglob("*")) == before
    script("draw_set", tmp_path / "images", coco, "--overwrite", train=1, val=1, image_size=64)
    assert len(list(coco.glob("train/*.jpg"))) == 1
    out = tmp_path / "out"
    flags = {"detector": "retinanet", "backbone": checkpoint, "data_dir": coco, "output_dir": out, **FLAGS}
    script("train_detector", **flags)
    with pytest.raises(UserError, match="--overwrite"):
        script("train_detector", **flags)
    script("train_detector", "--overwrite", **flags)


def test_a_detectors_backbone_is_a_checkpoint(script, coco, checkpoint, tmp_path):
    from effnet_hf import EfficientNetNVBackbone
    from effnet_hf.detection import load_backbone_weights

    out = tmp_path / "out"
    script("train_detector", detector="retinanet", backbone=checkpoint, data_dir=coco, output_dir=out, **FLAGS)
    backbone = EfficientNetNVBackbone.for_detection(out / "backbone")
    assert load_backbone_weights(EfficientNetNVBackbone(backbone.config), out / "backbone")


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
