"""What a measurement was made on and with: written into every result file."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

from effnet_hf.errors import UserError
from effnet_hf.hub import software_versions
from effnet_hf.training import allow_tf32


PACKAGES = ("torchvision", "timm", "onnxruntime", "openvino", "nvidia-modelopt")
LOADING = ("torchvision", "timm", "datasets", "pillow", "simplejpeg", "nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13")
MEASURED = ("effnet_hf", "benchmarks/lib")  # folders
HARDWARE_NAME = "EFFNET_HF_HARDWARE"
# Datasheets, for dense fp16 or bf16: (TB/s, TFLOP/s). A measured copy and matrix product stand beside them.
DATASHEETS = {"A100": (2.04, 312), "H100": (3.35, 989), "H200": (4.8, 989)}


def resolve_device(name: str, threads: int | None = None) -> torch.device:
    """Raises `UserError` when there is no such device; sets the threads of a CPU."""
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: there are cpu and cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device; use --device cpu.")
    if threads:
        torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True  # as our training does
    allow_tf32(False)  # torch's own convolutions would use it; `set_precision` switches it on for rows that say so
    return torch.device(name)


def environment(device: torch.device, packages: tuple[str, ...] = PACKAGES) -> dict:
    """Date, commit, hardware, versions of `packages` and the command as typed."""
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "hardware": hardware(device),
        "versions": software_versions(*packages),
        "command": command(),
    }


def hardware(device: torch.device) -> dict:
    facts = {"device": device.type, "name": describe_cpu(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"name": properties.name, "memory_gb": round(properties.total_memory / 2**30, 1)}
        facts |= {"host": describe_cpu(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return facts


def describe_cpu() -> str:
    """Processor and the cores this process may use, or what `suite --hardware` calls them."""
    if os.environ.get(HARDWARE_NAME):
        return os.environ[HARDWARE_NAME]
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def commit() -> str | None:
    """Short hash of the checkout, with `+` where what is measured or measures differs from it."""
    folder = Path(__file__).parents[2]
    try:
        short, changed = (
            subprocess.check_output(["git", "-C", folder, *words], text=True, stderr=subprocess.DEVNULL).strip()
            for words in (["rev-parse", "--short", "HEAD"], ["diff", "--stat", "HEAD", "--", *MEASURED])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return short + ("+" if changed else "")


def command() -> str:
    """As typed, with folders of this machine cut to their last part."""
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    return shlex.join(["python", Path(sys.argv[0]).name, *words])


def datasheet(name: str) -> tuple[float, float] | None:
    """Bandwidth in TB/s and dense bf16 TFLOP/s of a known GPU."""
    return next((peaks for key, peaks in DATASHEETS.items() if key in name), None)
