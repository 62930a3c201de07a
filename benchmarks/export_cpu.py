"""What exported files compute and how fast, on a CPU: the figures of benchmarks/2026-11-25-export-cpu.md.

    python benchmarks/export_cpu.py parity --data_dir DIR --models CHECKPOINT … b4 widese-b4
    python benchmarks/export_cpu.py speed --data_dir DIR --float CHECKPOINT --quantized QUANTIZED_CHECKPOINT

A variant's name instead of a folder is that network with random weights, batch norm statistics measured on 32 images
of DIR/train and logits centred on them: its top-1 says whether two runtimes agree, nothing about accuracy.
Every figure is of one thread, but with `speed --threads N`. Times are CPU seconds of the process, of several threads
seconds of the clock, runtimes taking turns call by call. `speed` has rows for NNCF where that is installed.
"""

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lib.environment import environment, resolve_device
from lib.report import table, write_figures
from lib.timing import take_turns
from PIL import Image

from effnet_hf import EfficientNetNVConfig, EfficientNetNVForImageClassification, EfficientNetNVImageProcessor
from effnet_hf.checkpoint import open_checkpoint
from effnet_hf.cli import ArgumentParser, at_least, path, run
from effnet_hf.data import DataSource, Picture, Split
from effnet_hf.errors import UserError
from effnet_hf.export import export_model, onnxruntime_runner, openvino_runner
from effnet_hf.export.check import FolderImages, accuracy, compare, pixels_of, run_all
from effnet_hf.export.engines import Place, make_engine
from effnet_hf.export.options import installed
from effnet_hf.export.runners import Runner, torch_runner
from effnet_hf.recipes import Recipe


CPU = torch.device("cpu")
PACKAGES = ("onnx", "onnxruntime", "openvino", "nvidia-modelopt", "nncf")


def images_of(split: Split, count: int) -> list[Image.Image]:
    """Every n-th, so that they cover all classes."""
    return [Picture(split.read(int(i))).rgb() for i in np.linspace(0, len(split) - 1, count)]


def write_untrained(variant: str, data_dir: str, folder: str) -> None:
    torch.manual_seed(0)
    source = DataSource.from_folder(data_dir)
    assert source.train is not None
    settings = {"survival_prob": 1.0, "dropout_rate": 0.0, "batch_norm_momentum": 1.0}
    config = EfficientNetNVConfig.from_variant(variant, id2label=dict(enumerate(source.class_names)), **settings)
    model = EfficientNetNVForImageClassification(config)
    processor = EfficientNetNVImageProcessor.for_image_size(config.image_size)
    pixels = processor(images_of(source.train, 32), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        model.train()(pixels)
        model.classifier.bias -= model.eval()(pixels).logits.mean(0)  # else one class wins on every image
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def parity(arguments) -> list[dict]:
    rows = []
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = name
            if not Path(name).is_dir():
                checkpoint = f"{scratch}/checkpoint"
                write_untrained(name, arguments.data_dir, checkpoint)
            out, count = f"{scratch}/out", arguments.num_images
            found = export_model(checkpoint, out, data_dir=arguments.data_dir, num_images=count)
            size = open_checkpoint(checkpoint).processor.crop_size["height"]
        rows.append(
            {
                "model": Path(name).name if Path(name).is_dir() else f"{name}, random weights",
                "pixels": size,
                "pictures": found.images,
                "largest difference": f"{found.comparison.difference:.1e}",
                "largest logit": f"{found.comparison.scale:.1f}",
                "top-1 agreement, %": f"{found.comparison.agreement:.2f}",
                "MB": f"{found.size / 1e6:.1f}",
            }
        )
        print(rows[-1], flush=True)
    return rows


def speed(arguments) -> list[dict]:
    if not (arguments.float and arguments.quantized):
        raise UserError("speed compares two checkpoints: give --float and --quantized.")
    checkpoint = open_checkpoint(arguments.float, "--float")
    model = checkpoint.load().eval()
    split = DataSource.from_folder(arguments.data_dir, train=False, class_names=checkpoint.class_names).val
    assert split is not None
    pixels = np.stack(checkpoint.processor(images_of(split, 8))["pixel_values"])

    fake_quantized = open_checkpoint(arguments.quantized, "--quantized").load().eval()
    ways: dict[str, dict] = {
        "tensorrt": {},
        "ort-cpu": {},
        "openvino": {},
        "openvino, reduced range": {"reduce_range": True},
    }
    by_nncf = {f"{name} by NNCF": settings for name, settings in ways.items() if name.startswith("openvino")}
    with tempfile.TemporaryDirectory() as folder:
        common = {"data_dir": arguments.data_dir, "num_images": 8}
        files = {"float": export_model(arguments.float, f"{folder}/float", **common).file}
        for name, settings in (ways | (by_nncf if installed("nncf") else {})).items():
            source = arguments.float if name in by_nncf else arguments.quantized
            target = name.split(",")[0].split()[0]
            files[name] = export_model(source, f"{folder}/{name}", int8=target, **settings, **common).file
        threads = arguments.threads
        runners = {
            "float, PyTorch eager": torch_runner(model),
            **{f"float, PyTorch {name}": in_torch(name, model, pixels) for name in ("folded", "compile")},
            "fake quantization, PyTorch eager": torch_runner(fake_quantized),
            "float, ONNX Runtime": onnxruntime_runner(files["float"], threads),
            "ort-cpu INT8, ONNX Runtime": onnxruntime_runner(files["ort-cpu"], threads),
            "tensorrt INT8, ONNX Runtime": onnxruntime_runner(files["tensorrt"], threads),
            "float, OpenVINO": openvino_runner(files["float"], threads),
            "tensorrt INT8, OpenVINO": openvino_runner(files["tensorrt"], threads),
        }
        runners |= {
            f"{name}, INT8, OpenVINO": openvino_runner(files[name], threads)
            for name in (*ways, *by_nncf)
            if name.startswith("openvino") and name in files
        }
        times = {}
        for size, rounds in ((1, 40), (8, 12)):
            samples = take_turns({name: partial(run, pixels[:size]) for name, run in runners.items()}, CPU, rounds)
            kind = "cpu" if threads == 1 else "wall"
            times[size] = {name: 1e3 * statistics.median(getattr(own, kind)) for name, own in samples.items()}
        images = FolderImages(Recipe(data_dir=arguments.data_dir), checkpoint.class_names, arguments.num_images)
        feed = pixels_of(checkpoint.processor)
        outputs = run_all({name: (run, feed) for name, run in runners.items()}, images)
    rows = []
    for name in runners:
        own_float = "float, OpenVINO" if "OpenVINO" in name else "float, ONNX Runtime"
        is_float = name.startswith("float") or "NNCF" in name
        reference = "float, PyTorch eager" if is_float else "fake quantization, PyTorch eager"
        row = {"file, runtime": name, f"top-1, % (n = {len(outputs[name]):,})": accuracy(outputs[name], images.labels)}
        row["agreement with PyTorch, %"] = f"{compare(outputs[reference], outputs[name]).agreement:.1f}"
        for size, found in times.items():
            row[f"ms, batch {size}"] = f"{found[name]:.1f}"
            row[f"x its float, batch {size}"] = f"{found[own_float] / found[name]:.2f}"
            row[f"x PyTorch eager, batch {size}"] = f"{found['float, PyTorch eager'] / found[name]:.2f}"
        rows.append(row)
    return rows


def in_torch(runtime: str, model: EfficientNetNVForImageClassification, pixels: np.ndarray) -> Runner:
    """Another form of the network in PyTorch, as `load_for_inference` has it."""
    engine = make_engine(runtime, model, Place(CPU, "fp32", pixels.shape[-2:], 1))

    @torch.inference_mode()
    def run(array: np.ndarray) -> np.ndarray:
        return engine(torch.from_numpy(array)).numpy()

    return run


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["parity", "speed"])
    parser.add_argument("--models", nargs="+", type=path, default=[], help="checkpoints and variants, for parity")
    parser.add_argument("--data_dir", type=path, required=True, help="folder with train/<class>/… and val/<class>/…")
    parser.add_argument("--num_images", type=at_least(1), default=1000, help="of validation, for accuracy")
    parser.add_argument("--float", type=path, help="checkpoint, for speed")
    parser.add_argument("--quantized", type=path, help="the quantized checkpoint made of it")
    parser.add_argument("--threads", type=at_least(1), default=1, help="of every runtime, for speed")
    parser.add_argument("--output", type=path, help="write the figures to this JSON file")
    parser.old_spellings = {"--num_pictures": "--num_images"}
    arguments = parser.parse_args()
    figures = {"kind": arguments.mode, **environment(resolve_device("cpu", threads=arguments.threads), PACKAGES)}
    figures[arguments.mode] = {"parity": parity, "speed": speed}[arguments.mode](arguments)
    print(f"\n{table(figures[arguments.mode])}")
    if arguments.output:
        write_figures(figures, arguments.output)


if __name__ == "__main__":
    run(main)
