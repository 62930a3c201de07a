"""The images that an export is proved on: one unreadable file is passed over, counted and said, as in validation."""

import re
import shutil

import numpy as np
import pytest

from effnet_hf.errors import UserError
from effnet_hf.export.check import FolderImages, MirroredPairs
from effnet_hf.recipes import Recipe

from .conftest import NAMES


@pytest.fixture
def data(photos, tmp_path):
    return shutil.copytree(photos, tmp_path / "photos")


def spoil(folder, *names):
    for name in names:
        (folder / name).write_bytes(b"")


def first_of(folder):
    return sorted(path.name for path in folder.iterdir())[0]


def test_an_unreadable_image_is_passed_over_with_its_label(data, caplog):
    whole = FolderImages(Recipe(data_dir=str(data)), NAMES)
    pixels = [np.asarray(image) for batch in whole.batches((1, 8)) for image in batch]
    spoil(data, f"val/bird/{first_of(data / 'val/bird')}")
    images = FolderImages(Recipe(data_dir=str(data)), NAMES)
    batches = list(images.batches((1, 8)))
    assert [len(batch) for batch in batches] == [1, 8, 8, 6] and len(images) == 24
    assert images.labels.tolist() == whole.labels.tolist()[1:]
    assert images.description == "23 images of photos"
    found = [np.asarray(image) for batch in batches for image in batch]
    assert all(np.array_equal(a, b) for a, b in zip(found, pixels[1:], strict=True))
    assert np.array_equal(np.asarray(images.open(0)), pixels[1])
    assert len(caplog.records) == 1 and "is empty (0 bytes); it is passed over" in caplog.text


def test_pairs_stay_pairs(data):
    spoil(data, f"val/bird/{first_of(data / 'val/bird')}")
    batches = list(MirroredPairs(FolderImages(Recipe(data_dir=str(data)), NAMES)).batches((1, 2)))
    assert [len(batch) for batch in batches] == [1] + [2] * 22
    for image, mirrored in batches[1:]:
        assert np.array_equal(np.asarray(image)[:, ::-1], np.asarray(mirrored))


def test_too_many_are_one_sentence_without_flags_that_export_lacks(data):
    for path in (data / "val/cat").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="2 of 24 images are unreadable, more than one in a hundred") as raised:
        list(FolderImages(Recipe(data_dir=str(data)), NAMES).batches((8,)))
    assert "--" not in str(raised.value)


def test_no_image_at_all_is_one_sentence(data):
    for path in (data / "val").glob("*/*"):
        path.unlink()
    for name in NAMES:
        (data / "val" / name / "1.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 1 images can be read; the last: .*1.jpg"):
        list(FolderImages(Recipe(data_dir=str(data)), NAMES, count=1).batches((8,)))


@pytest.mark.parametrize(  # folders are listed by name
    "names, labels, said",
    [
        (("2", "0", "1"), [0, 1, 2], "by index, e.g. 0 is bird"),
        (("Cat", "dog", "BIRD"), [0, 1, 2], "without regard to case"),
        (("a", "b", "c"), None, "is not measured: .* does not know: a, b, c; .* say --classes_by_position true"),
        (("cat", "dog", "elk"), None, "is not measured: .* does not know: elk; .* Name them as it does"),
    ],
)
def test_labels_are_the_models_or_their_lack_is_said(names, labels, said, data):
    """The names are of the folders of bird, cat and dog."""
    for old, new in zip(NAMES, names, strict=True):
        (data / "val" / old).rename(data / "val" / f"_{new}")
    for path in (data / "val").iterdir():
        path.rename(path.with_name(path.name[1:]))
    images = FolderImages(Recipe(data_dir=str(data)), NAMES)
    list(images.batches((8,)))
    expected = None if labels is None else [label for label in labels for _ in range(8)]
    assert (images.labels if labels is None else images.labels.tolist()) == expected
    assert re.search(said, "\n".join(images.notes))


def test_a_flag_that_cannot_be_followed_is_an_error(data):
    (data / "val/dog").rename(data / "val/elk")
    with pytest.raises(UserError, match="does not know: elk"):
        FolderImages(Recipe(data_dir=str(data), classes_by_position=True), NAMES)
    for old, new in zip(("bird", "cat", "elk"), "abc", strict=True):
        (data / "val" / old).rename(data / "val" / new)
    images = FolderImages(Recipe(data_dir=str(data), classes_by_position=True), NAMES)
    assert images.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8


def test_images_of_a_list_have_the_labels_that_it_says(data):
    files = [path.relative_to(data) for path in sorted(data.glob("val/*/*"))]
    (data / "list.csv").write_text("".join(f"{file},{file.parts[1]}|zebra\n" for file in files))
    recipe = Recipe(labels=str(data / "list.csv"), label_separator="|")
    images = FolderImages(recipe, ["zebra", *NAMES])
    assert images.description == f"{len(files)} images of list.csv"
    assert images.labels.tolist() == [[1, *(int(name == file.parts[1]) for name in NAMES)] for file in files]
    unknown = FolderImages(recipe, NAMES)
    assert unknown.labels is None and "zebra" in unknown.notes[-1]


def test_a_part_of_a_list_in_any_order_covers_all_classes(data):
    files = [path.relative_to(data) for path in sorted(data.glob("val/*/*"))]
    by_turns = [files[8 * (i % 3) + i // 3] for i in range(24)]  # bird, cat, dog, bird, …
    (data / "list.csv").write_text("".join(f"{file},{file.parts[1]}\n" for file in by_turns))
    images = FolderImages(Recipe(labels=str(data / "list.csv")), NAMES, count=9)  # every third is a bird
    assert sorted(images.labels.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
