"""The README's four jobs really run, one after the other as a reader would type them, on tiny data."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ..training.workbench import write_squares
from .reading import ROOT, commands, words


pytestmark = pytest.mark.slow  # trains, quantizes and exports whole networks in processes of their own: minutes

SMALL = "--image_size 64 --resize_margin 0 --warmup_epochs 0 --global_batch_size 8 --per_device_batch_size 8"
SMALL = f"{SMALL} --num_workers 0 --batch_norm_momentum 0.1".split()
SMALLER = {
    "convert": ["--num_images", "16"],
    "train": [*SMALL, "--epochs", "1", "--learning_rate", "0.001"],
    # As long as it takes to learn them: an INT8 file of a model that has learned nothing is refused.
    "fine-tune": [*SMALL, "--epochs", "6", "--learning_rate", "0.01"],
    "qat": [*SMALL, "--epochs", "1", "--learning_rate", "0.0001", "--gradient_clip", "1"],
    "validate": ["--num_workers", "0"],
}
JOBS = ("scan", "train", "validate", "classify", "train", "convert", "train", "qat", "export", "export")


def jobs() -> list:
    """The commands of the README's ```bash blocks, in order, that start one of ours."""
    found = [found for found in commands() if found.page == "README.md" and " --" in found.text]
    return [found for found in found if found.text.startswith(("effnet-hf ", "accelerate launch -m"))]


def name_of(command) -> str:
    first, *rest = words(command.text)
    return rest[0] if first == "effnet-hf" else rest[rest.index("-m") + 1].rpartition(".")[2]


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """The folder a reader works in: DIR, and a snapshot or two."""
    folder = tmp_path_factory.mktemp("desk")
    write_squares(folder / "DIR", per_class=16, size=72)
    image = Image.open(folder / "DIR/val/red/0.png")
    for name in ("cat.jpg", "holiday/1.jpg", "shots/1.png", "shots/2.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        image.save(folder / name)
    return folder


def test_every_job_of_the_readme_in_order(desk):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for command in jobs():
        first, *rest = words(command.text)
        started = [sys.executable, "-m", "effnet_hf"]
        if first == "accelerate":
            started = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
            started, rest = [*started, str(ROOT / "accelerate_configs/cpu.yaml")], rest[1:]
        job = "fine-tune" if name_of(command) == "train" and "--model" in rest else name_of(command)
        arguments = [*started, *rest, *SMALLER.get(job, [])]
        done = subprocess.run(arguments, cwd=desk, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command.where}\n{done.stdout}\n{done.stderr}"


def test_the_jobs_are_there_and_connect():
    assert tuple(map(name_of, jobs())) == JOBS
    made = {"DIR", "DIR/train"}
    for command in jobs():
        given = words(command.text)
        used = [given[given.index(flag) + 1] for flag in ("--model", "--data_dir", "--images") if flag in given]
        assert set(used) <= made, command.where
        made |= {given[given.index("--output_dir") + 1]} if "--output_dir" in given else set()
