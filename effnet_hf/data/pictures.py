"""From the bytes of a file to RGB pixels, with every way a file can be bad turned into one `BadPicture`.

JPEGs in RGB or grey are decoded by torchvision, whose pixels are Pillow's bit for bit and come faster (docs/data.md has
the measurement); everything else goes through Pillow and `to_rgb`.
"""

import io
import os
import warnings

import numpy as np
import torch
from PIL import Image

from ..image_processing_efficientnet_nv import to_rgb


_ORIENTATION = 0x0112  # EXIF tag; 1 is upright


class BadPicture(Exception):
    """A file that gives no picture; the message continues the sentence "<file> …"."""


def read_file(path: str) -> bytes:
    """The content of a file.

    Raises:
        BadPicture: it is gone, locked or unreadable.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise BadPicture("has vanished") from None
    except PermissionError:
        raise BadPicture("may not be read (permission denied)") from None
    except OSError as error:
        raise BadPicture(f"cannot be read: {error.strerror or error}") from None


class Picture:
    """An opened picture: its upright size is known, its pixels are decoded when asked for.

    Raises:
        BadPicture: from the constructor and both methods.
    """

    def __init__(self, data: bytes):
        if not data:
            raise BadPicture("is empty (0 bytes)")
        self._data = data
        self._image = _guarded(lambda: Image.open(io.BytesIO(data)))
        self._plain_jpeg = self._image.format == "JPEG" and self._image.mode in ("RGB", "L") and self._is_upright()
        if not self._plain_jpeg:
            self._image = _guarded(lambda: to_rgb(self._image))
        self.width, self.height = self._image.size

    def rgb(self) -> Image.Image:
        """The whole picture by Pillow and `to_rgb`: what the image processor sees."""
        return _guarded(lambda: to_rgb(self._image)) if self._plain_jpeg else self._image

    def crop(self, left: int, top: int, width: int, height: int) -> torch.Tensor:
        """A rectangle of the picture, uint8 (3, height, width)."""
        if self._plain_jpeg:
            pixels = _decode_jpeg(self._data)
            if pixels is not None and pixels.shape[1:] == (self.height, self.width):
                return pixels[:, top : top + height, left : left + width]
        region = self.rgb().crop((left, top, left + width, top + height))
        return torch.from_numpy(np.array(region)).permute(2, 0, 1)

    def _is_upright(self) -> bool:
        if "exif" not in self._image.info:
            return True
        try:
            return _guarded(lambda: self._image.getexif().get(_ORIENTATION, 1)) == 1
        except BadPicture:
            return False


def _decode_jpeg(data: bytes) -> torch.Tensor | None:
    """uint8 (3, height, width), or None when torchvision refuses; Pillow then has the last word."""
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError:
        return None


def _guarded(function):
    """Calls into Pillow: its warnings stay quiet, whatever it raises becomes a `BadPicture`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # corrupt EXIF, odd palettes: thousands of lines over ImageNet
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return function()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise BadPicture(f"is a decompression bomb (more than {Image.MAX_IMAGE_PIXELS:,} pixels)") from None
    except Image.UnidentifiedImageError:
        raise BadPicture("is not a picture that Pillow knows") from None
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, … on bad bytes
        if isinstance(error, OSError) and "truncated" in str(error).lower():
            raise BadPicture("is truncated") from None
        raise BadPicture(f"cannot be decoded: {type(error).__name__}: {os.fspath(str(error))}".rstrip(": ")) from None
