"""A checkpoint is whole, proved, and of this run's data, or it is not gone on with."""

import json
import random
import shutil

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from effnet_hf.errors import UserError
from effnet_hf.manifest import MANIFEST, problem, write_manifest
from effnet_hf.training import train
from effnet_hf.training.progress import Progress
from effnet_hf.training.resume import Checkpoints

from .workbench import fingerprint, small_recipe, write_squares, write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("proved")


@pytest.fixture(scope="module")
def recipe(folder):
    """Two epochs of one step, each of which leaves a checkpoint."""
    squares, tiny = write_squares(folder / "data", per_class=4, validation=2), write_tiny(folder / "tiny")
    settings = {"model": str(tiny), "image_size": None, "resize_margin": None, "epochs": 2, "global_batch_size": 12}
    return small_recipe(squares, folder / "run", **settings, per_device_batch_size=12, warmup_epochs=0)


@pytest.fixture(scope="module")
def finished(recipe, folder):
    assert train(recipe) == 0
    return folder / "run"


@pytest.fixture
def run(recipe, finished, tmp_path):
    """A recipe that goes on with its own copy of the finished run."""
    shutil.copytree(finished, tmp_path / "run")
    return recipe.replace(output_dir=str(tmp_path / "run"), resume="auto")


NEWEST, OLDER = "checkpoints/update-00000002", "checkpoints/update-00000001"


def damage(path, kind: str) -> None:
    content = path.read_bytes()
    path.unlink()  # not in place: best/ and the images' list are links
    if kind == "flipped":
        damaged = bytearray(content)
        bit = random.Random(path.name).randrange(8 * len(content))
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
    elif kind != "removed":
        path.write_bytes({"emptied": b"", "halved": content[: len(content) // 2], "zeroed": bytes(len(content))}[kind])


def names(finished) -> list[str]:
    return sorted(str(path.relative_to(finished / NEWEST)) for path in (finished / NEWEST).rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", ["flipped", "emptied", "halved", "zeroed", "removed"])
def test_every_damage_of_every_file_is_named_before_anything_is_loaded(
    run, finished, tmp_path, kind, monkeypatch, record_property
):
    record_property("tries", len(names(finished)))
    monkeypatch.setattr("effnet_hf.training.state.load_file", lambda path: pytest.fail(f"{path} was loaded"))
    for name in names(finished):
        damage(tmp_path / "run" / NEWEST / name, kind)
        with pytest.raises(UserError, match="checkpoint|damaged") as raised:
            train(run.replace(resume=str(tmp_path / "run" / NEWEST)))
        # Without this one a folder is not taken for a checkpoint in the first place.
        assert name in str(raised.value) or name == "progress.json" and kind == "removed", raised.value
        shutil.rmtree(tmp_path / "run" / NEWEST)
        shutil.copytree(finished / NEWEST, tmp_path / "run" / NEWEST)


def test_swapped_files_are_named(run, finished, tmp_path):
    for name in ("optimizer.safetensors", "average.safetensors", "model.safetensors"):
        target = tmp_path / "run" / NEWEST / name
        target.unlink()
        shutil.copy(finished / OLDER / name, target)  # as large, as well-formed, of another step
        with pytest.raises(UserError, match=f"is damaged: {name} is not what was written: its SHA-256 differs"):
            train(run.replace(resume=str(tmp_path / "run" / NEWEST)))
        target.unlink()
        shutil.copy(finished / NEWEST / name, target)


@pytest.mark.parametrize("name", ["random_0.safetensors", MANIFEST, "progress.json"])
def test_auto_says_which_older_one_it_falls_back_to_and_ends_the_same(run, finished, tmp_path, name, capsys):
    damage(tmp_path / "run" / NEWEST / name, "removed")
    assert train(run.replace(quiet=False)) == 0
    said = capsys.readouterr().out
    assert (
        f"update-00000002 is damaged: {'it has no manifest.json' if name == MANIFEST else f'{name} is missing'}" in said
    )
    assert "going on from update-00000001" in said
    assert fingerprint(tmp_path / "run") == fingerprint(finished)


def test_nothing_whole_is_no_fresh_start(run, tmp_path):
    for name in (NEWEST, OLDER):
        damage(tmp_path / "run" / name / "optimizer.safetensors", "halved")
    with pytest.raises(UserError, match="--resume auto: no checkpoint is whole.*update-00000002.*update-00000001"):
        train(run)


def test_a_damaged_best_model_is_not_published(run, tmp_path):
    published = (tmp_path / "run/model.safetensors").read_bytes()
    damage(tmp_path / "run/checkpoints/best/model.safetensors", "flipped")
    checkpoints = Checkpoints(Accelerator(cpu=True), run)
    checkpoints.find()
    with pytest.raises(UserError, match=r"checkpoints/best is not published: model.safetensors .*SHA-256 differs"):
        checkpoints.publish(None)
    assert (tmp_path / "run/model.safetensors").read_bytes() == published


def test_the_published_model_and_the_average_have_manifests(finished):
    for folder in (finished, finished / "ema", finished / "checkpoints/best"):
        assert problem(folder) is None


WRONG = [None, "x", "1", True, -2, 1e400, float("nan"), [], {}, [1, 2, 3], 2**60, 10**400, 0.5]


@pytest.mark.parametrize("name", list(Progress.__dataclass_fields__))
def test_every_field_of_progress_is_checked_for_type_and_range(name, tmp_path, record_property):
    tries = 0
    path = tmp_path / "progress.json"
    good = json.loads(Progress(epoch=1, update=2, total_updates=9, best_top1=50.0, best_epoch=0).to_json())
    path.write_text(json.dumps(good))
    assert Progress.read(path) == Progress(epoch=1, update=2, total_updates=9, best_top1=50.0, best_epoch=0)
    kind = type(getattr(Progress(), name))
    for wrong in WRONG:
        if kind is str and isinstance(wrong, str) or kind is bool and wrong is True:
            continue
        if kind is float and wrong in (0.5, 2**60 if name in ("loss_sum", "best_loss", "loss_scale") else None):
            continue
        if kind is float and wrong == -2 and name in ("loss_sum", "best_loss"):
            continue
        path.write_text(json.dumps({**good, name: wrong}))
        with pytest.raises(UserError, match=f"progress.json: {name} is "):
            Progress.read(path)
        tries += 1
    record_property("tries", tries + 2)
    for lacking in ({k: v for k, v in good.items() if k != name}, {**good, "extra": 1}):
        path.write_text(json.dumps(lacking))
        with pytest.raises(UserError, match="progress.json was not written by this version"):
            Progress.read(path)


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, "\xff", '{"epoch": 1'])
def test_progress_that_is_no_object_is_a_sentence(text, tmp_path):
    (tmp_path / "progress.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="progress.json"):
        Progress.read(tmp_path / "progress.json")


def test_a_position_beyond_the_epoch_is_no_position(run, tmp_path):
    """The epoch would end at once; nothing was saved, and a scheduler would repeat that for ever."""
    path = tmp_path / "run" / NEWEST / "progress.json"
    progress = Progress.read(path)
    progress.epoch, progress.update = 1, 2
    path.unlink()
    path.write_text(progress.to_json())
    write_manifest(path.parent)
    with pytest.raises(UserError, match="stands at step 2 of an epoch that has 1"):
        train(run)


def add(data):
    shutil.copy(data / "train/red/0.png", data / "train/red/new.png")


def replace(data):
    noise = np.random.default_rng(1).integers(0, 255, (24, 24, 3), np.uint8)
    Image.fromarray(noise // 2).save(data / "train/red/0.png")


CHANGES = {
    "renamed": lambda data: (data / "train/red/0.png").rename(data / "train/red/zero.png"),
    "replaced": replace,
    "moved to another class": lambda data: (data / "train/red/0.png").rename(data / "train/blue/moved.png"),
    "added and removed": lambda data: (add(data), (data / "train/red/1.png").unlink()),
    "added": add,
    "removed": lambda data: (data / "train/red/1.png").unlink(),
    "validation renamed": lambda data: (data / "val/red/0.png").rename(data / "val/red/zero.png"),
    "validation removed": lambda data: (data / "val/red/1.png").unlink(),
    "validation moved": lambda data: (data / "val/red/1.png").rename(data / "val/blue/9.png"),
}
CLASSES = {
    "a class renamed": lambda data: [
        (data / split / "red").rename(data / split / "amber") for split in ("train", "val")
    ],
    "a class added": lambda data: shutil.copytree(data / "train/red", data / "train/yellow"),
    "a class removed": lambda data: [shutil.rmtree(data / split / "red") for split in ("train", "val")],
}


@pytest.fixture
def stopped(recipe, tmp_path):
    """A run that stands before its second epoch, with images of its own."""
    shutil.copytree(recipe.data_dir, tmp_path / "data")
    recipe = recipe.replace(data_dir=str(tmp_path / "data"), output_dir=str(tmp_path / "run"), resume="auto")
    recipe = recipe.replace(global_batch_size=4, per_device_batch_size=4)
    assert train(recipe.replace(run_epochs=1)) == 0
    return recipe


@pytest.mark.parametrize("change", CHANGES)
def test_images_that_changed_are_named_by_their_first_difference(stopped, tmp_path, change, capsys):
    CHANGES[change](tmp_path / "data")
    with pytest.raises(UserError, match=r"(was trained on other images: (train|val)/|was trained on 12 images)"):
        train(stopped)
    assert train(stopped.replace(accept_changed_data=True, quiet=False)) == 0
    assert "the images have changed: " in capsys.readouterr().out


@pytest.mark.parametrize("change", CLASSES)
def test_classes_that_changed_are_refused_whatever_is_accepted(stopped, tmp_path, change):
    CLASSES[change](tmp_path / "data")
    before = (tmp_path / "run/checkpoints/update-00000003/config.json").read_bytes()
    for accepted in (False, True):
        with pytest.raises(UserError, match="classes"):
            train(stopped.replace(accept_changed_data=accepted))
    assert (tmp_path / "run/checkpoints/update-00000003/config.json").read_bytes() == before


def test_a_moved_data_folder_is_the_same(stopped, tmp_path):
    (tmp_path / "data").rename(tmp_path / "moved")
    assert train(stopped.replace(data_dir=str(tmp_path / "moved"))) == 0


def test_an_average_is_neither_dropped_nor_begun_in_the_middle(stopped):
    with pytest.raises(UserError, match="was trained with --ema_decay 0.9, not 0.0"):
        train(stopped.replace(ema_decay=0.0))
    assert train(stopped.replace(ema_decay=0.99)) == 0


def test_momentum_may_be_switched_on_and_off(stopped, recipe, tmp_path):
    assert train(stopped.replace(momentum=0.0)) == 0
    other = stopped.replace(output_dir=str(tmp_path / "other"), momentum=0.0, overwrite=False)
    assert train(other.replace(run_epochs=1)) == 0
    assert train(other.replace(momentum=0.9)) == 0
