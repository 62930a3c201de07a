"""From the network to an ONNX model in memory: traced, simplified, named, and labelled with what a user needs."""

import contextlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
import torch

from ..__about__ import __version__
from ..errors import UserError
from .network import ExportedNetwork
from .options import ExportOptions


def draw_graph(network: ExportedNetwork, image_size: int, options: ExportOptions) -> onnx.ModelProto:
    """The network as one ONNX graph, weights inside, `batch` the first axis of its input and output.

    Args:
        image_size: height and width of `pixel_values`; an example only when `options.dynamic_image_size`.
    """
    example = torch.zeros(2, network.model.config.num_channels, image_size, image_size)
    draw = _with_dynamo if options.exporter == "dynamo" else _with_torchscript
    with quiet_exporter():
        try:
            drawn = draw(network, example, options)
        except (RuntimeError, ValueError, TypeError, torch.onnx.errors.OnnxExporterError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"--exporter {options.exporter} cannot draw this network: {reason}") from error
        model = simplify(drawn)
    name_axes(model, options)
    model.graph.name = "efficientnet_nv"
    model.producer_name, model.producer_version = "effnet_hf", __version__
    return model


def _with_torchscript(network: ExportedNetwork, example: torch.Tensor, options: ExportOptions) -> onnx.ModelProto:
    buffer = io.BytesIO()
    axes = {0: "batch", 2: "height", 3: "width"} if options.dynamic_image_size else {0: "batch"}
    torch.onnx.export(
        network,
        (example,),
        buffer,  # type: ignore[arg-type]  # a file-like object will do, torch says so itself
        input_names=["pixel_values"],
        output_names=[options.output_name],
        opset_version=options.opset,
        dynamo=False,
        dynamic_axes={"pixel_values": axes, options.output_name: {0: "batch"}},
    )
    return onnx.load_from_string(buffer.getvalue())


def _with_dynamo(network: ExportedNetwork, example: torch.Tensor, options: ExportOptions) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        torch.onnx.export(
            network,
            (example,),
            path,
            input_names=["pixel_values"],
            output_names=[options.output_name],
            opset_version=options.opset,
            dynamo=True,
            dynamic_shapes={"pixel_values": free_axes(options)},
            external_data=False,
            verbose=False,
        )
        return onnx.load(path)


def free_axes(options: ExportOptions) -> dict[int, torch.export.Dim]:
    """For `torch.export`; from 64 pixels on, because a last map of a single pixel is a case of its own."""
    axes = {0: torch.export.Dim("batch")}
    if options.dynamic_image_size:
        axes |= {2: torch.export.Dim("height", min=64), 3: torch.export.Dim("width", min=64)}
    return axes


def simplify(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without identities, foldable constants and unused nodes."""
    from onnxscript import optimizer

    return optimizer.optimize(model)


def name_axes(model: onnx.ModelProto, options: ExportOptions) -> None:
    """Every free axis by its own name; the exporters' notes about inner shapes go, shape inference makes them anew."""
    del model.graph.value_info[:]
    _dims(model.graph.output[0])[0].dim_param = "batch"
    dims = _dims(model.graph.input[0])
    dims[0].dim_param = "batch"
    if options.dynamic_image_size:
        dims[2].dim_param, dims[3].dim_param = "height", "width"


def shape_of(value: onnx.ValueInfoProto) -> list[int | str]:
    """An input's or output's axes: their length, or their name where it is free."""
    return [dim.dim_param or dim.dim_value for dim in _dims(value)]


def _dims(value: onnx.ValueInfoProto):
    return value.type.tensor_type.shape.dim


def write_properties(model: onnx.ModelProto, properties: Mapping[str, object]) -> None:
    """Stores facts in the model itself, next to any that are there; what is not a string as JSON."""
    known = {entry.key: entry.value for entry in model.metadata_props}
    for key, value in properties.items():
        known[key] = value if isinstance(value, str) else json.dumps(value)
    onnx.helper.set_model_props(model, known)


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Without torch.onnx's advice to its developers: which exporter is newer, which check was traced as a constant."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
