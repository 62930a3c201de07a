"""A rectangle of a JPEG without the rest of it, by nvImageCodec on the CPU: DALI's decoder, in a package of its own.

libjpeg-turbo can leave out what lies beside and below a rectangle, and most of the work for what lies above; the pixels
inside are Pillow's, bit for bit. simplejpeg, Pillow and torchvision do not offer it.
"""

import functools
import threading
from typing import Any

import numpy as np
import torch

from ..errors import UserError


_ours = threading.local()


@functools.cache
def library() -> Any:
    """`nvidia.nvimgcodec`, or None where it is not installed or too old: before 0.9 it asks for a GPU."""
    try:
        from nvidia import nvimgcodec
    except ImportError:
        return None
    return nvimgcodec if hasattr(nvimgcodec, "NVIMGCODEC_DEVICE_CPU_ONLY") else None


def require_library() -> None:
    """Raises `UserError` with the line to run when there is none that decodes parts."""
    if library() is None:
        raise UserError(
            "--loader dali-cpu needs DALI's decoder, nvImageCodec 0.9 or newer; run `pip install --upgrade"
            " nvidia-nvimgcodec-cu13` (nvidia-nvimgcodec-cu12 beside CUDA 12), which need no GPU."
        )


def decode_region(data: bytes, left: int, top: int, width: int, height: int) -> torch.Tensor | None:
    """uint8 (3, height, width) of an upright RGB or grey JPEG, or None: then decode it another way."""
    codec = library()
    if codec is None:
        return None
    if not hasattr(_ours, "decoder"):  # one per thread; it starts no thread of its own, and survives a fork
        backends = [codec.Backend(codec.BackendKind.CPU_ONLY)]
        _ours.decoder = codec.Decoder(codec.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=1, backends=backends)
        _ours.params = codec.DecodeParams(apply_exif_orientation=False)
    try:
        region = codec.Region(top, left, top + height, left + width)
        decoded = _ours.decoder.decode(codec.CodeStream(data).get_sub_code_stream(region=region), params=_ours.params)
    except (RuntimeError, MemoryError):  # what it says of a file that it does not read
        return None
    pixels = None if decoded is None else np.asarray(decoded)
    if pixels is None or pixels.shape != (height, width, 3) or pixels.dtype != np.uint8:
        return None
    return torch.from_numpy(pixels).permute(2, 0, 1)
