"""What an export can be asked for, and which requests are refused before anything is read or written."""

import importlib.util
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..errors import UserError
from .devices import DEVICES, INT8, extra, formats_of, refuse_for_device


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FORMATS = {"onnx": "model.onnx", "openvino": "openvino_model.xml", "pt2": "model.pt2"}
FORMATS |= {name: device.file for name, device in DEVICES.items()}
# What each exporter of torch.onnx can write. 18 is the first opset whose Resize antialiases as Pillow does.
OPSETS = {"torchscript": range(17, 21), "dynamo": range(18, 24)}
DEFAULT_OPSET, FIRST_BF16_OPSET = 18, 22


class Int8Target(NamedTuple):
    """A target of `--int8`; those of `DEVICES` stand there.

    Attributes:
        format: the one format that it is written in.
        needs_images: by the checkpoint it starts from, `"quantized"` or `"float"`, whether it takes ranges from
            training images. A kind that is not in it is refused.
    """

    format: str
    needs_images: dict[str, bool]


INT8_TARGETS = {
    "openvino": Int8Target("openvino", {"quantized": False, "float": True}),
    "tensorrt": Int8Target("onnx", {"quantized": False}),
    "ort-cpu": Int8Target("onnx", {"quantized": True}),
}
# Those whose kernels add two products in 16 bits on an x86 CPU without VNNI.
REDUCED_RANGE = ("openvino", "ort-cpu")
LAYOUT = "transformers.js"
# The names that transformers.js knows a dtype by, and how its file ends.
LAYOUT_DTYPES = {"fp32": ("fp32", ""), "fp16": ("fp16", "_fp16"), "ort-cpu": ("q8", "_quantized")}


@dataclass(frozen=True)
class ExportOptions:
    """How a checkpoint is written.

    Args:
        format: `"onnx"`, `"openvino"` (OpenVINO IR), `"pt2"` (a `torch.export` program); or for phones and small
            devices `"executorch"`, `"coreml"`, `"litert"`, `"ncnn"`, one image at a time. By default the one
            of `int8`, else `"onnx"`.
        dtype: arithmetic and storage inside the graph: `"fp32"`, `"fp16"`, `"bf16"`; inputs and outputs stay float32.
        opset: ONNX operator set, 17 to 20 (`exporter="torchscript"`) or 18 to 23 (`"dynamo"`); by default 18, and for
            bf16 the first that knows such convolutions, 22.
        exporter: which of torch.onnx's two exporters draws the graph; by default the one that knows the opset.
        with_softmax: `probabilities` (N, classes) instead of `logits`; of several labels per image by a sigmoid.
        with_preprocessing: `image` uint8 (N, height, width, 3) of any size in, `probabilities` out; resizing,
            cropping and normalising are part of the graph.
        dynamic_image_size: height and width of `pixel_values` are free, too.
        int8: `"openvino"`, from a quantized checkpoint, or from a float one by NNCF with ranges from training images;
            `"tensorrt"` or `"ort-cpu"`, from a quantized checkpoint; for devices from a float one: `"xnnpack"`
            (weights and activations, with ranges from training images) or `"weights"`.
        reduce_range: INT8 weights use as much less than their 8 bits as it takes that two products always fit into 16:
            right on x86 CPUs without VNNI, too, and a little coarser.
        layout: `"transformers.js"`: `onnx/model.onnx` (`model_fp16.onnx`, `model_quantized.onnx`) and JSON files with
            names that this library knows. Resizing, cropping and normalising are part of the graph, which has
            `pixel_values` float32 (N, 3, height, width) of any size in, 0 to 255, and `logits` out: its image processor
            resizes by other filters than Pillow, and its pipeline takes the softmax itself.

    Raises:
        UserError: the options exclude each other, or need a package that is not installed.
    """

    format: str = None  # type: ignore[assignment]  # decided below, as are opset and exporter
    dtype: str = "fp32"
    opset: int = None  # type: ignore[assignment]
    exporter: str = None  # type: ignore[assignment]
    with_softmax: bool = False
    with_preprocessing: bool = False
    dynamic_image_size: bool = False
    int8: str | None = None
    reduce_range: bool = False
    layout: str | None = None

    def __post_init__(self):
        if self.format is None:
            target = INT8_TARGETS.get(self.int8)
            object.__setattr__(self, "format", target.format if target else "onnx")
        bf16 = self.dtype == "bf16" and self.format != "pt2"
        if self.opset is None:
            object.__setattr__(self, "opset", FIRST_BF16_OPSET if bf16 else DEFAULT_OPSET)
        if self.exporter is None:
            known = self.opset in OPSETS["torchscript"] or self.opset < 17
            object.__setattr__(self, "exporter", "torchscript" if known else "dynamo")
        for field, allowed in (
            ("format", FORMATS),
            ("dtype", DTYPES),
            ("exporter", OPSETS),
            ("int8", (None, *INT8_TARGETS, *INT8)),
            ("layout", (None, LAYOUT)),
        ):
            if getattr(self, field) not in allowed:
                names = ", ".join(name for name in allowed if name)
                raise UserError(f"--{field} {getattr(self, field)}: there are {names}.")
        if self.reduce_range and self.int8 not in REDUCED_RANGE:
            raise UserError(f"--reduce_range goes with --int8 {' or --int8 '.join(REDUCED_RANGE)}.")
        if self.format in DEVICES:
            self._refuse_for_device()
            return
        if self.int8 in INT8:
            raise UserError(f"--int8 {self.int8} goes with {formats_of(self.int8)}.")
        opsets = OPSETS[self.exporter]
        if self.opset not in opsets:
            raise UserError(
                f"--opset {self.opset}: --exporter {self.exporter} writes {opsets.start} to {opsets.stop - 1}."
            )
        if bf16 and self.opset < FIRST_BF16_OPSET:
            raise UserError(f"--dtype bf16 needs --opset {FIRST_BF16_OPSET} or newer, with --exporter dynamo.")
        if self.layout:
            if self.format != "onnx" or (self.int8 or self.dtype) not in LAYOUT_DTYPES:
                raise UserError(
                    f"--layout {LAYOUT} goes with --format onnx, and --dtype fp32, --dtype fp16 or --int8 ort-cpu."
                )
            if self.with_softmax or self.dynamic_image_size or self.with_preprocessing:
                raise UserError(
                    f"--layout {LAYOUT} goes without --with_probabilities, --dynamic_image_size and"
                    " --with_preprocessing: its graph always takes images of any size, and gives logits."
                )
            if self.opset < 18:
                raise UserError(f"--layout {LAYOUT} needs --opset 18 or newer.")
        if self.with_preprocessing:
            if self.opset < 18:
                raise UserError("--with_preprocessing needs --opset 18 or newer: older ones cannot resize like Pillow.")
            if self.dynamic_image_size:
                raise UserError("--with_preprocessing crops to one size; leave out --dynamic_image_size.")
            if self.format != "onnx":
                raise UserError(f"--with_preprocessing goes with --format onnx, not {self.format}.")
        if self.int8:
            wanted = INT8_TARGETS[self.int8].format
            if self.format != wanted:
                raise UserError(
                    f"--int8 {self.int8} is written as --format {wanted}, not {self.format}; leave that out."
                )
            if self.dtype != "fp32" or self.exporter != "torchscript":
                raise UserError("--int8 goes with --dtype fp32 and --exporter torchscript.")
            if self.dynamic_image_size or self.with_preprocessing:
                raise UserError("--int8 goes without --dynamic_image_size and --with_preprocessing.")
        needed = [] if self.format == "pt2" else ["onnx", "onnxruntime", "onnxscript"]
        for package in [*needed, *(["openvino"] if self.format == "openvino" else [])]:
            require(package)

    def _refuse_for_device(self) -> None:
        unlike = {"--layout": self.layout, "--with_preprocessing": self.with_preprocessing}
        unlike |= {"--dynamic_image_size": self.dynamic_image_size, "--opset": self.opset != DEFAULT_OPSET}
        unlike |= {"--exporter": self.exporter != "torchscript" and self.opset == DEFAULT_OPSET}
        refuse_for_device(self.format, self.dtype, self.int8, [flag for flag, given in unlike.items() if given])
        for package in DEVICES[self.format].packages:
            require(package, extra(self.format))

    @property
    def input_name(self) -> str:
        return "image" if self.with_preprocessing or self.format == "coreml" else "pixel_values"

    @property
    def output_name(self) -> str:
        return "probabilities" if self.probabilities else "logits"

    @property
    def probabilities(self) -> bool:
        return self.with_softmax or self.with_preprocessing or self.format == "coreml"

    @property
    def file_name(self) -> str:
        """In the folder."""
        if self.layout:
            return f"onnx/model{LAYOUT_DTYPES[self.int8 or self.dtype][1]}.onnx"
        return FORMATS[self.format]


def require(package: str, how: str | None = None) -> None:
    """Raises `UserError` when a package that this package does not depend on is not installed; `how` to install it."""
    if not installed(package):
        raise UserError(f"{package} is not installed: {how or f'pip install {package}'}")


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False
