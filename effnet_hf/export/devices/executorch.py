"""ExecuTorch: a program whose whole network is XNNPACK's, float32 or int8 by PT2E. Runs in a child only."""

import json
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from executorch.exir import to_edge_transform_and_lower
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e


def version() -> str:
    return metadata.version("executorch")


class Converter:
    def __init__(self, program: str, job: dict):
        self._program, self._job = torch.export.load(program), job
        self._prepared: torch.fx.GraphModule | None = None

    @torch.no_grad()
    def observe(self, array: np.ndarray) -> None:
        if self._prepared is None:
            quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
            self._prepared = prepare_pt2e(self._program.module(), quantizer)
        self._prepared(torch.from_numpy(array))

    def write(self, file: str, int8: str | None) -> None:
        program = self._program
        if int8:
            assert self._prepared is not None
            program = torch.export.export(convert_pt2e(self._prepared), program.example_inputs[0])
        facts = json.dumps(self._job["properties"])
        lowered = to_edge_transform_and_lower(
            program, partitioner=[XnnpackPartitioner()], constant_methods={"properties": facts}
        )
        Path(file).write_bytes(lowered.to_executorch().buffer)


def opened(file: str, threads: int, dtype: str):
    from executorch.runtime import Runtime, Verification

    program = Runtime.get().load_program(file, verification=Verification.Minimal)
    properties, forward = program.load_method("properties"), program.load_method("forward")
    if forward is None or properties is None or not json.loads(properties.execute([])[0])["labels"]:
        raise ValueError("the program has no network or no properties")

    def run(array: np.ndarray) -> np.ndarray:
        assert program  # its methods live in it
        return forward.execute([torch.from_numpy(array)])[0].numpy()

    return run
