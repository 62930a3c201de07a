"""`effnet-hf folds`: the runs of one cross-validation together."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, log_loss, recall_score

from effnet_hf import EfficientNetNVConfig
from effnet_hf.analysis import sum_folds
from effnet_hf.commands import folds as command
from effnet_hf.data.listing import DataListing
from effnet_hf.data.opening import open_data
from effnet_hf.errors import UserError
from effnet_hf.recipes import Recipe
from effnet_hf.run_folder import RunFolder

from ..training.workbench import write_squares


NAMES = ["blue", "green", "red"]


def thresholds_of(fold):
    return [0.2 + 0.1 * fold, 0.5, 0.6]


def write_run(folder, data, fold, several=False, **options):
    """What a run of a fold leaves, but for weights: answers are drawn, and summary and table are of these."""
    recipe = Recipe(data_dir=str(data), folds=3, fold=fold, output_dir=str(folder), **options)
    source, run, rng = open_data(recipe), RunFolder(folder), np.random.default_rng(fold)
    run.checkpoints.mkdir(parents=True)
    run.report.mkdir()
    run.recipe.write_text(recipe.to_yaml())
    source.listing().write(run.data)
    config = EfficientNetNVConfig(
        image_size=32, id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)},
        **({"problem_type": "multi_label_classification", "thresholds": thresholds_of(fold)} if several else {}),
    )  # fmt: skip
    config.save_pretrained(folder)
    labels, logits = source.val.labels, rng.normal(size=(len(source.val), 3))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    images = [source.val.name(i) for i in range(len(labels))]
    if several:
        truth = source.label_sets[labels]
        header = ["image", *(f"{kind} {name}" for name in NAMES for kind in ("label", "probability"))]
        rows = [[image, *np.stack([t, s], 1).ravel().tolist()] for image, t, s in zip(images, truth, p)]
        summary = {"map": 50.0 + fold, "f1": 40.0 + fold, "loss": 0.5}
    else:
        answers = logits.argmax(1)
        header = ["image", "label", "prediction", "label_probability"]
        rows = [[image, NAMES[t], NAMES[a], q[t]] for image, t, a, q in zip(images, labels, answers, p)]
        summary = {
            "top1": 100 * accuracy_score(labels, answers),
            "macro_recall": 100 * recall_score(labels, answers, average="macro"),
            "macro_f1": 100 * f1_score(labels, answers, average="macro"),
            "loss": log_loss(labels, p, labels=[0, 1, 2]),
        }
    run.summary.write_text(json.dumps(summary | {"n": len(labels)}))
    with open(run.report / "predictions.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(folder)


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    root = write_squares(tmp_path_factory.mktemp("squares"), per_class=10)
    shutil.rmtree(root / "val")
    return root


@pytest.fixture
def runs(squares, tmp_path):
    return [write_run(tmp_path / f"f{fold}", squares, fold) for fold in (1, 2, 3)]


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_means_deviations_and_pooled_figures_are_scikit_learns(runs, tmp_path, capsys):
    command.main([*runs[::-1], "--output_dir", str(tmp_path / "sum")])
    found = json.loads((tmp_path / "sum" / "folds.json").read_text())
    summaries = [json.loads((tmp_path / f"f{fold}" / "summary.json").read_text()) for fold in (1, 2, 3)]
    assert [fold["fold"] for fold in found["folds"]] == [1, 2, 3]
    for name in ("top1", "macro_recall", "macro_f1", "loss"):
        values = [summary[name] for summary in summaries]
        assert found["mean"][name] == pytest.approx(np.mean(values))
        assert found["sd"][name] == pytest.approx(np.std(values, ddof=1))
    rows = rows_of(tmp_path / "sum" / "predictions.csv")
    truth, answers = [row["label"] for row in rows], [row["prediction"] for row in rows]
    assert len(rows) == len({row["image"] for row in rows}) == 30
    tables = {fold: rows_of(tmp_path / f"f{fold}/report/predictions.csv") for fold in "123"}
    assert [row["fold"] for row in rows] == sorted(row["fold"] for row in rows)
    assert {(row["image"], row["fold"]) for row in rows} == {(row["image"], f) for f in tables for row in tables[f]}
    assert found["pooled"]["top1"] == 100 * accuracy_score(truth, answers)
    assert found["pooled"]["macro_recall"] == pytest.approx(100 * recall_score(truth, answers, average="macro"))
    assert found["pooled"]["macro_f1"] == pytest.approx(100 * f1_score(truth, answers, average="macro"))
    given = [float(row["label_probability"]) for row in rows]
    assert found["pooled"]["loss"] == pytest.approx(-np.log(given).mean())
    classes = rows_of(tmp_path / "sum" / "classes.csv")
    recalls = 100 * recall_score(truth, answers, average=None)
    assert [(row["class"], row["n"]) for row in classes] == [(name, "10") for name in NAMES]
    assert [float(row["recall"]) for row in classes] == pytest.approx(recalls)
    said = capsys.readouterr().out
    assert f"{found['mean']['top1']:.2f} ± {found['sd']['top1']:.2f}" in said
    assert "mean ± sd is that of 3 figures, one per fold, each counting the same; the sd divides by 2" in said
    assert "all images      30" in said and f"lowest recall: {NAMES[int(recalls.argmin())]}" in said
    assert "note:" not in said and str(tmp_path / "sum" / "folds.csv") in said


def test_names_come_back_from_the_tables(runs, tmp_path):
    found = sum_folds(runs)
    images = found.runs[0].table["image"]
    images[:3] = ["a\rb.png", ' "c",\n', "=d|e"]
    found.write(str(tmp_path / "sum"))
    assert [row["image"] for row in rows_of(tmp_path / "sum" / "predictions.csv")][:4] == images[:4]


def test_nothing_is_overwritten_without_the_flag(runs, tmp_path):
    target = tmp_path / "sum"
    command.main([*runs, "--output_dir", str(target)])
    with pytest.raises(UserError, match="or add --overwrite"):
        command.main([*runs, "--output_dir", str(target)])
    command.main([*runs, "--output_dir", str(target), "--overwrite"])
    (target / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"mine\.txt"):
        command.main([*runs, "--output_dir", str(target), "--overwrite"])


def test_several_labels_are_pooled_at_each_folds_thresholds(squares, tmp_path, capsys):
    rows = [f"train/{name}/{i}.png,{'blue;red' if i % 3 == 0 else name}" for name in NAMES for i in range(10)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *rows]))
    options = {"several": True, "labels": str(tmp_path / "labels.csv"), "label_separator": ";"}
    runs = [write_run(tmp_path / f"f{fold}", squares, fold, **options) for fold in (1, 2, 3)]
    command.main([*runs, "--output_dir", str(tmp_path / "sum")])
    found = json.loads((tmp_path / "sum" / "folds.json").read_text())
    rows = rows_of(tmp_path / "sum" / "predictions.csv")
    truth, scores = (np.array([[float(row[f"{kind} {name}"]) for name in NAMES] for row in rows])
                     for kind in ("label", "probability"))  # fmt: skip
    assert found["mean"]["map"] == 52 and found["sd"]["map"] == 1
    assert found["pooled"]["map"] == pytest.approx(100 * average_precision_score(truth, scores))
    answers = scores >= [thresholds_of(int(row["fold"])) for row in rows]
    assert found["pooled"]["f1"] == pytest.approx(100 * f1_score(truth, answers, average="macro", zero_division=0))
    assert not (tmp_path / "sum" / "classes.csv").exists() and "mAP %" in capsys.readouterr().out


def test_runs_that_are_no_whole_division_are_refused_by_name(runs, squares, tmp_path):
    def refused(words, *some):
        with pytest.raises(UserError, match=words) as error:
            command.main([*some, "--output_dir", str(tmp_path / "sum")])
        assert "\n" not in str(error.value) and not (tmp_path / "sum").exists()

    refused("folds 2, 3 of 3 missing; name all runs", runs[0])
    refused("fold 2 of 3 missing", runs[0], runs[2])
    refused("f1 and .*f1 are both fold 1; name one", runs[0], runs[0], runs[2])
    refused("holds no finished run: it has no recipe.yaml", str(squares))
    shutil.copytree(runs[2], tmp_path / "without")
    (tmp_path / "without" / "report" / "predictions.csv").unlink()
    refused(r"without has no report/predictions\.csv; go on with --resume auto --report true", *runs[:2],
            str(tmp_path / "without"))  # fmt: skip
    plain = tmp_path / "plain"
    shutil.copytree(runs[2], plain)
    (plain / "recipe.yaml").write_text(Recipe(data_dir=str(squares)).to_yaml())
    refused("plain was not trained on a fold; train with --folds 5 --fold 1", *runs[:2], str(plain))
    (plain / "recipe.yaml").write_text(Recipe(folds=4, fold=3).to_yaml())
    refused("f1 is one of 3 folds and .*plain one of 4", *runs[:2], str(plain))
    shutil.rmtree(plain)
    shutil.copytree(runs[1], plain)
    (plain / "recipe.yaml").write_text((tmp_path / "f3" / "recipe.yaml").read_text())
    refused(r"f2 and .*plain were both measured on .*\.png; they are no folds of one division", *runs[:2], str(plain))


def edit_rows(run, change):
    """Changes the list of rows, without header, of a run's predictions."""
    file = Path(run) / "report" / "predictions.csv"
    with open(file, newline="") as opened:
        header, *rows = csv.reader(opened)
    with open(file, "w", newline="") as opened:
        csv.writer(opened).writerows([header, *change(rows)])


def edit_listing(run, table):
    file = RunFolder(run).data
    dataclasses.replace(DataListing.read(file), table=table(DataListing.read(file).table)).write(file)


def all_of(split):
    return lambda table: table.set_column(0, "split", pa.array([split] * len(table)))


def moved(row):
    return ["/elsewhere/" + row[0].rpartition("/train/")[2], *row[1:]]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda runs: edit_rows(runs[1], lambda rows: rows[1:]), "has 9 images, and summary.json counts 10; go on"),
        (lambda runs: edit_rows(runs[1], lambda rows: [*rows[1:], rows[1]]), "f2 was twice measured on .*png; they"),
        (lambda runs: edit_listing(runs[1], all_of("train")), r"none of the 3 runs was measured on .*png \(of 10\)"),
        (lambda runs: edit_listing(runs[1], all_of("val")), "f1 and .*f2 were both measured on train/.*png; they"),
    ],
)  # fmt: skip
def test_an_image_that_is_not_answered_exactly_once_is_refused(change, words, runs, tmp_path):
    change(runs)
    with pytest.raises(UserError, match=words):
        command.main([*runs, "--output_dir", str(tmp_path / "sum")])


def test_what_could_not_be_read_is_said(runs, tmp_path, capsys):
    edit_rows(runs[1], lambda rows: rows[1:])
    summary = RunFolder(runs[1]).summary
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"n": 9}))
    command.main([*runs, "--output_dir", str(tmp_path / "sum")])
    assert "note: 1 of 30 images could not be read" in capsys.readouterr().out
    edit_rows(runs[0], lambda rows: [*rows, moved(rows[0])])
    summary = RunFolder(runs[0]).summary
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"n": 11}))
    with pytest.raises(UserError, match="f1 has answers to 11 images, and its fold 10; train it anew"):
        command.main([*runs, "--output_dir", str(tmp_path / "more")])


def test_folders_may_have_moved_and_images_of_a_data_set_share_a_name(runs, tmp_path):
    edit_rows(runs[1], lambda rows: [["0.png", *row[1:]] for row in rows])
    edit_rows(runs[2], lambda rows: map(moved, rows))
    command.main([*runs, "--output_dir", str(tmp_path / "sum")])
    assert len(rows_of(tmp_path / "sum" / "predictions.csv")) == 30


def test_a_run_that_was_let_onto_other_images_is_refused(runs, tmp_path):
    file = RunFolder(runs[1]).recipe
    file.write_text(file.read_text().replace("accept_changed_data: false", "accept_changed_data: true"))
    with pytest.raises(
        UserError, match="f2/recipe.yaml: --folds goes without --accept_changed_data true: other images"
    ):
        command.main([*runs, "--output_dir", str(tmp_path / "sum")])


def test_other_images_are_refused_and_other_settings_said(runs, squares, tmp_path, capsys):
    more = tmp_path / "more"
    shutil.copytree(squares, more)
    shutil.copy(more / "train" / "red" / "0.png", more / "train" / "red" / "new.png")
    with pytest.raises(UserError, match=r"f1 and .*other were trained and validated on other images: .*new\.png"):
        command.main([*runs[:2], write_run(tmp_path / "other", more, 3)])
    shutil.rmtree(tmp_path / "f3")
    write_run(tmp_path / "f3", squares, 3, learning_rate=0.5)
    shutil.rmtree(tmp_path / "f1" / "checkpoints")
    command.main([*runs, "--output_dir", str(tmp_path / "sum")])
    said = capsys.readouterr().out
    assert "note: the runs were not trained alike: they differ in learning_rate." in said
    assert "note: whether all runs had the same images is not known: " in said


@pytest.mark.parametrize("missing, are", [(1, "is"), (2, "are")])
def test_runs_are_found_by_a_glob_and_unread_images_counted(missing, are, runs, tmp_path, capsys):
    summary, table = (tmp_path / "f1" / name for name in ("summary.json", "report/predictions.csv"))
    found = json.loads(summary.read_text())
    summary.write_text(json.dumps(found | {"n": found["n"] - missing}))
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-missing]))
    command.main([str(tmp_path / "f?"), "--output_dir", str(tmp_path / "sum")])
    assert f"note: {missing} of 30 images could not be read and {are} not counted.\n" in capsys.readouterr().out
