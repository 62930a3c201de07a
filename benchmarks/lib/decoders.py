"""Which JPEG decoder: milliseconds of CPU per image, or of waiting for a GPU, and whether its pixels are Pillow's."""

import io
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image

from effnet_hf.data.pictures import BadPicture, Picture, read_file
from effnet_hf.data.regions import decode_region, library
from effnet_hf.errors import UserError

from .timing import take_turns


def measure_decoders(paths: list[str], rounds: int = 9) -> list[dict]:
    """One row per decoder that is installed: `decoder`, `ms` (best round), `ratio` to Pillow, `equal` to it.

    On a GPU `ms` is wall time, of all images in one call; elsewhere CPU time.

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
    reference = next(iter(decoders))
    best = {name: min(own.wall if "GPU" in name else own.cpu) for name, own in samples.items()}
    return [
        {
            "decoder": name,
            "ms": 1e3 * best[name] / len(jpegs),
            "ratio": best[reference] / best[name],
            "equal": all(_is_part(a, b) for a, b in zip(results[name], results[reference])),
        }
        for name in decoders
    ]


def _is_part(decoded: np.ndarray, whole: np.ndarray) -> bool:
    """Whether it is `whole`, or its middle quarter if it has the size of that."""
    if decoded.shape != whole.shape:
        left, top, width, height = _middle(whole.shape[1], whole.shape[0])
        whole = whole[top : top + height, left : left + width]
    return np.array_equal(decoded, whole)


def _middle(width: int, height: int) -> tuple[int, int, int, int]:
    return width // 4, height // 4, width // 2, height // 2


def _decoders() -> dict[str, Callable]:
    """Functions from JPEG files to uint8 (height, width, 3) arrays, Pillow first."""
    found = {"Pillow": lambda jpegs: [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in jpegs]}
    try:
        import simplejpeg

        found["simplejpeg"] = lambda jpegs: [simplejpeg.decode_jpeg(data, "RGB") for data in jpegs]
        found["simplejpeg, fast DCT and upsampling"] = lambda jpegs: [
            simplejpeg.decode_jpeg(data, "RGB", fastdct=True, fastupsample=True) for data in jpegs
        ]
        found["simplejpeg, at half size"] = lambda jpegs: [_reduced(simplejpeg, data, 2) for data in jpegs]
        found["simplejpeg, at an eighth"] = lambda jpegs: [_reduced(simplejpeg, data, 8) for data in jpegs]
    except ImportError:
        pass
    try:
        from torchvision.io import ImageReadMode, decode_jpeg

        decode_jpeg(torch.frombuffer(bytearray(_tiny_jpeg()), dtype=torch.uint8))
        found["torchvision decode_jpeg"] = lambda jpegs: [
            decode_jpeg(data, ImageReadMode.RGB).permute(1, 2, 0).numpy() for data in _tensors(jpegs)
        ]
        if torch.cuda.is_available():
            found["torchvision decode_jpeg on the GPU"] = lambda jpegs: _from_gpu(
                decode_jpeg(_tensors(jpegs), ImageReadMode.RGB, device="cuda")
            )
    except (ImportError, RuntimeError):  # built without libjpeg
        pass
    try:
        from torchcodec.decoders import decode_jpeg as of_torchcodec

        found["torchcodec decode_jpeg"] = lambda jpegs: [of_torchcodec(data).permute(1, 2, 0).numpy() for data in jpegs]
        if torch.cuda.is_available():
            found["torchcodec decode_jpeg on the GPU"] = lambda jpegs: _from_gpu(of_torchcodec(jpegs, device="cuda"))
    except (ImportError, RuntimeError):
        pass
    if library() is not None:
        found["nvImageCodec"] = lambda jpegs: [_region(data, lambda *size: (0, 0, *size)) for data in jpegs]
        found["nvImageCodec, the middle quarter only"] = lambda jpegs: [_region(data, _middle) for data in jpegs]
    return found


def _reduced(simplejpeg, data: bytes, factor: int) -> np.ndarray:
    height, width = (-(-side // factor) for side in simplejpeg.decode_jpeg_header(data)[:2])
    return simplejpeg.decode_jpeg(data, "RGB", min_width=width, min_height=height, min_factor=factor)


def _from_gpu(images: list[torch.Tensor]) -> list[np.ndarray]:
    """Copying is part of the time: what else would compare the pixels."""
    return [pixels.permute(1, 2, 0).cpu().numpy() for pixels in images]


def _tensors(jpegs: list[bytes]) -> list[torch.Tensor]:
    return [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in jpegs]


def _region(data: bytes, box: Callable) -> np.ndarray:
    pixels = decode_region(data, *box(*Image.open(io.BytesIO(data)).size))
    if pixels is None:
        raise UserError("nvImageCodec does not decode one of the images; leave it out of --data_dir.")
    return pixels.permute(1, 2, 0).numpy()


def _tiny_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    return buffer.getvalue()
