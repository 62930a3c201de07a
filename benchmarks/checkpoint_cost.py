"""What proving a checkpoint costs: python benchmarks/checkpoint_cost.py [--variant b4] [--repeats 5]

Saves the same run with and without `manifest.json`, in turn, and times the check that a resume does. The disk's own
work is in both columns. Results go to benchmarks/2026-11-26-reliability/price/VARIANT.json.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

from effnet_hf import files
from effnet_hf.cli import ArgumentParser, at_least, run
from effnet_hf.files import atomic_write
from effnet_hf.hub import software_versions
from effnet_hf.manifest import problem
from effnet_hf.recipes import load_recipe
from effnet_hf.training.precision import start_accelerator
from effnet_hf.training.setup import build_run, describe_device


TARGET = Path(__file__).resolve().parent / "2026-11-26-reliability/price"


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="b4", help="the network, with its recipe's optimizer and average")
    parser.add_argument("--repeats", type=at_least(1), default=5, help="saves of each kind")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        settings = {"loader": "synthetic", "output_dir": scratch, "quiet": True, "per_device_batch_size": 2}
        recipe, accelerator, _ = start_accelerator(load_recipe(arguments.variant, global_batch_size=2, **settings))
        built = build_run(recipe, accelerator)
        for parameter in built.bare_model.parameters():
            parameter.grad = parameter.detach().clone()
        built.optimizer.step()  # its state exists from here on
        built.checkpoints.save_best(built.bare_model)
        seconds: dict[str, list[float]] = {"with": [], "without": [], "check": []}
        for _ in range(arguments.repeats):
            for kind in ("without", "with"):
                with mock.patch.object(
                    files, "write_manifest", files.write_manifest if kind == "with" else lambda _: None
                ):
                    started = time.perf_counter()
                    folder = built.checkpoints.save(built.progress)
                    seconds[kind].append(time.perf_counter() - started)
            started = time.perf_counter()
            assert problem(folder) is None
            seconds["check"].append(time.perf_counter() - started)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    medians = {kind: round(statistics.median(values), 2) for kind, values in seconds.items()}
    found = {
        "variant": arguments.variant, "n": arguments.repeats, "megabytes": round(size / 1e6), "median_seconds": medians,
        "device": describe_device(accelerator.device), "versions": software_versions(),
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    TARGET.mkdir(parents=True, exist_ok=True)
    with atomic_write(TARGET / f"{arguments.variant}.json") as file:
        file.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
