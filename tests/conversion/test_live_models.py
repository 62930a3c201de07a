"""Converted weights give the logits of the live foreign model, and the live foreign loaders open what we write."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from random_weights import filled, normalised, pictures, random_state

from effnet_hf import EfficientNetNVConfig
from effnet_hf.conversion import Converted, load_foreign, to_foreign, write_foreign
from effnet_hf.conversion.source import Source
from effnet_hf.conversion.timm import TIMM
from effnet_hf.conversion.transformers import TRANSFORMERS
from effnet_hf.image_processing_efficientnet_nv import EfficientNetNVImageProcessor


timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
TOLERANCE = 1e-5


def logits(model, size):
    with torch.no_grad():
        out = model(pictures(size))
    return getattr(out, "logits", out)


def assert_equal_logits(first, second, size=64):
    a, b = logits(first, size), logits(second, size)
    assert (a[0] - a[1]).abs().max() > 0.01, "logits that do not depend on the input prove nothing"
    torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)


def ours(config, side=64) -> Converted:
    processor = EfficientNetNVImageProcessor.for_image_size(config.image_size)
    converted = Converted(config, random_state(config), processor, "effnet_hf", "ours", None)
    state = normalised(converted.model(), side).state_dict()
    return dataclasses.replace(converted, state_dict=state)


SIZES = ["b0", *(pytest.param(size, marks=pytest.mark.slow) for size in ("b1", "b2", "b3")), "b4"]


@pytest.mark.parametrize("prefix", ["efficientnet_", "tf_efficientnet_"])
@pytest.mark.parametrize("size", [*SIZES, "lite0", pytest.param("lite4", marks=pytest.mark.slow)])
def test_from_timm(prefix, size, tmp_path):
    side = 65 if prefix == "tf_efficientnet_" else 64
    theirs = filled(timm.create_model, prefix + size, num_classes=11, side=side)
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    found = load_foreign(tmp_path / "x.pth", arch=prefix + size)
    assert (found.dialect, found.config.variant, found.exact) == ("timm", size, True)
    assert_equal_logits(found.model(), theirs, side)


@pytest.mark.parametrize("size", SIZES)
def test_from_torchvision(size, tmp_path):
    theirs = filled(torchvision.models.get_model, f"efficientnet_{size}", num_classes=11)
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    found = load_foreign(tmp_path / "x.pth")
    assert (found.dialect, found.config.variant, found.exact) == ("torchvision", size, True)
    assert found.config.batch_norm_eps == 1e-5
    assert_equal_logits(found.model(), theirs)


def test_torchvisions_big_ones_have_another_epsilon(tmp_path):
    torch.save(filled(torchvision.models.get_model, "efficientnet_b5", num_classes=2).state_dict(), tmp_path / "x.pth")
    found = load_foreign(tmp_path / "x.pth")
    assert (found.config.batch_norm_eps, found.config.batch_norm_momentum) == (1e-3, 0.01)
    assert (found.config.image_size, found.processor.size) == (456, {"shortest_edge": 456})


@pytest.mark.parametrize("size", ["b0", "b1"])
def test_from_lukemelas(size, tmp_path):
    lukemelas = pytest.importorskip("efficientnet_pytorch")
    side = {"b0": 96, "b1": 91}[size]  # odd maps tell SAME from other paddings
    theirs = filled(
        lukemelas.EfficientNet.from_name, f"efficientnet-{size}", num_classes=11, image_size=side, side=side
    )
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    found = load_foreign(tmp_path / "x.pth", image_size=side)
    assert (found.dialect, found.config.variant, found.config.image_size) == ("lukemelas", size, side)
    assert_equal_logits(found.model(), theirs, size=side)


def stock(depthwise_padding, image_size, **fields):
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    config = EfficientNetConfig(
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        image_size=image_size,
        depthwise_padding=depthwise_padding,
        num_labels=11,
        **fields,
    )
    return filled(EfficientNetForImageClassification, config, side=image_size)


# 64 pixels: maps of 32, 16, 8, 4; 90 pixels: 45, 23, 12, 6
@pytest.mark.parametrize("image_size, padding", [(64, []), (90, [1, 3])])
def test_from_stock_transformers(image_size, padding, tmp_path):
    theirs = stock(padding, image_size)
    theirs.save_pretrained(tmp_path)
    found = load_foreign(tmp_path)
    assert (found.dialect, found.config.variant, found.config.padding) == ("transformers", "b0", "same")
    assert found.exact and found.config.image_size == image_size
    assert_equal_logits(found.model(), theirs, size=image_size)


@pytest.mark.parametrize(
    "image_size, fields, difference",
    [
        (64, {"depthwise_padding": [3]}, "padding of blocks 3 at 64 pixels"),
        (90, {"depthwise_padding": []}, "padding of blocks 1, 3 at 90 pixels"),
        (63, {"depthwise_padding": []}, "padding of the stem at 63 pixels"),
        (64, {"depthwise_padding": [], "pooling_type": "max"}, "pooling"),
    ],
)
def test_stock_models_that_are_another_function_say_so(image_size, fields, difference, tmp_path):
    theirs = stock(image_size=image_size, **fields)
    theirs.save_pretrained(tmp_path)
    found = load_foreign(tmp_path)
    assert not found.exact and found.difference.startswith(difference)
    assert (logits(found.model(), image_size) - logits(theirs, image_size)).abs().max() > 1e-3


@pytest.mark.parametrize("variant, fields", [("b0", {}), ("b0", {"padding": "same"}), ("lite0", {})])
@pytest.mark.parametrize("output", ["x.pth", "x.safetensors", "folder"])
def test_timm_opens_what_we_write(variant, fields, output, tmp_path):
    converted = ours(EfficientNetNVConfig.from_variant(variant, num_labels=9, **fields))
    line = write_foreign(converted, "timm", tmp_path / output)
    if output == "folder":
        theirs = timm.create_model(f"local-dir:{tmp_path / output}", pretrained=True)
        settings = timm.data.resolve_data_config(model=theirs)
        assert (settings["input_size"], settings["interpolation"]) == ([3, 224, 224], "bicubic")
        resize = timm.data.create_transform(**settings).transforms[0]
        assert resize.size == 256
    else:
        theirs = eval(line, {"timm": timm})
    assert_equal_logits(converted.model(), theirs.eval())


def test_timms_folder_keeps_the_names_of_the_classes(tmp_path):
    from transformers import pipeline

    names = ["cat", "dog", "cow"]
    converted = ours(EfficientNetNVConfig.from_variant("b0", image_size=64, id2label=dict(enumerate(names))), 64)
    write_foreign(converted, "timm", tmp_path / "x")
    described = json.loads((tmp_path / "x/config.json").read_text())
    assert described["label_names"] == names and "problem_type" not in described
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    answers = pipeline("image-classification", model=str(tmp_path / "x"))(photo)  # by transformers' TimmWrapper
    assert {answer["label"] for answer in answers} == set(names)
    for name in ("model.safetensors", "manifest.json"):  # whose header would tell
        (tmp_path / "x" / name).unlink()
    torch.save(to_foreign(converted.model(), "timm"), tmp_path / "x/pytorch_model.bin")
    assert load_foreign(tmp_path / "x").config.id2label == dict(enumerate(names))


def test_timms_folder_of_several_labels_says_so(tmp_path):
    config = EfficientNetNVConfig.from_variant("b0", num_labels=2, problem_type="multi_label_classification")
    described = TIMM.folder_config(config, ours(config).processor)
    assert described["problem_type"] == "multi_label_classification" and "label_names" not in described


def test_torchvision_opens_what_we_write(tmp_path):
    converted = ours(EfficientNetNVConfig.from_variant("b0", num_labels=9))
    line = write_foreign(converted, "torchvision", tmp_path / "x.pth")
    names = {"torchvision": torchvision, "torch": torch, "functools": functools}
    exec(line, names)
    assert_equal_logits(converted.model(), names["model"].eval())


def test_transformers_opens_what_we_write(tmp_path):
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    converted = ours(EfficientNetNVConfig.from_variant("b0", padding="same", image_size=90, num_labels=3), 90)
    converted.config.id2label = {0: "cat", 1: "dog", 2: "cow"}
    write_foreign(converted, "transformers", tmp_path / "x")
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path / "x").eval()
    assert type(theirs).__name__ == "EfficientNetForImageClassification"
    assert theirs.config.id2label == {0: "cat", 1: "dog", 2: "cow"} and theirs.config.depthwise_padding == [1, 3]
    assert_equal_logits(converted.model(), theirs, size=90)
    square = Image.fromarray(np.random.default_rng(0).integers(0, 255, (150, 150, 3), np.uint8))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "x")
    a = processor(square, return_tensors="pt").pixel_values
    b = converted.processor(square, return_tensors="pt").pixel_values
    assert a.shape == b.shape and (a - b).abs().max() < 0.1  # two libraries' bicubic filters


def test_lukemelas_opens_what_we_write(tmp_path):
    lukemelas = pytest.importorskip("efficientnet_pytorch")
    converted = ours(EfficientNetNVConfig.from_variant("b0", padding="same", num_labels=9), 224)
    line = write_foreign(converted, "lukemelas", tmp_path / "x.pth")
    names = {"EfficientNet": lukemelas.EfficientNet, "torch": torch}
    exec(line, names)
    assert_equal_logits(converted.model(), names["model"].eval(), size=224)


def test_widese_in_timm_names_is_timms_builder_with_three_halves_squeezed(tmp_path):
    """timm.create_model has no WideSE, so we refuse; its builder has, which proves the names right."""
    from timm.models._efficientnet_builder import decode_arch_def, round_channels
    from timm.models.efficientnet import EfficientNet

    converted = ours(EfficientNetNVConfig.from_variant("widese-b0", num_labels=9))
    write_foreign(converted, "timm", tmp_path / "x.safetensors", force=True)
    table = ["ds_r1_k3_s1_e1_c16_se0.25"]
    for repeats, kernel, stride, width in ((2, 3, 2, 24), (2, 5, 2, 40), (3, 3, 2, 80), (3, 5, 1, 112), (4, 5, 2, 192)):
        table.append(f"ir_r{repeats}_k{kernel}_s{stride}_e6_c{width}_se1.5")
    table.append("ir_r1_k3_s1_e6_c320_se1.5")
    theirs = EfficientNet(
        decode_arch_def([[row] for row in table]),
        num_classes=9,
        num_features=1280,
        stem_size=32,
        round_chs_fn=round_channels,
        act_layer=torch.nn.SiLU,
        norm_layer=functools.partial(torch.nn.BatchNorm2d, eps=1e-3),
    )
    timm.models.load_checkpoint(theirs, str(tmp_path / "x.safetensors"))
    assert_equal_logits(converted.model(), theirs.eval())


# image size and depthwise_padding of google/efficientnet-b*: transformers' convert_efficientnet_to_pytorch.py
GOOGLE = {
    "b0": (224, []),
    "b1": (240, [16]),
    "b2": (260, [5, 8, 16]),
    "b3": (300, [5, 18]),
    "b4": (380, [6]),
    "b5": (456, [13, 27]),
    "b6": (528, [31]),
    "b7": (600, [18]),
}


@pytest.mark.parametrize("size", GOOGLE)
def test_googles_checkpoints_are_the_same_function(size):
    image_size, padding = GOOGLE[size]
    config = EfficientNetNVConfig.from_variant(size, padding="same")
    assert config.image_size == image_size
    source = Source("google", Path("x"), {}, config={"image_size": image_size, "depthwise_padding": padding})
    assert TRANSFORMERS.read_difference(config, source) is None
    assert TRANSFORMERS.folder_config(config).depthwise_padding == padding


@pytest.mark.parametrize("include_top", [True, False])
@pytest.mark.parametrize("offset", [True, False])
def test_stock_normalisation_is_read_as_it_acts(include_top, offset, tmp_path):
    from transformers import EfficientNetImageProcessor

    settings = {
        "size": {"height": 64, "width": 64},
        "rescale_factor": 1 / 127.5 if offset else 1 / 255,
        "rescale_offset": offset,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.47853944, 0.4732864, 0.47434163],
        "include_top": include_top,
        "resample": 2,
    }
    theirs = EfficientNetImageProcessor(**settings)
    theirs.save_pretrained(tmp_path)
    stock([], 64).save_pretrained(tmp_path)
    found = load_foreign(tmp_path).processor
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    a = torch.as_tensor(np.asarray(theirs(picture, return_tensors="pt").pixel_values))
    torch.testing.assert_close(found(picture, return_tensors="pt").pixel_values, a, rtol=0, atol=1e-4)


def test_timm_folder_settings_reach_the_processor(tmp_path):
    theirs = filled(timm.create_model, "tf_efficientnet_b0.ap_in1k", pretrained=False)
    timm.models.save_for_hf(theirs, tmp_path, safe_serialization=True)
    found = load_foreign(tmp_path)
    assert found.config.padding == "same" and found.processor.image_mean == [0.5, 0.5, 0.5]
    assert found.license == "apache-2.0"
    assert found.config.id2label[1] == "goldfish, Carassius auratus"
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["architecture"] == "tf_efficientnet_b0"


def test_timm_tag_decides_the_preprocessing(tmp_path):
    torch.save(filled(timm.create_model, "tf_efficientnet_b0").state_dict(), tmp_path / "x.pth")
    plain = load_foreign(tmp_path / "x.pth", arch="tf_efficientnet_b0").processor
    advprop = load_foreign(tmp_path / "x.pth", arch="tf_efficientnet_b0.ap_in1k").processor
    assert (plain.image_mean, advprop.image_mean) == ([0.485, 0.456, 0.406], [0.5, 0.5, 0.5])
