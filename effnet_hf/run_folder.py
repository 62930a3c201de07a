"""What stands in the folder of a run, named here and nowhere else.

output_dir/
  config.json model.safetensors preprocessor_config.json README.md   the best model, opens with from_pretrained
  recipe.yaml metrics.jsonl summary.json plots/
  ema/                                the moving average of the weights
  checkpoints/update-00001250/        the same files plus what resuming needs, see training/checkpoint.py
  checkpoints/best/                   the best model so far
"""

import os
from pathlib import Path


class _Entry:
    """A file or folder of a fixed name: `RunFolder("runs/b0").metrics` is its path."""

    def __init__(self, name: str):
        self.name = name

    def __get__(self, folder: "RunFolder", owner: type) -> Path:
        return folder.path / self.name


class RunFolder:
    """The paths in one `output_dir`; nothing is created or read."""

    recipe = _Entry("recipe.yaml")
    metrics = _Entry("metrics.jsonl")
    summary = _Entry("summary.json")
    bad_files = _Entry("bad_files.txt")
    plots = _Entry("plots")
    logs = _Entry("logs")
    profile = _Entry("profile")
    config = _Entry("config.json")
    weights = _Entry("model.safetensors")
    processor = _Entry("preprocessor_config.json")
    card = _Entry("README.md")
    ema = _Entry("ema")
    quantization = _Entry("quantization.json")
    sensitivity = _Entry("sensitivity.json")
    sensitivity_plot = _Entry("sensitivity.png")
    benchmark = _Entry("benchmark.json")
    checkpoints = _Entry("checkpoints")
    best = _Entry("checkpoints/best")
    progress = _Entry("progress.json")  # of a checkpoint: epoch, position in the sample order, best figure

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    def left_by_a_run(self) -> list[Path]:
        """What another run that starts in this folder removes: everything but what it replaces itself."""
        stay = {"recipe", "checkpoints", "best", "progress", "benchmark"}
        names = [name for name, entry in vars(RunFolder).items() if isinstance(entry, _Entry) and name not in stay]
        return [getattr(self, name) for name in names]

    def checkpoint(self, updates: int) -> Path:
        """The checkpoint after so many optimizer steps."""
        return self.checkpoints / f"update-{updates:08d}"

    def whole_checkpoints(self) -> list[Path]:
        """Those that can be resumed, oldest first."""
        found = self.checkpoints.glob("update-*")
        return sorted(path for path in found if RunFolder(path).progress.is_file())
