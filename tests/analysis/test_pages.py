"""What a page says of temperatures, and what it leaves out for want of images."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from effnet_hf.analysis import Answers, drawings, measure, pages, write_report

from .some_answers import one_label


@pytest.fixture
def undrawn(monkeypatch):
    """What the drawings were called with, by their names; each is one pixel."""
    file, calls = io.BytesIO(), {}
    Image.new("RGB", (1, 1)).save(file, "PNG")
    for name in ("confusion", "reliability", "coverage"):
        monkeypatch.setattr(drawings, name, lambda *call, name=name: calls.update({name: call}) or file.getvalue())
    return calls


@pytest.mark.parametrize(
    "stored, changes, words",
    [
        (1.0, {}, "; with a temperature of {t:.2f}, which validate --calibrate stores, it is {held_out:.1f} % (fitted"),
        (1.2, {}, "; with a temperature of {t:.2f}, which validate --calibrate stores, it is {held_out:.1f} % (fitted"),
        (None, {}, "; its temperature {t:.2f} is stored."),
        (1.0, {"ece_held_out": 0.9}, "; a temperature would not make it smaller."),
        (1.0, {"fitted": None, "after": None, "ece_held_out": None}, "(ECE) of {now:.1f} %."),
    ],
    ids=["none", "another", "stored", "no use", "unknown"],
)
def test_a_temperature_is_advised_where_it_is_of_use(stored, changes, words, undrawn):
    answers = one_label(surer=8.0)
    best = measure(answers).calibration.fitted
    own = stored or best
    figures = measure(replace(answers, logits=answers.logits / np.float32(own), temperature=own))
    found = replace(figures.calibration, **changes)
    figures = replace(figures, calibration=found)
    now = 100 * found.now.ece
    said = pages._sentences(figures)[-1]
    assert words.format(t=best, now=now, held_out=100 * (found.ece_held_out or 0)) in said
    assert said.count("temperature") == ("temperature" in words) and f"(ECE) of {now:.1f} %" in said
    how = pages._plots(figures, {})["plots"][0]["how"]
    curves = [curve[0] for curve in undrawn["reliability"][0]]
    assert curves[0] == f"{'as it is' if stored == 1 else f'with its temperature {own:.2f}'}: ECE {now:.1f} %"
    if stored is None or found.after is None:
        assert len(curves) == 1 and "second line" not in how
    else:
        assert curves[1] == f"with {best:.2f}, fitted on these images: ECE {100 * found.after.ece:.1f} %"
        assert "the very images that its temperature was fitted on" in how


@pytest.mark.parametrize("images, least", [(6, None), (30, 10), (400, 20)])
def test_coverage_begins_where_an_image_no_longer_makes_it_jump(images, least, undrawn):
    rng, labels = np.random.default_rng(0), np.arange(images) % 2
    answers = Answers(rng.normal(size=(images, 2)).astype(np.float32), labels, np.arange(images), ["a", "b"])
    found = pages._plots(measure(answers), {})
    assert [each["title"] for each in found["plots"]] == ["Reliability", *(["Coverage"] if least else [])]
    if least:
        shares = undrawn["coverage"][0]
        assert (round(shares[0] * images), shares[-1]) == (least, 1)


@pytest.mark.parametrize(
    "name, length, shown",
    [("short", 22, "short"), ("IMG_2024_holiday_0001.jpg", 20, "IMG_2024_h…_0001.jpg"), ("abcdef", 5, "ab…ef")],
)
def test_long_names_keep_their_ends(name, length, shown):
    assert drawings.short(name, length) == shown and len(shown) <= length


def test_wnids_are_said_in_words_and_kept_in_the_tables(tmp_path, undrawn):
    names, labels = ["n03888257", "n02979186", "n00000001"], np.arange(30) % 3
    logits = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32) + 2 * np.eye(3, dtype=np.float32)[labels]
    logits[labels == 0, 0] = -9
    found = write_report(Answers(logits, labels, np.arange(30), names), None, tmp_path / "report", facts={})
    page = found["page"].read_text("utf-8")
    assert "<bdi>n03888257 parachute</bdi> (10)" in page and ">n02979186 cassette player</bdi>" in page
    assert ">n00000001</bdi>" in page and found["never_found"] == ["n03888257"]
    for table in ("classes.csv", "confusion.csv", "predictions.csv", "figures.json"):
        text = (tmp_path / "report" / table).read_text("utf-8")
        assert "n03888257" in text and "parachute" not in text
