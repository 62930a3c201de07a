"""A checkpoint is whole, proved, and of this run's data, or it is not gone on with."""

import json
import math
import random
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file

from effnet_hf.errors import UserError
from effnet_hf.manifest import MANIFEST, _text, problem, write_manifest
from effnet_hf.training import resume as resume_module
from effnet_hf.training import train
from effnet_hf.training.owner import Owner
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


def test_weights_that_the_manifest_does_not_know_are_not_gone_on_with(run, tmp_path):
    (tmp_path / "run" / NEWEST / MANIFEST).write_text(_text({}))
    with pytest.raises(UserError, match=f"{NEWEST} is damaged: .* is not in its manifest.json"):
        train(run.replace(resume=str(tmp_path / "run" / NEWEST)))


def test_a_users_own_file_in_a_checkpoint_is_no_damage(run, finished, tmp_path, capsys):
    (tmp_path / "run" / NEWEST / "eval.json").write_text("{}")
    assert train(run.replace(quiet=False)) == 0
    assert "is damaged" not in capsys.readouterr().out and (tmp_path / "run" / NEWEST / "eval.json").exists()


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


def checkpoints(folder) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if not path.name.startswith("."))


def test_a_link_to_a_checkpoint_is_that_checkpoint(run, finished, tmp_path, monkeypatch):
    (tmp_path / "latest").symlink_to(tmp_path / "run" / OLDER)
    assert train(run.replace(resume=str(tmp_path / "latest"))) == 0
    assert fingerprint(tmp_path / "run") == fingerprint(finished)
    monkeypatch.chdir(tmp_path / "run" / OLDER)
    assert train(run.replace(resume=".")) == 0
    assert fingerprint(tmp_path / "run") == fingerprint(finished)


def test_a_checkpoint_that_was_moved_to_an_archive_and_linked_back_is_the_runs(run, finished, tmp_path):
    (tmp_path / "run" / NEWEST).rename(tmp_path / "archived")
    (tmp_path / "run" / NEWEST).symlink_to(tmp_path / "archived")
    assert train(run) == 0
    assert fingerprint(tmp_path / "run") == fingerprint(finished) and (tmp_path / "archived/progress.json").is_file()


@pytest.mark.parametrize("name", ["mine", "update-00000001.bak", "update-good", "update-notes"])
def test_copies_under_other_names_are_never_taken_for_the_runs_own(run, finished, tmp_path, name):
    shutil.copytree(tmp_path / "run" / OLDER, tmp_path / "run/checkpoints" / name)
    before = checkpoints(tmp_path / "run")
    with pytest.raises(UserError, match="already holds another run than --resume"):
        train(run.replace(resume=str(tmp_path / "run/checkpoints" / name)))
    assert checkpoints(tmp_path / "run") == before
    assert train(run.replace(keep_checkpoints=1)) == 0
    assert name in checkpoints(tmp_path / "run") and fingerprint(tmp_path / "run") == fingerprint(finished)


def test_a_renamed_checkpoint_is_refused(run, tmp_path):
    shutil.copytree(tmp_path / "run" / OLDER, tmp_path / "run/checkpoints/update-00000007")
    with pytest.raises(UserError, match="update-00000007 is a renamed copy: it was written after 1 steps"):
        train(run)


@pytest.mark.parametrize("how", ["auto", "again"])
@pytest.mark.parametrize("where", ["link_tree", "clear", "_go_back"])
def test_an_import_that_is_interrupted_begins_again(recipe, finished, tmp_path, monkeypatch, how, where, capsys):
    """A requeued command, and `auto`, never start afresh where somebody had asked to go on from another folder."""
    imports = recipe.replace(output_dir=str(tmp_path / "run"), resume=str(finished / OLDER))

    def dies(*_):
        raise KeyboardInterrupt

    owner = {"clear": Owner, "_go_back": Checkpoints}.get(where, resume_module)
    with monkeypatch.context() as patch:
        patch.setattr(owner, where, dies)
        with pytest.raises(KeyboardInterrupt):
            train(imports)
    assert train(imports.replace(resume="auto", quiet=False) if how == "auto" else imports) == 0
    assert fingerprint(tmp_path / "run") == fingerprint(finished)
    assert how != "auto" or "was interrupted, and begins again" in capsys.readouterr().out
    assert "incoming" not in checkpoints(tmp_path / "run")


def test_fewer_epochs_than_were_trained_are_refused(run, finished, tmp_path):
    with pytest.raises(UserError, match="has trained 2 epochs, more than --epochs 1"):
        train(run.replace(epochs=1))
    assert fingerprint(tmp_path / "run") == fingerprint(finished)


def rewrite(folder, name: str, change) -> None:
    tensors = load_file(folder / name)
    (folder / name).unlink()
    save_file(change(tensors), folder / name)
    write_manifest(folder)


def each(found: dict, key: str, change) -> dict:
    return {name: change(tensor) if name.endswith(f"/{key}") else tensor for name, tensor in found.items()}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("optimizer.safetensors", lambda found: {}, "is empty, after 2 steps"),
        ("optimizer.safetensors", lambda found: dict(list(found.items())[9:]), "lacks some of step, square_avg for"),
        ("optimizer.safetensors", lambda found: {k: v for k, v in found.items() if "/step" not in k}, "lacks some of"),
        ("optimizer.safetensors", lambda found: {k: v.to(torch.int8) for k, v in found.items()}, "does not fit"),
        ("optimizer.safetensors", lambda found: each(found, "step", lambda v: v.to(torch.float8_e4m3fn)), "not fit"),
        ("optimizer.safetensors", lambda found: {k: v.half() for k, v in found.items()}, "does not fit"),
        ("optimizer.safetensors", lambda found: each(found, "square_avg", lambda v: v.mean()), "does not fit"),
        ("optimizer.safetensors", lambda found: each(found, "step", lambda v: v[None]), "step does not fit"),
        ("optimizer.safetensors", lambda found: each(found, "step", torch.neg), "step holds negative numbers"),
        ("optimizer.safetensors", lambda found: each(found, "square_avg", lambda v: v - 9), "holds negative numbers"),
        ("optimizer.safetensors", lambda found: each(found, "momentum_buffer", lambda v: v * math.nan), "holds NaN or"),
        ("optimizer.safetensors", lambda found: each(found, "square_avg", lambda v: v + math.inf), "holds NaN or"),
        ("average.safetensors", lambda found: {k: v / 0 for k, v in found.items()}, "holds NaN or infinity"),
        ("model.safetensors", lambda found: {k: v.to(torch.int8) for k, v in found.items()}, "int8 there"),
        ("random_0.safetensors", lambda found: {**found, "numpy": found["numpy"] * 0 - 1}, "numpy's position is"),
    ],
)  # fmt: skip
def test_states_that_do_not_fit_are_refused_even_where_a_manifest_says_they_are_whole(
    run, tmp_path, name, change, message
):
    rewrite(tmp_path / "run" / NEWEST, name, change)
    with pytest.raises(UserError, match=message):
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
