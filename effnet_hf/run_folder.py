"""What stands in the folder of a run, named here and nowhere else.

output_dir/
  .effnet_hf.json                     whose folder it is, and which names runs made in it; .lock while one runs
  config.json model.safetensors preprocessor_config.json README.md   the best model, opens with from_pretrained
  recipe.yaml metrics.jsonl summary.json plots/
  report/                             what the best model knows: report.html, its figures and pictures; stays local
  manifest.json                       size and SHA-256 of config, weights, processor and code
  ema/                                the moving average of the weights
  checkpoints/update-00001250/        the same files plus what resuming needs, see training/resume.py
  checkpoints/best/                   the best model so far
  checkpoints/data.parquet            which images the run trains and validates on
"""

import os
import re
from pathlib import Path
from typing import Any


MARK = ".effnet_hf.json"  # the first file that a run writes into its folder: whose it is, and what was made


class _Entry:
    """A file or folder of a fixed name: `RunFolder("runs/b0").metrics` is its path."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, folder: "RunFolder", owner: type) -> Path:
        return folder.path / self.name


class RunFolder:
    """The paths in one `output_dir`; nothing is created or read."""

    mark = _Entry(MARK)
    lock = _Entry(".lock")
    recipe = _Entry("recipe.yaml")
    metrics = _Entry("metrics.jsonl")
    summary = _Entry("summary.json")
    bad_files = _Entry("bad_files.txt")
    plots = _Entry("plots")
    report = _Entry("report")
    logs = _Entry("logs")
    profile = _Entry("profile")
    config = _Entry("config.json")
    weights = _Entry("model.safetensors")
    processor = _Entry("preprocessor_config.json")
    card = _Entry("README.md")
    manifest = _Entry("manifest.json")
    ema = _Entry("ema")
    quantization = _Entry("quantization.json")
    sensitivity = _Entry("sensitivity.json")
    sensitivity_plot = _Entry("sensitivity.png")
    benchmark = _Entry("benchmark.json")
    rate_test = _Entry("lr_find.json")
    rate_curve = _Entry("lr_find.png")
    checkpoints = _Entry("checkpoints")
    best = _Entry("checkpoints/best")
    incoming = _Entry("checkpoints/incoming")  # a checkpoint of another folder, until it takes its place
    data = _Entry("checkpoints/data.parquet")
    progress = _Entry("progress.json")  # of a checkpoint: epoch, position in the sample order, best figure

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def written_while_running(self, recipe: Any) -> list[str]:
        """What a run of a recipe may write right in its folder before its end."""
        entries = [self.recipe, self.metrics, self.bad_files, self.checkpoints]
        entries += [self.plots] if recipe.report else []
        entries += [self.logs] if recipe.report_to else []
        entries += [self.profile] if recipe.profile else []
        entries += [self.quantization, self.sensitivity, self.sensitivity_plot] if recipe.placement != "none" else []
        return [path.name for path in entries]

    def published(self, recipe: Any) -> list[str]:
        """What it writes there at its end, besides the files of its model's code."""
        entries = [self.config, self.weights, self.processor, self.card, self.manifest, self.summary, self.plots]
        entries += [self.ema] if recipe.ema_decay else []
        entries += [self.report] if recipe.report else []
        return [path.name for path in entries]

    @staticmethod
    def is_a_runs_name(name: str) -> bool:
        """Whether some run may write it, and may remove it. `name` need not be one: it may come from a damaged mark."""
        entries = {entry.name for entry in vars(RunFolder).values() if isinstance(entry, _Entry)}
        return name in entries - {MARK, ".lock"} and "/" not in name or re.fullmatch(r"\w+\.py", name) is not None

    @staticmethod
    def is_checkpoint(name: str) -> bool:
        return re.fullmatch(r"update-\d{8,}", name) is not None

    @staticmethod
    def is_in_checkpoints(name: str) -> bool:
        """Whether a run makes this in `checkpoints/`."""
        return re.fullmatch(r"update-\d{8,}|best|incoming|data\.parquet", name) is not None

    def checkpoint(self, updates: int) -> Path:
        """The checkpoint after so many optimizer steps."""
        return self.checkpoints / f"update-{updates:08d}"

    def checkpoint_named(self, name: str) -> Path:
        return self.checkpoints / name

    def all_checkpoints(self) -> list[Path]:
        """Whole or damaged, oldest first."""
        found = [path for path in self.checkpoints.glob("update-*") if self.is_checkpoint(path.name) and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("update-")))


def made_by_a_run(folder: str | os.PathLike) -> bool:
    """Whether a run of ours owns this folder: no place to look for images in."""
    return os.path.isfile(os.path.join(folder, MARK))
