import json
import os
import signal

import pytest

from effnet_hf import cli
from effnet_hf.commands import scan
from effnet_hf.errors import UserError
from effnet_hf.run_folder import MARK

from . import torture


def test_a_clean_folder_is_summed_up(pictures, capsys):
    assert scan.main([str(pictures), "--num_workers", "1"]) == 0
    text = capsys.readouterr().out
    assert "train: 60 images in 3 classes, 0 unreadable" in text and "val: 21 images in 3 classes" in text
    assert "  per class: 20\n" in text and "bird 20, cat 20, dog 20" in text
    assert "size: median 107 x 71, short side 52 to 80 pixels" in text and "JPEG RGB 51, PNG L 9" in text


def test_bad_files_are_listed_and_counted(tmp_path, capsys):
    fate = torture.write(tmp_path / "data")
    bad = {name for name, kind in fate.items() if kind == "bad"}
    assert scan.main([str(tmp_path / "data"), "--num_workers", "2", "--output", str(tmp_path / "bad.txt")]) == 1
    text = capsys.readouterr().out
    assert f"{len(bad)} unreadable" in text and "note: 2 files under" in text and "per class: 24 (plain) to " in text
    for name in bad:
        assert os.path.basename(name) in text
    assert len((tmp_path / "bad.txt").read_text().splitlines()) == len(bad)


def test_a_long_list_is_cut(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(40):
            (tmp_path / name / f"{i}.jpg").write_bytes(b"")
    assert scan.main([str(tmp_path), "--num_workers", "1"]) == 1
    assert "… and 30 more; --output FILE lists them all" in capsys.readouterr().out


def test_unknown_validation_classes_are_named(tmp_path):
    data = torture.encode(torture.photo(0), "JPEG")
    for name in ("train/a", "train/b", "val/x"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.jpg").write_bytes(data)
    with pytest.raises(UserError, match=r"val has classes that .*train does not know: x\."):
        scan.main([str(tmp_path), "--num_workers", "1"])


def test_the_command_ends_with_one_line_for_a_missing_folder(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: scan.main([str(tmp_path / "nothing")]))
    text = capsys.readouterr().err
    assert ended.value.code == 2 and text.count("\n") == 1 and f"error: {tmp_path}/nothing does not exist" in text


def test_names_move_no_cursor_and_can_be_found_again(tmp_path, capsys):
    for name in ("a\x1b[2J", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "1.jpg").write_bytes(torture.encode(torture.photo(0), "JPEG"))
    (tmp_path / "data/b/tab\tline\n.jpg").write_bytes(b"")
    assert scan.main([str(tmp_path / "data"), "--num_workers", "0", "--output", str(tmp_path / "bad.txt")]) == 1
    text = capsys.readouterr().out
    assert text.replace("\n", "").isprintable() and r"a\x1b[2J 1, b 2" in text and r"b/tab\tline\n.jpg is empty" in text
    name, reason = (tmp_path / "bad.txt").read_text().rstrip("\n").split("\t")
    assert json.loads(name) == f"{tmp_path}/data/b/tab\tline\n.jpg" and reason == "is empty (0 bytes)"


def test_a_run_in_the_folder_is_passed_over_with_a_note(tmp_path, capsys):
    for name in ("a/1.jpg", "b/1.jpg", "run/plots/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(torture.encode(torture.photo(0), "JPEG"))
    (tmp_path / "run" / MARK).write_text("{}")
    assert scan.main([str(tmp_path), "--num_workers", "0"]) == 0
    text = capsys.readouterr().out
    assert "2 images in 2 classes" in text and f"note: passed over, a training run's: {tmp_path}/run." in text


def test_a_process_that_dies_is_one_sentence(tmp_path, monkeypatch):
    for name in ("a/1.jpg", "b/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(torture.encode(torture.photo(0), "JPEG"))
    monkeypatch.setattr("effnet_hf.data.scan.inspect", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match=r"a loader process died \(killed by SIGKILL\); .* lower --num_workers"):
        scan.main([str(tmp_path), "--num_workers", "1"])
