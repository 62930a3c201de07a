"""Every Python block of the documentation runs as it stands, among the files that its page speaks of."""

import importlib.util

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image

from effnet_hf import EfficientNetNVConfig, EfficientNetNVForImageClassification, EfficientNetNVImageProcessor
from effnet_hf.conversion import load_foreign, write_foreign
from effnet_hf.inference import Classifier, write_predictions

from .reading import python_blocks


HAS_MODELOPT = importlib.util.find_spec("modelopt") is not None
if HAS_MODELOPT:
    from effnet_hf.quantization import calibrate, quantize


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with what the pages call runs/mine, cat.jpg, images, checkpoint.pth.tar, b0-timm, …"""
    folder = tmp_path_factory.mktemp("docs")
    model = EfficientNetNVForImageClassification(EfficientNetNVConfig.from_variant("b0")).eval()
    model.save_pretrained(folder / "runs/mine")
    EfficientNetNVImageProcessor.for_image_size(224).save_pretrained(folder / "runs/mine")
    classes = {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}
    pets = EfficientNetNVForImageClassification(EfficientNetNVConfig.from_variant("b0", **classes))
    pets.save_pretrained(folder / "runs/cats")
    EfficientNetNVImageProcessor.for_image_size(224).save_pretrained(folder / "runs/cats")
    pixels = np.random.default_rng(0).integers(0, 255, (120, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "cat.jpg")
    for number in range(8):
        place = folder / "images" / ("val" if number % 4 == 3 else "train") / ("cat" if number < 4 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{number}.jpg")
    classifier, photos = Classifier(str(folder / "runs/mine"), device="cpu"), sorted(folder.glob("images/*/*/*.jpg"))
    for kind in ("csv", "parquet"):
        write_predictions(classifier, photos, folder / f"predictions.{kind}", num_workers=0)
    if HAS_MODELOPT:
        quantize(model, placement="nvidia")
        calibrate(model, [torch.randn(2, 3, 64, 64)])
        model.save_pretrained(folder / "runs/b0-int8")
    converted = load_foreign(folder / "runs/mine")
    write_foreign(converted, "timm", folder / "b0.safetensors")
    write_foreign(converted, "timm", folder / "b0-timm")
    write_foreign(converted, "transformers", folder / "b0-stock", force=True)
    write_foreign(converted, "nvidia", folder / "nvidia.pth")
    state = torch.load(folder / "nvidia.pth", weights_only=True)
    torch.save({"state_dict": state, "state_dict_ema": state}, folder / "checkpoint.pth.tar")
    return folder


@pytest.mark.parametrize("block", python_blocks(), ids=lambda block: block.where)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")  # Optimum's exporter
def test_block_runs(block, world, monkeypatch):
    if "effnet_hf.quantization" in block.text or "int8" in block.text:
        pytest.importorskip("modelopt")
    if "optimum" in block.text:
        pytest.importorskip("optimum.exporters")
    monkeypatch.chdir(world)
    small = EfficientNetNVForImageClassification(EfficientNetNVConfig.from_variant("b0")).eval()
    names = {"model": small, "batches": [torch.randn(2, 3, 64, 64)]}
    names |= {"folder": "runs/mine", "timm": timm, "transformers": transformers}  # what the text around it introduces
    exec(compile(block.text, block.page, "exec"), names)
