"""NVIDIA DALI, where it pays. It is an extra: nothing here is imported before it is asked for.

`dali-cpu` is `imagefolder` that insists on DALI's decoder, nvImageCodec, for the part of a JPEG that a random crop
needs (`regions.py`). The rest stays where it is: torch resizes five times faster on a CPU than DALI does, Pillow runs
the policies faster, and a pipeline around the decoder cost more than it brought. `dali-gpu` does everything on the GPU:
`dali_pipeline.py`.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
import warnings

from ..errors import UserError


def dali_is_installed() -> bool:
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def require_dali() -> None:
    """Raises `UserError` with the line to run when DALI is not installed, or too old."""
    if not dali_is_installed():
        raise UserError(
            "--loader dali-gpu needs NVIDIA DALI; run `pip install nvidia-dali-cuda130` (CUDA 13) or `pip install"
            " nvidia-dali-cuda120` (CUDA 12)."
        )
    for name in ("nvidia-dali-cuda130", "nvidia-dali-cuda120"):  # NVIDIA's images bring one of their own
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(name)
            if tuple(map(int, version.split(".")[:2])) < (2, 2):
                raise UserError(
                    f"--loader dali-gpu needs DALI 2.2 or newer, this is {version}; run `pip install --upgrade {name}`."
                )


def decode_region(encoded, start, shape, device: str):
    """DALI's fused decode and crop; `start` and `shape` are (y, x) in pixels."""
    from nvidia.dali import fn, types

    return fn.decoders.image_slice(
        encoded,
        start,
        shape,
        axis_names="HW",
        normalized_anchor=False,
        normalized_shape=False,
        output_type=types.RGB,
        adjust_orientation=False,  # images that need turning never get here; broken EXIF would stop the pipeline
        device=device,
    )


@contextlib.contextmanager
def quiet_build():
    """Builds a pipeline without DALI's deprecation warnings about itself and its complaints of missing GPU codecs.

    Those come from C code: file descriptor 2 points elsewhere meanwhile. Errors are exceptions and still arrive.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        with warnings.catch_warnings(record=True):  # "ignore" would not do: DALI sets its own filter
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
