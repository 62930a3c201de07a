"""NVIDIA's EfficientNet recipe, spoken in Hugging Face's language.

Importing this package registers the model family with transformers' Auto classes. What trains, measures and exports is
imported when it is first asked for: `from effnet_hf import load_recipe, train`.
"""

import importlib
import logging
from inspect import signature
from typing import TYPE_CHECKING, Any

from .__about__ import __version__
from .cli import importing
from .errors import UserError


# Where torchao is installed transformers imports it, and torch tells torchao's developers what they may leave out.
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
with importing():  # torch and transformers take seconds
    from transformers import (
        AutoBackbone,
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageClassification,
        AutoVideoProcessor,
    )

    from .configuration import EfficientNetNVConfig
    from .image_processing_efficientnet_nv import EfficientNetNVImageProcessor
    from .modeling_efficientnet_nv import (
        EfficientNetNVBackbone,
        EfficientNetNVForImageClassification,
        EfficientNetNVModel,
        EfficientNetNVPreTrainedModel,
    )


AutoConfig.register(EfficientNetNVConfig.model_type, EfficientNetNVConfig)
AutoModel.register(EfficientNetNVConfig, EfficientNetNVModel)
AutoModelForImageClassification.register(EfficientNetNVConfig, EfficientNetNVForImageClassification)
AutoBackbone.register(EfficientNetNVConfig, EfficientNetNVBackbone)
if "image_processor_classes" in signature(AutoImageProcessor.register).parameters:  # transformers >= 5
    # The same class whichever backend is asked for: evaluation matches training to the pixel, which leaves no choice.
    backends = dict.fromkeys(("pil", "torchvision"), EfficientNetNVImageProcessor)
    AutoImageProcessor.register(EfficientNetNVConfig, image_processor_classes=backends)  # type: ignore[call-arg]
else:
    AutoImageProcessor.register(EfficientNetNVConfig, slow_image_processor_class=EfficientNetNVImageProcessor)
# That there is none is worth saying: `pipeline` of transformers 5 looks for one, and otherwise asks whether to run the
# folder's code. By position, because the argument's name and type differ between the versions; none is none in all.
AutoVideoProcessor.register(EfficientNetNVConfig, None)

if TYPE_CHECKING:
    from .export import export_model, load_for_inference
    from .inference import Classifier
    from .recipes import Recipe, load_recipe
    from .training import validate_checkpoint

_OFFERED_BY = {
    "Classifier": "inference",
    "Recipe": "recipes",
    "export_model": "export",
    "load_for_inference": "export",
    "load_recipe": "recipes",
    "validate_checkpoint": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _OFFERED_BY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = offered = getattr(importlib.import_module(f".{_OFFERED_BY[name]}", __name__), name)
    return offered


def __dir__() -> list[str]:
    return sorted({*globals(), *_OFFERED_BY})


def train(recipe: "Recipe") -> dict[str, Any] | None:
    """Trains as a recipe says, as `effnet-hf train` does, and leaves a `save_pretrained` folder in `recipe.output_dir`.

        train(load_recipe("finetune", model="runs/b0", data_dir="flowers", output_dir="runs/mine"))["top1"]

    The process is left as it was: signal handlers, torch's switches for determinism and TF32, matplotlib's backend. A
    next run may have another precision.

    Returns:
        What `summary.json` in that folder holds: `top1` (percent) and the other figures of the best epoch,
        `best_epoch`, `updates` (optimizer steps), `seconds`, … None on all processes but the first.

    Raises:
        UserError: what can be mended, in one sentence. Flags that it names are fields of the recipe.
        KeyboardInterrupt: a signal, or Jupyter's stop button, ended it, after everything was saved; the same recipe
            with `resume="auto"` goes on from there.
    """
    from .commands.train import require_data

    _require_recipe(recipe)
    if recipe.placement != "none":
        raise UserError(
            f"the recipe {recipe.name} quantizes (placement {recipe.placement}); call effnet_hf.qat(recipe)."
        )
    require_data(recipe)
    return _finished(recipe)


def qat(recipe: "Recipe") -> dict[str, Any] | None:
    """Quantizes `recipe.model` to int8 and fine-tunes it, as `effnet-hf qat` does; see [`train`].

        qat(load_recipe("quant-b0", model="runs/mine", data_dir="flowers", output_dir="runs/int8", epochs=0))

    `quantization.json` in the output folder has the figures in float, calibrated and fine-tuned.
    """
    from .commands.train import require_data
    from .quantization import Quantization

    _require_recipe(recipe)
    require_data(recipe)
    return _finished(recipe, Quantization(recipe))


def _require_recipe(recipe: Any) -> None:
    from .recipes import Recipe

    if not isinstance(recipe, Recipe):
        raise UserError(f"{recipe!r} is no recipe; give load_recipe('finetune', model=…, data_dir=…, output_dir=…).")


def _finished(recipe: "Recipe", quantization=None) -> dict[str, Any] | None:
    import matplotlib
    from accelerate import PartialState

    backend = matplotlib.get_backend()

    from .reading import read_json
    from .run_folder import RunFolder
    from .training import train

    try:
        matplotlib.use("Agg")  # a notebook's would show what a run only writes
        code = train(recipe, quantization)
    finally:
        matplotlib.use(backend)
    if code:
        raise KeyboardInterrupt(f"stopped by a signal: {recipe.output_dir} goes on with resume='auto'")
    return read_json(RunFolder(recipe.output_dir).summary) if PartialState().is_main_process else None


__all__ = [
    "__version__",
    "Classifier",
    "EfficientNetNVBackbone",
    "EfficientNetNVConfig",
    "EfficientNetNVForImageClassification",
    "EfficientNetNVImageProcessor",
    "EfficientNetNVModel",
    "EfficientNetNVPreTrainedModel",
    "Recipe",
    "UserError",
    "export_model",
    "load_for_inference",
    "load_recipe",
    "qat",
    "train",
    "validate_checkpoint",
]
