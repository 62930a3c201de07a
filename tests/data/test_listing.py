import io
import os
import shutil
import time
import unicodedata

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from effnet_hf.data import DataListing, DataSource
from effnet_hf.data.listing import SCHEMA, rows
from effnet_hf.data.named_dataset import open_named
from effnet_hf.errors import UserError

from .test_named_dataset import write_parquet
from .torture import encode, photo


SPLITS, WORDS = ("train", "val"), ("e", "f", "\u00e9", "\u00e9a", "z", "\u1e69")


def listing(root, **options) -> DataListing:
    return DataSource.from_folder(str(root), **options).listing()


def names(found: DataListing, split: str) -> list[str]:
    return [row["name"] for row in found.table.to_pylist() if row["split"] == split]


@pytest.fixture
def data(pictures, tmp_path):
    return shutil.copytree(pictures, tmp_path / "data")


def test_a_folder_is_described_by_name_label_and_size(data):
    found = listing(data)
    assert found.class_names == ["bird", "cat", "dog"] and found.table.schema == SCHEMA
    assert len(names(found, "train")) == 60 and len(names(found, "val")) == 21
    first = found.table.to_pylist()[0]
    size = (data / "train/bird/00.jpg").stat().st_size
    assert first == {"split": "train", "name": "train/bird/00.jpg", "label": 0, "size": size}
    part = listing(data / "train", val_fraction=0.25)
    assert names(part, "val")[0].startswith("bird/") and len(part.table) == 60
    assert names(listing(data, train=False), "train") == []


def test_it_survives_a_file_to_the_last_word(data, tmp_path):
    before = listing(data)
    before.write(tmp_path / "data.parquet")
    again = DataListing.read(tmp_path / "data.parquet")
    assert again == before and again.difference(before) is None and again.class_difference(before) is None


def test_moving_the_whole_folder_is_no_change(data, tmp_path):
    before = listing(data)
    data.rename(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for place in (tmp_path / "elsewhere", tmp_path / "link"):
        assert before.difference(listing(place)) is None and before.class_difference(listing(place)) is None


def replace(data):
    (data / "train/cat/05.jpg").write_bytes(b"x" * 480)


def both(data):
    (data / "train/cat/05.jpg").unlink()
    (data / "train/cat/055.jpg").write_bytes(b"x" * 9)


CHANGES = {
    "renamed": (
        lambda d: (d / "train/cat/05.jpg").rename(d / "train/cat/x.jpg"),
        "train/cat/05.jpg is gone (and 1 more)",
    ),
    "removed": (lambda d: (d / "train/cat/05.jpg").unlink(), "train/cat/05.jpg is gone"),
    "added": (lambda d: (d / "val/cat/05b.jpg").write_bytes(b"x"), "val/cat/05b.jpg is new"),
    "overwritten in place": (replace, "train/cat/05.jpg has 480 bytes, had "),
    "moved": (
        lambda d: (d / "train/dog/05.jpg").rename(d / "train/cat/05b.jpg"),
        "train/cat/05b.jpg is new (and 1 more)",
    ),
    "moved under its name": (
        lambda d: ((d / "train/dog/05.jpg").rename(d / "train/dog/own.jpg"), None)[1],
        "train/dog/05.jpg is gone (and 1 more)",
    ),
    "added and removed": (both, "train/cat/05.jpg is gone (and 1 more)"),
    "validation replaced": (lambda d: (d / "val/dog/02.jpg").write_bytes(b""), "val/dog/02.jpg has 0 bytes, had "),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_named_by_the_first_difference(data, change):
    before = listing(data)
    make, expected = CHANGES[change]
    make(data)
    now = listing(data)
    assert before.class_difference(now) is None and before.difference(now).startswith(expected)
    assert now.difference(before) is not None


def test_an_image_that_changed_class_is_named_with_the_class_it_was_in(data):
    (data / "train/dog/only.jpg").write_bytes(b"1234567")
    before = listing(data)
    (data / "train/dog/only.jpg").rename(data / "train/cat/only.jpg")
    now = listing(data)
    assert before.difference(now) == "train/cat/only.jpg was in class dog (and 1 more)"
    assert now.difference(before) == "train/dog/only.jpg was in class cat (and 1 more)"


def test_classes_that_change_are_told_apart(data):
    before = listing(data)
    for split in ("train", "val"):
        (data / split / "dog").rename(data / split / "apple")
    now = listing(data)
    assert before.class_difference(now) == "class dog is called apple now"
    assert now.class_difference(before) == "class apple is called dog now"
    names = DataListing(["Bird", "Cat", "Dog"], before.table)
    assert before.class_difference(names) == "class bird is called Bird now (and 2 more)"
    other = DataListing(["bird", "dog", "cat"], before.table)
    assert before.class_difference(other) == "the classes have another order: number 1 was cat, is dog now"
    for split in ("train", "val"):
        shutil.rmtree(data / split / "apple")
    fewer = listing(data)
    assert before.class_difference(fewer) == "class dog is gone"
    assert fewer.class_difference(before) == "class dog is new"
    assert fewer.class_difference(now) == "class apple is new"
    other = DataListing(["bird", "cat", "wolf"], before.table.slice(0, 1))
    assert before.class_difference(other) == "class dog is gone (and 1 more)"


def test_a_name_in_another_form_of_unicode_is_the_same_file(tmp_path):
    for form in ("NFD", "NFC"):
        for i, name in enumerate(f"{split}/{label}/{base}.jpg" for split in SPLITS for label in "ab" for base in WORDS):
            path = tmp_path / form / unicodedata.normalize(form, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x" * (i + 1))
    before, now = listing(tmp_path / "NFD"), listing(tmp_path / "NFC")
    assert before.table != now.table and before.difference(now) is None and now.difference(before) is None
    (tmp_path / "NFC/val/b/\u00e9.jpg").write_bytes(b"")
    assert before.difference(listing(tmp_path / "NFC")).startswith("val/b/\u00e9.jpg has 0 bytes, had ")


def test_rows_of_a_data_set_are_described_without_reading_them(tmp_path):
    before = open_named(write_parquet(tmp_path / "set")).listing()
    assert names(before, "train")[:2] == ["row 0 0.jpg", "row 1 1.jpg"] and len(names(before, "val")) == 11
    size = len(encode(photo(0, 50, 40), "JPEG"))
    assert before.table.slice(0, 1).to_pylist()[0] == {
        "split": "train",
        "name": "row 0 0.jpg",
        "label": 0,
        "size": size,
    }
    held_out = open_named(write_parquet(tmp_path / "bare", card=None, validation=False), val_fraction=0.25).listing()
    assert len(names(held_out, "val")) == 9 and held_out.table.column("size").to_pylist().count(-1) == 0


def test_a_row_without_bytes_or_path_has_no_size(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    (tmp_path / "there.jpg").write_bytes(b"12345")
    images = [None, {"bytes": b"123", "path": None}, {"bytes": None, "path": str(tmp_path / "there.jpg")}, None]
    table = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 0, 1]}, features=features)
    for split in ("train", "validation"):
        table.to_parquet(tmp_path / f"{split}.parquet")
    found = open_named(str(tmp_path)).listing().table.slice(0, 4).to_pydict()
    assert found["size"] == [-1, 3, 5, -1] or found["size"] == [-1, 3, -1, -1]  # datasets may embed a local file
    assert [name.partition(" ")[0] for name in found["name"]] == ["row"] * 4


def test_a_stream_is_described_by_its_files(tmp_path):
    root = write_parquet(tmp_path / "set")
    before = open_named(root, streaming=True).listing()
    assert names(before, "val") == ["data/validation-00000-of-00001.parquet", "all images of validation"]
    assert before.table.column("size").to_pylist()[-1] == 11
    assert before.difference(open_named(root, streaming=True).listing()) is None
    shutil.copy(
        tmp_path / "set/data/validation-00000-of-00001.parquet", tmp_path / "set/data/train-00001-of-00003.parquet"
    )
    assert "train-00001-of-00003.parquet has " in before.difference(open_named(root, streaming=True).listing())


def test_loaders_have_it_too(loaders, data):
    ours = loaders({"data_dir": str(data)})
    assert ours.listing() == listing(data)
    made = loaders({"data_dir": None, "loader": "synthetic", "num_labels": 7}).listing()
    assert made.table.to_pylist()[1] == {"split": "val", "name": "synthetic images", "label": -1, "size": 50_000}


def parquet(table: pa.Table, metadata=None) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda good: b"", "cannot be read"),
        (lambda good: b"PAR1 nonsense PAR1", "cannot be read"),
        (lambda good: good[: len(good) // 2], "cannot be read"),
        (lambda good: parquet(SCHEMA.empty_table()), "is no list of a run's data"),
        (lambda good: parquet(SCHEMA.empty_table(), {"class_names": "[1]"}), "its class names are no words"),
        (lambda good: parquet(SCHEMA.empty_table(), {"class_names": "[" * 100_000}), "cannot be read"),
        (lambda good: parquet(SCHEMA.empty_table(), {"class_names": '["a", "a"]'}), "a class name stands twice"),
        (lambda good: parquet(pa.table({"name": ["x"]}), {"class_names": "[]"}), "is no list of a run's data"),
        (
            lambda good: parquet(pa.table([["val"], ["x"], [3], [1]], schema=SCHEMA), {"class_names": '["a"]'}),
            "it has a label without a class",
        ),
        (
            lambda good: parquet(pa.table([["val"], [None], [0], [1]], schema=SCHEMA), {"class_names": '["a"]'}),
            "its columns are others",
        ),
    ],
)
def test_a_damaged_list_is_one_sentence(data, tmp_path, spoil, words):
    path = tmp_path / "data.parquet"
    listing(data).write(path)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError, match=words) as raised:
        DataListing.read(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(UserError, match="No such file or directory"):
        DataListing.read(tmp_path / "nothing")


def test_a_list_of_too_many_rows_is_not_read(data, tmp_path, monkeypatch):
    """Repeated rows compress to nothing: 4 MB were 10 GB in memory."""
    monkeypatch.setattr("effnet_hf.data.listing._MOST_ROWS", 2)
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *_: pytest.fail("read"))
    listing(data).write(tmp_path / "data.parquet")
    with pytest.raises(UserError, match="cannot be read: it has .* rows"):
        DataListing.read(tmp_path / "data.parquet")


def test_the_size_of_every_file_is_asked_for_at_every_start(data):
    """A file overwritten in place changes the time of no folder: the remembered list of names says nothing of it."""
    for folder, _, _ in os.walk(data):
        os.utime(folder, (time.time() - 100,) * 2)
    before = listing(data)  # and remembers the names
    time.sleep(0.01)
    with open(data / "train/bird/00.jpg", "r+b") as file:
        file.truncate(100)
    assert before.difference(listing(data)).startswith("train/bird/00.jpg has 100 bytes, had ")


def test_several_labels_are_compared_whatever_number_a_set_has(tmp_path):
    def described(sets, labels, names="abc"):
        table = rows("train", [f"{i}.png" for i in range(len(labels))], np.array(labels), np.full(len(labels), 9))
        return DataListing(list(names), table, None if sets is None else np.array(sets, np.uint8))

    before = described([[1, 0, 1], [0, 0, 0], [0, 1, 0]], [0, 1, 2, 0])
    before.write(tmp_path / "data.parquet")
    again = DataListing.read(tmp_path / "data.parquet")
    assert again.label_sets.tolist() == before.label_sets.tolist() and again.difference(before) is None
    assert again.difference(described([[0, 1, 0], [1, 0, 1], [0, 0, 0]], [1, 2, 0, 1])) is None
    assert again.difference(described([[0, 1, 0], [1, 0, 1]], [0, 0, 0, 1])) == "0.png was a, c (and 1 more)"
    assert again.difference(described([[0, 1, 0], [1, 0, 1]], [1, 0, 0, 1])) == "1.png had no label"
    assert again.class_difference(described(None, [0, 1, 2, 0])) == "an image had several, has one label now"
    assert described(None, [0, 1, 2, 0]).class_difference(again) == "an image had one label, has several now"
    assert again.class_difference(described(before.label_sets, [0, 1, 2, 0], "abx")) == "class c is called x now"


@pytest.mark.parametrize("sets", [b"[[3]]", b"[[-1]]", b"[[true]]", b"[0]", b"{}", b"[[0]"])
def test_damaged_label_sets_are_one_sentence(sets, tmp_path):
    DataListing(["a", "b", "c"], rows("train", ["0.png"], np.array([0]), np.array([9]))).write(
        tmp_path / "data.parquet"
    )
    table = pq.read_table(tmp_path / "data.parquet")
    pq.write_table(
        table.replace_schema_metadata({**table.schema.metadata, b"label_sets": sets}), tmp_path / "bad.parquet"
    )
    with pytest.raises(UserError, match="cannot be read"):
        DataListing.read(tmp_path / "bad.parquet")
