"""The images that an export is proved on: one unreadable file is passed over, counted and said, as in validation."""

import shutil

import numpy as np
import pytest

from effnet_hf.errors import UserError
from effnet_hf.export.check import FolderImages, MirroredPairs

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
    whole = FolderImages(str(data), NAMES)
    pixels = [np.asarray(image) for batch in whole.batches((1, 8)) for image in batch]
    spoil(data, f"val/bird/{first_of(data / 'val/bird')}")
    images = FolderImages(str(data), NAMES)
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
    batches = list(MirroredPairs(FolderImages(str(data), NAMES)).batches((1, 2)))
    assert [len(batch) for batch in batches] == [1] + [2] * 22
    for image, mirrored in batches[1:]:
        assert np.array_equal(np.asarray(image)[:, ::-1], np.asarray(mirrored))


def test_too_many_are_one_sentence_without_flags_that_export_lacks(data):
    for path in (data / "val/cat").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="2 of 24 images are unreadable, more than one in a hundred") as raised:
        list(FolderImages(str(data), NAMES).batches((8,)))
    assert "--" not in str(raised.value)


def test_no_image_at_all_is_one_sentence(data):
    for path in (data / "val").glob("*/*"):
        path.unlink()
    for name in NAMES:
        (data / "val" / name / "1.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 1 images can be read; the last: .*1.jpg"):
        list(FolderImages(str(data), NAMES, count=1).batches((8,)))
