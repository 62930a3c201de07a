"""Beside ONNX: OpenVINO's own files, and `torch.export` programs."""

import io
from pathlib import Path

import torch

from .network import ExportedNetwork
from .onnx import free_axes, quiet_exporter
from .options import ExportOptions


def write_openvino(onnx_bytes: bytes, path: Path, options: ExportOptions) -> None:
    """OpenVINO IR, `path` and its weights beside it (`.bin`); float16 and bfloat16 weights stay that small."""
    import openvino

    model = openvino.convert_model(io.BytesIO(onnx_bytes))
    openvino.save_model(model, path, compress_to_fp16=options.dtype == "fp16")


def write_pt2(network: ExportedNetwork, path: Path, image_size: int, options: ExportOptions) -> None:
    """A `torch.export` program with a free batch size: opens with `torch.export.load`, without this package."""
    axes = free_axes(options)
    example = torch.zeros(2, network.model.config.num_channels, image_size, image_size)
    with quiet_exporter():
        program = torch.export.export(network, (example,), dynamic_shapes={"pixel_values": axes})
        torch.export.save(program, path)
