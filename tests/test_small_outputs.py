"""What writes a file or two (`benchmark`, `plots`, the examples) takes the place of its own alone."""

import json
import os
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from effnet_hf.commands import plots, scan
from effnet_hf.errors import UserError
from effnet_hf.recipes import load_recipe
from effnet_hf.training import steps


ROOT = Path(__file__).resolve().parents[1]


def example(name: str) -> dict:
    pytest.importorskip({"digits": "sklearn", "photos": "skimage"}[name])
    return runpy.run_path(str(ROOT / f"examples/write_{name}.py"))


class Began(Exception):
    """The benchmark would run now."""


@pytest.mark.parametrize(
    "content, flags, goes_on",
    [
        ('{"name": "mine"}', {}, False),
        ("no JSON", {}, False),
        (None, {}, False),  # a folder
        ('{"name": "mine"}', {"overwrite": True}, True),
        ('{"mode": "train", "steps": 3, "total_ips": 1.5, "compute_ips": 2.0}', {}, True),
    ],
    ids=str,
)
def test_a_benchmark_replaces_only_what_one_wrote(content, flags, goes_on, tmp_path, monkeypatch):
    def build(*_):
        raise Began

    target = tmp_path / "benchmark.json"
    target.write_text(content) if content else target.mkdir()
    monkeypatch.setattr(steps, "build_run", build)
    recipe = load_recipe("b0", loader="synthetic", precision="fp32", output_dir=str(tmp_path), **flags)
    with pytest.raises(Began if goes_on else UserError) as ended:
        steps.benchmark_steps(recipe, "train", 3)
    if not goes_on:
        assert str(ended.value).startswith(f"{target} was not written by a benchmark; move it away, ")
        assert target.is_dir() or target.read_text() == content


@pytest.fixture
def ran(tmp_path):
    (tmp_path / "run").mkdir()
    row = {"type": "epoch", "epoch": 0, "train.loss": 2.0}
    (tmp_path / "run/metrics.jsonl").write_text(json.dumps(row) + "\n")
    return str(tmp_path / "run")


@pytest.mark.parametrize("kind", ["text", "picture", "pipe", "another plot"])
def test_curves_replace_only_curves(kind, ran, tmp_path, capsys):
    target, words = tmp_path / "out/curves.png", [ran, "--output_dir", str(tmp_path / "out")]
    target.parent.mkdir()
    if kind == "text":
        target.write_text("mine")
    elif kind == "picture":
        Image.new("RGB", (2310, 374)).save(target)
    elif kind == "pipe":
        os.mkfifo(target)
    else:
        from matplotlib.figure import Figure

        Figure().savefig(target)
    before = os.stat(target)
    with pytest.raises(UserError, match="curves.png may not have been drawn by this command; move it away"):
        plots.main(words)
    assert os.stat(target).st_ino == before.st_ino
    if kind == "text":
        plots.main([*words, "--overwrite"])
        plots.main(words)  # its own
        assert capsys.readouterr().out == f"{target}\n" * 2


@pytest.mark.parametrize("name", ["digits", "photos"])
@pytest.mark.parametrize("word", ["", "~nobody-here/x"])
def test_an_example_writes_to_no_place_that_is_none(name, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["write.py", word])
    with pytest.raises(SystemExit, match="2"):
        example(name)["main"]()
    assert not any(tmp_path.iterdir()) and "error: argument output: " in capsys.readouterr().err


def test_photographs_replace_no_photographs_of_others(tmp_path, monkeypatch):
    main = example("photos")["main"]
    (tmp_path / "coffee.png").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["write_photos.py", str(tmp_path)])
    with pytest.raises(UserError, match="holds what was not written here, e.g. coffee.png"):
        main()
    assert (tmp_path / "coffee.png").read_text() == "mine"


def test_photographs_come_all_or_none(tmp_path, monkeypatch, capsys):
    main, save, saved = example("photos")["main"], Image.Image.save, []

    def fill(image, path, *more):
        saved.append(path)
        if len(saved) == 2:
            raise OSError(28, "No space left on device", str(path))
        save(image, path, *more)

    monkeypatch.setattr(sys, "argv", ["write_photos.py", str(tmp_path / "photos")])
    with monkeypatch.context() as patch, pytest.raises(UserError, match="photos: No space left on device"):
        patch.setattr(Image.Image, "save", fill)
        main()
    assert not any(path.suffix in (".png", ".tmp") for path in tmp_path.rglob("*"))
    for _ in range(2):  # and over its own
        main()
    assert sorted(path.name for path in (tmp_path / "photos").glob("*.png")) == [
        "camera.png",
        "chelsea.png",
        "coffee.png",
    ]


def test_digits_are_counted_where_they_were_written(tmp_path, monkeypatch, capsys):
    from sklearn.datasets import load_digits
    from sklearn.utils import Bunch

    main, all_digits = example("digits")["main"], load_digits()
    few = Bunch(images=all_digits.images[:30], target=all_digits.target[:30])
    monkeypatch.setitem(main.__globals__, "load_digits", lambda: few)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "argv", ["write_digits.py", "."])
    main()
    assert capsys.readouterr().out == ".: 20 training and 10 held-out images of 10 classes\n"
    assert len(list((tmp_path / "here").glob("*/*/*.png"))) == 30


def test_a_list_of_bad_files_takes_the_place_of_no_picture(tmp_path):
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
    for path in (tmp_path / "data/a/1.png", tmp_path / "data/b/1.png", tmp_path / "cat.png"):
        Image.new("RGB", (24, 24)).save(path)
    before = (tmp_path / "cat.png").read_bytes()
    words = [str(tmp_path / "data"), "--num_workers", "0", "--output"]
    with pytest.raises(UserError, match="cat.png is there and no text file; name another"):
        scan.main([*words, str(tmp_path / "cat.png")])
    assert (tmp_path / "cat.png").read_bytes() == before
    (tmp_path / "list.txt").write_text("ü" * 5000)  # cut within a letter
    assert scan.main([*words, str(tmp_path / "list.txt")]) == 0 and not (tmp_path / "list.txt").read_text()
