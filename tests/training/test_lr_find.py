"""`train --lr_find`: the rule on curves whose answer is known, and the command on a small network."""

import json

import numpy as np
import pytest
from PIL import Image

from effnet_hf.commands.train import main
from effnet_hf.errors import UserError
from effnet_hf.training import lr_find
from effnet_hf.training.lr_find import HIGHEST, LOWEST, longest_valley, smooth, suggest

from .workbench import write_squares, write_tiny


def curve(steps=100, falls_at=1e-3, by=1.0, noise=0.05, seed=0):
    """Losses of a network that begins to learn at a rate and explodes a hundred times above it."""
    rates = np.geomspace(LOWEST, HIGHEST, steps)
    losses = 2.3 + np.random.default_rng(seed).normal(0, noise, steps) - by / (1 + (falls_at / rates) ** 1.5)
    losses = losses + np.where(rates > 100 * falls_at, rates / (100 * falls_at) - 1, 0)
    kept = losses < 12
    return rates[kept].tolist(), losses[kept].tolist()


def test_the_valley_is_fastais():
    """By hand: 5 4 3 2 1 falls the longest, from its third place to its last; a dip in between breaks nothing."""
    assert longest_valley([7, 9, 8, 6, 6.5, 5, 4, 9, 9]) == (1, 6)
    losses = [3.0] * 10 + list(np.linspace(3, 1, 31)) + [4.0] * 9
    assert longest_valley(losses) == (9, 40)


def test_smoothing_is_an_average_of_what_was_seen():
    assert smooth([2.0, 2.0, 2.0], 0.98) == pytest.approx([2, 2, 2])
    assert smooth([1.0, 3.0], 0.5) == pytest.approx([1, (0.5 * 1 * 0.5 + 0.5 * 3) / 0.75])


@pytest.mark.parametrize("steps", [100, 50])
@pytest.mark.parametrize("falls_at", [1e-4, 1e-2])
def test_the_suggestion_lies_below_the_explosion(steps, falls_at):
    found = [suggest(*curve(steps, falls_at, seed=seed), steps)[0] for seed in range(5)]
    assert all(10 * falls_at < rate < 100 * falls_at for rate in found), found


def test_noise_is_no_valley():
    for seed in range(20):
        found, why, _ = suggest(*curve(by=0.0, seed=seed), 100)
        assert found is None and why.startswith("the curve has no clear valley; its longest fall")
    rates, losses = curve()
    assert suggest(rates[:12], losses[:12], 100)[1] == "the loss exploded after 12 of 100 steps, before it could fall"


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lr_find")
    data, tiny = write_squares(folder / "data", per_class=8), write_tiny(folder / "tiny")
    words = ["--config", "digits", "--data_dir", data, "--model", tiny, "--image_size", 32, "--global_batch_size", 8]
    words += ["--num_workers", 0, "--optimizer", "sgd", "--lr_find"]
    return [*map(str, words)]


def test_the_command_suggests_and_leaves_no_run(command, tmp_path, capsys, monkeypatch):
    """More than an epoch of steps; twice the same curve; beside a run that was there."""
    (tmp_path / "summary.json").write_text("{}")
    results, take = [], lr_find.train_step

    def training(run, batch):
        assert all(module.training for module in run.bare_model.modules())
        return take(run, batch)

    monkeypatch.setattr(lr_find, "train_step", training)
    for _ in range(2):
        assert main([*command, "--steps", "20", "--output_dir", str(tmp_path)]) == 0
        results.append(json.loads((tmp_path / "lr_find.json").read_text()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lr_find.json", "lr_find.png", "summary.json"]
    first, second = results
    assert first["losses"] == second["losses"] and len(first["losses"]) >= 10
    assert first["learning_rates"][0] == LOWEST and first["steps"] == 20
    assert np.diff(np.log(first["learning_rates"])) == pytest.approx(np.log(HIGHEST / LOWEST) / 19)
    assert (first["suggestion"], first["why"]) == suggest(first["learning_rates"], first["losses"], 20)[:2]
    assert Image.open(tmp_path / "lr_find.png").size == (1600, 800)
    printed = capsys.readouterr().out
    assert f"suggest  {'--learning_rate' if first['suggestion'] else 'none: '}" in printed
    assert f"curve    {tmp_path / 'lr_find.png'}" in printed


def test_the_fewest_steps_that_are_taken_can_tell():
    assert suggest(*curve(lr_find.LEAST, noise=0.0), lr_find.LEAST)[0] is not None
    flat = np.geomspace(LOWEST, HIGHEST, lr_find.LEAST).tolist(), [2.0] * lr_find.LEAST
    assert "no clear valley" in suggest(*flat, lr_find.LEAST)[1]


def test_a_slow_machine_takes_fewer_steps_and_says_how_long(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lr_find, "SECONDS", 0.0)
    monkeypatch.setattr(lr_find, "FEWEST", 6)
    main([*command, "--output_dir", str(tmp_path)])
    assert json.loads((tmp_path / "lr_find.json").read_text())["steps"] == 6
    assert "\nsteps    6 of about " in capsys.readouterr().out


def test_files_of_others_stay(command, tmp_path):
    (tmp_path / "lr_find.json").write_text("{}")
    with pytest.raises(UserError, match=r"lr_find.json was not written by --lr_find; move it away"):
        main([*command, "--output_dir", str(tmp_path)])
    (tmp_path / "lr_find.json").unlink()
    Image.new("RGB", (2, 2)).save(tmp_path / "lr_find.png")
    before = (tmp_path / "lr_find.png").read_bytes()
    with pytest.raises(UserError, match=r"lr_find.png may not have been drawn by this command; move it away"):
        main([*command, "--output_dir", str(tmp_path)])
    assert (tmp_path / "lr_find.png").read_bytes() == before


def test_a_loss_that_is_no_number_from_the_first_step_on_is_told(command, tmp_path, monkeypatch):
    monkeypatch.setattr(lr_find.LossMeter, "recent", lambda self: float("nan"))
    with pytest.raises(UserError, match="the loss is nan from the first step on, at a learning rate of 1e-07, so no"):
        main([*command, "--steps", "20", "--output_dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, message",
    [
        (["--benchmark", "train"], "give one"),
        (["--resume", "auto"], "leave out"),
        (["--steps", "19"], "too few for --lr_find to see a loss fall; give at least 20"),
    ],
)
def test_it_goes_with_no_other_task(command, words, message):
    with pytest.raises(UserError, match=message):
        main([*command, *words])
