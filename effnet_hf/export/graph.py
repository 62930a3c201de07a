"""The network as an ONNX graph: traced, simplified, named, labelled with what a user needs, checked."""

import io
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx
import torch

from ..__about__ import __version__
from ..errors import UserError, first_line
from .network import ExportedNetwork, free_axes, quiet_exporter
from .options import ExportOptions


def draw_graph(network: ExportedNetwork, size: tuple[int, int], options: ExportOptions) -> onnx.ModelProto:
    """The network as one ONNX graph, weights inside, `batch` the first axis of its input and output.

    Args:
        size: (height, width) of `pixel_values`; only an example when `options.dynamic_image_size`.
    """
    draw = _with_dynamo if options.exporter == "dynamo" else _with_torchscript
    with quiet_exporter():
        try:
            drawn = draw(network, network.example(size), options)
        except (RuntimeError, ValueError, TypeError, torch.onnx.errors.OnnxExporterError) as error:
            raise UserError(f"--exporter {options.exporter} cannot draw this network: {first_line(error)}") from error
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


def simplify(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without identities, foldable constants and unused nodes."""
    from onnxscript import optimizer

    return optimizer.optimize(model)


def name_axes(model: onnx.ModelProto, options: ExportOptions) -> None:
    """Every free axis by its own name; inner shapes go, since shape inference finds them anew."""
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


def write_openvino(model: onnx.ModelProto, path: Path, options: ExportOptions) -> None:
    """OpenVINO IR, `path` and its weights beside it (`.bin`); float16 and bfloat16 weights stay that small."""
    import openvino

    save_openvino(openvino.convert_model(io.BytesIO(model.SerializeToString())), path, options)


def save_openvino(model, path: Path, options: ExportOptions) -> None:
    """An `openvino.Model` as IR; see [`write_openvino`]."""
    import openvino

    try:
        openvino.save_model(model, path, compress_to_fp16=options.dtype == "fp16")
        openvino.Core().read_model(path)  # before 2026.2 it is the first to notice that a file was cut off
    except RuntimeError as error:
        raise UserError(f"cannot write {path.name}: {first_line(error)} Is the disk full?") from error


def check_structure(
    path: Path, options: ExportOptions, num_channels: int, size: tuple[int, int], num_labels: int
) -> None:
    """The ONNX checker, strict shape inference, and inputs and outputs as promised.

    Raises:
        UserError: the file is not what was asked for; nothing a user did wrong, but nothing to rely on either.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UserError(f"the exported graph is not valid ONNX: {first_line(error)}") from error
    sides = (
        ["height", "width"]
        if options.dynamic_image_size or options.with_preprocessing or options.layout
        else list(size)
    )
    wanted_in = ["batch", *sides, 3] if options.input_name == "image" else ["batch", num_channels, *sides]
    for value, name, shape in (
        (model.graph.input[0], options.input_name, wanted_in),
        (model.graph.output[0], options.output_name, ["batch", num_labels]),
    ):
        if value.name != name or shape_of(value) != shape:
            raise UserError(f"the exported graph has {value.name} {shape_of(value)} instead of {name} {shape}.")
    if len(model.graph.input) != 1 or len(model.graph.output) != 1:
        raise UserError("the exported graph has more than one input or output.")
