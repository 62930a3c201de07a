"""Memory that a loader process needs for one large image: python benchmarks/picture_memory.py

Writes files of `--pixels` (the largest that are accepted by default) and opens each in a process of its own, as a
validation does and as a training step does whose random crop is the whole image. Printed is how far the process's
memory rises above what it has with everything imported, in bytes a pixel and altogether. Linux; a few GB of memory and
of a temporary folder.
"""

import io
import math
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from effnet_hf import EfficientNetNVImageProcessor
from effnet_hf.cli import ArgumentParser, at_least, run
from effnet_hf.data.pictures import Picture, Reading, read_file
from effnet_hf.data.transforms import EvaluationTransform, TrainTransform
from effnet_hf.recipes import Recipe


MB = 10**6


def gradient(side: int, dtype) -> np.ndarray:
    """Up to white, with some texture; (side, side)."""
    row = np.linspace(0, np.iinfo(dtype).max, side).astype(dtype)
    return row[None] ^ (np.arange(side, dtype=np.uint32)[:, None] % 251).astype(dtype)


def colour(side: int) -> Image.Image:
    plane = Image.fromarray(gradient(side, np.uint8))
    return Image.merge("RGB", (plane, plane, plane))


TURNED = Image.Exif()
TURNED[0x0112] = 6
KINDS: dict[str, Callable[[int], tuple[Image.Image, dict[str, Any]]]] = {
    "JPEG": lambda side: (colour(side), {"format": "JPEG"}),
    "JPEG, progressive": lambda side: (colour(side), {"format": "JPEG", "progressive": True}),
    "JPEG, turned by EXIF": lambda side: (colour(side), {"format": "JPEG", "exif": TURNED}),
    "PNG": lambda side: (colour(side), {"format": "PNG", "compress_level": 1}),
    "PNG of 16 bits": lambda side: (Image.fromarray(gradient(side, np.uint16)), {"format": "PNG", "compress_level": 1}),
    "TIFF": lambda side: (colour(side), {"format": "TIFF"}),
    "TIFF of 16 bits": lambda side: (Image.fromarray(gradient(side, np.uint16)), {"format": "TIFF"}),
    "TIFF of 16 bits, deflated": lambda side: (
        Image.fromarray(gradient(side, np.uint16)), {"format": "TIFF", "compression": "tiff_adobe_deflate"}
    ),
    "TIFF of floats": lambda side: (
        Image.fromarray(gradient(side, np.uint16).astype(np.float32)), {"format": "TIFF", "tiffinfo": {341: 65535.0}}
    ),
}  # fmt: skip


def of_this_process(field: str) -> int:
    """Bytes, of /proc: VmRSS is memory now, VmHWM its peak."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def open_one(file: str, step: str) -> None:
    """In a process of its own: prints bytes of memory and seconds."""
    processor = EfficientNetNVImageProcessor()
    transform = EvaluationTransform(processor) if step == "validation" else TrainTransform(processor, crop_scale=1.0)
    small = io.BytesIO()
    Image.new("RGB", (64, 64)).save(small, "PNG")
    transform(Picture(small.getvalue()), 0)
    random.seed(0)
    before, started = of_this_process("VmRSS"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    transform(Picture(read_file(file), Reading(max_pixels=10**9)), 0)
    print(of_this_process("VmHWM") - before, time.perf_counter() - started)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels", type=at_least(1000), default=Recipe.max_pixels, help="of each file")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, metavar="KIND", help="of files")
    arguments = parser.parse_args(argv)
    side = math.isqrt(arguments.pixels)
    print(f"{side} x {side} pixels\n\n| file | MB | validation, bytes a pixel | GB | s | training | GB | s |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "image")
        for kind in arguments.kinds:
            image, options = KINDS[kind](side)
            image.save(file, **options)
            del image
            cells = [kind, f"{file.stat().st_size / MB:.0f}"]
            for step in ("validation", "training"):
                child = [sys.executable, __file__, "--in_a_process", str(file), step]
                said = subprocess.run(child, capture_output=True, text=True, check=True).stdout.split()
                taken, seconds = float(said[0]), float(said[1])
                cells += [f"{taken / side**2:.1f}", f"{taken / 1e9:.2f}", f"{seconds:.1f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in_a_process"]:
        open_one(*sys.argv[2:])
    else:
        run(main)
