"""What names mean, and the two forms of Unicode in which a system may write them."""

import unicodedata

import pytest

from effnet_hf.data.names import beside_roles, role_of, roles_in
from effnet_hf.data.opening import open_data
from effnet_hf.errors import UserError
from effnet_hf.recipes import Recipe


@pytest.mark.parametrize(
    "name, roles, others",
    [
        ("train ", {"train"}, []),
        ("test1", {"test"}, []),
        ("val2017", {"val"}, []),
        ("trainA", {"train"}, ["a"]),
        ("TestData", {"test"}, []),
        ("TRAINset", {"train"}, []),
        ("VOC2012train", {"train"}, ["voc"]),
        ("train_and_val", {"train", "val"}, ["and"]),
        ("test_tube", {"test"}, ["tube"]),
        ("trainer", set(), ["trainer"]),
        ("Devon", set(), ["devon"]),
        ("7", set(), []),
    ],
)
def test_the_words_of_a_name_speak_of_splits(name, roles, others):
    assert roles_in(name) == roles and beside_roles(name) == others


def test_a_split_has_blanks_around_its_name_and_no_digit():
    assert [role_of(name) for name in ("train ", " VALID", "test1")] == ["train", "val", None]


def opened(folder, text):
    (folder / "list.csv").write_text(text, encoding="utf-8")
    return open_data(Recipe(labels=str(folder / "list.csv"), data_dir=str(folder)), train=False)


@pytest.mark.parametrize("form, other", [("NFC", "NFD"), ("NFD", "NFC")])
def test_files_of_a_list_are_found_in_either_form_of_unicode(tmp_path, form, other):
    names = [unicodedata.normalize(form, f"café/ü{number}.jpg") for number in range(3)]
    for name in [*names, "café.jpg"]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"image")
    listed = [unicodedata.normalize(other, name) for name in [*names, "café/gone.jpg"]]
    source = opened(tmp_path, "path,label\n" + "".join(f"{name},{'ab'[i % 2]}\n" for i, name in enumerate(listed)))
    assert [source.val.read(i) for i in range(3)] == [b"image"] * 3
    assert source.val.name(0).endswith(names[0]) and "1 of 4 files of" in " ".join(source.notes)
    with pytest.raises(UserError, match="none of the 2 files of"):
        opened(tmp_path, f"path,label\n{listed[3]},a\nu\u0308/1.jpg,b\n")


@pytest.mark.parametrize("form, other", [("NFC", "NFD"), ("NFD", "NFC")])
def test_metadata_beside_class_folders_may_spell_their_files_otherwise(tmp_path, form, other):
    names = [unicodedata.normalize(form, f"{label}/ü.jpg") for label in ("café", "tee")]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"image")
    rows = [f"{unicodedata.normalize(other, name)},{name.split('/')[0]}" for name in names]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,label", *rows]), encoding="utf-8")
    source = open_data(Recipe(data_dir=str(tmp_path)), train=False)
    assert source.class_names == ["café", "tee"] and not source.notes
    assert [source.val.name(i) for i in range(2)] == [str(tmp_path / name) for name in names]
