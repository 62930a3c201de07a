import os
import shutil
import time

import datasets
import pytest

from effnet_hf.data import DataSource
from effnet_hf.data import folder as folder_module
from effnet_hf.data.folder import find_splits, list_images, open_folder, scan_tree
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


def age(root):
    """Makes a tree old enough for its list to be remembered."""
    for path, _, _ in os.walk(root):
        os.utime(path, (time.time() - 100,) * 2)


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


@pytest.mark.parametrize(
    "names, message",
    [
        ([], "holds no images and no class folders"),
        (["1.jpg", "2.jpg"], "holds 2 images and no class folders"),
        (["a/x.txt"], "there are no images under"),
        (["Cat/1.jpg", "cat/1.jpg"], "differ only in case, Cat and cat; merge or rename them"),
        (["set/train/a/1.jpg", "set/train/b/1.jpg"], "holds a whole data set in set/; give that folder"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(tmp_path, names, message):
    write(tmp_path, *names)
    with pytest.raises(UserError, match=message):
        scan_tree(tmp_path)


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
    assert find_splits(tmp_path) == (tmp_path, None)


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
    assert find_splits(tmp_path) == (tmp_path / "train", tmp_path / "val")


def test_a_remembered_list_forgets_a_model_that_is_one_no_more(tmp_path):
    write(tmp_path, "a/1.jpg", "b/1.jpg")
    exported(tmp_path / "onnx")
    age(tmp_path)
    assert [open_folder(tmp_path)[0].features["label"].names for _ in range(2)] == [["a", "b"]] * 2
    (tmp_path / "onnx/manifest.json").write_text("{}")
    with pytest.raises(UserError, match="onnx holds no images"):
        open_folder(tmp_path)


def test_a_run_in_the_data_folder_itself_leaves_no_classes(tmp_path):
    write(tmp_path, "a/1.jpg", "b/1.jpg", "plots/curves.png", "checkpoints/update-00000001/x.png")
    mark(tmp_path)
    assert scan_tree(tmp_path).classes == ["a", "b"]
    write(tmp_path / "set", "train/a/1.jpg", "val/a/1.jpg", "plots/curves.png")
    mark(tmp_path / "set")
    assert find_splits(tmp_path / "set") == (tmp_path / "set/train", tmp_path / "set/val")


def test_a_run_beside_the_only_validation_folder_changes_nothing(tmp_path):
    write(tmp_path, "val/a/1.jpg", "val/b/1.jpg", "exp/plots/1.png")
    mark(tmp_path / "exp")
    mark(tmp_path / "test")
    assert find_splits(tmp_path) == (tmp_path / "train", tmp_path / "val")


def test_a_remembered_list_forgets_runs_that_begin_and_end(tmp_path):
    write(tmp_path, "a/1.jpg", "b/1.jpg", "exp1/plots/curves.png")

    def classes():
        age(tmp_path)
        open_folder(tmp_path)  # remembers it
        dataset, notes = open_folder(tmp_path)
        return dataset.features["label"].names, len(notes)

    assert classes() == (["a", "b", "exp1"], 1)
    mark(tmp_path / "exp1")
    assert open_folder(tmp_path)[0].features["label"].names == ["a", "b"]
    assert classes() == (["a", "b"], 1)
    (tmp_path / "exp1" / MARK).unlink()
    assert classes() == (["a", "b", "exp1"], 1)


def test_images_are_listed_below_any_folder(tmp_path):
    write(tmp_path, "2.jpg", "a/deep/1.PNG", ".hidden/3.jpg", "a/.4.jpg", "notes.txt", "exp/plots/curves.png")
    mark(tmp_path / "exp")
    paths, note = list_images(tmp_path)
    assert [os.path.relpath(path, tmp_path) for path in paths] == ["2.jpg", "a/deep/1.PNG"]
    assert note == f"passed over, a training run's: {tmp_path}/exp."


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_validation_folders_of_three_names_are_found(tmp_path, name):
    write(tmp_path, "train/a/1.jpg", f"{name}/a/1.jpg")
    assert find_splits(tmp_path) == (tmp_path / "train", tmp_path / name)


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
    assert find_splits("~/set") == (tmp_path / "set/train", tmp_path / "set/val")
    assert (
        len(DataSource.from_folder("~/set").train) == 2 and len(DataSource.from_folder("~/set", train=False).val) == 1
    )


def test_the_second_open_reads_the_list_and_notices_every_change(tmp_path, monkeypatch):
    write(tmp_path, "a/1.jpg", "a/sub/2.jpg", "b/1.jpg")
    age(tmp_path)
    scans = []
    monkeypatch.setattr(folder_module, "scan_tree", lambda root, scan=scan_tree: scans.append(root) or scan(root))

    def paths():
        return [os.path.relpath(row["path"], tmp_path) for row in open_folder(tmp_path)[0]["image"]]

    first = paths()
    assert paths() == first and len(scans) == 1
    for change in (
        lambda: write(tmp_path, "b/2.jpg"),
        lambda: (tmp_path / "a" / "sub" / "2.jpg").rename(tmp_path / "a" / "sub" / "3.jpg"),
        lambda: (tmp_path / "a" / "1.jpg").unlink(),
        lambda: write(tmp_path, "c/1.jpg"),
        lambda: shutil.rmtree(tmp_path / "c"),
    ):
        age(tmp_path)
        paths()
        before = len(scans)
        change()
        assert paths() == [os.path.relpath(path, tmp_path) for path in scan_tree(tmp_path).paths]
        assert len(scans) == before + 1


def test_a_tree_that_has_just_changed_is_not_remembered(tmp_path):
    write(tmp_path, "a/1.jpg", "b/1.jpg")
    open_folder(tmp_path)
    assert not folder_module._cache_path(os.path.realpath(tmp_path)).exists()


def test_a_broken_list_is_ignored(tmp_path):
    write(tmp_path, "a/1.jpg", "b/1.jpg")
    age(tmp_path)
    open_folder(tmp_path)
    folder_module._cache_path(os.path.realpath(tmp_path)).write_bytes(b"nonsense")
    assert len(open_folder(tmp_path)[0]) == 2


@pytest.mark.slow
def test_a_tree_of_imagenets_shape_opens_in_seconds(tmp_path):
    """1,000 classes of 300 hard-linked files: under 5 s, the second time under 1 s."""
    (tmp_path / "one.jpg").write_bytes(JPEG)
    links = 0
    source = tmp_path / "one.jpg"
    for label in range(1000):
        folder = tmp_path / "tree" / f"n{label:08}"
        folder.mkdir(parents=True)
        for i in range(300):
            if links == 60_000:  # ext4 allows 65,000 links to a file
                source = folder / "source.jpg"
                source.write_bytes(JPEG)
                links = 0
                source.rename(tmp_path / f"{label}.jpg")
                source = tmp_path / f"{label}.jpg"
            os.link(source, folder / f"{i:04}.JPEG")
            links += 1
    age(tmp_path / "tree")
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        dataset, _ = open_folder(tmp_path / "tree")
        seconds.append(time.perf_counter() - started)
        assert len(dataset) == 300_000
    print(f"first {seconds[0]:.2f} s, second {seconds[1]:.3f} s")
    assert seconds[0] < 5 and seconds[1] < 1
