"""What a process says when another one of the same run is gone."""

import os
import re
import signal

import pytest
import torch
import torch.distributed as dist

from effnet_hf.errors import UserError
from effnet_hf.training import evaluation, loop, steps
from effnet_hf.training.launcher import with_others

from .workbench import small_recipe


SAID = "another process of this run has ended, or answers no more"


def meet(rank: int, folder) -> None:
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    dist.all_reduce(torch.ones(1))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        with with_others():
            while True:
                dist.all_reduce(torch.ones(1))
    except UserError as error:
        (folder / "said").write_text(str(error))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no fork")
def test_a_process_that_is_killed_is_one_line_of_the_other(tmp_path):
    children = []
    for rank in (0, 1):
        if (pid := os.fork()) == 0:
            try:
                meet(rank, tmp_path)
            finally:
                os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    said = (tmp_path / "said").read_text()
    assert re.match(rf"{SAID} \([^.]+ \[127.0.0.1\]:\d+[^.]*\); its own line, or the launcher's, says why. ", said)
    assert said.endswith(" Start all of them again; a training goes on with --resume auto.")


GONE = [
    RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5123"),
    RuntimeError("[../gloo/transport/tcp/pair.cc:598] Read error [::1]:5: Connection reset by peer"),
    RuntimeError("[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation"),
    dist.DistBackendError("NCCL error in: NCCLUtils.cpp:9, remote process exited or there was a network error"),
    dist.DistBackendError("NCCL communicator was aborted on rank 0."),
    dist.DistBackendError("[1] is setting up NCCL communicator, but store->get('0') got error: x"),
    dist.DistNetworkError("failed to recv, got 0 bytes. Connection was likely closed. Did the remote server crash?"),
    dist.DistStoreError("wait timeout after 600000ms, keys: /default_pg/0"),
]
WORK = {
    "train": (loop, loop.train),
    "benchmark": (steps, lambda recipe: steps.benchmark_steps(recipe, "train", 1)),
    "validate": (evaluation, lambda recipe: evaluation.validate_checkpoint("model", recipe.data_dir)),
}
OTHER = [
    RuntimeError("shape '[2]' is invalid for input of size 3"),
    dist.DistBackendError("NCCL error: invalid usage: Duplicate GPU detected : rank 0 and rank 1"),
    ValueError("Connection closed by peer"),
]


@pytest.mark.parametrize("error", GONE, ids=str)
@pytest.mark.parametrize("work", WORK)
def test_a_peer_that_is_gone_is_one_sentence_from_whichever_library(work, error, tmp_path, monkeypatch):
    def start(*_, **__):
        raise error

    module, run = WORK[work]

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(module, "start_accelerator", start)
    monkeypatch.setattr(evaluation, "open_checkpoint", lambda model: None)
    with pytest.raises(UserError, match=SAID):
        run(small_recipe(tmp_path, tmp_path / "run"))


@pytest.mark.parametrize("processes, error", [*(("2", error) for error in OTHER), ("1", GONE[0])], ids=str)
def test_another_error_keeps_its_traceback(processes, error, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(type(error)) as caught, with_others():
        raise error
    assert caught.value is error
