"""Every field of a file that others may have written: a wrong value is refused in a line that names file and field."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from effnet_hf import EfficientNetNVConfig, EfficientNetNVForImageClassification, EfficientNetNVImageProcessor
from effnet_hf.checkpoint import open_checkpoint
from effnet_hf.conversion import TRAINER_FILE, TrainerState, load_foreign, read_trainer_state
from effnet_hf.conversion.timm import TIMM
from effnet_hf.conversion.trainer_state import write_trainer_state
from effnet_hf.errors import UserError
from effnet_hf.recipes import load_recipe


NAN, INFINITY, HUGE = float("nan"), float("inf"), 10**400
EVERY_KIND = (None, True, -1, 0, 1.5, NAN, INFINITY, HUGE, 10**12, "3", "", [], [3], {}, {"a": 1})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    config = EfficientNetNVConfig(
        image_size=16, kernel_sizes=[3], strides=[2], num_block_repeats=[1], expand_ratios=[2], out_channels=[16],
        stem_channels=16, head_channels=32, id2label={0: "cat", 1: "dog"},
    )  # fmt: skip
    EfficientNetNVForImageClassification(config).save_pretrained(folder)
    EfficientNetNVImageProcessor.for_image_size(16, margin=0).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(model, tmp_path):
    return shutil.copytree(model, tmp_path / "copy")


def rewrite(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def open_all(folder):
    checkpoint = open_checkpoint(str(folder))
    return checkpoint, checkpoint.processor, checkpoint.load()


def refusal(function, *arguments) -> str:
    with pytest.raises(UserError) as raised:
        function(*arguments)
    said = str(raised.value)
    assert "\n" not in said and len(said) < 700 and said.isprintable(), said
    return said


def differing(*right):
    """Every kind of value that is none of these."""
    return [value for value in EVERY_KIND if not any(value == one and type(value) is type(one) for one in right)]


CONFIG = {
    **dict.fromkeys(("image_size", "num_channels", "depth_divisor", "stem_channels", "head_channels"), differing()),
    **dict.fromkeys(("width_coefficient", "depth_coefficient", "batch_norm_eps"), differing(1.5)),
    **dict.fromkeys(("se_ratio", "batch_norm_momentum", "dropout_rate"), differing(0)),
    "survival_prob": differing(),
    **dict.fromkeys(("se_base", "stochastic_depth_mode", "conv_init", "padding"), differing()),
    "hidden_act": differing(),
    "scale_stem_and_head": differing(True),
    "problem_type": differing(None),
    **dict.fromkeys(("kernel_sizes", "num_block_repeats"), differing([3])),
    **dict.fromkeys(("strides", "expand_ratios", "out_channels"), [[0], [-1], [True], ["2"], [1.5], [NAN], [2, 2], 2]),
    "quantization": [*differing(None, {}), {"placement": 3}, {"num_bits": True}, {"calibration_percentile": NAN}],
    "variant": differing(None, "3", ""),
    "out_features": [["stage9"], "stage1", 3, [3]],
    "out_indices": [[9], 3, "1", [True], [NAN]],
    "id2label": [
        True, 3, "cat", {"0": "cat", "2": "dog"}, {"0": "cat", "1": "cat"}, {"0": "cat", "1": 7}, {"a": "cat"},
        {"0": None, "1": "dog"}, {"00": "cat", "1": "dog"},
    ],
    "label2id": [True, 3, "cat", {"cat": 1, "dog": 0}, {"cat": 0}, {"cat": "0", "dog": "1"}, ["cat"]],
    "num_labels": [3, -1, "2", 2.0, True, 10**12, HUGE, [2]],
    "model_type": ["resnet", 3, None, ["efficientnet_nv"], {}],
}  # fmt: skip
NONE_IS_THE_DEFAULT = {"size", "crop_size", "image_mean", "image_std"}
PROCESSOR = {
    **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_center_crop"), differing(True)),
    **dict.fromkeys(("size", "crop_size"), [v for v in differing() if v is not None]),
    "resample": [v for v in differing(0) if v != 3],
    "rescale_factor": differing(1.5, 10**12),
    "image_mean": [v for v in differing(-1, 0, 1.5, 10**12, None)],
    "image_std": [v for v in differing(1.5, 10**12, None)],
}


def cases(table):
    rows = [(field, value) for field, values in table.items() for value in values]
    return [pytest.param(*row, id=f"{row[0]}={repr(row[1])[:24]}") for row in rows]


@pytest.mark.parametrize("field, value", cases(CONFIG))
def test_a_wrong_field_of_config_json(field, value, copy):
    rewrite(copy / "config.json", **{field: value})
    said = refusal(open_checkpoint, str(copy))
    assert f"{copy}" in said
    if field not in ("model_type", "num_channels") and not (field == "out_channels" and value == [2, 2]):
        assert "config.json: " in said
    told = {
        "num_channels": "channels", "label2id": "label", "num_labels": "num_labels", "model_type": "model",
        "strides": "strides", "expand_ratios": "expand_ratios", "id2label": "id2label",
    }  # fmt: skip
    assert told.get(field, field) in said, said


@pytest.mark.parametrize("field, value", cases(PROCESSOR))
def test_a_wrong_field_of_preprocessor_config_json(field, value, copy):
    rewrite(copy / "preprocessor_config.json", **{field: value})
    said = refusal(lambda: open_checkpoint(str(copy)).processor)
    assert "preprocessor_config.json" in said and field in said


@pytest.mark.parametrize(
    "file, fields",
    [
        ("config.json", {"image_size": 1, "dropout_rate": 0, "survival_prob": 1, "unknown": [3]}),
        ("config.json", {"check": 3, "to_dict": 4, "return_dict": False, "use_return_dict": 1, "dtype": "no such"}),
        ("config.json", {"quantization_config": {"quant_method": "evil"}, "hidden_sizes": 3, "torch_dtype": "float16"}),
        ("config.json", {"id2label": {"1": "Hund 🐕", "0": "{{ cat }} <b>"}, "label2id": None}),
        ("preprocessor_config.json", {"size": 16, "crop_size": {"width": 16, "height": 16}, "preprocess": 3}),
        (
            "preprocessor_config.json",
            {"image_std": [1e-3, 2, 3.5], "image_mean": 0, "rescale_factor": 1, "resample": 0},
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_unusual_fields_that_are_right_or_not_ours_still_open(file, fields, copy):
    rewrite(copy / file, **fields)
    _, processor, network = open_all(copy)
    assert network(torch.zeros(1, 3, 16, 16)).logits.shape == (1, 2) and callable(processor.preprocess)


TEXTS = {
    "empty": b"",
    "blank": b" \n",
    "a list": b"[1]",
    "a number": b"3",
    "half": b'{"image_size": ',
    "twice": b'{"model_type": "efficientnet_nv", "image_size": 16, "image_size": 32}',
    "marked": b'\xef\xbb\xbf{"model_type": "efficientnet_nv"}',
    "UTF-16": '{"model_type": "efficientnet_nv"}'.encode("utf-16"),
    "Latin-1": b'{"model_type": "\xe9"}',
    "deep": b'{"model_type": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a": ' * 100_000 + b"1" + b"}" * 100_000,
    "long number": b'{"image_size": ' + b"9" * 10_000 + b"}",
    "zeros": bytes(100),
}


def places(file):
    file.unlink()
    yield "folder", file.mkdir
    file.rmdir()
    yield "pipe", lambda: os.mkfifo(file)
    file.unlink()
    yield "dangling link", lambda: file.symlink_to("nowhere")
    file.unlink()
    yield "link to itself", lambda: file.symlink_to(file.name)
    file.unlink()
    yield "1 GB", lambda: os.truncate(os.open(file, os.O_CREAT | os.O_WRONLY), 1 << 30)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_a_file_that_is_no_such_json(file, copy):
    for name, content in TEXTS.items():
        (copy / file).write_bytes(content)
        said = refusal(open_all, copy)
        assert file in said, name
    for name, make in places(copy / file):
        make()
        assert file in refusal(open_all, copy), name


def test_weights_that_are_no_file(copy):
    for name, make in places(copy / "model.safetensors"):
        make()
        assert "model.safetensors" in refusal(open_all, copy), name


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("efficientnet.head.bn.weight", lambda tensor: tensor * NAN, "holds NaN or infinity in efficientnet.head.bn.w"),
        ("classifier.bias", lambda tensor: tensor + INFINITY, "holds NaN or infinity in classifier.bias"),
        (
            "classifier.bias",
            lambda tensor: tensor.to(torch.int8),
            "holds other numbers than weights in classifier.bias",
        ),
        ("classifier.bias", lambda tensor: tensor.to(torch.complex64), "not a plain tensor"),
        ("classifier.bias", lambda tensor: tensor.to(torch.float8_e5m2), "not a plain tensor"),
        ("classifier.bias", lambda tensor: tensor.double() + 1e300, "holds NaN or infinity in classifier.bias"),
        (
            "efficientnet.head.bn.running_var",
            lambda tensor: -tensor,
            "holds negative numbers in efficientnet.head.bn.r",
        ),
        ("classifier.bias", lambda tensor: None, "lacks classifier.bias"),
        ("efficientnet.extra", lambda tensor: torch.zeros(3), "has no use for efficientnet.extra"),
        ("classifier.bias", lambda tensor: torch.zeros(0, 10**12), "has another shape of classifier.bias"),
    ],
)
def test_weights_that_are_none(name, change, words, copy):
    tensors = load_file(copy / "model.safetensors")
    tensors[name] = change(tensors.get(name))
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, copy / "model.safetensors")
    assert words in refusal(open_all, copy)


def test_one_channel_is_refused_in_a_line(copy):
    rewrite(copy / "config.json", num_channels=1)
    assert "is for images of 1 channels, and ours are prepared as RGB, of 3" in refusal(open_checkpoint, str(copy))


def test_settings_that_together_make_infinity(copy):
    rewrite(copy / "preprocessor_config.json", rescale_factor=1e30, image_std=[1e-30] * 3)
    said = refusal(lambda: open_checkpoint(str(copy)).processor)
    assert "preprocessor_config.json: rescale_factor, image_mean and image_std make pixels as large as 3e+62" in said


# recipe.yaml

RECIPE = [
    ("epochs: 1" + "0" * 400, "is refused: the number"),
    ("epochs: 1" + "0" * 5000, "is refused: the number"),
    ("epochs: 1e30", "--epochs must be at most 1e+09, got 1e+30"),
    ("global_batch_size: 1000000000000", "--global_batch_size must be at most 1e+09"),
    ("epochs: true", "--epochs must be a whole number, got True"),
    ("epochs: [3]", "--epochs must be a whole number, got [3]"),
    ("learning_rate: .inf", "--learning_rate must be a number, got inf"),
    ("end_lr: 1e300", "--end_lr must be at most 1e+30"),
    ("end_lr: {a: 1}", "--end_lr must be a number"),
    ("image_size: 1000000000", "image_size must be a whole number from 1 to 16384"),
    ("strict: yes please", "--strict must be true or false"),
    ("optimizer: [sgd]", "--optimizer must be one of rmsprop, sgd, adamw, got ['sgd']"),
    ("variant: null", "--variant needs a value"),
    ("lr_step_epochs: {a: 1}", "--lr_step_epochs must be a whole number"),
    ("adam_betas: [0.9, .nan]", "--adam_betas must be a number"),
    ("name: 3", "--name must be text"),
    ('name: "a\\e[2Jb"', "the recipe's name must be one line of text"),
    ("epochs: 1\nepochs: 2", "'epochs' stands twice"),
    ("? [a]\n: 1", "not valid YAML"),
    ("3: 4", "unknown option 3"),
    ("null: 4", "unknown option None"),
    ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ("epochs: !!timestamp x", "not valid YAML"),
    ("epochs: 2001-99-99", "not valid YAML"),
    ("a: &a [x, x]\nb: &b [*a, *a]\nepochs: [*b, *b]", "unknown option 'a'"),
    ("[" * 5000, "not valid YAML: nested too deeply"),
    ("data_dir: ''", "--data_dir is empty; name a file or folder"),
    ("output_dir: ''", "--output_dir is empty; name a file or folder"),
    ("model: ''", "--model is empty"),
    ("resume: ''", "--resume is empty"),
    ("teacher: ''", "--teacher is empty"),
    ("dataset_name: ''", "--dataset_name is empty"),
    ('data_dir: "a\\0b"', "--data_dir holds a zero byte"),
    ("", "must hold `option: value` lines"),
]


@pytest.mark.parametrize("text, words", RECIPE, ids=[text[:24] for text, _ in RECIPE])
def test_a_wrong_field_of_a_recipe(text, words, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    said = refusal(load_recipe, str(tmp_path / "mine.yaml"))
    assert words in said, said


def test_a_recipe_that_is_no_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("x")
    for name, make in places(tmp_path / "mine.yaml"):
        make()
        assert "cannot read the recipe" in refusal(load_recipe, str(tmp_path / "mine.yaml")), name
    assert "cannot read the recipe" in refusal(load_recipe, "x" * 300 + ".yaml")


# what convert keeps of a training checkpoint

STATE = {
    "epoch": [True, -1, 1.5, NAN, "3", [], {}, 10**12],
    "best_top1": [True, -1, 101, NAN, INFINITY, "70", []],
    "param_groups": [None, 3],
    "numbers": [
        None,
        3,
        {"optimizer/square_avg/classifier.bias": 3},
        {"optimizer/step/classifier.bias": -1},
        {"optimizer/step/classifier.bias": "3"},
        {"optimizer/step/nobody": 3},
        {"x": NAN},
    ],
}


@pytest.fixture(scope="module")
def kept(model):
    weights = load_file(model / "model.safetensors")
    names = [name for name in weights if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    optimizer = {name: {"square_avg": torch.ones_like(weights[name]), "step": 3} for name in names}
    state = TrainerState(3, 70.5, [{"lr": 0.1, "params": names}], optimizer, weights)
    write_trainer_state(state, model)
    return model


def test_the_trainers_state_reads_back(kept):
    state = read_trainer_state(kept)
    assert (state.epoch, state.best_top1, state.param_groups[0]["lr"]) == (3, 70.5, 0.1)
    assert (
        state.optimizer_state["classifier.bias"]["step"] == 3
        and state.averaged.keys() == load_file(kept / "model.safetensors").keys()
    )


def damage(folder, change):
    from safetensors import safe_open

    with safe_open(folder / TRAINER_FILE, "pt") as file:
        described, tensors = json.loads(file.metadata()["trainer_state"]), {k: file.get_tensor(k) for k in file.keys()}
    change(described, tensors)
    save_file(tensors, folder / TRAINER_FILE, metadata={"trainer_state": json.dumps(described)})


@pytest.mark.parametrize("field, value", cases(STATE))
def test_a_wrong_field_of_the_trainers_state(field, value, kept, tmp_path):
    folder = shutil.copytree(kept, tmp_path / "copy")
    damage(folder, lambda described, tensors: described.update({field: value}))
    said = refusal(read_trainer_state, folder)
    assert TRAINER_FILE in said
    assert field in said or field in ("param_groups", "numbers"), said


@pytest.mark.parametrize(
    "key, tensor, words",
    [
        ("optimizer/square_avg/classifier.bias", torch.full((2,), NAN), "holds NaN or infinity"),
        ("optimizer/square_avg/classifier.bias", torch.full((2,), 1e300, dtype=torch.float64), "holds NaN or infinity"),
        ("optimizer/square_avg/classifier.bias", -torch.ones(2), "holds negative numbers"),
        ("optimizer/square_avg/classifier.bias", torch.ones(2).to(torch.float8_e4m3fn), "not a plain tensor"),
        ("optimizer/square_avg/classifier.bias", torch.ones(3), "belongs to no weight of this shape"),
        ("optimizer/square_avg/classifier.bias", torch.ones(2, dtype=torch.int8), "belongs to no weight"),
        ("optimizer/square_avg/classifier.bias", None, "lacks the optimizer's"),
        ("average/classifier.bias", None, "lacks the average's classifier.bias"),
        ("average/nobody", torch.ones(2), "belongs to no weight"),
        ("\x1b[2J", torch.ones(2), r"\x1b[2J belongs to no weight"),
    ],
)
def test_a_wrong_tensor_of_the_trainers_state(key, tensor, words, kept, tmp_path):
    def change(described, tensors):
        described["numbers"] = {}
        tensors.pop(key, None) if tensor is None else tensors.update({key: tensor})

    folder = shutil.copytree(kept, tmp_path / "copy")
    damage(folder, change)
    assert words in refusal(read_trainer_state, folder)


# other projects' config.json

FOREIGN = {
    "pretrained_cfg": [3, [], "x", {"input_size": 3}, {"input_size": [3, 0, 0]}, {"input_size": [3, 224, 10**9]},
                       {"crop_pct": 0}, {"crop_pct": "1"}, {"crop_pct": NAN}, {"mean": 3}, {"std": ["a"] * 3},
                       {"std": [0, 0, 0]}, {"interpolation": 3}, {"interpolation": "no such"}, {"license": 3}],
    "model_args": [3, [], "x", {"bn_eps": "x"}, {"bn_eps": NAN}],
    "architecture": [3, [], {}],
    "label_names": [3, "x", [3]],
    "label_descriptions": [3, "x"],
    "id2label": [3, [], {"a": "b"}, {"0": 3}, {"-1": "b"}],
}  # fmt: skip


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("timm")
    config = EfficientNetNVConfig.from_variant("b0", num_labels=3)
    state = EfficientNetNVForImageClassification(config).state_dict()
    save_file(TIMM.write(state, config), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("field, value", cases(FOREIGN))
def test_a_wrong_field_of_another_projects_config(field, value, timm_folder):
    pretrained = {"input_size": [3, 224, 224], "crop_pct": 0.9, "interpolation": "bicubic"}
    good = {"architecture": "efficientnet_b0", "pretrained_cfg": pretrained, "label_names": ["a", "b", "c"]}
    (timm_folder / "config.json").write_text(json.dumps(good))
    load_foreign(timm_folder)
    (timm_folder / "config.json").write_text(json.dumps({**good, field: value}))
    said = refusal(load_foreign, timm_folder)
    assert str(timm_folder) in said, said
