"""Every number in a result table is what its committed file says; benchmarks/check_numbers.py holds the list."""

import importlib
import re

import pytest

from .reading import ROOT


@pytest.fixture(scope="module")
def numbers():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("check_numbers")


def test_every_claimed_line_stands_in_its_page(numbers):
    assert [line for claim in numbers.CLAIMS if (line := numbers.drifted(claim))] == []


def test_a_changed_result_is_noticed(numbers):
    claim = numbers.CLAIMS[0]
    changed = claim._replace(values={**claim.values, "top1": "**99.9** (99.0 to 100.0)"})
    assert numbers.drifted(changed).startswith("README.md should say: | B0, ours | **99.9**")


def test_every_row_of_the_readmes_results_has_a_source(numbers):
    results = (ROOT / "README.md").read_text("utf-8").split("\n## Results\n")[1].split("\n## ")[0]
    rows = [line for line in results.splitlines() if re.match(r"\| .*\d", line) and "---" not in line]
    headers = {lines.splitlines()[0] for lines in results.split("\n\n") if lines.startswith("|")}
    traced = {claim.line.format(**claim.values) for claim in numbers.CLAIMS} | set(numbers.UNTRACED)
    assert [row for row in rows if row not in headers and not any(line in row for line in traced)] == []
    assert not [line for line in numbers.UNTRACED if line not in results], "an excuse for a row that is gone"
