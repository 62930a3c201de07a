"""Every link from one page to another leads somewhere."""

import re

import pytest

from .reading import ROOT, links


# Pages that are being written; an entry that exists is one to remove.
PROMISED = {"benchmarks/2026-11-25-cpu.md", "benchmarks/2026-11-25-qat-cpu.md"}


@pytest.mark.parametrize("found", links(), ids=lambda found: found.where)
def test_link_resolves(found):
    target, _, anchor = found.text.partition("#")
    path = (ROOT / found.page).parent / target if target else ROOT / found.page
    assert path.exists() or str(path.resolve().relative_to(ROOT)) in PROMISED
    if anchor:
        headings = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.M)
        assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_promised_pages_are_still_missing():
    assert not [page for page in PROMISED if (ROOT / page).exists()]
