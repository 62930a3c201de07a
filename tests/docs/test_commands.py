"""Every command in the documentation is one that our parsers accept: scripts, flags, choices, recipes, files exist."""

import importlib.util
import re
import runpy
import sys

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser as torchrun_parser

from effnet_hf.cli import OneLineErrors

from .reading import ROOT, alternatives, commands, flags, words


PROGRAMS = [
    *sorted(path.name for path in ROOT.glob("*.py")),
    *(f"benchmark.py {name}" for name in runpy.run_path(str(ROOT / "benchmark.py"))["COMMANDS"]),
    "effnet_hf.data.scan",
    "effnet_hf.training.plots",
    "benchmarks/compare_runs.py",
    "benchmarks/dali_difference.py",
    "benchmarks/export_cpu.py",
    "benchmarks/gpu_check.py",
    "benchmarks/loop_overhead.py",
    "benchmarks/timm_loop.py",
    "examples/serve/app.py",
]
# Flags of other programs, with whose they are.
FOREIGN = {
    "--pretrained-from-file": "NVIDIA's main.py",
    "--backend": "torchvision's training reference",
    "--use-v2": "the same",
}


class Accepted(Exception):
    """A parser took its command line; carries the parser."""


@pytest.fixture
def parsed(monkeypatch, tmp_path):
    """Hands words to a program's own parser and returns that parser; nothing runs. An AssertionError if it refuses."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    (tmp_path / "my.yaml").write_text("epochs: 20\n")  # the recipe that docs/recipes.md calls yours
    parse = OneLineErrors.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Accepted(self)

    monkeypatch.setattr(OneLineErrors, "parse_args", parse_and_stop)

    def check(program: str, arguments: list[str]):
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        try:
            if program.endswith(".py"):
                runpy.run_path(str(ROOT / program), run_name="__main__")
            else:
                monkeypatch.delitem(sys.modules, program, raising=False)
                runpy.run_module(program, run_name="__main__", alter_sys=True)
        except Accepted as accepted:
            return accepted.args[0]
        except SystemExit as stop:
            assert stop.code in (0, None), "refused; see the captured stderr"
        return None

    return check


@pytest.fixture
def known_flags(monkeypatch, parsed):
    """The flags of all our programs, of `accelerate launch` and of torchrun."""
    monkeypatch.setattr(OneLineErrors, "error", lambda self, message: (_ for _ in ()).throw(Accepted(self)))
    found = set(FOREIGN)
    for script in ("compare_layouts.py", "kill_and_resume.py"):  # of the tests, with parsers of their own
        found |= set(re.findall(r'"(--\w+)"', (ROOT / "tests/training" / script).read_text()))
    for parser in (launch_command_parser(), torchrun_parser()):
        found |= set(parser._option_string_actions)
    for program in PROGRAMS:
        name, *rest = program.split()
        parser = parsed(name, rest)
        found |= set(parser._option_string_actions) if parser is not None else set()
    return found


def launched(arguments: list[str]) -> tuple[str, list[str]]:
    """The program that a command line starts, and its arguments; the launchers check their own."""
    first, *rest = arguments
    if first in ("python", "python3"):
        return (rest[1], rest[2:]) if rest[0] == "-m" else (rest[0], rest[1:])
    if first in ("accelerate", "torchrun"):
        parser, rest = (launch_command_parser(), rest[1:]) if first == "accelerate" else (torchrun_parser(), rest)
        found = parser.parse_args(rest)
        config = getattr(found, "config_file", None)
        assert config is None or (ROOT / config).is_file(), f"there is no {config}"
        return found.training_script, found.training_script_args
    return first, rest


@pytest.mark.parametrize("found", commands(), ids=lambda found: found.where)
def test_command_is_accepted(found, parsed):
    for arguments in alternatives(words(found.text)):
        if arguments[0] == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
            assert set(word for word in arguments[1:] if "=" not in word) <= set(targets)
        elif arguments[0] == "pip":
            extras = re.findall(r"\[(.+?)\]", found.text)
            assert all(f"\n{extra} =" in (ROOT / "setup.cfg").read_text() for e in extras for extra in e.split(","))
        else:
            program, rest = launched(arguments)
            if (ROOT / program).is_file() and "OneLineErrors" not in program:
                source = (ROOT / program).read_text("utf-8")
                if any(word in source for word in ("effnet_hf.cli", "import cli", "parse_recipe")):
                    parsed(program, rest)
                else:  # a script of the tests, with a parser of its own
                    assert all(f'"{word.split("=")[0]}"' in source for word in rest if word.startswith("--"))
            else:
                assert importlib.util.find_spec(program) is not None, f"there is no {program}"
                if program.startswith("effnet_hf"):
                    parsed(program, rest)


@pytest.mark.parametrize("found", flags(), ids=lambda found: found.where)
def test_flag_in_the_text_exists(found, known_flags):
    assert found.text in known_flags
