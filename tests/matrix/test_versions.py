"""What setup.cfg declares is what the make targets install, and all that the package imports."""

import ast
import os
import re
import sys
from pathlib import Path

import pytest
import yaml
from packaging.utils import canonicalize_name
from packaging.version import Version


ROOT = Path(__file__).parents[2]
DISTRIBUTIONS = {  # of modules that are called otherwise
    "PIL": "pillow",
    "modelopt": "nvidia-modelopt",
    "sklearn": "scikit-learn",
    "triton": "torch",  # which brings it on Linux; without it fused/layers.py computes in PyTorch
    "yaml": "pyyaml",
}


@pytest.fixture
def lib(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from lib import versions

    return versions


def test_floors_are_the_declared_minima_and_no_user_gets_a_package_without_one(lib):
    floors, minima = lib.pinned("floors.txt"), {}
    for extra, requirement in lib.declared():
        lows = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        exact = any(bound.operator == "==" for bound in requirement.specifier)
        assert lows or exact or extra in ("dev", "docs"), f"{requirement} has no minimum"
        minima |= {canonicalize_name(requirement.name): Version(low) for low in lows}
    assert {name: Version(version) for name, version in floors.items()} == minima


@pytest.mark.parametrize("file", ["constraints.txt", "transformers5.txt", "newest.txt"])
def test_what_the_tests_were_run_with_is_within_the_declared_bounds(lib, file):
    versions = lib.pinned(file)
    for extra, requirement in lib.declared():
        version = versions.get(canonicalize_name(requirement.name))
        if version and extra != "optimum":  # which pins what only one environment has
            assert version in requirement.specifier, f"{file}: {requirement} but {version}"


def test_no_python_that_we_declare_silently_gets_less(lib):
    """As modelopt was left out on 3.13, without a word."""
    for extra, requirement in lib.declared():
        assert "python" not in str(requirement.marker), f"{extra}: {requirement}"


def test_every_package_that_is_imported_is_declared(lib):
    declared = {canonicalize_name(requirement.name) for _, requirement in lib.declared()}
    for path in (ROOT / "effnet_hf").rglob("*.py"):
        for name in _imported(path) - set(sys.stdlib_module_names) - {"effnet_hf"}:
            assert canonicalize_name(DISTRIBUTIONS.get(name, name)) in declared, f"{path.name} imports {name}"


def _imported(path: Path) -> set[str]:
    """The first words of what a file cannot be opened without; what a function imports may be absent."""
    names = []
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module)
    return {name.split(".")[0] for name in names}


def test_the_weekly_job_is_the_same_everywhere():
    weekly = (ROOT / ".ci/weekly").read_text("utf-8")
    targets = re.search(r"set -- (.+)", weekly)[1].split()
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))["jobs"]
    assert jobs["weekly"]["strategy"]["matrix"]["target"] == targets
    for name, job in jobs.items():
        script = job["steps"][-1]["run"].split()[0]
        assert script == f".ci/{name}" and os.access(ROOT / script, os.X_OK)
