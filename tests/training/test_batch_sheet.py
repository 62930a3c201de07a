"""The picture of the first batch: what it shows, what it warns of, and that a run is the same with and without it."""

import json
import time

import numpy as np
import pytest
import torch
from PIL import Image

from effnet_hf import EfficientNetNVImageProcessor
from effnet_hf.training.batch_sheet import draw_batch, label_texts, odd_values

from ..conftest import forget_accelerator
from .workbench import read_rows, run, small_recipe, write_squares, write_tiny


MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def pictures(low=0, high=256, seed=0):
    """Bytes of 4 noisy pictures, as floats from 0 to 255."""
    return torch.randint(low, high, (4, 3, 24, 24), generator=torch.Generator().manual_seed(seed)).float()


CONTENTS = {
    "noise": pictures(),
    "dark": pictures(0, 39),
    "bright": pictures(230),
    "grey": pictures(118, 139),
    "strokes": (pictures() > 245) * 255.0,  # white on black: mean -1.8
    "paper": (pictures() > 10) * 255.0,
}
BYTES = {"image_mean": [123.675, 116.28, 103.53], "image_std": [58.395, 57.12, 57.375]}


def prepared(values, **settings):
    """The values as an image processor prepares them, and that processor."""
    processor = EfficientNetNVImageProcessor(**settings)
    if processor.do_rescale:
        values = values * processor.rescale_factor
    if processor.do_normalize:
        values = (values - torch.tensor(processor.image_mean)[:, None, None]) / torch.tensor(processor.image_std)[
            :, None, None
        ]
    return values, processor


def erased(values):
    """What random erasing leaves."""
    values = values.clone()
    values[:, :, :10, :10] = 0
    return values


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, {"do_rescale": False, **BYTES}],
    ids=["imagenet", "0.5", "imagenet in bytes"],
)
def test_normalised_pixels_are_right(settings, content):
    values, processor = prepared(CONTENTS[content], **settings)
    assert odd_values(values, processor) == odd_values(erased(values), processor) == ""


def test_synthetic_images_are_right():
    assert odd_values(torch.randn(64, 3, 96, 96), EfficientNetNVImageProcessor()) == ""


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize(
    "settings",
    [
        {"do_normalize": False},
        {"image_mean": [0.0] * 3, "image_std": [1.0] * 3},
        {"do_normalize": False, "do_rescale": False},
        {"do_rescale": False},
        {"rescale_factor": 1 / 255**2},
        {"rescale_factor": 1 / 255**2, "do_normalize": False},
        BYTES,
        {"image_mean": [127.5] * 3, "image_std": [127.5] * 3},
        {"image_mean": [0.0] * 3},
        {"image_std": [1.0] * 3},
        {"image_std": [0.1] * 3},
    ],
    ids=str,
)
def test_what_is_missing_is_seen(settings, content):
    values, processor = prepared(CONTENTS[content], **settings)
    for batch in (values, erased(values)):
        assert "where 0 ± 1 is expected" in odd_values(batch, processor)


def test_the_warning_says_what_gives_it_away():
    assert odd_values(*prepared(pictures(), do_normalize=False)).endswith(
        "; the image processor makes 0 of black and 1 of white, which neither ImageNet's mean and deviation do nor 0.5"
        " and 0.5"
    )
    assert odd_values(*prepared(pictures(), **BYTES)).endswith(", and hardly differ")
    byte = erased(prepared(pictures(), rescale_factor=1 / 255**2)[0])
    assert odd_values(byte, EfficientNetNVImageProcessor()).endswith(", and hardly differ")
    assert "nan" in odd_values(torch.full((4, 3, 24, 24), float("nan")), EfficientNetNVImageProcessor())


def test_labels_say_what_was_mixed():
    names = ["cat", "dog", "cow"]
    assert label_texts(torch.tensor([2, 0]), names) == ["cow", "cat"]
    mixed = torch.tensor([[0.7, 0.3, 0.0], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]])
    assert label_texts(mixed, names) == ["cat 0.7 dog 0.3", "dog", "cat 0.5 cow 0.5"]
    several = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    assert label_texts(several, names, several=True) == ["cat, cow", "no label"]


def test_labels_of_a_large_batch_of_many_classes_cost_nothing():
    shares = torch.zeros(256, 21_000)
    shares[:, 20_999], shares[:, 7] = 0.7, 0.3
    began = time.thread_time()
    assert label_texts(shares, [str(number) for number in range(21_000)]) == ["20999 0.7 7 0.3"] * 256
    assert time.thread_time() - began < 0.5


def test_pictures_are_mapped_back_by_imagenets_figures(tmp_path):
    colours = torch.tensor([[200.0, 40, 60], [10, 250, 120]])
    pixels = ((colours / 255)[:, :, None, None].expand(2, 3, 30, 20) - MEAN) / STD
    draw_batch(
        pixels, ["a", "\x1b[2J a long name that does not fit into two lines of this picture"], tmp_path / "a.png"
    )
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    found = [int((sheet == colour).all(-1).sum()) for colour in colours.int().numpy()]
    assert found == [75 * 112] * 2
    draw_batch(pixels * 2, ["a", "b"], tmp_path / "b.png")  # another standard deviation
    assert not (np.asarray(Image.open(tmp_path / "b.png")) == [200, 40, 60]).all(-1).any()
    draw_batch(torch.randn(40, 3, 8, 8), ["x"] * 40, tmp_path / "c.png")
    assert Image.open(tmp_path / "c.png").height > 4 * 112


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("squares"), per_class=8)


def test_a_run_is_the_same_with_and_without_its_pictures(data, tmp_path, capsys):
    settings = {"epochs": 1, "warmup_epochs": 0}
    losses = {}
    for drawn in (False, True):
        recipe = small_recipe(data, tmp_path / str(drawn), **settings)
        object.__setattr__(recipe, "report", drawn)
        forget_accelerator()
        run(recipe)
        losses[drawn] = [row["train.loss"] for row in read_rows(tmp_path / str(drawn), "train")]
        assert (tmp_path / str(drawn) / "plots/first_batch.png").exists() == drawn
    assert losses[False] == losses[True]
    printed = capsys.readouterr().out
    assert printed.count(f"as the network sees it: {tmp_path / 'True/plots/first_batch.png'}") == 1
    assert "WARNING" not in printed


def test_a_checkpoint_with_a_wrong_mean_is_told(data, tmp_path, capsys):
    model = write_tiny(tmp_path / "tiny")
    settings = json.loads((model / "preprocessor_config.json").read_text())
    (model / "preprocessor_config.json").write_text(
        json.dumps({**settings, "image_mean": [0.0] * 3, "image_std": [1.0] * 3})
    )
    recipe = small_recipe(
        data, tmp_path / "run", model=str(model), image_size=32, epochs=1, warmup_epochs=0, report=True
    )
    run(recipe)
    assert "WARNING: its values lie between 0 and 1, " in capsys.readouterr().out
