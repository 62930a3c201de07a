"""NVIDIA's EfficientNet recipe, spoken in Hugging Face's language.

Importing this package registers the model family with transformers' Auto classes.
"""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
)

from .configuration import EfficientNetNVConfig
from .image_processing_efficientnet_nv import EfficientNetNVImageProcessor
from .modeling_efficientnet_nv import (
    EfficientNetNVBackbone,
    EfficientNetNVForImageClassification,
    EfficientNetNVModel,
    EfficientNetNVPreTrainedModel,
)


__version__ = "0.1.0.dev0"

AutoConfig.register(EfficientNetNVConfig.model_type, EfficientNetNVConfig)
AutoModel.register(EfficientNetNVConfig, EfficientNetNVModel)
AutoModelForImageClassification.register(EfficientNetNVConfig, EfficientNetNVForImageClassification)
AutoBackbone.register(EfficientNetNVConfig, EfficientNetNVBackbone)
AutoImageProcessor.register(EfficientNetNVConfig, slow_image_processor_class=EfficientNetNVImageProcessor)

# A saved folder then also opens with trust_remote_code=True where this package is not installed.
EfficientNetNVConfig.register_for_auto_class()
EfficientNetNVModel.register_for_auto_class("AutoModel")
EfficientNetNVForImageClassification.register_for_auto_class("AutoModelForImageClassification")
EfficientNetNVBackbone.register_for_auto_class("AutoBackbone")
EfficientNetNVImageProcessor.register_for_auto_class()

__all__ = [
    "EfficientNetNVBackbone",
    "EfficientNetNVConfig",
    "EfficientNetNVForImageClassification",
    "EfficientNetNVImageProcessor",
    "EfficientNetNVModel",
    "EfficientNetNVPreTrainedModel",
]
