"""The image processor as an ONNX graph: images of any size in, what the network takes out.

Resized to Pillow's very bytes. ONNX's own antialiased Resize computes positions in float32, and one byte in some
thousands comes out another, which moves a probability by up to 3e-4. Pillow's coefficients are whole numbers of 23
bits; here they are taken from fractions of whole numbers, since ONNX Runtime's build for WebGPU has no float64. A sum
of products of bytes and digits of 8 bits is exact in float32.
"""

import numpy as np
import onnx
from onnx import numpy_helper
from PIL import Image

from ..errors import UserError
from ..image_processing_efficientnet_nv import MAX_ASPECT_RATIO, EfficientNetNVImageProcessor
from .options import ExportOptions


# How far Pillow's filter reaches, in pixels of the smaller of both images, and its value at {p}n / {p}D of them; in
# units that do not matter, since weights are divided by their sum.
_FILTERS: dict[int, tuple[int, str]] = {
    Image.Resampling.BICUBIC: (
        2,
        """
    {p}nn = Mul ({p}n, {p}n)
    {p}nnn = Mul ({p}nn, {p}n)
    {p}DD = Mul ({p}D, {p}D)
    {p}DDD = Mul ({p}DD, {p}D)
    {p}nnD = Mul ({p}nn, {p}D)
    {p}nDD = Mul ({p}n, {p}DD)
    {p}near1 = Mul ({p}nnn, i3)
    {p}nnD5 = Mul ({p}nnD, i5)
    {p}near2 = Sub ({p}near1, {p}nnD5)
    {p}near3 = Mul ({p}DDD, i2)
    {p}near = Add ({p}near2, {p}near3)
    {p}far1 = Mul ({p}DDD, i4)
    {p}far2 = Mul ({p}nDD, i8)
    {p}far3 = Sub ({p}far1, {p}far2)
    {p}far4 = Add ({p}far3, {p}nnD5)
    {p}far = Sub ({p}far4, {p}nnn)
    {p}is_near = Less ({p}n, {p}D)
    {p}filter = Where ({p}is_near, {p}near, {p}far)
""",
    ),
    Image.Resampling.BILINEAR: (
        1,
        """
    {p}filter = Sub ({p}D, {p}n)
""",
    ),
}

# The input, an image as it is or what transformers.js makes of one, and its pixels as uint8 (N, width, 3, height): what
# is to be resized comes first, so that nothing is copied byte by byte.
_IMAGE = (
    "uint8[batch, height, width, 3] image",
    """
    sides = Shape <start = 1, end = 3> (image)
    whole = Transpose <perm = [0, 2, 3, 1]> (image)
""",
)
_PIXELS = (
    "float[batch, 3, height, width] pixel_values",
    """
    sides = Shape <start = 2, end = 4> (pixel_values)
    byte_values = Cast <to = 2> (pixel_values)
    whole = Transpose <perm = [0, 3, 1, 2]> (byte_values)
""",
)

# Names as in `resize_and_crop`; sides are [height, width].
_HEAD = """
<ir_version: 8, opset_import: ["" : {opset}]>
preprocessing ({image_in}) => (float[batch, 3, {crop_height}, {crop_width}] prepared)
{{
    {take}
"""
_RESIZE = """
    two = Constant <value_ints = [2]> ()
    spatial = Constant <value_ints = [3, 1]> ()
    limit = Constant <value_ints = [{max_aspect_ratio}]> ()
    edge = Constant <value_ints = [{shortest_edge}]> ()
    whole_short = ReduceMin <keepdims = 1> (sides)
    longest = Mul (whole_short, limit)
    kept = Min (sides, longest)
    surplus = Sub (sides, kept)
    kept_start = Div (surplus, two)
    kept_end = Add (kept_start, kept)
    source = Slice (whole, kept_start, kept_end, spatial)
    short = ReduceMin <keepdims = 1> (kept)
    scaled = Mul (kept, edge)
    resized = Div (scaled, short)
"""
_KEEP = """
    source = Identity (whole)
    kept = Identity (sides)
    resized = Identity (sides)
"""
# Along the second axis of {p}in, uint8 (N, length, 3, others), of whose {p}out_side pixels the {crop} in the centre are
# wanted, black beyond the ends. In blocks, each from a window of the source, because far most of a matrix of all
# coefficients would be zero. Gives (N, others, 3, {crop}). All in whole numbers: Div drops the fraction.
# Max and Min only of small ones: ONNX Runtime 1.30 for Node reads 32 of their 64 bits.
_PASS = """
    {p}margin = Sub ({p}out_side, {p}crop)
    {p}half = Div ({p}margin, i2)
    {p}half_twice = Mul ({p}half, i2)
    {p}rest = Sub ({p}margin, {p}half_twice)
    {p}rest_inside = Max ({p}rest, i0)
    {p}quarter = Div ({p}half, i2)
    {p}quarter_twice = Mul ({p}quarter, i2)
    {p}half_is_odd = Sub ({p}half, {p}quarter_twice)
    {p}to_even = Mul ({p}rest_inside, {p}half_is_odd)
    {p}start = Add ({p}half, {p}to_even)
    {p}place = Add ({p}range, {p}start)

    {p}longer = Max ({p}in_side, {p}out_side)
    {p}D = Mul ({p}longer, i2)
    {p}reach = Mul ({p}D, support)
    {p}place_twice = Mul ({p}place, i2)
    {p}place_odd = Add ({p}place_twice, i1)
    {p}center = Mul ({p}place_odd, {p}in_side)
    {p}centers_low = ReduceMin <keepdims = 1> ({p}center, i1)
    {p}centers_high = ReduceMax <keepdims = 1> ({p}center, i1)
    {p}step = Mul ({p}out_side, i2)
    {p}low1 = Sub ({p}centers_low, {p}reach)
    {p}low2 = Sub ({p}low1, {p}out_side)
    {p}low3 = Div ({p}low2, {p}step)
    {p}first = Sub ({p}low3, i1)
    {p}high1 = Add ({p}centers_high, {p}reach)
    {p}high2 = Sub ({p}high1, {p}out_side)
    {p}high3 = Div ({p}high2, {p}step)
    {p}spans = Sub ({p}high3, {p}first)
    {p}span = ReduceMax <keepdims = 0> ({p}spans)
    {p}window = Add ({p}span, s2)
    {p}steps = Range (s0, {p}window, s1)
    {p}x = Add ({p}first, {p}steps)
    {p}last = Sub ({p}in_side, i1)
    {p}not_before = Max ({p}x, i0)
    {p}index = Min ({p}not_before, {p}last)
    {p}is_there = Equal ({p}x, {p}index)
    {p}there = Unsqueeze ({p}is_there, i2)

    {p}x_twice = Mul ({p}x, i2)
    {p}x_odd = Add ({p}x_twice, i1)
    {p}x_scaled = Mul ({p}x_odd, {p}out_side)
    {p}x_column = Unsqueeze ({p}x_scaled, i2)
    {p}center_row = Unsqueeze ({p}center, i1)
    {p}off = Sub ({p}x_column, {p}center_row)
    {p}distance = Abs ({p}off)
    {p}n = Min ({p}distance, {p}reach)
{filter}
    {p}end = Sub ({p}out_side, i1)
    {p}place_not_before = Max ({p}place, i0)
    {p}place_clipped = Min ({p}place_not_before, {p}end)
    {p}is_of_image = Equal ({p}place, {p}place_clipped)
    {p}of_image = Unsqueeze ({p}is_of_image, i1)
    {p}used = And ({p}there, {p}of_image)
    {p}weight = Where ({p}used, {p}filter, i0)
    {p}sum_of_weights = ReduceSum <keepdims = 1> ({p}weight, i1)
    {p}total = Where ({p}of_image, {p}sum_of_weights, i1)

    {p}size = Abs ({p}weight)
    {p}t1 = Mul ({p}size, i256)
    {p}q1 = Div ({p}t1, {p}total)
    {p}u1 = Mul ({p}q1, {p}total)
    {p}r1 = Sub ({p}t1, {p}u1)
    {p}t2 = Mul ({p}r1, i128)
    {p}q2 = Div ({p}t2, {p}total)
    {p}u2 = Mul ({p}q2, {p}total)
    {p}r2 = Sub ({p}t2, {p}u2)
    {p}t3 = Mul ({p}r2, i128)
    {p}q3 = Div ({p}t3, {p}total)
    {p}u3 = Mul ({p}q3, {p}total)
    {p}r3 = Sub ({p}t3, {p}u3)
    {p}t4 = Mul ({p}r3, i2)
    {p}q4 = Div ({p}t4, {p}total)
    {p}k1 = Mul ({p}q1, i128)
    {p}k2 = Add ({p}k1, {p}q2)
    {p}k3 = Mul ({p}k2, i128)
    {p}k4 = Add ({p}k3, {p}q3)
    {p}k5 = Add ({p}k4, {p}q4)
    {p}minus_k5 = Sub (i0, {p}k5)
    {p}is_negative = Less ({p}weight, i0)
    {p}coefficient = Where ({p}is_negative, {p}minus_k5, {p}k5)

    {p}above0 = Add ({p}coefficient, above)
    {p}upper0 = Div ({p}above0, i256)
    {p}upper = Sub ({p}upper0, i65536)
    {p}upper_size = Mul ({p}upper, i256)
    {p}digit0 = Sub ({p}coefficient, {p}upper_size)
    {p}above1 = Add ({p}upper, above)
    {p}upper1 = Div ({p}above1, i256)
    {p}digit2 = Sub ({p}upper1, i65536)
    {p}digit2_size = Mul ({p}digit2, i256)
    {p}digit1 = Sub ({p}upper, {p}digit2_size)
    {p}digits = Concat <axis = 2> ({p}digit0, {p}digit1, {p}digit2)
    {p}columns = Cast <to = 1> ({p}digits)
    {p}matrix = Transpose <perm = [0, 2, 1]> ({p}columns)

    {p}lines_shape = Constant <value_ints = [0, 0, -1]> ()
    {p}lines = Reshape ({p}in, {p}lines_shape)
    {p}windows = Gather <axis = 1> ({p}lines, {p}index)
    {p}bytes = Cast <to = 1> ({p}windows)
    {p}products = MatMul ({p}matrix, {p}bytes)
    {p}exact = Cast <to = 6> ({p}products)
    {p}s0, {p}s1, {p}s2 = Split <axis = 2, num_outputs = 3> ({p}exact)
    {p}v2 = Mul ({p}s2, w256)
    {p}v1 = Add ({p}v2, {p}s1)
    {p}v0 = Mul ({p}v1, w256)
    {p}value = Add ({p}v0, {p}s0)
    {p}rounded = Add ({p}value, w_half)
    {p}not_black = Max ({p}rounded, w0)
    {p}floor = Div ({p}not_black, w_one)
    {p}byte = Min ({p}floor, w255)
    {p}small = Cast <to = 2> ({p}byte)
    {p}shape = Constant <value_ints = [0, {padded}, 3, -1]> ()
    {p}joined = Reshape ({p}small, {p}shape)
    {p}until = Constant <value_ints = [{crop}]> ()
    {p}cut = Slice ({p}joined, i0, {p}until, i1)
    {p}out = Transpose <perm = [0, 3, 2, 1]> ({p}cut)
"""
_TAIL = """
    upright = Transpose <perm = [0, 2, 3, 1]> (v_out)
    pixels = Cast <to = 1> (upright)
    centred = Sub (pixels, mean)
    prepared = Mul (centred, inverse_std)
}
"""
_BLOCK = 16


def preprocessing_graph(processor: EfficientNetNVImageProcessor, options: ExportOptions) -> onnx.ModelProto:
    """`image` uint8 (N, height, width, 3) to what the network takes, float32 (N, 3, crop height, crop width).

    Steps that the processor leaves out are left out, and images smaller than the crop get its black border.

    Args:
        options: with a `layout` the input is `pixel_values` float32 (N, 3, height, width), whole numbers from 0 to 255.

    Raises:
        UserError: the processor resizes by another filter than bilinear or bicubic.
    """
    sides = {"h": processor.crop_size["width"], "v": processor.crop_size["height"]}
    resample = processor.resample if processor.do_resize else Image.Resampling.BILINEAR  # which keeps what has its size
    if resample not in _FILTERS:
        filter_ = Image.Resampling(resample).name.lower()
        flag = f"--layout {options.layout}" if options.layout else "--with_preprocessing"
        raise UserError(
            f"{flag}: the checkpoint's preprocessor_config.json resizes by {filter_}, and the graph can"
            f" by bilinear and bicubic only; export without {flag}."
        )
    support, filter_ = _FILTERS[resample]
    image_in, take = _PIXELS if options.layout else _IMAGE
    head = {
        "opset": options.opset,
        "crop_height": sides["v"],
        "crop_width": sides["h"],
        "image_in": image_in,
        "take": take,
    }
    settings = {"max_aspect_ratio": MAX_ASPECT_RATIO, "shortest_edge": processor.size["shortest_edge"]}
    parts = [_HEAD.format(**head), _RESIZE.format(**settings) if processor.do_resize else _KEEP]
    constants: dict[str, np.ndarray] = {
        **{f"i{value}": np.array([value]) for value in (0, 1, 2, 3, 4, 5, 8, 128, 256, 65536)},
        **{f"s{value}": np.array(value) for value in (0, 1, 2)},
        "support": np.array([support]),
        **{f"w{value}": np.array([value], np.int32) for value in (0, 255, 256)},
        "w_half": np.array([2**21], np.int32),
        "w_one": np.array([2**22], np.int32),
        "above": np.array([2**24 + 128]),  # so that what is divided is not negative
    }
    for name, (place, source) in {"h": (1, "source"), "v": (0, "h_out")}.items():  # as Pillow: along rows first
        prefix, crop = f"{name}_", sides[name]
        blocks = -(-crop // _BLOCK)
        parts.append(
            f"\n    {prefix}in = Identity ({source})"
            f"\n    {prefix}at = Constant <value_ints = [{place}]> ()"
            f"\n    {prefix}in_side = Gather (kept, {prefix}at)"
            f"\n    {prefix}out_side = Gather (resized, {prefix}at)"
        )
        parts.append(_PASS.format(p=prefix, crop=crop, padded=blocks * _BLOCK, filter=filter_.format(p=prefix)))
        constants[f"{prefix}crop"] = np.array([crop])
        constants[f"{prefix}range"] = np.arange(blocks * _BLOCK).reshape(blocks, _BLOCK)
    model = onnx.parser.parse_model("".join([*parts, _TAIL]))
    used = {name for node in model.graph.node for name in node.input}
    # (factor * pixel - mean) / std in two operations instead of three.
    factor = processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    for name, values in (("mean", np.asarray(mean) / factor), ("inverse_std", factor / np.asarray(std))):
        constants[name] = values.astype(np.float32).reshape(1, 3, 1, 1)
    tensors = (numpy_helper.from_array(values, name) for name, values in constants.items() if name in used)
    model.graph.initializer.extend(tensors)
    return model


def put_in_front(preprocessing: onnx.ModelProto, network: onnx.ModelProto) -> onnx.ModelProto:
    """One model: what the first has prepared are the second's `pixel_values`."""
    preprocessing.ir_version = network.ir_version
    preprocessing = onnx.compose.add_prefix(preprocessing, "preprocessing/", rename_inputs=False)
    merged = onnx.compose.merge_models(preprocessing, network, io_map=[("preprocessing/prepared", "pixel_values")])
    merged.graph.name = network.graph.name
    merged.producer_name, merged.producer_version = network.producer_name, network.producer_version
    return merged
