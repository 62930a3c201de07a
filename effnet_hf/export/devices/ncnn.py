"""ncnn: a text of layers and a file of weights, drawn by pnnx. Runs in a child only."""

import errno
import os
import re
import signal
import subprocess
from importlib import metadata
from pathlib import Path

import ncnn
import numpy as np
import pnnx
import torch


def version() -> str:
    return metadata.version("ncnn")


class Converter:
    def __init__(self, program: str, job: dict):
        self._program, self._job = torch.export.load(program), job

    def write(self, file: str, int8: str | None) -> None:
        (image,), _ = self._program.example_inputs
        with torch.no_grad():
            traced = torch.jit.trace(self._program.module(), image, check_trace=False)
        traced.save("traced.pt")
        fp16 = int(self._job["dtype"] == "fp16")
        shape = "[" + ",".join(map(str, image.shape)) + "]"
        names = {"pnnxparam": "a", "pnnxbin": "b", "pnnxpy": "c", "pnnxonnx": "d", "ncnnpy": "e"}
        names |= {"ncnnparam": "drawn.param", "ncnnbin": bin_of(file)}
        options = [f"inputshape={shape}", f"fp16={fp16}", *(f"{name}={place}" for name, place in names.items())]
        done = subprocess.run([pnnx.EXEC_PATH, "traced.pt", *options])
        if done.returncode == -signal.SIGXFSZ:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        if done.returncode:
            raise RuntimeError(f"pnnx ended with {done.returncode}")
        drawn = Path("drawn.param").read_text("utf-8")
        # Names that say what they are, in place of pnnx's.
        for old, new in (("in0", "pixel_values"), ("out0", self._job["output"])):
            drawn = re.sub(rf"(?<!\S){old}(?!\S)", new, drawn)
        Path(file).write_text(drawn, "utf-8")


def bin_of(file: str) -> str:
    """The weights beside it."""
    return file.removesuffix(".param") + ".bin"


def opened(file: str, threads: int, dtype: str):
    net = ncnn.Net()
    net.opt.num_threads = threads
    if dtype == "fp32":  # by default it rounds to float16 where the processor can
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    if net.load_param(file) or net.load_model(bin_of(file)):
        raise ValueError("ncnn cannot read what pnnx has written")
    (taken,), (given,) = net.input_names(), net.output_names()

    def run(array: np.ndarray) -> np.ndarray:
        extractor = net.create_extractor()
        extractor.input(taken, ncnn.Mat(np.ascontiguousarray(array[0])).clone())
        code, found = extractor.extract(given)
        if code:
            raise ValueError(f"ncnn ends with code {code}")
        return np.array(found)

    return run
