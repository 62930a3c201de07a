"""Every command in the documentation is one that our parsers accept: programs, flags, choices, recipes, files exist."""

import importlib.util
import re
import runpy
import sys

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser as torchrun_parser
from transformers import HfArgumentParser

import effnet_hf.recipes.recipe
from effnet_hf.cli import OneLineErrors
from effnet_hf.commands import COMMANDS
from effnet_hf.recipes import Recipe

from .reading import ROOT, alternatives, commands, flags, words


# Flags of other programs, with whose they are.
FOREIGN = {
    "--pretrained-from-file": "NVIDIA's main.py",
    "--backend": "torchvision's training reference",
    "--use-v2": "the same",
    "--shm-size": "docker run",
    "--gpus": "docker run",
    "--ipc": "docker run",
    "--constraint": "pip install",
    "--task": "optimum-cli export",
    "--bf16": "transformers' TrainingArguments",
    "--resume_from_checkpoint": "the same",
    "--image_processor_name": "transformers' run_image_classification.py",
}
# Pages of a day: flags may have the names they had then, as long as our parsers still understand them.
HISTORY = re.compile(r"CHANGELOG\.md|benchmarks/\d{4}-.*")
# Since a page of a day named them.
GONE = ("benchmark.py profile", "benchmark.py scaling", "effnet_hf.data.scan", "effnet_hf.training.plots", "--evaluate")


class Accepted(BaseException):
    """A parser took its command line; carries the parser. No error of a program, so that none reports it as one."""


class AcceptedRecipe(Recipe):
    """Checks itself as any recipe does, and then stops the program that would run it."""

    def __post_init__(self):
        super().__post_init__()
        raise Accepted


def start(program: str, arguments: list[str]) -> None:
    """Runs a script, a module or `effnet-hf` in this process as its command would be; none gets further than its flags.

    Raises:
        Accepted: the program's parser was reached, and took the arguments if `parsed` is in place.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, *arguments])
        patch.setattr(sys, "path", [str((ROOT / program).parent), str(ROOT), *sys.path])
        if program == "effnet-hf":
            importlib.import_module("effnet_hf.commands").main()
        elif program.endswith(".py"):
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            patch.delitem(sys.modules, program, raising=False)
            runpy.run_module(program, run_name="__main__", alter_sys=True)


def programs() -> list[list[str]]:
    """How each of our programs with a parser of `effnet_hf.cli` is called, without its flags."""
    found = [["effnet-hf", name] for name in COMMANDS]
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/**/*.py")]):
        name, source = str(path.relative_to(ROOT)), path.read_text("utf-8")
        if name == "benchmark.py":
            found += [[name, command] for command in runpy.run_path(str(path))["COMMANDS"]]
        elif has_our_parser(source):
            found.append([name])
    return found


def has_our_parser(source: str) -> bool:
    ours = any(word in source for word in ("effnet_hf.cli", "import cli", "parse_recipe", "run_command"))
    return ours and "__main__" in source


@pytest.fixture(scope="module")
def known_flags():
    """The flags of all our programs, of `accelerate launch` and of torchrun; and the spellings of before."""

    def stop(self, args=None, namespace=None):
        raise Accepted(self)

    known, old = set(FOREIGN), set()
    for script in ("compare_layouts.py", "kill_and_resume.py"):  # of the tests, with parsers of their own
        known |= set(re.findall(r'"(--\w+)"', (ROOT / "tests/training" / script).read_text()))
    for parser in (launch_command_parser(), torchrun_parser()):
        known |= set(parser._option_string_actions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OneLineErrors, "parse_args", stop)
        for program, *arguments in programs():
            with pytest.raises(Accepted) as accepted:
                start(program, arguments)
            (parser,) = accepted.value.args
            known |= set(parser._option_string_actions)
            old |= set(parser.old_spellings)
    return known, known | old


@pytest.fixture
def parsed(monkeypatch, tmp_path):
    """Hands words to a program's own parser; nothing runs. An AssertionError if it refuses.

    A flag's spelling of before is refused too, but on a page of a day.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text("epochs: 20\n")  # the recipe that docs/recipes.md calls yours
    parse, historic = OneLineErrors.parse_args, False

    def parse_and_stop(self, args=None, namespace=None):
        flags_given = {word.split("=")[0] for word in (sys.argv[1:] if args is None else args)}
        assert historic or not flags_given & set(self.old_spellings), "a flag has another name now"
        found = parse(self, args, namespace)
        if isinstance(self, HfArgumentParser):  # the recipe that it describes comes next, and may not be one
            return found
        raise Accepted

    monkeypatch.setattr(OneLineErrors, "parse_args", parse_and_stop)
    monkeypatch.setattr(effnet_hf.recipes.recipe, "Recipe", AcceptedRecipe)

    def check(program: str, arguments: list[str], page: str = "") -> None:
        nonlocal historic
        historic = HISTORY.fullmatch(page) is not None
        try:
            start(program, arguments)
        except Accepted:
            return
        except SystemExit as stop:
            assert stop.code in (0, None), "refused; see the captured stderr"

    return check


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
            extras = {extra for group in re.findall(r"\[(.+?)\]", found.text) for extra in group.split(",")} - {"…"}
            assert all(f"\n{extra} =" in (ROOT / "setup.cfg").read_text() for extra in extras)
        elif arguments[0] == "effnet-hf" and len(arguments) == 2 and arguments[1] in COMMANDS:
            pass  # named, not called
        elif HISTORY.fullmatch(found.page) and any(gone in found.text for gone in GONE):
            pass
        else:
            program, rest = launched(arguments)
            if (ROOT / program).is_file():
                source = (ROOT / program).read_text("utf-8")
                if has_our_parser(source):
                    parsed(program, rest, found.page)
                elif "HfArgumentParser" in source:
                    pass  # the flags are transformers'
                else:  # a script of the tests, with a parser of its own
                    assert all(f'"{word.split("=")[0]}"' in source for word in rest if word.startswith("--"))
            else:
                ours = program.startswith(("effnet_hf", "effnet-hf"))
                assert program in ("effnet-hf", "build") or importlib.util.find_spec(program), f"there is no {program}"
                if ours:
                    parsed(program, rest, found.page)


@pytest.mark.parametrize("found", flags(), ids=lambda found: found.where)
def test_flag_in_the_text_exists(found, known_flags):
    now, ever = known_flags
    assert found.text in (ever | set(GONE) if HISTORY.fullmatch(found.page) else now)


@pytest.mark.parametrize(
    "command", ["effnet-hf train --epoch 3", "python train.py --config b99", "effnet-hf validate --model m --topk 3"]
)
def test_a_wrong_command_is_noticed(command, parsed):
    with pytest.raises(AssertionError):
        parsed(*launched(words(command)))
