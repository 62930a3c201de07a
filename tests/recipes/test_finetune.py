"""`--config finetune`: one default for any checkpoint and any folder."""

import json
import math
from pathlib import Path

import pytest

from effnet_hf.commands import train
from effnet_hf.errors import UserError
from effnet_hf.recipes import load_recipe, parse_recipe
from effnet_hf.run_folder import RunFolder
from effnet_hf.training.freezing import check_fine_tuning
from effnet_hf.training.optim import learning_rate

from ..training.workbench import cheap_training, write_squares, write_tiny


def test_a_recipe_may_be_called_a_recipe():
    typed = ["--model", "me/b0", "--data_dir", "photos"]
    assert parse_recipe(["--recipe", "finetune", *typed])[0] == parse_recipe(["--config", "finetune", *typed])[0]
    assert parse_recipe(["--recipe", "digits"])[1].config == "digits"


@pytest.mark.parametrize("name", ["finetune", "imagenette-finetune"])
def test_fine_tuning_without_weights_is_refused_but_printed(name, capsys):
    with pytest.raises(UserError, match=f"--config {name} fine-tunes weights; give them with --model, a folder or"):
        parse_recipe(["--config", name, "--data_dir", "photos"])
    assert train.main(["--config", name, "--print_config"]) == 0
    assert f"name: {name}" in capsys.readouterr().out


def test_going_on_needs_no_model_and_takes_the_runs_own(tmp_path):
    words = ["--config", "finetune", "--data_dir", "photos", "--output_dir", str(tmp_path), "--freeze", "stages"]
    with pytest.raises(UserError, match="--config finetune fine-tunes weights"):
        parse_recipe([*words, "--resume", "auto"])  # nothing is there yet
    first = parse_recipe([*words, "--model", "me/b4"])[0]
    checkpoint = RunFolder(tmp_path).checkpoint(3)
    checkpoint.mkdir(parents=True)
    RunFolder(checkpoint).recipe.write_text(first.to_yaml())
    RunFolder(checkpoint).progress.write_text("{}")
    for named in ("auto", tmp_path, checkpoint):
        again = parse_recipe([*words, "--resume", str(named)])[0]
        assert again == first.replace(resume=str(named))  # the filter is left to the checkpoint, too
        check_fine_tuning(again)
    assert parse_recipe([*words, "--resume", "auto", "--model", "me/other"])[0].model == "me/other"


@pytest.mark.parametrize("batch, epochs", [(16, 10), (64, 10), (256, 30)])
def test_its_rate_follows_the_root_of_another_batch_and_its_warm_up_the_epochs(batch, epochs):
    typed = ["--config", "finetune", "--model", "x", "--global_batch_size", str(batch), "--epochs", str(epochs)]
    recipe = parse_recipe(typed)[0]
    assert recipe.warmup_epochs == pytest.approx(epochs / 10)
    peak = max(learning_rate(recipe, epoch, update, 10) for epoch in range(epochs) for update in range(10))
    assert peak == pytest.approx(load_recipe("finetune").learning_rate * math.sqrt(batch / 16))


def words(spelling: str, model: Path, folder: Path, output_dir: Path) -> list[str]:
    """A command line that fine-tunes."""
    return [spelling, "finetune", "--model", str(model), "--data_dir", str(folder), "--output_dir", str(output_dir)]


def test_it_fine_tunes_a_small_folder_of_new_classes(tmp_path):
    folder, tiny = write_squares(tmp_path / "squares", per_class=16), write_tiny(tmp_path / "tiny")
    (folder / "train/red").rename(folder / "train/scarlet")
    (folder / "val/red").rename(folder / "val/scarlet")
    flags = words("--recipe", tiny, folder, tmp_path / "a")
    with cheap_training():
        assert train.main([*flags, "--epochs", "6", "--checkpoint_every_epochs", "0"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    found = [row["val.top1"] for row in rows if row["type"] == "val"]
    assert found[-1] > 60  # of three classes, after 18 steps from random weights
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert sorted(config["label2id"]) == ["blue", "green", "scarlet"]


def test_a_folder_smaller_than_its_batch_is_told_which_batch_fits(tmp_path):
    folder, tiny = write_squares(tmp_path / "squares", per_class=3), write_tiny(tmp_path / "tiny")
    flags = words("--config", tiny, folder, tmp_path / "a")
    with pytest.raises(UserError, match=r"the training data has 9; lower --global_batch_size, e\.g\. to 8"):
        train.main(flags)
