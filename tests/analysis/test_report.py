"""The report that a human opens: what stands in it, in which order, and that words of others stay words."""

import csv
import io
import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from effnet_hf import EfficientNetNVForImageClassification, EfficientNetNVImageProcessor
from effnet_hf.analysis import Answers, drawings, measure, write_report
from effnet_hf.analysis.tables import write_tables
from effnet_hf.data.opening import open_data
from effnet_hf.errors import UserError
from effnet_hf.recipes import Recipe


PER_CLASS = 6
HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "\"><b>quoted's & $x_1$",
    "שלום \u202e",
    "🦊 fox",
    "long " + 195 * "x",
    "never",
)
TABLES = {"figures.json", "classes.csv", "confusion.csv", "predictions.csv", "suspects.csv"}
PICTURES = {"confusion.png", "reliability.png", "coverage.png", "mistakes.png", "hits.png", "attention.png"}


def write_images(folder, names=HOSTILE, size: int = 20) -> None:
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(PER_CLASS):
            pixels = rng.integers(0, 255, (size, size, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number} <b>.png")


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_images(folder)
    return open_data(Recipe(data_dir=str(folder)), False, None)


def answers_of(split, seed: int = 0) -> Answers:
    """Mostly right; one label looks wrong, and so do two for whom that says little: no image of "never" is right."""
    names, labels = split.class_names, split.val.labels
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 0.5, (len(labels), len(names))) + 4 * np.eye(len(names))[labels]
    never = names.index("never")
    logits[labels == never, never] = -3
    other = (never + 1) % len(names)
    answers = np.eye(len(names))[[never, (never + 2) % len(names)]]
    logits[np.flatnonzero(labels == other)[:2]] = 9 * answers
    logits[np.flatnonzero(labels == never)[0], other] = 9
    return Answers(logits.astype(np.float32), labels, np.arange(len(labels)), names)


@pytest.fixture
def undrawn(monkeypatch):
    """Plots are of one pixel: matplotlib takes a second for real ones, and the module's `report` has these."""
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    for name in ("confusion", "reliability", "coverage", "sheet"):
        monkeypatch.setattr(drawings, name, lambda *call, **options: file.getvalue())


@pytest.fixture(scope="module")
def network():
    """Of six classes, with the processor of its pictures."""
    from tests.conftest import tiny_config

    torch.manual_seed(0)
    config = tiny_config.__wrapped__()(num_labels=6)
    return EfficientNetNVForImageClassification(config), EfficientNetNVImageProcessor.for_image_size(32, 0)


@pytest.fixture(scope="module")
def report(split, network, tmp_path_factory):
    """Its folder, and what `write_report` has returned."""
    folder, (model, processor) = tmp_path_factory.mktemp("report") / "report", network
    facts = {"command": "effnet-hf validate <b>", "speed": None, "device": "CPU"}
    found = write_report(
        answers_of(split), split.val, folder, network=model, processor=processor, facts=facts, title="A & <b>"
    )
    return folder, found


def test_all_files_are_there(report):
    folder, found = report
    assert {path.name for path in folder.iterdir()} == {"report.html", "manifest.json"} | TABLES | PICTURES
    for name in PICTURES:
        with Image.open(folder / name) as picture:
            assert picture.info["Software"] == "effnet_hf" and min(picture.size) > 100
    assert found["page"] == folder / "report.html"
    assert found["plots"] == ["confusion.png", "reliability.png", "coverage.png"]  # without an image of the data


def test_figures_are_those_of_the_answers(report, split):
    folder, found = report
    figures = measure(answers_of(split), 5)
    assert json.loads((folder / "figures.json").read_text()) == json.loads(json.dumps(figures.to_dict()))
    page = (folder / "report.html").read_text("utf-8")
    assert f"{100 * figures.accuracy.value:.2f} %</b>" in page
    assert f"{100 * figures.accuracy.low:.1f}–{100 * figures.accuracy.high:.1f}" in page
    assert f"{100 * figures.macro.f1.value:.2f} %</b>" in page
    with open(folder / "classes.csv", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    rows = {row["class"]: float(row["recall"]) for row in table}
    assert [(row["class"], int(row["n"]), int(row["predicted"])) for row in table] == [
        (each.name, each.n, each.predicted) for each in figures.classes
    ]
    assert any(each.n != each.predicted for each in figures.classes)
    with open(folder / "suspects.csv", encoding="utf-8") as file:
        shares = [(row["label_probability"], row["suggestion_probability"]) for row in csv.DictReader(file)]
    assert shares == [(str(case.label_probability), str(case.probability)) for case in figures.suspects] and shares
    assert rows == {each.name: each.recall.value for each in figures.classes} and rows["never"] == 0
    assert found["never_found"] == ["never"] and found["worst"][0][:2] == ("never", PER_CLASS)
    assert [row[0] for row in found["averages"]] == ["macro average", "weighted average"]


def test_names_come_back_from_the_tables(tmp_path):
    """From Python's reader and from pandas, whatever they hold; beside them numbers are numbers."""
    names = ["a\rb", "c\nd", "e\r\nf", 'g"h', "i,j", " k ", "\r", "=1+2|l", "'m'", "\u2028n"]
    labels = np.arange(len(names))
    answers = Answers(np.eye(len(names), dtype=np.float32)[labels[::-1]], labels, labels, names)
    written = write_tables(tmp_path, answers, measure(answers), [f"{name}.png" for name in names])
    assert set(written) == TABLES - {"figures.json"}
    with open(tmp_path / "predictions.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    table, classes = (pd.read_csv(tmp_path / name) for name in ("predictions.csv", "classes.csv"))
    for column, expected in (
        ("image", [f"{name}.png" for name in names]),
        ("label", names),
        ("prediction", names[::-1]),
    ):
        assert table[column].tolist() == expected == [row[header.index(column)] for row in rows]
    assert sorted(classes["class"]) == sorted(names)
    assert table["probability"].dtype == classes["recall"].dtype == np.float64 and table["rank"].dtype == np.int64
    assert b"\r\n" not in (tmp_path / "confusion.csv").read_bytes().replace(b"e\r\nf", b"")


def test_what_is_wrong_comes_first(report):
    page = (report[0] / "report.html").read_text("utf-8")
    first = page.partition('<section id="first">')[2].partition("</section>")[0]
    alarm = first.partition("Never found:")[2].partition("</div>")[0]
    assert "<bdi>never</bdi> (6)" in alarm and "recall 0" in alarm
    for words in ("Worst of the other classes", "Most frequent confusions", "calibration error (ECE)"):
        assert words in first, words
    assert "1 label may be wrong, worth a look; 2 more, in classes that are never found or have fewer than 5" in first
    assert page.partition('<section id="suspects">')[2].partition("</section>")[0].count("<tr>") == 2  # and the head
    for section in ("classes", "confusion", "mistakes", "hits", "attention", "suspects", "calibration", "facts"):
        assert f'<section id="{section}">' in page and f'href="#{section}"' in first


def test_words_of_others_are_words(report):
    page = (report[0] / "report.html").read_text("utf-8")
    assert "<img src=x" not in page and "<b>quoted" not in page and "A & <b>" not in page and "\u202e" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page and "🦊 fox" in page and "שלום" in page and 195 * "x" in page
    assert page.count("<script") == 1 and "speed" not in page.partition('id="facts"')[2]


def test_page_is_whole(report):
    page = (report[0] / "report.html").read_text("utf-8")
    maps = page.partition('<section id="attention">')[2].partition("</section>")[0]
    assert maps.count("<figure>") == maps.count('href="file:///') > 0  # each is of a file to open
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) > 30 and all(each.startswith("data:image/") for each in sources)
    links = set(re.findall(r'href="([^"#][^"]*)"', page))
    assert {link for link in links if not link.startswith("file:///")} == TABLES
    assert not re.search(r"https?://", page)


def test_without_images_it_says_so(split, tmp_path, undrawn):
    found = write_report(answers_of(split), None, tmp_path / "report", facts={})
    page = found["page"].read_text("utf-8")
    assert "cannot be read a second time" in page and 'id="mistakes"' not in page and 'id="attention"' not in page
    assert not {"mistakes.png", "hits.png", "attention.png"} & {path.name for path in found["page"].parent.iterdir()}
    with open(tmp_path / "report/predictions.csv", encoding="utf-8") as file:
        assert [row["image"] for row in csv.DictReader(file)][:2] == ["image 0", "image 1"]


def test_image_that_has_vanished_leaves_the_rest(tmp_path, undrawn):
    write_images(tmp_path / "data", ("a", "never", "z"))
    split = open_data(Recipe(data_dir=str(tmp_path / "data")), False, None)
    answers = answers_of(split)
    gone = measure(answers).mistakes[0]
    (tmp_path / "data" / split.class_names[gone.label] / f"{gone.position % PER_CLASS} <b>.png").unlink()
    page = write_report(answers, split.val, tmp_path / "report", facts={})["page"].read_text("utf-8")
    cards = page.partition('id="mistakes"')[2].partition("</section>")[0].split("<figure>")[1:]
    assert "<img" not in cards[0] and "<img" in cards[1] and f"{gone.position % PER_CLASS} &lt;b&gt;.png" in cards[0]


def test_own_report_is_replaced_and_nothing_else(split, tmp_path, undrawn):
    place = tmp_path / "report"
    write_report(answers_of(split), None, place, facts={"command": "the first"})
    write_report(answers_of(split, seed=1), None, place, facts={"command": "the second"})
    page = (place / "report.html").read_text("utf-8")
    assert "the second" in page and "the first" not in page
    (place / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds what was not written here, e\.g\. mine\.txt"):
        write_report(answers_of(split), None, place, facts={})
    assert (place / "report.html").read_text("utf-8") == page
    (place / "mine.txt").unlink()
    with open(place / "suspects.csv", "a") as file:
        file.write("a mark of mine")
    with pytest.raises(UserError, match=r"holds what was not written here, e\.g\. suspects\.csv"):
        write_report(answers_of(split), None, place, facts={}, overwrite=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="already exists and is not empty"):
        write_report(answers_of(split), None, other, facts={})
    assert [path.name for path in other.iterdir()] == ["mine.txt"]


def test_several_labels_per_image(split, network, tmp_path, undrawn):
    rng, names = np.random.default_rng(0), split.class_names
    labels = (rng.random((len(split.val.labels), 6)) < 0.3).astype(np.uint8)
    labels[0] = 1
    logits = (rng.normal(0, 1, labels.shape) + 3 * (labels - 0.5)).astype(np.float32)
    answers = Answers(logits, labels, np.arange(len(labels)), names, np.full(6, 0.5))
    model, processor = network
    found = write_report(answers, split.val, tmp_path / "report", network=model, processor=processor, facts={})
    page = found["page"].read_text("utf-8")
    figures = measure(answers)
    assert f"{100 * figures.mean_average_precision:.2f} %</b>" in page and "its own threshold" in page
    assert 'id="confusion"' not in page and 'id="calibration"' not in page and found["plots"] == []
    assert "AP, %" in page and page.count("<figure>") >= 8 and "label not " in page
    assert not (tmp_path / "report/confusion.csv").exists()


def test_thousand_classes_stay_readable(tmp_path, undrawn):
    rng, classes = np.random.default_rng(0), 1000
    labels = np.arange(3000) % classes
    logits = rng.normal(0, 1, (len(labels), classes)).astype(np.float32)
    logits[np.arange(len(labels)), labels] += 4
    answers = Answers(logits, labels, np.arange(len(labels)), [f"class {i}" for i in range(classes)])
    page = write_report(answers, None, tmp_path / "report", facts={})["page"].read_text("utf-8")
    assert len(page) < 2e6 and page.count("<tr") > classes  # all of them stand in the table
    assert "classes that are confused most; all are in confusion.csv" in page
    pairs = page.partition("Pairs that are confused most")[2].partition("</table>")[0]
    assert pairs.count("<tr>") == 31  # and the head
