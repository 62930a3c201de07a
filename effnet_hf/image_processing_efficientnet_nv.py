"""Evaluation preprocessing: resize the short side, centre crop, rescale, normalise.

Training evaluates through the same code (`to_rgb`, the processor's `resize_and_crop`), so that a model scores in a
pipeline what it scored in training. Geometry and rounding are torchvision's `Resize` and `CenterCrop`, which NVIDIA's
original uses with a short side of `image_size + 32`.

This file travels inside every saved checkpoint: it imports only numpy, pillow and transformers.
"""

from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import ChannelDimension, to_numpy_array
from transformers.utils import is_torch_tensor


IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]
RESIZE_MARGIN = 32
# Beyond this aspect ratio the far ends are cut before resizing: a 10 x 10,000 panorama would otherwise grow to 200 MB.
MAX_ASPECT_RATIO = 16


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image that Pillow opens as upright 8-bit RGB.

    Turns by the EXIF orientation (as `transformers.pipeline` does), drops alpha (as torchvision's `ImageFolder` does),
    takes the first frame of an animation and the upper 8 bits of a 16-bit image.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16-bit grey; convert("RGB") would clip instead of scale
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        deep = image.mode != "I" or grey.max() > 255  # "I" does not tell how many of its 32 bits were meant
        return Image.fromarray((grey >> 8 if deep else grey).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def resize_and_crop(
    image: Image.Image,
    shortest_edge: int | None,
    crop: tuple[int, int] | None,
    resample: int = Image.Resampling.BICUBIC,
) -> Image.Image:
    """Resizes the short side to `shortest_edge` pixels, then cuts (height, width) out of the centre.

    Either step is skipped when its size is None. A crop larger than the image is padded with black.
    """
    if shortest_edge is not None:
        image = _limit_aspect_ratio(image)
        width, height = image.size
        short, long = min(width, height), max(width, height)
        if short != shortest_edge:
            resized_long = int(shortest_edge * long / short)
            size = (shortest_edge, resized_long) if width <= height else (resized_long, shortest_edge)
            image = image.resize(size, resample)
    if crop is not None:
        height, width = crop
        pad_x, pad_y = max(width - image.width, 0), max(height - image.height, 0)
        if pad_x or pad_y:
            border = (pad_x // 2, pad_y // 2, (pad_x + 1) // 2, (pad_y + 1) // 2)
            image = ImageOps.expand(image, border)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        image = image.crop((left, top, left + width, top + height))
    return image


def _limit_aspect_ratio(image: Image.Image) -> Image.Image:
    width, height = image.size
    limit = MAX_ASPECT_RATIO * min(width, height)
    if max(width, height) <= limit:
        return image
    if width > height:
        left = (width - limit) // 2
        return image.crop((left, 0, left + limit, height))
    top = (height - limit) // 2
    return image.crop((0, top, width, top + limit))


class EfficientNetNVImageProcessor(BaseImageProcessor):
    """Turns images into `pixel_values` (N, 3, crop height, crop width), float32.

    Args:
        do_resize, size: resize the short side to `size["shortest_edge"]` pixels (`image_size + 32` by default).
        resample: Pillow filter, 3 is bicubic (the published recipe), 2 bilinear.
        do_center_crop, crop_size: cut `{"height", "width"}` out of the centre.
        do_rescale, rescale_factor: multiply by 1/255.
        do_normalize, image_mean, image_std: per channel, in units of the rescaled image.

    Images may be Pillow images of any mode, or arrays and tensors, channels first or last, with 1, 3 or 4 channels
    (alpha is dropped). Floats are taken to lie in [0, 1], or in [0, 255] if any exceeds 1.
    """

    model_input_names = ["pixel_values"]
    _auto_class = "AutoImageProcessor"  # type: ignore[assignment]

    def __init__(
        self,
        do_resize: bool = True,
        size: dict[str, int] | int | None = None,
        resample: int = Image.Resampling.BICUBIC,
        do_center_crop: bool = True,
        crop_size: dict[str, int] | int | None = None,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: list[float] | float | None = None,
        image_std: list[float] | float | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.do_resize = do_resize
        self.size = _shortest_edge(224 + RESIZE_MARGIN if size is None else size)
        self.resample = int(Image.Resampling(resample))
        self.do_center_crop = do_center_crop
        self.crop_size = _height_width(224 if crop_size is None else crop_size)
        self.do_rescale = do_rescale
        self.rescale_factor = _factor(rescale_factor)
        self.do_normalize = do_normalize
        self.image_mean = _per_channel("image_mean", IMAGENET_MEAN if image_mean is None else image_mean)
        self.image_std = _per_channel("image_std", IMAGENET_STD if image_std is None else image_std)

    @classmethod
    def for_image_size(cls, image_size: int, margin: int = RESIZE_MARGIN, **kwargs) -> "EfficientNetNVImageProcessor":
        """The published evaluation for a model of this size: short side `image_size + margin`, crop `image_size`."""
        return cls(size=image_size + margin, crop_size=image_size, **kwargs)

    def preprocess(
        self, images, return_tensors=None, data_format="channels_first", input_data_format=None, **overrides
    ) -> BatchFeature:
        """Preprocesses one image or a list of them; any constructor argument can be overridden for this call.

        Args:
            return_tensors: `"pt"` or `"np"`; by default a list of arrays.
            data_format: `"channels_first"` or `"channels_last"`, of the result.
            input_data_format: the same of arrays and tensors passed in, where their shape does not tell.
        """
        overrides = {name: value for name, value in overrides.items() if value is not None}
        settings = EfficientNetNVImageProcessor(**{**self._settings(), **overrides})
        images = _flatten(self.fetch_images(images))
        arrays = [settings._process(image, input_data_format) for image in images]
        if data_format is not None and ChannelDimension(data_format) == ChannelDimension.LAST:
            arrays = [array.transpose(1, 2, 0) for array in arrays]
        return BatchFeature(data={"pixel_values": arrays}, tensor_type=return_tensors)

    def resize_and_crop(self, image: Image.Image) -> Image.Image:
        """The geometry alone: an upright RGB image, resized and cut as `size`, `crop_size` and their switches say."""
        shortest_edge = self.size["shortest_edge"] if self.do_resize else None
        crop = (self.crop_size["height"], self.crop_size["width"]) if self.do_center_crop else None
        return resize_and_crop(image, shortest_edge, crop, self.resample)

    def _settings(self) -> dict:
        names = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor")
        return {name: getattr(self, name) for name in (*names, "do_normalize", "image_mean", "image_std")}

    def _process(self, image, input_data_format=None) -> np.ndarray:
        opened, white = _to_image(image, input_data_format)
        pixels = np.asarray(self.resize_and_crop(opened))
        if self.do_rescale:
            pixels = pixels.astype(np.float32) * np.float32(self.rescale_factor)
        elif white == 1.0:
            pixels = pixels.astype(np.float32) / np.float32(255)  # as it was passed in
        if self.do_normalize:
            mean, std = np.asarray(self.image_mean, np.float32), np.asarray(self.image_std, np.float32)
            pixels = (pixels.astype(np.float32) - mean) / std
        return np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32)


def _flatten(images) -> list:
    if isinstance(images, (list, tuple)):
        return [image for entry in images for image in _flatten(entry)]
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


def _to_image(image, input_data_format=None) -> tuple[Image.Image, float]:
    """The image, and the value that its full brightness had: 1.0 for an array in [0, 1], else 255.0."""
    if isinstance(image, Image.Image):
        return to_rgb(image), 255.0
    array = to_numpy_array(image)
    if array.ndim == 2:
        array = array[:, :, None]
    elif array.ndim != 3:
        raise ValueError(f"An image must have two or three dimensions, got an array of shape {array.shape}.")
    elif _is_channels_first(image, array.shape, input_data_format):
        array = array.transpose(1, 2, 0)
    if array.shape[-1] not in (1, 3, 4) or not array.size:
        raise ValueError(f"An image must have pixels of 1, 3 or 4 channels, got an array of shape {array.shape}.")
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 255):
        raise ValueError(f"Pixels must lie in 0 to 255 or 0 to 1, got {low:.4g} to {high:.4g}; normalised already?")
    white = 1.0 if array.dtype.kind in "fb" and high <= 1 else 255.0
    if array.dtype != np.uint8:
        array = (array * (255.0 / white)).round().astype(np.uint8)
    array = np.ascontiguousarray(array)
    return to_rgb(Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array)), white


def _is_channels_first(image, shape: tuple[int, ...], input_data_format) -> bool:
    if input_data_format is not None:
        return ChannelDimension(input_data_format) == ChannelDimension.FIRST
    first, last = shape[0] in (1, 3, 4), shape[-1] in (1, 3, 4)
    # A shape that reads both ways is read as its kind usually is: tensors (C, H, W), arrays (H, W, C).
    return first and (not last or is_torch_tensor(image))


def _factor(value) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"rescale_factor must be a number, got {value!r}.")
    return value


def _per_channel(name: str, value) -> list[float]:
    values = [value] * 3 if isinstance(value, (int, float)) else list(value)
    if len(values) != 3 or not all(isinstance(entry, (int, float)) for entry in values):
        raise ValueError(f"{name} must be a number or a list of three, one per colour, got {value!r}.")
    if name == "image_std" and not all(values):
        raise ValueError(f"image_std must not contain 0, got {value!r}.")
    return values


def _shortest_edge(size) -> dict[str, int]:
    if isinstance(size, int):
        size = {"shortest_edge": size}
    value = dict(size).get("shortest_edge")
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"size must be a positive number of pixels or {{'shortest_edge': pixels}}, got {size!r}.")
    return {"shortest_edge": value}


def _height_width(size) -> dict[str, int]:
    if isinstance(size, int):
        size = {"height": size, "width": size}
    sides: dict[str, Any] = {side: dict(size).get(side) for side in ("height", "width")}
    if not all(isinstance(value, int) and value > 0 for value in sides.values()):
        raise ValueError(f"crop_size must be a positive number of pixels or {{'height', 'width'}}, got {size!r}.")
    return sides


__all__ = ["EfficientNetNVImageProcessor"]
