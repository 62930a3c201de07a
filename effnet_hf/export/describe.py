"""What an exported file says of itself: the summary that is printed, the file's properties, the folder's card."""

import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..checkpoint import Checkpoint
from ..errors import printable
from ..hub import CardFacts, describe_preprocessing, render_card, software_versions
from ..multi_label import is_multi_label, thresholds_of
from ..tables import text_table
from .check import LEAST_SNR, Comparison, size_of
from .devices import DEVICES
from .devices.cards import device_usage
from .options import LAYOUT_DTYPES, ExportOptions


TABLE_HEADER = ("", "{}, %", "agreement, %", "MB", "ms at batch 1", "ms at batch 8", "times float")
# From which speed on, relative to float in the same runtime, an `ort-cpu` file is worth its rounding.
WORTH = 1.3
X86 = ("x86_64", "amd64", "i386", "i686")


@dataclass(frozen=True)
class Row:
    """One file in one runtime, of the table that puts INT8 beside float.

    Attributes:
        top1: percent, or mAP where an image may have several labels; None without labelled images.
        agreement: with the fake-quantized checkpoint in PyTorch, percent.
        latency: milliseconds per call at batch 1 and 8, one thread, median; at batch 1 alone for devices.
        times_float: speed relative to the float file in the same runtime, at the same batches.
    """

    name: str
    top1: float | None
    agreement: float
    megabytes: float | None
    latency: tuple[float, ...]
    times_float: tuple[float, ...] | None

    def cells(self) -> list[str]:
        return [
            self.name,
            "–" if self.top1 is None else f"{self.top1:.2f}",
            f"{self.agreement:.2f}",
            "–" if self.megabytes is None else f"{self.megabytes:.1f}",
            *(f"{value:.1f}" for value in self.latency),
            "–" if self.times_float is None else " / ".join(f"{value:.2f}" for value in self.times_float),
        ]

    def warning(self) -> str | None:
        """A sentence when it is slower than its float row."""
        if self.times_float is None or min(self.times_float) >= 1:
            return None
        return f"{self.name} is slower than float on this machine, {min(self.times_float):.2f} times its speed."


@dataclass(frozen=True)
class Exported:
    """What was written, and how it was checked.

    Attributes:
        folder, file: where it is; `file` lies in `folder`.
        size: of the file (and its weights beside it), bytes.
        runtime: what ran it.
        images: how many of what, for a sentence.
        comparison: against PyTorch.
        top1: of the file and of the checkpoint in PyTorch, percent, or mAP; None without labelled images.
        rows: an INT8 file beside float.
        temperature: what its logits are divided by, as the checkpoint's are.
        notes: one sentence each, of what a user must know.
        least_snr: decibels that an INT8 file had to have.
    """

    folder: Path
    file: Path
    size: int
    options: ExportOptions
    runtime: str
    images: str
    comparison: Comparison
    top1: tuple[float, float] | None = None
    rows: tuple[Row, ...] = ()
    temperature: float | None = None
    notes: tuple[str, ...] = ()
    least_snr: float | None = None

    @property
    def figure(self) -> str:
        """What `top1` is."""
        return "mAP" if self.comparison.several else "top-1"

    @property
    def table_header(self) -> tuple[str, ...]:
        only_one = self.rows and len(self.rows[0].latency) == 1
        titles = [title for title in TABLE_HEADER if not (only_one and title.endswith("batch 8"))]
        return tuple(title.format(self.figure) for title in titles)

    def summary(self) -> str:
        """What the command prints."""
        options, checked = self.options, self.comparison
        graph = f"opset {options.opset}, " if options.format == "onnx" else ""
        kind = "int8" if options.int8 == options.format else options.int8 or options.dtype
        kind = f"int8 {kind}" if options.int8 and options.format in DEVICES else kind
        lines = [
            f"wrote    {printable(self.file)}   {self.size / 1e6:.1f} MB, {graph}{kind}",
            f"graph    {options.input_name} -> {options.output_name}",
            *([f"         its logits are {_divided(self.temperature)}"] if self.temperature is not None else []),
            f"checked  {self.runtime} against PyTorch on {printable(self.images)}:"
            f" largest difference {checked.difference:.2g}, {checked.agreed}",
        ]
        if options.int8:
            wanted = self.least_snr or LEAST_SNR[options.int8]
            lines.append(
                f"         signal to noise {checked.snr:.1f} dB, {wanted:g} wanted: int8 differs by its rounding"
            )
        if self.top1:
            own, reference = self.top1
            name = self.figure.replace("-", "").ljust(8)
            lines.append(f"{name} {own:.2f} % on these, the checkpoint in PyTorch {reference:.2f} %")
        lines += [f"note     {note}" for note in self.notes]
        if self.rows:
            lines += ["", text_table(self.table_header, [row.cells() for row in self.rows])]
            lines += [f"warning: {warning}" for warning in self.warnings()]
        return "\n".join(lines)

    def warnings(self) -> list[str]:
        """A sentence for what is not worth its rounding here."""
        found = [warning for row in self.rows if (warning := row.warning())]
        ratios = [min(row.times_float) for row in self.rows if row.times_float]
        if self.options.int8 == "ort-cpu" and ratios and ratios[-1] < WORTH:
            x86 = platform.machine().lower() in X86
            found = [
                f"{self.rows[-1].name} has {ratios[-1]:.2f} times the speed of float, not worth it on this machine"
                f" (below {WORTH}): {'on x86 CPUs give --int8 openvino' if x86 else 'the float file is better'}."
            ]
        return found


def _divided(temperature: float) -> str:
    return f"divided by the checkpoint's temperature, {temperature:g}"


def properties(checkpoint: Checkpoint, options: ExportOptions) -> dict[str, object]:
    """What somebody needs who has nothing but the file."""
    processor = checkpoint.processor
    height, width = size_of(processor)
    facts: dict[str, object] = {
        "labels": checkpoint.class_names,
        "variant": checkpoint.config.variant or "custom",
        "image_size": height if height == width else [height, width],
        "do_resize": processor.do_resize,
        "resize_shortest_edge": processor.size["shortest_edge"],
        "resample": Image.Resampling(processor.resample).name.lower(),
        "do_rescale": processor.do_rescale,
        "rescale_factor": processor.rescale_factor,
        "do_normalize": processor.do_normalize,
        "image_mean": processor.image_mean,
        "image_std": processor.image_std,
        "dtype": options.dtype,
        "problem_type": checkpoint.config.problem_type or "single_label_classification",
    }
    if processor.bit_depth is not None:
        facts["bit_depth"] = processor.bit_depth
    if is_multi_label(checkpoint.config):
        facts["thresholds"] = thresholds_of(checkpoint.config).tolist()
    if checkpoint.recipe:
        facts["recipe"] = checkpoint.recipe
    return facts


def write_configuration(checkpoint: Checkpoint, folder: Path, options: ExportOptions) -> None:
    """config.json and preprocessor_config.json, each with the code that opens it where this package is missing; for
    transformers.js with the names that it knows instead."""
    if options.layout:
        _write_for_transformers_js(checkpoint, folder, options)
        return
    checkpoint.config.save_pretrained(folder)
    checkpoint.processor.save_pretrained(folder)
    # The file replaces the weights that a model class would look for.
    config = json.loads((folder / "config.json").read_text("utf-8"))
    automatic = {name: place for name, place in config.get("auto_map", {}).items() if name == "AutoConfig"}
    config["architectures"] = ["EfficientNetNVForImageClassification"]
    config["auto_map"] = automatic or {"AutoConfig": "configuration.EfficientNetNVConfig"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _write_for_transformers_js(checkpoint: Checkpoint, folder: Path, options: ExportOptions) -> None:
    config, processor = checkpoint.config.to_diff_dict(), checkpoint.processor.to_dict()
    config |= {"model_type": "efficientnet", "architectures": ["EfficientNetForImageClassification"]}
    # Else a browser asks for model_quantized.onnx.
    config["transformers.js_config"] = {"dtype": LAYOUT_DTYPES[options.int8 or options.dtype][0]}
    # Theirs of the name EfficientNetImageProcessor divides by the square of the standard deviation.
    processor["image_processor_type"] = "CLIPImageProcessor"
    processor |= dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), False)
    for name, fields in (("config.json", config), ("preprocessor_config.json", processor)):
        fields.pop("auto_map", None)
        (folder / name).write_text(json.dumps(fields, indent=2) + "\n", "utf-8")


_LIBRARY = {"onnx": "onnx", "openvino": "openvino", "pt2": "pytorch"}

# How a graph that takes the image gets it: what is imported, and the image in RGB.
_SHALLOW = "from PIL import Image, ImageOps\n", 'ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB")'
_DEEP = (
    """from PIL import Image
from transformers.dynamic_module_utils import get_class_from_dynamic_module

# of more than 8 bits, which convert("RGB") clips; without transformers: scale 0 to {white:,} to 0 to 255
to_rgb = get_class_from_dynamic_module("image_processing_efficientnet_nv.to_rgb", "{model}")
""",
    'to_rgb(Image.open("image.jpg"), bit_depth={bits})',
)

_USE = {
    "onnx": """Without PyTorch's model code, through ONNX Runtime:

```python
import onnxruntime
from PIL import Image
from transformers import AutoImageProcessor

processor = AutoImageProcessor.from_pretrained("{model}", trust_remote_code=True)
session = onnxruntime.InferenceSession("{model}/model.onnx")
pixel_values = processor(Image.open("image.jpg"), return_tensors="np")["pixel_values"]
({output},) = session.run(None, {{"pixel_values": pixel_values}})
```

As a pipeline, with the `effnet_hf` package:

```python
from effnet_hf.export import ONNXEfficientNet

classify = ONNXEfficientNet.from_pretrained("{model}").pipeline()
classify("image.jpg")
```
""",
    "image": """The graph takes the image as it is, of any size, and gives probabilities:

```python
import json

import numpy as np
import onnxruntime
{imports}
session = onnxruntime.InferenceSession("{model}/model.onnx")
labels = json.loads(session.get_modelmeta().custom_metadata_map["labels"])
image = np.asarray({rgb})[None]
(probabilities,) = session.run(None, {{"image": image}})
for i in probabilities[0].argsort()[::-1][:5]:
    print(labels[i], probabilities[0, i])
```
""",
    "image, several": """The graph takes the image as it is, of any size, and gives a probability for every label:

```python
import json

import numpy as np
import onnxruntime
{imports}
session = onnxruntime.InferenceSession("{model}/model.onnx")
facts = session.get_modelmeta().custom_metadata_map
image = np.asarray({rgb})[None]
(probabilities,) = session.run(None, {{"image": image}})
for label, least, found in zip(json.loads(facts["labels"]), json.loads(facts["thresholds"]), probabilities[0]):
    if found >= least:
        print(label, found)
```
""",
    "transformers.js": """For [transformers.js](https://huggingface.co/docs/transformers.js), in a browser or in Node:

```js
import {{ pipeline }} from '@huggingface/transformers';

const classify = await pipeline('image-classification', '{model}');
console.log(await classify('image.jpg', {{ top_k: 5 }}));
```

The graph resizes, crops and normalises by itself, to the very pixels of Pillow: give the pipeline one image at a time,
or several of one size.
""",
    "openvino": """```python
import openvino
from PIL import Image
from transformers import AutoImageProcessor

processor = AutoImageProcessor.from_pretrained("{model}", trust_remote_code=True)
model = openvino.Core().compile_model("{model}/openvino_model.xml", "CPU")
pixel_values = processor(Image.open("image.jpg"), return_tensors="np")["pixel_values"]
{output} = model(pixel_values)[0]
```
""",
    "pt2": """```python
import torch
from PIL import Image
from transformers import AutoImageProcessor

processor = AutoImageProcessor.from_pretrained("{model}", trust_remote_code=True)
model = torch.export.load("{model}/model.pt2").module()
pixel_values = processor(Image.open("image.jpg"), return_tensors="pt")["pixel_values"]
{output} = model(pixel_values)
```
""",
}


def write_card(checkpoint: Checkpoint, exported: Exported, command: str | None, model_id: str | None) -> None:
    """Writes README.md into the folder that `exported` lies in: how to run it, how it was checked, where it is from."""
    (exported.folder / "README.md").write_text(render_card(_facts(checkpoint, exported, command, model_id)), "utf-8")


def _facts(checkpoint: Checkpoint, exported: Exported, command: str | None, model_id: str | None) -> CardFacts:
    options, config, checked = exported.options, checkpoint.config, exported.comparison
    depth, model = checkpoint.processor.bit_depth, model_id or "path/to/this/folder"
    imports, rgb = (
        _SHALLOW if depth is None else (part.format(model=model, bits=depth, white=2**depth - 1) for part in _DEEP)
    )
    use = options.layout or options.format
    if options.with_preprocessing:
        use = "image, several" if checked.several else "image"
    device = DEVICES.get(options.format)
    opener = options.layout or (device.name if device else exported.runtime.split()[0])
    kind = f"{options.int8} INT8" if options.int8 else options.dtype
    how = {"onnx": f"ONNX, opset {options.opset}", "openvino": "OpenVINO IR", "pt2": "torch.export program"}
    how |= {name: one.file_type for name, one in DEVICES.items()}
    notes = [
        f"Exported as {how[options.format]}, {kind}. Checked on {exported.images} before it was written:"
        f" {exported.runtime} against PyTorch, largest difference {checked.difference:.2g},"
        f" {checked.agreed}."
    ]
    if config.softmax_temperature is not None:
        notes.append(f"In the graph logits are {_divided(config.softmax_temperature)}; do not divide them again.")
    if checked.several:
        notes.append(
            "An image may have several labels: the sigmoid of a logit is the probability of its class, and"
            " an image has a label from its entry in config.json's list of thresholds on."
        )
    notes += exported.notes
    if options.int8 and options.format == "onnx" and not options.reduce_range:
        notes.append(
            "On an x86 CPU without VNNI (before 2019, or AVX2 alone) ONNX Runtime's sums overflow without"
            ' `options.add_session_config_entry("session.x64quantprecision", "1")` of the `SessionOptions()` that'
            " `InferenceSession(file, options)` gets; `ONNXEfficientNet` sets it. OpenVINO has no such option: for it"
            " write a file with `--int8 openvino --reduce_range`."
        )
    tables: list[tuple] = []
    if exported.rows:
        compared = "INT8 beside float" if options.int8 else "Beside PyTorch"
        title = f"{compared} on {exported.images}, one thread of this machine"
        tables.append((title, exported.table_header, [row.cells() for row in exported.rows]))
    elif exported.top1:
        header = ("this file", "the checkpoint in PyTorch")
        title = f"{exported.figure.replace('top', 'Top')} on {exported.images}, %"
        tables.append((title, header, [[f"{value:.2f}" for value in exported.top1]]))
    return CardFacts(
        name=f"EfficientNet {config.variant or 'of a custom shape'}, {kind}, for {opener}",
        model_id=model_id,
        variant=config.variant or "custom",
        num_labels=config.num_labels,
        image_size=size_of(checkpoint.processor),
        preprocessing=describe_preprocessing(checkpoint.processor),
        base_model=checkpoint.name,
        library=options.layout or (device.library if device else _LIBRARY[options.format]),
        usage=device_usage(checkpoint, options, model, exported.runtime.split()[-1])
        if device
        else _USE[use].format(
            model=model,
            output=options.output_name,
            imports=imports,
            rgb=rgb,
        ),
        bit_depth=depth,
        command=command,
        hardware=f"CPU ({platform.machine()}, {os.cpu_count()} cores)",
        versions=software_versions(
            *(device.distributions if device else ("onnx", "onnxruntime", "openvino")), "effnet-hf"
        ),
        notes=notes,
        tables=tables,
        multi_label=checked.several,
        tags=[options.format, *(["int8"] if options.int8 else [])],
    )
