import itertools
import json
import os
import re
import shutil
import signal

import pytest
from PIL import Image

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
    assert f"{len(bad)} unreadable" in text and "note: 1 file under" in text and "per class: 24 (plain) to " in text
    assert re.search(r"refused: .*train: \d+ of \d+ images are unreadable, more than --max_bad_files 0.01", text)
    assert len((tmp_path / "bad.txt").read_text().splitlines()) == len(bad)


def test_a_long_list_is_cut(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(40):
            (tmp_path / name / f"{i}.jpg").write_bytes(b"")
    assert scan.main([str(tmp_path), "--num_workers", "1"]) == 1
    text = capsys.readouterr().out
    assert "… and 70 more like these; --output FILE lists them all" in text and text.count("  bad: ") == 10
    assert "refused: " in text and "80 of 80 images are unreadable, more than --max_bad_files 0.01 allows" in text


def jpeg(root, *names):
    """Another image for every name."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(torture.encode(torture.photo(number), "JPEG"))


def look(capsys, *words):
    status = scan.main([*map(str, words), "--num_workers", "0"])
    return status, capsys.readouterr().out


def test_unknown_validation_classes_are_refused_and_counted_all_the_same(tmp_path, capsys):
    jpeg(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/x/1.jpg")
    status, text = look(capsys, tmp_path)
    assert status == 1 and "train: 2 images in 2 classes" in text and "val: 1 images in 1 classes" in text
    assert re.search(r"^refused: .*val has classes that training does not know: x", text, re.M)


def test_all_that_a_run_would_refuse_is_told(tmp_path, capsys):
    jpeg(tmp_path, "train/Cat/1.jpg", "train/cat/2.jpg", "val/Cat/3.jpg", "val/valid/4.jpg")
    (tmp_path / "train/empty").mkdir()
    (tmp_path / "val/void").mkdir()
    status, text = look(capsys, tmp_path)
    refused = [line for line in text.splitlines() if line.startswith("refused: ")]
    assert status == 1 and len(refused) == 3 and "train: 2 images" in text and "val: 2 images" in text
    assert "differ only in case, Cat and cat" in refused[0] and "train/empty holds no" in refused[1]
    assert "val/void holds no images" in refused[2]


def test_it_says_what_each_split_will_be(tmp_path, capsys):
    jpeg(
        tmp_path, *(f"{split}/{name}/{i}.jpg" for split in ("Train", "valid", "test") for name in "ab" for i in (1, 2))
    )
    status, text = look(capsys, tmp_path)
    assert status == 0 and "Train: 4 images in 2 classes, 0 unreadable; trained on" in text
    assert "valid: 4 images in 2 classes, 0 unreadable; validated on" in text and "unreadable; passed over" in text
    shutil.rmtree(tmp_path / "valid")
    status, text = look(capsys, tmp_path)
    assert status == 0 and "note: the best epoch is chosen on test/, which is then no test of the model" in text
    assert "test: 4 images in 2 classes, 0 unreadable; validated on" in text
    status, text = look(capsys, tmp_path, "--val_fraction", "0.5")
    assert "Train, the rest: 2 images" in text and "Train, the share held out: 2 images" in text
    shutil.rmtree(tmp_path / "test")
    (tmp_path / "Train").rename(tmp_path / "images")
    status, text = look(capsys, tmp_path / "images")
    assert (
        status == 0 and "images: 4 images in 2 classes, 0 unreadable; trained and validated on once it is spl" in text
    )
    assert "hold out a share with --val_fraction 0.1" in text


def test_duplicates_and_classes_with_little_in_them_are_told(tmp_path, capsys):
    jpeg(
        tmp_path,
        *(f"train/{name}/{i}.jpg" for name in "ab" for i in range(30)),
        "train/c/1.jpg",
        "val/a/0.jpg",
        "val/b/1.jpg",
    )
    for name in ("train/b/again.jpg", "val/b/again.jpg"):
        shutil.copy(tmp_path / "train/a/3.jpg", tmp_path / name)
    (tmp_path / "val/a/0.jpg").write_bytes((tmp_path / "train/a/5.jpg").read_bytes())
    status, text = look(capsys, tmp_path)
    assert status == 0 and "  nearly empty: c 1\n" in text
    assert "identical: 2 images are there more than once, byte for byte, in 5 files\n  1 under two labels:" in text
    assert "  1 in two splits:" in text
    assert f"{tmp_path}/train/a/3.jpg (a) = {tmp_path}/train/b/again.jpg (b) and 1 more" in text
    assert f"{tmp_path}/train/a/5.jpg (a) = {tmp_path}/val/a/0.jpg (a)" in text
    assert "note: 1 class (c) with a single image, which is trained on: no validation image." in text


@pytest.mark.parametrize("options", [[], ["--val_fraction", "0.5"]])
def test_two_splits_that_are_one_folder_are_no_shares_and_no_copies(tmp_path, capsys, options):
    jpeg(tmp_path, *(f"far/{name}/{i}.jpg" for name in "ab" for i in range(3)))
    shutil.copy(tmp_path / "far/a/1.jpg", tmp_path / "far/b/1.jpg")
    (tmp_path / "set").mkdir()
    for split in ("train", "val"):
        (tmp_path / "set" / split).symlink_to(tmp_path / "far")
    status, text = look(capsys, tmp_path / "set", *options)
    assert status == 0 and "far: 6 images in 2 classes, 0 unreadable; trained on" in text
    assert "far: 6 images in 2 classes, 0 unreadable; validated on" in text and "share" not in text
    assert "note: 6 validation images are trained on too, the same file in both: the figures" in text
    assert "identical: 1 image is there more than once, byte for byte, in 4 files\n  1 under two labels:" in text


def test_it_names_the_folder_that_is_meant(tmp_path, capsys):
    jpeg(tmp_path, *(f"Pets/{name}/{i}.jpg" for name in ("Cat", "Dog") for i in range(3)))
    for options in ([], ["--val_fraction", "0.5"]):
        status, text = look(capsys, tmp_path, *options)
        assert (
            status == 1 and f"refused: the folders of {tmp_path} lie in Pets/; give that folder: {tmp_path}/Pe" in text
        )
        assert "--val_fraction" not in text


def test_json_has_all_of_it(tmp_path, capsys):
    jpeg(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg", "val/b/4.jpg")
    (tmp_path / "train/a/bad.jpg").write_bytes(b"")
    shutil.copy(tmp_path / "train/a/1.jpg", tmp_path / "val/b/5.jpg")
    status, text = look(capsys, tmp_path, "--json")
    found = json.loads(text)
    train, val = found["splits"]
    assert status == 1 and train["classes"] == {"a": 2, "b": 1} and val["classes"] == {"a": 1, "b": 2}
    assert train["bad"] == [{"name": f"{tmp_path}/train/a/bad.jpg", "reason": "is empty (0 bytes)"}]
    assert train["use"] == "trained on" and train["kinds"] == {"JPEG RGB": 2} and found["refused"] == []
    assert [(each["name"], each["class"]) for each in found["copies"][0]] == [
        (f"{tmp_path}/train/a/1.jpg", "a"),
        (f"{tmp_path}/val/b/5.jpg", "b"),
    ]


def test_a_list_of_images_is_scanned_like_folders(tmp_path, capsys):
    jpeg(tmp_path, *(f"{i}.jpg" for i in range(8)))
    (tmp_path / "labels.csv").write_text("path,label\n" + "".join(f"{i}.jpg,{'ab'[i % 2]}\n" for i in range(8)))
    status, text = look(capsys, tmp_path, "--labels", tmp_path / "labels.csv", "--val_fraction", "0.25")
    assert status == 0 and "train: 6 images in 2 classes" in text and "val: 2 images in 2 classes" in text


def test_labels_that_are_swapped_in_one_split_show_in_the_drawing(tmp_path, capsys):
    colours = {"train/a": "red", "train/b": "blue", "val/a": "blue", "val/b": "red"}
    for place, colour in colours.items():
        (tmp_path / "set" / place).mkdir(parents=True)
        Image.new("RGB", (40, 40), colour).save(tmp_path / "set" / place / "0.png")
    look(capsys, tmp_path / "set", "--save_plot", tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as plot:
        x = int(0.17 * plot.width) + 30
        down = [plot.convert("RGB").getpixel((x, y)) for y in range(plot.height)]
    named = {(255, 0, 0): "red", (0, 0, 255): "blue"}
    rows = [
        colour for colour, _ in itertools.groupby(named.get(pixel) for pixel in down if pixel in {*named, (255,) * 3})
    ]
    assert [colour for colour in rows if colour] == ["red", "blue", "blue", "red"]


def test_samples_of_every_class_are_drawn(tmp_path, capsys):
    jpeg(tmp_path / "set", *(f"train/{name}/{i}.jpg" for name in ("a", "b $x$", "c") for i in range(3)), "val/a/9.jpg")
    (tmp_path / "set/train/c/bad.jpg").write_bytes(b"")
    status, _ = look(capsys, tmp_path / "set", "--save_plot", tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as plot:
        assert status == 1 and plot.width > 800 and plot.height > 200
        assert len(plot.convert("RGB").getcolors(1 << 20)) > 1000  # photographs and not a blank page
    with pytest.raises(UserError, match=r"--save_plot .*plot.exe: end its name in .png"):
        look(capsys, tmp_path / "set", "--save_plot", tmp_path / "plot.exe")


def test_something_to_scan_is_named():
    with pytest.raises(UserError, match="nothing to scan: name a folder, --labels FILE.csv or --dataset_name"):
        scan.main([])


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
    monkeypatch.setattr("effnet_hf.data.scan.inspect", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match=r"a loader process died \(killed by SIGKILL\); .* lower --num_workers"):
        scan.main([str(tmp_path), "--num_workers", "1"])
