"""Checkpoints as other trainers write them: timm's, torchvision's, Lightning's, with their settings pickled beside."""

import argparse
import pathlib
import types

import numpy as np
import pytest
import timm
import torch
from random_weights import assert_same, filled, pictures, random_state
from timm.utils import CheckpointSaver, ModelEmaV3

from effnet_hf import EfficientNetNVConfig
from effnet_hf.conversion import load_foreign
from effnet_hf.conversion.source import Source
from effnet_hf.conversion.timm import TIMM
from effnet_hf.conversion.torchvision import TORCHVISION
from effnet_hf.errors import UserError


CONFIG = EfficientNetNVConfig.from_variant("b0", num_labels=5)


@pytest.fixture(scope="module")
def network():
    return filled(timm.create_model, "tf_efficientnet_b0", num_classes=5)


def saved_by_timm(folder, network, **settings):
    """What timm's train.py leaves behind: its own saver, with the settings of its command line."""
    plain = {"model": "tf_efficientnet_b0", "img_size": None, "mean": None, "crop_pct": None, "gp": None,
             "bn_eps": None, "interpolation": "", "lr": 0.1, "model_kwargs": {}, "aa": None}  # fmt: skip
    ema = ModelEmaV3(network)
    with torch.no_grad():
        ema.module.classifier.bias.add_(1)
    scaler = types.SimpleNamespace(state_dict_key="amp_scaler", state_dict=lambda: {"scale": 65536.0})
    saver = CheckpointSaver(
        network, torch.optim.SGD(network.parameters(), 0.1, momentum=0.9), argparse.Namespace(**{**plain, **settings}),
        model_ema=ema, amp_scaler=scaler, checkpoint_dir=str(folder), recovery_dir=str(folder),
    )  # fmt: skip
    saver.save_checkpoint(3, np.float64(71.25))
    return folder / "model_best.pth.tar"


def test_timms_own_checkpoint(network, tmp_path):
    file = saved_by_timm(tmp_path, network)
    found, averaged = load_foreign(file), load_foreign(file, ema=True)
    assert (found.dialect, found.config.variant, found.config.padding, found.exact) == ("timm", "b0", "same", True)
    assert found.trainer_state is None and not found.can_be_resumed
    with torch.no_grad():
        expected = network(pictures(64))
        for each, shift in ((found, 0), (averaged, 1)):
            assert each.config.batch_norm_eps == 1e-3
            torch.testing.assert_close(each.model()(pictures(64)).logits, expected + shift, rtol=0, atol=1e-5)
    notes = "\n".join(found.notes)
    others = sorted(torch.load(file, weights_only=False).keys() - {"state_dict", "state_dict_ema"})
    assert {"args", "epoch", "optimizer"} <= {*others}
    for words in (
        "The architecture, tf_efficientnet_b0, and the preprocessing are those that timm's trainer wrote.",
        "The file also holds averaged (EMA) weights; --ema takes them.",
        f"Left out of the training checkpoint: {', '.join(others)}.",
    ):
        assert words in notes, words
    assert averaged.notes[0].startswith("Took the averaged (EMA) weights; left out amp_scaler, arch")


def test_timms_settings_are_those_of_the_weights(network, tmp_path):
    settings = {"img_size": 128, "crop_pct": 0.8, "mean": [0.5], "std": (0.25, 0.5, 0.25), "interpolation": "bilinear"}
    found = load_foreign(saved_by_timm(tmp_path, network, model="efficientnet_b0", bn_eps=0.002, **settings))
    assert (found.config.padding, found.config.batch_norm_eps, found.config.image_size) == ("symmetric", 0.002, 128)
    processor = found.processor
    assert (processor.size["shortest_edge"], processor.crop_size["height"], processor.resample) == (160, 128, 2)
    assert (processor.image_mean, processor.image_std) == ([0.5] * 3, [0.25, 0.5, 0.25])
    assert load_foreign(tmp_path / "model_best.pth.tar", arch="tf_efficientnet_b0").config.padding == "same"


def described(dialect, arch, args):
    """What a dialect makes of a trainer's settings: fields of our configuration, and notes."""
    source = Source("x.pth", pathlib.Path("x.pth"), {}, {}, {}, trainer={"arch": arch, "args": args})
    source, arch, _ = dialect.as_trained(source, None)
    fields = dialect.fields("b0", source, arch)
    return fields, dialect.notes(EfficientNetNVConfig.from_variant("b0", **fields), source)


@pytest.mark.parametrize(
    "settings, eps",
    [
        ({}, 1e-5),
        ({"bn_tf": False}, 1e-5),
        ({"bn_tf": True}, 1e-3),
        ({"bn_tf": True, "bn_eps": 0.002}, 0.002),
        ({"model_kwargs": {"bn_eps": None}}, 1e-5),
    ],
)
def test_timms_ways_to_say_epsilon(settings, eps):
    assert described(TIMM, "efficientnet_b0", settings)[0]["batch_norm_eps"] == eps


def test_images_that_are_no_squares_are_noted():
    fields, notes = described(TIMM, "efficientnet_b0", {"input_size": (3, 192, 256)})
    note = "on images 192 pixels high and 256 wide; this processor makes squares of 256"
    assert fields["image_size"] == 256 and len(notes) == 1 and note in notes[0]
    assert described(TIMM, "efficientnet_b0", {})[1] == []


@pytest.mark.parametrize(
    "dialect, settings, words",
    [
        (TIMM, {"bn_eps": "small"}, "args: bn_eps must be a number above 0, at most 1000, got 'small'"),
        (TIMM, {"bn_eps": -1.0}, "args: bn_eps must be a number above 0, at most 1000, got -1.0"),
        (TIMM, {"model_kwargs": {"bn_eps": 0}}, "the arguments of its model: bn_eps must be a number above 0"),
        (TORCHVISION, {"interpolation": "random"}, "interpolation must be one of nearest, .*; got 'random'"),
        (TORCHVISION, {"interpolation": "nearest-exact"}, "interpolation must be one of .*; got 'nearest-exact'"),
        (TORCHVISION, {"interpolation": [3]}, r"interpolation must be one of nearest, .*; got \[3\]"),
        (TORCHVISION, {"val_resize_size": {"a": 2}}, "args: val_resize_size must be a number of pixels, got {'a': 2}"),
        (TORCHVISION, {"val_crop_size": 224.5}, "args: val_crop_size must be a number of pixels, got 224.5"),
    ],
)
def test_a_setting_that_is_none_is_named(dialect, settings, words):
    plain = (
        {"val_resize_size": 256, "val_crop_size": 224, "interpolation": "bilinear"} if dialect is TORCHVISION else {}
    )
    with pytest.raises(UserError, match=words):
        described(dialect, "efficientnet_b0", {**plain, **settings})


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"model": "resnet50"}, "--arch efficientnet_b0 .* or --arch tf_efficientnet_b0"),
        ({"model": "tf_efficientnet_b4"}, "tf_efficientnet_b4 does not fit the weights"),
        ({"model_kwargs": {"act_layer": "gelu"}}, "builds tf_efficientnet_b0 with act_layer"),
        ({"gp": "max"}, "builds tf_efficientnet_b0 with global_pool"),
        ({"img_size": -3}, "args: input_size must be a list of three numbers of pixels"),
        ({"interpolation": "cubic-ish"}, "args: interpolation must be one of"),
    ],
)
def test_timms_settings_that_are_none_are_refused(settings, words, network, tmp_path):
    with pytest.raises(UserError, match=words):
        load_foreign(saved_by_timm(tmp_path, network, **settings))


def test_torchvisions_reference_checkpoint(tmp_path):
    """By the lines of references/classification/train.py that save one."""
    ours = random_state(CONFIG)
    theirs = TORCHVISION.write(ours, CONFIG)
    shifted = {f"module.{key}": tensor + key.endswith("bias") for key, tensor in theirs.items()}
    args = argparse.Namespace(model="efficientnet_b0", val_resize_size=256, val_crop_size=192, interpolation="bilinear",
                              device="cuda", lr=0.5, weights=None)  # fmt: skip
    content = {
        "model": theirs, "optimizer": {"state": {}, "param_groups": []}, "lr_scheduler": {"last_epoch": 4}, "epoch": 4,
        "args": args, "model_ema": {"n_averaged": torch.tensor(9), **shifted}, "scaler": {"scale": 2.0},
    }  # fmt: skip
    torch.save(content, tmp_path / "checkpoint.pth")
    found = load_foreign(tmp_path / "checkpoint.pth")
    assert_same(found.state_dict, ours)
    processor = found.processor
    assert (processor.size["shortest_edge"], processor.crop_size["height"], processor.resample) == (256, 192, 2)
    assert (
        found.config.image_size == 192 and "Images are prepared as the trainer's args in the file say." in found.notes
    )
    averaged = load_foreign(tmp_path / "checkpoint.pth", ema=True)
    assert averaged.state_dict["classifier.bias"].equal(ours["classifier.bias"] + 1)
    assert averaged.config.image_size == 192


def test_lightnings_checkpoint(tmp_path):
    ours = random_state(CONFIG)
    state = {f"model.{key}": tensor for key, tensor in TORCHVISION.write(ours, CONFIG).items()}
    content = {
        "epoch": 2, "global_step": 80, "pytorch-lightning_version": "2.4.0", "state_dict": state, "loops": {},
        "callbacks": {"ModelCheckpoint{'monitor': 'acc'}": {"best_model_score": torch.tensor(0.7), "k": np.float32(1)}},
        "hyper_parameters": {"args": argparse.Namespace(lr=0.1, root=pathlib.Path("/x"), a=argparse.Namespace())},
        "lr_schedulers": [{"base_lrs": [0.1]}], "optimizer_states": [{"state": {}, "param_groups": []}],
    }  # fmt: skip
    torch.save(content, tmp_path / "last.ckpt")
    assert_same(load_foreign(tmp_path / "last.ckpt").state_dict, ours)
