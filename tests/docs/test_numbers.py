"""Result tables are written from their files by benchmarks/result_tables.py, and nobody types one into the README."""

import importlib
import json
import re

import pytest

from effnet_hf.errors import UserError

from .reading import ROOT


@pytest.fixture
def writer(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("result_tables")


def test_every_page_says_what_the_files_say(writer, capsys):
    assert writer.main(["--check"]) == 0, capsys.readouterr().out


def test_every_table_stands_in_a_page(writer):
    pages = "".join(path.read_text("utf-8") for pattern in writer.PAGES for path in ROOT.glob(pattern))
    assert {match[1] for match in writer.MARKED.findall(pages)} == set(writer.TABLES)


def test_a_changed_result_is_noticed_and_written(writer, monkeypatch, tmp_path, capsys):
    folder = tmp_path / "benchmarks" / writer.QUANTIZED
    folder.mkdir(parents=True)
    for path in (ROOT / "benchmarks" / writer.QUANTIZED).glob("*b0.json"):
        figures = json.loads(path.read_text())
        figures["qat"]["top1"] = 12.3
        (folder / path.name).write_text(json.dumps(figures))
    page = tmp_path / "README.md"
    page.write_text("# A\n\n<!-- numbers: quantization -->\nold\n<!-- /numbers -->\n\nmore\n")
    monkeypatch.setattr(writer, "ROOT", tmp_path)
    monkeypatch.setattr(writer, "RESULTS", tmp_path / "benchmarks")
    assert writer.main(["--check"]) == 1 and "README.md: out of date" in capsys.readouterr().out
    assert "old" in page.read_text()
    assert writer.main([]) == 0 and writer.main(["--check"]) == 0
    text = page.read_text()
    assert "| B0, QAT | **12.3** (10.4 to 14.5) |" in text and "old" not in text and text.endswith("more\n")
    assert f"([page](benchmarks/{writer.QUANTIZED}.md))" in text


def test_a_link_is_relative_to_its_page_and_a_number_may_stand_in_a_sentence(writer):
    text = "<!-- numbers: cpu-loaders -->\n<!-- /numbers -->\n"
    assert f"([page](../benchmarks/{writer.LOADERS}.md))" in writer.render(ROOT / "docs/data.md", text)
    sentence = "costs <!-- numbers: quantization-step-ratio --><!-- /numbers --> times"
    assert "-->**1.74**<!--" in writer.render(ROOT / "README.md", sentence)


def test_an_unknown_name_is_refused(writer):
    with pytest.raises(UserError, match="no numbers called loader;"):
        writer.render(ROOT / "README.md", "<!-- numbers: loader -->\n<!-- /numbers -->")


def test_every_result_table_of_the_readme_is_written_or_quoted(writer):
    results = (ROOT / "README.md").read_text("utf-8").split("\n## Results\n")[1].split("\n## ")[0]
    typed = re.findall(r"(?m)^(?:<!-- quoted: .*-->\n)?\n*(?:\|.*\n)+", writer.MARKED.sub("", results))
    assert [table for table in typed if not table.startswith("<!-- quoted: ")] == []
