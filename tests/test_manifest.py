"""Every damage of a folder is noticed and named."""

import random
import shutil

import pytest

from effnet_hf.errors import UserError
from effnet_hf.files import atomic_folder
from effnet_hf.manifest import MANIFEST, _text, foreign_file, problem, read_manifest, write_manifest
from effnet_hf.training.state import READ


@pytest.fixture
def folder(tmp_path):
    with atomic_folder(tmp_path / "a") as folder:
        (folder / "weights.bin").write_bytes(random.Random(0).randbytes(200))
        (folder / "config.json").write_text('{"a": 1}\n')
        (folder / "empty").touch()
        (folder / "best").mkdir()
        (folder / "best" / "x").write_text("x")
    return tmp_path / "a"


def files(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def test_what_was_written_is_whole(folder):
    assert problem(folder) is None and foreign_file(folder) is None
    assert list(read_manifest(folder)) == ["best/x", "config.json", "empty", "weights.bin"]


def test_a_flipped_bit_is_noticed_and_named(folder, record_property):
    tries = 0
    for path in files(folder):
        content = path.read_bytes()
        for bit in range(0, 8 * len(content), 3 if path.name == MANIFEST else 17):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            found = problem(folder)
            assert found is not None and path.name in found, (path, bit)
            tries += 1
        path.write_bytes(content)
    record_property("tries", tries)
    assert problem(folder) is None


@pytest.mark.parametrize("damage", ["emptied", "halved", "zeroed", "removed", "swapped", "longer"])
def test_damaged_files_are_named(folder, damage, tmp_path):
    for path in files(folder):
        content = path.read_bytes()
        if not content and damage in ("emptied", "halved", "zeroed", "swapped"):
            continue
        other = folder / ("weights.bin" if path.name != "weights.bin" else "config.json")
        before = other.read_bytes()
        if damage == "removed":
            path.unlink()
        elif damage == "swapped":
            path.write_bytes(before)
            other.write_bytes(content)
        else:
            halves = {"emptied": b"", "halved": content[: len(content) // 2], "zeroed": bytes(len(content))}
            path.write_bytes({**halves, "longer": content + b"\0"}[damage])
        found = problem(folder)
        assert found is not None
        assert any(name in found for name in (path.name, other.name if damage == "swapped" else path.name))
        if damage == "swapped":
            other.write_bytes(before)
        path.write_bytes(content)
    assert problem(folder) is None


def test_some_files_may_be_looked_at_alone(folder):
    (folder / "config.json").write_text("{}")
    assert problem(folder, only=("weights.bin",)) is None
    assert problem(folder, only=("config.json",)) == "config.json has 2 bytes, 9 were written"


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a\0b", "\ud800"])
def test_a_manifest_names_nothing_that_is_no_file_of_its_folder(folder, name):
    (folder / MANIFEST).write_text(_text({name: {"size": 1, "sha256": "0" * 64}}))
    with pytest.raises(UserError, match="damaged"):
        read_manifest(folder)


def test_what_would_be_read_and_is_not_in_the_manifest_is_named(folder):
    (folder / MANIFEST).write_text(_text({}))
    assert problem(folder, only=("config.json", "none.json")) == "config.json is not in its manifest.json"
    assert problem(folder, read=READ) == "config.json is not in its manifest.json"
    write_manifest(folder)
    for note in ("notes.txt", ".DS_Store", "eval.json", "mine.yaml", "other.bin", "best/mine.json"):
        (folder / note).touch()
    assert problem(folder, read=READ) is None
    (folder / "best" / "model.safetensors").touch()
    assert problem(folder, read=READ) == "best/model.safetensors is not in its manifest.json"


def test_an_endless_manifest_is_damaged(folder):
    with open(folder / MANIFEST, "wb") as file:
        file.truncate(1 << 40)
    assert problem(folder) == "its manifest.json is damaged"


def test_a_file_of_somebody_else_is_found(folder):
    (folder / "best" / "mine").write_text("")
    assert foreign_file(folder) == "best/mine" and problem(folder) is None
    shutil.rmtree(folder / "best")
    (folder / MANIFEST).unlink()
    assert foreign_file(folder) == "config.json" and problem(folder) == "it has no manifest.json"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2, "files": {}}', "[" * 100_000, "\x00"])
def test_a_manifest_that_is_none_is_damaged(folder, text):
    (folder / MANIFEST).write_text(text)
    assert problem(folder) == "its manifest.json is damaged"
