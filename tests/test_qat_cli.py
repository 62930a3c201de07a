"""qat.py as it is typed, on handwritten digits, and every other command on the folder it leaves."""

import json
import runpy
import sys

import pytest
from transformers import pipeline

from effnet_hf.commands import train

from .test_scripts import ROOT, command  # noqa: F401
from .training.conftest import cheap_runs  # noqa: F401


pytest.importorskip("modelopt", reason="needs the quant extra: pip install -e '.[quant]'")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A few of the digits, and a float model trained on them for an epoch by the command."""
    folder = tmp_path_factory.mktemp("qat")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["write_digits.py", str(folder / "digits")])
        runpy.run_path(str(ROOT / "examples/write_digits.py"))["main"]()
    for split, most in (("train", 12), ("val", 4)):
        for label in (folder / "digits" / split).iterdir():
            for picture in sorted(label.iterdir())[most:]:
                picture.unlink()
    line = ["--config", "digits", "--data_dir", folder / "digits", "--epochs", "1", "--num_workers", "0"]
    line += ["--output_dir", folder / "float", "--survival_prob", "1", "--quiet", "true"]
    assert train.main([str(word) for word in line]) == 0
    return folder


def flags(workplace, output):
    settings = {
        "config": "imagenette-qat",
        "model": workplace / "float",
        "data_dir": workplace / "digits",
        "output_dir": output,
        "crop_scale": 0.6,
        "horizontal_flip": 0,
        "num_workers": 0,
        "quiet": "true",
    }
    return [word for name, value in settings.items() for word in (f"--{name}", value)]


def test_qat_leaves_a_folder_that_every_command_takes(command, workplace, tmp_path):  # noqa: F811
    code, out, err = command("qat", *flags(workplace, tmp_path / "int8"), "--calibration_batches", "2")
    assert code == 0, err
    rows = out.splitlines()[out.splitlines().index("", out.splitlines().index("") + 1) + 1 :]
    assert [row.split("  ")[0] for row in rows[1:4]] == ["float", "PTQ, calibrated only", "QAT, fine-tuned"]
    figures = json.loads((tmp_path / "int8/quantization.json").read_text())
    picture = next((workplace / "digits/val").rglob("*.png"))

    code, out, _ = command("validate", "--model", tmp_path / "int8", "--data_dir", workplace / "digits", "--json")
    assert json.loads(out)["loss"] == pytest.approx(figures["qat"]["loss"], rel=1e-4)
    flat = ["--data_dir", workplace / "digits/train", "--val_fraction", "0.25", "--model", tmp_path / "int8"]
    assert "on 30 images" in command("validate", *flat)[1]
    code, out, _ = command("classify", "--model", tmp_path / "int8", "--top_k", "2", picture)
    assert code == 0 and out.count("%") == 2
    best = pipeline("image-classification", model=str(tmp_path / "int8"), trust_remote_code=True)(str(picture))[0]
    assert best["label"] == out.splitlines()[1].split()[-1]

    code, out, _ = command("qat", *flags(workplace, tmp_path / "int8"), "--calibration_batches", "2")
    assert code == 2  # the folder holds a run


WRONG = [
    (["--model", "no/such"], "no/such"),
    (["--epochs", "0", "--calibration_batches", "0"], "--calibration_batches must be at least 1"),
    (["--calibration_method", "mse"], "--calibration_method"),
    (["--config", "digits"], "quantizes nothing; add --placement"),
    (["--skip_calibration", "true"], "has no ranges to keep"),
    (["--float_layers", "fc"], "--float_layers fc: the model has no such layer"),
]


@pytest.mark.parametrize("arguments, named", WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG])
def test_mistake_is_one_line_and_exit_code_2(arguments, named, command, workplace, tmp_path):  # noqa: F811
    code, _, err = command("qat", *flags(workplace, tmp_path / "run"), *arguments)
    assert code == 2 and named in err and len(err.splitlines()) == 1, err


def test_train_sends_a_quantization_recipe_to_qat(command, workplace):  # noqa: F811
    code, _, err = command("train", "--config", "quant-b0", "--data_dir", workplace / "digits")
    assert code == 2 and "is a recipe that quantizes; run python qat.py instead" in err and len(err.splitlines()) == 1
