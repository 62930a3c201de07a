"""The configuration describes an architecture completely, refuses what it cannot mean, and survives any round trip."""

import copy
import json

import pytest
from transformers import AutoConfig

from effnet_hf import EfficientNetNVConfig, EfficientNetNVModel
from effnet_hf.configuration import VARIANTS


# size: image size, stem, stage widths, blocks per stage, head, dropout, survival probability
SCALED = {
    "b0": (224, 32, [16, 24, 40, 80, 112, 192, 320], [1, 2, 2, 3, 3, 4, 1], 1280, 0.2, 1.0),
    "b1": (240, 32, [16, 24, 40, 80, 112, 192, 320], [2, 3, 3, 4, 4, 5, 2], 1280, 0.2, 1.0),
    "b2": (260, 32, [16, 24, 48, 88, 120, 208, 352], [2, 3, 3, 4, 4, 5, 2], 1408, 0.3, 1.0),
    "b3": (300, 40, [24, 32, 48, 96, 136, 232, 384], [2, 3, 3, 5, 5, 6, 2], 1536, 0.3, 1.0),
    "b4": (380, 48, [24, 32, 56, 112, 160, 272, 448], [2, 4, 4, 6, 6, 8, 2], 1792, 0.4, 0.8),
    "b5": (456, 48, [24, 40, 64, 128, 176, 304, 512], [3, 5, 5, 7, 7, 9, 3], 2048, 0.4, 1.0),
    "b6": (528, 56, [32, 40, 72, 144, 200, 344, 576], [3, 6, 6, 8, 8, 11, 3], 2304, 0.5, 1.0),
    "b7": (600, 64, [32, 48, 80, 160, 224, 384, 640], [4, 7, 7, 10, 10, 13, 4], 2560, 0.5, 1.0),
    "lite0": (224, 32, [16, 24, 40, 80, 112, 192, 320], [1, 2, 2, 3, 3, 4, 1], 1280, 0.2, 1.0),
    "lite4": (300, 32, [24, 32, 56, 112, 160, 272, 448], [1, 4, 4, 6, 6, 8, 1], 1280, 0.3, 1.0),
}


@pytest.mark.parametrize("name", [*SCALED, *(f"widese-{size}" for size in SCALED if "lite" not in size)])
def test_every_size_has_the_published_widths_and_depths(name):
    size = name.removeprefix("widese-")
    config = EfficientNetNVConfig.from_variant(name)
    image_size, stem, widths, depths, head, dropout_rate, survival_prob = SCALED[size]
    assert config.image_size == image_size
    assert config.hidden_sizes == [stem, *widths]
    assert config.depths == depths
    assert config.num_hidden_layers == sum(depths)
    assert config.hidden_dim == head
    assert (config.dropout_rate, config.survival_prob) == (dropout_rate, survival_prob)
    assert config.se_base == ("hidden" if "widese" in name else "input")
    assert config.num_labels == 1000


def test_defaults_are_b0_with_tensorflows_batch_norm():
    config = EfficientNetNVConfig()
    b0 = EfficientNetNVConfig.from_variant("b0", num_labels=config.num_labels, variant=None)
    assert config.to_dict() == b0.to_dict()
    assert (config.batch_norm_eps, config.batch_norm_momentum) == (1e-3, 0.01)
    assert (config.hidden_act, config.padding, config.conv_init) == ("silu", "symmetric", "fan_in")


def test_twenty_one_architectures_have_names():
    assert len(VARIANTS) == 8 + 8 + 5
    for name in VARIANTS:
        assert EfficientNetNVConfig.from_variant(name).variant == name


@pytest.mark.parametrize(
    ("spelling", "variant"),
    [
        ("B4", "b4"),
        ("efficientnet-b4", "b4"),
        ("efficientnet_b4", "b4"),
        ("efficientnet-quant-b4", "b4"),
        ("efficientnet-widese-b4", "widese-b4"),
        ("efficientnet_lite0", "lite0"),
    ],
)
def test_a_variant_may_be_spelled_as_in_the_original_and_in_timm(spelling, variant):
    assert EfficientNetNVConfig.from_variant(spelling).variant == variant


def test_survival_probability_falls_with_depth_and_never_reaches_its_end_value():
    config = EfficientNetNVConfig.from_variant("b4")
    expected = [1 - 0.2 * i / 32 for i in range(32)]
    assert config.survival_probs == pytest.approx(expected, abs=1e-12)
    by_stage = [list(stage.survival_probs) for stage in config.stages]
    assert sum(by_stage, []) == config.survival_probs
    assert [len(probs) for probs in by_stage] == config.depths
    # the last block of each stage, as published
    last = [0.99375, 0.96875, 0.94375, 0.90625, 0.86875, 0.81875, 0.80625]
    assert [probs[-1] for probs in by_stage] == pytest.approx(last, abs=1e-12)


def test_widths_never_shrink_by_more_than_a_tenth():
    config = EfficientNetNVConfig(width_coefficient=0.55)
    # 16 * 0.55 = 8.8 -> 8; 24 * 0.55 = 13.2 -> 16; 32 * 0.55 = 17.6 -> 16; 40 * 0.55 = 22 -> 24
    assert [config.round_width(channels) for channels in (16, 24, 32, 40)] == [8, 16, 16, 24]
    for channels in range(8, 2000, 8):
        rounded = config.round_width(channels)
        assert rounded % 8 == 0
        assert rounded >= 0.9 * 0.55 * channels


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("image_size", 0, "image_size must be a whole number from 1 to 16384, got 0"),
        ("image_size", 10**9, "image_size must be a whole number from 1 to 16384, got 1000000000"),
        ("stem_channels", 10**12, "stem_channels must be a whole number from 1 to 65536"),
        ("width_coefficient", 10**400, r"width_coefficient must be a number in \(0, 1000\], got 1000"),
        ("width_coefficient", 900, "The widths make a layer of more than 1,000,000 channels"),
        ("expand_ratios", [1, 6, 6, 6, 6, 6, 60_000], "The widths make a layer of more than 1,000,000 channels"),
        ("depth_coefficient", 999.0, "num_block_repeats and depth_coefficient make more than 1,000 blocks"),
        ("num_labels", 10**12, "num_labels must be a whole number from 0 to 1000000"),
        ("num_labels", True, "num_labels must be a whole number"),
        ("variant", 3, "variant must be a name or None, got 3"),
        ("variant", "b0\x1b[2J", r"variant must be a name or None, got 'b0\\x1b"),
        ("id2label", {0: "cat", 1: "cat"}, "id2label names two classes 'cat'; every class needs a name of its own"),
        ("id2label", {0: "cat", 1: 7}, "id2label must name every class in words, got 7"),
        ("id2label", {0: "cat", "0": "dog"}, "id2label must name the classes 0 to N - 1"),
        ("id2label", "cat", "id2label must name the classes 0 to N - 1"),
        ("label2id", ["cat"], "label2id must be a map of names"),
        ("label2id", {"cat": 0, "dog": 2}, "id2label must name the classes 0 to N - 1"),
        ("quantization", {"placement": ["cpu"]}, "quantization: placement must be 'nvidia' or 'cpu'"),
        ("quantization", {"num_bits": 8.0}, "quantization: num_bits must be 2 or .*, got 8.0"),
        ("quantization", {"narrow_range": 1}, "quantization: narrow_range must be False or True, got 1"),
        ("quantization", {"calibration_percentile": 0}, r"calibration_percentile must be a number in \(0, 100\]"),
        ("quantization", {"float_layers": "head"}, "float_layers must be a list of names, got 'head'"),
        ("quantization", {"bits": 4}, "quantization must have the keys engine"),
        ("quantization", True, "quantization must have the keys engine"),
        ("thresholds", [0.5] * 2, "thresholds need problem_type 'multi_label_classification', and it is None"),
        ("image_size", 224.0, "image_size must be a whole number"),
        ("image_size", [224, 224], r"image_size must be a whole number from 1 to 16384, got \[224, 224\]"),
        ("num_channels", True, "num_channels must be a whole number"),
        ("stem_channels", "32", "stem_channels must be a whole number"),
        ("head_channels", -1, "head_channels must be a whole number"),
        ("depth_divisor", 8.0, "depth_divisor must be a whole number"),
        ("width_coefficient", 0, r"width_coefficient must be a number in \(0, 1000\], got 0"),
        ("depth_coefficient", float("nan"), r"depth_coefficient must be a number in \(0, 1000\]"),
        ("depth_coefficient", float("inf"), r"depth_coefficient must be a number in \(0, 1000\]"),
        ("batch_norm_eps", 0.0, r"batch_norm_eps must be a number in \(0, 1000\]"),
        ("batch_norm_momentum", 1.01, r"batch_norm_momentum must be a number in \[0, 1\], got 1.01"),
        ("se_ratio", -0.25, r"se_ratio must be a number in \[0, 1\]"),
        ("se_ratio", "0.25", r"se_ratio must be a number in \[0, 1\]"),
        ("dropout_rate", 1.0, r"dropout_rate must be a number in \[0, 1\), got 1.0"),
        ("dropout_rate", "0.2", r"dropout_rate must be a number in \[0, 1\)"),
        ("survival_prob", 0.0, r"survival_prob must be a number in \(0, 1\], got 0.0"),
        ("survival_prob", 1.2, r"survival_prob must be a number in \(0, 1\]"),
        ("se_base", "output", "se_base must be 'input' or 'hidden', got 'output'"),
        ("stochastic_depth_mode", "pixel", "stochastic_depth_mode must be 'batch' or 'row'"),
        ("conv_init", "xavier", "conv_init must be 'fan_in' or 'fan_out'"),
        ("padding", "valid", "padding must be 'symmetric' or 'same'"),
        ("scale_stem_and_head", "no", "scale_stem_and_head must be True or False, got 'no'"),
        ("hidden_act", "swishy", "hidden_act 'swishy' is not an activation of transformers"),
        ("hidden_act", ["silu"], "is not an activation of transformers"),
        ("kernel_sizes", 3, "kernel_sizes must be a list with one entry per stage, got 3"),
        ("kernel_sizes", [3, 3, 5, 3, 5, 5, 4], "kernel_sizes must be odd"),
        ("kernel_sizes", [3, 3, 5], "needs one entry per stage in each of its fields, got lengths"),
        ("strides", [1, 2, 2, 2, 1, 2, 0], "strides must be made of whole numbers from 1"),
        ("num_block_repeats", [1, 2, 2, 3, 3, 4, 1.5], "num_block_repeats must be made of whole numbers"),
        ("expand_ratios", "1666666", "expand_ratios must be a list with one entry per stage"),
        ("out_channels", [], "needs one entry per stage"),
        ("num_labels", -1, "num_labels must be a whole number from 0 to 1000000, got -1"),
        ("num_labels", "ten", "num_labels must be a whole number"),
        ("problem_type", "multi_label", "problem_type must be None or 'regression'"),
        ("out_features", ["stage8"], "out_features must be a subset of stage_names"),
        ("out_features", "stage2", "out_features must be a list"),
        ("out_indices", [8], r"out_indices must be a list of stages -8 to 7, got \[8\]"),
        ("out_indices", [-9], "out_indices must be a list of stages -8 to 7"),
        ("out_indices", 7, "out_indices must be a list of stages -8 to 7"),
        ("id2label", {1: "cat", 2: "dog"}, "id2label must name the classes 0 to N - 1"),
        ("id2label", {"cat": 0, "dog": 1}, "id2label must name the classes 0 to N - 1"),
    ],
)
def test_a_bad_value_is_refused_with_a_sentence(field, value, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        EfficientNetNVConfig(**{field: value})
    # from_pretrained overrides are no back door
    EfficientNetNVConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        EfficientNetNVConfig.from_pretrained(tmp_path, **{field: value})


def test_every_list_of_the_block_table_needs_the_same_length():
    with pytest.raises(ValueError, match="'strides': 2"):
        EfficientNetNVConfig(strides=[1, 2])


def test_contradicting_class_counts_are_refused():
    with pytest.raises(ValueError, match="num_labels is 3 but id2label names 2 classes; give one of them"):
        EfficientNetNVConfig(num_labels=3, id2label={0: "cat", 1: "dog"})


def test_label_maps_that_disagree_are_refused():
    with pytest.raises(ValueError, match="label2id {'cat': 1, 'dog': 0} does not say what id2label does"):
        EfficientNetNVConfig(id2label={0: "cat", 1: "dog"}, label2id={"cat": 1, "dog": 0})
    assert EfficientNetNVConfig(id2label={"1": "dog", "0": "cat"}).id2label == {0: "cat", 1: "dog"}


def test_out_features_and_out_indices_must_name_the_same_stages():
    config = EfficientNetNVConfig(out_features=["stage3", "stage5"], out_indices=[3, 5])
    assert config.out_features == ["stage3", "stage5"]
    with pytest.raises(ValueError, match="stages"):
        EfficientNetNVConfig(out_features=["stage3"], out_indices=[4])


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("b8", "b7"), ("wide-se-b4", "widese-b4"), ("widese-b9", "widese-b7"), ("light0", "lite0"), (4, "b4")],
)
def test_an_unknown_variant_suggests_the_nearest_and_lists_all(wrong, right):
    with pytest.raises(ValueError, match=f"Unknown variant {wrong!r}. Did you mean '{right}'") as error:
        EfficientNetNVConfig.from_variant(wrong)
    assert all(name in str(error.value) for name in VARIANTS)


@pytest.mark.parametrize("wrong", ["resnet50", None, ""])
def test_a_variant_unlike_any_other_gets_the_list_without_a_guess(wrong):
    with pytest.raises(ValueError, match=r"Unknown variant .*\. Known variants: b0, b1"):
        EfficientNetNVConfig.from_variant(wrong)


def test_from_variant_takes_any_field_as_an_override():
    config = EfficientNetNVConfig.from_variant("widese-b4", num_labels=10, survival_prob=0.9, image_size=320)
    assert (config.num_labels, config.survival_prob, config.image_size) == (10, 0.9, 320)
    named = EfficientNetNVConfig.from_variant("b0", id2label={0: "cat", 1: "dog"})
    assert named.num_labels == 2
    assert EfficientNetNVConfig.from_variant("b0", label2id={"cat": 0, "dog": 1}).num_labels == 2


def test_class_names_need_to_be_given_only_once():
    names, indices = {0: "cat", 1: "dog", 2: "cow"}, {"cat": 0, "dog": 1, "cow": 2}
    for given in ({"id2label": names}, {"id2label": list(names.values())}, {"label2id": indices}):
        config = EfficientNetNVConfig(**given)
        assert config.id2label == names
        assert config.label2id == indices
        assert config.num_labels == 3


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"id2label": {0: "cat", 1: "dog", 2: "cow"}},
        {"num_labels": 0},
        {"num_labels": 1, "problem_type": "regression"},
        {"out_features": ["stem", "stage2", "stage7"]},
        {"out_indices": [1, 3, 5]},
        {"out_indices": (-3, -1)},
        {name: (1, 3) for name in ("kernel_sizes", "strides", "num_block_repeats", "expand_ratios", "out_channels")},
        {"se_ratio": 0, "padding": "same", "scale_stem_and_head": False, "conv_init": "fan_out"},
    ],
    ids=lambda settings: "+".join(settings) or "defaults",
)
def test_round_trips_lose_nothing(settings, tmp_path):
    config = EfficientNetNVConfig(**settings)
    state = config.to_dict()
    assert EfficientNetNVConfig.from_dict(state).to_dict() == state
    assert EfficientNetNVConfig(**copy.deepcopy(state)).to_dict() == state
    config.save_pretrained(tmp_path)
    for loaded in (EfficientNetNVConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is EfficientNetNVConfig
        assert loaded.hidden_sizes == config.hidden_sizes
        assert (loaded.out_features, loaded.out_indices) == (config.out_features, config.out_indices)
        assert (loaded.id2label, loaded.label2id) == (config.id2label, config.label2id)
        assert loaded.num_labels == config.num_labels
        again = loaded.to_dict()
        del again["auto_map"]  # written on saving
        loading_adds = {field: again.get(field) for field in ("_name_or_path", "transformers_version")}
        assert again == {**state, **loading_adds}


def test_stages_can_be_chosen_by_name_or_index_and_both_agree():
    by_name = EfficientNetNVConfig(out_features=["stage3", "stage5", "stage7"])
    by_index = EfficientNetNVConfig(out_indices=[3, 5, 7])
    by_negative_index = EfficientNetNVConfig(out_indices=(-5, -3, -1))
    for config in (by_name, by_index, by_negative_index):
        assert config.out_features == ["stage3", "stage5", "stage7"]
        assert config.out_indices == [3, 5, 7]
    assert EfficientNetNVConfig().out_features == ["stage7"]


def test_overrides_on_loading_replace_saved_fields_and_what_hangs_on_them(tmp_path):
    saved = EfficientNetNVConfig.from_variant("b4", id2label={0: "cat", 1: "dog"}, out_features=["stage2"])
    saved.save_pretrained(tmp_path)
    load = EfficientNetNVConfig.from_pretrained

    config = load(tmp_path, survival_prob=1.0, dropout_rate=0.0)
    assert (config.survival_prob, config.dropout_rate) == (1.0, 0.0)
    assert set(config.survival_probs) == {1.0}
    assert config.id2label == {0: "cat", 1: "dog"}

    assert load(tmp_path, num_labels=2).id2label == {0: "cat", 1: "dog"}
    assert load(tmp_path, num_labels=None, id2label=None).id2label == {0: "cat", 1: "dog"}
    assert load(tmp_path, num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert load(tmp_path, num_labels=3).label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    renamed = load(tmp_path, id2label={0: "Katze", 1: "Hund", 2: "Kuh"})
    assert renamed.num_labels == 3
    assert renamed.label2id == {"Katze": 0, "Hund": 1, "Kuh": 2}

    assert load(tmp_path, out_features=["stem", "stage3"]).out_indices == [0, 3]
    assert load(tmp_path, out_indices=[1]).out_features == ["stage1"]
    assert load(tmp_path).out_features == ["stage2"]

    config, unused = load(tmp_path, survival_prob=0.5, not_a_field=1, return_unused_kwargs=True)
    assert config.survival_prob == 0.5
    assert unused == {"not_a_field": 1}


def test_from_dict_leaves_its_argument_alone():
    state = EfficientNetNVConfig(id2label={0: "cat", 1: "dog"}).to_dict()
    before = copy.deepcopy(state)
    EfficientNetNVConfig.from_dict(state, num_labels=5, survival_prob=0.9)
    assert state == before


def test_a_field_set_by_hand_is_checked_when_a_model_is_built():
    config = EfficientNetNVConfig()
    config.survival_prob = 2.0
    with pytest.raises(ValueError, match="survival_prob must be a number in"):
        EfficientNetNVModel(config)


def test_config_json_holds_no_derived_numbers(tmp_path):
    EfficientNetNVConfig.from_variant("b4").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    derived = {"hidden_sizes", "depths", "survival_probs", "stages", "stem_width", "hidden_dim", "num_hidden_layers"}
    assert not derived & saved.keys()
    assert saved["model_type"] == "efficientnet_nv"


@pytest.mark.parametrize("wrong", [[0.5], [0.5] * 3, "0.5", [0.5, "0.5"], [0.5, float("nan")], [0.5, 1.5], [True, 0.5]])
def test_thresholds_are_one_probability_per_class(wrong):
    with pytest.raises(ValueError, match="thresholds must be a"):
        EfficientNetNVConfig(num_labels=2, problem_type="multi_label_classification", thresholds=wrong)


def test_thresholds_go_with_their_classes(tmp_path):
    EfficientNetNVConfig(num_labels=2, problem_type="multi_label_classification", thresholds=(0, 0.25)).save_pretrained(
        tmp_path
    )
    assert EfficientNetNVConfig.from_pretrained(tmp_path).thresholds == [0, 0.25]
    changes = {"num_labels": 3}, {"id2label": {0: "a", 1: "b"}}, {"problem_type": "single_label_classification"}
    for change in changes:
        assert EfficientNetNVConfig.from_pretrained(tmp_path, **change).thresholds is None
    assert EfficientNetNVConfig.from_pretrained(tmp_path, thresholds=[0.5, 1.0]).thresholds == [0.5, 1.0]
