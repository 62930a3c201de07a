"""What a launcher that starts a run again (`--max-restarts`, `--nnodes 1:2`) needs of it; elastic.py has whole jobs."""

import os
import signal

import pytest

from effnet_hf.errors import UserError
from effnet_hf.training import launcher, signals, train
from effnet_hf.training.launcher import _value, refuse_restarts, with_others
from effnet_hf.training.signals import Interruption

from . import elastic
from .workbench import small_recipe


LAUNCHED = {
    "failures": ({"TORCHELASTIC_MAX_RESTARTS": "3"}, "--max-restarts 3"),
    "machines": ({"TORCHELASTIC_MAX_RESTARTS": "0", "PET_NNODES": "1:2"}, "--nnodes 1:2"),
}


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS", raising=False)
    monkeypatch.delenv("PET_NNODES", raising=False)
    monkeypatch.setattr(launcher, "LAUNCHER_PID", None)
    return monkeypatch


@pytest.mark.parametrize("named", LAUNCHED)
@pytest.mark.parametrize(
    "changes, then", [({}, "begin anew"), ({"overwrite": True}, "begin anew"), ({"resume": "old"}, "goes back to")]
)
def test_a_run_that_a_restart_would_not_go_on_with_is_refused_before_it_begins(
    named, changes, then, environment, tmp_path
):
    variables, flag = LAUNCHED[named]
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(UserError, match=f"{flag} starts this command again .* {then}.* give --resume auto"):
        train(small_recipe(tmp_path / "nothing", tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
    refuse_restarts("auto")


@pytest.mark.parametrize("words", [["--nnodes", "1:4"], ["--nnodes=1:4"]])
def test_the_launcher_s_own_words_say_that_machines_may_come_and_go(words, environment):
    class Launcher:
        def __init__(self, pid):
            pass

        def cmdline(self):
            return ["python", "-m", "torch.distributed.run", *words, "train.py"]

    environment.setattr(launcher, "LAUNCHER_PID", 1)
    environment.setattr(launcher.psutil, "Process", Launcher)
    with pytest.raises(UserError, match="--nnodes 1:4 starts this command again"):
        refuse_restarts(None)


@pytest.mark.parametrize(
    "variables",
    [{}, {"TORCHELASTIC_MAX_RESTARTS": "0"}, {"PET_NNODES": "1:1"}, {"PET_NNODES": "2:2"}, {"PET_NNODES": "2"}],
)
def test_without_restarts_any_start_will_do(variables, environment):
    for name, value in variables.items():
        environment.setenv(name, value)
    refuse_restarts(None)


def test_a_flag_without_a_value_says_nothing():
    assert _value(["torchrun", "--nnodes"], "nnodes") is None


@pytest.mark.parametrize(
    "done, next_step",
    [("0", "The launcher starts all of them again (1 of 3 restarts)."), ("3", "Start all of them again;")],
)
def test_who_is_left_says_who_starts_the_others_again(done, next_step, monkeypatch):
    for name, value in {
        "WORLD_SIZE": "2",
        "TORCHELASTIC_MAX_RESTARTS": "3",
        "TORCHELASTIC_RESTART_COUNT": done,
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught, with_others():
        raise RuntimeError("Connection closed by peer")
    assert next_step in str(caught.value)


class Alone:
    num_processes = 1


@pytest.mark.parametrize("by_a_launcher", [True, False])
def test_a_signal_that_comes_by_two_ways_is_one(by_a_launcher, monkeypatch):
    """Slurm sends SIGTERM to every process, and torchrun, one of them, sends it on: the run is to save all the same."""
    monkeypatch.setattr(signals, "LAUNCHER_PID", os.getppid() if by_a_launcher else None)
    ended = []
    monkeypatch.setattr(signals.signal, "raise_signal", ended.append)
    with Interruption(Alone()) as interruption:
        signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)
        signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)
        assert interruption.pending() and ended == ([] if by_a_launcher else [signal.SIGTERM])
        if by_a_launcher:
            monkeypatch.setattr(signals, "SAME", 0.0)
            signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)
            assert ended == [signal.SIGTERM]


@pytest.mark.slow  # two launchers of two processes, each started twice
@pytest.mark.parametrize("scenario", ["worker", "machine"])
def test_a_job_that_loses_a_process_or_a_machine_ends_as_if_it_had_not(scenario, tmp_path):
    assert elastic.main(tmp_path, [scenario], "torchrun", None) == 0
