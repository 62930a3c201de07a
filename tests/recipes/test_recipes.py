"""Recipes: the published ones say what NVIDIA published, and nothing wrong gets past them."""

import pytest
import yaml

from effnet_hf.errors import UserError
from effnet_hf.recipes import GROUPS, Recipe, available_recipes, load_recipe, parse_recipe
from effnet_hf.recipes.recipe import FOLDER
from effnet_hf.training.batches import plan_batches
from effnet_hf.training.memory import training_need


PUBLISHED = {  # nvidia configs.yml: variant -> (learning rate, weight decay, image size)
    "b0": (0.08, 1e-5, 224),
    "b4": (0.16, 5e-6, 380),
    "widese-b0": (0.08, 1e-5, 224),
    "widese-b4": (0.16, 5e-6, 380),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipe_has_nvidias_hyper_parameters(name):
    recipe = load_recipe(name)
    size = recipe.model_config().image_size  # the variant's; with --model the checkpoint's
    assert (recipe.learning_rate, recipe.weight_decay, size) == PUBLISHED[name] and recipe.image_size is None
    assert (recipe.optimizer, recipe.rmsprop_alpha, recipe.rmsprop_eps, recipe.momentum) == ("rmsprop", 0.9, 0.01, 0.9)
    assert (recipe.epochs, recipe.warmup_epochs, recipe.lr_schedule, recipe.lr_update) == (400, 16, "cosine", "epoch")
    assert (recipe.global_batch_size, recipe.mixup, recipe.label_smoothing) == (4096, 0.2, 0.1)
    assert (recipe.augmentation, recipe.interpolation, recipe.bn_weight_decay) == ("autoaugment", "bicubic", False)
    config = recipe.model_config()
    assert config.survival_prob == (0.8 if name.endswith("b4") else 1.0)
    assert config.dropout_rate == (0.4 if name.endswith("b4") else 0.2)


QUANTIZED = {  # nvidia quant recipes: optimizer, rate at its global batch, epochs, schedule, momentum, weight decay
    "b0": ("sgd", 0.0125, 1024, 10, "cosine", 0.89, 4.5e-5),
    "b4": ("rmsprop", 4.09e-6, 256, 2, "linear", 0.9, 9.714e-4),
}


@pytest.mark.parametrize("name", ["b0", "b4", "widese-b0", "widese-b4"])
def test_quantization_recipe_has_nvidias_hyper_parameters(name):
    recipe = load_recipe(f"quant-{name}")
    found = (recipe.optimizer, recipe.learning_rate, recipe.lr_batch_size, recipe.epochs, recipe.lr_schedule)
    assert (*found, recipe.momentum, recipe.weight_decay) == QUANTIZED[name.removeprefix("widese-")]
    assert recipe.variant == name and recipe.global_batch_size == recipe.lr_batch_size
    assert (recipe.rmsprop_alpha, recipe.rmsprop_eps) == (0.853, 0.00422) or name.endswith("b0")
    assert (recipe.warmup_epochs, recipe.mixup, recipe.label_smoothing, recipe.augmentation) == (0, 0, 0, "none")
    assert (recipe.placement, recipe.calibration_method, recipe.calibration_percentile) == (
        "nvidia",
        "percentile",
        99.99,
    )
    assert (recipe.calibration_batches, recipe.interpolation, recipe.qat_batch_norm) == (11, "bilinear", "train")


def test_training_has_no_quantization_flags_but_qat_has(capsys):
    with pytest.raises(SystemExit):
        parse_recipe(["--placement", "cpu"])
    assert "unknown flag --placement" in capsys.readouterr().err
    recipe, _ = parse_recipe(["--placement", "cpu", "--float_layers", "a", "b"], groups=GROUPS, config="quant-b0")
    assert (recipe.placement, recipe.float_layers, recipe.learning_rate) == ("cpu", ["a", "b"], 0.0125)


@pytest.mark.parametrize("name", available_recipes())
def test_built_in_recipe_opens_with_its_command_and_what_to_expect(name):
    head = (FOLDER / f"{name}.yaml").read_text().split("\n\n")[0]
    assert f"--config {name}" in head
    assert "Expected top-1" in head or "publishes neither" in head
    assert load_recipe(name).name == name


def test_recipe_survives_a_round_trip_through_its_own_document(tmp_path):
    recipe = load_recipe("b4", seed=7, report_to=["tensorboard"], data_dir="some/where")
    path = tmp_path / "saved.yaml"
    path.write_text(recipe.to_yaml())
    assert load_recipe(str(path)) == recipe


def test_yaml_numbers_without_a_dot_are_numbers(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("weight_decay: 1e-05\nmixup: 1\n")
    recipe = load_recipe(str(path))
    assert recipe.weight_decay == 1e-5 and isinstance(recipe.mixup, float)


BAD = [  # (document, what the sentence must name)
    ("learning_rat: 0.1", "'learning_rate'"),
    ("epochs: many", "--epochs must be a whole number"),
    ("epochs: 1.5", "--epochs must be a whole number"),
    ("learning_rate: -1", "--learning_rate must be at least 0"),
    ("learning_rate: .nan", "--learning_rate must be a number"),
    ("optimizer: rmsprp", "Did you mean 'rmsprop'"),
    ("image_size: 0", "image_size"),
    ("survival_prob: 0", "survival_prob"),
    ("variant: b9", "Unknown variant 'b9'"),
    ("strict: 3", "--strict must be true or false"),
    ("epochs: 3\nwarmup_epochs: 5", "--warmup_epochs 5 is longer than --epochs 3"),
    ("nesterov: true", "--nesterov needs --optimizer sgd"),
    ("push_to_hub: true", "--hub_model_id"),
    ("hub_private: true", "--hub_private does nothing without --push_to_hub"),
    ("hub_revision: next\nhub_model_id: me/x", "--hub_revision does nothing without --push_to_hub"),
    ("data_dir: a\ndataset_name: b/c", "two sources"),
    ("streaming: true", "--dataset_name"),
    ("val_fraction: 1", "--val_fraction"),
    ("seed: -1", "--seed"),
    ("epochs:", "--epochs needs a value"),
    ("- a\n- b", "option: value"),
    ("a: [", "not valid YAML"),
    ("a: &a {epochs: 1}\nb: &b {<<: [*a, *a]}\nc: {<<: [*b, *b]}", "merges mappings (<<)"),
    ("epochs: 0x" + "f" * 5000, "has 5,002 digits"),
    ("epochs: [1, [" + ":".join(["59"] * 3000) + "]]", "has 8,999 digits"),
    ("epochs: [" + "1," * 40_000 + "]", "has 80,010 bytes"),
]


@pytest.mark.parametrize("document, named", BAD, ids=[document.splitlines()[0] for document, _ in BAD])
def test_wrong_document_is_refused_with_a_sentence(tmp_path, document, named):
    path = tmp_path / "r.yaml"
    path.write_text(document)
    with pytest.raises(UserError) as error:
        load_recipe(str(path))
    assert named in str(error.value) and "\n" not in str(error.value)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'widese-b0'"):
        load_recipe("widse-b0")


def test_a_recipe_that_was_written_reads_back_as_the_same_run(tmp_path):
    typed = ["--config", "b4", "--hardware", "a100", "--per_device_batch_size", "64", "--num_workers", "3"]
    recipe, _ = parse_recipe([*typed, "--overwrite", "true", "--resume", "auto"])
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    again = recipe.replace(overwrite=False, resume=None)  # how the launch began is no part of the run
    assert parse_recipe(["--config", str(path)])[0] == load_recipe(str(path)) == again


def test_hardware_in_a_document_fills_in_what_the_document_leaves_open(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("variant: b0\nhardware: a100\nnum_workers: 3\n")
    recipe = load_recipe(str(path))
    assert (recipe.per_device_batch_size, recipe.num_workers) == (256, 3)
    assert load_recipe(str(path), hardware="v100-16g", precision="fp32").num_workers != 3


def test_flags_win_over_hardware_and_hardware_over_the_document():
    recipe, _ = parse_recipe(["--config", "b4", "--hardware", "a100"])
    assert (recipe.per_device_batch_size, recipe.precision, recipe.num_workers) == (128, "fp16", 16)
    recipe, _ = parse_recipe(
        ["--config", "b4", "--hardware", "a100", "--per_device_batch_size", "8", "--num_workers", "2"]
    )
    assert (recipe.per_device_batch_size, recipe.num_workers) == (8, 2)
    recipe, _ = parse_recipe(["--config", "widese-b0", "--hardware", "v100-32g", "--precision", "fp32"])
    assert (recipe.per_device_batch_size, recipe.precision) == (128, "fp32")


PRESETS = {  # nvidia configs.yml: (machine, precision) -> batch of b0, b4
    ("t4", "fp16"): (128, 32),
    ("t4", "fp32"): (64, 16),
    ("v100-16g", "fp16"): (128, 32),
    ("v100-16g", "fp32"): (64, 16),
    ("v100-32g", "fp16"): (256, 64),
    ("v100-32g", "fp32"): (128, 32),
    ("a100", "fp16"): (256, 128),
    ("a100", "tf32"): (256, 64),
}


@pytest.mark.parametrize("machine, precision", PRESETS)
def test_hardware_preset_is_nvidias(machine, precision):
    for size, batch in zip(("b0", "b4"), PRESETS[machine, precision]):
        recipe, _ = parse_recipe(["--config", size, "--hardware", machine, "--precision", precision])
        assert recipe.per_device_batch_size == batch


CARDS = {  # GiB that the driver shows; NVIDIA's a100 rows are those of an 80 GB card
    "t4": 14.6,
    "v100-16g": 15.8,
    "v100-32g": 31.7,
    "a100": 79.1,
    "h100": 79.1,
    "h200": 139.8,
}


@pytest.mark.parametrize("machine", CARDS)
@pytest.mark.parametrize("name", ["b0", "b4", "widese-b0", "widese-b4"])
def test_hardware_preset_fits_its_card(machine, name):
    """By the table of counted memory; ours for B4 are also the largest powers of two that do."""
    table = yaml.safe_load((FOLDER / "hardware.yaml").read_text())[machine]["per_device_batch_size"]
    memory = 0.85 * CARDS[machine] * 2**30
    for precision in table:
        recipe = load_recipe(name, hardware=machine, precision=precision, ema_decay=0.9999)
        need = training_need(recipe, recipe.model_config(), recipe.model_config().image_size, precision)
        assert need.fixed + recipe.per_device_batch_size * need.per_image < memory
        if machine in ("h100", "h200") and name.endswith("b4"):
            assert need.fixed + 2 * recipe.per_device_batch_size * need.per_image > memory


def test_a_size_without_a_row_is_left_to_the_devices_memory():
    recipe = load_recipe("b7", hardware="h100")
    assert recipe.per_device_batch_size is None and recipe.precision == "bf16"
    need = training_need(recipe, recipe.model_config(), 600, recipe.precision)
    assert plan_batches(recipe, 8, 0, int(0.85 * CARDS["h100"] * 2**30), need).per_device == 32


def test_tables_are_no_recipes():
    assert not {"hardware", "memory"} & set(available_recipes())


def test_typed_learning_rate_is_not_rescaled():
    assert parse_recipe(["--global_batch_size", "64"])[0].lr_scaling == "linear"
    assert parse_recipe(["--learning_rate", "0.05"])[0].lr_scaling == "none"
    assert parse_recipe(["--learning_rate", "0.05", "--lr_scaling", "sqrt"])[0].lr_scaling == "sqrt"


def test_shorter_run_keeps_the_recipes_share_of_warm_up():
    assert parse_recipe(["--epochs", "100"])[0].warmup_epochs == 4
    assert parse_recipe(["--epochs", "100", "--warmup_epochs", "1"])[0].warmup_epochs == 1


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--learning_rat", "1"], "did you mean --learning_rate?"),
        (["--epochs", "x"], "--epochs"),
        (["stray"], "unexpected argument stray"),
        (["--optimizer", "adam"], "--optimizer"),
    ],
)
def test_wrong_flag_is_one_line_and_exit_code_2(argv, named, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_recipe(argv)
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert named in message and message.count("\n") == 1


def test_help_shows_the_chosen_recipes_defaults(capsys):
    with pytest.raises(SystemExit):
        parse_recipe(["--config", "b4", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "L2 on everything but batch norm (default: 5e-06)" in text and "precision and speed:" in text


def test_recipe_is_frozen():
    with pytest.raises(AttributeError):
        Recipe().epochs = 3


@pytest.fixture
def own_recipe(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("image_size: 32\nresize_margin: 0\ninterpolation: bilinear\nbatch_norm_eps: 0.1\nmodel: m/first\n")
    return str(path)


def preparation(recipe) -> tuple:
    return recipe.image_size, recipe.resize_margin, recipe.interpolation, recipe.batch_norm_eps


def test_a_checkpoint_wins_over_the_file_and_a_flag_over_both(own_recipe, tmp_path):
    assert preparation(load_recipe(own_recipe)) == (32, 0, "bilinear", 0.1)  # the file names the model itself
    assert preparation(load_recipe(own_recipe, model="./m/first/")) == (32, 0, "bilinear", 0.1)  # the same one
    assert preparation(load_recipe(own_recipe, model="m/other")) == (None, None, None, None)
    assert preparation(load_recipe(own_recipe, model="m/other", resize_margin=4)) == (None, 4, None, None)
    silent = tmp_path / "silent"  # a folder of weights that does not say how images are prepared
    silent.mkdir()
    assert preparation(load_recipe(own_recipe, model=str(silent))) == (None, 0, "bilinear", None)
    (silent / "preprocessor_config.json").write_text("{}")
    assert preparation(load_recipe(own_recipe, model=str(silent))) == (None, None, None, None)


@pytest.mark.parametrize(
    "text, words",
    [
        ("topk: 3\ntop_k: 7", "topk and top_k are one option; keep top_k"),
        ("hub_token: secret", "a token is no part of a recipe"),
        ("variant: 3\nhardware: t4", "--variant must be text, got 3"),
    ],
)
def test_a_file_is_refused_in_a_line(text, words, tmp_path):
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(UserError, match=words) as raised:
        load_recipe(str(tmp_path / "wrong.yaml"))
    assert "secret" not in str(raised.value)


def test_an_old_name_in_a_file_still_works(tmp_path, capsys):
    (tmp_path / "old.yaml").write_text("topk: 3")
    assert load_recipe(str(tmp_path / "old.yaml")).top_k == 3 and "topk is now called top_k" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, wanted",
    [
        ([], True),
        (["--overwrite", "false"], False),
        (["--overwrite", "true", "--overwrite", "false"], False),
        (["--overwrite=FALSE"], False),
        (["--overwrite"], True),
    ],
)
def test_a_typed_false_wins_over_the_file(words, wanted, tmp_path):
    (tmp_path / "own.yaml").write_text("overwrite: true")
    assert parse_recipe(["--config", str(tmp_path / "own.yaml"), *words])[0].overwrite is wanted


@pytest.mark.parametrize(
    "options, words",
    [
        ({"randaugment_magnitude": 5}, "are the strength of --augmentation randaugment; this is none"),
        ({"randaugment_operations": 3, "augmentation": "autoaugment"}, "this is autoaugment"),
        ({"sampler": "balanced", "class_weights": "balanced"}, "mend the same thing, together twice; give one"),
        (
            {"sampler": "balanced", "loader": "synthetic"},
            "--sampler balanced has to .* --loader synthetic does not",
        ),
        ({"class_weights": "w.csv", "dataset_name": "a/b", "streaming": True}, "--class_weights has to .* --streaming"),
        ({"select_best": "accuracy"}, "--select_best must be one of top1, macro_recall, macro_f1, loss, map, f1"),
        ({"random_erasing": 1.5}, "--random_erasing must be between 0 and 1"),
    ],
)
def test_options_for_unbalanced_folders_that_contradict_each_other(options, words):
    with pytest.raises(UserError, match=words):
        Recipe(**options)


@pytest.mark.parametrize(
    "document, words, wanted",
    [
        ("freeze: stages\nfreeze_epochs: 2", "--freeze none", {"freeze_epochs": 0}),
        ("augmentation: randaugment\nrandaugment_magnitude: 12", "--augmentation none", {"randaugment_magnitude": 9}),
        (
            "augmentation: randaugment\nrandaugment_operations: 3",
            "--randaugment_magnitude 5",
            {"randaugment_operations": 3},
        ),
        ("optimizer: sgd\nnesterov: true", "--optimizer adamw", {"nesterov": False}),
        ("optimizer: sgd\nnesterov: true", "--momentum 0", {"nesterov": False, "optimizer": "sgd"}),
        ("folds: 5\nfold: 2", "--folds 0", {"fold": 0}),
        ("folds: 5\nfold: 2", "--fold 3", {"folds": 5, "fold": 3}),
        ("folds: 5\nfold: 2", "--val_fraction 0.2", {"folds": 0, "fold": 0, "val_fraction": 0.2}),
        ("folds: 5\nfold: 2", "--val_split test", {"folds": 0, "fold": 0}),
        ("val_split: test", "--folds 5 --fold 1", {"val_split": None, "folds": 5}),
        ("val_fraction: 0.2\naccept_changed_data: true", "--folds 5 --fold 1", {"val_fraction": 0.0}),
        ("val_fraction: 0.2", "--val_split test", {"val_fraction": 0.0}),
        ("sampler: balanced", "--class_weights balanced", {"sampler": "shuffled"}),
        ("class_weights: balanced", "--sampler balanced", {"class_weights": None}),
        ("class_weights: /w.csv", "--sampler balanced", {"class_weights": "/w.csv"}),
        ("class_weights: balanced", "--class_weights none --loader synthetic", {"class_weights": None}),
        ("data_dir: a\nlabels: b.csv", "--dataset_name me/set --streaming", {"data_dir": None, "labels": None}),
        ("dataset_name: me/set\nstreaming: true", "--data_dir a", {"dataset_name": None, "streaming": False}),
    ],
)
def test_what_a_flag_makes_meaningless_in_the_file_gives_way(document, words, wanted, tmp_path):
    (tmp_path / "own.yaml").write_text(document)
    recipe, _ = parse_recipe(["--config", str(tmp_path / "own.yaml"), *words.split()])
    assert {name: getattr(recipe, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    "words",
    [
        "--augmentation none --randaugment_magnitude 12",
        "--freeze none --freeze_epochs 2",
        "--folds 5 --fold 1 --val_fraction 0.2",
        "--optimizer adamw --nesterov",
        "--sampler balanced --class_weights balanced",
    ],
)
def test_what_was_typed_does_not(words):
    with pytest.raises(UserError):
        parse_recipe(words.split())


def test_a_file_of_weights_is_a_path_and_may_go_with_the_sampler(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    recipe = Recipe(class_weights="~/w.csv", sampler="balanced")
    assert recipe.class_weights == "/home/me/w.csv" and Recipe(class_weights="balanced").class_weights == "balanced"
    assert Recipe(augmentation="randaugment", randaugment_operations=3).randaugment_operations == 3
