"""NVIDIA DALI, where it pays. It is an extra: nothing here is imported before it is asked for.

`dali-cpu` decodes only the part of a JPEG that the random crop needs, which DALI can and torchvision cannot; the rest
of the work stays where `imagefolder` does it, because torch resizes five times faster on a CPU than DALI does and
Pillow runs the policies faster, and because the pixels then are `imagefolder`'s, bit for bit (docs/data.md).
`dali-gpu` does everything on the GPU: `dali_pipeline.py`.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
import warnings
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from .pictures import Box


def dali_is_installed() -> bool:
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def require_dali() -> None:
    """Raises `UserError` with the line to run when DALI is not installed, or too old."""
    if not dali_is_installed():
        raise UserError(
            "--loader dali-cpu and dali-gpu need NVIDIA DALI; run `pip install nvidia-dali-cuda130` (CUDA 13, or no GPU"
            " at all) or `pip install nvidia-dali-cuda120` (CUDA 12)."
        )
    for name in ("nvidia-dali-cuda130", "nvidia-dali-cuda120"):  # NVIDIA's images bring one of their own
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(name)
            if tuple(map(int, version.split(".")[:2])) < (2, 2):
                raise UserError(
                    f"--loader dali-cpu and dali-gpu need DALI 2.2 or newer, this is {version}; run"
                    f" `pip install --upgrade {name}`."
                )


class DaliDecoder:
    """Decodes rectangles of JPEGs, a micro-batch at a time, on one thread of the process that uses it.

    The pipeline is built on first use: it must not be inherited by a forked worker.
    """

    def __init__(self, max_batch_size: int):
        self._max_batch_size = max_batch_size
        self._pipeline: Any = None

    def __getstate__(self):
        return {**self.__dict__, "_pipeline": None}

    def decode(self, jpegs: list[tuple[bytes, Box]]) -> list[torch.Tensor]:
        """uint8 (3, height, width) per JPEG and its rectangle, or an empty list: then decode them another way."""
        if not jpegs:
            return []
        if self._pipeline is None:
            with quiet_build():
                self._pipeline = _decoding_pipeline(self._max_batch_size)
        try:
            (regions,) = self._pipeline.run(
                encoded=[np.frombuffer(data, np.uint8) for data, _ in jpegs],
                start=[np.array([box.top, box.left], np.int32) for _, box in jpegs],
                shape=[np.array([box.height, box.width], np.int32) for _, box in jpegs],
            )
        except RuntimeError:  # a JPEG that DALI refuses; the pipeline is broken for good
            self._pipeline = None
            return []
        # Views into DALI's buffers: good until the next call, by which time the micro-batch is finished.
        return [torch.from_numpy(np.asarray(regions[i])).permute(2, 0, 1) for i in range(len(jpegs))]


def _decoding_pipeline(max_batch_size: int):
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=max_batch_size, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def graph():
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
        shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
        return decode_region(encoded, start, shape, "cpu")

    pipeline = graph()
    pipeline.build()
    return pipeline


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
