import os
import shutil
import unicodedata

import datasets
import pytest

from effnet_hf.data import DataSource
from effnet_hf.data.folder import list_images, open_folder, scan_tree, survey_tree
from effnet_hf.data.splits import find_splits
from effnet_hf.errors import UserError
from effnet_hf.manifest import write_manifest
from effnet_hf.run_folder import MARK

from .torture import encode, photo


JPEG = encode(photo(0, 20, 20), "JPEG")


def write(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(JPEG)


def splits_of(root, **options):
    found = find_splits(root, **{"train": False, **options})
    return found.train, found.val


def test_classes_and_files_are_sorted_and_hidden_ones_left_out(tmp_path):
    write(tmp_path, "b/2.jpg", "b/1.PNG", "a/x.jpeg", "b/.hidden.jpg", ".git/c.jpg", "a/.ipynb_checkpoints/x.jpg")
    tree = scan_tree(tmp_path)
    assert tree.classes == ["a", "b"] and tree.labels == [0, 1, 1]
    assert [os.path.relpath(path, tmp_path) for path in tree.paths] == ["a/x.jpeg", "b/1.PNG", "b/2.jpg"]
    assert tree.notes == []


def test_it_opens_as_a_dataset_with_class_labels(pictures):
    dataset, _ = open_folder(pictures / "train")
    assert dataset.features["label"].names == ["bird", "cat", "dog"] and len(dataset) == 60
    decoded = dataset.cast_column("image", datasets.Image())
    assert decoded[0]["image"].size == photo(0, 60, 90).size and decoded[59]["label"] == 2


def test_notes_name_what_was_left_out_and_what_lies_deeper(tmp_path):
    write(tmp_path, "loose.jpg", "a/1.jpg", "a/deep/er/2.jpg", "b/1.jpg", "b/notes.txt")
    notes = " ".join(scan_tree(tmp_path).notes)
    assert "1 image in" in notes and "1 file under" in notes and "notes.txt" in notes
    assert "1 image under" in notes and "deeper than a class folder" in notes


def both(*folders):
    return [f"{folder}/{name}/1.jpg" for folder in folders for name in "ab"]


@pytest.mark.parametrize(
    "names, message",
    [
        ([], "holds no images and no class folders"),
        (["1.jpg", "2.jpg"], "holds 2 images and no class folders"),
        (["a/x.txt"], "there are no images under"),
        (["Cat/1.jpg", "cat/1.jpg"], "differ only in case, Cat and cat; merge or rename them"),
        (["cat/1.jpg", "cat /1.jpg", "dog/1.jpg"], "differ only in blanks, 'cat' and 'cat '; merge or rename them"),
        (["cat/1.jpg", " Cat/1.jpg", "dog/1.jpg"], "differ only in blanks, ' Cat' and 'cat'; merge or rename them"),
        (["set/train/a/1.jpg", "set/train/b/1.jpg"], "holds a whole data set in set/; give that folder"),
        # One folder too high.
        (
            ["Pets/Cat/1.jpg", "Pets/Dog/1.jpg", "readme.txt"],
            "the folders of .* lie in Pets/; give that folder: .*/Pets,",
        ),
        (
            ["Pets/Cat/1.jpg", "Pets/Dog/1.jpg", "Notes/1.txt"],
            "lie in Pets/; give that folder: .*/Pets, or move its",
        ),
        (["R/Data/C/train/a/1.jpg", "R/Data/C/val/a/1.jpg", "R/Sets/1.txt"], "lie in R/Data/C/; give .*/R/Data/C, or"),
        (["R/x/Cat/1.jpg", "R/x/Dog/u/1.jpg"], "lie in R/x/; give that folder: .*/R/x, or move its folders up"),
        # Splits of any name.
        (
            both("fold1", "fold2"),
            r"fold1/ and fold2/ with the same folders in them \(a/, b/\): splits or classes\? Call",
        ),
        (both("learn", "holdout"), "Call splits train/ and val/, or one train/ .* with --val_split learn; or give one"),
        (
            both("color", "grayscale", "segmented"),
            "color/ and grayscale/ with the same folders .* alone: .*/color. If t",
        ),
        (both("public/images", "private/images"), "private/ and public/ with the same folders in them"),
        ([*both("x", "y"), "x/c/1.jpg", "cat/1.jpg"], r"x/ and y/ with the same folders in them \(a/, b/\)"),
        ([*both("x", "y"), "x/c/1.jpg", "y/d/1.jpg"], "x/ and y/ with the same folders in them"),
        (["x/A/1.jpg", "x/b/1.jpg", "y/a/1.jpg", "y/B/1.jpg", "y/c/1.jpg"], r"x/ and y/ .* in them \(A/, b/\): splits"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(tmp_path, names, message):
    write(tmp_path, *names)
    with pytest.raises(UserError, match=message):
        scan_tree(tmp_path)


@pytest.mark.parametrize(
    "names, classes",
    [
        (["a/x/1.jpg", "a/y/1.jpg", "b/x/1.jpg", "b/z/1.jpg"], ["a", "b"]),  # one name in common
        (["a/x/1.jpg", "b/x/1.jpg"], ["a", "b"]),
        (["a/x/1.jpg", "a/y/1.jpg", "b/1.jpg"], ["a", "b"]),
        (["a/2.jpg", "a/x/1.jpg", "a/y/1.jpg"], ["a"]),  # has images of its own
        ([f"{name}/{label}{name}/1.jpg" for name in "ab" for label in "xyz"], ["a", "b"]),
    ],
)
def test_folders_in_a_class_may_be_called_anything_else(tmp_path, names, classes):
    write(tmp_path, *names)
    assert scan_tree(tmp_path).classes == classes


def test_what_lies_in_a_split_are_classes_whatever_they_hold(tmp_path):
    sides = [
        f"{split}/{name}/{side}/1.jpg" for split in ("train", "val") for name in "ab" for side in ("left", "right")
    ]
    write(tmp_path, *sides, "valid/cat/x/1.jpg", "valid/cat/y/1.jpg")
    assert scan_tree(tmp_path / "train").classes == scan_tree(tmp_path / "val").classes == ["a", "b"]
    assert scan_tree(tmp_path / "valid").classes == ["cat"]


def test_empty_class_folders_are_named(tmp_path):
    write(tmp_path, "a/1.jpg")
    (tmp_path / "b").mkdir()
    (tmp_path / "c").mkdir()
    with pytest.raises(UserError, match=r"class folder .*/b holds no images \(and 1 more\); fill or remove it"):
        scan_tree(tmp_path)


def test_linked_folders_are_followed_and_loops_are_named(tmp_path):
    write(tmp_path, "far/1.jpg", "data/a/1.jpg")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "far")
    assert scan_tree(tmp_path / "data").classes == ["a", "b"]
    (tmp_path / "data" / "a" / "again").symlink_to(tmp_path / "data")
    with pytest.raises(UserError, match=r"data/a/again links back to a folder above it; remove that symbolic link"):
        scan_tree(tmp_path / "data")


def test_links_that_lead_to_one_folder_twice_are_named(tmp_path):
    """A chain of thirty such links would be a billion folders of one image."""
    write(tmp_path, "far/1.jpg", "data/a/1.jpg", "data/b/1.jpg")
    for name in ("data/a/p", "data/b/p"):
        (tmp_path / name).symlink_to(tmp_path / "far")
    assert len(scan_tree(tmp_path / "data").paths) == 4  # one image may belong to two classes
    (tmp_path / "data/a/q").symlink_to(tmp_path / "far")
    for look in (scan_tree, list_images):
        with pytest.raises(UserError, match=r"data/(a|b)/(p|q) are one folder; remove one of the symbolic links"):
            look(tmp_path / "data")


def test_endless_folders_are_named(tmp_path):
    write(tmp_path, "a/1.jpg")
    deep = tmp_path / "a"
    for _ in range(150):
        deep = deep / "d"
    deep.mkdir(parents=True)
    for look in (scan_tree, list_images):
        with pytest.raises(UserError, match="has folders more than 100 deep in one another"):
            look(tmp_path)


def test_a_name_that_is_not_utf8_is_named(tmp_path):
    write(tmp_path, "a/1.jpg", "b/1.jpg")
    try:
        with open(os.fsencode(tmp_path) + b"/a/\xff.jpg", "wb"):
            pass
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(UserError, match="is not valid UTF-8; rename it"):
        open_folder(tmp_path)


def mark(folder):
    """What a training run does first in its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text("{}")


def test_the_folders_of_runs_are_no_classes(tmp_path):
    write(tmp_path, "a/1.jpg", "b/1.jpg", "exp1/plots/curves.png", "b/exp2/ema/plot.png")
    assert scan_tree(tmp_path).classes == ["a", "b", "exp1"]
    mark(tmp_path / "exp1")
    mark(tmp_path / "b" / "exp2")
    tree = scan_tree(tmp_path)
    assert tree.classes == ["a", "b"] and len(tree.paths) == 2
    assert tree.notes == [f"passed over, a training run's: {tmp_path}/b/exp2 (and 1 more)."]
    assert splits_of(tmp_path) == (None, tmp_path)


def test_a_folder_that_a_run_has_just_locked_is_no_class(tmp_path):
    write(tmp_path, "a/1.jpg", "b/1.jpg")
    (tmp_path / "exp1").mkdir()
    (tmp_path / "exp1" / ".lock").touch()
    (tmp_path / "a" / ".lock").touch()  # of whoever locks a class
    tree = scan_tree(tmp_path)
    assert tree.classes == ["a", "b"] and tree.runs == [f"{tmp_path}/exp1"]
    (tmp_path / "exp1" / ".lock").unlink()
    with pytest.raises(UserError, match="exp1 holds no images"):
        scan_tree(tmp_path)


def exported(folder):
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"model")
    write_manifest(folder)


def test_a_model_beside_the_classes_is_none(tmp_path):
    write(tmp_path, "a/1.jpg", "b/1.jpg")
    exported(tmp_path / "onnx")
    tree = scan_tree(tmp_path)
    assert tree.classes == ["a", "b"]
    assert tree.notes == [f"passed over, a converted or exported model's: {tmp_path}/onnx."]
    write(tmp_path, "onnx/1.jpg")  # a user's, in a class of that name
    assert scan_tree(tmp_path).classes == ["a", "b", "onnx"]
    write(tmp_path, "web/manifest.json")  # somebody else's
    with pytest.raises(UserError, match="web holds no images"):
        scan_tree(tmp_path)


def test_a_model_beside_the_only_validation_folder_changes_nothing(tmp_path):
    write(tmp_path, "val/a/1.jpg", "val/b/1.jpg")
    exported(tmp_path / "onnx")
    assert splits_of(tmp_path) == (None, tmp_path / "val")


def test_a_run_in_the_data_folder_itself_leaves_no_classes(tmp_path):
    write(tmp_path, "a/1.jpg", "b/1.jpg", "plots/curves.png", "checkpoints/update-00000001/x.png")
    mark(tmp_path)
    assert scan_tree(tmp_path).classes == ["a", "b"]
    write(tmp_path / "set", "train/a/1.jpg", "val/a/1.jpg", "plots/curves.png")
    mark(tmp_path / "set")
    assert splits_of(tmp_path / "set", train=True) == (tmp_path / "set/train", tmp_path / "set/val")


def test_a_run_beside_the_only_validation_folder_changes_nothing(tmp_path):
    write(tmp_path, "val/a/1.jpg", "val/b/1.jpg", "exp/plots/1.png")
    mark(tmp_path / "exp")
    mark(tmp_path / "test")
    assert splits_of(tmp_path) == (None, tmp_path / "val")


def test_images_are_listed_below_any_folder(tmp_path):
    write(tmp_path, "2.jpg", "a/deep/1.PNG", ".hidden/3.jpg", "a/.4.jpg", "notes.txt", "exp/plots/curves.png")
    mark(tmp_path / "exp")
    paths, note = list_images(tmp_path)
    assert [os.path.relpath(path, tmp_path) for path in paths] == ["2.jpg", "a/deep/1.PNG"]
    assert note == f"passed over, a training run's: {tmp_path}/exp."


def test_another_version_with_the_same_folder_times_is_noticed(tmp_path):
    """As `tar --mtime`, `rsync -t` and mounts of object stores give it."""

    def write_version(names):
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        write(tmp_path / "set", *(f"{split}/{name}" for split in ("train", "val") for name in names))
        for folder, _, _ in os.walk(tmp_path / "set"):
            os.utime(folder, (1_600_000_000,) * 2)

    def found(train):
        source = DataSource.from_folder(str(tmp_path / "set"), train=train)
        return source.class_names, len(source.val), len(source.train or ())

    write_version(["a/1.jpg", "b/1.jpg", "c/1.jpg"])
    assert [found(True), found(False)] == [(["a", "b", "c"], 3, 3), (["a", "b", "c"], 3, 0)]
    write_version(["a/1.jpg", "a/2.jpg", "b/1.jpg", "c/3.jpg", "d/1.jpg"])
    assert [found(True), found(False)] == [(["a", "b", "c", "d"], 5, 5), (["a", "b", "c", "d"], 5, 0)]


JUNK = "@eaDir/1.jpg __MACOSX/1.jpg .ipynb_checkpoints/1.jpg a/._1.jpg a/@eaDir/1.jpg a/.ipynb_checkpoints/1.jpg"
JUNK_FILES = "Thumbs.db a/Thumbs.db a/desktop.ini a/.DS_Store val/Thumbs.db"


def test_what_systems_leave_behind_is_no_class_no_image_and_not_spoken_of(tmp_path):
    write(tmp_path, "a/1.jpg", "b/1.jpg", *JUNK.split(), *JUNK_FILES.split()[:-1])
    tree = scan_tree(tmp_path)
    assert tree.classes == ["a", "b"] and len(tree.paths) == 2 and tree.notes == []
    assert [os.path.relpath(path, tmp_path) for path in list_images(tmp_path)[0]] == ["a/1.jpg", "b/1.jpg"]


@pytest.mark.parametrize("ending", ".jpg .JPEG .jpe .jfif .png .ppm .pgm .bmp .gif .tif .TIFF .webp .avif".split())
def test_images_of_every_ending_are_found(tmp_path, ending):
    write(tmp_path, f"a/1{ending}", "b/1.jpg")
    assert len(scan_tree(tmp_path).paths) == 2 and len(list_images(tmp_path)[0]) == 2


def test_two_spellings_of_a_name_in_unicode_are_one_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    write(tmp_path, f"train/{composed}/1.jpg", "train/the/1.jpg", f"val/{decomposed}/2.jpg", "val/the/1.jpg")
    source = DataSource.from_folder(str(tmp_path))
    assert source.class_names == [composed, "the"] and source.val.labels.tolist() == [0, 1]
    assert source.val.read(0) == JPEG and decomposed in source.val.name(0)  # opened by its real name
    write(tmp_path, f"train/{decomposed}/2.jpg")
    tree = scan_tree(tmp_path / "train")
    assert tree.classes == [composed, "the"] and tree.labels == [0, 0, 1]
    assert "spelt alike in Unicode: one class" in tree.notes[-1]


def test_all_that_is_wrong_is_found(tmp_path):
    write(tmp_path, "Cat/1.jpg", "cat/1.jpg", "set/Training/a/1.jpg")
    (tmp_path / "empty").mkdir()
    problems = survey_tree(tmp_path).problems
    assert len(problems) == 3 and "whole data set in set/" in problems[0] and "differ only in case" in problems[1]
    assert "empty holds no images" in problems[2]


def test_data_dir_must_be_a_folder(tmp_path):
    write(tmp_path, "file.jpg")
    with pytest.raises(UserError, match=r"--data_dir .*nothing does not exist"):
        find_splits(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"--data_dir .*file.jpg is a file"):
        find_splits(tmp_path / "file.jpg")
    with pytest.raises(UserError, match="--data_dir is empty; name a folder of images"):
        find_splits("")
    with pytest.raises(UserError, match="cannot be opened: File name too long"):
        find_splits(tmp_path / ("x" * 300))


def test_home_may_be_written_short(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "set/train/a/1.jpg", "set/train/b/1.jpg", "set/val/a/1.jpg")
    assert splits_of("~/set", train=True) == (tmp_path / "set/train", tmp_path / "set/val")
    assert (
        len(DataSource.from_folder("~/set").train) == 2 and len(DataSource.from_folder("~/set", train=False).val) == 1
    )
