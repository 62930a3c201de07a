"""Test-time flips: the mean of the probabilities of an image and its mirror image, wherever a network is asked."""

import copy
import json

import pytest
import torch
from PIL import ImageOps

from effnet_hf import EfficientNetNVConfig, EfficientNetNVForImageClassification, EfficientNetNVImageProcessor
from effnet_hf.flips import use_test_time_flip
from effnet_hf.inference import Classifier, write_predictions
from effnet_hf.tuning import fold_batchnorm

from .data.torture import photo
from .test_scripts import call


def tiny(classes=3, **settings):
    torch.manual_seed(1)
    config = EfficientNetNVConfig(
        image_size=16, kernel_sizes=[3], strides=[2], num_block_repeats=[1], expand_ratios=[2], out_channels=[16],
        stem_channels=16, head_channels=32, num_labels=classes, **settings,
    )  # fmt: skip
    network = EfficientNetNVForImageClassification(config).eval()
    network.classifier.weight.data *= 20
    return network


@pytest.mark.parametrize("several", [False, True])
@torch.no_grad()
def test_it_is_the_mean_of_both_probabilities(several):
    plain = tiny(**({"problem_type": "multi_label_classification"} if several else {"softmax_temperature": 0.7}))
    images = torch.randn(4, 3, 16, 16)
    odds = torch.sigmoid if several else lambda logits: logits.softmax(-1)
    one, other = (odds(plain(pixel_values=x).logits) for x in (images, images.flip(-1)))
    flipped = use_test_time_flip(copy.deepcopy(plain))
    assert (one - other).abs().max() > 0.01
    torch.testing.assert_close(odds(flipped(pixel_values=images).logits), (one + other) / 2)
    torch.testing.assert_close(odds(fold_batchnorm(flipped)(images).logits), (one + other) / 2)
    torch.testing.assert_close(flipped(images.flip(-1)).logits, flipped(images).logits)
    torch.testing.assert_close(odds(plain(images).logits), one)  # whose copy it is
    flipped.classifier.bias[0] += 1
    torch.testing.assert_close(odds(plain(images).logits), one)


@torch.no_grad()
def test_of_one_class_it_is_the_mean_of_both_sigmoids():
    plain, images = tiny(classes=1), torch.randn(4, 3, 16, 16)
    one, other = (plain(pixel_values=x).logits.sigmoid() for x in (images, images.flip(-1)))
    flipped = use_test_time_flip(plain)
    torch.testing.assert_close(flipped(pixel_values=images).logits.sigmoid(), (one + other) / 2)
    assert (one - other).abs().max() > 0.01


@torch.no_grad()
def test_a_certainty_stays_finite_and_a_class_that_is_ruled_out_stays_so():
    network = use_test_time_flip(tiny(problem_type="multi_label_classification"))
    network.classifier.bias += torch.tensor([80.0, -80.0, 0])
    logits = network(torch.randn(2, 3, 16, 16)).logits
    assert logits.isfinite().all() and (logits[:, 0] > 50).all() and (logits[:, 1] < -50).all()
    network = use_test_time_flip(tiny())
    network.classifier.bias[1] = -torch.inf
    assert (network(torch.randn(2, 3, 16, 16)).logits.softmax(-1)[:, 1] == 0).all()


def test_training_sees_each_image_once():
    network, images = use_test_time_flip(tiny(dropout_rate=0.0, survival_prob=1.0)).train(), torch.randn(4, 3, 16, 16)
    logits = network(images).logits
    torch.testing.assert_close(logits, type(network).forward(network, images).logits)


def test_console_file_and_validation_have_it(tmp_path, monkeypatch, capsys):
    network = tiny(2, id2label={0: "cat", 1: "dog"})
    network.save_pretrained(tmp_path / "m")
    EfficientNetNVImageProcessor.for_image_size(16, margin=0).save_pretrained(tmp_path / "m")
    for name in ("cat", "dog"):
        (tmp_path / "val" / name).mkdir(parents=True)
    images = [photo(i, 16, 16) for i in range(2)]
    paths = [tmp_path / "val/cat/0.png", tmp_path / "val/dog/0.png"]
    for image, path in zip(images, paths):
        image.save(path)
    plain = Classifier(str(tmp_path / "m"), device="cpu")
    mirrored = [tmp_path / f"{i}.png" for i in range(2)]
    for image, path in zip(images, mirrored):
        ImageOps.mirror(image).save(path)
    scores = [
        [{e["label"]: e["score"] for e in each.predictions}["cat"] for each in plain(x)] for x in (paths, mirrored)
    ]
    wanted = [(one + other) / 2 for one, other in zip(*scores)]
    assert max(abs(one - other) for one, other in zip(*scores)) > 1e-3

    flips = Classifier(str(tmp_path / "m"), device="cpu", test_time_flip=True)
    console = [{e["label"]: e["score"] for e in each.predictions}["cat"] for each in flips(paths)]
    write_predictions(flips, paths, tmp_path / "p.jsonl", all_scores=True, num_workers=0)
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert console == pytest.approx(wanted, abs=1e-6)
    assert [row["score:cat"] for row in rows] == pytest.approx(wanted, abs=1e-6)

    words = ["validate", "--model", tmp_path / "m", "--data_dir", tmp_path, "--num_workers", "0", "--json"]
    _, out, _ = call(*words, "--test_time_flip", monkeypatch=monkeypatch, capsys=capsys)
    loss = -(torch.tensor([wanted[0], 1 - wanted[1]]).log().mean()).item()
    assert json.loads(out)["loss"] == pytest.approx(loss, abs=1e-5)
    code, _, err = call(*words, "--test_time_flip", "--calibrate", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and "leave out --test_time_flip" in err
