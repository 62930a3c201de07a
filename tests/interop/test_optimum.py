"""Optimum: its command line, its exporters, and its ONNX Runtime models."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


pytest.importorskip("optimum.commands", reason="needs optimum")
ROOT = Path(__file__).parents[2]
# As where optimum is installed without optimum-onnx.
BLOCKER = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("optimum.exporters.onnx", "optimum.onnxruntime")):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
"""


def optimum_cli(*words: str, site: Path | None = None) -> subprocess.CompletedProcess:
    code = "from optimum.commands.optimum_cli import main; main()"
    folders = [str(folder) for folder in (site, ROOT) if folder]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.client("optimum-cli env", "optimum", group="Optimum")
@pytest.mark.parametrize("whole", [True, False], ids=["with optimum-onnx", "without optimum-onnx"])
def test_optimum_cli_starts(whole, tmp_path):
    if not whole:
        (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    done = optimum_cli("env", site=None if whole else tmp_path)
    assert done.returncode == 0 and "`optimum` version" in done.stdout, done.stderr
    assert "effnet_hf" not in done.stderr


@pytest.mark.client("optimum-cli export onnx", "optimum", "optimum-onnx", group="Optimum")
@pytest.mark.client("ORTModelForImageClassification", "optimum-onnx", group="Optimum")
def test_export_and_run(folder, classifier, tmp_path):
    pytest.importorskip("optimum.exporters.onnx", reason="needs optimum-onnx")
    from optimum.onnxruntime import ORTModelForImageClassification

    words = ("export", "onnx", "--model", str(folder), "--task", "image-classification", str(tmp_path / "onnx"))
    done = optimum_cli(*words)
    assert done.returncode == 0, done.stderr[-2000:]
    pixels = torch.randn(3, 3, 64, 64)
    found = ORTModelForImageClassification.from_pretrained(tmp_path / "onnx")(pixels).logits
    with torch.no_grad():
        torch.testing.assert_close(torch.as_tensor(found), classifier(pixels).logits, rtol=1e-3, atol=1e-4)
