"""How the file of a device is run, for the card of its folder: in Python here, in the device's language there."""

from ...checkpoint import Checkpoint
from ...multi_label import is_multi_label
from ..options import ExportOptions


_PYTHON = {
    "executorch": """```python
from executorch.runtime import Runtime
from PIL import Image
from transformers import AutoImageProcessor

processor = AutoImageProcessor.from_pretrained("{model}", trust_remote_code=True)
program = Runtime.get().load_program("{model}/model.pte")
pixel_values = processor(Image.open("image.jpg"), return_tensors="pt")["pixel_values"]
({output},) = program.load_method("forward").execute([pixel_values])
```
""",
    "coreml": """```python
import coremltools
from PIL import Image
from transformers import AutoImageProcessor

processor = AutoImageProcessor.from_pretrained("{model}", trust_remote_code=True)
settings = {{"do_rescale": False, "do_normalize": False, "data_format": "channels_last", "return_tensors": "np"}}
pixels = processor(Image.open("image.jpg"), **settings)["pixel_values"][0]
model = coremltools.models.MLModel("{model}/model.mlpackage")
print(model.predict({{"image": Image.fromarray(pixels.astype("uint8"))}}))  # on a Mac
```
""",
    "litert": """```python
from ai_edge_litert.interpreter import Interpreter
from PIL import Image
from transformers import AutoImageProcessor

processor = AutoImageProcessor.from_pretrained("{model}", trust_remote_code=True)
run = Interpreter("{model}/model.tflite").get_signature_runner()
settings = {{"data_format": "channels_last", "return_tensors": "np"}}
{output} = run(pixel_values=processor(Image.open("image.jpg"), **settings)["pixel_values"])["{output}"]
```
""",
    "ncnn": """```python
import ncnn
import numpy as np
from PIL import Image
from transformers import AutoImageProcessor

processor = AutoImageProcessor.from_pretrained("{model}", trust_remote_code=True)
net = ncnn.Net()
{exact_python}net.load_param("{model}/model.ncnn.param")
net.load_model("{model}/model.ncnn.bin")
extractor = net.create_extractor()
pixel_values = processor(Image.open("image.jpg"), return_tensors="np")["pixel_values"]
extractor.input("pixel_values", ncnn.Mat(pixel_values[0]).clone())
{output} = np.array(extractor.extract("{output}")[1])
```
""",
}

# `middle` is what the crop leaves of the image, at its own scale.
_KOTLIN_IMAGE = """val (left, top) = (bitmap.width - {wide}) / 2 to (bitmap.height - {tall}) / 2
val middle = Bitmap.createBitmap(bitmap, left, top, {wide}, {tall})
val pixels = IntArray({height} * {width})
Bitmap.createScaledBitmap(middle, {width}, {height}, true).getPixels(pixels, 0, {width}, 0, 0, {width}, {height})
val mean = floatArrayOf({mean_f})
val norm = floatArrayOf({norm_f})
"""
_KOTLIN_BEST = """val labels = context.assets.open("labels.txt").bufferedReader().readLines()
{choice}
"""
_KOTLIN_ONE = "println(labels[{output}.indices.maxBy {{ {output}[it] }}])"
_KOTLIN_SEVERAL = "labels.zip({output}.toList()).forEach(::println)  // config.json has the thresholds of their sigmoid"

_DEVICE = {
    "executorch": """On Android, in Kotlin, with `implementation("org.pytorch:executorch-android:{version}")`:

```kotlin
{short}"""
    + _KOTLIN_IMAGE
    + """val input = FloatArray(3 * pixels.size) {{  // one channel after another
    val channel = it / pixels.size
    ((pixels[it % pixels.size] shr (16 - 8 * channel) and 255) - mean[channel]) * norm[channel]
}}
val tensor = Tensor.fromBlob(input, longArrayOf(1, 3, {height}, {width}))
val {output} = Module.load(path).forward(EValue.from(tensor))[0].toTensor().dataAsFloatArray  // path of model.pte
"""
    + _KOTLIN_BEST
    + """```

Labels and all settings also lie in the program: its method `properties` gives them as JSON.
""",
    "litert": """On Android, in Kotlin, with `implementation("com.google.ai.edge.litert:litert:{version}")`:

```kotlin
{short}"""
    + _KOTLIN_IMAGE
    + """val input = FloatArray(3 * pixels.size) {{  // red, green and blue of each pixel
    ((pixels[it / 3] shr (16 - 8 * (it % 3)) and 255) - mean[it % 3]) * norm[it % 3]
}}
val model = CompiledModel.create(context.assets, "model.tflite", CompiledModel.Options(Accelerator.CPU))
val (inputs, outputs) = model.createInputBuffers() to model.createOutputBuffers()
inputs[0].writeFloat(input)
model.run(inputs, outputs)
val {output} = outputs[0].readFloat()
"""
    + _KOTLIN_BEST
    + """```
""",
    "coreml": """On iOS and macOS, in Swift, with model.mlpackage in the project, of which Xcode makes a class `model`:

```swift
import CoreML
import Vision

let network = try VNCoreMLModel(for: model(configuration: MLModelConfiguration()).model)
let request = VNCoreMLRequest(model: network)
let (w, h) = (CGFloat(image.width), CGFloat(image.height))  // image: a CGImage
{short}let (wide, tall) = (CGFloat({wide}), CGFloat({tall}))
request.regionOfInterest = CGRect(x: (w - wide) / 2 / w, y: (h - tall) / 2 / h, width: wide / w, height: tall / h)
request.imageCropAndScaleOption = .scaleFill
try VNImageRequestHandler(cgImage: image).perform([request])
{choice}
```

The program subtracts the mean and divides by the standard deviation itself. {labels}
""",
    "ncnn": """On a device, in C++:

```cpp
#include <net.h>

// rgb: the image's bytes, w x h pixels; labels: the lines of labels.txt
{short}ncnn::Mat in = ncnn::Mat::from_pixels_roi_resize(rgb, ncnn::Mat::PIXEL_RGB, w, h,
    (w - {wide}) / 2, (h - {tall}) / 2, {wide}, {tall}, {width}, {height});
const float mean[3] = {{{mean_f}}}, norm[3] = {{{norm_f}}};
in.substract_mean_normalize(mean, norm);
ncnn::Net net;
{exact}net.load_param("model.ncnn.param");
net.load_model("model.ncnn.bin");
ncnn::Extractor extractor = net.create_extractor();
extractor.input("pixel_values", in);
ncnn::Mat {output};
extractor.extract("{output}", {output});
{choice}
```
""",
}
_EXACT = "net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = false"
_CHOICES = {
    "coreml": (
        "let best = (request.results as? [VNClassificationObservation])?.first\n"
        'print(best?.identifier ?? "", best?.confidence ?? 0)',
        "let found = (request.results as? [VNCoreMLFeatureValueObservation])?.first?.featureValue.multiArrayValue\n"
        "// one probability for every line of labels.txt; config.json has the thresholds",
    ),
    "ncnn": (
        "const float* values = {output};\n"
        'printf("%s\\n", labels[std::max_element(values, values + {output}.w) - values].c_str());',
        "// {output}[i] is of the i-th label; config.json has the thresholds of their sigmoid",
    ),
}
_FILTER = (
    "\n`AutoImageProcessor` prepares the image as the network was trained; the lines for the device resize by another"
    " filter, which moves probabilities a little.\n"
)


def device_usage(checkpoint: Checkpoint, options: ExportOptions, model: str, version: str) -> str:
    """Markdown for the card.

    Args:
        model: where the folder is.
        version: of the runtime that the file was checked in.
    """
    processor, format, several = checkpoint.processor, options.format, is_multi_label(checkpoint.config)
    height, width = processor.crop_size["height"], processor.crop_size["width"]
    factor = processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    short, wide, tall = "", str(width), str(height)
    if processor.do_resize:
        edge = processor.size["shortest_edge"]
        wide, tall = f"short * {width} / {edge}", f"short * {height} / {edge}"
        short = {
            "coreml": "let short = min(w, h)\n",
            "ncnn": "const int short_side = std::min(w, h);\n",
        }.get(format, "val short = minOf(bitmap.width, bitmap.height)\n")
        if format == "ncnn":  # `short` is a word of C++
            wide, tall = wide.replace("short", "short_side"), tall.replace("short", "short_side")
        if format in ("executorch", "litert"):
            short += f"val (wide, tall) = {wide} to {tall}\n"
            wide, tall = "wide", "tall"
    one, more = _CHOICES.get(format, (_KOTLIN_ONE, _KOTLIN_SEVERAL))
    output = options.output_name
    suffix = "" if format == "coreml" else "f"
    facts = {
        "model": model,
        "output": output,
        "version": version,
        "height": height,
        "width": width,
        "short": short,
        "wide": wide,
        "tall": tall,
        "mean_f": ", ".join(f"{value / factor:.7g}{suffix}" for value in mean),
        "norm_f": ", ".join(f"{factor / value:.7g}{suffix}" for value in std),
        "choice": (more if several else one).format(output=output),
        "exact": _EXACT + ";  // as it was checked\n" if options.dtype == "fp32" else "",
        "exact_python": _EXACT.replace("false", "False") + "  # as it was checked\n" if options.dtype == "fp32" else "",
        "labels": "Labels lie in labels.txt." if several else "Labels lie in the package.",
    }
    return _PYTHON[format].format(**facts) + "\n" + _DEVICE[format].format(**facts) + _FILTER
