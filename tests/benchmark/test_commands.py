"""benchmark.py as typed: what each command prints and writes, the page made of it, and how it refuses."""

import importlib
import inspect
import json
import sys

import pytest
import torch
from lib import contenders, data, flags, inference, suite
from PIL import Image

import benchmark as script
from effnet_hf.cli import ArgumentParser, run
from effnet_hf.errors import UserError


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            run(script.main)
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return call


SMALL = ("--image_size", 32, "--rounds", 3, "--peers", "timm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("results") / "2026-01-02-cpu"


def test_train_writes_rows_with_ratios_and_where_they_were_measured(command, folder):
    code, out, _ = command("train", *SMALL, "--batch_size", 2, "--output", folder / "train.json")
    figures = json.loads((folder / "train.json").read_text())
    assert code == 0 and "timm" in out
    assert {"date", "commit", "hardware", "versions", "command", "settings"} <= figures.keys()
    assert figures["hardware"]["threads"] == torch.get_num_threads() and "torch" in figures["versions"]
    assert str(folder) not in json.dumps(figures), "a path of this machine"
    ours, theirs = figures["rows"]
    assert (ours["by"], theirs["by"]) == ("effnet_hf", "timm") and ours["steps"] == 3 and ours["batch"] == 2
    assert theirs["speed_up"]["timm"] == {"wall": 1, "cpu": 1, "cpu_best": 1} and ours["speed_up"]["timm"]["cpu"] > 0
    assert ours["same_mode"] == ours["speed_up"]


def test_train_names_what_did_not_run(command, tmp_path):
    output = tmp_path / "train.json"
    code, out, _ = command(
        "train", *SMALL, "--peers", "", "--variants", "b0,b1", "--batch_size", 2, "--budget", 1e-9, "--output", output
    )
    assert code == 0 and "left out: b0 fp32 channels_last: no time left" in out
    assert not output.exists()


def test_inference_checks_every_runtime_against_the_first(command, folder, monkeypatch):
    flags = ("--runtime", "torch,folded,graphs", "--batch_sizes", "1,2", "--output", folder / "inference.json")
    code, out, _ = command("inference", *SMALL, *flags)
    figures = json.loads((folder / "inference.json").read_text())
    assert code == 0 and {row["runtime"] for row in figures["rows"]} == {"torch", "folded"}
    assert all(row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] for row in figures["rows"])
    assert [line.split(":")[0] for line in figures["left_out"]] == [
        f"b0 fp32 batch {batch}, effnet_hf graphs" for batch in (1, 2)
    ]
    folded = next(row for row in figures["rows"] if row["runtime"] == "folded")
    assert folded["same_mode"] == folded["speed_up"], (
        "nothing was fused in timm's: a folded network stands beside an eager one"
    )
    ours = min((row for row in figures["rows"] if row["by"] == "effnet_hf"), key=lambda row: row["cpu_ms"])
    assert ours["best"]["timm"]["mode"] == "torch"
    fold = inference.fold_batchnorm

    def wrong(model):
        folded = fold(model)
        folded.classifier.weight.data.neg_()
        folded.classifier.bias.data.neg_()
        return folded

    monkeypatch.setattr(inference, "fold_batchnorm", wrong)
    _, out, _ = command("inference", *SMALL, "--batch_sizes", 1)
    assert "effnet_hf folded: its logits differ" in out


@pytest.mark.slow  # exports two whole networks
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_both_sides_run_in_the_runtimes_of_files(command, runtime):
    pytest.importorskip(runtime)
    flags = ("--runtime", f"torch,{runtime}", "--peer_runtime", f"torch,{runtime}", "--batch_sizes", "1,2")
    code, out, _ = command("inference", *SMALL, *flags)
    assert code == 0 and "left out" not in out and out.count(runtime) == 4


def test_torch_fuses_torchvisions_layers_and_none_of_timms():
    pixels = torch.randn(1, 3, 32, 32)
    network = contenders.build("torchvision", "b0", 32).eval()
    with torch.no_grad():
        expected = network(pixels)
        found = inference.fused("torchvision", network)(pixels)
    torch.testing.assert_close(found, expected)
    with pytest.raises(UserError, match="finds nothing to fuse in timm's layers"):
        inference.fused("timm", contenders.build("timm", "b0", 32).eval())


def test_memory_and_roofline_and_ablation_write_their_tables(command, folder):
    assert (
        command("memory", *SMALL[:2], "--peers", "timm", "--batch_sizes", 2, "--output", folder / "memory.json")[0] == 0
    )
    assert command("roofline", "--image_size", 32, "--output", folder / "roofline.json")[0] == 0
    assert command("ablation", *SMALL[:4], "--batch_size", 2, "--output", folder / "ablation.json")[0] == 0
    memory = json.loads((folder / "memory.json").read_text())["rows"]
    assert [(row["by"], row["gradient_checkpointing"]) for row in memory] == [
        ("effnet_hf", False), ("effnet_hf", True), ("timm", False),
    ]  # fmt: skip


def test_the_page_is_rendered_from_the_files_alone(command, folder):
    (folder / "suite.json").write_text(
        json.dumps(
            {**json.loads((folder / "train.json").read_text()), "kind": "suite", "rows": [], "left_out": ["loop: x"]}
        )
    )
    (folder / "notes.md").write_text("It was a busy day.")
    code, out, _ = command("page", folder)
    text = folder.with_name("2026-01-02-cpu.md").read_text()
    assert code == 0 and (folder / "chart.png").stat().st_size > 5000
    for title in (
        "Training step: b0, batch 2",
        "Inference: b0, batch 1, 2",
        "Peak memory",
        "What the machine allows",
        "What each tuning brings",
    ):
        assert f"## {title}\n" in text
    assert "left out: loop: x" in text and "It was a busy day." in text and "python benchmark.py train" in text
    assert "Not run here: a GPU" in text and "| effnet_hf | eager | fp32 | 32 | 2 |" in text


DATA = {
    "date": "2026-01-02",
    "hardware": "a processor, 2 cores",
    "versions": {"torch": "1"},
    "throughput": [{"name": "timm create_loader", "augmentation": "none", "ips_best": 435.1, "ratio_best": 0.784}],
    "decoders": [{"decoder": "Pillow", "ms": 1.278, "equal": True}],
}


def test_a_folder_of_data_results_has_a_page_too(command, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "throughput.json").write_text(json.dumps(DATA))
    assert command("page", tmp_path / "data")[0] == 0
    text = (tmp_path / "data.md").read_text()
    assert "# Speed on a processor, 2 cores, 2026-01-02" in text and "## Input pipelines" in text
    assert "| timm create_loader | none | 435 | 0.78 |" in text and "### Decoders" in text
    assert "take turns" not in text and "chart" not in text


def test_a_page_that_was_written_by_hand_stays(command, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "throughput.json").write_text(json.dumps(DATA))
    (tmp_path / "data.md").write_text("# By hand\n")
    code, _, errors = command("page", tmp_path / "data")
    assert code == 2 and "was written by hand" in errors
    assert (tmp_path / "data.md").read_text() == "# By hand\n"


@pytest.mark.parametrize(
    ("text", "sentence"), [("{", "is damaged"), ("[]", "no hardware"), ('{"top1": 1}', "no hardware")]
)
def test_a_file_that_is_no_result_is_named(command, tmp_path, text, sentence):
    (tmp_path / "other.json").write_text(text)
    code, _, errors = command("page", tmp_path)
    assert code == 2 and "other.json" in errors and sentence in errors


def test_loaders_and_decoders_take_turns_and_have_a_page(command, tmp_path):
    for label in range(2):
        (tmp_path / "images" / f"class{label}").mkdir(parents=True)
        for i in range(2):
            colour = (100 * label, 60 * i, 30)
            Image.new("RGB", (64, 48), colour).save(tmp_path / "images" / f"class{label}" / f"{i}.jpg")
    output = tmp_path / "results" / "data.json"
    small = "--image_size 32 --batch_size 4 --batches 30 --rounds 3 --augmentation none".split()
    code, out, _ = command("data", "--data_dir", tmp_path / "images", *small, "--output", output)
    figures = json.loads(output.read_text())
    assert code == 0 and figures["kind"] == "data" and str(tmp_path) not in json.dumps(figures)
    rows = {row["name"]: row for row in figures["rows"]}
    assert {"timm create_loader", "torchvision reference", "effnet_hf imagefolder"} <= rows.keys()
    assert all(row["rounds"] == 3 and row["ips_best"] >= row["ips_median"] > 0 for row in rows.values())
    assert max(rows[name]["ratio_best"] for name in data.BASELINES) == 1
    assert figures["decoders"][0]["decoder"] == "Pillow" and figures["decoders"][0]["equal"]
    assert "| effnet_hf imagefolder |" in out
    assert command("page", output.parent)[0] == 0


def test_the_suite_runs_its_parts_and_says_what_it_left_out(command, tmp_path, monkeypatch):
    part = "roofline --image_size 32"
    monkeypatch.setattr(suite, "CPU_PARTS", {"roofline": (600, part), "loop": (600, "loop"), "broken": (600, "broken")})
    front = tmp_path / "benchmark.py"  # the script, but that what is to fail does so before it has imported anything
    front.write_text(
        "import runpy, sys\n"
        "if sys.argv[1] == 'broken':\n"
        "    sys.exit('a warning\\nbenchmark.py train: error: unknown flag --no')\n"
        f"runpy.run_path({str(suite.SCRIPT)!r}, run_name='__main__')\n"
    )
    monkeypatch.setattr(suite, "SCRIPT", front)
    code, out, _ = command("suite", "--output_dir", tmp_path, "--name", "page")
    assert code == 0
    text = (tmp_path / "page.md").read_text()
    assert "loop: needs --data_dir" in text and "broken: benchmark.py train: error: unknown flag --no" in text
    assert "python benchmark.py roofline --image_size 32 --device cpu --output roofline.json" in text
    _, out, _ = command("suite", "--output_dir", tmp_path, "--name", "page", "--minutes", 0.01, "--parts", "roofline")
    assert "roofline: no time left" in out
    assert suite.run_part(part.split(), 0.1).startswith("stopped after 0 s")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "--device", "cuda"], "no CUDA device"),
        (["train", "--device", "tpu"], "--device tpu: there are cpu and cuda"),
        (["train", "--variants", "b9"], "there is no b9"),
        (["train", "--precisions", "fp16"], "--precision fp16 needs a GPU"),
        (["train", "--batch_size", "many"], "--batch_size many"),
        (["train", "--batch_size", "0"], "a number above 0"),
        (["train", "--batch_size", "largest"], "give a number on a CPU"),
        (["inference", "--batch_sizes", "1,x"], "no list of numbers"),
        (["inference", "--batch_sizes", "0"], "numbers start at 1"),
        (["inference", "--model", "/nowhere"], "does not exist"),
        (["suite", "--parts", "trian"], "--parts trian: there are"),
        (["page", "nowhere"], "nowhere holds no results"),
        (["loop", "--data_dir", "x", "--precisions", "fp32,bf16"], "one at a time"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the sentences are those of a machine without a GPU")
def test_mistakes_are_one_line(command, arguments, sentence):
    code, _, errors = command(*arguments)
    assert code == 2 and sentence in errors and len(errors.strip().splitlines()) == 1


def test_the_loop_is_not_called_a_cpus_where_training_takes_a_gpu(command, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    code, _, errors = command("loop", "--data_dir", "x", "--device", "cpu")
    assert code == 2 and "CUDA_VISIBLE_DEVICES" in errors


@pytest.mark.parametrize("name", script.COMMANDS)
def test_a_command_reads_every_flag_it_offers(name, monkeypatch):
    offered = set()
    monkeypatch.setattr(ArgumentParser, "parse_args", lambda parser, _: offered.update(parser._option_string_actions))
    module = importlib.import_module(f"lib.{name}")
    with pytest.raises(AttributeError):  # there are no arguments to go on with
        module.main([])
    source = inspect.getsource(module) + inspect.getsource(flags.image_size_for)
    unread = {flag for flag in offered - {"-h", "--help"} if f"arguments.{flag.removeprefix('--')}" not in source}
    assert offered and not unread
