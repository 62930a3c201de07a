"""The README.md of an exported folder: how to run it, how it was checked, what it came from."""

import os
import platform

from ..hub import CardFacts, describe_preprocessing, render_card, software_versions
from .int8_report import HEADER


_LIBRARY = {"onnx": "onnx", "openvino": "openvino", "pt2": "pytorch"}

_USE = {
    "onnx": """Without PyTorch's model code, through ONNX Runtime:

```python
import onnxruntime
from PIL import Image
from transformers import AutoImageProcessor

processor = AutoImageProcessor.from_pretrained("{model}", trust_remote_code=True)
session = onnxruntime.InferenceSession("{model}/model.onnx")
pixel_values = processor(Image.open("picture.jpg"), return_tensors="np")["pixel_values"]
({output},) = session.run(None, {{"pixel_values": pixel_values}})
```

As a pipeline, with the `effnet_hf` package:

```python
from effnet_hf.export import ONNXEfficientNet

classify = ONNXEfficientNet.from_pretrained("{model}").pipeline()
classify("picture.jpg")
```
""",
    "image": """The graph takes the picture as it is, of any size, and gives probabilities:

```python
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("{model}/model.onnx")
labels = json.loads(session.get_modelmeta().custom_metadata_map["labels"])
image = np.asarray(ImageOps.exif_transpose(Image.open("picture.jpg")).convert("RGB"))[None]
(probabilities,) = session.run(None, {{"image": image}})
for i in probabilities[0].argsort()[::-1][:5]:
    print(labels[i], probabilities[0, i])
```
""",
    "openvino": """```python
import openvino
from PIL import Image
from transformers import AutoImageProcessor

processor = AutoImageProcessor.from_pretrained("{model}", trust_remote_code=True)
model = openvino.Core().compile_model("{model}/openvino_model.xml", "CPU")
pixel_values = processor(Image.open("picture.jpg"), return_tensors="np")["pixel_values"]
{output} = model(pixel_values)[0]
```
""",
    "pt2": """```python
import torch
from PIL import Image
from transformers import AutoImageProcessor

processor = AutoImageProcessor.from_pretrained("{model}", trust_remote_code=True)
model = torch.export.load("{model}/model.pt2").module()
pixel_values = processor(Image.open("picture.jpg"), return_tensors="pt")["pixel_values"]
{output} = model(pixel_values)
```
""",
}


def write_card(checkpoint, exported, command: str | None, model_id: str | None) -> None:
    """Writes README.md into the folder that `exported` lies in."""
    (exported.folder / "README.md").write_text(render_card(_facts(checkpoint, exported, command, model_id)), "utf-8")


def _facts(checkpoint, exported, command: str | None, model_id: str | None) -> CardFacts:
    options, config, checked = exported.options, checkpoint.model.config, exported.comparison
    use = "image" if options.with_preprocessing else options.format
    kind = f"{options.int8} INT8" if options.int8 else options.dtype
    how = {"onnx": f"ONNX, opset {options.opset}", "openvino": "OpenVINO IR", "pt2": "torch.export program"}
    top1 = f"top-1 agreement {checked.agreement:.2f} %"
    notes = [
        f"Exported as {how[options.format]}, {kind}. Checked on {exported.pictures} before it was written: "
        f"{exported.runtime} against PyTorch, largest difference {checked.difference:.2g}, {top1}."
    ]
    tables: list[tuple] = []
    if exported.rows:
        title = f"INT8 beside float on {exported.pictures}, one thread of this machine"
        tables.append((title, HEADER, [row.cells() for row in exported.rows]))
    elif exported.top1:
        tables.append(
            (
                f"Top-1 on {exported.pictures}, %",
                ("this file", "the checkpoint in PyTorch"),
                [[f"{value:.2f}" for value in exported.top1]],
            )
        )
    return CardFacts(
        name=f"EfficientNet {config.variant or 'of a custom shape'}, {kind}, for {exported.runtime.split()[0]}",
        model_id=model_id,
        variant=config.variant or "custom",
        num_labels=config.num_labels,
        image_size=checkpoint.image_size,
        preprocessing=describe_preprocessing(checkpoint.processor),
        base_model=checkpoint.name,
        library=_LIBRARY[options.format],
        usage=_USE[use].format(model=model_id or "path/to/this/folder", output=options.output_name),
        command=command,
        hardware=f"CPU ({platform.machine()}, {os.cpu_count()} cores)",
        versions=software_versions("onnx", "onnxruntime", "openvino", "effnet-hf"),
        notes=notes,
        tables=tables,
        tags=[options.format, *(["int8"] if options.int8 else [])],
    )
