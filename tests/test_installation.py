"""What an installation must bring: the Dockerfile keeps the image's own builds, launch files find their library."""

import configparser
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate.utils.environment
import pytest
import torch
import yaml
from accelerate.utils import is_pynvml_available
from packaging.requirements import Requirement


ROOT = Path(__file__).parents[1]
LAUNCH_FILES = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
BOUND = [path for path in LAUNCH_FILES if yaml.safe_load(path.read_text("utf-8")).get("enable_cpu_affinity")]
# As in NVIDIA's images: their own builds come from files, with local versions; the rest from the index.
IMAGE = {
    "torch": "2.10.0a0+b4e4ee8.nv26.10",
    "torchvision": "0.25.0a0+8ac84ee.nv26.10",
    "triton": "3.5.0+gitc3c476f",
    "nvidia_dali_cuda130": "1.52.0",
    "nvidia-dali-tf-plugin-cuda130": "1.52.0",
    "torchprofile": "0.0.4",  # a longer name
    "nvidia-modelopt": "0.37.0",  # ours to choose
    "numpy": "2.3.1",
}


@pytest.fixture
def image(tmp_path):
    """The environment of a process in which `python` and `pip` know the distributions of `IMAGE` and no others."""
    for name, version in IMAGE.items():
        folder = tmp_path / f"site/{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (folder / "direct_url.json").write_text('{"archive_info": {}, "url": "file:///opt/wheels/gone.whl"}')
    (tmp_path / "site/~orch-2.9.0.dist-info").mkdir()  # pip leaves such a folder where an update was interrupted
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    return {"PATH": f"{python.parent}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path / "site")}


def test_dockerfile_constrains_pip_to_what_pip_can_find(image):
    instructions = (ROOT / "Dockerfile").read_text("utf-8").replace("\\\n", "").splitlines()
    (run,) = (line.removeprefix("RUN ") for line in instructions if line.startswith("RUN"))
    snippet, target, install = re.fullmatch(r"(.*) > (\S+) +&& (.*)", run).groups()
    assert f"PIP_CONSTRAINT={target} pip install" in install
    done = subprocess.run(["bash", "-c", snippet], env=image, capture_output=True, text=True, check=True)
    kept = ("nvidia-dali-tf-plugin-cuda130", "nvidia_dali_cuda130", "torch", "torchvision", "triton")
    assert done.stdout.splitlines() == [f"{name}=={IMAGE[name]}" for name in kept]
    for line in done.stdout.splitlines():  # what pip asks of the installed version
        constraint = Requirement(line)
        assert constraint.specifier.contains(IMAGE[constraint.name], prereleases=True)


def required() -> set[str]:
    """Names that `pip install effnet_hf` brings on Linux, without any extra."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = (line for line in setup["options"]["install_requires"].splitlines() if line and not line.startswith("#"))
    requirements = map(Requirement, lines)
    return {one.name for one in requirements if one.marker is None or one.marker.evaluate({"sys_platform": "linux"})}


@pytest.mark.parametrize("path", BOUND, ids=lambda path: path.stem)
def test_binding_to_cores_finds_its_library_without_an_extra(path):
    assert "nvidia-ml-py" in required(), f"accelerate refuses enable_cpu_affinity in {path.name} without it"


@pytest.mark.skipif(sys.platform != "linux", reason="accelerate binds processes on Linux only")
def test_accelerate_binds_to_the_cores_that_the_library_names(monkeypatch):
    """On a machine without a GPU: NVML's answers are made up, what accelerate asks for and does with them is real."""
    assert is_pynvml_available()
    import pynvml

    bound = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: bound.append((pid, list(cores))))
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: SimpleNamespace(index=index))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCpuAffinity", lambda handle, words: [1 << handle.index, 1 << 63])
    accelerate.utils.environment.override_numa_affinity(3, verbose=False)
    assert bound == [(0, [3, 127])]
