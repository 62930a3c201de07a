"""The metadata.csv or metadata.jsonl of a folder of images, as a specification."""

import json
import re

import pytest

from effnet_hf.data.opening import open_data
from effnet_hf.errors import UserError
from effnet_hf.recipes import Recipe

from .test_table import CATS, IMAGES, MULTI, SPLITS, found


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in IMAGES:
        (tmp_path / "pictures" / name).write_bytes(b"image")
    return tmp_path


def metadata(folder, text, place="", name="metadata.csv"):
    (folder / "pictures" / place).mkdir(exist_ok=True)
    (folder / "pictures" / place / name).write_text(text)


def of_folder(folder, train=False, **options):
    return open_data(Recipe(data_dir=str(folder / "pictures"), **options), train)


def test_a_folder_with_metadata_is_what_it_says(folder):
    metadata(folder, "file_name,label\n1.jpg,cat\n2.jpg,dog\n")
    source = of_folder(folder)
    assert found(source) == CATS and "the labels are those of" in source.notes[0]


def test_lines_of_json_may_have_lists(folder):
    lines = [{"file_name": "1.jpg", "label": ["cat", "dog"]}, {"file_name": "2.jpg", "label": []}]
    lines += [{"file_name": "3.jpg", "label": None}, {"file_name": "4.jpg"}]
    metadata(folder, "\n".join(map(json.dumps, lines)), name="metadata.jsonl")
    assert found(of_folder(folder)) == {"1.jpg": {"cat", "dog"}, "2.jpg": set()}


def test_every_split_may_have_its_own_metadata(folder):
    for split, names in SPLITS.items():
        metadata(folder, "file_name,label\n" + "".join(f"{n},{label}\n" for n, label in names.items()), split)
        for name in names:
            (folder / "pictures" / name).rename(folder / "pictures" / split / name)
    source = of_folder(folder, train=True)
    assert {split: found(source, split) for split in SPLITS} == SPLITS
    metadata(folder, "file_name,label\n1.jpg,cat\n")
    with pytest.raises(UserError, match="two lists of images"):
        of_folder(folder)


def in_classes(folder, **placed):
    """Moves images to where they belong, such as cat="1.jpg"."""
    for place, names in placed.items():
        place = folder / "pictures" / place.replace("_", "/")
        place.mkdir(parents=True, exist_ok=True)
        for name in names.split():
            (folder / "pictures" / name).rename(place / name)


def test_metadata_beside_class_folders_must_agree(folder):
    in_classes(folder, cat="1.jpg", dog="2.jpg")
    metadata(folder, "file_name,text\ncat/1.jpg,one\ndog/2.jpg,two\n")  # captions
    assert found(of_folder(folder)) == CATS
    metadata(folder, "file_name\ncat/1.jpg\ndog/2.jpg\n")
    assert found(of_folder(folder)) == CATS
    metadata(folder, "file_name,label\ncat/1.jpg,cat\ndog/2.jpg,dog\n")
    assert found(of_folder(folder)) == CATS and "labels are" not in " ".join(of_folder(folder).notes)
    with pytest.raises(UserError, match="--label_column labl is no column of .* Did you mean 'label'"):
        of_folder(folder, label_column=["labl"])
    metadata(folder, "file_name,label\ncat/1.jpg,dog\ndog/2.jpg,cat\n")
    with pytest.raises(UserError, match="says something else; .* --labels .*metadata.csv"):
        of_folder(folder)
    recipe = Recipe(labels=str(folder / "pictures/metadata.csv"))
    assert found(open_data(recipe, train=False)) == {"1.jpg": "dog", "2.jpg": "cat"}


@pytest.mark.parametrize("text", ["label,description\ncat,purrs\ndog,barks\n", "", "file_name,label\n", "a,b\nc\n"])
def test_a_table_about_something_else_beside_class_folders_is_passed_over(folder, text, capsys):
    in_classes(folder, cat="1.jpg", dog="2.jpg")
    metadata(folder, text)
    assert found(of_folder(folder)) == CATS
    assert "passed over, since class folders name the classes: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["metadata.csv", "METADATA.CSV"])
def test_metadata_of_a_part_of_the_class_folders_is_used(folder, name):
    in_classes(folder, cat="1.jpg 3.jpg", dog="2.jpg")
    metadata(folder, "file_name,label\ncat/1.jpg,cat\ndog/2.jpg,dog\n", name=name)
    source = of_folder(folder)
    assert found(source) == CATS
    assert re.search(r"1 images of .* are not in .*: left out, e\.g\. .*cat/3\.jpg", " ".join(source.notes))


def test_metadata_of_a_part_of_the_class_folders_of_splits_is_used(folder):
    in_classes(folder, train_cat="1.jpg 3.jpg", train_dog="2.jpg", val_cat="4.jpg", val_dog="5.jpg 6.jpg")
    for split, text in (("train", "cat/1.jpg,cat\ndog/2.jpg,dog"), ("val", "cat/4.jpg,cat\ndog/5.jpg,dog")):
        metadata(folder, f"file_name,label\n{text}\n", split)
    source = of_folder(folder, train=True)
    assert found(source, "train") == CATS and found(source) == {"4.jpg": "cat", "5.jpg": "dog"}
    assert "2 images of" in " ".join(source.notes)


def test_metadata_may_split_class_folders_by_a_column(folder):
    in_classes(folder, cat="1.jpg 3.jpg", dog="2.jpg 4.jpg")
    rows = "cat/1.jpg,cat,train\ndog/2.jpg,dog,train\ncat/3.jpg,cat,val\ndog/4.jpg,dog,val\n"
    metadata(folder, f"file_name,label,split\n{rows}")
    source = of_folder(folder, train=True)
    assert found(source, "train") == CATS and found(source) == {"3.jpg": "cat", "4.jpg": "dog"}


def test_metadata_in_one_split_and_class_folders_in_the_other(folder):
    in_classes(folder, train="1.jpg 2.jpg", val_cat="3.jpg", val_dog="4.jpg")
    metadata(folder, "file_name,label\n1.jpg,cat\n2.jpg,dog\n", "train")
    with pytest.raises(
        UserError, match="train/metadata.csv lists images, and .*val has class folders and no list; add"
    ):
        of_folder(folder)


@pytest.mark.parametrize("listed", [True, False])
def test_a_test_split_without_labels_is_passed_over(folder, listed):
    in_classes(
        folder,
        train="1.jpg 2.jpg",
        val="3.jpg 4.jpg",
        **({"test": "5.jpg"} if listed else {"test_cat": "5.jpg", "test_dog": "6.jpg"}),
    )
    metadata(folder, "file_name,label\n1.jpg,cat\n2.jpg,dog\n", "train")
    metadata(folder, "file_name,label\n3.jpg,dog\n4.jpg,cat\n", "val")
    if listed:
        metadata(folder, "file_name\n5.jpg\n", "test")
    source = of_folder(folder, train=True)
    assert found(source, "train") == CATS and found(source) == {"3.jpg": "dog", "4.jpg": "cat"}
    assert re.search("passed over.*test", " ".join(source.notes))
    if listed:
        with pytest.raises(UserError, match="test of .* has no labels: they are missing"):
            of_folder(folder, val_split="test")


def test_columns_of_class_folders_are_refused(folder):
    (folder / "pictures/cat").mkdir()
    (folder / "pictures/cat/1.jpg").write_bytes(b"image")
    for option in ({"label_column": ["label"]}, {"image_column": "image"}, {"label_separator": ";"}):
        with pytest.raises(UserError, match=f"--{next(iter(option))}: .* class folders, which have no columns"):
            of_folder(folder, **option)


def test_class_folders_may_be_sets_of_one(folder):
    root = folder / "pictures"
    for name, label in CATS.items():
        (root / label).mkdir()
        (root / name).rename(root / label / name)
    assert found(of_folder(folder, problem_type=MULTI)) == {name: {label} for name, label in CATS.items()}
