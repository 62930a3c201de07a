"""The table of docs/interop.md: each client once, in a known group, and none that works with the stock model only."""

import importlib
import json

import pytest

from .reading import ROOT


@pytest.fixture
def interop(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("interop")


@pytest.fixture
def results():
    return json.loads(max((ROOT / "benchmarks").glob("*-interop.json")).read_text("utf-8"))


def test_each_client_has_one_row_and_each_group_some(interop, results):
    groups = interop.rows(results)
    clients = [row["client"].lower() for rows in groups.values() for row in rows]
    assert sorted(clients) == sorted(set(clients))
    assert list(groups) == list(interop.GROUPS)


def test_no_client_works_with_the_stock_model_only(interop, results):
    assert interop.worse(interop.rows(results)) == []


def entry(client, side, result, group="Training"):
    return {"client": client, "group": group, "side": side, "result": result, "versions": {"torch": "2.15.0"}}


def test_a_row_is_the_worst_of_its_tests_and_rows_have_an_order(interop):
    found = [entry("b", "ours", "works"), entry("b", "ours", "fails"), entry("b", "stock", "works")]
    found += [entry("C", "ours", "skipped"), entry("C", "ours", "works"), entry("a", "ours", "skipped")]
    found += [entry("d", "ours", "fails", "Serving"), entry("e", "ours", "fails", "Transformers")]
    found += [entry("e", "stock", "fails", "Transformers")]
    groups = interop.rows(found)
    assert list(groups) == ["Transformers", "Training", "Serving"]
    assert [(row["client"], row["ours"], row["stock"]) for row in groups["Training"]] == [
        ("a", "skipped", ""), ("b", "fails", "works"), ("C", "works", "")
    ]  # fmt: skip
    assert interop.worse(groups) == ["b", "d"] and groups["Training"][0]["tried"] == ""
    assert interop.summary(groups).startswith("4 clients: 1 work with ours; of the 2 in which a stock model was tried")
