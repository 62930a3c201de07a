"""The Python of docs/conversion.md runs as it stands."""

import re
from pathlib import Path

import pytest
import torch
from random_weights import random_state

from effnet_hf import EfficientNetNVConfig, EfficientNetNVForImageClassification
from effnet_hf.conversion.nvidia import NVIDIA


DOC = Path(__file__).parents[2] / "docs" / "conversion.md"


def snippet(words: str) -> str:
    (found,) = [text for text in re.findall(r"```python\n(.*?)```", DOC.read_text("utf-8"), re.S) if words in text]
    return found


def test_segmenter_trains_on_a_converted_backbone(tmp_path):
    EfficientNetNVForImageClassification(EfficientNetNVConfig.from_variant("b0")).save_pretrained(tmp_path)
    names = {"folder": str(tmp_path)}
    exec(snippet("UperNet"), names)
    gradient = names["model"].backbone.encoder.stem.conv.weight.grad
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_from_python(tmp_path, monkeypatch):
    config = EfficientNetNVConfig.from_variant("b0")
    state = NVIDIA.write(random_state(config), config)
    torch.save({"state_dict": state, "state_dict_ema": state}, tmp_path / "checkpoint.pth.tar")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(snippet("load_foreign"), names)
    assert "features.8.1.running_mean" in names["weights"] and names["converted"].exact


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"--[a-z][a-z_]+", DOC.read_text("utf-8")))))
def test_every_flag_in_the_text_exists(flag):
    scripts = (DOC.parents[1] / "convert.py").read_text("utf-8")
    elsewhere = {"--no", "--model", "--data_dir", "--pretrained"}  # of pip, train.py and the original's main.py
    assert f'"{flag}"' in scripts or flag in elsewhere
