"""The matrix covers what setup.cfg promises, and its table tells failures from what nobody can install."""

import configparser
import subprocess
import sys

import matrix
import pytest
from packaging.requirements import Requirement


@pytest.fixture
def here(monkeypatch, tmp_path):
    """The matrix in an empty folder, with this interpreter in place of an environment."""
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setattr(matrix, "FOLDER", tmp_path)
    monkeypatch.setattr(matrix, "install", lambda *_: sys.executable)
    return matrix.Row("python3.12", "2.11.0", "0.26.0", "5.17.0")


def test_covers_every_python_of_the_metadata_and_versions_within_its_bounds(monkeypatch):
    setup = configparser.ConfigParser()
    setup.read(matrix.ROOT / "setup.cfg")
    classifiers = setup["metadata"]["classifiers"].splitlines()
    pythons = {f"py{line.rpartition(' ')[2]}" for line in classifiers if "Python :: 3." in line}
    monkeypatch.setattr(matrix, "PYTHONS", ["python3.11", "python3.12", "python3.13"])  # whatever PYTHONS says here
    rows = matrix.combinations()
    assert len(rows) == len({row.name for row in rows}) == 18
    assert {matrix.label(row.python) for row in rows} >= pythons
    lines = [line for line in setup["options"]["install_requires"].splitlines() if line and line[0] != "#"]
    bounds = {one.name: one.specifier for one in map(Requirement, lines)}
    for row in rows:
        assert all(getattr(row, name) in bounds[name] for name in ("torch", "torchvision", "transformers")), row.name


def test_a_failing_step_is_named_and_the_others_still_run(here, monkeypatch):
    steps = {
        "import": ("-c", "1"),
        "model": ("-c", "print('FAILED test_a'); raise SystemExit(1)"),
        "train": ("-c", "1"),
    }
    monkeypatch.setattr(matrix, "STEPS", steps)
    matrix.check(here, "uv")
    assert here.seconds["import"] > 0 > here.seconds["model"] and here.seconds["train"] > 0
    table = matrix.table([here])
    assert table.count("FAILED  ") == 1 and "FAILED test_a" in table and "logs/py3.12" in table


@pytest.mark.parametrize(
    ("told", "failed"),
    [("No solution found when resolving dependencies", False), ("Failed to build `x`", False), ("dns error", True)],
)
def test_what_nobody_can_install_is_no_failure_but_a_lost_network_is(here, told, failed, monkeypatch):
    def install(*_):
        raise subprocess.CalledProcessError(1, "uv", stderr=f"  × {told}\n")

    monkeypatch.setattr(matrix, "install", install)
    matrix.check(here, "uv")
    assert any(spent < 0 for spent in here.seconds.values()) == failed
    table = matrix.table([here])
    assert told in table and ("FAILED" in table) == failed and ("cannot be installed" in table) != failed


def test_interpreter_without_a_version_is_refused():
    assert matrix.label("/opt/3.13.0/bin/python3.13") == "py3.13"
    with pytest.raises(SystemExit, match="PYTHONS holds 'python3'"):
        matrix.label("python3")
