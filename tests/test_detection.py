"""A pretrained backbone in other libraries' detectors: the same maps whatever they put in place of its batch norm."""

import copy
import pickle

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from torchvision.ops import FrozenBatchNorm2d
from transformers.models.rt_detr.modeling_rt_detr import replace_batch_norm

from effnet_hf import (
    EfficientNetNVBackbone,
    EfficientNetNVConfig,
    EfficientNetNVForImageClassification,
    EfficientNetNVImageProcessor,
    EfficientNetNVModel,
)
from effnet_hf.detection import FeaturePyramid, load_backbone_weights
from effnet_hf.errors import UserError
from effnet_hf.modeling_efficientnet_nv import ConvNormAct


@pytest.fixture
def config(tiny_config):
    """Of strides 2, 2, 4, 8, 16 and 32."""
    table = {"kernel_sizes": [3] * 5, "strides": [1, 2, 2, 2, 2], "num_block_repeats": [1, 1, 2, 1, 1]}
    return tiny_config(**table, expand_ratios=[1, 4, 4, 4, 4], out_channels=[16, 24, 40, 48, 56])


def trained(model):
    """Statistics for which an epsilon of 1e-3 is not one of 1e-5."""
    for name, buffer in model.named_buffers():
        if "running_mean" in name:
            buffer.normal_(0, 0.02)
        elif "running_var" in name:
            buffer.uniform_(5e-4, 2e-3)
    return model.eval()


@pytest.fixture
def folder(config, tmp_path):
    trained(EfficientNetNVForImageClassification(config)).save_pretrained(tmp_path / "b0")
    EfficientNetNVImageProcessor.for_image_size(64).save_pretrained(tmp_path / "b0")
    return str(tmp_path / "b0")


def freeze_as_torchvision(model):
    for block in model.modules():
        if hasattr(block, "bn"):
            frozen = FrozenBatchNorm2d(block.bn.num_features)
            frozen.load_state_dict(block.bn.state_dict())
            block.bn = frozen


@pytest.mark.parametrize("freeze", [replace_batch_norm, freeze_as_torchvision])
def test_a_frozen_batch_norm_has_the_epsilon_of_the_network(freeze, config):
    backbone = trained(EfficientNetNVBackbone(config))
    frozen, pixels = copy.deepcopy(backbone), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        freeze(frozen)
        assert type(frozen.encoder.stem.bn).__name__.endswith("FrozenBatchNorm2d")
        (wanted,) = backbone(pixels).feature_maps
        for model in (frozen, copy.deepcopy(frozen).train()):
            (map_,) = model(pixels).feature_maps
            assert (map_ - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    frozen(pixels).feature_maps[0].sum().backward()
    assert all(weight.grad.isfinite().all() for weight in frozen.parameters())


@pytest.mark.parametrize("freeze", [replace_batch_norm, freeze_as_torchvision])
def test_hooks_on_frozen_norms_see_what_they_compute(freeze, config):
    backbone, pixels = trained(EfficientNetNVBackbone(config)), torch.randn(2, 3, 64, 64)
    frozen, seen, copies = copy.deepcopy(backbone), [], []
    with torch.no_grad():  # as detectors do: else transformers 5's buffers have a graph
        freeze(frozen)
    for model in (backbone, frozen):
        model.encoder.stem.bn.register_forward_hook(lambda norm, given, made: seen.append((given[0], made)))
    with torch.no_grad():
        maps = [model(pixels).feature_maps[0] for model in (backbone, frozen)]
        every = torch.nn.modules.module.register_module_forward_hook(lambda part, *_: copies.append(type(part)))
        frozen(pixels)
        every.remove()
    assert len(seen) == 3 and type(frozen.encoder.stem.bn) in copies
    for one, other in zip(seen[0] + (maps[0],), seen[1] + (maps[1],)):
        assert (one - other).abs().max() <= 1e-5 * one.abs().max()
    frozen.encoder.stem.bn._forward_hooks.clear()
    copied = copy.deepcopy(frozen)
    copied.encoder.stem.bn.running_mean += 100  # its own
    assert torch.equal(frozen(pixels).feature_maps[0], maps[1])
    assert not torch.equal(copied(pixels).feature_maps[0], maps[1])
    assert torch.equal(pickle.loads(pickle.dumps(frozen))(pixels).feature_maps[0], maps[1])
    gradients: list = []
    frozen.encoder.stem.bn.register_full_backward_hook(lambda *given: gradients.append(given))
    frozen(pixels).feature_maps[0].sum().backward()
    assert len(gradients) == 1


@pytest.mark.parametrize("freeze", [replace_batch_norm, freeze_as_torchvision])
def test_an_offloaded_detector_computes_the_same(freeze, config):
    frozen, pixels = trained(EfficientNetNVBackbone(config)), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = frozen(pixels).feature_maps[0]
        freeze(frozen)
        accelerate.cpu_offload(frozen, torch.device("cpu"), offload_buffers=True)
        assert frozen.encoder.stem.bn.running_var.is_meta
        for _ in range(2):
            assert (frozen(pixels).feature_maps[0] - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        remove_hook_from_submodules(frozen)
        assert (frozen(pixels).feature_maps[0] - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("repaired", [False, True])
def test_a_detector_of_before_is_brought_back(repaired, config, monkeypatch):
    """As docs/detection.md says: one trained by an epsilon of 1e-5, or whose variances somebody had raised for it."""
    model, pixels = trained(EfficientNetNVBackbone(config)), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        if repaired:
            wanted = model(pixels).feature_maps[0]
        replace_batch_norm(model)
        blocks = [block for block in model.modules() if isinstance(block, ConvNormAct)]
        for block in blocks:
            block.bn.running_var += (block.eps - 1e-5) * repaired
        with monkeypatch.context() as patched:
            patched.setattr(ConvNormAct, "forward", as_before)
            before = model(pixels).feature_maps[0]
        assert not repaired or (before - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        assert (model(pixels).feature_maps[0] - before).abs().max() > 0.01 * before.abs().max()
        for block in blocks:
            block.bn.running_var -= block.eps - 1e-5
        assert (model(pixels).feature_maps[0] - before).abs().max() <= 1e-5 * before.abs().max()


def as_before(block, x):
    """A layer of the versions that left the epsilon to what stood in the place of batch norm."""
    x = block.bn(block.conv(x if block.pad is None else block.pad(x)))
    return x if block.act is None else block.act(x)


def test_for_detection_takes_what_from_pretrained_takes(folder):
    with_config = EfficientNetNVConfig.from_pretrained(folder)
    for stages in (["stage2", "stage4"], ("stage2", "stage4")):
        backbone = EfficientNetNVBackbone.for_detection(folder, stages, config=with_config)
        assert backbone.out_features == backbone.config.out_features == ["stage2", "stage4"]
    assert EfficientNetNVBackbone.for_detection(folder, config=with_config).channels == [40, 48, 56]
    backbone, report = EfficientNetNVBackbone.for_detection(folder, output_loading_info=True)
    assert backbone.channels == [40, 48, 56] and not report["missing_keys"]
    with pytest.raises(ValueError, match="stage9"):
        EfficientNetNVBackbone.for_detection(folder, ["stage9"])


def test_for_detection_takes_the_last_stage_of_each_stride(config, folder):
    backbone = EfficientNetNVBackbone.for_detection(folder)
    assert backbone.out_features == backbone.config.out_features == ["stage3", "stage4", "stage5"]
    assert backbone.channels == [40, 48, 56] and not backbone.training
    sides = [map_.shape[-1] for map_ in backbone(torch.randn(1, 3, 64, 64)).feature_maps]
    assert sides == [8, 4, 2]
    assert EfficientNetNVBackbone.for_detection(folder, ["stage2"]).channels == [24]
    assert EfficientNetNVBackbone.for_detection(folder, out_indices=[1]).channels == [16]


def test_for_detection_refuses_what_is_no_backbone(config, tiny_config, folder, tmp_path):
    EfficientNetNVModel(tiny_config()).save_pretrained(tmp_path / "short")
    with pytest.raises(ValueError, match="not 8, 16 and 32; say out_features"):
        EfficientNetNVBackbone.for_detection(str(tmp_path / "short"))
    model = EfficientNetNVBackbone(config)
    state = {name: value for name, value in model.state_dict().items() if "stem.conv" not in name}
    model.save_pretrained(tmp_path / "part", state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 1 weights of the backbone, e.g. encoder.stem.conv.weight"):
        EfficientNetNVBackbone.for_detection(str(tmp_path / "part"))


def test_a_backbone_saved_out_of_a_detector_is_a_checkpoint(config, folder, tmp_path):
    detector = load_backbone_weights(EfficientNetNVBackbone(config), folder)
    freeze_as_torchvision(detector)  # and with it go the counters of batch norm
    detector.save_pretrained(tmp_path / "frozen")
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = detector.eval()(pixels).feature_maps[0]
        for opened in (
            EfficientNetNVBackbone.for_detection(tmp_path / "frozen", [f"stage{len(config.strides)}"]),
            load_backbone_weights(EfficientNetNVBackbone(config), tmp_path / "frozen").eval(),
        ):
            assert (opened(pixels).feature_maps[0] - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_for_detection_refuses_a_quantized_checkpoint(config, tmp_path):
    pytest.importorskip("modelopt")
    from effnet_hf.quantization import calibrate, quantize

    model = EfficientNetNVForImageClassification(config).eval()
    quantize(model)
    calibrate(model, [torch.randn(2, 3, 64, 64)])
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is quantized, and detectors have no quantizers"):
        EfficientNetNVBackbone.for_detection(tmp_path)


@pytest.mark.parametrize("given, told", [
    ({"config": "folder"}, "'folder' is no configuration; FeaturePyramid.from_pretrained takes a folder"),
    ({"image_mean": 0.5}, "image_mean is 0.5"),
    ({"image_std": [0, 0, 0]}, r"image_std is \[0, 0, 0\]"),
    ({"image_std": "abc"}, "image_std is 'abc'"),
])  # fmt: skip
def test_a_pyramid_refuses_what_it_cannot_be_made_of(given, told, config):
    with pytest.raises(UserError, match=told):
        FeaturePyramid(**{"config": config, "levels": "P3-P7"} | given)


@pytest.mark.parametrize("kind", [EfficientNetNVForImageClassification, EfficientNetNVModel, EfficientNetNVBackbone])
def test_weights_of_every_kind_of_checkpoint_are_given_to_a_detector(kind, config, tmp_path):
    model = trained(kind(config))
    model.save_pretrained(tmp_path)
    detector = torch.nn.Sequential(torch.nn.ModuleDict({"backbone": EfficientNetNVBackbone(config)}))
    with torch.no_grad():
        replace_batch_norm(detector)
    assert load_backbone_weights(detector, tmp_path) is detector
    given = detector[0]["backbone"].state_dict()
    own = {name.removeprefix("efficientnet."): value for name, value in model.state_dict().items()}
    assert given.keys() < own.keys() and all(torch.equal(value, own[name]) for name, value in given.items())


def test_weights_of_another_network_are_refused_and_nothing_is_changed(config, tiny_config, folder):
    with pytest.raises(UserError, match="this Linear has no EfficientNetNVBackbone to give weights to"):
        load_backbone_weights(torch.nn.Linear(1, 1), folder)
    other = copy.deepcopy(config)
    other.padding = "same"  # of the same shapes
    detector = torch.nn.ModuleList([EfficientNetNVBackbone(config), EfficientNetNVBackbone(other)])
    before = copy.deepcopy(detector.state_dict())
    with pytest.raises(UserError, match="another network than the detector's backbone: padding is symmetric, in the"):
        load_backbone_weights(detector, folder)
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())
    with pytest.raises(UserError, match="checkpoint /nowhere cannot be opened: there is no such folder here"):
        load_backbone_weights(detector, "/nowhere")


@pytest.mark.parametrize("norm", [torch.nn.Identity, lambda: torch.nn.GroupNorm(2, 16)])
def test_a_backbone_with_other_norms_or_none_is_given_no_weights(norm, config, folder):
    detector = torch.nn.Sequential(EfficientNetNVBackbone(config))
    detector[0].encoder.stem.bn = norm()
    before = copy.deepcopy(detector.state_dict())
    with pytest.raises(UserError, match=r"backbone of this Sequential has no encoder.stem.bn.\w+, so checkpoint"):
        load_backbone_weights(detector, folder)
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())


def test_a_detector_on_the_meta_device_is_given_no_weights(config, folder):
    with torch.device("meta"):
        detector = EfficientNetNVBackbone(config)
    with pytest.raises(UserError, match="has no weights to replace: encoder.stem.conv.weight is on the meta device"):
        load_backbone_weights(detector, folder)


def test_quantized_weights_are_refused(config, tmp_path):
    config.save_pretrained(tmp_path)
    fields = (tmp_path / "config.json").read_text("utf-8")
    (tmp_path / "config.json").write_text(fields.replace('"quantization": null', '"quantization": {}'), "utf-8")
    with pytest.raises(UserError, match="is quantized, and detectors have no quantizers"):
        load_backbone_weights(EfficientNetNVBackbone(config), tmp_path)


@pytest.mark.parametrize("levels, sides", [("P2-P6", [16, 8, 4, 2, 1]), ("P3-P7", [8, 4, 2, 1, 1])])
def test_a_feature_pyramid_has_the_levels_of_its_name(levels, sides, folder):
    pyramid = FeaturePyramid.from_pretrained(folder, levels, 32, trainable_stages=3)
    maps = pyramid(torch.randn(1, 3, 64, 64))
    assert [(map_.shape[1], map_.shape[-1]) for map_ in maps.values()] == [(32, side) for side in sides]
    assert list(maps)[:3] == ["0", "1", "2"] and pyramid.out_channels == 32
    trained = {name.split(".")[2] for name, weight in pyramid.body.named_parameters() if weight.requires_grad}
    assert trained == {"2", "3", "4"}
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in pyramid.modules())


def test_a_feature_pyramid_says_how_images_are_normalised(folder):
    processor = EfficientNetNVImageProcessor.from_pretrained(folder)
    processor.rescale_factor, processor.image_mean, processor.image_std = 1.0, [127.5] * 3, [51.0] * 3  # of bytes
    processor.save_pretrained(folder)
    pyramid = FeaturePyramid.from_pretrained(folder, "P3-P7", 32, trainable_stages=0, frozen_norm=False)
    assert pyramid.image_mean == pytest.approx([0.5] * 3) and pyramid.image_std == pytest.approx([0.2] * 3)
    assert not any(weight.requires_grad for weight in pyramid.body.parameters())
    assert isinstance(pyramid.body.encoder.stem.bn, torch.nn.BatchNorm2d)


def test_a_feature_pyramid_that_cannot_be_is_refused(config, tiny_config):
    with pytest.raises(UserError, match="levels is 'P3'; it must be one of 'P2-P6', 'P3-P7'"):
        FeaturePyramid(config, "P3")
    with pytest.raises(UserError, match=r"levels is \['P3-P7'\]; it must be one of"):
        FeaturePyramid(config, ["P3-P7"])
    for count in (7, -1, 2.0, True, "5"):
        with pytest.raises(UserError, match=f"trainable_stages is {count!r}; it must be a whole number from 0 to 6"):
            FeaturePyramid(config, "P3-P7", trainable_stages=count)
    for width in (0, 2.0, "256"):
        with pytest.raises(UserError, match=f"out_channels is {width!r}; it must be a whole number of at least 1"):
            FeaturePyramid(config, "P3-P7", width)
    with pytest.raises(UserError, match=r"need a stage of stride 16, and there are \[2, 4, 8\]"):
        FeaturePyramid(tiny_config(), "P3-P7")
