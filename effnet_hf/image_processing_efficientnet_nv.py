"""Evaluation preprocessing: resize the short side, centre crop, rescale, normalise.

Training evaluates through the same code (`to_rgb`, the processor's `resize_and_crop`), so that a model scores in a
pipeline what it scored in training. Geometry and rounding are torchvision's `Resize` and `CenterCrop`, which NVIDIA's
original uses with a short side of `image_size + 32`.

This file travels inside every saved checkpoint: it imports only numpy, pillow and transformers.
"""

import reprlib
from collections.abc import Mapping
from typing import Any, TypeGuard

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
_ORIENTATION = 0x0112  # EXIF tag; 1 is upright
_TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE"}
_TURNS[8] = "ROTATE_90"
_SAY_HOW_IT_LIES = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")  # in `Image.info`
LARGEST_SIDE = 16_384  # pixels of a prepared image: 3 GB as float32


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image that Pillow opens as upright 8-bit RGB, maybe `image` itself.

    Turns by the EXIF orientation (as `transformers.pipeline` does), drops alpha (as torchvision's `ImageFolder` does),
    takes the first frame of an animation and the upper 8 bits of a 16-bit image.
    """
    image.load()  # EXIF may stand behind the pixels
    turn = _TURNS.get(_orientation(image))
    if turn is not None:  # not by ImageOps, which writes all of EXIF anew and fails where some tag is damaged
        image = image.transpose(Image.Transpose[turn])
        for place in _SAY_HOW_IT_LIES:  # it is upright now, whoever asks
            image.info.pop(place, None)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16-bit grey; convert("RGB") would clip instead of scale
        return Image.fromarray(_upper_byte(np.asarray(image), image.mode)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """1 where EXIF is damaged, as where there is none: the pixels are whole."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow raises SyntaxError, struct.error, TypeError, …
        return 1
    return orientation if isinstance(orientation, int) else 1


def _upper_byte(grey: np.ndarray, mode: str) -> np.ndarray:
    """uint8; numpy works through `out` in small pieces, so that nothing wider than 16 bits is copied."""
    eight_bits = np.empty(grey.shape, np.uint8)
    if mode == "I":  # does not tell how many of its 32 bits were meant
        sixteen_bits = np.clip(grey, 0, 65535, out=np.empty(grey.shape, np.uint16), casting="unsafe")
        if grey.max() <= 255:
            return sixteen_bits.astype(np.uint8)
        grey = sixteen_bits
    return np.right_shift(grey, 8, out=eight_bits, casting="unsafe")


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
        switches = {"do_resize": do_resize, "do_center_crop": do_center_crop}
        for name, value in (switches | {"do_rescale": do_rescale, "do_normalize": do_normalize}).items():
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, got {reprlib.repr(value)}.")
        self.do_resize = do_resize
        self.size = _shortest_edge(224 + RESIZE_MARGIN if size is None else size)
        self.resample = _filter(resample)
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


def _is_number(value, low: float) -> bool:
    """In the range in which float32 can be multiplied and divided by it."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= 1e30


def _filter(value) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value not in list(Image.Resampling):
        known = ", ".join(f"{int(filter_)} ({filter_.name.lower()})" for filter_ in sorted(Image.Resampling))
        raise ValueError(f"resample must be one of {known}, got {reprlib.repr(value)}.")
    return int(value)


def _factor(value) -> float:
    if not _is_number(value, 1e-30):
        raise ValueError(f"rescale_factor must be a number above 0, got {reprlib.repr(value)}.")
    return value


def _per_channel(name: str, value) -> list[float]:
    low = 1e-30 if name == "image_std" else -1e30
    values = list(value) if isinstance(value, (list, tuple)) else [value] * 3
    if len(values) != 3 or not all(_is_number(entry, low) for entry in values):
        wanted = "a number above 0 or a list of three" if name == "image_std" else "a number or a list of three"
        raise ValueError(f"{name} must be {wanted}, one per colour, got {reprlib.repr(value)}.")
    return values


def _is_side(value) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_SIDE


def _shortest_edge(size) -> dict[str, int]:
    value: Any = size.get("shortest_edge") if isinstance(size, Mapping) else size
    if not _is_side(value):
        wanted = f"1 to {LARGEST_SIDE} pixels or {{'shortest_edge': pixels}}"
        raise ValueError(f"size must be {wanted}, got {reprlib.repr(size)}.")
    return {"shortest_edge": int(value)}


def _height_width(size) -> dict[str, int]:
    sides: dict[str, Any] = {
        side: size.get(side) if isinstance(size, Mapping) else size for side in ("height", "width")
    }
    if not all(map(_is_side, sides.values())):
        wanted = f"1 to {LARGEST_SIDE} pixels or {{'height', 'width'}}"
        raise ValueError(f"crop_size must be {wanted}, got {reprlib.repr(size)}.")
    return {side: int(value) for side, value in sides.items()}


__all__ = ["EfficientNetNVImageProcessor"]
