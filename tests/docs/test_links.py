"""Every link from one page to another leads somewhere."""

import re

import pytest

from .reading import ROOT, links


@pytest.mark.parametrize("found", links(), ids=lambda found: found.where)
def test_link_resolves(found):
    target, _, anchor = found.text.partition("#")
    path = (ROOT / found.page).parent / target if target else ROOT / found.page
    assert path.exists()
    if anchor:
        headings = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.M)
        assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
