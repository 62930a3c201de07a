"""`--folds K --fold N`: every image is validated on once, in every kind of folder."""

import shutil

import datasets
import numpy as np
import pyarrow as pa
import pytest

from effnet_hf.data import scan_data
from effnet_hf.data.opening import open_data
from effnet_hf.data.source import Split, split_by_name
from effnet_hf.data.splits import Fold
from effnet_hf.errors import UserError
from effnet_hf.recipes import Recipe

from .test_folder import JPEG, write


COUNTS = {"ant": 23, "bee": 10, "cow": 3}


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    root = tmp_path_factory.mktemp("folds")
    write(root, *(f"{name}/{i:03}.jpg" for name, count in COUNTS.items() for i in range(count)))
    return root


def names(split):
    return {split.name(i) for i in range(len(split))}


def folds_of(**options):
    return [open_data(Recipe(folds=5, fold=fold, **options)) for fold in range(1, 6)]


def require_one_division(sources, images):
    held_out = [names(source.val) for source in sources]
    assert len(set().union(*held_out)) == sum(map(len, held_out)) == images
    for source, own in zip(sources, held_out):
        assert names(source.train) == set().union(*held_out) - own
        counts = np.bincount(source.val.labels, minlength=3)
        assert counts[0] in (4, 5) and counts[1] == 2 and counts[2] in (0, 1) and len(source.val) in (7, 8)


def test_every_image_is_validated_on_once_and_every_class_divided_evenly(classes):
    sources = folds_of(data_dir=str(classes))
    require_one_division(sources, 36)
    assert all("fewer images than --folds 5, so not in every fold: cow." in source.notes for source in sources)
    again = open_data(Recipe(folds=5, fold=2, data_dir=str(classes)))
    assert names(again.val) == names(sources[1].val)


def test_lists_and_saved_data_sets_are_divided_alike(classes, tmp_path):
    rows = [(f"{name}/{i:03}.jpg", name) for name, count in COUNTS.items() for i in range(count)]
    labels = tmp_path / "labels.csv"
    labels.write_text("\n".join(["path,label", *map(",".join, rows)]))
    listed = folds_of(labels=str(labels), data_dir=str(classes))
    require_one_division(listed, 36)
    folder = folds_of(data_dir=str(classes))
    for a, b in zip(listed, folder):
        assert {name[-11:] for name in names(a.val)} == {name[-11:] for name in names(b.val)}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(COUNTS))})
    images = [{"bytes": JPEG, "path": None}] * len(rows)
    table = {"image": images, "label": [list(COUNTS).index(label) for _, label in rows]}
    datasets.Dataset.from_dict(table, features).save_to_disk(tmp_path / "saved")
    require_one_division(folds_of(data_dir=str(tmp_path / "saved")), 36)


def test_several_labels_are_divided_by_name(classes, tmp_path):
    rows = [f"{name}/{i:03}.jpg,{'ant;bee' if i % 2 else name}" for name in COUNTS for i in range(COUNTS[name])]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *rows]))
    sources = folds_of(labels=str(tmp_path / "labels.csv"), data_dir=str(classes), label_separator=";")
    held_out = [names(source.val) for source in sources]
    assert sorted(map(len, held_out)) == [7, 7, 7, 7, 8] and len(set().union(*held_out)) == 36


def test_few_images_change_their_fold_when_others_are_added(classes, tmp_path):
    root = tmp_path / "more"
    shutil.copytree(classes, root)
    write(root, "ant/new.jpg", "bee/new.jpg")
    before, after = (
        {name[-11:]: n for n, source in enumerate(folds_of(data_dir=str(folder))) for name in names(source.val)}
        for folder in (classes, root)
    )
    assert sum(after[name] != fold for name, fold in before.items()) <= 8  # two borders of each class at most


def test_other_splits_stay_unseen_and_it_is_said(tmp_path):
    write(tmp_path, *(f"{split}/{i % 2}/{i}.jpg" for split in ("train", "val", "test") for i in range(18)))
    for train in (True, False):
        source = open_data(Recipe(folds=3, fold=1, data_dir=str(tmp_path)), train=train)
        assert all("/train/" in name for name in names(source.val)) and len(source.val) == 6
        note = next(note for note in source.notes if "unseen" in note)
        assert note.startswith("--folds divides train/ alone: ") and "val/" in note and "test/" in note
        assert not any("passed over" in each for each in source.notes)


def test_without_training_images_there_is_nothing_to_divide(tmp_path):
    write(tmp_path, "val/a/1.jpg", "val/b/2.jpg")
    with pytest.raises(UserError, match="no train/, and --folds divides the training images"):
        open_data(Recipe(folds=2, fold=1, data_dir=str(tmp_path)))


@pytest.mark.parametrize("fold", [1, 4])
def test_more_folds_than_images_are_refused(fold, tmp_path):
    write(tmp_path, "a/1.jpg", "a/2.jpg", "b/1.jpg")
    with pytest.raises(UserError, match="--folds 4 is more than the 3 images there are; lower it"):
        open_data(Recipe(folds=4, fold=fold, data_dir=str(tmp_path)))


@pytest.mark.parametrize(
    "counts, folds, sizes",
    [
        ([6] * 100, 5, [120] * 5),
        ([11] * 37, 10, [41] * 7 + [40] * 3),
        ([2] * 200, 5, [80] * 5),
        ([1, 1, 1, 1, 1], 5, [1] * 5),
        ([23, 10, 3], 5, [8, 7, 7, 7, 7]),
        ([4, 9, 1, 7, 2, 30], 4, [14, 13, 13, 13]),
        ([3, 2], 2, [3, 2]),
    ],
)
def test_folds_are_even_in_each_class_and_in_all_whatever_the_order_of_the_labels(counts, folds, sizes):
    """As many per fold as with scikit-learn's StratifiedKFold, but for the order of the folds."""
    classes = [f"c{number:03}" for number in range(len(counts))]
    files = [f"{name}/{name}-{i}.jpg" for name, count in zip(classes, counts) for i in range(count)]
    pictures = pa.table({"image": pa.array([{"bytes": None, "path": file} for file in files])})
    dataset = datasets.Dataset(datasets.table.InMemoryTable(pictures))
    rng, divisions = np.random.default_rng(0), []
    for numbers in (np.arange(len(counts)), 5 + rng.permutation(len(counts))):
        split = Split(dataset, "image", np.repeat(numbers, counts))
        groups = dict(zip(numbers.tolist(), classes))
        parts = [split_by_name(split, 0.0, groups, Fold(number, folds)) for number in range(1, folds + 1)]
        divisions.append([names(val) for _, val in parts])
        assert [len(val) for _, val in parts] == sizes
        assert all(names(train) == set(files) - names(val) for train, val in parts)
        for number, count in zip(numbers, counts):
            own = [np.count_nonzero(val.labels == number) for _, val in parts]
            assert sum(own) == count and max(own) - min(own) <= 1
    assert sorted(name for part in divisions[0] for name in part) == sorted(files)
    assert divisions[0] == divisions[1]


def test_a_checkpoints_names_and_order_change_no_fold(tmp_path):
    """`01` to `06` are `six` to `one`, numbered the other way and spelt so that they sort otherwise."""
    write(tmp_path, *(f"{number:02}/{number}-{i}.jpg" for number in range(1, 7) for i in range(4)))
    known = ["six", "five", "four", "three", "two", "one"]
    for fold in (1, 2, 3):
        recipe = Recipe(folds=3, fold=fold, data_dir=str(tmp_path))
        assert names(open_data(recipe, train=False, class_names=known).val) == names(open_data(recipe).val)


def test_validate_and_scan_see_the_same_fold(classes):
    recipe = Recipe(folds=5, fold=4, data_dir=str(classes))
    held_out = names(open_data(recipe).val)
    assert names(open_data(recipe, train=False, class_names=["cow", "bee", "ant"]).val) == held_out
    found = scan_data(recipe, 0)
    assert {part.use: len(part.split) for part in found.parts} == {
        "trained on": 36 - len(held_out), "validated on": len(held_out),
    }  # fmt: skip
    assert not found.refused


@pytest.mark.parametrize(
    "options, words",
    [
        ({"folds": 5}, "--folds 5 needs --fold, which of them to validate on: one from 1 to 5."),
        ({"fold": 2}, "--fold 2 needs --folds, of how many it is one."),
        ({"folds": 1, "fold": 1}, "--folds 1 leaves nothing to train on; give a number of folds from 2 on."),
        ({"folds": 3, "fold": 4}, "--fold 4 is not one of --folds 3; give one from 1 to 3."),
        ({"folds": 3, "fold": 1, "val_fraction": 0.1}, "goes without --val_fraction; drop one"),
        ({"folds": 3, "fold": 1, "val_split": "test"}, "goes without --val_split; drop one"),
        ({"folds": 3, "fold": 1, "dataset_name": "a/b", "streaming": True}, "goes without --streaming; drop one"),
        ({"folds": 3, "fold": 1, "accept_changed_data": True}, "without --accept_changed_data true: other images chan"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        Recipe(**options)
