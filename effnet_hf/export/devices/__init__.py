"""Files for phones and small devices: what each format is, and what it can be asked for.

Every converter, and the runtime that its file is proved in, works in a process of its own (`bench.py` and `child.py`):
they print pages, load native libraries of their own, and leave files in the working directory. The modules named after
them (`executorch.py`, …) run there only, and nothing else imports them.
"""

from dataclasses import dataclass

from ...errors import UserError


@dataclass(frozen=True)
class Device:
    """One format.

    Attributes:
        name: of the runtime, for a sentence.
        file: its name in the folder.
        packages: those that write and run it, by the names they are imported by; `effnet-hf[FORMAT]` brings them.
        distributions: the same by the names they are installed by.
        dtypes, int8: what `--dtype` and `--int8` may be.
        file_type: what the file is, for the card.
        library: the Hub's name of the library.
        takes: what goes in, for a sentence.
    """

    name: str
    file: str
    packages: tuple[str, ...]
    distributions: tuple[str, ...]
    dtypes: tuple[str, ...]
    int8: tuple[str, ...]
    file_type: str
    library: str
    takes: str


DEVICES = {
    "executorch": Device(
        "ExecuTorch",
        "model.pte",
        ("executorch", "torchao"),
        ("executorch", "torchao"),
        ("fp32",),
        ("xnnpack",),
        "an ExecuTorch program for XNNPACK",
        "executorch",
        "float32 (1, 3, {height}, {width})",
    ),
    "coreml": Device(
        "Core ML",
        "model.mlpackage",
        ("coremltools",),
        ("coremltools",),
        ("fp32", "fp16"),
        ("weights",),
        "a Core ML program for iOS 16 and macOS 13 or newer",
        "coreml",
        "an RGB image of {width} x {height} pixels",
    ),
    "litert": Device(
        "LiteRT",
        "model.tflite",
        ("litert_torch", "ai_edge_litert", "ai_edge_quantizer"),
        ("litert-torch", "ai-edge-litert", "ai-edge-quantizer"),
        ("fp32",),
        ("weights", "xnnpack"),
        "a LiteRT (TensorFlow Lite) model",
        "tflite",
        "float32 (1, {height}, {width}, 3)",
    ),
    "ncnn": Device(
        "ncnn",
        "model.ncnn.param",
        ("pnnx", "ncnn"),
        ("pnnx", "ncnn"),
        ("fp32", "fp16"),
        (),
        "an ncnn network, with its weights in model.ncnn.bin",
        "ncnn",
        "float32 (3, {height}, {width})",
    ),
}
# What `--int8` quantizes by itself, from a float checkpoint; the second takes ranges of activations from images.
WEIGHTS, CALIBRATED = "weights", "xnnpack"
INT8 = (CALIBRATED, WEIGHTS)


def extra(format: str) -> str:
    """What installs the packages of a format, for the end of a sentence."""
    return f"pip install 'effnet-hf[{format}]', or in a clone pip install -e '.[{format}]'"


def formats_of(int8: str) -> str:
    """Those that know an `--int8`, for a sentence."""
    return " or ".join(f"--format {name}" for name, device in DEVICES.items() if int8 in device.int8)


def refuse_for_device(format: str, dtype: str, int8: str | None, given: list[str]) -> None:
    """Raises `UserError` for options that make no sense with a device's format.

    Args:
        given: flags that were given and go with other formats only.
    """
    device = DEVICES[format]
    if dtype not in device.dtypes:
        raise UserError(f"--dtype {dtype}: --format {format} goes with --dtype {' or --dtype '.join(device.dtypes)}.")
    if int8 and int8 not in device.int8:
        kinds = " or ".join(f"--int8 {kind}" for kind in device.int8)
        allowed = f"goes with {kinds}" if kinds else "is written in float only"
        raise UserError(f"--int8 {int8}: --format {format} {allowed}.")
    if given:
        raise UserError(
            f"--format {format} goes without {' and '.join(given)}: its file takes one image of one size, prepared as"
            " preprocessor_config.json says."
        )
