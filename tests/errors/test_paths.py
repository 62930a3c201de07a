"""Every option that names a place: `~` is the home folder, nothing is no name, and what cannot be a place is a line."""

import shutil
import sys

import pytest

from effnet_hf.cli import run
from effnet_hf.commands import convert, export, qat
from effnet_hf.commands import train as train_command
from effnet_hf.export import export_model
from effnet_hf.recipes import load_recipe, parse_recipe


OPTIONS = {
    train_command.main: ("data_dir", "output_dir", "model", "teacher", "resume", "dataset_name"),
    qat.main: ("data_dir", "output_dir", "model", "resume"),
    export.main: ("model", "output_dir", "data_dir"),
    convert.main: ("output_dir", "images"),
}
REST = {
    train_command.main: ["--data_dir", "x"],
    qat.main: ["--data_dir", "x"],
    export.main: ["--model", "x", "--output_dir", "y"],
    convert.main: ["x", "--output_dir", "y"],
}


@pytest.fixture
def said(monkeypatch, capsys, tmp_path):
    """Runs a command in an empty folder, which is the home folder too; exit code and everything it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    def call(main, *words):
        monkeypatch.setattr(sys, "argv", ["command.py", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            run(main)
        return ended.value.code, "".join(capsys.readouterr())

    return call


@pytest.mark.parametrize("main, option", [(main, option) for main, options in OPTIONS.items() for option in options])
def test_an_empty_name_is_refused(main, option, said, tmp_path):
    code, text = said(main, *REST[main], f"--{option}", "")
    assert code == 2 and text.count("\n") == 1 and f"--{option}" in text and "is empty; name a" in text
    assert not list(tmp_path.iterdir())


def test_an_empty_source_is_refused(said):
    assert "is empty; name a file or folder" in said(convert.main, "", "--output_dir", "y")[1]
    assert "--to : there are" in said(convert.main, "x", "--to", "")[1]


def test_a_recipe_means_the_home_folder_by_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = ("data_dir", "output_dir", "model", "teacher", "resume")
    typed = parse_recipe([word for name in options for word in (f"--{name}", f"~/{name}")])[0]
    (tmp_path / "mine.yaml").write_text("".join(f"{name}: ~/{name}\n" for name in options))
    read = load_recipe("~/mine.yaml")
    for recipe in (typed, read):
        assert [getattr(recipe, name) for name in options] == [str(tmp_path / name) for name in options]
    assert load_recipe("b0", model="me/x", resume="auto", dataset_name="~/set").dataset_name == str(tmp_path / "set")
    assert load_recipe("b0", model="me/x", resume="auto").model == "me/x"
    monkeypatch.setenv("HOME", "/elsewhere")  # what was written means the same places to everybody
    (tmp_path / "again.yaml").write_text(typed.to_yaml())
    assert load_recipe(str(tmp_path / "again.yaml")).output_dir == str(tmp_path / "output_dir")


def test_commands_mean_the_home_folder_by_a_tilde(said, tmp_path, places):
    shutil.copytree(places["model"], tmp_path / "model")
    assert said(export.main, "--model", "~/model", "--output_dir", "~/out", "--num_images", 2)[0] == 0
    assert said(convert.main, "~/model", "--output_dir", "~/out2")[0] == 0
    assert (tmp_path / "out/model.onnx").is_file() and (tmp_path / "out2/config.json").is_file()
    assert not (tmp_path / "~").exists()


def targets(folder):
    """Places that cannot be written."""
    (folder / "file").write_text("x")
    (folder / "loop").symlink_to("loop")
    (folder / "gone").symlink_to(folder / "file" / "below")
    return ["n" * 300, "n" * 5000, "a/" * 3000, "file", "file/x", "loop", "gone", "/proc/x", "/dev/null", "/dev/null/x"]


def test_a_target_that_cannot_be_is_one_line(said, tmp_path, places):
    for target in targets(tmp_path):
        for main, words in (
            (export.main, ["--model", places["model"], "--num_images", 2, "--format", "onnx", "--output_dir", target]),
            (convert.main, [places["model"], "--output_dir", target]),
            (convert.main, [places["model"], "--to", "timm", "--force", "--output_dir", f"{target}.pth"]),
        ):
            code, text = said(main, *words)
            errors = [line for line in text.splitlines() if "error: " in line]
            if target in ("file", "loop", "gone", "/dev/null") and str(words[-1]).endswith(".pth"):
                continue  # a name that can be
            assert code == 2 and len(errors) == 1 and "Traceback" not in text, (target[:20], text[:500])
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("name", ["n" * 300, "n" * 5000, "a/" * 3000, "~nobody/x", "\udcff", "a\x1b[2Jb", "-", "..."])
def test_a_model_that_cannot_be_is_one_line(name, said):
    for main, words in (
        (export.main, ["--output_dir", "out", f"--model={name}"]),
        (train_command.main, ["--data_dir", "x", "--loader", "synthetic", f"--model={name}"]),
        (convert.main, ["--output_dir", "out", "--", name]),
    ):
        code, text = said(main, *words)
        assert code == 2 and text.count("\n") == 1 and "\x1b" not in text and "Traceback" not in text, text[:500]


def test_from_python_too(tmp_path, places, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(places["model"], tmp_path / "model")
    assert export_model("~/model", tmp_path / "out", num_images=2).file == tmp_path / "out/model.onnx"
