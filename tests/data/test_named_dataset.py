import io
import os
import pickle
import shutil
import tarfile

import datasets
import numpy as np
import pytest
import torch

from effnet_hf.data import BatchPlan, named_dataset
from effnet_hf.data.labels import Columns
from effnet_hf.data.named_dataset import open_named
from effnet_hf.data.opening import open_data
from effnet_hf.errors import UserError
from effnet_hf.recipes import Recipe

from .torture import encode, photo


CARD = """---
dataset_info:
  features:
  - name: image
    dtype: image
  - name: label
    dtype:
      class_label:
        names:
          '0': bird
          '1': cat
          '2': dog
  splits:
  - name: train
    num_examples: 36
    num_bytes: 1
  - name: validation
    num_examples: 11
    num_bytes: 1
---
"""
LABELS = datasets.ClassLabel(names=["bird", "cat", "dog"])


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def rows(start, count):
    for i in range(start, start + count):
        yield {"image": {"bytes": encode(photo(i, 50, 40), "JPEG"), "path": f"{i}.jpg"}, "label": i % 3}


def write_parquet(root, card=CARD, label=LABELS, validation=True, files=3):
    (root / "data").mkdir(parents=True)
    features = datasets.Features({"image": datasets.Image(), "label": label})
    for i in range(files):
        part = datasets.Dataset.from_list(list(rows(12 * i, 36 // files)), features=features)
        part.to_parquet(root / "data" / f"train-{i:05}-of-{files:05}.parquet")
    if validation:
        part = datasets.Dataset.from_list(list(rows(100, 11)), features=features)
        part.to_parquet(root / "data" / "validation-00000-of-00001.parquet")
    if card:
        (root / "README.md").write_text(card)
    return str(root)


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("named"))


def test_it_trains_from_a_data_set_by_name(loaders, name):
    ours = loaders({"data_dir": None, "dataset_name": name})
    assert ours.class_names == ["bird", "cat", "dog"]
    seen = [(i, label) for b in ours.train.epoch(0) for i, label in zip(b["index"].tolist(), b["labels"].tolist())]
    assert sorted(i for i, _ in seen) == list(range(36)) and all(label == i % 3 for i, label in seen)
    assert sorted(i for b in ours.val.epoch() for i in b["index"].tolist()) == list(range(11))


def test_val_fraction_splits_what_has_no_validation(tmp_path):
    source = open_named(write_parquet(tmp_path / "set", card=None, validation=False), val_fraction=0.25)
    assert np.bincount(source.train.labels).tolist() == [9, 9, 9]
    assert np.bincount(source.val.labels).tolist() == [3, 3, 3]


@pytest.mark.parametrize("kind", ["int64", "string"])
def test_labels_may_be_numbers_or_words(tmp_path, kind):
    root = write_parquet(tmp_path / "set", card=None, label=datasets.Value(kind), validation=False)
    source = open_named(root, val_fraction=0.25)
    assert source.class_names == ["0", "1", "2"] and sorted(set(source.train.labels)) == [0, 1, 2]


def test_problems_are_one_sentence_each(tmp_path, name, monkeypatch):
    with pytest.raises(UserError, match=r"--dataset_name nobody/nothing cannot be loaded: [^\n]*$"):
        open_named("nobody/nothing")
    with pytest.raises(UserError, match="--dataset_name .*cannot be loaded: .*'other' not found"):
        open_named(name, "other")
    bare = write_parquet(tmp_path / "bare", card=None, validation=False)
    with pytest.raises(UserError, match=r"has none of val, valid, .*--val_fraction 0.1"):
        open_named(bare)
    unknown_size = write_parquet(tmp_path / "unknown", card=None)
    assert len(open_named(unknown_size, streaming=True).train) == 36  # Parquet says it
    describe = named_dataset._describe
    monkeypatch.setattr(named_dataset, "_describe", lambda file: (describe(file)[0], None))  # as of other files
    with pytest.raises(UserError, match="does not say how many images its split train has"):
        open_named(unknown_size, streaming=True)
    with pytest.raises(UserError, match="does not know: bird, cat; it knows 2, e.g. dog, fish"):
        open_named(name, class_names=["dog", "fish"])


def write_table(root, images, labels, label, card=None):
    features = datasets.Features({"image": datasets.Image(), "label": label})
    table = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    (root / "data").mkdir(parents=True)
    for split in ("train", "validation"):
        table.to_parquet(root / f"data/{split}.parquet")
    if card:
        counted = card.replace("num_examples: 36", f"num_examples: {len(labels)}")
        (root / "README.md").write_text(counted.replace("num_examples: 11", f"num_examples: {len(labels)}"))
    return str(root)


IMAGE = {"bytes": encode(photo(1, 30, 30), "JPEG"), "path": None}


def labels_of(source, split="train"):
    """The classes of a split's images, or the sets of them."""
    numbers, names = getattr(source, split).labels, source.class_names
    if source.label_sets is None:
        return [names[number] for number in numbers]
    return [[name for name, has in zip(names, source.label_sets[number]) if has] for number in numbers]


MULTI, SINGLE = "multi_label_classification", "single_label_classification"
INTEGERS, WORDS, FLOATS = (datasets.Value(kind) for kind in ("int64", "string", "float64"))


@pytest.mark.parametrize(
    "labels, kind, options, read",
    [
        ([0, None, 1], LABELS, {}, ["bird", "cat"]),
        ([0, -1, 1], LABELS, {}, ["bird", "cat"]),
        ([5, None, -1, 6], INTEGERS, {}, ["5", "6"]),
        (["a", None, "", " ", "b"], WORDS, {}, ["a", "b"]),
        (["nan", "None", "NA"], WORDS, {}, ["nan", "None", "NA"]),
        (["1", "2", "-1"], WORDS, {}, ["1", "2"]),
        ([1.0, 2.0, None, float("nan")], FLOATS, {}, ["1", "2"]),
        ([True, None, False], datasets.Value("bool"), {}, ["true", "false"]),
        ([0, 1, 1], LABELS, {"problem_type": MULTI}, [["bird"], ["cat"], ["cat"]]),
        ([[0, 2], [], None, [1]], datasets.List(LABELS), {}, [["bird", "dog"], [], ["cat"]]),
        ([[0, 2], [-1], [1]], datasets.List(LABELS), {}, [["bird", "dog"], ["cat"]]),
        ([["b", "a"], ["b"]], datasets.List(WORDS), {}, [["a", "b"], ["b"]]),
        ([[7], [10, 7]], datasets.List(INTEGERS), {}, [["7"], ["10", "7"]]),
        ([["b"], ["a"]], datasets.List(WORDS), {"problem_type": SINGLE}, ["b", "a"]),
        (["a, b", "b"], WORDS, {"label_separator": ","}, [["a", "b"], ["b"]]),
        (["a|b", "c", "d"], WORDS, {}, ["a|b", "c", "d"]),  # no class of its parts, and only one
    ],
)
def test_what_a_column_of_labels_says(tmp_path, labels, kind, options, read):
    root = write_table(tmp_path / "set", [IMAGE] * len(labels), labels, kind)
    source = open_named(root, columns=Columns(**options))
    assert labels_of(source) == labels_of(source, "val") == read
    left_out = [note for note in source.notes if f"of {len(labels)} images of split train" in note]
    assert len(left_out) == (len(read) < len(labels))


@pytest.mark.parametrize(
    "labels, kind, options, words",
    [
        ([None, None], LABELS, {}, "split train of .* has no labels: .* for all of its 2 images"),
        ([-1, -1], LABELS, {}, "split train of .* has no labels"),
        ([float("nan")] * 2, FLOATS, {}, "split train of .* has no labels"),
        (["", None], WORDS, {}, "split train of .* has no labels"),
        ([0.5, 1.5, 2.5], datasets.Value("float32"), {}, "the column label of .* holds float, no classes"),
        ([b"a", b"b", b"c"], datasets.Value("binary"), {}, "holds binary, no classes"),
        ([[0, 1, 0], [1, 0, 0]], datasets.List(INTEGERS), {}, "a list in which 0 stands twice; .* no row of 0 and 1"),
        ([["a", "b"], ["a"]], datasets.List(WORDS), {"problem_type": SINGLE}, "has lists of none or several labels"),
        ([["a"]], datasets.List(WORDS), {"label_separator": ";"}, "--label_separator: .* holds lists"),
        (["a|b", "b|c"], WORDS, {}, r"holds 'a\|b': .*--label_separator '\|'; .*--problem_type single"),
        (["a;b", "b", "a", "c"], WORDS, {}, "--label_separator ';'"),
        ([-3, 1], INTEGERS, {}, "has the label -3; whole numbers count classes from 0, and -1 is none"),
    ],
)
def test_labels_that_are_none_are_one_sentence(tmp_path, labels, kind, options, words):
    with pytest.raises(UserError, match=words):
        open_named(write_table(tmp_path / "set", [IMAGE] * len(labels), labels, kind), columns=Columns(**options))


def described(*names):
    return datasets.ClassLabel(names=list(names))


def write_split(path, labels, label):
    """A Parquet file of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), "label": label})
    columns = {"image": [IMAGE] * len(labels), "label": labels}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)


SIZES = """---
dataset_info:
  splits:
  - {name: train, num_examples: 3}
  - {name: validation, num_examples: 3}
---
"""


def read_by(root, streaming, split="train", **options):
    """The classes of a split's images, in its order."""
    source = open_named(str(root), streaming=streaming, **options)
    images = getattr(source, split)
    numbers = [number for _, number in images.read(0, 1)] if streaming else images.labels
    return [source.class_names[number] for number in numbers], source.notes


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_that_is_overwritten_under_its_time_is_read_anew(tmp_path, streaming):
    (tmp_path / "README.md").write_text(SIZES)
    for split in ("train", "validation"):
        write_split(tmp_path / f"{split}.parquet", [0, 1, 0], described("cat", "dog"))
    for streamed in (False, streaming):  # the copy of the first would give its names to the second
        assert read_by(tmp_path, streamed)[0] == ["cat", "dog", "cat"]
    for split in ("train", "validation"):
        before = os.stat(tmp_path / f"{split}.parquet")
        write_split(tmp_path / f"{split}.parquet", [1, 0, 1], described("owl", "dog"))
        os.utime(tmp_path / f"{split}.parquet", ns=(before.st_atime_ns, before.st_mtime_ns))
    for split in ("train", "val"):
        assert read_by(tmp_path, streaming, split)[0] == ["dog", "owl", "dog"]


def test_shards_that_are_overwritten_under_their_time_are_read_anew(tmp_path):
    root = tmp_path / "shards"
    assert labels_of(open_named(write_shards(root, {"cls": b"1"}, {"cls": b"2"}))) == ["1", "2"]
    before = {path: os.stat(path) for path in root.iterdir()}
    shutil.move(root, tmp_path / "old")
    write_shards(root, {"cls": b"2"}, {"cls": b"3"})
    for path, found in before.items():
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
        assert os.path.getsize(path) == found.st_size
    assert labels_of(open_named(str(root))) == ["2", "3"]


def test_an_unchanged_folder_is_copied_once_and_old_copies_go(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "set"

    def copies():
        open_named(str(root), train=False)
        return {path.parent for path in (tmp_path / "cache" / "effnet_hf").glob("*/*/rows")}

    write_split(root / "validation.parquet", [0, 1], described("cat", "dog"))
    (first,) = copies()
    written = (first / "rows" / "dataset_info.json").stat().st_mtime_ns
    assert copies() == {first} and (first / "rows" / "dataset_info.json").stat().st_mtime_ns == written
    write_split(root / "validation.parquet", [0, 1, 1], described("cat", "dog"))
    (second,) = copies() - {first}  # a run may still read the first
    os.utime(first, (0, 0))
    assert copies() == {second}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "files, card, read",
    [
        ({"train": "bird cat dog", "validation": "dog cat bird"}, SIZES, ["dog", "cat", "bird"]),
        ({"train": "dog cat bird", "validation": "dog cat bird"}, CARD, ["dog", "cat", "bird"]),
        ({"train": "bird cat dog", "validation": "cat dog"}, SIZES, ["cat", "dog"]),
    ],
)
def test_the_names_of_labels_are_those_of_the_file_that_has_them(tmp_path, files, card, read, streaming):
    counts = {split: len(names.split()) for split, names in files.items()}
    counted = card.replace("36", str(counts["train"])).replace("11", str(counts["validation"]))
    (tmp_path / "README.md").write_text(counted.replace("num_examples: 3}\n---", f"num_examples: {len(read)}}}\n---"))
    for split, names in files.items():
        write_split(tmp_path / f"{split}.parquet", list(range(counts[split])), described(*names.split()))
    found, notes = read_by(tmp_path, streaming, "val")
    assert found == read and read_by(tmp_path, streaming)[0] == files["train"].split()
    said = [note for note in notes if "split validation" in note and f"its own files, {', '.join(read)};" in note]
    assert len(said) == 1


def test_lists_saved_folders_and_arrow_files_have_names_of_their_own_too(tmp_path):
    for split, names in (("train", "ab"), ("validation", "ba")):
        write_split(tmp_path / "lists" / f"{split}.parquet", [[0], [0, 1]], datasets.List(described(*names)))
    assert labels_of(open_named(str(tmp_path / "lists")), "val") == [["b"], ["a", "b"]]
    splits = datasets.DatasetDict()
    for split, names in (("train", "ab"), ("validation", "ba")):
        features = datasets.Features({"image": datasets.Image(), "label": described(*names)})
        splits[split] = datasets.Dataset.from_dict({"image": [IMAGE] * 2, "label": [0, 1]}, features=features)
    splits.save_to_disk(tmp_path / "saved")
    assert labels_of(open_named(str(tmp_path / "saved")), "val") == ["b", "a"]
    (tmp_path / "saved" / "dataset_dict.json").unlink()
    for path in tmp_path.glob("saved/*/*.json"):
        path.unlink()
    assert labels_of(open_data(Recipe(data_dir=str(tmp_path / "saved"))), "val") == ["b", "a"]


@pytest.mark.parametrize(
    "files, card, words",
    [
        ({"train": described(*"012")}, CARD, "has the labels 0, 1, 2, README.md or .* has bird, cat, dog;"),
        ({"train": WORDS, "validation": described(*"ab")}, None, r"the labels a, b, README.md .* Value\('string'\)"),
        ({"train-0": described(*"ab"), "train-1": described(*"ba")}, None, "files train-0.parquet and train-1.parquet"),
    ],
)  # fmt: skip
def test_names_of_labels_that_contradict_each_other_are_refused(tmp_path, files, card, words):
    for name, label in {"validation": LABELS, **files}.items():
        write_split(tmp_path / f"{name}.parquet", ["0", "1"] if label is WORDS else [0, 1], label)
    if card:
        (tmp_path / "README.md").write_text(card.replace("36", "2").replace("11", "2"))
    with pytest.raises(UserError, match=words):
        open_named(str(tmp_path))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_class_without_images_need_not_be_known(tmp_path, streaming):
    (tmp_path / "README.md").write_text(SIZES)
    for split in ("train", "validation"):
        write_split(tmp_path / f"{split}.parquet", [2, 0, 2], described("cat", "eleven", "dog"))
    options = {"train": False, "class_names": ["dog", "cat", "owl"]}
    assert read_by(tmp_path, streaming, "val", **options)[0] == ["dog", "cat", "dog"]
    write_split(tmp_path / "validation.parquet", [2, 1, 2], described("cat", "eleven", "dog"))
    with pytest.raises(UserError, match="class eleven, which is not known" if streaming else "not know: eleven"):
        read_by(tmp_path, streaming, "val", **options)


@pytest.mark.parametrize("file", ["default/train-0.parquet", "default/train/0.parquet", "a/b/train-0.parquet"])
def test_a_clone_of_a_data_set_is_read_below_its_configurations(tmp_path, file):
    write_split(tmp_path / file, [0, 1, 0], described("cat", "dog"))
    write_split(tmp_path / file.replace("train", "validation"), [1, 0, 0], described("cat", "dog"))
    source = open_data(Recipe(data_dir=str(tmp_path)))
    assert labels_of(source) == ["cat", "dog", "cat"] and labels_of(source, "val") == ["dog", "cat", "cat"]


def test_files_beside_what_could_be_classes_are_named(tmp_path):
    write_split(tmp_path / "default" / "train-0.parquet", [0, 1, 0], described("cat", "dog"))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.jpg").write_bytes(IMAGE["bytes"])
    with pytest.raises(UserError, match=r"\. The Parquet or .tar files in it are read with --dataset_name "):
        open_data(Recipe(data_dir=str(tmp_path), val_fraction=0.5))


def write_columns(root, **columns):
    """A data set of three images; columns with a feature each."""
    features = {name: feature for name, (feature, _) in columns.items()}
    table = datasets.Dataset.from_dict({n: v for n, (_, v) in columns.items()}, features=datasets.Features(features))
    root.mkdir()
    for split in ("train", "validation"):
        table.to_parquet(root / f"{split}.parquet")
    return str(root)


PICTURES = datasets.Image(), [IMAGE] * 3
SCENES = datasets.ClassLabel(names=["indoor", "outdoor"]), [1, 0, 1]
ANIMALS = LABELS, [0, 1, 2]


@pytest.mark.parametrize(
    "columns, options, read, note",
    [
        ({"scene": SCENES, "label": ANIMALS}, {}, ["bird", "cat", "dog"], "the labels are the column label of"),
        ({"scene": SCENES, "labels": ANIMALS}, {}, ["bird", "cat", "dog"], "--label_column can name another: scene"),
        ({"scene": SCENES, "label": ANIMALS}, {"label_column": ("scene",)}, ["outdoor", "indoor", "outdoor"], None),
        ({"scene": SCENES, "label": (WORDS, list("xyz"))}, {}, list("xyz"), "the labels are the column label of"),
        ({"animal": ANIMALS, "text": (WORDS, list("xyz"))}, {}, ["bird", "cat", "dog"], None),
        ({"a": ({"b": WORDS}, [{"b": k} for k in "xyz"])}, {"label_column": ("a.b",)}, list("xyz"), None),
        (
            {"cat": (INTEGERS, [1, 0, 1]), "dog": (FLOATS, [0.0, 1.0, 1.0])},
            {"label_column": ("cat", "dog")},
            [["cat"], ["dog"], ["cat", "dog"]],
            None,
        ),
    ],
)  # fmt: skip
def test_the_column_of_labels_is_chosen_and_said(tmp_path, columns, options, read, note):
    source = open_named(write_columns(tmp_path / "set", image=PICTURES, **columns), columns=Columns(**options))
    assert labels_of(source) == read
    assert note in source.notes[0] if note else not source.notes


@pytest.mark.parametrize(
    "columns, options, words",
    [
        ({"scene": SCENES, "animal": ANIMALS}, {}, "columns of labels, scene, animal; say which with --label_column"),
        ({"scene": SCENES}, {"label_column": ("scen",)}, "--label_column scen is no column of .* Did you mean 'scene'"),
        ({"text": (WORDS, list("xyz"))}, {}, "no column of labels; name one with --label_column. Its columns: .*text"),
        ({"label": ANIMALS}, {"image_column": "label"}, "--image_column label holds no images"),
        ({"label": ANIMALS}, {"image_column": "imge"}, "--image_column imge is no column of .* Did you mean 'image'"),
    ],
)  # fmt: skip
def test_columns_that_could_be_two_are_refused(tmp_path, columns, options, words):
    with pytest.raises(UserError, match=words):
        open_named(write_columns(tmp_path / "set", image=PICTURES, **columns), columns=Columns(**options))


def test_the_column_of_images_is_chosen_and_said(tmp_path):
    green = {"bytes": b"green", "path": None}
    both = {"mask": (datasets.Image(), [green] * 3), "image": PICTURES, "label": ANIMALS}
    source = open_named(write_columns(tmp_path / "set", **both))
    assert source.train.read(0) == IMAGE["bytes"] and "--image_column can name another: mask" in source.notes[0]
    named = open_named(str(tmp_path / "set"), columns=Columns(image_column="mask"))
    assert named.train.read(0) == b"green" and not named.notes
    two = {"mask": both["mask"], "photo": PICTURES, "label": ANIMALS}
    with pytest.raises(UserError, match="several columns of images, mask, photo; say which with --image_column"):
        open_named(write_columns(tmp_path / "two", **two))


def test_bytes_and_what_pandas_makes_of_images_are_images(tmp_path):
    struct = {"bytes": datasets.Value("binary"), "path": WORDS}
    root = write_columns(tmp_path / "pandas", image=(struct, [IMAGE] * 3), label=ANIMALS)
    assert open_named(root).train.read(1) == IMAGE["bytes"]
    data = datasets.Value("binary"), [IMAGE["bytes"]] * 3
    source = open_named(write_columns(tmp_path / "bytes", png=data, label=ANIMALS), columns=Columns(image_column="png"))
    assert source.train.read(1) == IMAGE["bytes"]


def write_shards(folder, *members):
    """WebDataset's files: each of `members` is one image's, endings and contents."""
    folder.mkdir()
    for split in ("train", "validation"):
        with tarfile.open(folder / f"{split}-000.tar", "w") as tar:
            for number, files in enumerate(members):
                for ending, data in {"jpg": IMAGE["bytes"], **files}.items():
                    entry = tarfile.TarInfo(f"{number:04}.{ending}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return str(folder)


@pytest.mark.parametrize(
    "members, options, read",
    [
        ([{"cls": b"3"}, {"cls": b"1\n"}, {"cls": b"-1"}], {}, ["3", "1"]),
        ([{"cls": b"cat\n"}, {"cls": b"dog"}], {}, ["cat", "dog"]),
        ([{"json": b'{"label": "cat", "n": 1}'}, {"json": b'{"label": "dog", "n": 0}'}], {}, ["cat", "dog"]),
        ([{"json": b'{"label": "cat", "n": 1}'}, {"json": b'{"label": "dog", "n": 0}'}],
         {"label_column": ("json.n",)}, ["1", "0"]),
        ([{"json": b'{"tags": ["a", "b"]}'}, {"json": b'{"tags": ["b"]}'}], {"label_column": ("json.tags",)},
         [["a", "b"], ["b"]]),
        ([{"txt": b"a"}, {"txt": b"b"}], {"label_column": ("txt",)}, ["a", "b"]),
    ],
)  # fmt: skip
def test_webdataset_shards(tmp_path, members, options, read):
    source = open_named(write_shards(tmp_path / "shards", *members), columns=Columns(**options))
    assert labels_of(source) == read
    assert source.train.read(0) == IMAGE["bytes"] and source.train.name(0) == "0000.jpg"


class Bomb:
    def __reduce__(self):
        return open, ("/nonexistent/exploded", "w")


def test_nothing_in_a_shard_is_unpickled(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(torch, "load", lambda *_, **__: started.append("torch"))
    monkeypatch.setattr(np, "load", lambda *_, **__: started.append("numpy"))
    bomb = pickle.dumps(Bomb())
    files = {ending: bomb for ending in ("pth", "pt", "pyd", "pickle", "pkl", "npy", "npz", "ten", "mp", "cbor")}
    source = open_named(write_shards(tmp_path / "shards", {"cls": b"0", **files}, {"cls": b"1", **files}))
    assert labels_of(source) == ["0", "1"] and not started


@pytest.mark.parametrize("streaming", [False, True])
def test_a_null_image_is_a_bad_file(tmp_path, loaders, streaming):
    root = write_table(tmp_path / "set", [IMAGE, None, *[IMAGE] * 4], [0, 1, 2, 0, 1, 2], LABELS, CARD)
    options = {"data_dir": None, "dataset_name": root, "streaming": streaming, "max_bad_files": 1}
    ours = loaders(options, plan=BatchPlan(2))
    assert [len(batch["index"]) for batch in ours.train.epoch(0)] == [2, 2, 2]
    assert sum(len(batch["index"]) for batch in ours.val.epoch()) == 5
    (name,) = ours.val.bad_files.names
    assert name == ("image 1 of the stream" if streaming else "row 1")


def test_an_error_without_words_is_named(monkeypatch):
    def fail(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    with pytest.raises(UserError, match="--dataset_name x/y cannot be loaded: NotImplementedError"):
        open_named("x/y")


def test_columns_that_are_missing_are_named(tmp_path):
    (tmp_path / "words").mkdir()
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    for split in ("train", "validation"):
        table.to_parquet(tmp_path / "words" / f"{split}.parquet")
    with pytest.raises(
        UserError, match="has no column of images; name one with --image_column. Its columns: text, label"
    ):
        open_named(str(tmp_path / "words"))
