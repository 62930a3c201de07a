"""What a run says where: trackers, the precision in use, the new classifier, and never the token."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from effnet_hf.training import train

from .workbench import read_rows, small_recipe, write_squares


PLAIN = {"epochs": 1, "mixup": 0.0, "ema_decay": 0.0, "augmentation": "none"}


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("squares"))


BF16 = {"precision": "bf16", "image_size": 32}  # smaller pictures are refused


@pytest.fixture(scope="module")
def told(squares, tmp_path_factory):
    """A run with a tracker, in bf16, by a command with a token."""
    folder = tmp_path_factory.mktemp("told")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sys.argv",
            ["/bin/train.py", "--hub_token", "hf_secret", "--seed=1", "--hub_token=hf_secret", "--hub-token=hf_secret"],
        )
        recipe = small_recipe(squares, folder, report_to=["tensorboard"], **BF16)
        assert train(recipe) == 0
    return folder


def test_tracker_gets_the_figures_of_the_log(told):
    (events,) = (told / "logs/effnet_hf").glob("events.*")
    written = EventAccumulator(str(events.parent)).Reload()
    for name, kind in (("train.lr", "train"), ("val.top1", "val"), ("val_ema.loss", "val_ema")):
        logged = [row[name] for row in read_rows(told, kind)]
        assert [entry.value for entry in written.Scalars(name)] == pytest.approx(logged, rel=1e-6) and logged
    assert [entry.step for entry in written.Scalars("val.top1")] == [4, 8]


def test_token_is_nowhere_in_what_a_run_leaves(told):
    for path in told.rglob("*"):
        assert not path.is_file() or b"hf_secret" not in path.read_bytes(), path
    assert read_rows(told, "run")[0]["command"] == "python train.py --seed=1"
    assert "python train.py --seed=1" in (told / "README.md").read_text()


def test_bf16_trains_on_a_cpu_close_to_fp32(told, squares, tmp_path):
    assert read_rows(told, "run")[0]["precision"] == "bf16"
    assert train(small_recipe(squares, tmp_path, image_size=32)) == 0
    losses = [[row["train.loss"] for row in read_rows(folder, "train")] for folder in (told, tmp_path)]
    assert losses[0][0] != losses[1][0] == pytest.approx(losses[0][0], rel=0.3)  # a batch of 4 is rough
    weights = load_file(told / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32, torch.int64}


def test_new_classifier_is_said_in_one_line(squares, told, tmp_path, capfd):
    train(small_recipe(squares, tmp_path / "same", model=str(told), image_size=32, **PLAIN))
    assert "new classifier" not in capfd.readouterr().out
    other = write_squares(tmp_path / "data")
    for split in ("train", "val"):
        (other / split / "red").rename(other / split / "scarlet")
    train(small_recipe(other, tmp_path / "other", model=str(told), image_size=32, **PLAIN))
    said = capfd.readouterr()
    assert f"weights of {told}, a new classifier for 3 classes\n" in said.out and said.err == ""


def test_card_of_a_short_float_run_says_nothing_of_what_did_not_happen(told, squares, tmp_path, capfd):
    recipe = small_recipe(squares, tmp_path, image_size=32, quiet=False, **PLAIN)
    train(replace(recipe, data_dir=None, dataset_name=str(squares)))
    card, printed = (tmp_path / "README.md").read_text(), capfd.readouterr().out
    assert "After one epoch, measured on the images reported below." in card
    assert f" on {squares.name}" in card and str(squares) not in card and "datasets:" not in card
    for name in ("calibration", "qat_batch_norm", "placement", "sensitivity", "Top-5"):  # of three classes
        assert name not in card, name
    assert "top1" in printed.split("best     ")[1].splitlines()[0] and "top5" not in printed.split("best     ")[1]
    assert "Best of 2 epochs by top-1 on the images" in (told / "README.md").read_text()


def test_card_keeps_the_place_of_the_pictures_to_itself(told, squares):
    assert str(squares) not in (told / "README.md").read_text()
