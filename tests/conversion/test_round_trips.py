"""ours -> X -> ours returns every bit, for every dialect and variant, through dictionaries and through files."""

import pytest
import torch
from random_weights import assert_same, random_state

from effnet_hf import EfficientNetNVConfig
from effnet_hf.configuration import QUANTIZATION, VARIANTS
from effnet_hf.conversion import DIALECTS, FOREIGN, Converted, load_foreign, to_foreign, write_folder, write_foreign
from effnet_hf.conversion.dialect import named_variant
from effnet_hf.conversion.nvidia import NVIDIA
from effnet_hf.errors import UserError
from effnet_hf.image_processing_efficientnet_nv import EfficientNetNVImageProcessor


def converted(config, path, quantized: bool = False) -> Converted:
    fields = {}
    if quantized:
        pytest.importorskip("modelopt", reason="needs the quant extra")
        fields["quantizer_amax"] = random_amax(config)
        config.quantization = {**QUANTIZATION, "narrow_range": True}
    processor = EfficientNetNVImageProcessor(size=100, crop_size=90, resample=2, image_mean=[0.1, 0.2, 0.3])
    return Converted(config, random_state(config), processor, "effnet_hf", "source", path, **fields)


def random_amax(config) -> dict[str, torch.Tensor]:
    names = NVIDIA.quantizer_names(config)
    shapes = {f"{key.removesuffix('.weight')}.weight": value.shape for key, value in random_state(config).items()}
    amax = {}
    for i, name in enumerate(names):
        shape = (shapes[name][0], *[1] * (len(shapes[name]) - 1)) if name.endswith(".weight") else ()
        amax[name] = torch.rand(shape, generator=torch.Generator().manual_seed(i))
    return amax


@pytest.mark.parametrize("dialect", FOREIGN)
def test_names_are_one_to_one(dialect):
    for variant in VARIANTS:
        config = EfficientNetNVConfig.from_variant(variant)
        names = DIALECTS[dialect].module_names(config)
        assert len(set(names.values())) == len(names), variant


@pytest.mark.parametrize("dialect", FOREIGN)
@pytest.mark.parametrize("variant", ["b0", "b4", "widese-b0", "widese-b4", "lite0"])
def test_dictionaries_return_every_bit(dialect, variant):
    config = EfficientNetNVConfig.from_variant(variant, num_labels=7)
    state = random_state(config)
    foreign = DIALECTS[dialect].write(state, config)
    assert_same(DIALECTS[dialect].read(foreign, config, "it"), state)
    assert all(foreign[key].dim() == 4 for key in foreign if "se" in key.split(".") and key.endswith(".weight"))


@pytest.mark.parametrize("variant", ["b0", "b4", "widese-b0", "widese-b4"])
def test_quantized_dictionaries_return_every_bit(variant):
    config = EfficientNetNVConfig.from_variant(variant)
    amax = random_amax(config)
    foreign = NVIDIA.write_quantizers(amax, config)
    assert_same(NVIDIA.read_quantizers(foreign, config, "it"), amax)
    assert len(amax) == {"b0": 222, "b4": 444}[variant[-2:]]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dialect", FOREIGN)
def test_files_return_every_bit(dialect, suffix, tmp_path):
    padding = "same" if dialect in ("lukemelas", "transformers") else "symmetric"
    config = EfficientNetNVConfig.from_variant("b0", num_labels=7, padding=padding)
    before = converted(config, tmp_path / "source", quantized=dialect == "nvidia")
    write_foreign(before, dialect, tmp_path / f"x{suffix}")
    arch = "efficientnet_b0" if (dialect, suffix) == ("timm", ".pth") else None
    after = load_foreign(tmp_path / f"x{suffix}", arch=arch)
    assert (after.dialect, after.exact, after.config.variant, after.config.num_labels) == (dialect, True, "b0", 7)
    assert_same(after.state_dict, before.state_dict)
    assert_same(after.quantizer_amax, before.quantizer_amax)
    assert (after.config.quantization is None) == (dialect != "nvidia")
    if suffix == ".safetensors":  # the header also carries what names and shapes cannot
        assert after.config.to_dict() == before.config.to_dict()
        assert (
            after.processor.to_dict().items() <= before.processor.to_dict().items()
        )  # but auto_map, written on saving


@pytest.mark.parametrize("dialect", ["timm", "transformers"])
def test_folders_return_every_bit_without_our_header(dialect, tmp_path, monkeypatch):
    monkeypatch.setattr("effnet_hf.conversion.save._header", lambda converted: {"format": "pt"})
    config = EfficientNetNVConfig.from_variant("b1", padding="same", num_labels=3, image_size=90)
    before = converted(config, tmp_path / "source")
    write_foreign(before, dialect, tmp_path / "x")
    after = load_foreign(tmp_path / "x")
    assert after.exact and (after.config.padding, after.config.batch_norm_eps) == ("same", 1e-3)
    assert (after.config.image_size, after.config.num_labels) == (90, 3)
    assert_same(after.state_dict, before.state_dict)
    for name in ("size", "crop_size", "resample", "image_mean", "image_std", "rescale_factor"):
        assert getattr(after.processor, name) == getattr(before.processor, name), name


def test_our_folder_returns_every_bit(tmp_path):
    config = EfficientNetNVConfig.from_variant("b0", id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1})
    config.batch_norm_eps, config.dropout_rate = 1e-5, 0.3
    before = converted(config, tmp_path / "source", quantized=True)
    (tmp_path / "source").write_bytes(b"x")
    write_folder(before, tmp_path / "x")
    after = load_foreign(tmp_path / "x")
    assert after.dialect == "effnet_hf" and after.config.id2label == {0: "cat", 1: "dog"}
    assert (after.config.batch_norm_eps, after.config.dropout_rate) == (1e-5, 0.3)
    assert_same(after.state_dict, before.state_dict)
    assert {key: tensor.tolist() for key, tensor in after.quantizer_amax.items()} == {
        key: tensor.tolist() for key, tensor in before.quantizer_amax.items()
    }
    assert after.processor.to_dict().items() <= before.processor.to_dict().items()  # but auto_map, written on saving
    with pytest.raises(UserError, match=r"quantization \(timm.create_model has no quantizers\)"):
        write_foreign(after, "timm", tmp_path / "timm.pth")
    write_foreign(after, "timm", tmp_path / "timm.pth", force=True)
    assert_same(load_foreign(tmp_path / "timm.pth", arch="efficientnet_b0").state_dict, before.state_dict)


def test_model_writes_like_its_state_dict():
    config = EfficientNetNVConfig.from_variant("b0", num_labels=2)
    state = random_state(config)
    model = Converted(config, state, None, "effnet_hf", "source", None).model()
    assert_same(to_foreign(model, "timm"), DIALECTS["timm"].write(state, config))
    assert all(parameter.requires_grad for parameter in model.parameters()) and not model.training


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_is_found_by_its_shapes(variant):
    config = EfficientNetNVConfig.from_variant(variant, num_channels=1)
    assert named_variant(config) == variant
    config.kernel_sizes = [3] * 7
    assert named_variant(config) is None
