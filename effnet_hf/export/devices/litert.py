"""LiteRT: a `.tflite` model, float32, with int8 weights, or int8 throughout. Runs in a child only."""

from importlib import metadata

import litert_torch
import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter
from ai_edge_quantizer import qtyping, quantizer, recipe
from ai_edge_quantizer.algorithm_manager import AlgorithmName


# As int8 the fully connected layers, of the squeeze-excite gates and the classifier, make noise of B0's logits (-1 dB;
# 15 without; ai-edge-quantizer 0.10.0). The input and the output stay float32 for their users.
_IN_FLOAT = [getattr(qtyping.TFLOperationName, name) for name in ("INPUT", "OUTPUT", "FULLY_CONNECTED", "MEAN")]


def version() -> str:
    return metadata.version("ai-edge-litert")


class Converter:
    def __init__(self, program: str, job: dict):
        self._program = torch.export.load(program)
        self._float: str | None = None
        self._observed: list[np.ndarray] = []

    def observe(self, array: np.ndarray) -> None:
        self._observed.append(array)

    def write(self, file: str, int8: str | None) -> None:
        if not int8:
            _, named = self._program.example_inputs
            litert_torch.convert(self._program.module(), sample_kwargs=named).export(file)
            self._float = file
            return
        assert self._float is not None  # which the quantizer reads
        calibrated = bool(self._observed)
        made = quantizer.Quantizer(self._float)
        made.load_quantization_recipe(recipe.static_wi8_ai8() if calibrated else recipe.weight_only_wi8_afp32())
        ranges = None
        if calibrated:
            for operation in _IN_FLOAT:
                made.update_quantization_recipe(".*", operation, algorithm_key=AlgorithmName.NO_QUANTIZE)
            ranges = made.calibrate({"serving_default": [{"pixel_values": array} for array in self._observed]})
        made.quantize(ranges).export_model(file)


def opened(file: str, threads: int, dtype: str):
    interpreter = Interpreter(file, num_threads=threads)
    interpreter.allocate_tensors()
    (taken,), (given,) = interpreter.get_input_details(), interpreter.get_output_details()
    for value in (taken, given):
        if value["dtype"] is not np.float32:
            raise ValueError(f"{value['name']} is {value['dtype'].__name__}, not float32")

    def run(array: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(taken["index"], array)
        interpreter.invoke()
        return interpreter.get_tensor(given["index"])

    return run
