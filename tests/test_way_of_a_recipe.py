"""The way of a recipe from the command line to the first step, as CONTRIBUTING.md draws it."""

import ast
import sys
from pathlib import Path

import pytest

import effnet_hf
from effnet_hf.commands import train
from effnet_hf.recipes import Recipe
from effnet_hf.training import loop

from .training.workbench import small_recipe, write_squares


PACKAGE = Path(effnet_hf.__file__).parent
PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"


class FirstStep(Exception):
    pass


def follow(run) -> list[str]:
    """The files whose functions hold a recipe, in the order of control passing between them: calls and returns."""
    way: list[str] = []

    def holds(frame) -> bool:
        return any(isinstance(value, Recipe) for value in frame.f_locals.values())

    def visit(frame) -> None:
        place = str(Path(frame.f_code.co_filename).relative_to(PACKAGE))
        if way[-1:] != [place]:
            way.append(place)

    def watch(frame, event, _):
        if not frame.f_code.co_filename.startswith(str(PACKAGE)) or frame.f_code.co_name.startswith("<"):
            return
        if event == "call" and holds(frame):
            visit(frame)
        elif event == "return" and holds(frame):
            caller = frame.f_back
            while caller is not None and not (caller.f_code.co_filename.startswith(str(PACKAGE)) and holds(caller)):
                caller = caller.f_back
            if caller is not None:
                visit(caller)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(before)
    return way


def purpose(place: str) -> str:
    """The first line of a file's docstring."""
    return (ast.get_docstring(ast.parse((PACKAGE / place).read_text("utf-8"))) or "").splitlines()[0]


def drawing(way: list[str]) -> str:
    files = list(dict.fromkeys(way))
    lines = [f"    {number:>2}  {place:<26} {purpose(place)}" for number, place in enumerate(files, 1)]
    return "\n".join([*lines, "", f"{len(files)} files, and {len(way) - len(files)} returns to one it had left."])


def test_the_drawing_is_the_way(tmp_path, monkeypatch):
    """If this fails, the way has changed: make it shorter, then put what it prints between the marks."""
    squares = write_squares(tmp_path / "data", per_class=4, size=16)
    (tmp_path / "small.yaml").write_text(small_recipe(squares, tmp_path / "run").to_yaml())

    def stop(run):
        raise FirstStep

    monkeypatch.setattr(loop, "train_epoch", stop)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(tmp_path / "small.yaml")])

    def start():
        with pytest.raises(FirstStep):
            train.main()

    found = drawing(follow(start))
    drawn = PAGE.read_text("utf-8").split("<!-- way -->\n")[1].split("\n<!-- /way -->")[0]
    assert drawn == found, f"the way is now\n{found}"
