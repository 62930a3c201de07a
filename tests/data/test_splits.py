"""Which folders and named splits are trained on, validated on and passed over: a table."""

import os
import unicodedata

import datasets
import numpy as np
import pytest

from effnet_hf.data import DataSource
from effnet_hf.data.named_dataset import open_named
from effnet_hf.data.splits import choose_splits, find_splits
from effnet_hf.errors import UserError

from .test_folder import exported, mark, write


def split(*names):
    """Two classes of two images in each of some folders."""
    return [f"{name}/{label}/{i}.jpg" for name in names for label in "ab" for i in (1, 2)]


def chosen(root, **options):
    found = find_splits(root, **options)
    return tuple("." if path == root else path and path.name for path in (found.train, found.val)), " ".join(
        found.notes
    )


THREE = [*split("train", "valid", "test")]
TRAIN_TEST = split("Training", "Testing")
CLASSES = ["train/1.jpg", "train/2.jpg", "car/1.jpg", "car/2.jpg", "boat/x/1.jpg"]

# files, options, (trained on, validated on), part of a note
CHOICES = [
    (split("train", "val"), {}, ("train", "val"), ""),
    (split("Train", "Valid"), {}, ("Train", "Valid"), ""),
    (split("trn", "DEV"), {}, ("trn", "DEV"), ""),
    (split("TRAINING", "Validation"), {}, ("TRAINING", "Validation"), ""),
    (split("train", "eval"), {}, ("train", "eval"), ""),
    (THREE, {}, ("train", "valid"), "passed over in {}: test/."),
    (THREE, {"train": False}, (None, "valid"), "passed over in {}: test/."),
    (THREE, {"val_split": "test"}, ("train", "test"), "the best epoch is chosen on test/, which is then no test"),
    (THREE, {"train": False, "val_split": "test"}, (None, "test"), "passed over in {}: valid/."),
    (THREE, {"train": False, "val_split": "train"}, (None, "train"), "passed over in {}: test/, valid/."),
    (THREE, {"val_fraction": 0.5}, ("train", "valid"), "--val_fraction 0.5 was ignored because valid/ exists"),
    (TRAIN_TEST, {"val_fraction": 0.5}, ("Training", None), "passed over in {}: Testing/."),
    (TRAIN_TEST, {}, ("Training", "Testing"), "no test of the model; to keep it for that, hold out a share of the tr"),
    (TRAIN_TEST, {"val_split": "test"}, ("Training", "Testing"), "chosen on Testing/, which is then no test of the"),
    (TRAIN_TEST, {"train": False}, (None, "Testing"), "measured on Testing/: there is no val/ or valid/."),
    (TRAIN_TEST, {"train": False, "val_fraction": 0.5}, ("Training", None), "passed over in {}: Testing/."),
    (split("test"), {"train": False}, (None, "test"), "measured on test/"),
    (split("val"), {"train": False}, (None, "val"), ""),
    (split("train"), {"val_fraction": 0.5}, ("train", None), ""),
    (split("train", "holdout"), {"val_split": "holdout"}, ("train", "holdout"), ""),
    ([*split("train", "val"), "test/1.jpg"], {}, ("train", "val"), "test/ (holds images without class folders)"),
    ([*split("train"), "val/1.jpg"], {"val_fraction": 0.5}, ("train", None), "val/ (holds images without class"),
    ([*split("train", "val"), "samples/1.jpg"], {}, ("train", "val"), "passed over in {}: samples/."),
    ([*split("train"), "notes/1.txt"], {"val_fraction": 0.5}, ("train", None), ""),
    ([*split("train", "val"), "@eaDir/valid/a/1.jpg", ".cache/1.jpg"], {}, ("train", "val"), ""),
    (CLASSES, {"val_fraction": 0.5}, (".", None), "train/ in {} is a class, like the folders beside it."),
    (CLASSES, {"train": False}, (None, "."), "train/ in {} is a class"),
    (["a/1.jpg", "test_tube/1.jpg", "train_station/1.jpg"], {"val_fraction": 0.5}, (".", None), ""),
    (["train/1.jpg", "test_tube/1.jpg", "bus/1.jpg"], {"val_fraction": 0.5}, (".", None), "train/ in {} is a class"),
    (["train_val/1.jpg", "a/1.jpg"], {"val_fraction": 0.5}, (".", None), ""),
    (split("train ", " VAL"), {}, ("train ", " VAL"), ""),
]


@pytest.mark.parametrize("files, options, expected, note", CHOICES)
def test_what_is_trained_on_validated_on_and_passed_over(tmp_path, files, options, expected, note):
    write(tmp_path, *files)
    found, notes = chosen(tmp_path, **options)
    assert found == expected
    assert note.format(tmp_path) in notes and (note or not notes)


REFUSED = [
    (split("train", "val", "valid"), {}, "has val/ and valid/, which mean the same split; remove or rename one"),
    (split("train", "Training", "val"), {}, "which mean the same split; remove or rename one."),
    (split("train"), {}, "has none of val/, valid/, .* only train/; add one, or hold out a share"),
    (split("train"), {"train": False}, "has a train/ but none of val/, .*; validation needs one"),
    ([*split("train"), "val/1.jpg"], {}, "add one, or hold out .* val/ holds images without class folders"),
    (split("val"), {}, "has a val/ but no train/; training needs one"),
    (split("."), {}, "has none of val/, .*; add one, or hold out a share with --val_fraction 0.1"),
    (split("."), {"val_split": "b"}, "has class folders and no splits, so none to name with --val_split"),
    (THREE, {"val_split": "tset"}, "--val_split tset: .* has test/, train/, valid/. Did you mean 'test'?"),
    (THREE, {"val_split": "train"}, "--val_split train is what is trained on; name another"),
    (THREE, {"val_split": "test", "val_fraction": 0.1}, "say two ways to validate; drop one"),
    (
        [*split("train"), "car/1.jpg"],
        {"val_fraction": 0.1},
        "train/ with folders in it beside car/: splits or",
    ),
    (["test/1.jpg", "car/1.jpg", "cat/1.jpg"], {"val_fraction": 0.1}, "test/ with images beside car/ and 1 more: a cl"),
    (split("training_set", "test_set"), {"val_fraction": 0.1}, "test_set/ and training_set/ .* look like splits, not"),
    (
        split("train2017", "val2017"),
        {"val_fraction": 0.1},
        "train2017/ and val2017/ .* call them train/, val/ or",
    ),
    (
        split("trainA", "testA"),
        {"val_fraction": 0.1},
        "testA/ and trainA/ with folders in them, which look like splits",
    ),
    (
        split("TrainData", "TestData"),
        {"train": False},
        "TestData/ and TrainData/ with folders in them, which look like",
    ),
    (split("valset", "traindir", "x"), {"val_fraction": 0.1}, "traindir/ and valset/ with folders in them, which look"),
    (["train/1.jpg", "test1/1.jpg"], {}, "test1/ and train/, which look like splits, .* move the images of each class"),
    (
        ["train/1.jpg", "test1/1.jpg"],
        {"val_fraction": 0.1},
        "list them with --labels FILE.csv. If they are classes, re",
    ),
    (["train/1.jpg", "test1/1.jpg"], {"train": False}, "test1/ and train/, which look like splits, not classes"),
    (["train2017/1.jpg", "val2017/1.jpg", "unlabeled2017/1.jpg"], {"val_fraction": 0.1}, "train2017/ and val2017/, wh"),
    (["testImages/1.jpg", "trainImages/1.jpg"], {"val_fraction": 0.1}, "testImages/ and trainImages/, which look like"),
    (["TRAINset/1.jpg", "TESTset/1.jpg"], {"val_fraction": 0.1}, "TESTset/ and TRAINset/, which look like splits, not"),
    (["train/1.jpg", "evaluation/1.jpg"], {"val_fraction": 0.1}, "evaluation/ and train/, which look like splits, not"),
    (["train1/a/1.jpg", "test1/1.jpg"], {"val_fraction": 0.1}, "test1/ and train1/, which look like splits, not"),
    (
        split("trainval", "test"),
        {},
        "test/ with folders in it .* If trainval/ has the training images, rename it to tra",
    ),
    (
        split("val", "extra"),
        {},
        r"val/ with folders in it beside extra/: .*\? If extra/ has the training images, rename",
    ),
    (split("train", "holdout"), {}, "Name the validation images with --val_split holdout, or give .*/train alone, or"),
    ([*split("train"), "car/1.jpg"], {}, r"splits or classes\? Give .*/train alone, or move all classes into a folder"),
]


@pytest.mark.parametrize("files, options, sentence", REFUSED)
def test_what_could_be_meant_two_ways_is_refused(tmp_path, files, options, sentence):
    write(tmp_path, *files)
    with pytest.raises(UserError, match=sentence):
        find_splits(tmp_path, **options)


def test_classes_may_be_called_like_splits_in_a_folder_called_train(tmp_path):
    files = [f"train/{name}/{i}.jpg" for name in ("valid", "invalid", "test") for i in (1, 2)]
    write(tmp_path, *files)
    with pytest.raises(UserError, match="none of val/.*--val_fraction"):
        find_splits(tmp_path / "train")
    assert find_splits(tmp_path / "train", val_fraction=0.5).train == tmp_path / "train"


def test_the_advice_for_training_and_testing_trains_their_classes(tmp_path):
    write(tmp_path, *TRAIN_TEST)
    source = DataSource.from_folder(str(tmp_path), 0.5)
    assert source.class_names == ["a", "b"] and len(source.train) == len(source.val) == 2
    assert {os.path.relpath(source.val.name(i), tmp_path).split(os.sep)[0] for i in range(2)} == {"Training"}


def test_the_folders_of_runs_and_models_are_no_splits(tmp_path):
    write(tmp_path, *split("train", "val", "test"))
    mark(tmp_path / "val")
    exported(tmp_path / "onnx")
    assert chosen(tmp_path)[0] == ("train", "test")


NAMED = [
    (["train", "validation", "test"], {}, ("train", "validation"), "passed over: test."),
    (["Training", "DEV"], {}, ("Training", "DEV"), ""),
    (["train", "test"], {"val_fraction": 0.1}, ("train", None), "passed over: test."),
    (["train", "test"], {}, ("train", "test"), "the best epoch is chosen on test, which is then no test of the model;"),
    (["train", "test"], {"val_split": "test"}, ("train", "test"), "the best epoch is chosen on test"),
    (["train", "test"], {"train": False}, (None, "test"), "measured on test: there is no val or valid."),
    (["train", "test_other"], {"val_split": "test_other"}, ("train", "test_other"), ""),
]


@pytest.mark.parametrize("names, options, expected, note", NAMED)
def test_named_splits_follow_the_same_rule(names, options, expected, note):
    found = choose_splits(names, "--dataset_name x", **options)
    assert found[:2] == expected and note in " ".join(found.notes) and bool(note) == bool(found.notes)


def test_a_stream_of_training_and_test_images_is_not_told_to_hold_out():
    found = choose_splits(["train", "test"], "--dataset_name x", val_fraction=0.1, may_hold_out=False)
    assert found[:2] == ("train", "test") and "hold out" not in " ".join(found.notes)


def test_a_named_data_set_is_validated_on_what_is_named(tmp_path):
    rows = {"image": [{"bytes": bytes([i]), "path": None} for i in range(4)], "label": [0, 1, 0, 1]}
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    for name in ("train", "test"):
        datasets.Dataset.from_dict(rows, features=kinds).to_parquet(tmp_path / f"{name}-0.parquet")
    source = open_named(str(tmp_path))
    assert len(source.val) == 4 and "is chosen on test" in " ".join(source.notes)
    assert len(open_named(str(tmp_path), val_split="test").val) == 4


def test_a_held_out_share_does_not_depend_on_how_a_system_spells(tmp_path):
    for form in ("NFC", "NFD"):
        names = [unicodedata.normalize(form, f"{label}/é{i}.jpg") for label in "ab" for i in range(8)]
        write(tmp_path / form, *names)
    held_out = [
        {unicodedata.normalize("NFC", os.path.basename(source.val.name(i))) for i in range(len(source.val))}
        for source in (DataSource.from_folder(str(tmp_path / form), 0.25) for form in ("NFC", "NFD"))
    ]
    assert held_out[0] == held_out[1] and np.all(held_out)


def test_classes_of_one_image_alone_leave_nothing_to_measure(tmp_path):
    write(tmp_path, "a/1.jpg", "b/1.jpg")
    with pytest.raises(UserError, match="--val_fraction 0.5 holds out no image: every class has a single one"):
        DataSource.from_folder(str(tmp_path), 0.5)
