"""The formulas of docs/scaling.md against rows that NVIDIA published, and the page against the script."""

import sys
from pathlib import Path

import pytest

from effnet_hf.benchmark import published, scaling


B0, B4 = 5_288_548, 19_341_616


def test_parameters_are_counted_from_the_networks():
    assert (scaling.parameters("b0"), scaling.parameters("b4")) == (B0, B4)


def test_every_published_row_is_met_and_those_not_fitted_within_four_percent():
    rows = scaling.check_rows()
    errors = {use: [float(row["error"].split()[0]) for row in rows if row["use"] == use] for use in ("fitted", "check")}
    assert len(errors["fitted"]) == 3 and len(errors["check"]) == 7
    assert max(map(abs, errors["fitted"])) < 0.5
    assert max(map(abs, errors["check"])) < 4


@pytest.mark.parametrize(("network", "row"), published.WHOLE_RUNS.items())
def test_published_hours_of_400_epochs_are_met(network, row):
    ips, hours = row
    assert scaling.whole_run(ips, gpus=8)["hours"] == pytest.approx(hours, rel=0.04)


def test_one_gpu_is_what_was_measured():
    figures = scaling.predict(2489, 256, B0, gpus=1, loader_ips=100)
    assert figures["ips"] == pytest.approx(2489) and figures["efficiency"] == pytest.approx(1)
    assert figures["all_reduce_ms"] == 0 and figures["limit"] == "step"


def test_a_variant_may_be_called_by_its_original_name(capsys):
    assert scaling.main(["--step_ips", "efficientnet-b0=2489"]) == 0 and "| b0 |" in capsys.readouterr().out


def test_what_limits_is_named():
    plenty = 1e9
    assert scaling.predict(331, 128, B4, 8, plenty)["limit"] == "waiting"
    assert scaling.predict(7500, 256, B0, 8, loader_ips=2000)["limit"] == "loader"
    slow_network = scaling.predict(7500, 32, 400 * B4, 64, plenty)
    assert slow_network["limit"] == "all-reduce" and slow_network["exposed_ms"] > 0


def test_an_all_reduce_moves_twice_the_gradients_but_one_share():
    figures = scaling.predict(331, 128, B4, 8)
    assert figures["all_reduce_ms"] == pytest.approx(1e3 * 2 * 7 / 8 * B4 * 4 / scaling.WITHIN)


def test_the_page_shows_what_the_script_prints(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark.py"])
    page = (Path(__file__).parents[2] / "docs/scaling.md").read_text("utf-8")
    assert scaling.main([]) == 0
    tables = [block for block in capsys.readouterr().out.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert table.strip() in page
