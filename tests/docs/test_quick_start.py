"""The README's commands really run, one after the other as a reader would type them, on tiny data."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from effnet_hf import EfficientNetNVConfig, EfficientNetNVForImageClassification
from effnet_hf.conversion import to_foreign

from ..training.workbench import write_squares
from .reading import ROOT, commands, words


pytestmark = pytest.mark.slow  # trains, quantizes and exports whole networks in processes of their own: minutes

# What the README calls them, and what stands for them here.
PLACEHOLDERS = {"DIR": "pictures", "me/effnet-b0": "runs/b0"}
SMALL = "--image_size 64 --resize_margin 0 --warmup_epochs 0 --global_batch_size 8 --per_device_batch_size 8"
SMALL = f"{SMALL} --num_workers 0 --batch_norm_momentum 0.1".split()
SMALLER = {
    "train.py": [*SMALL, "--epochs", "4", "--learning_rate", "0.001"],
    "qat.py": [*SMALL, "--epochs", "1", "--learning_rate", "0.0001", "--gradient_clip", "1"],
    "validate.py": ["--num_workers", "0"],
}


def quick_start() -> list:
    """The commands of the README's ```bash blocks, in order, that start a script of ours."""
    found = [found for found in commands() if found.page == "README.md" and ".py" in found.text]
    blocks = [found for found in found if found.text.startswith(("python ", "accelerate launch"))]
    last = (ROOT / "README.md").read_text("utf-8").split("\n## The same mathematics")[0].count("\n")
    return [found for found in blocks if found.line <= last]


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """The folder a reader works in: pictures, a snapshot or two, and NVIDIA's checkpoint."""
    folder = tmp_path_factory.mktemp("desk")
    write_squares(folder / "pictures", per_class=16, size=72)
    picture = Image.open(folder / "pictures/val/red/0.png")
    for name in ("cat.jpg", "holiday/1.jpg", "shots/1.png", "shots/2.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        picture.save(folder / name)
    model = EfficientNetNVForImageClassification(EfficientNetNVConfig.from_variant("widese-b4", num_labels=10))
    torch.save(to_foreign(model, "nvidia"), folder / "nvidia_efficientnet-widese-b4_210412.pth")
    return folder


def test_every_job_of_the_readme_in_order(desk):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for command in quick_start():
        arguments = [PLACEHOLDERS.get(word, word) for word in words(command.text)]
        if arguments[0] == "accelerate":
            launcher = [sys.executable, "-m", "accelerate.commands.launch"]
            arguments = [*launcher, "--config_file", str(ROOT / "accelerate_configs/cpu.yaml"), *arguments[2:]]
        else:
            arguments[0] = sys.executable
        script = next(word for word in arguments if word.endswith(".py") and "/" not in word)
        arguments = [str(ROOT / word) if word == script else word for word in arguments]
        done = subprocess.run(
            [*arguments, *SMALLER.get(script, [])], cwd=desk, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command.where}\n{done.stdout}\n{done.stderr}"


def test_the_jobs_are_there():
    scripts = {word for command in quick_start() for word in words(command.text) if word.endswith(".py")}
    assert {"train.py", "validate.py", "classify.py", "convert.py", "qat.py", "export.py"} <= scripts
