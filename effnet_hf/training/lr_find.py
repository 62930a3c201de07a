"""`train --lr_find`: the learning rate range test of Leslie Smith (arXiv:1506.01186) on a recipe's own data and model.

The rate grows from 1e-7 to 10 by the same factor every step until the loss explodes. The longest stretch on which the
smoothed loss falls is found as by fastai (`fastai.callback.schedule.valley`). The suggestion is a third of the rate at
its end, as we choose it: fastai takes the stretch's middle, which was too low as the peak of a
schedule with warm-up: 0.00017 instead of 0.00064 for the digits, and 94 % instead of 98 % after six epochs. Nothing
that was trained is kept.
"""

import json
import math
import tempfile
import time
from itertools import count
from pathlib import Path

import numpy as np

from ..drawn import SOFTWARE
from ..errors import UserError
from ..files import atomic_write
from ..hub import software_versions
from ..recipes import Recipe
from ..run_folder import RunFolder
from .launcher import with_others
from .loop import train_step
from .metrics import LossMeter
from .optim import peak_learning_rate, set_learning_rate
from .owner import on_main
from .plots import refuse_to_replace_a_drawing
from .precision import start_accelerator
from .run import Run
from .setup import build_run, describe_device, introduce, restore_run
from .steps import refuse_to_replace


LOWEST, HIGHEST, STEPS, FEWEST = 1e-7, 10.0, 100, 30
LEAST = 20  # steps that are taken at all: of fewer, too few are left of which the loss could fall
SECONDS = 50.0  # for the steps; the start takes some more
START = 3  # steps at the lowest rate, after the first, which show how long one takes
MEMORY = 0.98  # of the smoothed loss from step to step, where there are 100: fastai's, as what follows
EXPLODES = 4.0  # times the lowest smoothed loss
LEFT_OUT = 0.1, 5  # share of the steps at the beginning, number of them at the end
SAFE = 3.0  # times below the end of the valley
CLEAR = 4.0  # standard deviations of the smoothed loss by which it must fall in the valley; no rule of fastai's


def find_learning_rate(recipe: Recipe, steps: int | None = None) -> dict:
    """Runs the test and writes `lr_find.json` and `lr_find.png` into `output_dir`, beside whatever run is there.

    Args:
        steps: optimizer steps from the lowest to the highest rate; by default 100, or as many as take 50 seconds here,
            at least 30. The same number gives the same curve.

    Returns:
        What `lr_find.json` holds: `suggestion` (for `--learning_rate`, or None where the loss has no clear valley),
        `why` (a sentence), `learning_rates`, `losses` and `smoothed` of every step, and what they were measured on.

    Raises:
        UserError: the recipe or this machine do not allow it, there are fewer than 20 steps, the loss is no finite
            number from the first one on, or a file of such a name is there that is not ours.
    """
    if steps is not None and steps < LEAST:
        raise UserError(f"--steps {steps} are too few for --lr_find to see a loss fall; give at least {LEAST}, or 100.")
    folder = RunFolder(recipe.output_dir)
    with with_others(), tempfile.TemporaryDirectory() as scratch:
        own, accelerator, chosen = start_accelerator(recipe)
        if not recipe.overwrite:
            keys = {"suggestion", "learning_rates"}
            on_main(accelerator, lambda: refuse_to_replace(folder.rate_test, keys, "--lr_find"))
            on_main(accelerator, lambda: refuse_to_replace_a_drawing(folder.rate_curve))
        changes = {"output_dir": scratch, "quiet": True, "report": False, "report_to": [], "ema_decay": 0.0}
        run = build_run(own.replace(**changes), accelerator)
        try:
            restore_run(run)
            introduce(run, chosen)
            steps, rates, losses = _raise_the_rate(run, steps)
        finally:
            run.loaders.close()
            run.report.close()
    suggestion, why, smoothed = suggest(rates, losses, steps)
    figures = {
        "suggestion": suggestion,
        "why": why,
        "recipes_rate": peak_learning_rate(recipe),
        "steps": steps,
        "learning_rates": rates,
        "losses": losses,
        "smoothed": smoothed,
        "global_batch_size": recipe.global_batch_size,
        "recipe": recipe.name,
        "model": recipe.model,
        "device": f"{accelerator.num_processes} x {describe_device(accelerator.device)}",
        "versions": software_versions(),
    }
    if accelerator.is_main_process:
        with atomic_write(folder.rate_test) as file:
            file.write(json.dumps(figures, indent=1, allow_nan=False) + "\n")
        draw(figures, folder.rate_curve)
        run.report.line(f"tried    {len(rates)} of {steps} steps, rates from {rates[0]:.2g} to {rates[-1]:.2g}")
        run.report.line(f"suggest  {f'--learning_rate {suggestion:g}: ' if suggestion else 'none: '}{why}")
        run.report.line(f"         the recipe's own rate is {figures['recipes_rate']:.3g}")
        run.report.line(f"curve    {folder.rate_curve}, figures in {folder.rate_test.name}")
    return figures


def _raise_the_rate(run: Run, steps: int | None) -> tuple[int, list[float], list[float]]:
    """The number of steps there were to be, and the rate and the mean loss of each there was."""
    meter, batches = LossMeter(run.accelerator), _batches(run)

    def step(rate: float) -> float:
        set_learning_rate(run.optimizer, rate)
        for batch in batches:
            meter.add(train_step(run, batch))
            if run.accelerator.sync_gradients:
                return meter.recent()  # of all processes, so that all of them stop
        raise AssertionError("batches have no end")

    run.model.train()
    step(LOWEST)  # the first one prepares much
    started = time.perf_counter()
    for _ in range(START):
        step(LOWEST)
    seconds = (time.perf_counter() - started) / START
    if steps is None:
        fitting = on_main(run.accelerator, lambda: int(SECONDS / seconds) // 10 * 10)
        steps = min(max(fitting, FEWEST), STEPS)
    if steps * seconds > 1.2 * SECONDS:
        run.report.line(f"steps    {steps} of about {seconds:.2g} s each here: {steps * seconds / 60:.2g} minutes")
    rates: list[float] = []
    losses: list[float] = []
    for rate in np.geomspace(LOWEST, HIGHEST, steps).tolist():
        loss = step(rate)
        if not math.isfinite(loss):
            if rates:
                break
            raise UserError(
                f"the loss is {loss} from the first step on, at a learning rate of {LOWEST:g}, so no rate can mend it;"
                " look at --model, the image processor's mean and deviation, and --precision."
            )
        rates.append(rate)
        losses.append(loss)
        smoothed = smooth(losses, MEMORY ** (STEPS / steps))
        if smoothed[-1] > EXPLODES * min(smoothed):
            break
    return steps, rates, losses


def _batches(run: Run):
    run.accelerator.step = 0
    for epoch in count():
        yield from run.train_loader.epoch(epoch)


def smooth(losses: list[float], memory: float) -> list[float]:
    """Their exponential average, divided by what its beginning at 0 lacks."""
    average, smoothed = 0.0, []
    for number, loss in enumerate(losses, 1):
        average = memory * average + (1 - memory) * loss
        smoothed.append(average / (1 - memory**number))
    return smoothed


def suggest(rates: list[float], losses: list[float], steps: int) -> tuple[float | None, str, list[float]]:
    """A rate, to two digits, or None; how it was chosen, or why there is none; and the smoothed losses."""
    memory = MEMORY ** (STEPS / steps)
    smoothed = smooth(losses, memory)
    begin, end = int(LEFT_OUT[0] * steps), len(smoothed) - LEFT_OUT[1]
    if end - begin < 10:
        return None, f"the loss exploded after {len(losses)} of {steps} steps, before it could fall", smoothed
    low, high = longest_valley(smoothed[begin:end])
    low, high = low + begin, high + begin
    fall, noise = smoothed[low] - smoothed[high], _noise(losses, memory, low + 1)
    told = f"from {rates[low]:.2g} to {rates[high]:.2g}"
    if fall <= max(CLEAR * noise, 1e-4 * smoothed[low]):  # a loss that stands still has no noise
        why = f"the curve has no clear valley; its longest fall, {told}, is by {fall:.2g}, with a noise"
        why += f" of {noise:.2g}; --steps {2 * steps} may show one"
        return None, why, smoothed
    why = f"a third of the rate up to which the loss fell the longest, {told} (fastai's valley)"
    return float(f"{rates[high] / SAFE:.1e}"), why, smoothed


def _noise(losses: list[float], memory: float, number: int) -> float:
    """The standard deviation of the smoothed loss of so many steps, from the median difference of two steps' losses."""
    step = float(np.median(np.abs(np.diff(losses)))) / (0.6745 * math.sqrt(2))
    left = memory**number
    return step * math.sqrt((1 - memory) / (1 + memory) * (1 + left) / (1 - left))


def longest_valley(losses: list[float]) -> tuple[int, int]:
    """Begin and end of fastai's valley: the longest falling subsequence ends there and begins so many steps before."""
    lengths = [1] * len(losses)
    for i, loss in enumerate(losses):
        lengths[i] = max((lengths[j] + 1 for j in range(i) if loss < losses[j]), default=1)
    end = lengths.index(max(lengths))
    return max(end - lengths[end], 0), end


def draw(figures: dict, path: Path) -> None:
    """The curve, the suggestion, and the recipe's own rate."""
    import matplotlib.pyplot as plt

    rates, losses, smoothed = (figures[name] for name in ("learning_rates", "losses", "smoothed"))
    with plt.rc_context({"font.size": 9}):
        figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    axis.plot(rates, losses, color="0.7", linewidth=1, label="loss of a step")
    axis.plot(rates, smoothed, color="C0", label="smoothed")
    own = figures["recipes_rate"]
    axis.axvline(own, color="0.4", linestyle=":", label=f"the recipe's {own:.2g}")
    if figures["suggestion"]:
        axis.axvline(figures["suggestion"], color="C3", label=f"--learning_rate {figures['suggestion']:g}")
    low, start = min(smoothed + losses), smoothed[0]
    axis.set(xscale="log", xlabel="learning rate", ylabel="training loss", title="Learning rate range test")
    axis.set_ylim(low - 0.1 * (start - low + 0.1), start + 0.6 * (start - low + 0.1))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="lower left")
    try:
        with atomic_write(path, "wb") as file:
            figure.savefig(file, dpi=200, format="png", metadata={"Software": SOFTWARE})
    finally:
        plt.close(figure)
