"""Lists of images and labels, as a specification: what stands in the file, and what is read."""

import json
import re

import datasets
import numpy as np
import pytest

from effnet_hf.data import BatchPlan
from effnet_hf.data.opening import open_data
from effnet_hf.errors import UserError
from effnet_hf.recipes import Recipe

from .torture import encode, photo


MULTI, SINGLE = "multi_label_classification", "single_label_classification"
IMAGES = [f"{number}.jpg" for number in range(1, 9)]


@pytest.fixture
def folder(tmp_path):
    for name in IMAGES:
        (tmp_path / "pictures").mkdir(exist_ok=True)
        (tmp_path / "pictures" / name).write_bytes(b"image")
    return tmp_path


def opened(folder, text, train=False, class_names=None, encoding="utf-8", name="list.csv", **options):
    file = folder / name
    file.write_bytes(text.encode(encoding))
    recipe = Recipe(labels=str(file), data_dir=str(folder / "pictures"), **options)
    return open_data(recipe, train, class_names)


def found(source, split="val"):
    """The labels of each image: a word, or a set of them."""
    split, names = getattr(source, split), source.class_names
    files = [split.name(index).rsplit("/", 1)[1] for index in range(len(split))]
    if source.label_sets is None:
        return {file: names[label] for file, label in zip(files, split.labels)}
    return {file: {names[i] for i in np.flatnonzero(source.label_sets[row])} for file, row in zip(files, split.labels)}


CATS = {"1.jpg": "cat", "2.jpg": "dog"}
BOTH = {"1.jpg": {"cat", "dog"}, "2.jpg": {"dog"}}


@pytest.mark.parametrize(
    "text, options, labels",
    [
        ("path,label\n1.jpg,cat\n2.jpg,dog\n", {}, CATS),
        ("1.jpg,cat\n2.jpg,dog", {}, CATS),  # no header
        ("cat,1.jpg\ndog,2.jpg", {}, CATS),
        ("path;label\n1.jpg;cat\n2.jpg;dog\n", {}, CATS),
        ("path\tlabel\n1.jpg\tcat\n2.jpg\tdog\n", {}, CATS),
        ("\ufeffpath,label\r\n1.jpg,cat\r\n\r\n2.jpg,dog\r\n", {}, CATS),
        ('"path","label"\n"1.jpg","cat, tom"\n"2.jpg","dog"\n', {}, {"1.jpg": "cat, tom", "2.jpg": "dog"}),
        (",image_id,label\n0,1.jpg,cat\n1,2.jpg,dog\n", {}, CATS),  # pandas' own index
        ("file_name,text,label\n1.jpg,a,cat\n2.jpg,b,dog\n", {}, CATS),
        ("path,species\n1.jpg,cat\n2.jpg,dog\n3.jpg,cat\n", {}, {**CATS, "3.jpg": "cat"}),
        ("path,a,b\n1.jpg,cat,x\n2.jpg,dog,y\n", {"label_column": ["a"]}, CATS),
        ("a,b,label\n1.jpg,3.jpg,cat\n2.jpg,4.jpg,dog\n", {"image_column": "a"}, CATS),
        ("./1.jpg,cat\n../pictures/2.jpg,dog\n", {}, CATS),
        ("path,label\n1.jpg, cat\n2.jpg,cat\n", {}, {"1.jpg": "cat", "2.jpg": "cat"}),
        ("path,label\n1.jpg,café\n2.jpg,cafe\u0301\n", {}, {"1.jpg": "café", "2.jpg": "café"}),  # NFC, NFD
        ("path,label\n1.jpg,A\n2.jpg,a\n", {}, {"1.jpg": "A", "2.jpg": "a"}),
        # Words stay what they are …
        ("path,label\n1.jpg,1\n2.jpg,01\n3.jpg,1.1\n", {}, {"1.jpg": "1", "2.jpg": "01", "3.jpg": "1.1"}),
        ("path,label\n1.jpg,1.0\n2.jpg,1.1\n3.jpg,-1\n", {}, {"1.jpg": "1.0", "2.jpg": "1.1", "3.jpg": "-1"}),
        ("path,label\n1.jpg,NA\n2.jpg,nan\n3.jpg,None\n", {}, {"1.jpg": "NA", "2.jpg": "nan", "3.jpg": "None"}),
        ("path,label\n1.jpg,true\n2.jpg,False\n", {}, {"1.jpg": "true", "2.jpg": "False"}),
        # … and what is missing is no class.
        ("path,label\n1.jpg,cat\n2.jpg,dog\n3.jpg,\n4.jpg, \n", {}, CATS),
        ("path,label\n1.jpg,0\n2.jpg,1\n3.jpg,-1\n", {}, {"1.jpg": "0", "2.jpg": "1"}),
        ("path,label\n1.jpg,cat\n2.jpg,-1\n", {}, {"1.jpg": "cat", "2.jpg": "-1"}),  # a word beside others
        ("path,label\n1.jpg,0.0\n2.jpg,1.0\n3.jpg,\n", {}, {"1.jpg": "0", "2.jpg": "1"}),  # pandas' whole numbers
        ("path,label\n1.jpg,0.0\n2.jpg,1.00\n3.jpg,-1.0\n", {}, {"1.jpg": "0", "2.jpg": "1"}),  # its fillna(-1)
        ("path,label\n1.jpg,0\n2.jpg,1.0\n3.jpg,-01\n", {}, {"1.jpg": "0", "2.jpg": "1"}),
        ("path,label\n1.jpg,cat\n2.jpg,dog\n1.jpg,cat\n1.jpg,\n", {}, CATS),  # once more
        # What spreadsheets leave below and beside a table.
        ("path,label\n1.jpg,cat\n2.jpg,dog\n,\n , \n", {}, CATS),
        (",,\npath,label,\n1.jpg,cat,\n2.jpg,dog, \n,,\n", {}, CATS),
        # Several labels per image.
        ("path,label\n1.jpg,cat|dog\n2.jpg,dog\n", {"label_separator": "|"}, BOTH),
        ("1.jpg,cat; dog;\n2.jpg,\n", {"label_separator": ";"}, {"1.jpg": {"cat", "dog"}}),
        ("path;label\n1.jpg;cat,dog\n2.jpg;dog\n", {"label_separator": ","}, BOTH),
        ("1.jpg,0;2\n2.jpg,1\n3.jpg,-1\n4.jpg,\n", {"label_separator": ";"}, {"1.jpg": {"0", "2"}, "2.jpg": {"1"}}),
        ("1.jpg,0.0|2\n2.jpg,1.0|1\n3.jpg,-1.0\n", {"label_separator": "|"}, {"1.jpg": {"0", "2"}, "2.jpg": {"1"}}),
        ("1.jpg,a;-1\n2.jpg,b\n", {"label_separator": ";"}, {"1.jpg": {"a", "-1"}, "2.jpg": {"b"}}),
        (
            "path,cat,dog,hat\n1.jpg,1.00,0,0\n2.jpg,0,0,1\n3.jpg,1,1,0\n4.jpg,0,,0\n5.jpg,0,-1,0\n",
            {"label_column": ["dog", "cat"]},
            {"1.jpg": {"cat"}, "2.jpg": set(), "3.jpg": {"cat", "dog"}},
        ),
        ("path,label\n1.jpg,cat\n2.jpg,dog\n1.jpg,dog\n", {"problem_type": MULTI}, BOTH),
        ("path,label\n1.jpg,a|b\n2.jpg,b\n", {"problem_type": SINGLE}, {"1.jpg": "a|b", "2.jpg": "b"}),
    ],
)  # fmt: skip
def test_what_a_list_says(folder, text, options, labels):
    assert found(opened(folder, text, **options)) == labels


@pytest.mark.parametrize(
    "text, options, note",
    [
        ("path;label\n1.jpg;cat\n2.jpg;dog", {}, "list.csv is read with ';' between its columns."),
        ("path,label\n1.jpg,cat\n2.jpg,\n", {}, "1 of 2 images of .* has no label: left out."),
        ("path,label\n1.jpg,0\n2.jpg,1\n3.jpg,-1\n4.jpg,\n", {}, "2 of 4 images of .* have no label: left out."),
        ("path,label,kind\n1.jpg,cat,a\n2.jpg,dog,b", {}, "its column label; --label_column can name another"),
        ("path,label\n1.jpg,cat\n2.jpg,dog\n1.jpg,cat", {}, "1 of 3 rows of .* names an image again: counted once"),
        ("path,label\n1.jpg,Cat\n2.jpg,cat", {}, "classes of .* that differ only in case: Cat and cat"),
        ("mask,image,label\n3.jpg,1.jpg,cat\n4.jpg,2.jpg,dog", {}, "its column image; --image_column can .*: mask"),
        ("path,label,use\n1.jpg,a,train\n2.jpg,b,val\n3.jpg,b,extra", {}, "column use .* has splits in it, and other"),
        ("1.jpg,cat\nval/2.jpg,dog", {}, "val/ in the paths of .* is taken for no split; a column `split` can"),
        ("path,label\n1.jpg,cat\nx.jpg,dog", {}, r"1 of 2 files of .* is not there, e\.g\. x\.jpg: counted as"),
    ],
)  # fmt: skip
def test_what_was_chosen_is_said(folder, text, options, note):
    assert any(re.search(note, each) for each in opened(folder, text, **options).notes)


@pytest.mark.parametrize(
    "text, options, words",
    [
        ("", {}, "has one column, or none"),
        ("path\n1.jpg\n", {}, "has one column, or none"),
        ("path,label\n", {}, "lists no images"),
        ("path,label\n1.jpg,cat\n2.jpg,dog,x\n", {}, "has 3 cells in line 3, but 2 in the first one"),
        ("path,label\n1.jpg,cat\n2.jpg\n", {}, "has 1 cells in line 3"),
        ("path,label\n1.jpg,cat\n,dog\n", {}, "names no image in row 2"),
        ('path,label\n"1.jpg,cat\n', {}, "cannot be read: unexpected end of data"),
        ("path,label\nx.jpg,cat\ny.jpg,dog\n", {}, r"none of the 2 files of .* is there, e\.g\. .*x\.jpg"),
        ("path,label,label\n1.jpg,cat,dog\n", {}, "two columns called 'label'"),
        ("path,a,b\n1.jpg,cat,x\n2.jpg,dog,y\n", {}, "several columns of labels, a, b; say which with --label_column"),
        ("1.jpg,cat,x\n2.jpg,dog,y\n", {}, "3 columns and no names for them"),
        ("1.jpg,cat\n", {"label_column": ["label"]}, "has no names of columns in its first line"),
        ("path,label\n1.jpg,cat\n", {"label_column": ["labl"]}, "labl is no column of .* Did you mean 'label'"),
        ("path,label\n1.jpg,cat\n", {"label_column": ["path"]}, "--label_column path is the column of images of"),
        ("path,label,a,b\n1.jpg,x,val,dev\n2.jpg,y,train,train\n", {}, "several columns of splits, a, b; call the"),
        ("train/1.jpg,cat\nval/2.jpg,dog\n3.jpg,dog\n", {"val_fraction": 0.5}, "lie in train/ and val/, but not all"),
        ("path,a,b\n1.jpg,1,inf\n", {"label_column": ["a", "b"]}, "the column b of .* holds 'inf'; .* holds 0 or 1"),
        ("path,label\n1.jpg,-1.0\n2.jpg,-2.0\n", {}, "has the label -2; whole numbers count classes from 0"),
        ("path,label\n1.jpg,cat\n", {"image_column": "pth"}, "pth is no column of .* Did you mean 'path'"),
        ("id,label\n1,cat\n", {}, "has no column of images; name one with --image_column"),
        ("a,b,label\n1.jpg,2.jpg,cat\n", {}, "several columns of images, a, b; say which with --image_column"),
        ("path,text\n1.jpg,a cat\n2.jpg,a dog\n3.jpg,a hat\n", {}, "another value of text for every image"),
        ("path,label\n1.jpg,cat\n1.jpg,dog\n", {}, "two labels, cat and dog; keep one, or add --problem_type multi"),
        ("path,label\n1.jpg,\n2.jpg,\n", {}, "has no labels: .* missing"),
        ("path,label\n1.jpg,-2\n2.jpg,1\n", {}, "has the label -2; whole numbers count classes from 0"),
        ("path,label\n1.jpg,a|b\n2.jpg,b|c\n", {}, r"holds 'a\|b': .*--label_separator '\|'; .*--problem_type single"),
        ("path,label\n1.jpg,cat;dog\n2.jpg,dog\n3.jpg,cat\n", {}, "--label_separator ';'"),
        ("path,label\n1.jpg,a;b\n2.jpg,b;c\n", {"label_separator": ","}, "--label_separator ';'"),  # the wrong one
        ("path,label\n1.jpg,a;b\n2.jpg,b;c\n", {"problem_type": MULTI}, "--label_separator ';'"),
        ("path,a,b\n1.jpg,1,2\n", {"label_column": ["a", "b"]}, "the column b of .* holds '2'; .* holds 0 or 1"),
        ("path,label\n1.jpg,cat\n", {"val_split": "val"}, "--val_split val: .* has no column `split`"),
    ],
)  # fmt: skip
def test_what_is_refused(folder, text, options, words):
    with pytest.raises(UserError, match=words):
        opened(folder, text, **options)


LINES = [{"file_name": "1.jpg", "label": "cat"}, {"file_name": "2.jpg", "label": "dog"}]


@pytest.mark.parametrize("name", ["list.jsonl", "LIST.JSONL", "labels.json"])
def test_json_is_lines_of_objects_or_a_list_of_them(folder, name):
    lines = "\n".join(map(json.dumps, LINES))
    assert found(opened(folder, lines, name=name)) == found(opened(folder, json.dumps(LINES), name=name)) == CATS


@pytest.mark.parametrize(
    "text, words",
    [
        (json.dumps({"images": LINES}, indent=1), "line 1: it needs one object a line, .* in a .jsonl file"),
        ('{"file_name": "1.jpg", "label": "cat"}\n{oops', "line 2: it needs one object a line"),
        ('["1.jpg", "2.jpg"]', "it needs one object a line"),
        ('{"file_name": "1.jpg", "label": 1e20}', r"holds 1e\+20 or its negative; .* at most 9,007,199,254,740,992"),
        ('{"file_name": "1.jpg", "label": -Infinity}', "holds inf or its negative; the numbers of classes are at most"),
        ('{"file_name": "1.jpg", "label": %s}' % 10**30, "cannot be read: "),
    ],
)
def test_json_that_cannot_be_read_is_one_sentence(folder, text, words):
    with pytest.raises(UserError, match=words):
        opened(folder, text, name="labels.json")


def test_a_column_of_lists_is_no_class_of_several(folder):
    text = json.dumps({"file_name": "1.jpg", "a": 1, "b": [1]})
    with pytest.raises(UserError, match="the column b of .* holds list.*; of several --label_column each holds 0 or 1"):
        opened(folder, text, name="list.jsonl", label_column=["a", "b"])


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_other_encodings_are_refused(folder, encoding):
    with pytest.raises(UserError, match="is no text in UTF-8"):
        opened(folder, "path,label\n1.jpg,café\n", encoding=encoding)


@pytest.mark.parametrize(
    "text, options, words",
    [
        ("1.jpg,cat\n2.jpg,cat\n", {}, "has a single class, cat; a classifier needs at least two"),
        ("1.jpg,a|b\n2.jpg,b|a\n", {"label_separator": "|"}, "have the same labels, a, b; .*nothing to learn"),
    ],
)  # fmt: skip
def test_what_teaches_nothing_is_refused(folder, text, options, words):
    with pytest.raises(UserError, match=words):
        opened(folder, text, train=True, val_fraction=0.5, **options)


def test_a_list_beside_the_images_is_pointed_at(folder):
    (folder / "pictures/list.csv").write_text("1.jpg,cat\n2.jpg,dog\n")
    with pytest.raises(
        UserError, match="--labels list.csv does not exist; say --labels .*pictures/list.csv, which does"
    ):
        open_data(Recipe(labels="list.csv", data_dir=str(folder / "pictures")), train=False)


def test_what_is_no_file_is_refused(folder):
    for name, words in (("none.csv", "cannot be read: No such file"), ("pictures", "is no file")):
        with pytest.raises(UserError, match=f"--labels .*{words}"):
            open_data(Recipe(labels=str(folder / name)), train=False)


def test_paths_are_below_the_lists_own_folder_without_data_dir(folder, monkeypatch):
    (folder / "list.csv").write_text(f"pictures/1.jpg,cat\n{folder}/pictures/2.jpg,dog\npictures\\3.jpg,dog\n")
    assert found(open_data(Recipe(labels=str(folder / "list.csv")), train=False)) == {**CATS, "3.jpg": "dog"}
    monkeypatch.chdir(folder / "pictures")
    assert len(open_data(Recipe(labels="../list.csv"), train=False).val) == 3


SPLITS = {"train": {"1.jpg": "cat", "2.jpg": "dog"}, "val": {"3.jpg": "dog"}}


@pytest.mark.parametrize("column, val, others", [("split", "val", "test"), ("part", "valid", "testing")])
def test_a_column_says_the_splits(folder, column, val, others):
    text = f"path,label,{column}\n1.jpg,cat,train\n2.jpg,dog,train\n3.jpg,dog,{val}\n4.jpg,hat,{others}\n"
    source = opened(folder, text, train=True)
    assert {split: found(source, split) for split in SPLITS} == SPLITS and source.class_names == ["cat", "dog"]
    assert any("1 images of" in note and "of other splits: passed over" in note for note in source.notes)
    assert found(opened(folder, text)) == SPLITS["val"]  # validation alone


SPLIT_COLUMNS = [
    ("phase,split", ["val,train", "train,train", "val,val"], SPLITS),
    ("source,split", ["train,train", "train,train", "train,val"], SPLITS),
    ("source,part", ["train,train", "train,train", "train,val"], SPLITS),
    ("Split", ["train", "train", "val"], SPLITS),
    ("part", ["train", "", "val"], {"train": {"1.jpg": "cat"}, "val": {"3.jpg": "dog"}}),
    ("split", [" ", "", "val"], {"val": {"3.jpg": "dog"}}),
    ("source", ["train", "train", "train"], {"val": {**CATS, "3.jpg": "dog"}}),
    ("split", ["", "", ""], {"val": {**CATS, "3.jpg": "dog"}}),
]


@pytest.mark.parametrize("header, cells, splits", SPLIT_COLUMNS)
def test_which_column_says_the_splits(folder, header, cells, splits):
    labels = {"1.jpg": "cat", "2.jpg": "dog", "3.jpg": "dog"}
    rows = "".join(f"{name},{label},{each}\n" for (name, label), each in zip(labels.items(), cells))
    train = "train" in splits and len(splits["train"]) > 1
    source = opened(folder, f"path,label,{header}\n{rows}", train=train)
    assert {split: found(source, split) for split in splits if train or split == "val"} == {
        split: each for split, each in splits.items() if train or split == "val"
    }
    if "val" in cells and "" in cells:
        assert any(re.search("rows without a split", note) for note in source.notes)
        assert not any("passed over: ." in note for note in source.notes)


PLACES = [
    "{}/{}",
    "images/{}/{}",
    "{root}/{}/{}",
    "{root}/images/{}/{}",
    "./images/{}/x/../{}",
    "set/{}/cat/{}",
    "cat/{}/{}",
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("options", [{}, {"val_fraction": 0.5}])
def test_folders_in_the_paths_say_the_splits(folder, place, options):
    text = ""
    for split, names in SPLITS.items():
        for name, label in names.items():
            path = place.format(split, name, root=folder / "pictures")
            (folder / "pictures" / path).resolve().parent.mkdir(parents=True, exist_ok=True)
            (folder / "pictures" / name).rename((folder / "pictures" / path).resolve())
            text += f"{path},{label}\n"
    source = opened(folder, text, train=True, **options)
    assert {split: found(source, split) for split in SPLITS} == SPLITS
    if "{root}" in place:  # the same without --data_dir
        source = open_data(Recipe(labels=str(folder / "list.csv"), **options))
        assert {split: found(source, split) for split in SPLITS} == SPLITS


@pytest.mark.parametrize(
    "train, val", [("0.0 1.0", "0.0 1.0 "), ("0 1", "1.0 0.0"), ("0.0  1.0", "-1.0 1.0"), ("0 1", "1")]
)
def test_numbers_mean_the_same_in_every_split(folder, train, val):
    rows = [(label, split) for split, each in (("train", train), ("val", val)) for label in each.split(" ")]
    text = "".join(f"{name},{label},{split}\n" for name, (label, split) in zip(IMAGES, rows))
    source = opened(folder, "path,label,split\n" + text, train=True, class_names=["0", "1"])
    assert source.class_names == ["0", "1"] and set(found(source, "train").values()) == {"0", "1"}
    assert set(found(source).values()) <= {"0", "1"}


def test_a_word_in_one_split_makes_words_of_all(folder):
    text = "path,label,split\n1.jpg,1.0,train\n2.jpg,1.1,train\n3.jpg,1.0,val\n4.jpg,-1,train\n5.jpg,-1,val\n"
    source = opened(folder, text, train=True)
    assert source.class_names == ["-1", "1.0", "1.1"] and found(source) == {"3.jpg": "1.0", "5.jpg": "-1"}


def test_a_class_of_validation_alone_is_unknown_to_training(folder):
    with pytest.raises(UserError, match="hat"):
        opened(folder, "path,label,split\n1.jpg,cat,train\n2.jpg,dog,train\n3.jpg,hat,val\n", train=True)


def test_a_share_is_held_out_of_a_list(folder):
    text = "".join(f"{name},{'cat' if i % 2 else 'dog'}\n" for i, name in enumerate(IMAGES))
    source = opened(folder, text, train=True, val_fraction=0.25)
    assert np.bincount(source.train.labels).tolist() == [3, 3] and np.bincount(source.val.labels).tolist() == [1, 1]
    with pytest.raises(UserError, match="does not say what to validate on: .*--val_fraction 0.1"):
        opened(folder, text, train=True)
    every = "".join(f"{name},{'cat' if i % 2 else 'dog'}|{i}\n" for i, name in enumerate(IMAGES))  # a set each
    source = opened(folder, every, train=True, val_fraction=0.25, label_separator="|")
    assert len(source.train) == 6 and len(source.val) == 2


def test_a_checkpoints_classes_keep_their_order(folder):
    source = opened(folder, "1.jpg,cat|dog\n2.jpg,dog\n", class_names=["hat", "dog", "cat"], label_separator="|")
    assert source.class_names == ["hat", "dog", "cat"] and source.present.tolist() == [1, 2]
    assert source.label_sets[source.val.labels].tolist() == [[0, 1, 1], [0, 1, 0]]


def test_training_and_validation_share_one_table_of_label_sets(folder):
    text = "path,label,split\n1.jpg,cat|dog,train\n2.jpg,hat,train\n3.jpg,hat|cat,val\n4.jpg,hat,val\n"
    source = opened(folder, text, train=True, label_separator="|")
    assert source.class_names == ["cat", "dog", "hat"] and source.label_sets.dtype == np.uint8
    assert source.label_sets[source.train.labels].tolist() == [[1, 1, 0], [0, 0, 1]]
    assert source.label_sets[source.val.labels].tolist() == [[1, 0, 1], [0, 0, 1]]


def test_a_changed_list_is_noticed(folder):
    text = "path,label,split\n1.jpg,cat,train\n2.jpg,dog,train\n3.jpg,{},val\n"
    before = opened(folder, text.format("dog"), train=True).listing()
    assert before.table["name"].to_pylist() == ["1.jpg", "2.jpg", "3.jpg"] and before.table["size"][0].as_py() == 5
    assert before.difference(opened(folder, text.format("dog"), train=True).listing()) is None
    assert before.difference(opened(folder, text.format("cat"), train=True).listing()) == "3.jpg was in class dog"
    several = opened(folder, text.format("dog"), train=True, problem_type=MULTI).listing()
    other = opened(folder, text.format("cat|dog"), train=True, label_separator="|").listing()
    assert several.difference(other) == "3.jpg was dog"


# ----------------------------------------------------------------------------------------------------- folders of data


def test_what_datasets_wrote_is_found_in_data_dir(tmp_path):
    image = {"bytes": encode(photo(1, 30, 30), "JPEG"), "path": None}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    table = datasets.Dataset.from_dict({"image": [image] * 4, "label": [0, 1, 1, -1]}, features=features)
    both = datasets.DatasetDict({"train": table, "validation": table.select([1])})
    both.save_to_disk(tmp_path / "both")
    table.save_to_disk(tmp_path / "one")
    (tmp_path / "parquet").mkdir()
    for name, part in both.items():
        part.to_parquet(tmp_path / "parquet" / f"{name}.parquet")
    for folder in ("both", "parquet"):
        for option in ("data_dir", "dataset_name"):
            source = open_data(Recipe(**{option: str(tmp_path / folder)}))
            assert source.train.labels.tolist() == [0, 1, 1] and source.val.labels.tolist() == [1]
    assert open_data(Recipe(data_dir=str(tmp_path / "one")), train=False).val.labels.tolist() == [0, 1, 1]
    held_out = open_data(Recipe(dataset_name=str(tmp_path / "one"), val_fraction=0.5))
    assert len(held_out.train) == 2 and len(held_out.val) == 1
    with pytest.raises(UserError, match="save_to_disk wrote, which has no use for --streaming"):
        open_data(Recipe(dataset_name=str(tmp_path / "one"), streaming=True))


def test_a_list_is_trained_and_validated_on(tmp_path, loaders):
    for name in IMAGES:
        (tmp_path / name).write_bytes(encode(photo(1, 40, 40), "JPEG"))
    rows = [f"{name},{'cat|dog' if i % 2 else 'dog'},{'val' if i > 5 else 'train'}\n" for i, name in enumerate(IMAGES)]
    (tmp_path / "list.csv").write_text("path,label,split\n" + "".join(rows))
    options = {"data_dir": None, "labels": str(tmp_path / "list.csv"), "label_separator": "|"}
    ours = loaders(options, plan=BatchPlan(2))
    targets = {i: row for b in ours.train.epoch(0) for i, row in zip(b["index"].tolist(), b["labels"].tolist())}
    assert targets == {i: [float(i % 2), 1.0] for i in range(6)}
    (batch,) = ours.val.epoch()
    assert batch["labels"].tolist() == [[0.0, 1.0], [1.0, 1.0]]


# ------------------------------------------------------------------------------------------ options that exclude others


@pytest.mark.parametrize(
    "options, words",
    [
        ({"labels": "x.csv", "dataset_name": "a/b"}, "--labels and --dataset_name are two sources"),
        ({"labels": "x.csv", "streaming": True}, "--streaming needs --dataset_name"),
        ({"label_separator": ";", "problem_type": SINGLE}, "--label_separator means several labels per image"),
        ({"label_column": ["a", "b"], "problem_type": SINGLE}, "several --label_column means several labels"),
        ({"label_column": ["a", "b"], "label_separator": ";"}, "parts the cells of one --label_column"),
        ({"label_column": ["a", "a"]}, "names a column twice"),
        ({"label_separator": ""}, "--label_separator is empty"),
    ],
)
def test_options_that_cannot_be_meant_together(options, words):
    with pytest.raises(UserError, match=words):
        Recipe(**options)
