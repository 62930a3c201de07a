"""The report in a real browser, from a file: wide, on a phone, in the dark, on paper."""

import pytest

from effnet_hf.analysis import write_report

from .browser import BROWSER, browser
from .test_report import answers_of, network, split  # noqa: F401 (fixtures)


pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome on the PATH")


@pytest.fixture(scope="module")
def path(split, network, tmp_path_factory):  # noqa: F811
    folder, (model, processor) = tmp_path_factory.mktemp("report") / "report", network
    return write_report(
        answers_of(split), split.val, folder, network=model, processor=processor, facts={"device": "CPU"}
    )["page"]


@pytest.fixture(scope="module")
def page():
    with browser() as page:
        yield page


@pytest.mark.parametrize("width, dark", [(1280, False), (390, True)])
def test_opens_from_a_file_and_fits(page, path, width, dark):
    page.open(path, width, dark=dark)
    assert page.complaints == [] and page.run("document.querySelectorAll('svg, iframe').length") == 0
    assert [each for each in page.requests if not each.startswith("data:")] == [path.as_uri()]
    pictures = page.run("[...document.images].map(each => each.naturalWidth)")
    assert len(pictures) > 30 and min(pictures) > 0
    for scroller in ("document.documentElement", "document.body"):
        assert page.run(f"{scroller}.scrollWidth") == width
    # What is cut off on the right is in a box that scrolls.
    outside = """[...document.querySelectorAll("main *")].filter(each => !each.closest(".scroll")
        && each.getBoundingClientRect().right > innerWidth + 1).map(each => each.outerHTML.slice(0, 80))"""
    assert page.run(outside) == []
    light = page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light != dark


def test_class_that_is_never_found_stands_on_the_first_screen(page, path):
    page.open(path, 800, 900)
    box = page.run("document.querySelector('.alarm').getBoundingClientRect().toJSON()")
    assert 0 < box["top"] and box["bottom"] < 900
    assert "no image of never (6)" in page.run("document.querySelector('.alarm').innerText")


def test_a_phone_shows_all_figures(page, path):
    """Without scrolling: the last column of the classes, and both probabilities of a suspect."""
    page.open(path, 390)
    for cells in ("#classes td:last-child", "#classes th:last-child", "#suspects td:nth-last-child(-n+2)"):
        ends = page.run(f"[...document.querySelectorAll('{cells}')].map(each => each.getBoundingClientRect().right)")
        assert ends and 0 < min(ends) and max(ends) <= 390, cells
    head = "getComputedStyle(document.querySelector('#suspects tbody td:last-child'), '::before').content"
    assert "of the other" in page.run(head)


def test_few_rows_are_not_put_into_a_box_that_scrolls(page, path):
    page.open(path)
    assert page.run("document.querySelectorAll('#suspects table, #classes table').length") == 3
    assert page.run("document.querySelectorAll('.tall').length") == 0


def test_hostile_names_are_seen_as_they_are_and_do_nothing(page, path):
    page.open(path)
    names = page.run("[...document.querySelectorAll('#classes td.name')].map(each => each.innerText)")
    assert "<img src=x onerror=alert(1)>" in names and "שלום \\u202e" in names
    assert page.run("document.scripts.length") == 1 and page.complaints == []


def test_table_sorts_by_a_click(page, path):
    page.open(path)
    cells = "[...document.querySelectorAll('#classes .sortable tbody tr')].map(row => row.cells[%d].innerText)"
    click = "document.querySelectorAll('#classes .sortable button')[%d].click()"
    recalls = page.run(cells % 4)
    assert recalls[0].startswith("0.00")  # as it is opened: what is worst comes first
    page.run(click % 4)
    page.run(click % 4)
    assert page.run(cells % 4)[-1].startswith("0.00") and sorted(page.run(cells % 4)) == sorted(recalls)
    assert page.run("document.querySelector('#classes [aria-sort]').getAttribute('aria-sort')") == "descending"
    page.run(click % 0)
    assert page.run(cells % 0) == page.run(
        f"{cells % 0}.sort((a, b) => a.localeCompare(b, undefined, {{numeric: true}}))"
    )


def test_matrix_is_enlarged_by_a_click(page, path):
    page.open(path, 390)
    wide = "document.querySelector('img.zoom').getBoundingClientRect().width"
    before = page.run(wide)
    page.run("document.querySelector('img.zoom').click()")
    assert page.run(wide) > 1.5 * before and page.run("document.documentElement.scrollWidth") == 390


def test_prints(page, path):
    page.open(path, dark=True)
    printed = page.pdf()
    assert printed.startswith(b"%PDF") and len(printed) > 50_000
    page.send("Emulation.setEmulatedMedia", media="print", features=[])
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.run("getComputedStyle(document.querySelector('nav')).display") == "none"
