"""The curves of several runs in one picture, told apart and drawn from what the runs wrote."""

import json
import os
import sys
from unittest import mock

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure
from PIL import Image

from effnet_hf.commands.plots import main
from effnet_hf.errors import UserError
from effnet_hf.recipes import Recipe
from effnet_hf.training import plots


def write_run(folder, tops, **best):
    folder.mkdir(parents=True)
    rows = []
    for epoch, top1 in enumerate(tops):
        for update in (1, 2):
            where = {"type": "train", "epoch": epoch, "update": update}
            speed = {"train.total_ips": 50.0, "train.data_time": 0.1, "train.compute_time": 0.3}
            rows.append({**where, "train.lr": 0.1 * update, **speed})
        rows.append({"type": "val", "epoch": epoch, "val.top1": top1, "val.top5": 99.0, "val.loss": 1 / top1})
        rows.append({"type": "epoch", "epoch": epoch, "train.loss": 2 / top1, **best})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn: `close` is what would lose them."""
    figures = []
    monkeypatch.setattr(plots.plt, "close", figures.append)
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: file.write(b"drawn"))  # takes a second
    yield figures
    monkeypatch.undo()
    plt.close("all")


def test_runs_are_overlaid_with_their_own_values_and_names(tmp_path, drawn, monkeypatch, capsys):
    first, second = write_run(tmp_path / "a/model", [50.0, 60.0]), write_run(tmp_path / "b/model", [70.0, 80.0])
    monkeypatch.setattr(sys, "argv", ["plots", str(first), str(second), "--output_dir", str(tmp_path / "out")])
    main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "out/curves.png")
    panels = {axis.get_title(): axis for axis in drawn[0].axes}
    assert list(panels) == ["Loss", "Top-1", "Top-5", "Learning rate", "Speed", "Waiting for data"]
    assert [axis.get_subplotspec().rowspan.start for axis in panels.values()] == [0, 0, 0, 1, 1, 1]
    assert list(panels["Waiting for data"].lines[0].get_ydata()) == pytest.approx([25.0] * 4)
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["a/model", "b/model"]
    top1 = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in panels["Top-1"].lines}
    assert top1 == {"a/model val": ([1, 2], [50, 60]), "b/model val": ([1, 2], [70, 80])}
    colours = {line.get_label(): line.get_color() for line in panels["Loss"].lines}
    assert colours["a/model train"] == colours["a/model val"] != colours["b/model train"]
    assert list(panels["Learning rate"].lines[0].get_xdata()) == [0.5, 1, 1.5, 2]


def test_a_drawing_has_room_for_a_readme(tmp_path):
    """800 pixels on a screen of double density."""
    path = plots.draw({"a": write_run(tmp_path / "a", [50.0])}, tmp_path / "out")[0]
    with Image.open(path) as image:
        assert image.size == (1650, 960) and image.info["Software"] == "effnet_hf"


def test_one_run_needs_no_name(tmp_path, drawn):
    plots.draw({"a": write_run(tmp_path / "a", [50.0])}, tmp_path / "out")
    assert [line.get_label() for line in drawn[0].axes[0].lines] == ["train", "val"]


@pytest.mark.parametrize("name", ["$\\frac{$", "a\x1b[2J"], ids=ascii)
def test_a_folder_may_have_any_name(name, tmp_path, drawn):
    runs = {name: write_run(tmp_path / "a", [50.0]), "b": write_run(tmp_path / "b", [60.0])}
    assert plots.draw(runs, tmp_path / "out")[0].is_file()
    assert "\x1b" not in drawn[0].legends[0].get_texts()[0].get_text()


@pytest.mark.parametrize(
    "row",
    [
        '{"type": "val", "epoch": "x"}',
        '{"type": "train", "epoch": 0, "update": 0}',
        '{"type": 3}',
        '{"type": "val", "epoch": 1' + "0" * 400 + "}",
        "[" * 10**5,
        "\xff",
    ],
)
def test_a_log_that_is_none_is_one_sentence(row, tmp_path):
    run = write_run(tmp_path / "a", [50.0])
    (run / "metrics.jsonl").write_bytes(row.encode("latin-1") + b"\n")
    with pytest.raises(UserError, match="metrics.jsonl is damaged: "):
        plots.draw({"a": run}, tmp_path / "out")
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    with pytest.raises(UserError, match="holds no metrics.jsonl"):
        plots.draw({"a": run}, tmp_path / "out")


@pytest.mark.parametrize(
    "value", [1e308, -1e308, 10**400, None, "much"], ids=["1e308", "-1e308", "1e400", "none", "text"]
)
def test_what_no_axis_has_room_for_is_left_out(value, tmp_path, drawn):
    run = write_run(tmp_path / "a", [50.0])
    plots.draw({"a": run}, tmp_path / "out")
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"type": "val", "epoch": 1, "val.loss": value, "val.top1": value}) + "\n")
    plots.draw({"a": run}, tmp_path / "out")
    before, after = ([list(line.get_ydata()) for axis in figure.axes for line in axis.lines] for figure in drawn)
    assert before == after and any(before)


@pytest.mark.parametrize(
    ("validated", "kinds"),
    [
        ({"top1": 50, "top5": 90}, ["Top-1", "Top-5"]),
        ({"top1": 50, "top5": 100}, ["Top-1"]),  # of five classes
        ({"top1": 50, "macro_f1": 40}, ["Top-1", "Mean of classes"]),
        ({"map": 50, "f1": 40}, ["mAP", "F1"]),
        ({}, ["Loss"]),
    ],
    ids=str,
)
def test_panels_are_those_of_what_was_validated(validated, kinds):
    row = {f"val.{name}": value for name, value in validated.items()}
    assert [title for title, _, _ in plots._panels({"a": [{"type": "val", "epoch": 0, **row}]})] == kinds


def test_six_panels_are_enough(tmp_path, drawn):
    run = write_run(tmp_path / "a", [50.0])
    row = {"type": "val", "epoch": 0, "val.macro_recall": 40.0, "val.macro_f1": 30.0}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    plots.draw({"a": run}, tmp_path / "out")
    titles = [axis.get_title() for axis in drawn[0].axes]
    assert titles == ["Loss", "Top-1", "Top-5", "Mean of classes", "Learning rate", "Waiting for data"]
    assert [line.get_label() for line in drawn[0].axes[3].lines] == ["recall", "F1"]


def test_a_star_on_two_figures_says_which_it_names(tmp_path, drawn):
    run = write_run(tmp_path / "a", [50.0], best_epoch=1, best_is_ema=False)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"type": "val", "epoch": 0, "val.macro_recall": 40.0, "val.macro_f1": 30.0}) + "\n")
    plots.draw({"a": run}, tmp_path / "out")
    assert drawn[0].axes[3].get_title() == "Mean of classes: recall 40 at ★"


def test_a_star_has_the_colour_of_its_run(tmp_path, drawn):
    best = {"best_epoch": 1, "best_is_ema": False}
    plots.draw({name: write_run(tmp_path / name, [50.0], **best) for name in "ab"}, tmp_path / "out")
    lines = {label: line.get_color() for line in drawn[0].axes[1].lines if (label := line.get_label())[0] != "_"}
    stars = [line.get_color() for line in drawn[0].axes[1].lines if line.get_marker() == "*"]
    assert stars == [lines["a val"], lines["b val"]] and stars[0] != stars[1]


@pytest.mark.parametrize("epochs", [1, 2, 30])
def test_epochs_are_counted_in_whole_ones(epochs, tmp_path, drawn):
    plots.draw({"a": write_run(tmp_path / "a", [50.0] * epochs)}, tmp_path / "out")
    for axis in drawn[0].axes:
        if axis.lines:
            ticks = [tick for tick in axis.get_xticks() if axis.get_xlim()[0] <= tick <= axis.get_xlim()[1]]
            assert ticks and all(tick == int(tick) for tick in ticks), axis.get_title()


def test_the_best_epoch_has_a_star(tmp_path, drawn):
    plots.draw({"a": write_run(tmp_path / "a", [50.0, 80.0, 70.0], best_epoch=2, best_is_ema=False)}, tmp_path / "out")
    axis = next(axis for axis in drawn[0].axes if axis.get_title().startswith("Top-1"))
    assert axis.get_title() == "Top-1: 80 at ★, epoch 2"
    star = next(line for line in axis.lines if line.get_marker() == "*")
    assert (list(star.get_xdata()), list(star.get_ydata())) == ([2], [80.0])


def test_the_star_of_a_moving_average_stands_on_its_curve(tmp_path, drawn):
    run = write_run(tmp_path / "a", [50.0, 80.0], best_epoch=1, best_is_ema=True)
    with open(run / "metrics.jsonl", "a") as file:
        for epoch, top1 in enumerate((90.0, 60.0)):
            file.write(json.dumps({"type": "val_ema", "epoch": epoch, "val_ema.top1": top1}) + "\n")
    plots.draw({"a": run}, tmp_path / "out")
    axis = next(axis for axis in drawn[0].axes if axis.get_title().startswith("Top-1"))
    (star,) = (line for line in axis.lines if line.get_marker() == "*")
    assert (list(star.get_xdata()), list(star.get_ydata())) == ([1], [90.0])


def test_a_first_loss_out_of_all_proportion_does_not_flatten_the_rest(tmp_path, drawn):
    plots.draw({"a": write_run(tmp_path / "a", [0.02, 1.0, 2.0, 2.0])}, tmp_path / "out")  # 50, then 1, 0.5, 0.5
    plots.draw({"b": write_run(tmp_path / "b", [0.5, 1.0, 2.0, 2.0])}, tmp_path / "out")
    first, second = (figure.axes[0].get_ylim()[1] for figure in drawn)
    assert first == 3 and 4 < second < 4.5


class Clock:
    now = 0.0

    def monotonic(self):
        return self.now


def test_curves_of_a_run_cost_a_tenth_of_its_time_at_most(tmp_path, monkeypatch):
    """The first drawing is expected to take 2 s; this one takes 3, so the next comes after 30 more."""
    clock, times = Clock(), []
    monkeypatch.setattr(plots, "time", clock)

    def draw(runs, folder):
        times.append(clock.now)
        clock.now += 3

    monkeypatch.setattr(plots, "draw", draw)
    run = mock.Mock(recipe=Recipe(output_dir=str(tmp_path)))
    curves = plots.LiveCurves(run)
    for _ in range(10):  # epochs of 8 seconds
        clock.now += 8
        curves.refresh()
    assert times == [24, 59]
    run.accelerator.is_main_process = False
    clock.now += 100
    curves.refresh()
    assert times == [24, 59]


def test_no_run_ends_because_of_its_picture(tmp_path, monkeypatch):
    run = mock.Mock(recipe=Recipe(output_dir=str(tmp_path)))
    curves = plots.LiveCurves(run)
    curves.cost = 0
    curves.refresh()
    assert "no curves yet: " in run.report.line.call_args[0][0]
