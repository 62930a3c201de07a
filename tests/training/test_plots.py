"""The curves of several runs in one picture, told apart and drawn from what the runs wrote."""

import json
import os
import sys

import matplotlib.pyplot as plt
import pytest
from PIL import Image

from effnet_hf.commands.plots import main
from effnet_hf.errors import UserError
from effnet_hf.training import plots


def write_run(folder, tops):
    folder.mkdir(parents=True)
    rows = []
    for epoch, top1 in enumerate(tops):
        for update in (1, 2):
            where = {"type": "train", "epoch": epoch, "update": update}
            rows.append({**where, "train.lr": 0.1 * update, "train.total_ips": 50.0})
        rows.append({"type": "val", "epoch": epoch, "val.top1": top1, "val.top5": 99.0, "val.loss": 1 / top1})
        rows.append({"type": "epoch", "epoch": epoch, "train.loss": 2 / top1})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn: `close` is what would lose them."""
    figures = []
    monkeypatch.setattr(plots.plt, "close", figures.append)
    yield figures
    monkeypatch.undo()
    plt.close("all")


def test_runs_are_overlaid_with_their_own_values_and_names(tmp_path, drawn, monkeypatch, capsys):
    first, second = write_run(tmp_path / "a/model", [50.0, 60.0]), write_run(tmp_path / "b/model", [70.0, 80.0])
    monkeypatch.setattr(sys, "argv", ["plots", str(first), str(second), "--output_dir", str(tmp_path / "out")])
    main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "out/curves.png")
    assert Image.open(tmp_path / "out/curves.png").width > 1000
    panels = {axis.get_title(): axis for axis in drawn[0].axes}
    assert set(panels) == {"Loss", "Top-1", "Top-5", "Learning rate", "Training throughput"}
    top1 = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in panels["Top-1"].lines}
    assert top1 == {"a/model val": ([1, 2], [50, 60]), "b/model val": ([1, 2], [70, 80])}
    colours = {line.get_label(): line.get_color() for line in panels["Loss"].lines}
    assert colours["a/model train"] == colours["a/model val"] != colours["b/model train"]
    assert list(panels["Learning rate"].lines[0].get_xdata()) == [0.5, 1, 1.5, 2]


def test_one_run_needs_no_name(tmp_path, drawn):
    plots.draw({"a": write_run(tmp_path / "a", [50.0])}, tmp_path / "out")
    assert [line.get_label() for line in drawn[0].axes[0].lines] == ["train", "val"]


@pytest.mark.parametrize("name", ["$\\frac{$", "a\x1b[2J"], ids=ascii)
def test_a_folder_may_have_any_name(name, tmp_path, drawn):
    runs = {name: write_run(tmp_path / "a", [50.0]), "b": write_run(tmp_path / "b", [60.0])}
    assert plots.draw(runs, tmp_path / "out")[0].is_file()
    assert "\x1b" not in drawn[0].axes[0].get_legend_handles_labels()[1][0]


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
        (["top1"], ["Top-1", "Top-5"]),
        (["map"], ["mAP", "F1"]),
        (["top1", "map"], ["Top-1", "Top-5", "mAP", "F1"]),
        ([], ["Top-1", "Top-5"]),
    ],
    ids=str,
)
def test_panels_are_those_of_what_was_validated(validated, kinds):
    runs = {name: [{"type": "val", "epoch": 0, f"val.{name}": 50.0}] for name in validated}
    assert [title for title, _, _ in plots._panels(runs)][1:-2] == kinds
