"""`load_for_inference`: a checkpoint as a transformers model that answers by the fastest runtime of this machine.

    model = load_for_inference("runs/b0")
    print(model.choice)
    model(pixel_values).logits
    pipeline("image-classification", model=model, image_processor=model.processor)

Which runtime that is depends on the processor, the versions and the shape, so it is measured, once for each, and
remembered. Whichever it is, its logits are compared with the checkpoint's own before anything is answered.
"""

import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import constants
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from ..checkpoint import Checkpoint, open_checkpoint
from ..cli import say
from ..errors import UserError, first_line, printable
from ..files import atomic_write
from ..hub import software_versions
from ..image_processing_efficientnet_nv import EfficientNetNVImageProcessor
from ..inference import find_device
from ..modeling_efficientnet_nv import EfficientNetNVForImageClassification
from ..quantization_efficientnet_nv import may_be_tuple
from .check import TOLERANCE, Comparison, GeneratedImages, compare, deciding, pixels_of, size_of
from .engines import PRECISIONS, RUNTIMES, Engine, Place, make_engine, name_of, obstacle
from .options import ExportOptions


TURNS, CALLS, SECONDS = 3, 5, 4.0  # of measuring, at most
_IMAGES = 4  # at least so many for the proof
# Of int8's logits on generated images, decibels: they vary less than on photographs, so that the same rounding weighs
# more. A calibrated B0 has 9.5 in OpenVINO (24 on photographs) and 14.5 in ONNX Runtime; 5.6 where its sums overflow.
_LEAST_SNR = 7.0


@dataclass(frozen=True)
class Choice:
    """What runs, and why.

    Attributes:
        runtime: one of `RUNTIMES`.
        place: where, for images of which size and how many at once.
        milliseconds: of a call, median, by runtime; empty where the runtime was named.
        comparison: its logits with the checkpoint's own, float32 (or fake-quantized) in PyTorch.
        remembered: measured by an earlier call, not by this one.
        left_out: why the other runtimes were not measured.
    """

    runtime: str
    place: Place
    milliseconds: Mapping[str, float]
    comparison: Comparison
    remembered: bool = False
    left_out: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        place, (height, width) = self.place, self.place.size
        one = f"{place.batch_size} image{'s' * (place.batch_size > 1)} of {height} x {width} pixels"
        threads = torch.get_num_threads()
        where = (f"{threads} threads" if threads > 1 else "1 thread") if place.on_cpu else str(place.device)
        text = f"{name_of(self.runtime)}, {place.precision}"
        if self.milliseconds:
            times = sorted(self.milliseconds.items(), key=lambda item: item[1])
            others = ", ".join(f"{name} {ms:.1f}" for name, ms in times if name != self.runtime)
            text += f": {self.milliseconds[self.runtime]:.1f} ms for {one} on {where}"
            text += f" ({others}{'; measured earlier' if self.remembered else ''})" if others else ""
        found = self.comparison
        if place.precision == "int8":
            return f"{text}; {found.agreed} with the checkpoint in PyTorch, signal to noise {found.snr:.0f} dB"
        return f"{text}; logits within {found.difference:.1g} of the checkpoint's"


class EfficientNetNVForInference(EfficientNetNVForImageClassification):
    """A loaded checkpoint whose forward pass is that of an engine. Made by [`load_for_inference`].

    What the engine does not compute (hidden states, images of another size, traced graphs) PyTorch does, as always.

    Attributes:
        engine: `pixel_values` to logits.
        choice: which, and what was measured.
        processor: how the checkpoint's images are prepared.
    """

    engine: Engine
    choice: Choice
    processor: EfficientNetNVImageProcessor

    @may_be_tuple
    def forward(self, pixel_values=None, labels=None, output_hidden_states=None, **kwargs):
        """As [`EfficientNetNVForImageClassification`], without gradients."""
        asked = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
        known = isinstance(pixel_values, torch.Tensor) and pixel_values.shape[1:] == (3, *self.choice.place.size)
        if asked or tracing or not known or not len(pixel_values):
            return super().forward(pixel_values, labels, asked, return_dict=True, **kwargs)
        with torch.no_grad():
            logits = self.engine(pixel_values).to(pixel_values.device)
        loss = None if labels is None else self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)

    def train(self, mode: bool = True):
        if mode:
            raise ValueError(f"this network answers by {self.choice.runtime}; to train it, load it by from_pretrained.")
        return super().train(mode)

    def save_pretrained(self, *args, **kwargs):
        raise ValueError(f"this network answers by {self.choice.runtime}; to save it, load it by from_pretrained.")


def load_for_inference(
    model: str | os.PathLike | Checkpoint,
    runtime: str = "auto",
    device: str | torch.device = "cpu",
    *,
    precision: str | None = None,
    batch_size: int = 1,
    remember: bool = True,
) -> EfficientNetNVForInference:
    """A checkpoint for `pipeline` and your own code, by the fastest runtime that is installed.

    Args:
        model: folder, Hub id, or an open [`Checkpoint`].
        runtime: `"auto"`, or one of `RUNTIMES`: `"torch"` (eager), `"folded"`, `"compile"`, `"graphs"` (CUDA),
            `"onnxruntime"`, `"openvino"`. `"auto"` measures those that run on `device` at `precision`; it leaves
            `compile`, which takes minutes to start, to machines where neither of the last two runs.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, …
        precision: `"fp32"`, `"bf16"` or, on a GPU, `"fp16"`; a quantized checkpoint's is `"int8"`. By default as the
            checkpoint is.
        batch_size: of the usual call, which is measured; others are possible.
        remember: keep the choice of `"auto"` in Hugging Face's cache, and take it from there the next time.

    Raises:
        UserError: no such checkpoint, or the runtime is not installed, cannot run there, or does not compute what the
            checkpoint does.
    """
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(str(model))
    place = _place(checkpoint, find_device(str(device)), precision, batch_size)
    if runtime != "auto" and runtime not in RUNTIMES:
        raise UserError(f"--runtime {runtime}: there are auto, {', '.join(RUNTIMES)}.")
    network = checkpoint.load()
    proof = _Proof(checkpoint, network, place)
    found = _chosen(runtime, network, place, proof, remember)
    network.__class__ = EfficientNetNVForInference
    network.engine, network.choice = found
    network.processor = checkpoint.processor
    return network


def _place(checkpoint: Checkpoint, device: torch.device, precision: str | None, batch_size: int) -> Place:
    usual = "int8" if checkpoint.quantized else "fp32"
    precision = precision or usual
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision}: there are {', '.join(PRECISIONS)}.")
    if precision == "int8" and not checkpoint.quantized:
        raise UserError(
            f"--precision int8: {checkpoint.name} is a float checkpoint; quantize it, or write an INT8 file by"
            " effnet-hf export --int8 openvino."
        )
    if checkpoint.quantized and precision != "int8":
        raise UserError(f"--precision {precision}: {checkpoint.name} is quantized, and computes in int8.")
    if batch_size < 1:
        raise UserError(f"--batch_size {batch_size}: at least one image.")
    return Place(device, precision, size_of(checkpoint.processor), batch_size)


class _Proof:
    """Compares engines with the checkpoint itself, on images that look like photographs."""

    def __init__(self, checkpoint: Checkpoint, network: EfficientNetNVForImageClassification, place: Place):
        count, side = max(16 if place.precision == "int8" else _IMAGES, place.batch_size), max(place.size) + 16
        images = GeneratedImages(min(count, 16), side)
        pixels = pixels_of(checkpoint.processor)([images.open(index) for index in range(len(images))])
        self.place, self.pixels = place, torch.from_numpy(pixels)
        self.least = deciding(checkpoint.config, ExportOptions(format="pt2"))
        with torch.inference_mode():
            self.logits = network(self.pixels).logits.float().numpy()

    @property
    def batch(self) -> torch.Tensor:
        """One usual call's."""
        repeats = -(-self.place.batch_size // len(self.pixels))
        return self.pixels.repeat(repeats, 1, 1, 1)[: self.place.batch_size].to(self.place.device)

    def compare(self, engine: Engine) -> Comparison:
        with torch.no_grad():
            if self.place.batch_size > len(self.pixels):  # some engines have another program for the usual batch
                logits = engine(self.batch)[: len(self.pixels)].cpu()
            else:
                logits = torch.cat([engine(part).cpu() for part in self.pixels.split(self.place.batch_size)])
        return compare(self.logits, logits.float().numpy(), self.least)

    def fault(self, found: Comparison) -> str | None:
        """What is wrong with an engine's answers, as the end of a sentence."""
        precision = self.place.precision
        if precision == "int8":
            wrong = not found.snr >= _LEAST_SNR or found.certain_agreement < 100
            return f"has a signal to noise ratio of {found.snr:.1f} dB; {_LEAST_SNR:g} wanted" if wrong else None
        tolerance = TOLERANCE[precision] * max(1.0, found.scale / 10)
        wrong = not found.difference <= tolerance or found.certain_agreement < 100
        return f"differs by {found.difference:.2g}; {tolerance:.2g} allowed" if wrong else None


def _chosen(
    runtime: str, network: EfficientNetNVForImageClassification, place: Place, proof: _Proof, remember: bool
) -> tuple[Engine, Choice]:
    if runtime != "auto":
        if fault := obstacle(runtime, place):
            raise UserError(f"--runtime {runtime} {fault}.")
        engine, comparison = _proved(runtime, network, place, proof)
        return engine, Choice(runtime, place, {}, comparison)
    left_out = {name: fault for name in RUNTIMES if (fault := obstacle(name, place))}
    candidates = [name for name in RUNTIMES if name not in left_out]
    if place.on_cpu and {"onnxruntime", "openvino"} & set(candidates) and "compile" in candidates:
        candidates.remove("compile")
        left_out["compile"] = "takes minutes to start"
    if not candidates:
        raise UserError(
            f"--precision {place.precision}: no runtime has it on {place.device}; the checkpoint's is fp32."
        )
    key = _key(network, place, candidates)
    known = _remembered().get(key) if remember else None
    if known is not None and known["runtime"] in candidates:
        try:
            engine, comparison = _proved(known["runtime"], network, place, proof)
            return engine, Choice(known["runtime"], place, known["milliseconds"], comparison, True, left_out)
        except UserError:  # right for the weights that were measured, not for these: said below
            pass
    engines: dict[str, Engine] = {}
    comparisons: dict[str, Comparison] = {}
    for name in candidates:
        try:
            engines[name], comparisons[name] = _proved(name, network, place, proof)
        except UserError as error:
            left_out[name] = str(error)
            say(str(error))
    if not engines:
        faults = "; ".join(left_out[name] for name in candidates)
        raise UserError(f"no runtime here computes what the checkpoint does: {faults}")
    milliseconds = measure(engines, proof.batch)
    best = min(milliseconds, key=milliseconds.__getitem__)
    if remember:
        _store(key, {"runtime": best, "milliseconds": milliseconds})
    return engines[best], Choice(best, place, milliseconds, comparisons[best], False, left_out)


def _proved(
    runtime: str, network: EfficientNetNVForImageClassification, place: Place, proof: _Proof
) -> tuple[Engine, Comparison]:
    try:
        engine = make_engine(runtime, network, place)
        found = proof.compare(engine)
    except UserError:
        raise
    except Exception as error:  # each runtime has classes of its own
        raise UserError(f"--runtime {runtime} does not run this network: {printable(first_line(error))}") from error
    if fault := proof.fault(found):
        raise UserError(f"--runtime {runtime} does not compute what the checkpoint does: it {fault}.")
    return engine, found


def measure(engines: Mapping[str, Engine], batch: torch.Tensor) -> dict[str, float]:
    """Median milliseconds of a call by the clock. The engines take turns of some calls, of which the first does not
    count: threads of the one before still wait for work then, and keep processors busy."""
    taken: dict[str, list[float]] = {name: [] for name in engines}
    deadline = time.monotonic() + SECONDS
    with torch.no_grad():
        for _ in range(TURNS):
            for name, engine in engines.items():
                for call in range(1 + CALLS):
                    started = time.perf_counter()
                    engine(batch)
                    if batch.device.type == "cuda":
                        torch.cuda.synchronize(batch.device)
                    if call:
                        taken[name].append(1e3 * (time.perf_counter() - started))
                    if call and time.monotonic() > deadline:
                        break
            if time.monotonic() > deadline:
                break
    return {name: round(statistics.median(own), 3) for name, own in taken.items()}


def _cache_file() -> Path:
    return Path(constants.HF_HOME, "effnet_hf", "runtimes.json")


def _key(network: EfficientNetNVForImageClassification, place: Place, candidates: list[str]) -> str:
    """Of everything that may change which runtime is fastest, and of no name or label."""
    config = {name: value for name, value in network.config.to_dict().items() if name not in _NOT_SHAPE}
    device = torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else _processor()
    facts = [config, place.precision, place.size, place.batch_size, device, torch.get_num_threads(), candidates]
    facts.append(software_versions("onnxruntime", "openvino"))
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


_NOT_SHAPE = ("id2label", "label2id", "architectures", "auto_map", "transformers_version", "_name_or_path", "dtype")


def _processor() -> list[str]:
    from torch.backends import cpu

    name = ""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    except OSError:  # not Linux
        pass
    return [name, cpu.get_cpu_capability(), str(os.cpu_count())]


def _remembered() -> dict[str, dict]:
    """What was found earlier; nothing where the file is missing or damaged, which costs a few seconds."""
    try:
        found = json.loads(_cache_file().read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if _is_entry(value)}


def _is_entry(value) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("milliseconds"), dict):
        return False
    times = value["milliseconds"]
    known = all(name in RUNTIMES and isinstance(ms, float) and 0 <= ms < math.inf for name, ms in times.items())
    return known and value.get("runtime") in list(times)


def _store(key: str, entry: dict) -> None:
    file = _cache_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as stream:
            json.dump(_remembered() | {key: entry}, stream, indent=1)
    except (OSError, UserError):  # a home that nobody may write to; the next call measures again
        pass


# The pipeline prints an error for every class whose name is not in its table.
MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["efficientnet_nv_inference"] = EfficientNetNVForInference.__name__
