"""Core ML: a `.mlpackage` whose input is an image and whose labels lie inside. Runs in a child only.

Core ML computes on macOS only. What is proved here is the program in the saved package, computed by `mil.py`, and what
the package says of its input, outputs and labels.
"""

import json
from pathlib import Path

import coremltools as ct
import numpy as np
import torch
from coremltools.optimize import coreml as compression

from .mil import Program


def version() -> str:
    return ct.__version__


class Converter:
    def __init__(self, program: str, job: dict):
        self._program, self._job = torch.export.load(program), job

    def write(self, file: str, int8: str | None) -> None:
        job, (image,) = self._job, self._program.example_inputs[0]
        labels = None if job["several"] else ct.ClassifierConfig(job["labels"])
        passes = ct.PassPipeline.DEFAULT
        # It makes a batch norm with an epsilon of the scale and shift in front, which changes the scale by 5e-6.
        passes.remove_passes({"common::fuse_elementwise_to_batchnorm"})
        precision = {"fp32": ct.precision.FLOAT32, "fp16": ct.precision.FLOAT16}[job["dtype"]]
        model = ct.convert(
            self._program.run_decompositions({}),
            inputs=[ct.ImageType(name="image", shape=tuple(image.shape), color_layout=ct.colorlayout.RGB)],
            outputs=[ct.TensorType(name="probabilities", dtype=np.float32)] if job["several"] else None,
            classifier_config=labels,
            compute_precision=precision,
            pass_pipeline=passes,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS16,
            skip_model_load=True,
        )
        if int8:
            kind = compression.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=512)
            model = compression.linear_quantize_weights(model, compression.OptimizationConfig(global_config=kind))
        model.short_description = job["description"]
        for name, value in job["properties"].items():
            model.user_defined_metadata[name] = value if isinstance(value, str) else json.dumps(value)
        model.save(file)
        (Path(file) / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)  # no part of a package


def opened(file: str, threads: int, dtype: str):
    """The program in the package as a function of (1, 3, height, width), 0 to 255, to the logits before its last
    operation, which must be the softmax or sigmoid of them."""
    model = ct.models.MLModel(file, skip_model_load=True)
    spec = model.get_spec()
    (image,) = spec.description.input
    labels = json.loads(model.user_defined_metadata["labels"])
    program = Program(spec, model.weights_dir)
    classes = list(program.classes)
    kind = image.type.imageType
    if image.name != "image" or kind.colorSpace != kind.RGB or (kind.height, kind.width) != program.sides:
        raise ValueError(f"the package takes {image.name}, not an RGB image of the network's size")
    outputs = [output.name for output in spec.description.output]
    wanted = ["probabilities"] if not classes else ["classLabel", "classLabel_probs"]
    if sorted(outputs) != wanted or (classes and len(classes) != len(labels)):
        raise ValueError(f"the package gives {outputs} of {len(classes)} classes")
    if not (Path(file) / "Manifest.json").is_file():
        raise ValueError("the package has no manifest")

    @torch.inference_mode()
    def run(array: np.ndarray) -> np.ndarray:
        return program(torch.from_numpy(array)).numpy()

    return run
