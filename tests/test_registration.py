"""`import effnet_hf` registers the family with the Auto classes of every transformers that setup.cfg allows."""

import importlib

import pytest
import transformers

import effnet_hf


AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoBackbone")


def slow_or_fast(config_class, slow_image_processor_class=None, fast_image_processor_class=None, exist_ok=False):
    return slow_image_processor_class


def any_backend(
    config_class,
    slow_image_processor_class=None,
    fast_image_processor_class=None,
    image_processor_classes=None,
    exist_ok=False,
):
    return image_processor_classes


def one_class(config_class, video_processor_class, exist_ok=False):
    return video_processor_class


def one_class_or_several(config_class, video_processor_class=None, video_processor_classes=None, exist_ok=False):
    return video_processor_class or video_processor_classes


@pytest.mark.parametrize(
    ("for_images", "for_videos"),
    [(slow_or_fast, one_class), (any_backend, one_class), (any_backend, one_class_or_several)],
    ids=["4.57 and 5.0", "5.10 to 5.17", "5.20 and newer"],
)
def test_registers_whatever_the_auto_classes_take(for_images, for_videos, monkeypatch):
    registered = []

    def register(*arguments, **named):
        registered.append(arguments)

    def recorder(signature):
        def register(*arguments, **named):
            registered.append(signature(*arguments, **named))

        register.__wrapped__ = signature  # what inspect.signature reads
        return staticmethod(register)

    for name in AUTO_CLASSES:
        monkeypatch.setattr(getattr(transformers, name), "register", staticmethod(register))
    monkeypatch.setattr(transformers.AutoImageProcessor, "register", recorder(for_images))
    monkeypatch.setattr(transformers.AutoVideoProcessor, "register", recorder(for_videos))
    importlib.reload(effnet_hf)
    processor = effnet_hf.EfficientNetNVImageProcessor
    images = processor if for_images is slow_or_fast else {"pil": processor, "torchvision": processor}
    for_pictures, for_films = registered[len(AUTO_CLASSES) :]
    assert for_pictures == images and not for_films
