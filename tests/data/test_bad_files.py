import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from effnet_hf import EfficientNetNVImageProcessor
from effnet_hf.data import BadFile, BadFiles, BatchPlan, build_loaders
from effnet_hf.data.regions import library
from effnet_hf.data.source import DataSource
from effnet_hf.errors import UserError

from . import torture


PROCESSOR = EfficientNetNVImageProcessor.for_image_size(32)
PLAN = BatchPlan(8)


@pytest.fixture(scope="module")
def tortured(tmp_path_factory):
    """A torture folder that fills whole batches of 8, so that an epoch meets every file, and each file's fate."""
    folder = tmp_path_factory.mktemp("torture")
    fate = torture.write(folder)
    count = 48 + sum(kind != "ignored" for kind in fate.values())
    for i in range(-count % 8):
        (folder / "train" / "plain" / f"more_{i}.jpg").write_bytes(torture.encode(torture.photo(i), "JPEG"))
    return folder, fate


def train(loaders, epochs=2):
    """A classifier of mean colours: enough to go through every batch the way a run does."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, len(loaders.class_names))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for epoch in range(epochs):
        for batch in loaders.train.epoch(epoch):
            loss = torch.nn.functional.cross_entropy(model(batch["pixel_values"].mean((2, 3))), batch["labels"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert len(batch["index"]) == 8 and torch.isfinite(loss)


@pytest.mark.parametrize("loader, workers", [("imagefolder", 0), ("imagefolder", 2), ("dali-cpu", 0), ("dali-cpu", 1)])
def test_the_torture_folder_trains_to_the_end_with_each_file_accounted_for(tortured, recipe, tmp_path, loader, workers):
    if loader == "dali-cpu" and library() is None:
        pytest.skip("nvImageCodec is not installed")
    folder, fate = tortured
    assert sum(kind == "bad" for kind in fate.values()) >= 40
    options = {"loader": loader, "num_workers": workers, "augmentation": "autoaugment", "max_bad_files": 1.0}
    with build_loaders(recipe(data_dir=str(folder), **options), PROCESSOR, PLAN) as ours:
        train(ours)
        found = {os.path.relpath(name, folder) for name in ours.train.bad_files.names}
    bad = {name for name, kind in fate.items() if kind == "bad"}
    assert found == bad and ours.train.num_samples % 8 == 0
    lines = (tmp_path / "run" / "bad_files.txt").read_text().splitlines()
    assert {os.path.relpath(line.split("\t")[0], folder) for line in lines} == bad and len(lines) == len(bad)
    assert all(line.split("\t")[1] for line in lines)


@pytest.mark.slow  # half a minute: the whole of train.py
def test_train_py_ends_well_and_accounts_for_each_file(tmp_path):
    fate = torture.write(tmp_path / "data")
    command = "train.py --config imagenette --image_size 32 --max_bad_files 1 --epochs 3 --ema_decay 0 --quiet true"
    command += " --global_batch_size 8 --per_device_batch_size 8 --num_workers 1 --data_dir data --output_dir run"
    script, *flags = command.split()
    home = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, home / script, *flags], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(home)},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    bad = {name for name, kind in fate.items() if kind == "bad"}
    listed = [line.split("\t")[0] for line in (tmp_path / "run/bad_files.txt").read_text().splitlines()]
    assert len(listed) == len(bad) and {os.path.relpath(name, (tmp_path / "data").resolve()) for name in listed} == bad
    assert f"bad      {len(bad)} unreadable images were replaced or left out: run/bad_files.txt" in ran.stdout
    assert all(ran.stderr.count(f"{name} ") == 1 for name in listed)


def test_a_replacement_has_the_label_of_its_class_and_the_number_of_the_missing_one(tortured, recipe):
    folder, fate = tortured
    split = DataSource.from_folder(str(folder)).train
    with build_loaders(recipe(data_dir=str(folder), max_bad_files=1.0), PROCESSOR, PLAN) as ours:
        batches = list(ours.train.epoch(0))
        again = list(ours.train.epoch(0))
    for batch in batches:
        assert batch["labels"].tolist() == [split.label(i) for i in batch["index"].tolist()]
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(batches, again))


def test_validation_leaves_bad_files_out(tortured, recipe, caplog):
    folder, fate = tortured
    options = recipe(data_dir=str(folder / "train"), max_bad_files=1.0)
    with build_loaders(options, PROCESSOR, PLAN, train=False) as ours:
        seen = Counter(i for batch in ours.val.epoch() for i in batch["index"].tolist())
        bad = sum(kind == "bad" for kind in fate.values())
        assert ours.val.bad_files.count == bad
        assert len(seen) == ours.val.num_samples - bad and set(seen.values()) == {1}
        # Each is named once, however often it is met.
        assert len(caplog.records) == bad
        list(ours.val.epoch())
        assert len(caplog.records) == bad and "is truncated" in caplog.text


def test_strict_stops_at_the_first(tortured, recipe):
    with build_loaders(recipe(data_dir=str(tortured[0]), strict=True), PROCESSOR, PLAN) as ours:
        with pytest.raises(
            UserError, match=r"train/odd/.* (is|cannot|has) .*; mend or remove it, or run without --strict"
        ):
            list(ours.train.epoch(0))


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_stop_the_run(tortured, recipe, workers):
    options = recipe(data_dir=str(tortured[0]), num_workers=workers, max_bad_files=0.05)
    with build_loaders(options, PROCESSOR, PLAN) as ours:
        with pytest.raises(UserError, match=r"\d+ of \d+ images are unreadable, more than --max_bad_files 0.05 allows"):
            list(ours.train.epoch(0))


def test_files_that_vanish_in_the_middle_of_a_run_are_replaced(tmp_path, recipe):
    torture.write(tmp_path / "data")
    for name in torture.bad_files():
        (tmp_path / "data" / "train" / "odd" / name).unlink()
    options = recipe(data_dir=str(tmp_path / "data"), max_bad_files=1.0)
    with build_loaders(options, PROCESSOR, PLAN) as ours:
        list(ours.train.epoch(0))
        before = ours.train.bad_files.count
        for i in range(5):
            (tmp_path / "data" / "train" / "plain" / f"good_00{i}.jpg").unlink()
        batches = list(ours.train.epoch(1)) + list(ours.train.epoch(2))
    assert ours.train.bad_files.count == before + 5
    assert all(len(batch["index"]) == 8 for batch in batches)


def test_a_class_without_a_readable_file_borrows_from_the_others(tmp_path, recipe):
    torture.write(tmp_path / "data")
    for path in (tmp_path / "data" / "train" / "plain").iterdir():
        path.write_bytes(b"")
    options = recipe(data_dir=str(tmp_path / "data"), max_bad_files=1.0)
    with build_loaders(options, PROCESSOR, PLAN) as ours:
        labels = torch.cat([batch["labels"] for batch in ours.train.epoch(0)])
    assert labels.unique().tolist() == [0]


def test_when_nothing_can_be_read_the_run_stops(pictures, tmp_path, recipe):
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(8):
                (tmp_path / "data" / split / name / f"{i}.jpg").write_bytes(b"")
    with build_loaders(recipe(data_dir=str(tmp_path / "data")), PROCESSOR, PLAN) as ours:
        with pytest.raises(UserError, match="of 16 images are unreadable"):
            list(ours.train.epoch(0))


def test_the_list_is_shared_between_processes_and_survives_a_restart(tmp_path):
    path = tmp_path / "run" / "bad_files.txt"
    first, second = (BadFiles(path, 1000) for _ in range(2))
    assert first.report([BadFile("a", "is truncated"), BadFile("a", "is truncated")]) == [BadFile("a", "is truncated")]
    odd = BadFile("b\nc\td", "is empty")
    assert second.report([BadFile("a", "is truncated"), odd]) == [odd]
    assert first.report([odd]) == []
    assert path.read_text() == 'a\tis truncated\n"b\\nc\\td"\tis empty\n'
    restarted = BadFiles(path, 1000)
    assert restarted.report([BadFile("e", "is empty")]) == [BadFile("e", "is empty")] and restarted.count == 3


@pytest.mark.parametrize(
    "name", ["tab\tand\nnewline.jpg", "\x1b[2Jclear.png", '"quoted".jpg', "\udcff.jpg", "back\\n.jpg"]
)
def test_a_list_names_every_file_so_that_it_can_be_found_again(tmp_path, name):
    path = tmp_path / "bad_files.txt"
    BadFiles(path, 100).report([BadFile(name, "is \x1b[31mred")])
    text = path.read_text(encoding="utf-8")
    assert text.isprintable() is False and text.count("\n") == 1 and text.count("\t") == 1  # these two and nothing else
    assert text.replace("\n", "").replace("\t", "").isprintable()
    again = BadFiles(path, 100)
    assert again.report([BadFile(name, "is empty")]) == [] and again.names == [name]


def test_two_splits_share_a_list_and_count_apart(tmp_path):
    path = tmp_path / "bad_files.txt"
    train, val = (BadFiles(path, 100, split=split) for split in ("train", "val"))
    train.report([BadFile("row 1", "is empty")])
    assert val.report([BadFile("row 1", "is empty")]) == [BadFile("row 1", "is empty")] and val.count == 1
    assert path.read_text() == "row 1\tis empty\ttrain\nrow 1\tis empty\tval\n"
    resumed = BadFiles(path, 100, split="val")
    assert resumed.report([BadFile("row 1", "is empty")]) == [] and resumed.count == 1


def test_a_list_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "bad_files.txt").mkdir()
    with pytest.raises(UserError, match="bad_files.txt: Is a directory"):
        BadFiles(tmp_path / "bad_files.txt", 100).report([BadFile("a", "is empty")])


def test_the_limit_is_a_share_of_the_pictures():
    files = [BadFile(str(i), "is empty") for i in range(11)]
    BadFiles(None, 1000, 0.01).report(files[:10])
    with pytest.raises(UserError, match="11 of 1000"):
        BadFiles(None, 1000, 0.01).report(files)
    BadFiles(None, 50, 1.0).report(files)


def test_one_file_is_allowed_of_however_few_but_for_a_share_of_nothing():
    files = [BadFile(str(i), "is empty") for i in range(2)]
    BadFiles(None, 3, 0.01).report(files[:1])
    with pytest.raises(UserError, match="2 of 3 images are unreadable, more than --max_bad_files 0.01 allows"):
        BadFiles(None, 3, 0.01).report(files)
    with pytest.raises(UserError, match="1 of 3 .*--max_bad_files 0 allows"):
        BadFiles(None, 3, 0).report(files[:1])
    with pytest.raises(UserError) as without_flags:
        BadFiles(None, 3, has_flags=False).report(files)
    assert "--" not in str(without_flags.value) and "mend the data." in str(without_flags.value)


def spoil(root, *names):
    for name in names:
        (root / name).write_bytes(b"")


def test_a_small_run_outlives_one_bad_file_of_each_split_and_lists_both(pictures, recipe, tmp_path):
    data = shutil.copytree(pictures, tmp_path / "data")
    spoil(data, "train/cat/01.jpg", "val/dog/02.jpg")
    with build_loaders(recipe(data_dir=str(data)), PROCESSOR, BatchPlan(4)) as ours:
        assert len(list(ours.train.epoch(0))) == 15
        assert sum(len(batch["index"]) for batch in ours.val.epoch()) == 20
    listed = [line.split("\t") for line in (tmp_path / "run/bad_files.txt").read_text().splitlines()]
    assert [(os.path.relpath(name, data), split) for name, _, split in listed] == [
        ("train/cat/01.jpg", "train"),
        ("val/dog/02.jpg", "val"),
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_step_without_an_image_is_an_error_and_no_step_less(pictures, recipe, tmp_path, workers):
    data = shutil.copytree(pictures, tmp_path / "data")
    for path in (data / "train").rglob("*.*"):
        path.write_bytes(b"")
    options = recipe(data_dir=str(data), max_bad_files=1.0, num_workers=workers)
    with build_loaders(options, PROCESSOR, BatchPlan(4)) as ours:
        with pytest.raises(UserError, match=r"none of the images of a step .*\(the last: .* is empty \(0 bytes\)\)"):
            list(ours.train.epoch(0))
