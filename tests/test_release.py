"""What commits and releases rest on: version, changelog and tag agree; `make lint` and the hooks are the same tools."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from effnet_hf.__about__ import __version__


ROOT = Path(__file__).parents[1]


def test_changelog_begins_with_unreleased_and_then_this_version():
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert headings[0] == "Unreleased"
    assert re.fullmatch(rf"{re.escape(__version__)} - \d{{4}}-\d\d-\d\d", headings[1])
    kinds = re.findall(r"^### (.+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_a_tagged_commit_has_its_tags_version():
    described = subprocess.run(["git", "tag", "--points-at", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    tags = [tag for tag in described.stdout.split() if re.fullmatch(r"v\d.*", tag)]
    if not tags:
        pytest.skip("no version's tag on this commit")
    assert tags == [f"v{__version__}"]


def test_hooks_are_what_make_lint_runs():
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text("utf-8"), re.M)[1]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"][0]["hooks"]
    tool = re.compile(r"/bin/(ruff \w+|\w+)")
    assert [set(tool.findall(hook["entry"])) for hook in hooks] == [set(tool.findall(x)) for x in recipe.splitlines()]
