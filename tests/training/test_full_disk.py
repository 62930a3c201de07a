"""A disk that fills while a run writes: one line, exit code 2, and what was saved before is whole.

The disks are real: a small tmpfs where this process may mount one, and everywhere a limit on the size of files.
"""

import os
import resource
import subprocess

import pytest

from effnet_hf import cli
from effnet_hf.manifest import problem
from effnet_hf.training import train

from .workbench import small_recipe, write_squares, write_tiny


# Of a run that leaves 1.9 MB. The smallest ones hold not even its first file.
SIZES = [8, 300, 900, 1400]
MORE_SIZES = [*range(4, 60, 8), *range(60, 2000, 60)]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    return write_squares(folder / "data", per_class=4, validation=1), write_tiny(folder / "tiny")


@pytest.fixture
def disk(tmp_path):
    """Mounts a file system of so many KB."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: int):
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", folder], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"this process may not mount a tmpfs: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", folder], capture_output=True)


def run_in_child(start, output, err, limit: int | None = None, **changes) -> int:
    """The exit code of `train.py` on two epochs of two steps, with stderr in a file."""
    data, tiny = start
    settings = {"model": str(tiny), "image_size": None, "mixup": 0.0, "per_device_batch_size": 6}
    recipe = small_recipe(data, output, global_batch_size=6, checkpoint_every_steps=1, **settings, **changes)
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            with pytest.MonkeyPatch.context() as patch:
                for number, name in ((1, "stdout"), (2, "stderr")):
                    patch.setattr(f"sys.{name}", os.fdopen(number, "w", buffering=1))
                if limit is not None:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                try:
                    cli.run(lambda: train(recipe), prog="train.py")
                except SystemExit as end:
                    code = end.code
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def ended_well(code: int, output, err, words: str) -> bool:
    """Whether the run was complete; if not, that it ended as it should."""
    said = err.read_text()
    whole = [path for path in output.glob("checkpoints/update-*")]
    assert [problem(path) for path in whole] == [None] * len(whole)
    assert not list(output.rglob(".*.tmp")) and not list(output.rglob(".*.gone"))
    if code == 0:
        assert said == ""
        return True
    assert code == 2 and said.startswith("train.py: error: cannot write ") and said.count("\n") == 1, said
    assert words in said
    return False


def fills(size, start, disk, tmp_path) -> bool:
    output = disk(size) / "run"
    code = run_in_child(start, output, tmp_path / "err")
    done = ended_well(code, output, tmp_path / "err", "No space left on device")
    saved = sorted(output.glob("checkpoints/update-*"))
    if not done and saved:  # with room, it goes on from there
        subprocess.run(["mount", "-o", "remount,size=8m", output.parent], check=True)
        assert run_in_child(start, output, tmp_path / "err", resume="auto") == 0
        assert (output / "summary.json").is_file() and problem(output) is None
    return done


@pytest.mark.parametrize("size", SIZES)
def test_a_full_disk_is_one_line_and_loses_nothing(size, start, disk, tmp_path):
    assert not fills(size, start, disk, tmp_path)


@pytest.mark.slow  # forty runs, a minute and a half
def test_a_disk_may_be_full_at_any_moment(start, disk, tmp_path):
    done = []
    for size in MORE_SIZES:
        done.append(fills(size, start, disk, tmp_path))
        subprocess.run(["umount", tmp_path / "disk"], check=True)
    assert len(done) - sum(done) > 20 and done == sorted(done)


@pytest.mark.parametrize("limit", [700, 3_000, 150_000], ids=str)
def test_a_file_that_may_not_grow_is_one_line(limit, start, tmp_path):
    output = tmp_path / "run"
    code = run_in_child(start, output, tmp_path / "err", limit=limit)
    assert not ended_well(code, output, tmp_path / "err", "File too large")
