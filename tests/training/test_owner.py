"""A run touches only what runs made, alone in its folder."""

import errno
import json
import os

import pytest
import torch
from accelerate import Accelerator

from effnet_hf.errors import UserError
from effnet_hf.files import atomic_folder, remove
from effnet_hf.manifest import problem
from effnet_hf.run_folder import MARK, RunFolder, made_by_a_run
from effnet_hf.training import owner as owner_module
from effnet_hf.training import train
from effnet_hf.training.owner import Owner, only_run
from effnet_hf.training.profiling import Profiler
from effnet_hf.training.resume import Checkpoints

from .workbench import fingerprint, small_recipe, write_squares, write_tiny


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("squares"), per_class=4, validation=2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def recipe(squares, tiny, tmp_path):
    """One epoch of one step."""
    settings = {"model": str(tiny), "image_size": None, "resize_margin": None, "epochs": 1, "global_batch_size": 12}
    return small_recipe(squares, tmp_path / "run", **settings, per_device_batch_size=12, warmup_epochs=0)


def content(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name", ["README.md", "notes.txt", "config.json", "checkpoints/other/x", "checkpoints/x", "plots/mine.png"]
)
def test_a_folder_of_somebody_else_is_refused_and_stays_as_it_was(recipe, tmp_path, name, overwrite):
    (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "run" / name).write_text("mine")
    first = name.split("/")[0]
    for resume in (None, "auto"):
        with pytest.raises(UserError, match=f"--output_dir .*run holds {first}, which no run of this version made"):
            train(recipe.replace(overwrite=overwrite, resume=resume))
    assert content(tmp_path / "run") == {name: b"mine"}


def test_logs_of_the_launch_and_hidden_files_may_lie_there(recipe, tmp_path):
    for name in ("slurm-7.out", "slurm-7.err", "train.log", ".gitignore", "benchmark.json"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("mine")
    assert train(recipe) == 0
    assert train(recipe.replace(overwrite=True)) == 0
    assert (tmp_path / "run/train.log").read_text() == (tmp_path / "run/.gitignore").read_text() == "mine"


def test_overwriting_removes_what_runs_made_and_nothing_else(recipe, tmp_path):
    assert train(recipe) == 0
    folder = tmp_path / "run"
    made = {path.name for path in folder.iterdir()}
    (folder / "notes.txt").write_text("mine")
    (folder / "checkpoints" / "other").mkdir()
    (folder / "checkpoints" / "other" / "x").write_text("mine")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("plots", "ema"):  # moved to another disk by hand, and linked back
        remove(folder / name)
        (elsewhere / name).mkdir()
        (elsewhere / name / "mine").write_text("mine")
        (folder / name).symlink_to(elsewhere / name)
    assert train(recipe.replace(overwrite=True, learning_rate=0.5)) == 0
    assert (folder / "notes.txt").read_text() == (folder / "checkpoints/other/x").read_text() == "mine"
    assert content(elsewhere) == {"plots/mine": b"mine", "ema/mine": b"mine"}
    assert made | {"notes.txt"} == {path.name for path in folder.iterdir()}
    assert not (folder / "plots").is_symlink() and problem(folder) is None


@pytest.mark.parametrize("change", [{"overwrite": True, "learning_rate": 0.5}, {"resume": "auto"}])
def test_files_put_beside_plots_and_into_the_average_are_kept(recipe, tmp_path, caplog, change):
    recipe = recipe.replace(ema_decay=0.5, epochs=2)
    assert train(recipe.replace(run_epochs=1)) == 0
    folder = tmp_path / "run"
    made = {path.name for path in folder.iterdir()}
    drawn = (folder / "plots/curves.png").read_bytes()
    for name in ("plots/a/mine.txt", "plots/mine.png", "ema/mine.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    assert train(recipe.replace(**change)) == 0
    assert (folder / "plots/a/mine.txt").read_text() == (folder / "plots/mine.png").read_text() == "mine"
    assert (folder / "plots/curves.png").read_bytes() != drawn
    (aside,) = folder.glob("ema.before-*")
    assert (aside / "mine.txt").read_text() == "mine"
    assert f"ema holds mine.txt, which no run wrote; it is {aside.name} now" in caplog.text
    assert not (folder / "ema/mine.txt").exists() and problem(folder / "ema") is None
    assert {path.name for path in folder.iterdir()} == made | {aside.name}


def test_file_put_into_a_profile_is_kept(recipe, tmp_path, caplog):
    run, recipe = RunFolder(tmp_path / "run"), recipe.replace(profile=True)
    profiler = Profiler(recipe, Accelerator(cpu=True))
    profiler.on_cuda = False
    for _ in range(2):
        with torch.profiler.profile() as finished:
            torch.ones(1) + 1
        profiler._write(finished)
        (run.profile / "mine.txt").write_text("mine")
    (aside,) = run.path.glob("profile.before-*")
    assert (aside / "mine.txt").read_text() == "mine" and "profile holds mine.txt" in caplog.text
    owner = Owner(run, recipe)
    owner.made = {"profile"}
    owner.clear()
    assert [path.name for path in run.profile.iterdir()] == ["mine.txt"] and owner.made == {"profile"}


def test_what_somebody_writes_during_a_run_is_moved_aside_and_said(recipe, tmp_path, caplog):
    assert train(recipe.replace(run_epochs=1)) == 0
    for path in RunFolder(tmp_path / "run").published(recipe):
        remove(tmp_path / "run" / path)
    mark = json.loads((tmp_path / "run" / MARK).read_text())
    mark["made"].remove("README.md")  # as before the first publication
    (tmp_path / "run" / MARK).write_text(json.dumps(mark))
    owner = Owner(RunFolder(tmp_path / "run"), recipe)
    (tmp_path / "run/README.md").write_text("mine")
    owner.adds("README.md")
    (aside,) = (tmp_path / "run").glob("README.md.before-*")
    assert aside.read_text() == "mine" and aside.name in caplog.text


def test_names_that_no_run_has_used_yet_stay_somebody_elses(recipe, tmp_path):
    assert train(recipe) == 0
    for name in ("logs/mine", "profile/mine", "sensitivity.json"):
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("mine")
    assert train(recipe.replace(overwrite=True)) == 0
    assert all(
        (tmp_path / "run" / name).read_text() == "mine" for name in ("logs/mine", "profile/mine", "sensitivity.json")
    )
    with pytest.raises(UserError, match="holds profile, which no run"):
        train(recipe.replace(resume="auto", profile=True))


@pytest.mark.parametrize("flag", ["model", "teacher"])
def test_overwriting_never_removes_what_the_run_starts_from(recipe, tmp_path, flag):
    assert train(recipe) == 0
    before = content(tmp_path / "run")
    for start in ("run", "run/checkpoints/best", "run/ema"):
        changes = {flag: str(tmp_path / start), "distillation_weight": 0.5 if flag == "teacher" else 0.0}
        with pytest.raises(UserError, match=f"a fresh start would remove --{flag} .*{start}"):
            train(recipe.replace(overwrite=True, **changes))
    assert content(tmp_path / "run") == before


def test_two_runs_in_one_folder_never_meet(recipe, tmp_path):
    with only_run(Accelerator(cpu=True), str(tmp_path / "run")):
        with pytest.raises(UserError, match=rf"--output_dir .*run is in use by another process \(pid {os.getpid()} on"):
            train(recipe)
        with pytest.raises(UserError, match="is in use"):
            train(recipe.replace(resume="auto"))
    assert not (tmp_path / "run").exists()
    assert train(recipe) == 0
    assert not (tmp_path / "run/.lock").exists()


def test_a_run_that_is_refused_leaves_no_folder(recipe, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        train(recipe.replace(data_dir=str(tmp_path / "missing"), output_dir=str(tmp_path / "a/b/run")))
    assert not (tmp_path / "a").exists()


MADE = ["../x", "", ".", "..", "/", "a/b", "plots/curves.png", "a\0", ".lock", MARK, "mine.txt", "../mine.py", 3]
PENDING = [
    1,
    "",
    [],
    {"what": "later"},
    {"what": "later", "name": "best"},
    {"what": "later", "name": "../update-00000001"},
]
PENDING += [
    {"what": "import"},
    {"what": "import", "name": ""},
    {"what": "import", "name": "a\0"},
    {"what": "x", "name": "y"},
]
MARKS = [
    "",
    "{",
    "[]",
    *({"made": [name], "pending": {}} for name in MADE),
    *({"made": [], "pending": p} for p in PENDING),
]


@pytest.mark.parametrize("mark", MARKS, ids=str)
def test_a_damaged_mark_is_a_sentence_and_removes_nothing(recipe, tmp_path, mark):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / MARK).write_text(mark if isinstance(mark, str) else json.dumps(mark))
    (tmp_path / "run" / "mine.txt").touch()
    with pytest.raises(UserError, match=r"\.effnet_hf\.json, which says what runs made in this folder, is damaged"):
        Checkpoints(Accelerator(cpu=True), recipe.replace(overwrite=True)).find()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [MARK, "mine.txt"]


def test_the_mark_is_the_first_file(recipe, tmp_path, monkeypatch):
    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(owner_module.Owner, "adds", dies)
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [MARK] and made_by_a_run(tmp_path / "run")
    monkeypatch.undo()
    assert train(recipe) == 0


def test_every_start_clears_away_what_a_killed_one_left(recipe, tmp_path):
    assert train(recipe) == 0
    folder = tmp_path / "run"
    for name in (
        ".config.json.effnet_hf-0123abcd.tmp",
        ".ema.effnet_hf-0123abcd.tmp",
        ".plots.effnet_hf-0123abcd.gone",
        ".summary.json.effnet_hf-0123abcd.tmp",
    ):
        (folder / name).mkdir()
    for name in (
        ".update-00000009.effnet_hf-0123abcd.tmp",
        ".best.effnet_hf-0123abcd.gone",
        ".data.parquet.effnet_hf-0123abcd.tmp",
    ):
        (folder / "checkpoints" / name).mkdir()
    (folder / ".mine.effnet_hf-0123abcd.tmp").mkdir()
    (folder / "checkpoints/.mine.tmp").mkdir()
    before = fingerprint(folder)
    assert train(recipe.replace(resume="auto")) == 0
    left = sorted(path.name for path in folder.rglob(".*"))
    assert left == [MARK, ".mine.effnet_hf-0123abcd.tmp", ".mine.tmp"] and fingerprint(folder) == before


def test_a_removal_that_was_interrupted_is_finished_first(recipe, tmp_path, monkeypatch, capsys):
    """The old run is not revived by `--resume auto`, whatever of it is still there."""
    assert train(recipe) == 0

    def dies(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner_module, "remove", dies)
        with pytest.raises(KeyboardInterrupt):
            train(recipe.replace(overwrite=True, learning_rate=0.5))
    assert (tmp_path / "run/checkpoints/update-00000001").is_dir()
    assert train(recipe.replace(resume="auto", learning_rate=0.5, quiet=False)) == 0
    assert "the removal of an earlier run, which was interrupted, is finished now" in capsys.readouterr().out
    assert "learning_rate: 0.5" in (tmp_path / "run/checkpoints/update-00000001/recipe.yaml").read_text()


def test_an_output_folder_on_a_linked_disk_is_used(recipe, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "disk")
    assert train(recipe) == 0
    assert (tmp_path / "run/checkpoints").is_symlink() and (tmp_path / "disk/update-00000001").is_dir()
    assert train(recipe.replace(overwrite=True)) == 0
    assert (tmp_path / "run/checkpoints").is_symlink() and (tmp_path / "disk/update-00000001").is_dir()


def test_checkpoints_on_a_disk_that_is_not_there_are_waited_for(recipe, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "disk")
    assert train(recipe) == 0
    before = content(tmp_path / "run")
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    for resume in ("auto", None):
        with pytest.raises(UserError, match="checkpoints is a link to a folder that is not there; is its disk mounted"):
            train(recipe.replace(resume=resume, overwrite=resume is None))
    assert content(tmp_path / "run") == before


def test_runs_that_share_a_disk_for_checkpoints_never_meet(recipe, tmp_path):
    (tmp_path / "disk").mkdir()
    for name in ("run", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoints").symlink_to(tmp_path / "disk")
    with only_run(Accelerator(cpu=True), str(tmp_path / "other")):
        with pytest.raises(UserError, match="run/checkpoints is in use by another process"):
            train(recipe)
    assert train(recipe) == 0
    with pytest.raises(UserError, match="other holds checkpoints, which no run"):
        train(recipe.replace(output_dir=str(tmp_path / "other")))


@pytest.mark.parametrize("start", ["checkpoints/best", "disk/best"])
def test_a_start_on_a_linked_disk_is_kept_too(recipe, tmp_path, start):
    (tmp_path / "run").mkdir()
    (tmp_path / "disk").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "disk")
    assert train(recipe) == 0
    model = tmp_path / start if start.startswith("disk") else tmp_path / "run" / start
    with pytest.raises(UserError, match="a fresh start would remove --model"):
        train(recipe.replace(model=str(model), overwrite=True))
    remove(tmp_path / "disk/update-00000001")
    remove(tmp_path / "run/summary.json")
    with pytest.raises(UserError, match="a fresh start would remove --model"):  # there is nothing to go on with
        train(recipe.replace(model=str(model), resume="auto"))


def test_a_conversion_and_a_training_never_meet_in_one_folder(recipe, tmp_path):
    with atomic_folder(tmp_path / "run") as folder:
        (folder / "x").touch()
        with pytest.raises(UserError, match="is in use by another process"):
            train(recipe)
    remove(tmp_path / "run")
    with only_run(Accelerator(cpu=True), str(tmp_path / "run")):
        with pytest.raises(UserError, match="is in use by another process"):
            with atomic_folder(tmp_path / "run"):
                raise AssertionError("two at once")


@pytest.mark.parametrize("when", ["save", "save_best", "publish"])
def test_a_folder_that_moves_away_ends_the_run(recipe, tmp_path, monkeypatch, when):
    then = getattr(Checkpoints, when)

    def moves(self, *args):
        (tmp_path / "run").rename(tmp_path / "moved")
        (tmp_path / "run").mkdir()
        return then(self, *args)

    monkeypatch.setattr(Checkpoints, when, moves)
    with pytest.raises(UserError, match="run was moved or removed while the run was writing to it"):
        train(recipe)
    assert not (tmp_path / "run").exists()


def test_the_root_is_no_folder_of_a_run(recipe):
    with pytest.raises(UserError, match="/ is the root of the file system; name a folder in it"):
        train(recipe.replace(output_dir="/"))


def test_what_a_file_system_keeps_for_itself_may_lie_there(recipe, tmp_path, monkeypatch):
    (tmp_path / "run/lost+found").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds lost\+found, which no run"):
        train(recipe)
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "run")
    assert train(recipe) == 0


def test_a_writable_folder_in_a_file_system_that_is_not_will_do(recipe, monkeypatch):
    def refuses(path, what, held=owner_module.held):
        if path.name != ".lock":
            raise OSError(errno.EROFS, "Read-only file system")
        return held(path, what)

    monkeypatch.setattr(owner_module, "held", refuses)
    assert train(recipe) == 0
