"""An exported folder as a model that `transformers.pipeline` takes, on transformers 4.57 and 5, without Optimum."""

import json
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import pipeline
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from ..checkpoint import read_config, read_processor
from ..cli import invocation
from ..configuration import EfficientNetNVConfig
from ..errors import UserError, first_line
from ..hub import download
from ..image_processing_efficientnet_nv import EfficientNetNVImageProcessor, to_rgb
from .check import pixels_of
from .options import require
from .runners import onnxruntime_session


class ONNXEfficientNet(torch.nn.Module):
    """`model.onnx` behind the face of a transformers model: `model(pixel_values).logits`.

    A torch module without parameters, because transformers asks for one; there is nothing to train. `device` says where
    PyTorch's tensors come from and go to; where ONNX Runtime computes is chosen by `providers`.
    """

    main_input_name = "pixel_values"
    base_model_prefix = "efficientnet"
    generation_config = None
    hf_device_map = None

    def __init__(self, session, config: EfficientNetNVConfig, processor: EfficientNetNVImageProcessor):
        super().__init__()
        self.session, self.config, self.processor = session, config, processor
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
            UserError: no such folder, or no model.onnx in it.
        """
        require("onnxruntime")
        path = Path(folder).expanduser()
        if not os.path.isdir(path):
            if os.path.exists(path) or str(folder).count("/") != 1:
                raise UserError(f"{folder} is not a folder; name one that {invocation('export')} wrote.")
            path = download(str(folder), revision=revision, token=token, patterns=["*.json", "*.onnx", "*.onnx_data"])
        if not (path / "model.onnx").is_file():
            command = f"{invocation('export')} --model {folder} --output_dir DIR"
            raise UserError(f"{folder} holds no model.onnx; write one: {command}")
        try:
            session = onnxruntime_session(path / "model.onnx", threads, providers)
        except Exception as error:  # ONNX Runtime's own classes derive from Exception only
            raise UserError(f"{folder} cannot be opened: {first_line(error)}") from error
        return cls(session, read_config(str(path), str(folder)), read_processor(str(path), str(folder)))

    def forward(self, pixel_values, **_) -> ImageClassifierOutput:
        """`pixel_values` (N, 3, H, W), tensor or array; logits come back as a tensor on the same device.

        Of a graph that ends in a softmax these are logarithms of the probabilities, whose softmax they are.
        """
        if self.input_name != "pixel_values":
            raise ValueError("This graph preprocesses by itself; call `classify(image)`.")
        array = pixel_values.detach().cpu().numpy() if isinstance(pixel_values, torch.Tensor) else pixel_values
        (outputs,) = self.session.run(None, {self.input_name: np.ascontiguousarray(array, np.float32)})
        if self.output_name == "probabilities":
            outputs = np.log(np.maximum(outputs, np.finfo(np.float32).tiny))
        logits = torch.from_numpy(outputs).to(getattr(pixel_values, "device", "cpu"))
        return ImageClassifierOutput(logits=logits)  # type: ignore[arg-type]  # transformers says FloatTensor

    def classify(self, image: Image.Image, top_k: int = 5) -> list[dict]:
        """`{"label", "score"}` of the best classes, whichever way the folder was exported; no tensors needed."""
        image = to_rgb(image)
        fed = np.asarray(image)[None] if self.input_name == "image" else pixels_of(self.processor)([image])
        scores = self.session.run(None, {self.input_name: fed})[0][0].astype(np.float64)
        if self.output_name == "logits":
            scores = np.exp(scores - scores.max())
            scores /= scores.sum()
        best = np.argsort(-scores, kind="stable")[:top_k]
        return [{"label": self.config.id2label[int(i)], "score": float(scores[i])} for i in best]

    def pipeline(self, **kwargs):
        """`transformers.pipeline("image-classification")` with this model and its image processor."""
        return pipeline("image-classification", model=self, image_processor=self.processor, **kwargs)

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


def _parsed(value: str):
    try:
        return json.loads(value)
    except ValueError:
        return value


# The pipeline prints an error for every class whose name is not in its table.
MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["efficientnet_nv_onnx"] = ONNXEfficientNet.__name__
