"""What trackers get besides figures, how a resumed run goes on in TensorBoard, and that none ends a run.

That a run sends its pictures: test_examine.py. Other trackers than TensorBoard: tests/interop/test_trackers.py.
"""

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from effnet_hf.errors import UserError
from effnet_hf.recipes import Recipe
from effnet_hf.training.progress import Progress
from effnet_hf.training.report import Report
from effnet_hf.training.trackers import start_settings


def written(folder) -> EventAccumulator:
    return EventAccumulator(str(folder / "logs/effnet_hf"), size_guidance={"images": 0, "scalars": 0}).Reload()


def launch(folder, steps, progress=None) -> Progress:
    """Logs as the loop does; returns what a checkpoint at step 4 would know."""
    Image.new("RGB", (8, 8), "red").save(folder / "first_batch.png")
    report = Report(Accelerator(cpu=True, log_with="tensorboard", project_dir=str(folder / "logs")), quiet=True)
    report.open(Recipe(output_dir=str(folder), report_to=["tensorboard"]), progress)
    report.picture(folder / "first_batch.png", progress.total_updates if progress else 0)
    saved = Progress(update=4, total_updates=4)
    if progress:  # which was saved before its validation
        report.log("val", 4, {"val.top1": 25.0}, epoch=0)
    for step in steps:
        report.log("train", step, {"train.loss": float(step)}, epoch=0, update=step)
        if step == 4:
            report.log("limit", step, {"limit": "words", "train.data_share": 0.5}, epoch=0)
            saved.metrics_bytes = report.position()
            report.log("val", step, {"val.top1": 25.0}, epoch=0)
    report.close()
    return saved


def test_a_resumed_run_has_every_step_once(tmp_path):
    saved = launch(tmp_path, range(1, 7))
    launch(tmp_path, range(5, 9), saved)
    events = written(tmp_path)
    assert [(entry.step, entry.value) for entry in events.Scalars("train.loss")] == [(i, i) for i in range(1, 9)]
    assert [entry.step for entry in events.Scalars("train.data_share")] == [4]
    assert [entry.step for entry in events.Scalars("val.top1")] == [4]
    assert [image.step for image in events.Images("plots/first_batch")] == [0, 4]


@pytest.mark.parametrize("variable", ["WANDB_NAME", "WANDB_RUN_ID"])
def test_a_name_of_ones_own_stays(variable, monkeypatch):
    monkeypatch.delenv("WANDB_NAME", raising=False)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    named = {"name": "b0, from step 4"}
    assert start_settings(Recipe(output_dir="runs/b0"), 4)["wandb"] == named
    monkeypatch.setenv(variable, "mine")
    started = start_settings(Recipe(output_dir="runs/b0"), 4)
    assert (started["wandb"], started["trackio"]) == ({}, named)


def test_a_log_with_a_bad_line_or_a_tracker_that_fails_ends_no_resumed_run(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"type": "train", "epoch": 0, "update": 4, "train.loss": 1}\nnull\n{"a\xff\n'
    )

    class Failed(Failing):
        name = "tensorboard"

        def log(self, values, step=None):
            raise ConnectionError(f"{values} at {step} are lost")

    report = Report(Accelerator(cpu=True, log_with=[Failed()]))
    size = (tmp_path / "metrics.jsonl").stat().st_size
    progress = Progress(update=4, total_updates=4, metrics_bytes=size)
    report.open(Recipe(output_dir=str(tmp_path), report_to=["tensorboard"]), progress)
    assert capsys.readouterr().out.splitlines() == [
        *(f"WARNING  {tmp_path}/metrics.jsonl: line {n} is not JSON of ours; it is left out" for n in (2, 3)),
        "WARNING  tensorboard gets no more figures: {'train.loss': 1} at 4 are lost.",
    ]


class Failing(GeneralTracker):
    name, requires_logging_directory, tracker = "failing", False, None

    def __init__(self, at_start=False):
        super().__init__()
        self.at_start, self.got = at_start, []

    def start(self):
        if self.at_start:
            raise RuntimeError("no API key\nand more")

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None):
        self.got.append(step)
        if step == 2:
            raise ConnectionError("the network is gone")

    def finish(self):
        raise ConnectionError("still gone")


def test_a_tracker_that_fails_ends_no_run(tmp_path, capsys):
    tracker = Failing()
    report = Report(Accelerator(cpu=True, log_with=[tracker]))
    report.open(Recipe(output_dir=str(tmp_path), report_to=["failing"]))
    Image.new("RGB", (8, 8)).save(tmp_path / "confusion.png")
    for step in range(1, 5):
        report.log("train", step, {"train.loss": 1.0}, epoch=0, update=step)
        report.picture(tmp_path / "confusion.png", step)
    report.close()
    assert tracker.got == [1, 2]
    assert capsys.readouterr().out.splitlines() == [
        "WARNING  failing gets no more pictures: it takes none that this version knows of.",
        "WARNING  failing gets no more figures: the network is gone.",
        "WARNING  a tracker did not end well: still gone.",
    ]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_tracker_that_does_not_start_is_said_in_a_line(tmp_path):
    report = Report(Accelerator(cpu=True, log_with=[Failing(at_start=True)]))
    with pytest.raises(UserError, match=r"^--report_to failing: the tracker does not start: no API key\.$"):
        report.open(Recipe(output_dir=str(tmp_path), report_to=["failing"]))
