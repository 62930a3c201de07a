"""The stop rule of the fused kernels, what it predicts, and its page; the measurement itself needs a card."""

import json
import sys

import pytest
import torch
from lib import fused, page

from effnet_hf.errors import UserError
from effnet_hf.fused import layers


CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def rows(**times):
    same = {"variant": "b0", "precision": "bf16", "steps": 8}
    return [{**same, "form": form.replace("_", ", "), "x compile": ratio} for form, ratio in times.items()]


def test_the_kernels_stay_from_fifteen_percent_on():
    said = fused.verdict(rows(eager=0.7, compile=1.0, fused=0.8, fused_compile=1.15), CUDA)
    assert said == "fused, compile: 1.150 times our compiled step, n = 8; 1.15 was asked for: the kernels stay"
    said = fused.verdict(rows(eager=1.3, compile=1.0, fused=1.1, fused_compile=1.149), CUDA)
    assert said.startswith("fused, compile: 1.149") and said.endswith("the kernels go")


def test_there_is_no_verdict_without_a_card_or_a_compiled_step():
    everything = rows(compile=1.0, fused=2.0)
    assert "no verdict" in fused.verdict(everything, CPU)
    assert "no verdict" in fused.verdict(everything[:1], CUDA)
    assert "no verdict" in fused.verdict(rows(fused=None), CUDA)


def test_what_is_predicted_is_three_passes_over_the_maps_under_squeeze_excite():
    known = {"b0": 2 * 3 * 2_306_528, "lite0": 0}  # bytes: bf16, passes, elements of B0's depthwise maps at 224 pixels
    for variant, saved in known.items():
        row = fused.predict(variant, 224, "bf16")
        assert row["MB compiled"] - row["MB fused"] == pytest.approx(saved / 1e6)
        assert variant != "b0" or (round(row["MB compiled"]), round(row["MB fused"])) == (193, 179)
        assert row["x compile, predicted"] == pytest.approx(row["MB compiled"] / row["MB fused"])


@pytest.mark.parametrize(
    "name, value, said", [("functions", None, "needs triton"), ("INTERPRETED", False, "set TRITON_INTERPRET=1")]
)
def test_a_cpu_needs_triton_and_its_interpreter(name, value, said, monkeypatch):
    monkeypatch.setattr(layers, name, value)
    with pytest.raises(UserError, match=said):
        fused.main(["--image_size", "32"])


def test_a_training_step_of_every_form_goes_into_a_page(monkeypatch, tmp_path, capsys):
    """The forms are torch's own here: no interpreter, no compiler."""
    monkeypatch.setattr(layers, "INTERPRETED", True)
    monkeypatch.setattr(layers, "_may_fuse", lambda layer, x: False)
    monkeypatch.setattr(fused, "FORMS", {form: ("eager", None) for form in fused.FORMS})
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "fused"])
    output = tmp_path / "2026-01-02-cpu" / "fused.json"
    output.parent.mkdir()
    assert fused.main(["--image_size", "32", "--rounds", "2", "--output", str(output)]) == 0
    figures = json.loads(output.read_text())
    assert [row["form"] for row in figures["rows"]] == list(fused.FORMS)[:4] and figures["left_out"] == []
    assert next(row for row in figures["rows"] if row["form"] == "compile")["x compile"] == 1
    assert figures["verdict"] in capsys.readouterr().out
    text = page.write_page(output.parent).read_text()
    assert "## Fused kernels, an experiment" in text and "no verdict" in text and "### Predicted" in text
