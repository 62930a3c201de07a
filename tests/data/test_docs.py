"""The Python of docs/data.md runs as it stands, its flags exist, and its figures are the result page's."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from effnet_hf.recipes import Recipe


HOME = Path(__file__).parents[2]
TEXT = (HOME / "docs" / "data.md").read_text("utf-8")


def test_the_snippet_runs(pictures, tmp_path, monkeypatch, capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    (tmp_path / "pictures").symlink_to(pictures)
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    assert "torch.Size([4, 3, 224, 224])" in capsys.readouterr().out


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"--([a-z][a-z_]+)", TEXT))))
def test_every_flag_in_the_text_exists(flag):
    elsewhere = (
        "effnet_hf/data/scan.py",
        "effnet_hf/benchmark/data.py",
        "validate.py",
        "benchmarks/dali_difference.py",
    )
    known = {field.name for field in fields(Recipe)} | {"config"}
    assert flag in known or any(f'"--{flag}"' in (HOME / path).read_text("utf-8") for path in elsewhere)


def test_the_throughput_is_the_pages():
    rows = json.loads((HOME / "benchmarks/2026-11-25-data-cpu/throughput.json").read_text())["throughput"]
    for name in ("imagefolder", "dali-cpu"):
        own = [row for row in rows if row["name"] == f"effnet_hf {name}"]
        cells = " | ".join(f"**{row['ratio_best']:.2f}**" for row in own)
        assert f"| `{name}` | {cells} |" in TEXT
