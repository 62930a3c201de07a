"""`classify --output`: one row per image, the console's own answers, whatever the files are called and however often it
was interrupted."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from effnet_hf import EfficientNetNVConfig, EfficientNetNVForImageClassification, EfficientNetNVImageProcessor
from effnet_hf.errors import UserError
from effnet_hf.files import lock_beside
from effnet_hf.inference import Classifier, answers, predictions, write_predictions
from effnet_hf.lock import held
from effnet_hf.training import allow_tf32

from ..data.torture import encode, photo
from ..test_scripts import call


NAMES = ["cat", "2", 'he said "a, b"\nand left', "NA"]


def save_model(folder: Path, names=NAMES, **settings) -> Path:
    torch.manual_seed(0)
    config = EfficientNetNVConfig(
        image_size=16, kernel_sizes=[3], strides=[2], num_block_repeats=[1], expand_ratios=[2], out_channels=[16],
        stem_channels=16, head_channels=32, id2label=dict(enumerate(names)), **settings,
    )  # fmt: skip
    network = EfficientNetNVForImageClassification(config)
    network.classifier.weight.data *= 5  # so that the answers differ between images
    network.save_pretrained(folder)
    EfficientNetNVImageProcessor.for_image_size(16, margin=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def classifier(model):
    return Classifier(str(model), device="cpu")


@pytest.fixture
def photos(tmp_path):
    """Seven good files and two bad ones, with names that a table can stumble over."""
    names = ["a.jpg", 'b,"c".png', "d\ne\r.jpg", "ñ 雪.jpg", "f.gif", "g.jpg", "h.jpg"]
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate(names):
        kind = {"png": "PNG", "gif": "GIF"}.get(name[-3:], "JPEG")
        (folder / name).write_bytes(encode(photo(number, 20 + number, 30), kind))
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("no image")
    return sorted(map(str, folder.iterdir()))


@pytest.fixture
def classify(model, monkeypatch, capsys):
    def run(*words):
        words = ["classify", "--model", model, "--device", "cpu", *words]
        return call(*words, monkeypatch=monkeypatch, capsys=capsys)

    return run


def write(classifier, paths, output, **settings):
    said = []
    done = write_predictions(classifier, paths, output, num_workers=0, tell=said.append, **settings)
    return done, said


def read(path: Path) -> list[dict]:
    """The rows as each format's usual reader gives them, None for nothing."""
    if path.suffix == ".csv":
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return [{k: (float(v) if "score" in k else v) if v else None for k, v in row.items()} for row in rows]
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().split("\n") if line]
    return pq.read_table(path).to_pylist()


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_the_file_has_the_consoles_answers_in_the_order_of_the_images(classifier, photos, tmp_path, kind):
    paths = [*photos, photos[0]]  # one of them twice
    done, said = write(classifier, paths, tmp_path / f"new/p.{kind}", batch_size=4, top_k=3)
    rows = read(tmp_path / f"new/p.{kind}")
    wanted = list(classifier(list(map(Path, paths)), top_k=3))
    assert [row["path"] for row in rows] == paths and (done.images, done.unreadable, said) == (10, 2, [])
    assert done.example.endswith("empty.jpg is empty (0 bytes)")
    for row, answer in zip(rows, wanted):
        assert row["error"] == answer.error
        columns = [("label", "score"), ("label_2", "score_2"), ("label_3", "score_3")]
        if answer.error:
            assert {row[name] for pair in columns for name in pair} == {None}
            continue
        assert [row[label] for label, _ in columns] == [each["label"] for each in answer.predictions]
        scores = [each["score"] for each in answer.predictions]
        np.testing.assert_allclose([row[score] for _, score in columns], scores, atol=1e-6)
    assert list(rows[0]) == [*["path", "label", "score"], *["label_2", "score_2", "label_3", "score_3"], "error"]
    assert len({row["score"] for row in rows}) == 8  # 7 images and none
    assert os.listdir(tmp_path / "new") == [f"p.{kind}"]


def test_pandas_reads_what_was_written(classifier, photos, tmp_path):
    for kind in ("csv", "parquet", "jsonl"):
        write(classifier, photos, tmp_path / f"p.{kind}", all_scores=True)
    frames = [
        pd.read_csv(tmp_path / "p.csv", keep_default_na=False, na_values={"error": "", "score": ""}),
        pd.read_parquet(tmp_path / "p.parquet"),
        pd.read_json(tmp_path / "p.jsonl", lines=True, dtype={"path": str, "label_3": str, "label": str}),
    ]
    for frame in frames:
        assert frame["path"].tolist() == photos and frame["error"].notna().sum() == 2
        good = frame[frame["error"].isna()]
        every = good[[f"score:{name}" for name in NAMES]].astype(float)
        np.testing.assert_allclose(every.sum(axis=1), 1, atol=1e-6)
        assert [NAMES[i] for i in every.to_numpy().argmax(1)] == good["label"].tolist()
        assert (every.max(axis=1) == good["score"]).all()


def test_names_that_are_not_utf8_are_rows_like_others(classifier, tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b"\xff.jpg")
    with open(name, "wb") as file:
        file.write(encode(photo(1), "JPEG"))
    for kind in ("csv", "parquet", "jsonl"):
        write(classifier, [os.fsdecode(name)], tmp_path / f"p.{kind}")
        (row,) = read(tmp_path / f"p.{kind}")
        assert row["path"].endswith(r"/\udcff.jpg") and row["label"] and not row["error"]


def test_several_labels_are_those_that_pass(tmp_path):
    names = ["cat", "dog", "bird", "a;b"]
    model = save_model(
        tmp_path / "m", names, problem_type="multi_label_classification", thresholds=[0.95, 0.2, 0.5, 0.99]
    )
    network = EfficientNetNVForImageClassification.from_pretrained(model)
    network.classifier.weight.data.zero_()
    network.classifier.bias.data = torch.tensor([0.9, 0.3, 0.6, 0.1]).logit()
    network.save_pretrained(model)
    (tmp_path / "a.jpg").write_bytes(encode(photo(1), "JPEG"))
    (tmp_path / "b.jpg").write_bytes(b"")
    paths, several = [tmp_path / "a.jpg", tmp_path / "b.jpg"], Classifier(str(model), device="cpu")
    with pytest.raises(UserError, match="class a;b holds a ';'.*name a .parquet or .jsonl file"):
        write(several, paths, tmp_path / "p.csv")
    for kind in ("parquet", "jsonl"):
        write(several, paths, tmp_path / f"p.{kind}", all_scores=True)
        good, bad = read(tmp_path / f"p.{kind}")
        assert good["labels"] == ["bird", "dog"] and good["scores"] == pytest.approx([0.6, 0.3])
        assert [good[f"score:{name}"] for name in names] == pytest.approx([0.9, 0.3, 0.6, 0.1])
        assert bad["labels"] is bad["scores"] is bad["score:cat"] is None and bad["error"] == "is empty (0 bytes)"
    several.config.id2label[3] = "ab"
    write(several, paths, tmp_path / "p.csv")
    assert (tmp_path / "p.csv").read_text().splitlines()[1].endswith('"bird;dog","0.6;0.3",')
    write(several, paths, tmp_path / "p.csv", top_k=1, overwrite=True)
    assert (tmp_path / "p.csv").read_text().splitlines()[1].endswith('"bird","0.6",')


def test_of_one_class_it_is_the_pipelines_sigmoid(photos, tmp_path):
    one = Classifier(str(save_model(tmp_path / "m", ["cat"])), device="cpu")
    write(one, photos[:1], tmp_path / "p.jsonl")
    (row,) = read(tmp_path / "p.jsonl")
    (wanted,) = one([Path(photos[0])])
    assert row["score"] == pytest.approx(wanted.predictions[0]["score"], abs=1e-6) and row["score"] < 1


@pytest.fixture
def interrupted(request, classifier, photos, tmp_path, monkeypatch):
    """Stopped at the sixth of nine images, each written at once; and how to count what is read afterwards."""
    opened = []

    def stop_at_the_sixth(path):
        opened.append(path)
        if len(opened) == 6:
            raise KeyboardInterrupt
        return usual(path)

    usual = answers.read_file
    monkeypatch.setattr(predictions, "PART_SECONDS", getattr(request, "param", -1.0))
    monkeypatch.setattr(answers, "read_file", stop_at_the_sixth)
    said = []
    with pytest.raises(KeyboardInterrupt):
        write_predictions(classifier, photos, tmp_path / "p.csv", batch_size=1, num_workers=0, tell=said.append)
    assert said == ["5 of 9 images are answered; the same command goes on from there"]
    assert not (tmp_path / "p.csv").exists()
    monkeypatch.setattr(answers, "read_file", lambda path: (opened.append(path), usual(path))[1])
    return opened


def test_interrupted_it_goes_on_and_ends_with_the_same_file(classifier, photos, tmp_path, interrupted):
    interrupted.clear()
    done, said = write(classifier, photos, tmp_path / "p.csv", batch_size=1)
    assert interrupted == photos[5:] and said == ["going on behind 5 of 9 images that were answered before"]
    assert (done.images, done.unreadable) == (9, 2) and sorted(os.listdir(tmp_path)) == ["p.csv", "photos"]
    write(classifier, photos, tmp_path / "whole.csv", batch_size=1)
    assert (tmp_path / "p.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_a_part_that_was_cut_short_is_answered_again(classifier, photos, tmp_path, monkeypatch, interrupted):
    third = tmp_path / ".p.csv.partial/0000000002-0000000003.parquet"
    third.write_bytes(third.read_bytes()[:-9])
    interrupted.clear()
    there, usual = [], answers.read_file
    monkeypatch.setattr(answers, "read_file", lambda path: (there.append(os.listdir(third.parent)), usual(path))[1])
    write(classifier, photos, tmp_path / "p.csv", batch_size=2)
    assert interrupted == photos[2:] and [row["path"] for row in read(tmp_path / "p.csv")] == photos
    assert len(there[0]) == 3  # those behind it went with it: the new parts may have other lengths


def replace_the_picture(path):
    path.write_bytes(encode(photo(50), "PNG"))


def replace_it_within_its_size(path):
    data = encode(photo(51, 9, 9), "JPEG")  # what follows its end is not read
    path.write_bytes(data + b"\0" * (path.stat().st_size - len(data)))


@pytest.mark.parametrize("interrupted", [-1.0, 1e9], indirect=True, ids=["part by part", "one part"])
@pytest.mark.parametrize(
    "number, change",
    [
        (1, replace_it_within_its_size),
        (2, Path.unlink),
        (3, replace_the_picture),  # which was empty
        (3, lambda path: path.chmod(0o640)),
        (7, replace_the_picture),  # not answered yet
    ],
)
def test_what_changed_in_between_is_answered_again(
    classifier, photos, tmp_path, monkeypatch, request, interrupted, number, change
):
    interrupted.clear()
    change(Path(photos[number]))
    done, said = write(classifier, photos, tmp_path / "p.csv", batch_size=1)
    first = 5 if number > 4 else 0 if "one part" in request.node.name else number
    name = photos[number].replace("\n", "\\n").replace("\r", "\\r")
    sentence = f"{name} has changed since it was answered: again from there on, or a little before"
    going = f"going on behind {first} of 9 images that were answered before"
    assert said == [sentence] * (number < 5) + [going] * (first > 0)
    assert interrupted == photos[first:]
    write(classifier, photos, tmp_path / "whole.csv", batch_size=1)
    assert (tmp_path / "p.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["p.csv", "photos", "whole.csv"]


def test_with_overwrite_it_begins_anew(classifier, photos, tmp_path, monkeypatch):
    def stop(path):
        raise KeyboardInterrupt

    opened, said, usual = [], [], answers.read_file
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(predictions, "remove", stop)  # behind the last step but one
        write(classifier, photos, tmp_path / "p.csv")
    assert sorted(os.listdir(tmp_path)) == [".p.csv.partial", "p.csv", "photos"]
    monkeypatch.setattr(answers, "read_file", lambda path: (opened.append(path), usual(path))[1])
    assert write(classifier, photos, tmp_path / "p.csv", overwrite=True)[1] == [] and opened == photos
    assert sorted(os.listdir(tmp_path)) == ["p.csv", "photos"]
    asked = {"overwrite": True, "num_workers": 0, "batch_size": 1, "tell": said.append}
    for moved in (f", once {tmp_path}/p.csv is moved away,", ""):
        monkeypatch.setattr(answers, "read_file", lambda path: stop(path) if path == photos[5] else usual(path))
        with pytest.raises(KeyboardInterrupt):
            write_predictions(classifier, photos, tmp_path / "p.csv", **asked)
        how = f"the same command without --overwrite{moved} goes on"
        assert said.pop() == f"5 of 9 images are answered; {how} from there" and not said
        (tmp_path / "p.csv").unlink(missing_ok=True)
    monkeypatch.setattr(answers, "read_file", usual)
    said = write(classifier, photos, tmp_path / "p.csv")[1]
    assert said == ["going on behind 5 of 9 images that were answered before"]


@pytest.mark.parametrize(
    "kind, moment, rows",
    [("csv", "question.json", 0), ("csv", "0000000003", 3), ("parquet", "0000000006", 6), ("parquet", "p.parquet", 9)]
    + [("jsonl", "0000000001", 1), ("jsonl", "p.jsonl", 9)],
)
def test_killed_it_ends_with_the_same_bytes(classifier, photos, tmp_path, monkeypatch, kind, moment, rows):
    class Killed(BaseException):
        pass

    def half(path, mode="w"):
        if killed or path.name.startswith(moment):
            killed.append(path)
            path.with_name(f".{path.name}.effnet_hf-0123abcd.tmp").write_bytes(b"half of it")
            raise Killed
        return usual(path, mode)

    usual, output, killed = predictions.atomic_write, tmp_path / f"p.{kind}", []
    monkeypatch.setattr(predictions, "PART_ROWS", 4)
    write(classifier, photos, tmp_path / f"whole.{kind}", batch_size=1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(predictions, "PART_SECONDS", -1.0)
        patch.setattr(predictions, "atomic_write", half)
        write(classifier, photos, output, batch_size=1)
    going = f"going on behind {rows} of 9 images that were answered before"
    assert write(classifier, photos, output, batch_size=1)[1] == [going] * (rows > 0)
    assert output.read_bytes() == (tmp_path / f"whole.{kind}").read_bytes()
    assert sorted(os.listdir(tmp_path)) == [f"p.{kind}", "photos", f"whole.{kind}"]


@pytest.mark.parametrize("output", [False, True], ids=["console", "file"])
def test_fp32_is_not_tf32(classifier, photos, tmp_path, output):
    allow_tf32(True)
    if output:
        write(classifier, photos[:1], tmp_path / "p.csv")
    else:
        list(classifier([Path(photos[0])]))
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_another_question_is_not_mixed_into_it(classifier, model, photos, tmp_path, interrupted):
    def refused(words, *which, **settings):
        with pytest.raises(UserError, match=rf"holds 5 answers .* something else \({words} differ\)"):
            write(*(which or (classifier, photos)), tmp_path / "p.csv", **settings)

    refused("--top_k", top_k=2)
    refused("--all_scores", all_scores=True)
    refused("the list of images", classifier, photos[1:])
    refused("--test_time_flip", Classifier(str(model), device="cpu", test_time_flip=True), photos)
    other = Classifier(str(model), device="cpu")
    other.network.classifier.bias.data[0] += 1e-6
    refused("--model", other, photos)
    interrupted.clear()
    write(other, photos, tmp_path / "p.csv", overwrite=True, batch_size=1)
    assert interrupted == photos and sorted(os.listdir(tmp_path)) == ["p.csv", "photos"]


def test_it_goes_on_with_the_batches_that_it_would_have_had(classifier, photos, tmp_path, interrupted):
    interrupted.clear()
    write(classifier, photos, tmp_path / "p.csv", batch_size=4)
    assert interrupted == photos[4:] and [row["path"] for row in read(tmp_path / "p.csv")] == photos


def test_a_full_disk_loses_the_last_seconds_only(classifier, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "PART_SECONDS", -1.0)
    usual, names = predictions.atomic_write, []

    def fill(path, mode="w"):
        names.append(path.name)
        if len(names) == 5:
            raise UserError(f"cannot write {path}: No space left on device.")
        return usual(path, mode)

    monkeypatch.setattr(predictions, "atomic_write", fill)
    said = []
    with pytest.raises(UserError, match="No space left"):
        write_predictions(classifier, photos, tmp_path / "p.jsonl", batch_size=1, num_workers=0, tell=said.append)
    assert said == ["3 of 9 images are answered; the same command goes on from there"]
    done, said = write(classifier, photos, tmp_path / "p.jsonl", batch_size=2)
    assert said == ["going on behind 3 of 9 images that were answered before"] and done.images == 9
    assert [row["path"] for row in read(tmp_path / "p.jsonl")] == photos


def test_bad_files_that_are_told_of_late_keep_their_place(classifier, photos, tmp_path, monkeypatch):
    class Late:
        """As `dali-gpu` has it, which tells of a batch without an image together with a later one."""

        def __init__(self, *arguments):
            self.real = usual(*arguments)
            self.close = self.real.close

        def batches(self, requests):
            bad = []
            for batch in self.real.batches(requests):
                bad += batch["bad"]
                if len(batch["index"]):
                    yield {**batch, "bad": []}
            yield {"index": torch.empty(0), "bad": bad}

    usual = answers.evaluation_backend
    write(classifier, photos, tmp_path / "p.csv")
    monkeypatch.setattr(answers, "evaluation_backend", Late)
    write(classifier, photos, tmp_path / "late.csv", batch_size=1)
    assert [(row["path"], row["label"], row["error"]) for row in read(tmp_path / "late.csv")] == [
        (row["path"], row["label"], row["error"]) for row in read(tmp_path / "p.csv")
    ]


def test_progress_is_said_where_there_is_no_terminal(classifier, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "LINE_SECONDS", 0.0)
    _, said = write(classifier, photos, tmp_path / "p.csv")
    assert (
        len(said) == 9 and said[0].startswith("1 of 9 images, ") and " images/s, " in said[0] and said[0][-4:] == "left"
    )


def test_many_parts_become_one_file(classifier, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "PART_ROWS", 4)
    write(classifier, photos, tmp_path / "p.parquet")
    file = pq.ParquetFile(tmp_path / "p.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [4, 4, 1]
    assert file.read()["path"].to_pylist() == photos


def test_the_command_and_its_exit_codes(classify, photos, tmp_path):
    folder, output = Path(photos[0]).parent, tmp_path / "p.csv"
    flags = ["--output", output, "--num_workers", "0", "--top_k", "1"]
    code, out, err = classify(folder, *flags)
    assert (code, out) == (0, "") and "predictions: " in err
    assert "9 images, 2 of them unreadable, see column error (the first: " in err and err.count("\n") == 1
    code, _, err = classify(folder, *flags)
    assert code == 2 and "p.csv already exists; name another file, or allow it with --overwrite." in err
    assert classify(folder, *flags, "--overwrite")[0] == 0
    code, _, err = classify(folder / "empty.jpg", *flags, "--overwrite")
    assert code == 2 and "none of the images can be read" in err and len(read(output)) == 1


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--output", "p.txt"], "end its name in .csv, .parquet, .jsonl"),
        (["--output", "."], "end its name in"),
        (["--output", "p.csv", "--json"], "--json is for the console"),
        (["--output", "p.csv", "--save_plot", "x.png"], "--save_plot is for the console"),
        (["--output", "link.csv", "--overwrite"], "link.csv is one of the images"),
        (["--output", "p.csv", "--loader", "dali-gpu"], "dali-gpu"),
        (["--all_scores"], "--all_scores needs --output"),
        (["--num_workers", "0"], "--num_workers needs --output"),
        (["--overwrite"], "--overwrite needs --output"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_read(
    classify, photos, tmp_path, monkeypatch, words, sentence
):
    monkeypatch.chdir(tmp_path)
    os.symlink(photos[0], "link.csv")
    code, out, err = classify(photos[0], *words)
    assert (code, out) == (2, "") and sentence in err and err.count("\n") == 1
    assert sorted(os.listdir()) in (["link.csv", "photos"], [".p.csv.partial", "link.csv", "photos"])


def test_a_file_that_is_being_written_is_refused(classifier, photos, tmp_path):
    with held(lock_beside(tmp_path / "p.csv"), "p.csv"), pytest.raises(UserError, match="in use by another process"):
        write(classifier, photos, tmp_path / "p.csv")
    assert not (tmp_path / "p.csv").exists()


def test_a_folder_of_others_is_left_alone(classifier, photos, tmp_path):
    (tmp_path / ".p.csv.partial").mkdir()
    (tmp_path / ".p.csv.partial/mine").touch()
    with pytest.raises(UserError, match="none of ours"):
        write(classifier, photos, tmp_path / "p.csv", overwrite=True)
    shutil.rmtree(tmp_path / ".p.csv.partial")
    assert write(classifier, photos, tmp_path / "p.csv")[0].images == 9
