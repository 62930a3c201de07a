"""Optimum's exporters know this model family once this module is imported: to ONNX (extra `optimum`, transformers
4.57), and to OpenVINO where `optimum-intel` is installed:

    import effnet_hf.export.optimum
    from optimum.exporters.onnx import main_export
    from optimum.intel import OVModelForImageClassification

`optimum-cli export` finds it by itself where this package is installed: Optimum loads every file of the namespace
`optimum.commands.register` when it starts, and ours there imports this one.
"""

import importlib.util

from optimum.exporters.tasks import TasksManager
from optimum.utils import NormalizedVisionConfig

import effnet_hf  # noqa: F401  the Auto classes

from ..modeling_efficientnet_nv import EfficientNetNVPreTrainedModel
from .options import DEFAULT_OPSET


_TASKS = ("image-classification", "feature-extraction")


class _Inputs:
    """`pixel_values` (batch, 3, height, width), all but the colours free, as Optimum's vision models have them."""

    NORMALIZED_CONFIG_CLASS = NormalizedVisionConfig

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        axes = {0: "batch_size", 2: "height", 3: "width"}
        if self._config.padding == "same":  # type: ignore[attr-defined]  # padded by the size, which tracing fixes
            axes = {0: "batch_size"}
        return {"pixel_values": axes}


def _register(backend: str, config_class: type) -> None:
    TasksManager.create_register(backend, overwrite_existing=True)("efficientnet_nv", *_TASKS)(config_class)


if importlib.util.find_spec("optimum.exporters.onnx"):
    from optimum.exporters.onnx.config import VisionOnnxConfig

    class EfficientNetNVOnnxConfig(_Inputs, VisionOnnxConfig):
        ATOL_FOR_VALIDATION = 1e-3
        DEFAULT_ONNX_OPSET = DEFAULT_OPSET

    _register("onnx", EfficientNetNVOnnxConfig)


if importlib.util.find_spec("optimum.exporters.openvino"):
    from optimum.exporters.openvino.config import VisionOpenVINOConfig

    class EfficientNetNVOpenVINOConfig(_Inputs, VisionOpenVINOConfig):
        pass

    _register("openvino", EfficientNetNVOpenVINOConfig)


def _know_our_library() -> None:
    """Optimum goes by the name of the module that a model's class lies in; ours does not begin with "transformers"."""
    guess = TasksManager._infer_library_from_model_or_model_class

    def infer(cls, model=None, model_class=None):
        if issubclass(type(model) if model_class is None else model_class, EfficientNetNVPreTrainedModel):
            return "transformers"
        return guess(model=model, model_class=model_class)

    TasksManager._infer_library_from_model_or_model_class = classmethod(infer)


_know_our_library()
