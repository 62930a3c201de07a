"""One page of everything that is measured: python benchmark.py suite --device cpu (40 minutes)

On a GPU `benchmarks/gpu_check.py` is the better command: it verifies first, and then measures the same parts.

Each part is a command of its own in a process of its own, so that one that dies, or runs out of memory, takes no other
with it. Parts come in the order of their worth; time runs out at the end of the list, and the page names what it cut.
`--parts` measures some of them again into the same folder.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import psutil
import torch

from effnet_hf import cli
from effnet_hf.errors import UserError

from .environment import HARDWARE_NAME, environment, resolve_device
from .page import write_page
from .report import write_figures


SCRIPT = Path(__file__).resolve().parents[2] / "benchmark.py"

# Everybody in the same modes and runtimes; stock transformers is left out for time.
_CPU_TRAIN = "train --modes eager,compile --peer_modes eager,compile --peers timm,torchvision"
_CPU_INFERENCE = (
    "inference --runtime torch,folded,compile,onnxruntime,openvino"
    " --peer_runtime torch,fused,compile,frozen,onnxruntime,openvino --peers timm,torchvision"
)
# name: (most seconds, arguments). B4 trains at 192 pixels on a CPU: at its own 380 a round of steps takes a minute.
CPU_PARTS = {
    "train-b0": (480, f"{_CPU_TRAIN} --variants b0 --image_size 128 --batch_size 32 --rounds 8"),
    "train-b0-small": (420, f"{_CPU_TRAIN} --variants b0 --image_size 224 --batch_size 8 --rounds 6"),
    "train-b4": (600, f"{_CPU_TRAIN} --variants b4 --image_size 192 --batch_size 8 --rounds 5"),
    "inference-b0": (
        600,
        f"{_CPU_INFERENCE} --variants b0 --batch_sizes 1,8 --rounds 15 --seconds 120",
    ),
    "inference-b4": (
        600,
        f"{_CPU_INFERENCE} --variants b4 --batch_sizes 1 --rounds 9 --seconds 120",
    ),
    "memory": (90, "memory --variants b0,b4 --image_size 128 --batch_sizes 8"),
    "roofline": (60, "roofline --variants b0,b4"),
    "ablation": (60, "ablation --variants b0,b4 --image_size 192 --batch_size 8 --rounds 7"),
    "loop": (120, "loop --variants b0 --image_size 128 --batch_sizes 32 --rounds 8 --num_workers 0"),
}
# What `benchmarks/gpu_check.py` measures after it has verified, in the order of its worth; one file for each kind.
# Eager first: what compiles can take minutes on a slow processor, and takes its eager baseline along.
_EAGER = "train --precisions bf16 --modes eager"
_TRAIN = "train --precisions bf16 --modes eager,compile --peer_modes eager,compile --peers timm"
_GRAPHS = "train --precisions bf16 --modes graphs --peer_modes graphs --peers timm"
_INFER = "inference --variants b0,b4 --precisions bf16"
CUDA_PARTS = {
    "roofline": (25, "roofline --variants b0,b4 --precisions bf16,tf32"),
    "train-b0-eager": (60, f"{_EAGER} --variants b0 --batch_size 256 --rounds 5 --burst 3 --peers timm"),
    "train-b4-eager": (80, f"{_EAGER} --variants b4 --batch_size 128 --rounds 4 --burst 2 --peers timm"),
    "inference-1-eager": (
        30,
        f"{_INFER} --batch_sizes 1 --runtime torch,folded,graphs --peer_runtime torch,graphs --peers timm,torchvision"
        " --rounds 150 --seconds 4",
    ),
    "inference-256-eager": (
        45,
        f"{_INFER} --batch_sizes 256 --runtime torch,folded,graphs --peer_runtime torch,graphs --peers timm,torchvision"
        " --rounds 30 --seconds 5",
    ),
    "loop": (40, "loop --variants b0 --precisions bf16 --loaders synthetic,imagefolder --batch_sizes 256 --rounds 30"),
    "train-b0": (300, f"{_TRAIN} --variants b0 --batch_size 256 --rounds 5 --burst 3"),
    "fused": (300, "fused --variants b0 --precisions bf16 --batch_size 256 --rounds 8 --burst 3"),
    "train-b4": (360, f"{_TRAIN} --variants b4 --batch_size 128 --rounds 4 --burst 2"),
    "train-precisions": (
        90,
        "train --variants b0,b4 --precisions bf16,fp16,tf32 --layouts channels_last,nchw --batch_size 64 --rounds 4"
        " --peers timm --budget 75",
    ),
    "train-b0-peers": (
        80,
        f"{_EAGER} --variants b0 --batch_size 256 --rounds 5 --burst 3 --peers torchvision,transformers",
    ),
    "memory": (60, "memory --variants b0,b4 --precisions bf16,fp32 --batch_sizes 64 --peers timm"),
    "inference-1": (
        90,
        f"{_INFER} --batch_sizes 1 --runtime torch,compile-graphs --peer_runtime torch,compile-graphs --peers timm"
        " --rounds 150 --seconds 4",
    ),
    "inference-256": (
        90,
        f"{_INFER} --batch_sizes 256 --runtime torch,compile --peer_runtime torch,compile --peers timm --rounds 30"
        " --seconds 5",
    ),
    "train-b0-graphs": (120, f"{_GRAPHS} --variants b0 --batch_size 256 --rounds 5 --burst 3"),
    # A graph keeps its memory: beside the eager networks B4's would not fit 80 GB.
    "train-b4-graphs": (150, f"{_GRAPHS} --variants b4 --batch_size 128 --rounds 4 --burst 2"),
}
LIMITS = {"cpu": 40 * 60, "cuda": 9 * 60}


def main(argv: list[str] | None = None) -> int:
    parser = cli.ArgumentParser(prog="benchmark.py suite", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--parts", default=None, help="comma-separated names of parts; all of them by default")
    parser.add_argument("--data_dir", type=cli.path, help="images for the real-data part, which is left out without")
    parser.add_argument("--minutes", type=cli.above_zero, help="altogether; 40 on a CPU and 9 on a GPU")
    parser.add_argument(
        "--patience", type=cli.above_zero, default=1.0, help="factor of all time limits; for a busy machine"
    )
    parser.add_argument("--hardware", default=None, help="what the page calls the processor; its own name by default")
    parser.add_argument("--output_dir", type=cli.path, default="benchmarks", help="where the page and its folder go")
    parser.add_argument("--name", default=None, help="of the page; <date>-<hardware> by default")
    arguments = parser.parse_args(argv)
    device = resolve_device(arguments.device, threads=1 if arguments.device == "cpu" else None)
    parts = choose_parts(arguments.parts, CPU_PARTS if device.type == "cpu" else CUDA_PARTS)
    folder = Path(arguments.output_dir, arguments.name or f"{date.today().isoformat()}-{short_name(device)}")
    folder.mkdir(parents=True, exist_ok=True)
    seconds = 60 * arguments.minutes if arguments.minutes else LIMITS[device.type]
    if arguments.hardware:
        os.environ[HARDWARE_NAME] = arguments.hardware
    deadline = time.monotonic() + arguments.patience * seconds
    notes, started = [], time.monotonic()
    for name, (limit, words) in parts.items():
        remaining = deadline - time.monotonic()
        if name == "loop" and not arguments.data_dir:
            notes.append("loop: needs --data_dir")
        elif remaining < 10:
            notes.append(f"{name}: no time left; suite --parts {name} measures it into the same folder")
        else:
            print(f"\n{name}: {words}", flush=True)
            command = [*words.split(), "--device", device.type, "--output", str(folder / f"{name}.json")]
            command += ["--data_dir", arguments.data_dir] if name == "loop" else []
            trouble = run_part(command, min(arguments.patience * limit, remaining))
            notes += [f"{name}: {trouble}"] if trouble else []
    figures = {"kind": "suite", **environment(device), "rows": [], "left_out": notes}
    figures["seconds"] = round(time.monotonic() - started)
    write_figures(figures, folder / "suite.json")
    for note in notes:
        print(f"left out: {note}")
    print(write_page(folder))
    return 0


def choose_parts(wanted: str | None, known: dict) -> dict:
    if wanted is None:
        return known
    for name in wanted.split(","):
        if name not in known:
            raise UserError(f"--parts {name}: there are {', '.join(known)}.")
    return {name: known[name] for name in wanted.split(",")}


def short_name(device: torch.device) -> str:
    """`cpu`, or the GPU's name in lower case without its maker: `h100-80gb-hbm3`."""
    if device.type == "cpu":
        return "cpu"
    return torch.cuda.get_device_name(device).lower().removeprefix("nvidia ").replace(" ", "-")


def run_part(words: list[str], limit: float) -> str | None:
    """Runs one command; a sentence if it did not end well. What it had written by then stays."""
    threads = {"OMP_NUM_THREADS": "1"} if "cpu" in words else {}
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *words], env={**os.environ, **threads}, start_new_session=True, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        _, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        process.communicate()
        return f"stopped after {limit:.0f} s; what it had measured by then is shown"
    except BaseException:
        kill_tree(process.pid)
        raise
    if process.returncode:
        lines = errors.strip().splitlines() or [f"exit code {process.returncode}"]
        return lines[-1]
    return None


def kill_tree(pid: int) -> None:
    """Kills a process that leads its group, the group, and what its descendants started in groups of their own, as
    torchrun and the compiler's workers are."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
