import shutil

import numpy as np
import pytest

from effnet_hf.data import DataSource
from effnet_hf.data.opening import open_data
from effnet_hf.data.survey import images_per_class, near_empty, note_on_balance, notes_on_classes, notes_on_copies
from effnet_hf.recipes import Recipe

from .test_folder import write


NAMES = ["a", "b", "c"]


@pytest.mark.parametrize(
    "train, val, expected",
    [
        ([9, 9, 9], [1, 1, 1], []),
        ([9, 1, 9], [1, 0, 1], ["1 class (b) with a single image, which is trained on: no validation image."]),
        ([9, 9, 9], [0, 0, 1], ["2 classes (a, b) without a validation image: nothing is measured there."]),
        ([9, 0, 9], [1, 1, 1], ["1 class (b) without a training image."]),
        ([0, 0, 9], [0, 1, 1], ["1 class (b) without a training image."]),
    ],
)
def test_classes_that_cannot_be_learned_or_measured_are_named(train, val, expected):
    assert notes_on_classes(NAMES, np.array(train), np.array(val)) == expected


def test_many_classes_are_counted_and_some_named():
    note = notes_on_classes([str(i) for i in range(1000)], np.full(1000, 9), np.zeros(1000))[0]
    assert note.startswith("1,000 classes (0, 1, 2, 3, 4 and 995 more) without a validation image")


def test_images_of_several_classes_count_for_each():
    sets = np.array([[1, 1, 0], [0, 0, 0], [0, 1, 0]], np.uint8)
    assert images_per_class(np.array([0, 0, 1, 2]), 3, sets).tolist() == [2, 3, 0]
    assert images_per_class(np.array([2, 2, 0]), 3).tolist() == [1, 0, 2]


def test_classes_of_little_are_those_of_one_image_or_of_a_twentieth_of_the_largest():
    assert near_empty(np.array([100, 5, 4, 1, 0])).tolist() == [2, 3, 4]
    assert near_empty(np.array([2, 1])).tolist() == [1]


def test_what_a_run_says_before_its_first_epoch(tmp_path):
    write(tmp_path, *(f"{name}/{i}.jpg" for name in "ab" for i in range(4)), "lone/1.jpg")
    notes = open_data(Recipe(data_dir=str(tmp_path), val_fraction=0.25)).notes
    assert notes == ["1 class (lone) with a single image, which is trained on: no validation image."]
    write(tmp_path / "set", "train/a/1.jpg", "train/a/2.jpg", "train/b/1.jpg", "train/b/2.jpg", "val/b/1.jpg")
    notes = open_data(Recipe(data_dir=str(tmp_path / "set"))).notes
    assert notes == ["1 class (a) without a validation image: nothing is measured there."]


def same(root, **bounds):
    source = DataSource.from_folder(str(root))
    if not bounds:
        return source.notes_on_copies(source.listing())
    sizes = source.listing().table["size"].to_numpy()
    return notes_on_copies(source.train, source.val, (sizes[: len(source.train)], sizes[len(source.train) :]), **bounds)


@pytest.fixture
def distinct(tmp_path):
    """Files of two sizes, no two of which are equal."""
    for split, count in (("train", 20), ("val", 10)):
        for number in range(count):
            path = tmp_path / split / "ab"[number % 2] / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f"{split}{number:5}".encode().ljust(100 + number % 2, b"."))
    return tmp_path


def test_images_that_are_trained_and_validated_on_are_counted(distinct):
    assert same(distinct) == []
    shutil.copy(distinct / "train/a/4.jpg", distinct / "val/a/copy.jpg")
    assert same(distinct) == [
        f"1 validation image is trained on too, byte for byte, e.g. {distinct}/val/a/copy.jpg is"
        f" {distinct}/train/a/4.jpg: the figures are too good by them."
    ]
    shutil.copy(distinct / "train/a/4.jpg", distinct / "val/b/other.jpg")
    assert "2 validation images are trained on too, byte for byte, 1 of them under another label" in same(distinct)[0]


def test_what_was_not_compared_is_said(distinct):
    shutil.copy(distinct / "train/a/4.jpg", distinct / "val/a/copy.jpg")
    found = same(distinct, most_files=31)
    assert found[0].startswith("1 validation image is") and "not compared" not in found[0]
    assert same(distinct, most_files=16) == [
        "1 validation image is trained on too, byte for byte, e.g. "
        f"{distinct}/val/a/copy.jpg is {distinct}/train/a/4.jpg: the figures are too good by them. 5 of 11 validation"
        " images were not compared; `effnet-hf scan` does."
    ]
    for bounds in ({"most_files": 5}, {"most_bytes": 500}):
        assert same(distinct, **bounds) == [
            "identical images in training and validation were looked for: none; 11 of 11 validation images were not"
            " compared; `effnet-hf scan` does."
        ]


FLAGS = ["--sampler balanced", "--select_best macro_recall"]


@pytest.mark.parametrize(
    "counts, some",
    [
        ([36, 3], "dog 3; cat has 36."),  # 8 %, but so few
        ([1000, 49], "dog 49; cat has 1,000."),
        ([1000, 51], None),
        ([40, 8], None),  # a fifth
        ([9, 4], None),
        ([5, 5], None),
        ([900, 0], None),  # said elsewhere
        ([1000, 9, 3, 20, 8], "owl 3, elk 8, dog 9 and 1 more classes; cat has 1,000."),
    ],
)
def test_rare_classes_are_named_with_what_helps(counts, some):
    names = ["cat", "dog", "owl", "fox", "elk"][: len(counts)]
    notes = note_on_balance(names, np.array(counts), FLAGS)
    assert bool(notes) == bool(some)
    assert not some or f"few training images: {some}" in notes[0]
    assert not some or notes[0].endswith("see --sampler balanced, --select_best macro_recall.")
    assert note_on_balance(names, np.array(counts), []) == []


@pytest.mark.parametrize(
    "options, flags",
    [
        ({}, "see --sampler balanced or --class_weights balanced, --select_best macro_recall."),
        ({"sampler": "balanced"}, "see --select_best macro_recall."),
        ({"class_weights": "balanced"}, "see --select_best macro_recall."),
        ({"select_best": "macro_f1"}, "see --sampler balanced or --class_weights balanced."),
        ({"select_best": "macro_f1", "sampler": "balanced"}, None),
    ],
)
def test_flags_that_are_in_use_are_not_suggested(options, flags, tmp_path):
    write(tmp_path, *(f"train/a/{i}.jpg" for i in range(30)), "train/b/1.jpg", "train/b/2.jpg")
    write(tmp_path, "val/a/1.jpg", "val/b/1.jpg")
    notes = [note for note in open_data(Recipe(data_dir=str(tmp_path), **options)).notes if "few training" in note]
    assert [note[note.index("see ") :] for note in notes] == ([flags] if flags else [])
