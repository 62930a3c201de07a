"""What every script shares: who speaks, and when."""

import runpy
import sys
from pathlib import Path

import pytest

from effnet_hf.cli import ArgumentParser, command_line, invocation, run
from effnet_hf.errors import OneProcessError, UserError


ROOT = Path(__file__).resolve().parents[1]


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


@pytest.mark.parametrize(
    "words, wanted",
    [
        (["--overwrite"], True),
        (["--overwrite", "true", "x"], True),
        (["--overwrite=true"], True),
        (["--overwrite", "False"], False),
        (["--overwrite=false"], False),
        (["--overwrite", "--overwrite", "false"], False),
    ],
)
def test_a_switch_understands_what_a_recipes_does(words, wanted):
    parser = ArgumentParser()
    parser.add_argument("x", nargs="*")
    parser.add_argument("--overwrite", action="store_true")
    assert parser.parse_args(words).overwrite is wanted


@pytest.mark.parametrize(
    "program, named, typed",
    [
        (f"{ROOT}/train.py", "python qat.py", "python train.py --seed 1"),
        ("/somewhere/else/train.py", "effnet-hf qat", "python train.py --seed 1"),
        (f"{ROOT}/effnet_hf/commands/train.py", "effnet-hf qat", "effnet-hf train --seed 1"),
        ("/bin/effnet-hf train", "effnet-hf qat", "effnet-hf train --seed 1"),
        (f"{ROOT}/effnet_hf/__main__.py train", "effnet-hf qat", "effnet-hf train --seed 1"),
    ],
)
def test_a_message_names_the_command_that_the_user_has(program, named, typed, monkeypatch):
    monkeypatch.setattr(sys, "argv", [*program.split(), "--seed", "1", "--hub_token", "secret", "--hub-token=secret"])
    assert invocation("qat") == named and command_line() == typed


@pytest.mark.parametrize("module, command", [("effnet_hf.data.scan", "scan"), ("effnet_hf.training.plots", "plots")])
def test_a_module_that_was_once_run_says_what_took_its_place(module, command, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module(module, run_name="__main__")
    assert capsys.readouterr().err == f"this is `effnet-hf {command}` now\n"
