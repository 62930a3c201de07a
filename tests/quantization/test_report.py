"""The figures of earlier launches, which a table is made from, may be anything by then."""

import json
import os

import pytest

from effnet_hf.quantization.report import load_figures, rows, save_figures
from effnet_hf.run_folder import RunFolder


GOOD = {"top1": 90.0, "top5": 99.0, "loss": 0.5, "n": 40, "bytes": 1_000_000}


def test_figures_come_back(tmp_path, caplog):
    assert load_figures(RunFolder(tmp_path), 5) == {} and not caplog.text
    save_figures(RunFolder(tmp_path), {"float": GOOD, "ptq": GOOD})
    assert load_figures(RunFolder(tmp_path), 5) == {"float": GOOD, "ptq": GOOD}
    assert rows(load_figures(RunFolder(tmp_path), 5), 5)[1][0] == ["float", "90.00", "99.00", "0.5000", "1.00"]


@pytest.mark.parametrize(
    "content",
    ["", "[]", "[1]", "1", "[" * 100_000, '{"float": {}}', '{"float": null}', '{"other": {}}', "a pipe"]
    + [json.dumps({"ptq": {**GOOD, name: value}}) for name in GOOD for value in ("1", None, -1, 1e300)]
    + [json.dumps({"ptq": {name: value for name, value in GOOD.items() if name != "top5"}})],
)
def test_what_are_no_figures_is_left_out_with_a_line(content, tmp_path, caplog):
    path = RunFolder(tmp_path).quantization
    os.mkfifo(path) if content == "a pipe" else path.write_text(content)
    assert load_figures(RunFolder(tmp_path), 5) == {}
    assert "the table leaves out what earlier launches measured" in caplog.text
