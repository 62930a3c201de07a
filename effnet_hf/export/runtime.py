"""An exported folder as a model that `transformers.pipeline` takes, on transformers 4.57 and 5, without Optimum."""

import json
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import ImageClassificationPipeline, pipeline
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from ..checkpoint import (
    CONFIG,
    PROCESSOR,
    read_config,
    read_processor,
    require_as_written,
    say_what_was_edited,
)
from ..cli import invocation
from ..configuration import EfficientNetNVConfig
from ..errors import UserError, first_line, printable
from ..hub import download
from ..image_processing_efficientnet_nv import EfficientNetNVImageProcessor, UnclearPixels, to_rgb
from ..inference import told
from ..multi_label import is_multi_label, probabilities
from ..reading import short
from .check import pixels_of, size_of
from .foreign import require_plain_graph
from .options import FORMATS, require
from .runners import onnxruntime_session


MODEL = FORMATS["onnx"]


class ONNXEfficientNet(torch.nn.Module):
    """`model.onnx` behind the face of a transformers model: `model(pixel_values).logits`.

    A torch module without parameters, because transformers asks for one; there is nothing to train. `device` says where
    PyTorch's tensors come from and go to; where ONNX Runtime computes is chosen by `providers`.
    """

    main_input_name = "pixel_values"
    base_model_prefix = "efficientnet"
    generation_config = None
    hf_device_map = None

    def __init__(
        self, session, config: EfficientNetNVConfig, processor: EfficientNetNVImageProcessor, name: str = MODEL
    ):
        super().__init__()
        if fault := _misfit(session, config, processor):
            raise UserError(f"{name} cannot be used: {fault}.")
        self.session, self.config, self.processor, self.name = session, config, processor, name
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.input_name = session.get_inputs()[0].name
        self.output_name = session.get_outputs()[0].name

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        *,
        providers=("CPUExecutionProvider",),
        threads: int | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> "ONNXEfficientNet":
        """Opens a folder that `export` or Optimum wrote, or a Hub id of one.

        Args:
            providers: ONNX Runtime's execution providers, best first.
            threads: of one operation; ONNX Runtime's choice by default.

        Raises:
            UserError: no such folder, or no model.onnx in it; it is not what was written, can compute without end, or
                does not fit the folder's config.json and preprocessor_config.json.
        """
        require("onnxruntime")
        path, name = Path(folder).expanduser(), printable(folder)
        if not os.path.isdir(path):
            if os.path.exists(path) or str(folder).count("/") != 1:
                raise UserError(f"{name} is not a folder; name one that {invocation('export')} wrote.")
            path = download(str(folder), revision=revision, token=token, patterns=["*.json", "*.onnx", "*.onnx_data"])
        if not (path / MODEL).is_file():
            if (path / "onnx").is_dir():
                raise UserError(
                    f"{name} is laid out for transformers.js; Python takes what {invocation('export')} writes without"
                    " --layout."
                )
            command = f"{invocation('export')} --model {name} --output_dir DIR"
            raise UserError(f"{name} holds no {MODEL}; write one: {command}")
        require_as_written(str(path), (MODEL,), f"{name} cannot be opened")
        say_what_was_edited(str(path), name)
        require_plain_graph(path / MODEL, name)
        config, processor = read_config(str(path), name), read_processor(str(path), name)
        try:
            session = onnxruntime_session(path / MODEL, threads, providers)
        except Exception as error:  # ONNX Runtime's own classes derive from Exception only
            raise UserError(f"{name} cannot be opened: {printable(first_line(error))}") from error
        return cls(session, config, processor, name)

    def forward(self, pixel_values, **_) -> ImageClassifierOutput:
        """`pixel_values` (N, 3, H, W), tensor or array; logits come back as a tensor on the same device.

        Of a graph that gives probabilities these are numbers whose softmax they are, or whose sigmoid where an image
        may have several labels.
        """
        if self.input_name != "pixel_values":
            raise ValueError("This graph preprocesses by itself; call `classify(image)`.")
        array = pixel_values.detach().cpu().numpy() if isinstance(pixel_values, torch.Tensor) else pixel_values
        outputs = self._run(np.ascontiguousarray(array, np.float32))
        if self.output_name == "probabilities":
            least = np.finfo(np.float32).tiny
            several, given = is_multi_label(self.config), outputs.astype(np.float64)
            outputs = np.log(np.maximum(given, least)) - (np.log(np.maximum(1 - given, least)) if several else 0)
            outputs = outputs.astype(np.float32)
        logits = torch.from_numpy(outputs).to(getattr(pixel_values, "device", "cpu"))
        return ImageClassifierOutput(logits=logits)  # type: ignore[arg-type]  # transformers says FloatTensor

    def classify(self, image: Image.Image, top_k: int | None = None) -> list[dict]:
        """`{"label", "score"}` of the best classes, whichever way the folder was exported; no tensors needed.

        Scores are probabilities: they add up to 1, or are one of its own for every class (`config.problem_type`
        `"multi_label_classification"`). Those have `"threshold"` and `"passed"`, too, and those that pass come first.

        Args:
            top_k: at most so many; 5 by default, all where an image may have several labels.
        """
        image = to_rgb(image, self.processor.bit_depth)
        fed = np.asarray(image)[None] if self.input_name == "image" else pixels_of(self.processor)([image])
        scores = self._run(fed)[0].astype(np.float64)
        if self.output_name == "logits":
            scores = probabilities(torch.from_numpy(scores), self.config).numpy()
        best = np.argsort(-scores, kind="stable")
        found = [{"label": self.config.id2label[int(i)], "score": float(scores[i])} for i in best]
        return told(found, self.config, top_k)

    def _run(self, fed: np.ndarray) -> np.ndarray:
        import onnxruntime

        quiet = onnxruntime.RunOptions()
        quiet.log_severity_level = 4  # it prints what it raises
        try:
            (outputs,) = self.session.run(None, {self.input_name: fed}, quiet)
        except Exception as error:  # as above
            raise UserError(f"{self.name} cannot be run: {printable(first_line(error))}") from error
        wanted = (len(fed), self.config.num_labels)
        if outputs.shape != wanted:
            raise UserError(f"{self.name}: its {MODEL} gives {outputs.shape} numbers, and {CONFIG} says {wanted}.")
        if not np.isfinite(outputs).all():
            raise UserError(
                f"{self.name}: its {MODEL} answers with NaN or infinity; it is damaged, or {PROCESSOR} belongs to"
                " another model."
            )
        return outputs

    def pipeline(self, **kwargs):
        """`transformers.pipeline("image-classification")` with this model and its image processor, which also has its
        way with images of more than 8 bits."""
        settings = {"pipeline_class": _Pipeline, "image_processor": self.processor, **kwargs}
        return pipeline("image-classification", model=self, **settings)

    @property
    def metadata(self) -> dict:
        """The facts that `export` stored in the file: labels, sizes, mean and standard deviation, recipe, …"""
        stored = self.session.get_modelmeta().custom_metadata_map
        return {key: _parsed(value) for key, value in stored.items()}

    def to(self, device=None, *_, **__) -> "ONNXEfficientNet":
        if device is not None and not isinstance(device, torch.dtype):
            self.device = torch.device(device)
        return self

    def can_generate(self) -> bool:
        return False


class _Pipeline(ImageClassificationPipeline):
    """The library's own converts an image to RGB before the processor sees it, and that clips more than 8 bits."""

    def preprocess(self, image, timeout=None):
        is_file, depth = isinstance(image, str) and os.path.isfile(image), self.image_processor.bit_depth
        if depth is not None and isinstance(image, str) and not is_file:  # an address, or base64
            raise UserError(f"{short(image)} is no file; of images of {depth} bits pass a file or PIL.Image.open(…).")
        opened = Image.open(image) if is_file else image
        try:
            upright = to_rgb(opened, depth) if isinstance(opened, Image.Image) else opened
        except UnclearPixels as error:
            raise UserError(f"{printable(image) if is_file else 'the image'} {printable(error)}.") from error
        return super().preprocess(upright, timeout)


def _misfit(session, config: EfficientNetNVConfig, processor: EfficientNetNVImageProcessor) -> str | None:
    """Why a graph cannot classify for the two files beside it, as the end of a sentence. A side that the graph leaves
    open is compared when it runs, and so is the first, the number of images."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1:
        return f"its {MODEL} has {len(inputs)} inputs and {len(outputs)} outputs, and should have one each"
    names = ({"pixel_values": "float", "image": "uint8"}, {"logits": "float", "probabilities": "float"})
    shapes: dict[str, list] = {"pixel_values": ["N", 3, *size_of(processor)], "image": ["N", "height", "width", 3]}
    for value, known in zip((*inputs, *outputs), names):
        if value.name not in known:
            return f"its {MODEL} has {short(value.name)} where it should have {' or '.join(known)}"
        kind, shape = f"tensor({known[value.name]})", shapes.get(value.name, ["N", config.num_labels])
        fits = len(value.shape) in (0, len(shape)) and all(
            side == wanted for side, wanted in zip(value.shape[1:], shape[1:]) if isinstance(side, int)
        )
        if value.type != kind or not fits:
            return (
                f"its {MODEL} has {value.name} {value.type} {short(value.shape)},"
                f" and by {CONFIG} and {PROCESSOR} it should be {kind} {short(shape)}"
            )
    return None


def _parsed(value: str):
    try:
        return json.loads(value)
    except ValueError:
        return value


# The pipeline prints an error for every class whose name is not in its table.
MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["efficientnet_nv_onnx"] = ONNXEfficientNet.__name__
