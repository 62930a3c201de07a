"""Evaluation preprocessing: resize the short side, centre crop, rescale, normalise.

Training evaluates through the same code (`to_rgb`, the processor's `resize_and_crop`), so that a model scores in a
pipeline what it scored in training. Geometry and rounding are torchvision's `Resize` and `CenterCrop`, which NVIDIA's
original uses with a short side of `image_size + 32`.

This file travels inside every saved checkpoint: it imports only numpy, pillow and transformers.
"""

import math
import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps
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
_BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _PLANAR = 258, 259, 262, 266, 284  # TIFF tags
_SAMPLE_FORMAT, _LOWEST, _HIGHEST = 339, 340, 341
_UNSIGNED, _SIGNED = 1, 2  # of _SAMPLE_FORMAT
_HALF = 32767  # 16-bit images without any value above may be dark, or hold fewer bits: nobody can tell
_STRIP = 1 << 20  # pixels of a deep image that are turned into bytes at a time
_SAY = "--bit_depth (bit_depth in preprocessor_config.json)"
_NUMBER = f"give the number of bits that are used, 16 if it is dark, as {_SAY}"


class UnclearPixels(ValueError):
    """An image whose values have no one meaning, or that Pillow misreads; the message continues "<image> …"."""


def to_rgb(image: Image.Image, bit_depth: int | None = None) -> Image.Image:
    """Any image that Pillow opens as upright 8-bit RGB, maybe `image` itself.

    Turns by the EXIF orientation (as `transformers.pipeline` does), drops alpha (as torchvision's `ImageFolder` does)
    and takes the first frame of an animation. Values of more than 8 bits are scaled from the range that the file states
    (docs/data.md, "Deep images"), never from the values that an image happens to hold.

    Args:
        bit_depth: bits of the values in deep images that state no range of their own; white is 2**bit_depth - 1, also
            of floating-point numbers.

    Raises:
        UnclearPixels: its values may be meant in more than one way, or lie outside their range, or Pillow misreads it.
    """
    if image.format == "TIFF":
        _mend(image)
    raw, deep = _raw(image), _deep_range(image, bit_depth)  # before both are forgotten
    inverted = deep is not None and _tag(image, _PHOTOMETRIC) == 0  # which Pillow does for 8 bits only
    unsigned = image.format == "TIFF" and _tag(image, _SAMPLE_FORMAT) in (None, _UNSIGNED)
    if image.mode == "L" and _tag(image, _SAMPLE_FORMAT) == _SIGNED:
        raise UnclearPixels("holds signed numbers of 8 bits; save it with unsigned ones")
    image.load()  # EXIF may stand behind the pixels
    if image.mode in ("RGB", "RGBA", "RGBX", "CMYK") and (";16" in raw or "65535" in raw):
        _require_upper_bytes(image, bit_depth)
    turn = _TURNS.get(_orientation(image))
    if turn is not None:  # not by ImageOps, which writes all of EXIF anew and fails where some tag is damaged
        image = image.transpose(Image.Transpose[turn])
        for place in _SAY_HOW_IT_LIES:  # it is upright now, whoever asks
            image.info.pop(place, None)
    if image.mode == "RGB":
        return image
    if deep is not None:  # convert("RGB") would clip instead of scale
        return _deep_to_rgb(image, deep, inverted, unsigned)
    if image.mode == "LAB":
        return ImageCms.profileToProfile(  # type: ignore[return-value]  # None is for inPlace
            image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    if image.mode in ("La", "RGBa"):  # colours that are multiplied by alpha
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
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


def _mend(image: Any) -> None:
    """Has Pillow decode some kinds of TIFF rightly, and refuses others that it would misread without a word."""
    compressed, planar, names = _tag(image, _COMPRESSION) not in (None, 1), _tag(image, _PLANAR) == 2, {}
    bits, plain, big = _tag(image, _BITS), _tag(image, _FILL_ORDER) in (None, 1), image.tag_v2.prefix == b"MM"
    if compressed and big and image.mode in ("I", "F"):  # whose bytes libtiff has swapped already
        names = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF"}
    elif planar and not compressed and bits == 16 and plain and image.mode in ("RGB", "RGBA"):
        names = {band: f"{band};16{'B' if big else 'L'}" for band in "RGBA"}  # which it takes for 8 bits
    elif planar and (image.mode == "LAB" or not (compressed or plain and bits in (1, 8) and _tag(image, _PHOTOMETRIC))):
        raise UnclearPixels("is a TIFF of separate planes, of a kind that Pillow misreads; interleave its channels")
    elif not compressed and image.mode == "RGB" and _tag(image, _PHOTOMETRIC) == 6:
        names = {"RGBX": "YCbCr"}  # which Pillow before 13.0 takes for RGB and a fourth byte
    if names:
        if not image.tile:
            raise UnclearPixels("is a TIFF of a kind that Pillow misreads, and it was decoded before it came here")
        image._mode = "YCbCr" if "RGBX" in names else image.mode
        image.tile = [tile._replace(args=(names.get(tile[3][0], tile[3][0]), *tile[3][1:])) for tile in image.tile]
        image.tag_v2[_PLANAR] = image.tag_v2[_COMPRESSION] = 1  # as far as it matters, when it comes here again


class _Range(NamedTuple):
    """What black and white are in a deep image, and who says so. With no value above `doubtful`, white may be less."""

    black: float
    white: float
    by: str = "its file"
    doubtful: float = 0


def _tag(image: Image.Image, number: int) -> float | None:
    """The first value of a TIFF tag; None of another image."""
    value = getattr(image, "tag_v2", {}).get(number)
    value = value[0] if isinstance(value, tuple) and value else value
    return value if isinstance(value, (int, float)) else None


def _raw(image: Image.Image) -> str:
    """How the samples lie in the file, as Pillow says until it has decoded it: "I;16B", "('RGB', 4095)"."""
    tiles = getattr(image, "tile", None)
    return str(tiles[0][3]) if tiles else ""


def _deep_range(image: Image.Image, bit_depth: int | None) -> _Range | None:
    """None where the values are of 8 bits, or of 8 each of several channels."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return None
    highest = _tag(image, _HIGHEST)
    if highest is not None:
        lowest = _tag(image, _LOWEST) or 0.0
        if not -math.inf < lowest < highest < math.inf:
            raise UnclearPixels(f"says that its values lie between {lowest:g} and {highest:g}")
        return _Range(lowest, highest)
    bits, of_pnm = _tag(image, _BITS), image.format == "PPM" and image.mode == "I"
    if image.mode.startswith("I;16") and bits is not None and bits < 16:
        return _Range(0, 2**bits - 1)
    if of_pnm and "65535" not in _raw(image) and ";16" not in _raw(image):
        return _Range(0, 65535)  # to which Pillow scales the largest value that the file states
    if bit_depth is not None or image.mode.startswith("I;16") or of_pnm or image.format == "PNG":
        return _of_bits(bit_depth, is_float=image.mode == "F")
    kind = "floating-point" if image.mode == "F" else "32-bit or signed whole"
    raise UnclearPixels(f"holds {kind} numbers and does not say which of them is white; give {_SAY}")


def _of_bits(bit_depth: int | None, is_float: bool = False) -> _Range:
    if bit_depth is None:
        return _Range(0, 65535, "its 16 bits", doubtful=_HALF)
    return _Range(0, 2**bit_depth - 1, f"--bit_depth {bit_depth}", doubtful=1 if is_float and bit_depth > 1 else 0)


def _deep_to_rgb(image: Image.Image, deep: _Range, inverted: bool, unsigned: bool) -> Image.Image:
    """In strips, so that nothing but the image and its RGB is ever held whole."""
    rgb, highest = Image.new("RGB", image.size), 0.0
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))
        strip = strip.view(np.uint32) if unsigned and strip.dtype == np.int32 else strip  # as Pillow has no such mode
        highest = max(highest, _require_within(strip, deep))
        grey = _eight_bits(strip, deep)
        rgb.paste(Image.fromarray(255 - grey if inverted else grey), (0, top))
    _require_bright(deep, highest)
    return rgb


def _require_within(values: np.ndarray, deep: _Range) -> float:
    """The highest of the values, none of which lies outside."""
    low, high = float(values.min()), float(values.max())
    if not (deep.black <= low and high <= deep.white):  # NaN is neither
        raise UnclearPixels(
            f"holds values from {low:,.7g} to {high:,.7g}, and by {deep.by} black is {deep.black:,.10g} and white"
            f" {deep.white:,.10g}"
        )
    return high


def _require_bright(deep: _Range, highest: float, advice: str = _NUMBER) -> None:
    if 0 < highest <= deep.doubtful:
        raise UnclearPixels(
            f"is dark or uses fewer bits: its highest value is {highest:,.7g}, and by {deep.by} white is"
            f" {deep.white:,.10g}; {advice}"
        )


def _eight_bits(values: np.ndarray, deep: _Range) -> np.ndarray:
    """uint8: the upper 8 bits of whole numbers whose range is a power of two, else the nearest."""
    bits = int(deep.white + 1).bit_length() - 1
    if values.dtype.kind in "iu" and bits >= 8 and (deep.black, deep.white) == (0, 2**bits - 1):
        return np.right_shift(values, bits - 8).astype(np.uint8)
    return np.rint((values.astype(np.float64) - deep.black) * (255 / (deep.white - deep.black))).astype(np.uint8)


def _require_upper_bytes(image: Image.Image, bit_depth: int | None) -> None:
    """Of colours of 16 bits, of which Pillow keeps the upper 8: refuses what uses other bits."""
    black, white = _tag(image, _LOWEST) or 0, _tag(image, _HIGHEST)
    if white is not None:
        if not (-1 < black < 256 and 65279 < white < 65536):  # another upper byte
            raise UnclearPixels(f"has 16-bit colours, black {black:,g} and white {white:,g}; save it with 8 bits")
    elif bit_depth not in (None, 16):
        raise UnclearPixels(f"has 16-bit colours, and {_SAY} says {bit_depth}; save it with 8 bits")
    elif bit_depth is None:  # the upper byte, of all channels but alpha
        highest = 256 * float(np.ravel(image.getextrema())[:6].max()) + 255
        _require_bright(_of_bits(None), highest, f"save it with 8 bits, or, if it is dark, give 16 as {_SAY}")


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
    left, top = max(width - limit, 0) // 2, max(height - limit, 0) // 2
    return image.crop((left, top, left + min(width, limit), top + min(height, limit)))


class EfficientNetNVImageProcessor(BaseImageProcessor):
    """Turns images into `pixel_values` (N, 3, crop height, crop width), float32.

    Args:
        do_resize, size: resize the short side to `size["shortest_edge"]` pixels (`image_size + 32` by default).
        resample: Pillow filter, 3 is bicubic (the published recipe), 2 bilinear.
        do_center_crop, crop_size: cut `{"height", "width"}` out of the centre.
        do_rescale, rescale_factor: multiply by 1/255.
        do_normalize, image_mean, image_std: per channel, in units of the rescaled image.
        bit_depth: bits of the values in deep images that do not state a range; see `to_rgb`.

    Images may be Pillow images of any mode, or arrays and tensors, channels first or last, with 1, 3 or 4 channels
    (alpha is dropped). Floats are taken to lie in [0, 1], or in [0, 255] if any exceeds 1; uint16 is read as a 16-bit
    image, other whole numbers lie in [0, 255] or have `bit_depth` bits.
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
        bit_depth: int | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        switches = {"do_resize": do_resize, "do_center_crop": do_center_crop}
        for name, value in (switches | {"do_rescale": do_rescale, "do_normalize": do_normalize}).items():
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, got {reprlib.repr(value)}.")
        self.do_resize = do_resize
        self.size = _sides("size", 224 + RESIZE_MARGIN if size is None else size, "shortest_edge")
        self.resample = _filter(resample)
        self.do_center_crop = do_center_crop
        self.crop_size = _sides("crop_size", 224 if crop_size is None else crop_size, "height", "width")
        self.do_rescale = do_rescale
        if not _is_number(rescale_factor, 1e-30):
            raise ValueError(f"rescale_factor must be a number above 0, got {reprlib.repr(rescale_factor)}.")
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = _per_channel("image_mean", IMAGENET_MEAN if image_mean is None else image_mean)
        self.image_std = _per_channel("image_std", IMAGENET_STD if image_std is None else image_std)
        if bit_depth is not None and (type(bit_depth) is not int or not 1 <= bit_depth <= 32):
            raise ValueError(f"bit_depth must be a whole number from 1 to 32, or null, got {reprlib.repr(bit_depth)}.")
        self.bit_depth = bit_depth

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
        return {name: getattr(self, name) for name in (*names, "do_normalize", "image_mean", "image_std", "bit_depth")}

    def _process(self, image, input_data_format=None) -> np.ndarray:
        opened, white = _to_image(image, input_data_format, self.bit_depth)
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


def _to_image(image, input_data_format=None, bit_depth: int | None = None) -> tuple[Image.Image, float]:
    """The image, and the value that its full brightness had: 1.0 for an array in [0, 1], else 255.0."""
    if isinstance(image, Image.Image):
        return to_rgb(image, bit_depth), 255.0
    array = to_numpy_array(image)
    if array.ndim == 2:
        array = array[:, :, None]
    elif array.ndim != 3:
        raise ValueError(f"An image must have two or three dimensions, got an array of shape {array.shape}.")
    elif _is_channels_first(image, array.shape, input_data_format):
        array = array.transpose(1, 2, 0)
    if array.shape[-1] not in (1, 3, 4) or not array.size:
        raise ValueError(f"An image must have pixels of 1, 3 or 4 channels, got an array of shape {array.shape}.")
    if array.dtype == np.uint16 or bit_depth is not None and array.dtype.kind in "iu" and array.dtype.itemsize > 1:
        deep = _of_bits(bit_depth)
        _require_bright(deep, _require_within(array, deep))
        array = _eight_bits(array, deep)
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


def _per_channel(name: str, value) -> list[float]:
    low = 1e-30 if name == "image_std" else -1e30
    values = list(value) if isinstance(value, (list, tuple)) else [value] * 3
    if len(values) != 3 or not all(_is_number(entry, low) for entry in values):
        wanted = "a number above 0 or a list of three" if name == "image_std" else "a number or a list of three"
        raise ValueError(f"{name} must be {wanted}, one per colour, got {reprlib.repr(value)}.")
    return values


def _sides(name: str, value: Any, *keys: str) -> dict[str, int]:
    sides: dict[str, Any] = {key: value.get(key) if isinstance(value, Mapping) else value for key in keys}
    if not all(type(side) is int and 1 <= side <= LARGEST_SIDE for side in sides.values()):
        wanted = "{'shortest_edge': pixels}" if name == "size" else "{'height', 'width'}"
        raise ValueError(f"{name} must be 1 to {LARGEST_SIDE} pixels or {wanted}, got {reprlib.repr(value)}.")
    return sides


__all__ = ["EfficientNetNVImageProcessor"]
