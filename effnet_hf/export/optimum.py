"""Optimum's exporter knows this model family once this module is imported (extra `optimum`, transformers 4.57):

    import effnet_hf.export.optimum
    from optimum.exporters.onnx import main_export

`optimum-cli export onnx` finds it by itself where this package is installed: Optimum loads every file of the namespace
`optimum.commands.register` when it starts, and ours there imports this one.
"""

from optimum.exporters.onnx.config import VisionOnnxConfig
from optimum.exporters.tasks import TasksManager
from optimum.utils import NormalizedVisionConfig

import effnet_hf  # noqa: F401  the Auto classes

from ..modeling_efficientnet_nv import EfficientNetNVPreTrainedModel
from .options import DEFAULT_OPSET


_register = TasksManager.create_register("onnx", overwrite_existing=True)


@_register("efficientnet_nv", "image-classification", "feature-extraction")
class EfficientNetNVOnnxConfig(VisionOnnxConfig):
    """`pixel_values` (batch, 3, height, width), all but the colours free, as Optimum's vision models have them."""

    NORMALIZED_CONFIG_CLASS = NormalizedVisionConfig
    ATOL_FOR_VALIDATION = 1e-3
    DEFAULT_ONNX_OPSET = DEFAULT_OPSET

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        axes = {0: "batch_size", 2: "height", 3: "width"}
        if self._config.padding == "same":  # padded by the image's size, which tracing fixes
            axes = {0: "batch_size"}
        return {"pixel_values": axes}


def _know_our_library() -> None:
    """Optimum goes by the name of the module that a model's class lies in; ours does not begin with "transformers"."""
    guess = TasksManager._infer_library_from_model_or_model_class

    def infer(cls, model=None, model_class=None):
        if issubclass(type(model) if model_class is None else model_class, EfficientNetNVPreTrainedModel):
            return "transformers"
        return guess(model=model, model_class=model_class)

    TasksManager._infer_library_from_model_or_model_class = classmethod(infer)


_know_our_library()
