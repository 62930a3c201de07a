"""What Accelerate's trackers need besides figures: a run's name, where a resumed one goes on, and pictures."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..recipes import Recipe


def start_settings(recipe: Recipe, step: int) -> dict[str, dict[str, Any]]:
    """Keyword arguments of each tracker's start, by its name.

    Args:
        step: optimizer steps that are done already. TensorBoard forgets what an earlier launch logged from there on;
            the others cannot, and get a run of its own for every launch.
    """
    name = Path(recipe.output_dir).resolve().name
    named = {"name": f"{name}, from step {step}" if step else name}
    wandb = {} if {"WANDB_NAME", "WANDB_RUN_ID"} & os.environ.keys() else named  # whoever sets these has named it
    return {"tensorboard": {"purge_step": step} if step else {}, "trackio": named, "wandb": wandb}


def send_picture(tracker, name: str, image: Image.Image, step: int) -> None:
    """Gives a tracker an RGB image under a name such as `plots/confusion`.

    Own code: `log_images` is no part of Accelerate's interface, and not the same where a tracker has it.

    Raises:
        Exception: whatever the tracker raises; `NotImplementedError` where it takes no pictures.
    """
    kind = tracker.name
    if kind == "tensorboard":
        tracker.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")
    elif kind in ("wandb", "swanlab"):
        tracker.log_images({name: [image]}, step=step)
    elif kind in ("aim", "clearml"):
        tracker.log_images({name: image}, step=step)
    elif kind == "trackio":
        import trackio

        tracker.log({name: trackio.Image(image)}, step=step)
    elif kind == "mlflow":
        import mlflow

        mlflow.log_image(image, artifact_file=f"{name}-{step}.png")
    elif kind == "comet_ml":
        tracker.tracker.log_image(image, name=name, step=step)
    elif kind == "dvclive":
        tracker.tracker.log_image(f"{name}.png", image)
    else:
        raise NotImplementedError("it takes none that this version knows of")
