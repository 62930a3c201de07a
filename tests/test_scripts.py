"""The commands as a user types them: what they print, what they write, how they refuse."""

import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from effnet_hf.cli import run
from effnet_hf.commands import train

from .training.conftest import cheap_runs  # noqa: F401
from .training.workbench import small_recipe, write_squares


ROOT = Path(__file__).parents[1]


def call(script: str, *arguments, stdin: str = "", monkeypatch, capsys) -> tuple[int, str, str]:
    """Runs a script's `main` as its command would; returns exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / f"{script}.py"), *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    with pytest.raises(SystemExit) as exit_:
        run(importlib.import_module(f"effnet_hf.commands.{script}").main)
    captured = capsys.readouterr()
    return exit_.value.code, captured.out, captured.err


@pytest.fixture
def command(monkeypatch, capsys):
    return lambda script, *arguments, stdin="": call(
        script, *arguments, stdin=stdin, monkeypatch=monkeypatch, capsys=capsys
    )


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Pictures, a recipe file, and a model trained on them by the command itself."""
    folder = tmp_path_factory.mktemp("scripts")
    data = write_squares(folder / "data")
    recipe = small_recipe(data, folder / "model", ema_decay=0.0, mixup=0.0, epochs=1)
    (folder / "squares.yaml").write_text(recipe.to_yaml())
    assert train.main(["--config", str(folder / "squares.yaml")]) == 0
    return folder


def test_train_prints_the_recipe_without_running_it(command):
    code, out, _ = command("train", "--config", "b4", "--print_config", "--epochs", "7")
    assert code == 0 and 'variant: "b4"' in out and "epochs: 7" in out


def test_train_benchmark_reports_percentiles_and_leaves_no_run(command, tmp_path):
    flags = ["--loader", "synthetic", "--num_labels", "5", "--image_size", "32", "--epochs", "1"]
    flags += ["--per_device_batch_size", "2", "--global_batch_size", "4", "--output_dir", tmp_path / "out"]
    for mode in ("train", "inference"):
        code, out, _ = command("train", "--benchmark", mode, "--steps", "3", *flags)
        assert code == 0 and "p95" in out
        figures = json.loads((tmp_path / "out/benchmark.json").read_text())
        assert figures["steps"] == 3 and figures["images_per_step"] == (4 if mode == "train" else 2)
        assert figures["latency_p50"] <= figures["latency_p99"]
        assert figures["total_ips"] <= figures["compute_ips"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["benchmark.json"]


def test_profile_writes_a_trace_and_a_table(command, workplace, tmp_path):
    flags = ["--config", workplace / "squares.yaml", "--output_dir", tmp_path, "--profile", "true", "--epochs", "1"]
    code, out, _ = command("train", *flags, "--global_batch_size", "4", "--per_device_batch_size", "4")
    assert code == 0 and f"profile  {tmp_path}/profile/trace.json" in out
    assert json.loads((tmp_path / "profile/trace.json").read_text())["traceEvents"]
    assert "convolution" in (tmp_path / "profile/top_operators.txt").read_text()


def test_validate_prints_figures_or_json(command, workplace):
    arguments = ["--model", workplace / "model", "--data_dir", workplace / "data", "--num_workers", "0"]
    code, out, _ = command("validate", *arguments)
    assert code == 0 and out.startswith("top1 ") and "12 images" in out
    code, out, _ = command("validate", *arguments, "--json")
    assert json.loads(out)["n"] == 12


def test_classify_accepts_files_folders_globs_and_a_list(command, workplace):
    model, val = workplace / "model", workplace / "data/val"
    code, out, _ = command(
        "classify", "--model", model, "--top_k", "2", val / "red/0.png", val / "green", f"{val}/*/1.png"
    )
    assert code == 0
    paths = [line for line in out.splitlines() if line.endswith(".png")]
    assert len(paths) == 1 + 4 + 3 and out.count("%") == 2 * len(paths)
    code, out, _ = command("classify", "--model", model, "--json", "-", stdin=f"{val}/red/0.png\n{val}/blue/2.png\n")
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [Path(answer["path"]).parent.name for answer in answers] == ["red", "blue"]
    for answer in answers:
        assert sum(prediction["score"] for prediction in answer["predictions"]) == pytest.approx(1, abs=1e-5)


def test_classify_reads_every_kind_and_names_the_unreadable(command, workplace, tmp_path):
    picture = Image.open(workplace / "data/val/red/0.png")
    for name in ("a.jpg", "b.webp", "c.bmp", "d.gif"):
        picture.save(tmp_path / name)
    picture.convert("CMYK").save(tmp_path / "e.jpg")
    (tmp_path / "f.png").write_text("not a picture")
    (tmp_path / "g.png").write_bytes((tmp_path / "b.webp").read_bytes()[:30])
    code, out, err = command("classify", "--model", workplace / "model", "--top_k", "1", tmp_path)
    assert code == 2 and out.count("%") == 5
    assert len(err.splitlines()) == 2 and "f.png is not an image that is read here" in err and "Traceback" not in err


def test_classify_precisions_and_plot(command, workplace, tmp_path):
    picture = workplace / "data/val/red/0.png"
    scores = {}
    for precision in ("fp32", "bf16"):
        code, out, _ = command("classify", "--model", workplace / "model", "--json", "--precision", precision, picture)
        assert code == 0
        scores[precision] = {p["label"]: p["score"] for p in json.loads(out)["predictions"]}
    for label, score in scores["fp32"].items():
        assert scores["bf16"][label] == pytest.approx(score, abs=0.05)
    code, _, _ = command("classify", "--model", workplace / "model", "--save_plot", tmp_path / "plot.png", picture)
    assert code == 0 and Image.open(tmp_path / "plot.png").width > 300


def test_a_lower_precision_leaves_batch_norms_statistics_alone(workplace):
    """A variance above 65,504 is infinite in fp16, and a picture's logits are then its biases."""
    from effnet_hf.inference import Classifier

    classifier = Classifier(str(workplace / "model"), device="cpu", precision="bf16")
    model = classifier.pipeline.model
    assert {tensor.dtype for tensor in (*model.parameters(), *model.buffers())} == {torch.float32, torch.int64}
    seen = []
    model.efficientnet.head.conv.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    assert list(classifier([workplace / "data/val/red/0.png"]))[0].predictions
    assert seen == [torch.bfloat16]


PROGRAMS = [path.name for path in sorted(ROOT.glob("*.py"))]


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_explains_every_flag_and_shows_no_empty_default(program, command):
    code, out, err = command(program.removesuffix(".py"), "--help")
    assert (code, err) == (0, "") and out.startswith(f"usage: {program}")
    assert "default: None" not in out and "default: False" not in out
    unexplained = re.findall(r"^  (--\S+)(?: \S+)?\n(?=  -|\n|\Z)", out, re.M)
    assert unexplained == []


def test_output_has_colours_nowhere_and_bars_only_where_someone_looks(command, workplace, tmp_path):
    flags = ["--config", workplace / "squares.yaml", "--output_dir", tmp_path / "run", "--quiet", "false"]
    code, out, err = command("train", *flags)
    assert code == 0 and err == "" and "\x1b" not in out and "\r" not in out
    lines = out.splitlines()
    titles = [line.split()[0] for line in lines if line[:1].strip()]  # what is indented belongs to the line above
    assert titles[:5] == ["model", "data", "batch", "optimize", "device"]
    for word in ("best ", "time ", "model ", "metrics ", "plot ", "next "):
        assert sum(line.startswith(word) for line in lines[-8:]) == 1, out


def test_ctrl_c_twice_stops_at_once_quietly_and_leaves_whole_checkpoints_only(workplace, tmp_path):
    line = [sys.executable, str(ROOT / "train.py"), "--config", str(workplace / "squares.yaml"), "--epochs", "400"]
    line += ["--output_dir", str(tmp_path / "run"), "--warmup_epochs", "1", "--num_workers", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)
    log = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not (log.exists() and '"train"' in log.read_text()):
        time.sleep(0.1)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)  # a terminal's Ctrl-C reaches the loader processes too
        time.sleep(0.05)
    _, err = process.communicate(timeout=120)
    assert process.returncode in (75, 130) and err == ""
    folder = tmp_path / "run/checkpoints"
    assert all((path / "progress.json").is_file() for path in folder.glob("update-*"))
    assert [path for path in folder.glob(".*")] == []


def test_real_sigterm_saves_and_exits_with_75(workplace, tmp_path):
    """A process, a signal, a resume: the whole path, without monkeypatches."""
    line = [sys.executable, str(ROOT / "train.py"), "--config", str(workplace / "squares.yaml"), "--warmup_epochs", "1"]
    line += ["--output_dir", str(tmp_path / "run"), "--resume", "auto", "--epochs"]
    process = subprocess.Popen([*line, "400"], stdout=subprocess.PIPE, text=True)
    log = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count('"train"') >= 3):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "go on with --resume auto" in out
    (checkpoint,) = sorted((tmp_path / "run/checkpoints").glob("update-*"))[-1:]
    progress = json.loads((checkpoint / "progress.json").read_text())
    assert progress["total_updates"] >= 3
    resumed = subprocess.run([*line, str(progress["epoch"] + 1)], capture_output=True, text=True)
    assert (resumed.returncode, resumed.stderr) == (0, "") and f"resume   {checkpoint}" in resumed.stdout
    assert json.loads((tmp_path / "run/summary.json").read_text())["epochs"] == progress["epoch"] + 1
