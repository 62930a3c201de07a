"""`optimum-cli` loads our registration file whenever it starts, for whatever command: it must never raise there."""

import builtins
import runpy
import sys
from pathlib import Path

import pytest


FILE = Path(__file__).parents[2] / "optimum/commands/register/register_effnet_hf.py"


@pytest.mark.parametrize(
    "module, error, told",
    [
        ("optimum.exporters.onnx", ModuleNotFoundError("No module named 'optimum.exporters.onnx'"), ""),
        ("optimum.exporters.onnx", ImportError("cannot import name 'x'"), "ImportError: cannot import name 'x'"),
        ("effnet_hf", ModuleNotFoundError("No module named 'timm'", name="timm"), "No module named 'timm'"),
        ("effnet_hf", RuntimeError("broken"), "RuntimeError: broken"),
    ],
)
def test_it_never_raises(module, error, told, monkeypatch, capsys):
    if type(error) is ImportError:
        pytest.importorskip("optimum.exporters.onnx")
    if isinstance(error, ModuleNotFoundError) and error.name is None:
        error = ModuleNotFoundError(str(error), name=module)
    whole = builtins.__import__

    def lacks(name, *arguments, **named):
        if name.startswith(module):
            raise error
        return whole(name, *arguments, **named)

    monkeypatch.delitem(sys.modules, "effnet_hf.export.optimum", raising=False)
    monkeypatch.setattr(builtins, "__import__", lacks)
    assert runpy.run_path(str(FILE))["REGISTER_COMMANDS"] == []
    complaint = capsys.readouterr().err
    assert told in complaint and complaint.count("\n") == bool(told)
