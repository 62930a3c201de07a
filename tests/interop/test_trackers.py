"""Trackers of Accelerate, read back: every figure and every picture of a run has arrived."""

import importlib
import json
import sqlite3
from pathlib import Path

import pytest
from PIL import Image

from effnet_hf.training import train
from tests.training.workbench import cheap_training, read_rows, small_recipe, write_squares


PICTURES = {"plots/first_batch", "plots/confusion"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with a report that tells a tracker."""

    def start(tracker: str) -> Path:
        squares = write_squares(tmp_path / "squares", per_class=8)
        with cheap_training():
            assert train(small_recipe(squares, tmp_path / "run", report_to=[tracker], report=True, epochs=1)) == 0
        return tmp_path / "run"

    monkeypatch.chdir(tmp_path)
    return start


def installed(tracker: str):
    pytest.importorskip(
        tracker, reason=f"{tracker} is not installed, or not with this transformers", exc_type=ImportError
    )
    return importlib.import_module(tracker)


def losses(folder: Path) -> list[float]:
    return [row["train.loss"] for row in read_rows(folder, "train")]


@pytest.mark.client("TensorBoard", "tensorboard", group="Trackers", step="`--report_to tensorboard`")
def test_tensorboard(run):
    installed("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run("tensorboard")
    events = EventAccumulator(str(folder / "logs/effnet_hf"), size_guidance={"images": 0}).Reload()
    assert [entry.value for entry in events.Scalars("train.loss")][:3] == pytest.approx(losses(folder), rel=1e-6)
    assert PICTURES <= {*events.Tags()["images"]} and "val.top1" in events.Tags()["scalars"]


@pytest.mark.client("trackio", "trackio", group="Trackers", step="`--report_to trackio`")
@pytest.mark.filterwarnings("default")  # its own
def test_trackio(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = installed("trackio")
    folder = run("trackio")
    (told,) = trackio.Api().runs("effnet_hf")
    assert told.name == "run"
    (file,) = (tmp_path / "trackio").rglob("*.db")
    with sqlite3.connect(file) as database:
        rows = [json.loads(text) for (text,) in database.execute("select metrics from metrics order by id")]
    assert [row["train.loss"] for row in rows if "train.lr" in row] == pytest.approx(losses(folder))
    pictures = {name: value for row in rows for name, value in row.items() if name.startswith("plots/")}
    assert PICTURES <= pictures.keys() and any("val.top1" in row for row in rows)
    for name in PICTURES:
        kept = Image.open(folder / f"{name}.png").convert("RGB")
        (sent,) = (tmp_path / "trackio").rglob(Path(pictures[name]["file_path"]).name)
        assert Image.open(sent).convert("RGB").tobytes() == kept.tobytes()


@pytest.mark.client(
    "Weights & Biases", "wandb", group="Trackers", step="`--report_to wandb`", limit="seen offline, without its server"
)
@pytest.mark.filterwarnings("default")
def test_wandb(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb = installed("wandb")
    kept = {}

    def log(self, values, *arguments, **options):
        kept.update(values)
        return original(self, values, *arguments, **options)

    original = wandb.Run.log
    monkeypatch.setattr(wandb.Run, "log", log)
    folder = run("wandb")
    assert PICTURES | {"train.loss", "val.top1"} <= kept.keys()
    files = [path.name for path in (tmp_path / "wandb").rglob("*.png")]
    assert any("confusion" in name for name in files) and list((tmp_path / "wandb").rglob("*.wandb"))
    assert losses(folder)


@pytest.mark.client("MLflow", "mlflow-skinny", group="Trackers", step="`--report_to mlflow`")
@pytest.mark.filterwarnings("default")
def test_mlflow(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs the whole of MLflow
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    installed("mlflow")
    folder = run("mlflow")
    (figures,) = (tmp_path / "mlruns").rglob("metrics/train.loss")
    assert [float(line.split()[1]) for line in figures.read_text().splitlines()][:2] == pytest.approx(
        losses(folder)[:2]
    )
    sent = {path.name.partition("-")[0] for path in (tmp_path / "mlruns").rglob("*.png")}
    assert {Path(name).name for name in PICTURES} <= sent
