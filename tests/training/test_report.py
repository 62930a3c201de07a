"""Where a run shows a progress bar: a terminal or a notebook, never a log file, never with --quiet."""

import io
import json
import os
import sys

import pytest
from accelerate import Accelerator

from effnet_hf.errors import UserError
from effnet_hf.recipes import Recipe
from effnet_hf.training.report import Report


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    "stream, notebook, quiet, shown",
    [
        (Terminal, False, False, True),
        (Terminal, False, True, False),
        (io.StringIO, False, False, False),
        (io.StringIO, True, False, True),
        (io.StringIO, True, True, False),
    ],
    ids=["terminal", "terminal, --quiet", "log file", "notebook", "notebook, --quiet"],
)
def test_bar_is_shown_where_somebody_looks(stream, notebook, quiet, shown, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    if notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", object())
    report = Report(Accelerator(cpu=True), quiet=quiet)
    report.start_bar("epoch 1/2", total=3)
    report.advance()
    assert (report.bar is not None) == shown
    report.close()
    assert ("epoch 1/2" in sys.stderr.getvalue()) == shown


def test_lines_do_not_break_a_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    report = Report(Accelerator(cpu=True))
    report.start_bar("epoch 1/2", total=3)
    report.line("model    b0")
    report.close()
    assert capsys.readouterr().out == "model    b0\n"


def test_a_figure_that_is_no_number_is_null_in_the_log(tmp_path):
    report = Report(Accelerator(cpu=True))
    report.open(Recipe(output_dir=str(tmp_path)))
    report.log("val", 3, {"val.loss": float("nan"), "val.top1": 1.0}, epoch=0)
    report.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["val.loss"] is None and row["val.top1"] == 1.0


def test_a_pipe_in_the_place_of_the_log_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="metrics.jsonl is no regular file"):
        Report(Accelerator(cpu=True)).open(Recipe(output_dir=str(tmp_path)))
