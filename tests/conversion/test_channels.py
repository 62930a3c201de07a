"""Networks for grey images of one channel become networks for RGB images of the same function, or are refused."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from random_weights import filled, random_state
from safetensors.torch import save_file

from effnet_hf import EfficientNetNVConfig
from effnet_hf.checkpoint import open_checkpoint
from effnet_hf.conversion import load_foreign, write_folder
from effnet_hf.conversion.nvidia import NVIDIA
from effnet_hf.errors import UserError


CONFIG = EfficientNetNVConfig.from_variant("b0", num_labels=3, num_channels=1)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_logits_are_those_of_the_grey_network(mode, tmp_path):
    theirs = filled(GreyNetwork)
    torch.save(theirs.network.state_dict(), tmp_path / "x.pth")
    found = load_foreign(tmp_path / "x.pth", arch="efficientnet_b0", image_size=64, image_mean=[0.4], image_std=[0.2])
    assert found.exact and any("Made for grey images of one channel" in note for note in found.notes)
    write_folder(found, tmp_path / "grey")
    opened = open_checkpoint(str(tmp_path / "grey"))
    shape = (64, 64) if mode == "L" else (64, 64, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    if mode == "RGB":  # without convert's own rounding
        grey = pixels @ np.array([19595, 38470, 7471]) / 65536
    processor = opened.processor
    processor.size = {"shortest_edge": 64}
    with torch.no_grad():
        logits = opened.load()(**processor(Image.fromarray(pixels), return_tensors="pt")).logits
        given = torch.from_numpy((grey / 255 - 0.4) / 0.2).float()[None, None]
        torch.testing.assert_close(logits, theirs.network(given), rtol=1e-4, atol=1e-4)


class GreyNetwork(torch.nn.Module):
    """timm's, for random weights that are fitted on colour images' first channel."""

    def __init__(self):
        super().__init__()
        self.network = timm.create_model("efficientnet_b0", in_chans=1, num_classes=3)

    def forward(self, pixels):
        return self.network(pixels[:, :1])


@pytest.fixture
def grey(tmp_path):
    torch.save(NVIDIA.write(random_state(CONFIG), CONFIG), tmp_path / "x.pth")
    return tmp_path / "x.pth"


def test_what_does_not_say_how_grey_is_normalised_is_refused(grey):
    with pytest.raises(UserError, match=r"does not say how they are normalised; say it, e\.g\. --image_mean 0\.5"):
        load_foreign(grey)
    found = load_foreign(grey, image_mean=[0.0], image_std=[1.0])
    assert found.config.num_channels == 3 and found.processor.image_std == [1.0] * 3


def test_a_folder_that_says_it_needs_no_flags(tmp_path):
    from effnet_hf.conversion.timm import TIMM

    (tmp_path / "x").mkdir()
    save_file(TIMM.write(random_state(CONFIG), CONFIG), tmp_path / "x/model.safetensors")
    described = {"architecture": "efficientnet_b0", "pretrained_cfg": {"mean": [0.3], "std": [0.1]}}
    (tmp_path / "x/config.json").write_text(json.dumps(described))
    assert load_foreign(tmp_path / "x").processor.image_mean == [0.3] * 3


def test_other_numbers_of_channels_are_refused(tmp_path):
    config = EfficientNetNVConfig.from_variant("b0", num_labels=3, num_channels=4)
    torch.save(NVIDIA.write(random_state(config), config), tmp_path / "x.pth")
    with pytest.raises(UserError, match="takes images of 4 channels; every command here prepares RGB images, of 3"):
        load_foreign(tmp_path / "x.pth")


@pytest.mark.parametrize("values", [{"image_mean": [0.1, 0.2]}, {"image_std": [0.0]}, {"image_mean": [float("nan")]}])
def test_a_mean_that_is_none_is_refused(values, grey):
    with pytest.raises(UserError, match="image_mean|image_std"):
        load_foreign(grey, **values)
