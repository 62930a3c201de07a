"""From the bytes of a file to RGB pixels, with every way a file can be bad turned into one `BadPicture`.

Whatever opens an image of a user's does it here: `Picture(read_file(path), Reading.of(recipe)).rgb()`.

Plain JPEGs are decoded by simplejpeg where it is installed, parts of them by nvImageCodec where that is: their pixels
are Pillow's bit for bit and come faster (docs/data.md has the measurement; torchvision's decoder is as fast as
simplejpeg but on its way out). Everything else goes through Pillow and `to_rgb`.
"""

import contextlib
import io
import logging
import os
import re
import signal
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ..errors import first_line, printable
from ..image_processing_efficientnet_nv import UnclearPixels, to_rgb
from ..recipes import Recipe
from .regions import decode_region


try:
    import simplejpeg
except ImportError:
    simplejpeg = None

# What is opened, whatever a file is called. Pillow knows more kinds, and some start programs: EPS runs Ghostscript.
FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
LARGEST_FILE = 1 << 30  # bytes
_ORIENTATION = 0x0112  # EXIF tag; 1 is upright
_END_OF_JPEG = b"\xff\xd9"
_JPEG_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")  # but for what stands within a scan
_STRIP = 1 << 20  # pixels
MOST_SCANS = 100  # of a JPEG; programs that write them make a dozen, and each costs a pass over all pixels
LONGEST = 30.0  # seconds of computing for one image, in Pillow's decoders that are written in Python
logging.getLogger("PIL").addHandler(logging.NullHandler())  # what is wrong with a file stands in `BadPicture`


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True)
class Reading:
    """How images are read, whatever is done with them then.

    Attributes:
        bit_depth: bits of the values in deep images that state no range of their own; see `to_rgb`.
        max_pixels: an image of more, width times height, is bad.
        notes: a sentence where both depths were named, and differ.
    """

    bit_depth: int | None = None
    max_pixels: int = Recipe.max_pixels
    notes: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def of(cls, options: Any, processor: Any = None) -> "Reading":
        """As a recipe or a command's flags say, and where they say no `bit_depth`, as the image processor does."""
        chosen, saved = options.bit_depth, processor.bit_depth if processor is not None else None
        if chosen is None or saved in (None, chosen):
            return cls(saved if chosen is None else chosen, options.max_pixels)
        note = f"deep images are read with --bit_depth {chosen}, and the checkpoint was trained with {saved}"
        return cls(chosen, options.max_pixels, (note,))


USUAL = Reading()


class BadPicture(Exception):
    """A file that gives no image; the message continues the sentence "<file> …"."""


def read_file(path: str | os.PathLike) -> bytes:
    """The content of a file.

    Raises:
        BadPicture: it is gone, locked, unreadable, too large, or no file (a pipe would block for ever).
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BadPicture("is not a file but a pipe, device or folder")
            if status.st_size > LARGEST_FILE:
                raise BadPicture(f"is too large for an image ({status.st_size:,} bytes; {LARGEST_FILE:,} at most)")
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read(status.st_size + 1)  # never without a bound: some files have no end
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise BadPicture("has vanished") from None
    except PermissionError:
        raise BadPicture("may not be read (permission denied)") from None
    except OSError as error:
        raise BadPicture(f"cannot be read: {error.strerror or error}") from None
    except MemoryError:
        raise BadPicture("does not fit into memory") from None
    except ValueError:  # a zero byte, half a character
        raise BadPicture("has a name that no file can have") from None
    if len(data) > status.st_size:
        raise BadPicture("grows while it is read")
    return data


class Picture:
    """An opened image: its upright size is known, its pixels are decoded when asked for.

    Args:
        data: the file's bytes.
        reading: what deep values mean, and how large an image may be.

    Attributes:
        data: the file's bytes.
        width, height: pixels, after EXIF rotation.
        kind: format and mode of the file, e.g. "JPEG RGB".
        plain_jpeg: an upright JPEG in RGB or grey that ends where a JPEG ends, so that any JPEG decoder gives the
            pixels that Pillow gives.

    Raises:
        BadPicture: from the constructor, `crop` and `rgb`.
    """

    def __init__(self, data: bytes, reading: Reading = USUAL):  # it is frozen
        if not data:
            raise BadPicture("is empty (0 bytes)")
        self.data = data
        self._reading = reading
        _refuse_many_scans(data)
        self._image = self.guarded(lambda: Image.open(io.BytesIO(data), formats=FORMATS))
        pixels = self._image.width * self._image.height
        if pixels > reading.max_pixels:
            raise BadPicture(f"has {pixels:,} pixels, and --max_pixels is {reading.max_pixels:,}")
        self.kind = f"{self._image.format} {self._image.mode}"
        self.plain_jpeg = (
            self._image.format == "JPEG"
            and self._image.mode in ("RGB", "L")
            and data.endswith(_END_OF_JPEG)
            and self._is_upright()
        )
        if not self.plain_jpeg:
            self._image = self.guarded(lambda: to_rgb(self._image, reading.bit_depth))
        self.width, self.height = self._image.size

    def crop(self, box: Box, reduced: int = 1) -> torch.Tensor:
        """A rectangle of the image, uint8 (3, height, width).

        Args:
            reduced: 2, 4 or 8 give that rectangle of a plain JPEG so many times smaller in each direction, its edges
                moved to whole pixels of it: libjpeg then computes a half, a quarter or an eighth of each block's side.
        """
        if not self.plain_jpeg:
            return self._by_pillow(self.rgb, box)
        if reduced == 1 and (box.width, box.height) != (self.width, self.height):
            part = decode_region(self.data, *box)
            if part is not None:
                return part
        width, height = -(-self.width // reduced), -(-self.height // reduced)  # rounded up, as libjpeg does
        left, top = (round(edge / reduced) for edge in (box.left, box.top))
        right, bottom = (round(end / reduced) for end in (box.left + box.width, box.top + box.height))
        pixels = _decode_jpeg(self.data, width, height, reduced)
        if pixels is not None and pixels.shape[1:] == (height, width):
            return pixels[:, top:bottom, left:right]
        return self._by_pillow(lambda: self._reduced(reduced), Box(left, top, right - left, bottom - top))

    def rgb(self) -> Image.Image:
        """The whole image: what Pillow and `to_rgb` show the image processor."""
        return self.guarded(lambda: to_rgb(self._image)) if self.plain_jpeg else self._image

    def guarded(self, function: Callable[[], Any]) -> Any:
        """`function()`, which calls into Pillow; whatever that raises is a `BadPicture`."""
        return _guarded(function, self._reading.max_pixels, self.data)

    def _by_pillow(self, image: Callable[[], Image.Image], box: Box) -> torch.Tensor:
        return self.guarded(lambda: torch.from_numpy(_rectangle(image(), box)).permute(2, 0, 1))

    def _reduced(self, reduced: int) -> Image.Image:
        if reduced == 1:
            return self.rgb()
        image = Image.open(io.BytesIO(self.data), formats=("JPEG",))
        image.draft(None, (max(1, self.width // reduced), max(1, self.height // reduced)))
        return to_rgb(image)

    def _is_upright(self) -> bool:
        if "exif" not in self._image.info:
            return True
        try:
            return self.guarded(lambda: self._image.getexif().get(_ORIENTATION, 1)) == 1
        except BadPicture:
            return False


def _rectangle(image: Image.Image, box: Box) -> np.ndarray:
    """uint8 (height, width, 3), cut out in strips: in one piece Pillow copies it four times over."""
    left, top, width, height = box
    pixels, rows = np.empty((height, width, 3), np.uint8), max(1, _STRIP // width)
    for start in range(0, height, rows):
        end = min(start + rows, height)
        pixels[start:end] = np.asarray(image.crop((left, top + start, left + width, top + end)))
    return pixels


def _decode_jpeg(data: bytes, width: int, height: int, reduced: int) -> torch.Tensor | None:
    """uint8 (3, height, width), or None when simplejpeg is missing or refuses; Pillow then has the last word."""
    if simplejpeg is None:
        return None
    scale = {"min_width": width, "min_height": height, "min_factor": reduced} if reduced > 1 else {}
    try:
        return torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB", **scale)).permute(2, 0, 1)
    except (ValueError, MemoryError):
        return None


def _refuse_many_scans(data: bytes) -> None:
    """Raises `BadPicture` for a JPEG that is short and takes minutes: its decoder goes through it in one piece."""
    if not data.startswith(b"\xff\xd8") or _count(data, 0xFF, 0xDA) <= MOST_SCANS:
        return
    at, scans = 2, 0
    while (marker := _JPEG_MARKER.search(data, at)) and marker[1] != b"\xd9":  # what follows the image, e.g. a film
        scans += marker[1] == b"\xda"
        if scans > MOST_SCANS:
            raise BadPicture(f"has more than {MOST_SCANS} scans, each of which is a pass over the whole image")
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")


def _count(data: bytes, first: int, second: int) -> int:
    """`data.count` of two bytes that differ, five times as fast: of whole files it was a twentieth of loading them."""
    values, pairs = np.frombuffer(data, np.uint8), 0
    for start in range(0, len(values), _STRIP):
        part = values[start : start + _STRIP + 1]
        pairs += int(np.count_nonzero((part[:-1] == first) & (part[1:] == second)))
    return pairs


class _TooLong(BaseException):
    """Not an `Exception`, which Pillow's decoders catch in places."""


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Ends a decoder after `LONGEST` seconds of computing, whatever else the machine does meanwhile. Only in the main
    thread, where alone signals can be caught; elsewhere it takes as long as it takes."""

    def end(*_) -> None:
        raise _TooLong

    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, LONGEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def _limit_of_pixels(max_pixels: int) -> Iterator[None]:
    """Pillow has a limit of its own, twice `MAX_IMAGE_PIXELS`. It is for the whole process, and others may rely on it:
    it moves where it is in the way, and for one call."""
    usual = Image.MAX_IMAGE_PIXELS
    if usual is None or max_pixels <= 2 * usual:
        yield
        return
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = usual


def _format_of(data: bytes) -> str:
    """Which of `FORMATS` a file begins like; empty where it is none of them."""
    accept = {name: Image.OPEN[name][1] for name in FORMATS if name in Image.OPEN}
    return next((name for name, begins in accept.items() if begins and begins(data[:16]) is True), "")


def _guarded(function: Callable[[], Any], max_pixels: int, data: bytes) -> Any:
    """Calls into Pillow about `data`: its warnings stay quiet, whatever it raises becomes a `BadPicture`."""
    try:
        with warnings.catch_warnings(), _time_limit(), _limit_of_pixels(max_pixels):
            warnings.simplefilter("ignore")  # corrupt EXIF, odd palettes: thousands of lines over ImageNet
            return function()
    except _TooLong:
        raise BadPicture(f"takes more than {LONGEST:.0f} s to open") from None
    except BadPicture:
        raise
    except UnclearPixels as error:
        raise BadPicture(printable(str(error))) from None
    except Image.DecompressionBombError:
        raise BadPicture(f"is a decompression bomb: more pixels than --max_pixels, {max_pixels:,}") from None
    except Image.UnidentifiedImageError:
        if kind := _format_of(data):
            raise BadPicture(f"is damaged, or a kind of {kind} that Pillow does not read") from None
        raise BadPicture(f"is not an image that is read here ({', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, … on bad bytes
        if isinstance(error, OSError) and "truncated" in str(error).lower():
            raise BadPicture("is truncated") from None
        if isinstance(error, ValueError) and "unknown raw mode" in str(error):
            raise BadPicture(f"is a kind of {_format_of(data)} that Pillow does not read") from None
        said = printable(first_line(error))[:200].rstrip(".")
        kind = type(error).__name__
        raise BadPicture(f"cannot be decoded: {kind}" + (f": {said}" if said != kind else "")) from None
