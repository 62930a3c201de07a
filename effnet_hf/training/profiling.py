"""A torch profiler trace of a few optimizer steps, for `--profile`."""

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from ..files import atomic_folder
from ..quiet import quiet_profiler
from ..recipes import Recipe
from ..run_folder import RunFolder
from .owner import set_aside


class Profiler:
    """Traces optimizer steps 4 to 8 of a launch on the first process; does nothing without `recipe.profile`.

    Writes `output_dir/profile/trace.json`, for chrome://tracing or Perfetto, and `top_operators.txt`.
    """

    WAIT, WARMUP, ACTIVE = 2, 1, 5

    def __init__(self, recipe: Recipe, accelerator):
        self.folder = RunFolder(recipe.output_dir).profile
        self.profile = None
        if recipe.profile and accelerator.is_main_process:
            quiet_profiler()
            self.on_cuda = accelerator.device.type == "cuda"
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.on_cuda
            self.profile = profile(
                activities=activities,
                schedule=schedule(wait=self.WAIT, warmup=self.WARMUP, active=self.ACTIVE, repeat=1),
                on_trace_ready=self._write,
            )

    def __enter__(self):
        if self.profile is not None:
            self.profile.__enter__()
        return self

    def __exit__(self, *exception):
        if self.profile is not None:
            self.profile.__exit__(*exception)

    def step(self) -> None:
        """Called after every optimizer step."""
        if self.profile is not None:
            self.profile.step()

    def _write(self, finished: torch.profiler.profile) -> None:
        order = "self_device_time_total" if self.on_cuda else "self_cpu_time_total"
        table = finished.key_averages().table(sort_by=order, row_limit=20)
        set_aside(self.folder)
        with atomic_folder(self.folder, overwrite=True, ours=True) as folder:
            finished.export_chrome_trace(str(folder / "trace.json"))
            (folder / "top_operators.txt").write_text(table, encoding="utf-8")
