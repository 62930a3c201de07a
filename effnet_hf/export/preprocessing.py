"""The image processor as an ONNX graph: uint8 pictures of any size in, `pixel_values` out.

ONNX Runtime's antialiased Resize is Pillow's algorithm in the same fixed-point arithmetic: on photographs one byte in
some thousands differs, by one. `exclude_outside` makes the borders agree.
"""

import numpy as np
import onnx
from onnx import numpy_helper
from PIL import Image

from ..errors import UserError
from ..image_processing_efficientnet_nv import MAX_ASPECT_RATIO, EfficientNetNVImageProcessor


_MODES = {Image.BICUBIC: 'mode="cubic", cubic_coeff_a=-0.5', Image.BILINEAR: 'mode="linear"'}

# Names as in `resize_and_crop`; sides are [height, width]. Round takes halves to the even number, as Python's does.
_GRAPH = """
<ir_version: 8, opset_import: ["" : {opset}]>
preprocessing (uint8[batch, height, width, 3] image) => (float[batch, 3, {crop_height}, {crop_width}] pixel_values)
{{
    two = Constant <value_ints = [2]> ()
    spatial = Constant <value_ints = [2, 3]> ()
    limit = Constant <value_ints = [{max_aspect_ratio}]> ()
    edge = Constant <value_ints = [{shortest_edge}]> ()
    crop = Constant <value_ints = [{crop_height}, {crop_width}]> ()
    half = Constant <value_floats = [0.5]> ()

    whole = Transpose <perm = [0, 3, 1, 2]> (image)
    whole_sides = Shape <start = 2, end = 4> (whole)
    whole_short = ReduceMin <keepdims = 1> (whole_sides)
    longest = Mul (whole_short, limit)
    kept = Min (whole_sides, longest)
    surplus = Sub (whole_sides, kept)
    kept_start = Div (surplus, two)
    kept_end = Add (kept_start, kept)
    picture = Slice (whole, kept_start, kept_end, spatial)

    batch_and_colours = Shape <start = 0, end = 2> (picture)
    short = ReduceMin <keepdims = 1> (kept)
    scaled = Mul (kept, edge)
    sides = Div (scaled, short)
    shape = Concat <axis = 0> (batch_and_colours, sides)
    resized = Resize <{mode}, antialias = 1, exclude_outside = 1,
                      coordinate_transformation_mode = "half_pixel"> (picture, , , shape)

    margin = Sub (sides, crop)
    margin_float = Cast <to = 1> (margin)
    half_margin = Mul (margin_float, half)
    start_float = Round (half_margin)
    start = Cast <to = 7> (start_float)
    end = Add (start, crop)
    square = Slice (resized, start, end, spatial)

    pixels = Cast <to = 1> (square)
    centred = Sub (pixels, mean)
    pixel_values = Mul (centred, inverse_std)
}}
"""


def preprocessing_graph(processor: EfficientNetNVImageProcessor, opset: int) -> onnx.ModelProto:
    """`image` uint8 (N, height, width, 3) to `pixel_values` float32 (N, 3, crop height, crop width).

    Raises:
        UserError: the processor leaves out a step, pads, or resamples by another filter than bilinear or bicubic.
    """
    steps = (processor.do_resize, processor.do_center_crop, processor.do_rescale, processor.do_normalize)
    height, width = processor.crop_size["height"], processor.crop_size["width"]
    shortest_edge = processor.size["shortest_edge"]
    if not all(steps) or shortest_edge < max(height, width) or processor.resample not in _MODES:
        raise UserError(
            "--with_preprocessing: the checkpoint's preprocessor_config.json leaves out a step, crops more than the "
            "resized picture, or resamples neither bilinear nor bicubic; export without it."
        )
    text = _GRAPH.format(
        opset=opset,
        crop_height=height,
        crop_width=width,
        shortest_edge=shortest_edge,
        max_aspect_ratio=MAX_ASPECT_RATIO,
        mode=_MODES[processor.resample],
    )
    model = onnx.parser.parse_model(text)
    # (factor * pixel - mean) / std in two operations instead of three.
    mean, std = np.asarray(processor.image_mean, np.float64), np.asarray(processor.image_std, np.float64)
    for name, values in (
        ("mean", mean / processor.rescale_factor),
        ("inverse_std", processor.rescale_factor / std),
    ):
        tensor = values.astype(np.float32).reshape(1, 3, 1, 1)
        model.graph.initializer.append(numpy_helper.from_array(tensor, name))
    return model


def put_in_front(preprocessing: onnx.ModelProto, network: onnx.ModelProto) -> onnx.ModelProto:
    """One model: the first's `pixel_values` feed the second's."""
    preprocessing.ir_version = network.ir_version
    preprocessing = onnx.compose.add_prefix(preprocessing, "preprocessing/", rename_inputs=False)
    merged = onnx.compose.merge_models(preprocessing, network, io_map=[("preprocessing/pixel_values", "pixel_values")])
    merged.graph.name = network.graph.name
    merged.producer_name, merged.producer_version = network.producer_name, network.producer_version
    return merged
