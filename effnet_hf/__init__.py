"""NVIDIA's EfficientNet recipe, spoken in Hugging Face's language.

Importing this package registers the model family with transformers' Auto classes.
"""

from inspect import signature

from .__about__ import __version__
from .cli import importing


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

__all__ = [
    "__version__",
    "EfficientNetNVBackbone",
    "EfficientNetNVConfig",
    "EfficientNetNVForImageClassification",
    "EfficientNetNVImageProcessor",
    "EfficientNetNVModel",
    "EfficientNetNVPreTrainedModel",
]
