"""The backbone offers every stage's map to detectors and segmenters, through AutoBackbone and from any checkpoint."""

import pytest
import torch
import transformers
from transformers import AutoBackbone, AutoConfig

from effnet_hf import EfficientNetNVBackbone, EfficientNetNVConfig, EfficientNetNVForImageClassification


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize(
    ("variant", "channels"),
    [
        ("b0", [32, 16, 24, 40, 80, 112, 192, 320]),
        ("b4", [48, 24, 32, 56, 112, 160, 272, 448]),
    ],
)
def test_stages_have_names_strides_and_channels(variant, channels):
    config = EfficientNetNVConfig.from_variant(variant, out_indices=list(range(8)))
    with torch.device("meta"):
        backbone = EfficientNetNVBackbone(config).eval()
        outputs = backbone(torch.empty(1, 3, 64, 64))
    assert backbone.stage_names == ["stem", *(f"stage{i}" for i in range(1, 8))]
    assert list(backbone.strides) == backbone.stage_names
    assert list(backbone.strides.values()) == [2, 2, 4, 8, 16, 16, 32, 32]
    assert backbone.channels == backbone.num_features == channels
    assert backbone.out_feature_channels == dict(zip(backbone.stage_names, channels))
    for map_, name in zip(outputs.feature_maps, backbone.stage_names, strict=True):
        side = 64 // backbone.strides[name]
        assert map_.shape == (1, backbone.out_feature_channels[name], side, side)


def test_only_the_chosen_stages_are_returned_in_order(tiny_config, pixels):
    backbone = EfficientNetNVBackbone(tiny_config(out_features=["stem", "stage2"])).eval()
    outputs = backbone(pixels, output_hidden_states=True)
    assert backbone.channels == [16, 24]
    assert outputs.hidden_states is not None
    stem, stage2 = outputs.feature_maps
    assert torch.equal(stem, outputs.hidden_states[0])
    assert torch.equal(stage2, outputs.hidden_states[2])
    assert backbone(pixels).hidden_states is None
    (maps,) = backbone(pixels, return_dict=False)
    assert all(map(torch.equal, maps, outputs.feature_maps))
    backbone.out_indices = [3]
    assert [tuple(map_.shape) for map_ in backbone(pixels).feature_maps] == [(2, 40, 4, 4)]


def test_auto_backbone_builds_it_from_a_configuration(tiny_config, pixels):
    backbone = AutoBackbone.from_config(tiny_config(out_features=["stage1", "stage3"]))
    assert type(backbone) is EfficientNetNVBackbone
    assert len(backbone(pixels).feature_maps) == 2


def test_it_loads_the_weights_of_a_classification_checkpoint(tiny_config, pixels, tmp_path):
    classifier = EfficientNetNVForImageClassification(tiny_config()).eval()
    for buffer in classifier.buffers():
        buffer.copy_(torch.rand_like(buffer, dtype=torch.float) + 1)
    classifier.save_pretrained(tmp_path)
    backbone, report = EfficientNetNVBackbone.from_pretrained(
        tmp_path, out_features=["stage1", "stage3"], output_loading_info=True
    )
    assert not report["missing_keys"]
    outputs = classifier(pixels, output_hidden_states=True)
    maps = backbone(pixels).feature_maps
    assert torch.equal(maps[0], outputs.hidden_states[1])
    assert torch.equal(maps[1], outputs.hidden_states[3])


def test_its_own_checkpoint_opens_with_the_same_stages_and_maps(tiny_config, pixels, tmp_path):
    backbone = EfficientNetNVBackbone(tiny_config(out_features=["stage1", "stage3"])).eval()
    backbone.save_pretrained(tmp_path)
    loaded = EfficientNetNVBackbone.from_pretrained(tmp_path)
    assert loaded.out_features == ["stage1", "stage3"]
    assert all(map(torch.equal, loaded(pixels).feature_maps, backbone(pixels).feature_maps))
    assert type(AutoBackbone.from_config(AutoConfig.from_pretrained(tmp_path))) is EfficientNetNVBackbone


@pytest.mark.skipif(
    transformers.__version__ >= "5",
    reason="transformers 5.23 asks the Hub whether the folder is a repository (AutoBackbone.from_pretrained calls "
    "repo_exists first), so it opens no local folder of any model; EfficientNetNVBackbone.from_pretrained does",
)
def test_auto_backbone_opens_a_local_folder(tiny_config, pixels, tmp_path):
    EfficientNetNVForImageClassification(tiny_config()).save_pretrained(tmp_path)
    backbone = AutoBackbone.from_pretrained(tmp_path, out_indices=[1, 2])
    assert type(backbone) is EfficientNetNVBackbone
    assert [map_.shape[1] for map_ in backbone(pixels).feature_maps] == [16, 24]
