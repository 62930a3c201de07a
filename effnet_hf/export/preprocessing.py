"""The image processor as an ONNX graph: uint8 images of any size in, `pixel_values` out.

ONNX Runtime's antialiased Resize is Pillow's algorithm in the same fixed-point arithmetic: on photographs one byte in
some thousands differs, by one. `exclude_outside` makes the borders agree.
"""

import numpy as np
import onnx
from onnx import numpy_helper
from PIL import Image

from ..errors import UserError
from ..image_processing_efficientnet_nv import MAX_ASPECT_RATIO, EfficientNetNVImageProcessor


_MODES: dict[int, str] = {
    Image.Resampling.BICUBIC: 'mode="cubic", cubic_coeff_a=-0.5',
    Image.Resampling.BILINEAR: 'mode="linear"',
}

# Names as in `resize_and_crop`; sides are [height, width]. Each part goes on with the tensors {image} and {sides}.
_HEAD = """
<ir_version: 8, opset_import: ["" : {opset}]>
preprocessing (uint8[batch, height, width, 3] image) => (float[batch, 3, {crop_height}, {crop_width}] pixel_values)
{{
    two = Constant <value_ints = [2]> ()
    spatial = Constant <value_ints = [2, 3]> ()
    crop = Constant <value_ints = [{crop_height}, {crop_width}]> ()
    whole = Transpose <perm = [0, 3, 1, 2]> (image)
    whole_sides = Shape <start = 2, end = 4> (whole)
"""
_RESIZE = """
    limit = Constant <value_ints = [{max_aspect_ratio}]> ()
    edge = Constant <value_ints = [{shortest_edge}]> ()
    whole_short = ReduceMin <keepdims = 1> ({sides})
    longest = Mul (whole_short, limit)
    kept = Min ({sides}, longest)
    surplus = Sub ({sides}, kept)
    kept_start = Div (surplus, two)
    kept_end = Add (kept_start, kept)
    limited = Slice ({image}, kept_start, kept_end, spatial)

    batch_and_colours = Shape <start = 0, end = 2> (limited)
    short = ReduceMin <keepdims = 1> (kept)
    scaled = Mul (kept, edge)
    resized_sides = Div (scaled, short)
    shape = Concat <axis = 0> (batch_and_colours, resized_sides)
    resized = Resize <{mode}, antialias = 1, exclude_outside = 1,
                      coordinate_transformation_mode = "half_pixel"> (limited, , , shape)
"""
_PAD = """
    nothing = Constant <value_ints = [0]> ()
    lacking = Sub (crop, {sides})
    border = Max (lacking, nothing)
    border_start = Div (border, two)
    border_end = Sub (border, border_start)
    borders = Concat <axis = 0> (border_start, border_end)
    padded = Pad ({image}, borders, , spatial)
    padded_sides = Add ({sides}, border)
"""
# Round takes halves to the even number, as Python's does.
_CROP = """
    half = Constant <value_floats = [0.5]> ()
    margin = Sub ({sides}, crop)
    margin_float = Cast <to = 1> (margin)
    half_margin = Mul (margin_float, half)
    start_float = Round (half_margin)
    start = Cast <to = 7> (start_float)
    end = Add (start, crop)
    cropped = Slice ({image}, start, end, spatial)

    pixels = Cast <to = 1> (cropped)
    centred = Sub (pixels, mean)
    pixel_values = Mul (centred, inverse_std)
}}
"""


def preprocessing_graph(processor: EfficientNetNVImageProcessor, opset: int) -> onnx.ModelProto:
    """`image` uint8 (N, height, width, 3) to `pixel_values` float32 (N, 3, crop height, crop width).

    Steps that the processor leaves out are left out, and images smaller than the crop get its black border.

    Raises:
        UserError: the processor resizes by another filter than bilinear or bicubic.
    """
    height, width = processor.crop_size["height"], processor.crop_size["width"]
    edge = processor.size["shortest_edge"] if processor.do_resize else 0
    parts = [_HEAD.format(opset=opset, crop_height=height, crop_width=width)]
    image, sides = "whole", "whole_sides"
    if processor.do_resize:
        if processor.resample not in _MODES:
            filter_ = Image.Resampling(processor.resample).name.lower()
            raise UserError(
                f"--with_preprocessing: the checkpoint's preprocessor_config.json resizes by {filter_}, and ONNX"
                " resizes like Pillow by bilinear and bicubic only; export without --with_preprocessing."
            )
        settings = {"max_aspect_ratio": MAX_ASPECT_RATIO, "shortest_edge": edge, "mode": _MODES[processor.resample]}
        parts.append(_RESIZE.format(image=image, sides=sides, **settings))
        image, sides = "resized", "resized_sides"
    if edge < max(height, width):
        parts.append(_PAD.format(image=image, sides=sides))
        image, sides = "padded", "padded_sides"
    parts.append(_CROP.format(image=image, sides=sides))
    model = onnx.parser.parse_model("".join(parts))
    # (factor * pixel - mean) / std in two operations instead of three.
    factor = processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    for name, values in (("mean", np.asarray(mean) / factor), ("inverse_std", factor / np.asarray(std))):
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
