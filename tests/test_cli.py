"""What every script shares: who speaks, and when."""

import pytest

from effnet_hf.cli import run
from effnet_hf.errors import OneProcessError, UserError


def failing(kind: type):
    def main():
        raise kind("a.png is broken.")

    return main


@pytest.mark.parametrize(
    "rank, kind, said",
    [
        (None, UserError, "train.py: error: a.png is broken.\n"),
        ("0", OneProcessError, "train.py: error: a.png is broken.\n"),
        ("1", UserError, ""),
        ("1", OneProcessError, "train.py: error: process 9: a.png is broken.\n"),
    ],
    ids=["alone", "the first", "another, of what all meet", "another, of what it met alone"],
)
def test_an_error_is_said_once_and_never_lost(rank, kind, said, monkeypatch, capsys):
    for name, value in (("LOCAL_RANK", rank), ("RANK", rank and "9")):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        run(failing(kind), prog="train.py")
    assert capsys.readouterr().err == said


def test_the_process_group_is_left_at_the_end(monkeypatch):
    """NCCL warns at exit where nobody does, and a rank that dies meanwhile can hang the others."""
    import torch.distributed as dist

    def main():
        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)

    with pytest.raises(SystemExit, match="0"):
        run(main, prog="train.py")
    assert not dist.is_initialized()
