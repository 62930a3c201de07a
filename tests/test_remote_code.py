"""A saved folder opens with trust_remote_code=True in a process where effnet_hf does not exist, through every door."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import pipeline

from effnet_hf import (
    EfficientNetNVBackbone,
    EfficientNetNVForImageClassification,
    EfficientNetNVImageProcessor,
    EfficientNetNVModel,
)

from .child_path import child_path


HERE = Path(__file__).parent
CODE = {
    "configuration.py",
    "eager_efficientnet_nv.py",
    "modeling_efficientnet_nv.py",
    "quantization_efficientnet_nv.py",
    "image_processing_efficientnet_nv.py",
}
DOORS = {
    "AutoConfig": "configuration.EfficientNetNVConfig",
    "AutoModel": "modeling_efficientnet_nv.EfficientNetNVModel",
    "AutoModelForImageClassification": "modeling_efficientnet_nv.EfficientNetNVForImageClassification",
    "AutoBackbone": "modeling_efficientnet_nv.EfficientNetNVBackbone",
}
CLASSES = {
    "classifier": EfficientNetNVForImageClassification,
    "base": EfficientNetNVModel,
    "backbone": EfficientNetNVBackbone,
}


@pytest.fixture
def saved(tiny_config, tmp_path):
    """One folder per class, and a picture."""
    config = tiny_config(id2label={i: f"class {i}" for i in range(5)}, out_features=["stage1", "stage3"])
    for kind, model_class in CLASSES.items():
        model_class(config).save_pretrained(tmp_path / kind)
        EfficientNetNVImageProcessor.for_image_size(32).save_pretrained(tmp_path / kind)
    Image.frombytes("RGB", (80, 70), bytes(i * i % 251 for i in range(80 * 70 * 3))).save(tmp_path / "picture.png")
    return tmp_path


def assert_folder_is_complete(folder: Path) -> None:
    assert CODE <= {file.name for file in folder.iterdir()}
    assert json.loads((folder / "config.json").read_text())["auto_map"] == DOORS
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert processor["auto_map"] == {
        "AutoImageProcessor": "image_processing_efficientnet_nv.EfficientNetNVImageProcessor"
    }


@pytest.mark.parametrize("kind", CLASSES)
def test_whichever_class_is_saved_the_folder_names_every_door_and_holds_the_code(saved, kind):
    assert_folder_is_complete(saved / kind)
    for name in CODE:
        packaged = Path(sys.modules["effnet_hf"].__file__).parent / name
        assert (saved / kind / name).read_bytes() == packaged.read_bytes()


def test_every_door_opens_without_the_package_and_gives_the_same_answers(saved):
    environment = {
        **os.environ,
        "PYTHONPATH": child_path(),
        "HF_MODULES_CACHE": str(saved / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, str(HERE / "open_without_package.py"), str(saved), str(saved / "picture.png")]
    child = subprocess.run(command, env=environment, cwd=saved, capture_output=True, text=True, timeout=600)
    assert child.returncode == 0, child.stderr
    answers = torch.load(saved / "answers.pt", weights_only=True)

    processor = EfficientNetNVImageProcessor.from_pretrained(saved / "classifier")
    with Image.open(saved / "picture.png") as picture:
        pixel_values = processor(picture, return_tensors="pt").pixel_values
    for kind in CLASSES:
        answer = answers[kind]
        assert answer["modules"] == ["transformers_modules"]
        assert torch.equal(answer["pixel_values"], pixel_values)
        backbone = EfficientNetNVBackbone.from_pretrained(saved / kind)
        assert len(answer["maps"]) == 2
        assert all(map(torch.equal, answer["maps"], backbone(pixel_values).feature_maps))
        if kind != "backbone":  # which has no head to pool
            base = EfficientNetNVModel.from_pretrained(saved / kind)
            assert torch.equal(answer["pooled"], base(pixel_values).pooler_output)

    classifier = EfficientNetNVForImageClassification.from_pretrained(saved / "classifier")
    logits = classifier(pixel_values).logits
    assert torch.equal(answers["classifier"]["logits"], logits)
    assert torch.equal(answers["again"], logits)
    scores = {row["label"]: row["score"] for row in answers["pipeline"]}
    expected = {f"class {i}": score for i, score in enumerate(logits[0].softmax(0).tolist())}
    assert scores == pytest.approx(expected, rel=1e-5)

    for kind in ("classifier", "base"):  # saved by the process without the package
        assert_folder_is_complete(saved / f"{kind}-again")
        reopened = CLASSES[kind].from_pretrained(saved / f"{kind}-again")
        assert torch.equal(reopened(pixel_values)[0], CLASSES[kind].from_pretrained(saved / kind)(pixel_values)[0])


def test_pipeline_with_the_package_asks_nothing(saved, monkeypatch, capfd):
    """transformers 5 also looks for a video processor, and asks to run the folder's code unless told there is none."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks whether to run the folder's code"))
    classify = pipeline("image-classification", str(saved / "classifier"))
    assert len(classify(str(saved / "picture.png"))) == 5 and not classify.model.__module__.startswith("transformers_")
    said = capfd.readouterr()
    assert "custom code" not in said.out + said.err
