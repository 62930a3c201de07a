"""Images per second of `classify --output`, beside its console form and timm's inference.py.

    python benchmarks/predict_speed.py --model runs/b0 --timm_weights b0.pth --timm_script inference.py \
        --images DIR --output benchmarks/DATE-predict-cpu/speed.json

`runs/b0` and `b0.pth` hold the same weights (`effnet-hf convert runs/b0 --to timm --output_dir b0.pth`). The commands
run in turns, each in a fork of this process on one thread. What it takes to open a model is measured with few images
and taken off. Seconds are the processor's, of all processes of a command together: a busy machine stretches the
clock's.
"""

import importlib
import json
import os
import runpy
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from lib.environment import LOADING, environment

from effnet_hf.checkpoint import open_checkpoint
from effnet_hf.cli import ArgumentParser, at_least, path, run
from effnet_hf.data import list_images
from effnet_hf.files import atomic_write


FEW = 16


def main() -> None:
    parser = ArgumentParser(description="Images per second of classify and of timm's inference.py.")
    parser.add_argument("--model", type=path, required=True, help="checkpoint folder")
    parser.add_argument("--timm_weights", type=path, required=True, help="the same weights, converted to timm's keys")
    parser.add_argument("--timm_model", default="efficientnet_b0", help="timm's name of the architecture")
    parser.add_argument("--timm_script", type=path, required=True, help="timm's inference.py")
    parser.add_argument("--images", type=path, required=True, help="folder of images")
    parser.add_argument("--count", type=at_least(2 * FEW), default=400, help="of them, evenly")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="turns of every command")
    parser.add_argument("--output", type=path, required=True, help="JSON file of the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("effnet_hf.commands.classify", "effnet_hf.inference", "timm.data", "timm.models", "timm.utils"):
        importlib.import_module(name)  # before the forks
    checkpoint = open_checkpoint(arguments.model)
    found = list_images(arguments.images)[0]
    chosen = found[:: max(1, len(found) // arguments.count)][: arguments.count]
    rows: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as place:
        folders = {size: _links(Path(place, str(size)), chosen[:size]) for size in (FEW, len(chosen))}
        for turn in range(arguments.rounds):
            for name, call in _commands(arguments, checkpoint, place).items():
                few, many = (_seconds(partial(call, str(folder)), place) for folder in folders.values())
                row = rows.setdefault(name, {"cpu": [], "wall": []})
                row["cpu"].append((len(chosen) - FEW) / (many[0] - few[0]))
                row["wall"].append((len(chosen) - FEW) / (many[1] - few[1]))
                print(f"{turn + 1}  {name}: {row['cpu'][-1]:.1f} images a CPU second", flush=True)
                labels = _labels(Path(place), checkpoint)
                row["labels"] = [labels[file.name] for file in sorted(folders[len(chosen)].glob("*/*"))]
            _save(arguments, len(chosen), turn + 1, rows)


def _save(arguments, images: int, rounds: int, rows: dict[str, dict]) -> None:
    """After every round, since they take long."""
    baseline = next(row for name, row in rows.items() if "baseline" in name)
    kept = [
        {
            "command": name,
            "images/CPU s": median(row["cpu"]),
            "rounds": row["cpu"],
            "ratio": median(row["cpu"]) / median(baseline["cpu"]),
            "images/s by the clock": median(row["wall"]),
            "same label": sum(one == other for one, other in zip(row["labels"], baseline["labels"])),
        }
        for name, row in rows.items()
    ]
    with atomic_write(arguments.output) as file:
        environ = environment(torch.device("cpu"), LOADING)
        json.dump({**environ, "images": images, "rounds": rounds, "rows": kept}, file, indent=1)


def _commands(arguments, checkpoint, place: str) -> dict[str, Callable[[str], None]]:
    """What to call with a folder of images; its answers are in `place` then."""
    processor = checkpoint.processor
    size, edge = processor.crop_size["height"], processor.size["shortest_edge"]
    ours = ["--model", arguments.model, "--device", "cpu", "--top_k", "1"]
    output = ["--output", f"{place}/p.csv", "--overwrite", "--num_workers"]
    timm = ["--device", "cpu", "--model", arguments.timm_model, "--checkpoint", arguments.timm_weights]
    timm += ["--img-size", str(size), "--crop-pct", str(size / edge), "--include-index", "--fullname"]
    timm += ["--interpolation", {2: "bilinear", 3: "bicubic"}[processor.resample], "--label-type", "none"]
    timm += ["--model-kwargs", f"bn_eps={checkpoint.config.batch_norm_eps}"]
    timm += ["--no-console-results", "--results-file", f"{place}/p.csv"]
    for flag, values in (("--mean", processor.image_mean), ("--std", processor.image_std)):
        timm += [flag, *map(str, values)]
    tuned = [*timm, "--channels-last", "--batch-size", "16"]

    def classify(*words: str) -> Callable[[str], None]:
        return lambda folder: importlib.import_module("effnet_hf.commands.classify").main([folder, *ours, *words])

    def script(*words: str) -> Callable[[str], None]:
        def call(folder: str) -> None:
            sys.argv = [arguments.timm_script, folder, *words]
            runpy.run_path(arguments.timm_script, run_name="__main__")

        return call

    return {
        "effnet_hf classify --output": classify(*output, "0"),
        "effnet_hf classify --output, 1 worker": classify(*output, "1"),
        "effnet_hf classify on the console (baseline)": classify("--json"),
        "timm inference.py": script(*timm, "--workers", "0"),
        "timm inference.py, batches of 16, channels last": script(*tuned, "--workers", "0"),
        "timm inference.py, the same, 1 worker": script(*tuned, "--workers", "1"),
    }


def _links(folder: Path, files: list[str]) -> Path:
    """timm wants a folder of classes."""
    (folder / "class").mkdir(parents=True)
    for number, file in enumerate(files):
        os.symlink(os.path.abspath(file), folder / "class" / f"{number:06d}{Path(file).suffix}")
    return folder


def _seconds(call: Callable[[], None], place: str) -> tuple[float, float]:
    """Of the processor and of the clock, for a call in a process of its own."""
    started = time.monotonic()
    child = os.fork()  # with everything imported, and nothing that an earlier command has set
    if not child:
        code = 1
        try:
            with open(f"{place}/p.jsonl", "w") as sys.stdout, open(os.devnull, "w") as sys.stderr:
                call()
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    _, status, used = os.wait4(child, 0)
    if status:
        raise SystemExit("a command failed; see above")
    return used.ru_utime + used.ru_stime, time.monotonic() - started


def _labels(place: Path, checkpoint) -> dict[str, str]:
    """The label of every file of the last command, by its name; what it wrote is gone then."""
    if not (place / "p.csv").exists():
        lines = [json.loads(line) for line in (place / "p.jsonl").read_text().splitlines()]
        return {Path(line["path"]).name: line["predictions"][0]["label"] for line in lines}
    frame = pd.read_csv(place / "p.csv")
    (place / "p.csv").unlink()
    if "label" in frame:
        return dict(zip(map(os.path.basename, frame["path"]), frame["label"]))
    names = [checkpoint.class_names[i] for i in frame["index"]]
    return dict(zip(map(os.path.basename, frame["filename"]), names))


if __name__ == "__main__":
    run(main)
