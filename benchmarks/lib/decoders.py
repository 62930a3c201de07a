"""Which JPEG decoder: milliseconds of CPU per image, and whether its pixels are Pillow's."""

import io
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image

from effnet_hf.data.dali import DaliDecoder, dali_is_installed
from effnet_hf.data.pictures import BadPicture, Box, Picture, read_file
from effnet_hf.errors import UserError

from .timing import take_turns


def measure_decoders(paths: list[str], rounds: int = 9) -> list[dict]:
    """One row per decoder that is installed: `decoder`, `ms` (best round), `ratio` to Pillow, `equal` to it.

    Args:
        paths: images; those that are not plain JPEGs are left out.
        rounds: measured rounds, in which the decoders take turns.
    """
    jpegs = []
    for path in paths:
        try:
            picture = Picture(read_file(path))
        except BadPicture:
            continue
        if picture.plain_jpeg:
            jpegs.append(picture.data)
    if not jpegs:
        raise UserError("there is no plain JPEG among the images, which is what decoders are compared on.")
    decoders, results = _decoders(), {}

    def decode_all(name: str) -> None:
        results[name] = decoders[name](jpegs)

    steps = {name: partial(decode_all, name) for name in decoders}
    samples = take_turns(steps, torch.device("cpu"), rounds, warmup=1)
    reference, best = next(iter(decoders)), {name: min(own.cpu) for name, own in samples.items()}
    return [
        {
            "decoder": name,
            "ms": 1e3 * best[name] / len(jpegs),
            "ratio": best[reference] / best[name],
            "equal": all(np.array_equal(a, _part(b, a)) for a, b in zip(results[name], results[reference])),
        }
        for name in decoders
    ]


def _part(whole: np.ndarray, like: np.ndarray) -> np.ndarray:
    """`whole`, or its middle quarter if that is what `like` is."""
    if like.shape == whole.shape:
        return whole
    height, width = whole.shape[:2]
    return whole[height // 4 : height // 4 + height // 2, width // 4 : width // 4 + width // 2]


def _decoders() -> dict[str, Callable]:
    """Functions from JPEG files to uint8 (height, width, 3) arrays, Pillow first."""
    found = {"Pillow": lambda jpegs: [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in jpegs]}
    try:
        import simplejpeg

        found["simplejpeg"] = lambda jpegs: [simplejpeg.decode_jpeg(data, "RGB") for data in jpegs]
        found["simplejpeg, fast DCT and upsampling"] = lambda jpegs: [
            simplejpeg.decode_jpeg(data, "RGB", fastdct=True, fastupsample=True) for data in jpegs
        ]
    except ImportError:
        pass
    try:
        from torchvision.io import ImageReadMode, decode_jpeg

        decode_jpeg(torch.frombuffer(bytearray(_tiny_jpeg()), dtype=torch.uint8))
        found["torchvision decode_jpeg"] = lambda jpegs: [
            decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
            .permute(1, 2, 0)
            .numpy()
            for data in jpegs
        ]
    except (ImportError, RuntimeError):  # built without libjpeg
        pass
    if dali_is_installed():
        found["DALI"] = _Dali()
        found["DALI, the middle quarter only"] = _Dali(middle=True)
    return found


class _Dali:
    def __init__(self, middle: bool = False):
        self._decoder, self._middle = DaliDecoder(32), middle

    def __call__(self, jpegs: list[bytes]) -> list[np.ndarray]:
        arrays = []
        for start in range(0, len(jpegs), 32):
            chosen = [(data, self._box(data)) for data in jpegs[start : start + 32]]
            arrays += [part.permute(1, 2, 0).numpy().copy() for part in self._decoder.decode(chosen)]
        return arrays

    def _box(self, data: bytes) -> Box:
        width, height = Image.open(io.BytesIO(data)).size
        if self._middle:
            return Box(width // 4, height // 4, width // 2, height // 2)
        return Box(0, 0, width, height)


def _tiny_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    return buffer.getvalue()
