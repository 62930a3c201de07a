"""What exported files compute and how fast, on a CPU: the figures of benchmarks/2026-11-25-export-cpu.md.

    python benchmarks/export_cpu.py parity --data_dir DIR --models CHECKPOINT … b4 widese-b4
    python benchmarks/export_cpu.py speed --data_dir DIR --float CHECKPOINT --quantized QUANTIZED_CHECKPOINT

A variant's name instead of a folder is that network with random weights, batch norm statistics measured on 32 pictures
of DIR/train and logits centred on them: its top-1 says whether two runtimes agree, nothing about accuracy.
Every figure is of one thread. Times are CPU seconds of the process, runtimes taking turns call by call.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from effnet_hf import EfficientNetNVConfig, EfficientNetNVForImageClassification, EfficientNetNVImageProcessor
from effnet_hf.benchmark.report import markdown_table
from effnet_hf.cli import ArgumentParser
from effnet_hf.data import DataSource
from effnet_hf.export import Checkpoint, export_model, open_checkpoint
from effnet_hf.export.pictures import FolderPictures
from effnet_hf.export.runners import onnxruntime_runner, openvino_runner, torch_runner
from effnet_hf.hub import software_versions


def untrained(variant: str, data_dir: str) -> Checkpoint:
    torch.manual_seed(0)
    source = DataSource.from_folder(data_dir)
    settings = {"survival_prob": 1.0, "dropout_rate": 0.0, "batch_norm_momentum": 1.0}
    config = EfficientNetNVConfig.from_variant(variant, id2label=dict(enumerate(source.class_names)), **settings)
    model = EfficientNetNVForImageClassification(config)
    processor = EfficientNetNVImageProcessor.for_image_size(config.image_size)
    (pictures,) = FolderPictures.of(source.train, 32).batches((32,))
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        model.train()(pixels)
        model.classifier.bias -= model.eval()(pixels).logits.mean(0)  # else one class wins on every picture
    return Checkpoint(f"{variant}, random weights", model, processor)


def parity(args) -> list[dict]:
    rows = []
    for name in args.models:
        checkpoint = open_checkpoint(name) if Path(name).is_dir() else untrained(name, args.data_dir)
        with tempfile.TemporaryDirectory() as folder:
            found = export_model(checkpoint, f"{folder}/out", data_dir=args.data_dir, num_pictures=args.num_pictures)
        rows.append(
            {
                "model": Path(checkpoint.name).name,
                "pixels": checkpoint.image_size,
                "pictures": found.pictures,
                "largest difference": f"{found.comparison.difference:.1e}",
                "largest logit": f"{found.comparison.scale:.1f}",
                "top-1 agreement, %": f"{found.comparison.agreement:.2f}",
                "MB": f"{found.size / 1e6:.1f}",
            }
        )
        print(rows[-1], flush=True)
    return rows


def cpu_times(runners: dict, pixels: np.ndarray, batch: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of CPU time per call."""
    taken: dict[str, list[float]] = {name: [] for name in runners}
    for repeat in range(repeats + 2):
        for name, run in runners.items():
            started = time.process_time()
            run(pixels[:batch])
            if repeat >= 2:
                taken[name].append(1e3 * (time.process_time() - started))
    return {name: float(np.median(values)) for name, values in taken.items()}


def speed(args) -> list[dict]:
    float_checkpoint = open_checkpoint(args.float)
    (batch,) = FolderPictures(args.data_dir, float_checkpoint.labels, 8).batches((8,))
    pixels = np.stack(float_checkpoint.processor(batch)["pixel_values"])
    with tempfile.TemporaryDirectory() as folder:
        common = {"data_dir": args.data_dir, "num_pictures": 8}
        files = {"float": export_model(float_checkpoint, f"{folder}/float", **common).file}
        for target in ("tensorrt", "ort-cpu"):
            files[target] = export_model(args.quantized, f"{folder}/{target}", int8=target, **common).file
        runners = {
            "float, PyTorch eager": torch_runner(float_checkpoint.model),
            "float, ONNX Runtime": onnxruntime_runner(files["float"], 1),
            "ort-cpu INT8, ONNX Runtime": onnxruntime_runner(files["ort-cpu"], 1),
            "tensorrt INT8, ONNX Runtime": onnxruntime_runner(files["tensorrt"], 1),
            "float, OpenVINO": openvino_runner(files["float"], 1),
            "tensorrt INT8, OpenVINO": openvino_runner(files["tensorrt"], 1),
        }
        times = {size: cpu_times(runners, pixels, size, repeats) for size, repeats in ((1, 40), (8, 12))}
    rows = []
    for name in runners:
        own_float = "float, OpenVINO" if "OpenVINO" in name else "float, ONNX Runtime"
        row = {"file, runtime": name}
        for size, found in times.items():
            row[f"ms, batch {size}"] = f"{found[name]:.1f}"
            row[f"x its float, batch {size}"] = f"{found[own_float] / found[name]:.2f}"
            row[f"x PyTorch eager, batch {size}"] = f"{found['float, PyTorch eager'] / found[name]:.2f}"
        rows.append(row)
    return rows


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["parity", "speed"])
    parser.add_argument("--models", nargs="+", default=[])
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--num_pictures", type=int, default=1000)
    parser.add_argument("--float")
    parser.add_argument("--quantized")
    parser.add_argument("--output", help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict = {args.mode: {"parity": parity, "speed": speed}[args.mode](args)}
    results["versions"] = software_versions("onnx", "onnxruntime", "openvino", "nvidia-modelopt")
    results["load"] = os.getloadavg()
    for name, rows in results.items():
        if isinstance(rows, list):
            print(f"\n{name}\n\n{markdown_table(rows)}")
    print(json.dumps({name: results[name] for name in ("versions", "load")}))
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
