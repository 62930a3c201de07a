"""The commands that a run prints at its end are ready to be pasted: they measure what it measured."""

import json
import shlex
import shutil

import pytest

from effnet_hf.commands import validate
from effnet_hf.recipes import Recipe, data_words

from .workbench import run, small_recipe, write_squares


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, ""),
        ({"data_dir": "my data"}, "--data_dir 'my data'"),
        ({"data_dir": "d", "val_fraction": 0.25, "classes_by_position": True},
         "--data_dir d --val_fraction 0.25 --classes_by_position true"),
        ({"data_dir": "d", "val_split": "test", "labels": "l.csv", "label_column": ["x", "y"], "bit_depth": 12},
         "--data_dir d --val_split test --labels l.csv --label_column x y --bit_depth 12"),
        ({"dataset_name": "me/set", "dataset_config": "small", "streaming": True},
         "--dataset_name me/set --dataset_config small --streaming true"),
        ({"data_dir": "d", "mixup": 0.2, "num_workers": 3, "augmentation": "autoaugment"}, "--data_dir d"),
    ],
)  # fmt: skip
def test_what_the_run_read_is_named(options, words):
    assert shlex.join(data_words(Recipe(**options))) == words


def test_it_measures_the_share_that_was_held_out_and_copies_are_told(tmp_path, capsys):
    squares = write_squares(tmp_path / "my squares")
    (squares / "train").rename(squares / "Training")
    (squares / "val").rename(squares / "Testing")
    shutil.copy(squares / "Training/red/1.png", squares / "Training/red/5.png")  # held out, and not
    recipe = small_recipe(squares, tmp_path / "run", val_fraction=0.25, epochs=1, ema_decay=0, augmentation="none")
    assert run(recipe) == 0
    text = capsys.readouterr().out
    assert "27 training and 9 validation images, 3 classes" in text and f"passed over in {squares}: Testing/." in text
    assert "1 validation image is trained on too, byte for byte, e.g. " in text and "red/5.png: the fig" in text
    command = shlex.split(next(line for line in text.splitlines() if " validate" in line))
    words = command[command.index("--model") :]
    assert words[2:] == ["--data_dir", str(squares), "--val_fraction", "0.25"]
    validate.main([*words, "--num_workers", "0", "--json"])
    figures = json.loads(capsys.readouterr().out)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert {name: figures[name] for name in ("top1", "n")} == {name: summary[name] for name in ("top1", "n")}
    assert figures["n"] == 9 and figures["loss"] == pytest.approx(summary["loss"], rel=1e-5)
