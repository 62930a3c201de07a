import numpy as np
import pytest

from effnet_hf.data import DataSource
from effnet_hf.data.pictures import BadPicture
from effnet_hf.data.source import split_by_name
from effnet_hf.errors import UserError

from .test_folder import write


def names(split):
    return [split.name(i).rsplit("/", 2)[1:] for i in range(len(split))]


def test_train_and_val_share_one_label_order(tmp_path):
    write(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "val/c/1.jpg")
    source = DataSource.from_folder(str(tmp_path))
    assert source.class_names == ["a", "b", "c"]
    assert source.train.labels.tolist() == [0, 1, 2] and source.val.labels.tolist() == [2]


def test_a_given_label_order_is_kept(tmp_path):
    write(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/b/1.jpg")
    source = DataSource.from_folder(str(tmp_path), class_names=["z", "b", "a"])
    assert source.class_names == ["z", "b", "a"]
    assert source.train.labels.tolist() == [2, 1] and source.val.labels.tolist() == [1]


def test_classes_unknown_to_training_are_named(tmp_path):
    write(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/b/1.jpg", "val/x/1.jpg", "val/y/1.jpg")
    with pytest.raises(UserError, match=r"val has classes that training does not know: x, y; it knows 2, e.g. a, b"):
        DataSource.from_folder(str(tmp_path))


def test_one_class_is_too_few(tmp_path):
    write(tmp_path, "train/a/1.jpg", "val/a/1.jpg")
    with pytest.raises(UserError, match="has a single class folder, a; a classifier needs at least two"):
        DataSource.from_folder(str(tmp_path))


def test_without_validation_pictures_the_flag_is_named(tmp_path):
    write(tmp_path, "a/1.jpg", "b/1.jpg")
    with pytest.raises(UserError, match=r"none of val/, valid/, .*--val_fraction 0.1"):
        DataSource.from_folder(str(tmp_path))


@pytest.mark.parametrize("layout", ["", "train/"])
def test_val_fraction_holds_out_that_share_of_each_class_by_name(tmp_path, layout):
    write(tmp_path, *(f"{layout}{c}/{i:03}.jpg" for c, n in (("a", 50), ("b", 10), ("c", 2)) for i in range(n)))
    source = DataSource.from_folder(str(tmp_path), val_fraction=0.2)
    assert np.bincount(source.val.labels).tolist() == [10, 2, 1]
    assert np.bincount(source.train.labels).tolist() == [40, 8, 1]
    together = names(source.train) + names(source.val)
    assert len({tuple(name) for name in together}) == len(together) == 62
    again = DataSource.from_folder(str(tmp_path), val_fraction=0.2)
    assert names(again.val) == names(source.val)


def test_adding_a_file_moves_at_most_one_other(tmp_path):
    write(tmp_path, *(f"{c}/{i:03}.jpg" for c in "ab" for i in range(40)))
    before = {tuple(n) for n in names(DataSource.from_folder(str(tmp_path), 0.25).val)}
    write(tmp_path, "a/new.jpg")
    after = {tuple(n) for n in names(DataSource.from_folder(str(tmp_path), 0.25).val)}
    assert len(before ^ after) <= 2


def test_validation_only_takes_val_or_the_whole_folder(tmp_path):
    write(tmp_path, "set/train/a/1.jpg", "set/train/b/1.jpg", "set/val/a/9.jpg")
    assert len(DataSource.from_folder(str(tmp_path / "set"), train=False, class_names=["a", "b"]).val) == 1
    assert len(DataSource.from_folder(str(tmp_path / "set/val"), train=False, class_names=["a", "b"]).val) == 1
    whole = DataSource.from_folder(str(tmp_path / "set/train"), train=False)
    assert len(whole.val) == 2 and whole.train is None
    (tmp_path / "set/val").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="has a train/ but none of val/, .*; validation needs one"):
        DataSource.from_folder(str(tmp_path / "set"), train=False)


def test_a_folder_of_nothing_but_val_is_one_to_validate_on(tmp_path):
    write(tmp_path, "val/a/1.jpg", "val/b/1.jpg")
    assert DataSource.from_folder(str(tmp_path), train=False).class_names == ["a", "b"]
    with pytest.raises(UserError, match="has a val/ but no train/; training needs one"):
        DataSource.from_folder(str(tmp_path))
    write(tmp_path, "cat/1.jpg")  # now val may be the name of a class
    with pytest.raises(UserError, match="has val/ with folders in it beside cat/: splits or classes"):
        DataSource.from_folder(str(tmp_path), train=False)


def test_validation_takes_as_many_classes_of_other_names_in_their_order_when_told(tmp_path):
    write(tmp_path, "train/y/1.jpg", "train/x/1.jpg", "val/x/1.jpg", "val/y/1.jpg")
    write(tmp_path, "train/y/2.jpg", "train/x/2.jpg")
    known = {"train": False, "class_names": ["tench", "goldfish"]}
    for fraction, folder in ((0.0, tmp_path), (0.0, tmp_path / "train"), (0.5, tmp_path / "train")):
        with pytest.raises(UserError, match=r"does not know: x, y; .* say --classes_by_position true"):
            DataSource.from_folder(str(folder), fraction, **known)
        source = DataSource.from_folder(str(folder), fraction, **known, classes_by_position=True)
        assert source.class_names == ["tench", "goldfish"] and source.present.tolist() == [0, 1]
        assert any("in order, as --classes_by_position true says, e.g. x is tench" in note for note in source.notes)
        for index in range(len(source.val)):
            assert source.val.label(index) == ["x", "y"].index(source.val.name(index).split("/")[-2])
    (tmp_path / "val/x").rename(tmp_path / "val/a")
    (tmp_path / "val/y").rename(tmp_path / "val/b")
    with pytest.raises(UserError, match="val has classes that training does not know: a, b"):
        DataSource.from_folder(str(tmp_path), classes_by_position=True)


def test_numbered_folders_are_the_numbers_that_a_checkpoint_names(tmp_path):
    """Sorted, its words stand in another order: by position they would all be wrong."""
    write(tmp_path, *(f"val/{number}/1.jpg" for number in range(10)))
    known = ["eight", "five", "four", "nine", "one", "seven", "six", "three", "two", "zero"]
    source = DataSource.from_folder(str(tmp_path), train=False, class_names=known)
    assert source.val.labels.tolist() == [9, 4, 8, 7, 2, 1, 6, 5, 0, 3]
    (note,) = source.notes
    assert note.startswith("classes are matched with the checkpoint's by the numbers that they name, e.g. 0 is zero")


def test_an_ignored_val_fraction_is_noted(tmp_path):
    write(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg")
    assert "--val_fraction 0.5 was ignored" in DataSource.from_folder(str(tmp_path), 0.5).notes[0]


def test_stand_ins_are_of_the_same_class_first_and_depend_on_the_seed_alone(pictures):
    split = DataSource.from_folder(str(pictures)).train
    candidates = list(split.stand_ins(25, seed=3))
    assert [split.labels[i] for i in candidates[:20]] == [1] * 20 and len(set(candidates[:20])) == 20
    assert candidates == list(split.stand_ins(25, seed=3)) != list(split.stand_ins(25, seed=4))
    assert len(candidates) == 52


def test_a_split_of_a_split_still_knows_its_files(pictures):
    split = DataSource.from_folder(str(pictures)).train
    part, rest = split_by_name(split, 0.5, {0: "a", 1: "b", 2: "c"})
    inner, _ = split_by_name(part, 0.5, {0: "a", 1: "b", 2: "c"})
    assert set(map(tuple, names(inner))) < set(map(tuple, names(part)))
    assert inner.read(0) == (pictures / "train" / "/".join(names(inner)[0])).read_bytes()


def test_a_vanished_file_is_bad(tmp_path):
    write(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg")
    split = DataSource.from_folder(str(tmp_path)).train
    (tmp_path / "train/a/1.jpg").unlink()
    with pytest.raises(BadPicture, match="has vanished"):
        split.read(0)
