"""Loader processes that die, fall silent, or have no room to hand a batch over: one sentence each, and no waiting."""

import faulthandler
import gc
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch.utils.data import Dataset

from effnet_hf.data import BatchPlan, worker_pool
from effnet_hf.data.regions import library
from effnet_hf.data.worker_pool import WorkerPool
from effnet_hf.errors import UserError


pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="has neither fork nor alarm")
ENDS = 77
DIED = "a loader process died "


class Numbers(Dataset):
    """`self[request]` waits as long as it says, and is a batch of so many numbers."""

    def __getitem__(self, request):
        seconds, count = request
        time.sleep(seconds)
        if count == ENDS:
            os._exit(3)
        if count < 0:
            raise MemoryError
        return {"index": torch.arange(count)}


@pytest.fixture
def pool(monkeypatch):
    made, start = [], worker_pool._start_worker
    # pytest has a process that gets SIGSEGV print its stack; these get it on purpose.
    monkeypatch.setattr(worker_pool, "_start_worker", lambda worker: (faulthandler.disable(), start(worker)))

    def make(workers=1, **options):
        made.append(WorkerPool(Numbers(), workers, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()
    assert not psutil.Process().children(recursive=True), "a loader process is left"


def workers() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def test_batches_arrive_in_order_and_in_shared_memory(pool):
    batches = list(pool(2).batches(iter([(0.1, 3), (0, 4), (0, 0)])))
    assert [batch["index"].tolist() for batch in batches] == [[0, 1, 2], [0, 1, 2, 3], []]
    assert all(batch["index"].is_shared() for batch in batches[:2])


@pytest.fixture
def kill_soon():
    """Sends a signal to the workers as soon as there are any, while the main thread waits."""

    def start(number):
        def look(*_):
            for worker in workers():
                worker.send_signal(number)
                signal.setitimer(signal.ITIMER_REAL, 0)

        signal.signal(signal.SIGALRM, look)
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)

    before = signal.getsignal(signal.SIGALRM)
    yield start
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    "number, moment",
    [
        (signal.SIGKILL, "before the first batch"),
        (signal.SIGKILL, "while it is waited for"),
        (signal.SIGKILL, "in the middle of a step"),
        (signal.SIGSEGV, "in the middle of a step"),
        (signal.SIGBUS, "in the middle of a step"),
    ],
)
def test_a_worker_that_dies_is_one_sentence(pool, kill_soon, number, moment):
    ready = [] if moment == "before the first batch" else [(0, 1)] * 2
    batches = pool().batches(iter([*ready, (20, 1)]))
    if ready:
        next(batches)
    if moment == "in the middle of a step":
        workers()[0].send_signal(number)
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:  # nothing is raised here
            torch.ones(3) + 1
    else:
        kill_soon(number)
    started = time.monotonic()
    with pytest.raises(UserError, match=DIED + rf"\(killed by {number.name}\); usually memory ran out"):
        list(batches)
    assert time.monotonic() - started < 10


def test_a_worker_that_dies_between_two_epochs_is_noticed_by_the_next(pool):
    ours = pool(2)
    assert len(list(ours.batches(iter([(0, 1)] * 4)))) == 4
    workers()[1].kill()
    with pytest.raises(UserError, match=DIED):
        list(ours.batches(iter([(0, 1)] * 4)))


def test_one_pools_dead_worker_does_not_end_another_pools_epoch(pool):
    first, second = pool(), pool()
    list(first.batches(iter([(0, 1)])))
    (own,) = workers()
    batches = second.batches(iter([(0.1, 1)] * 5))
    next(batches)
    own.kill()
    assert len(list(batches)) == 4
    with pytest.raises(UserError, match=DIED):
        list(first.batches(iter([(0, 1)])))


def test_a_worker_that_dies_while_others_are_started_leaves_none(pool, monkeypatch):
    leave = worker_pool._leave_deaths_to_the_pool

    def died(iterator):
        leave(iterator)
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. ")  # torch's handler, at its end

    monkeypatch.setattr(worker_pool, "_leave_deaths_to_the_pool", died)
    with pytest.raises(UserError, match=DIED + r"\(at its start\)"):
        list(pool(2).batches(iter([(0, 1)])))
    gc.collect()
    assert not any(worker.is_running() and worker.status() != "zombie" for worker in workers())


LEFT_OPEN = """
import time
from effnet_hf.data.worker_pool import WorkerPool
from torch.utils.data import Dataset

class Slow(Dataset):
    def __getitem__(self, request):
        time.sleep(request)
        return {}

pool = WorkerPool(Slow(), 2)
next(pool.batches(iter([0, 60, 60])))
raise SystemError("a bug")
"""


@pytest.mark.slow  # ten seconds: a process of its own
def test_a_process_that_ends_by_a_bug_does_not_wait_for_its_workers():
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", LEFT_OPEN]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=50, env=environment)
    assert ran.returncode == 1 and ran.stderr.endswith("SystemError: a bug\n")


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_it_is_noticed_in_a_thread_too(pool, monkeypatch):
    """Where no signal handler can be set, by looking every few seconds."""
    monkeypatch.setattr(worker_pool, "_POLL", 0.2)
    said = []

    def read():
        batches = pool().batches(iter([(0, 1), (20, 1)]))
        next(batches)
        workers()[0].kill()
        with pytest.raises(UserError, match=DIED):
            list(batches)
        said.append("so")

    thread = threading.Thread(target=read)
    thread.start()
    thread.join(20)
    assert said == ["so"]


def test_other_children_may_end_as_they_like(pool):
    batches = pool().batches(iter([(0.2, 1)] * 4))
    next(batches)
    subprocess.run([sys.executable, "-c", "raise SystemExit(3)"], check=False)
    assert len(list(batches)) == 3


def test_a_silent_worker_is_spoken_of_and_waited_for(pool, monkeypatch, caplog):
    monkeypatch.setattr(worker_pool, "_POLL", 0.1)
    monkeypatch.setattr(worker_pool, "_QUIET", 0.3)
    with caplog.at_level(logging.WARNING):
        assert len(list(pool().batches(iter([(1.5, 1)])))) == 1
    assert "no batch has come from the loader processes" in caplog.text and 2 <= len(caplog.records) <= 6


class StoppedWaiting(BaseException):
    """As the training loop raises it from a signal handler."""


def test_a_signal_ends_a_wait_and_the_silent_worker_is_not_waited_for(pool):
    def stop(*_):
        raise StoppedWaiting

    before = signal.signal(signal.SIGALRM, stop)
    ours = pool(2)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(StoppedWaiting):
            list(ours.batches(iter([(600, 1)] * 4)))
    finally:
        signal.signal(signal.SIGALRM, before)
    started = time.monotonic()
    ours.close()
    assert time.monotonic() - started < 4 and not workers()


def test_memory_that_runs_out_in_a_worker_is_one_sentence(pool):
    with pytest.raises(UserError, match="a loader process ran out of memory; lower --num_workers"):
        list(pool().batches(iter([(0, -1)])))


def test_what_the_handing_thread_cannot_do_ends_the_worker_instead_of_losing_the_batch(pool, monkeypatch):
    def no_more_files(*_):
        raise OSError(24, "Too many open files")

    # The workers are forked: they inherit it.
    monkeypatch.setattr("torch.multiprocessing.reductions.reduce_storage", no_more_files)
    monkeypatch.setitem(
        __import__("multiprocessing.reduction").reduction.ForkingPickler._extra_reducers,
        torch.UntypedStorage,
        no_more_files,
    )
    monkeypatch.setitem(
        __import__("multiprocessing.reduction").reduction.ForkingPickler._extra_reducers, torch.Tensor, no_more_files
    )
    with pytest.raises(UserError, match="need more open files than this session may have; raise the limit"):
        list(pool().batches(iter([(0, 1)])))


@pytest.mark.parametrize("place, reason", [("x" * 90, "AF_UNIX path too long"), ("gone/", "No such file or directory")])
def test_a_folder_that_takes_no_socket_is_one_sentence(place, reason, pool, tmp_path, monkeypatch):
    """TMPDIR, as clusters set it, or one that was removed meanwhile."""
    folder = tmp_path / place
    if not place.endswith("/"):
        folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", None)
    with pytest.raises(UserError, match=rf"through a socket in {folder} \(.*{reason}.*\); set TMPDIR to a folder"):
        list(pool().batches(iter([(0, 1)])))


def test_a_socket_that_is_removed_meanwhile_is_one_sentence(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(worker_pool, "_LEAVE", 0.2)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", None)
    batches = pool().batches(iter([(0, 1)] * 9))
    next(batches)
    shutil.rmtree(next(tmp_path.glob("pymp-*")))
    with pytest.raises(UserError, match="cannot hand over its batch through a socket"):
        list(batches)


def test_a_worker_that_ends_by_itself_is_not_said_to_lack_memory(pool):
    with pytest.raises(UserError, match="a loader process ended with exit code 3; --num_workers 0 does"):
        list(pool().batches(iter([(0, ENDS)])))


def test_shared_memory_that_cannot_be_asked_is_used(pool, monkeypatch):
    def refuse(_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "statvfs", refuse)
    assert [batch["index"].tolist() for batch in pool().batches(iter([(0, 3)]))] == [[0, 1, 2]]


def test_a_daemonic_process_is_told_that_it_may_have_none(pool, monkeypatch):
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    with pytest.raises(UserError, match="a daemonic process .* do without them: --num_workers 0"):
        list(pool().batches(iter([(0, 3)])))


@pytest.mark.parametrize("loader", ["imagefolder", "dali-cpu"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_the_loaders_say_it_for_both_splits(loaders, loader, split):
    if loader == "dali-cpu" and library() is None:
        pytest.skip("nvImageCodec is not installed")
    ours = loaders({"num_workers": 1, "loader": loader}, plan=BatchPlan(2))
    batches = getattr(ours, split).epoch(0)
    next(batches)
    for worker in workers():
        worker.kill()
    with pytest.raises(UserError, match=DIED):
        list(batches)


IN_A_SMALL_SHM = """
import subprocess, sys, torch
from torch.utils.data import Dataset
from effnet_hf.data.worker_pool import WorkerPool
from effnet_hf.errors import UserError

class Batches(Dataset):
    def __getitem__(self, request):
        return {"pixel_values": torch.full((request,), 7, dtype=torch.uint8)}

for case in sys.argv[1:]:
    size, batch = case.split(",")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=" + size, "tmpfs", "/dev/shm"], check=True)
    pool, kept = WorkerPool(Batches(), 1), []
    try:
        for batch in pool.batches(iter([int(batch)] * 12)):
            assert batch["pixel_values"].unique().tolist() == [7]
            kept.append(batch)  # as a queue of batches does
        print(len(kept), "all")
    except UserError as error:
        print(len(kept), error)
    pool.close()
"""


def may_mount() -> bool:
    try:
        tried = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True)
    except OSError:
        return False
    return tried.returncode == 0


@pytest.mark.slow  # ten seconds: a process of its own, in a mount namespace of its own
@pytest.mark.skipif(not may_mount(), reason="needs to mount a small /dev/shm, which only root may")
def test_a_full_shared_memory_is_one_sentence():
    """Without room for one batch, with room for all, with room for three, and for not even a lock."""
    cases = ["2m,4000000", "2m,100000", "14m,4000000", "4k,4000000"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = ["unshare", "-m", sys.executable, "-c", IN_A_SMALL_SHM, *cases]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert ran.returncode == 0 and ran.stderr == "", ran.stderr
    full = "/dev/shm, through which loader processes hand over batches, has no room for one of 4.0 MB"
    first, second, third, fourth = ran.stdout.splitlines()
    assert first.startswith(f"0 {full}") and second == "12 all" and third.startswith(f"3 {full}")
    assert fourth.startswith("0 the loader processes cannot be started (No space left on device)")
