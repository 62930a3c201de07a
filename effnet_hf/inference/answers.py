"""Many files through the loaders of training: read and decoded ahead by processes of their own, a batch at a time."""

import contextlib
from collections.abc import Generator, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch

from ..data import DeviceStage, read_file
from ..data.loaders import evaluation_backend
from ..data.sampler import BatchRequest
from ..multi_label import is_multi_label, probabilities, thresholds_of
from ..recipes import Recipe
from ..training import allow_tf32, keep_freed_memory
from ..tuning import fold_batchnorm
from .classifier import Classifier, default_batch_size


class Answer(NamedTuple):
    """To one file.

    Attributes:
        classes, scores: int64 and float32 (k,): the likeliest classes, best first; of several labels per image those
            that it has.
        probabilities: float32 (classes,), where they were asked for.
        error: why the file has no answer, as the end of a sentence about it; all else is empty then.
    """

    classes: np.ndarray
    scores: np.ndarray
    probabilities: np.ndarray | None = None
    error: str | None = None


class _Files:
    """What the loaders need of a split. Each file is named by its number: a loader says of which one it speaks."""

    def __init__(self, paths: Sequence[str]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        return read_file(self.paths[index])

    def name(self, index: int) -> str:
        return str(index)

    def label(self, index: int) -> int:
        return 0


def answers(
    classifier: Classifier,
    paths: Sequence[str],
    first: int = 0,
    top_k: int | None = None,
    all_scores: bool = False,
    batch_size: int | None = None,
    num_workers: int | None = None,
    loader: Literal["imagefolder", "dali-cpu", "dali-gpu"] = "imagefolder",
) -> Generator[Answer, None, None]:
    """The answers to the files from number `first` on, in their order.

    Args:
        top_k: at most so many classes; 5 by default, and all that an image has where it may have several.
        all_scores: with every class's probability.
        batch_size: images at once; [`default_batch_size`].
        num_workers: loader processes; from the machine by default.
        loader: who decodes; see the recipe's option.

    Raises:
        UserError: the network answers with NaN or infinity; a loader process died; see `evaluation_backend`.
    """
    device, batch_size = classifier.device, batch_size or default_batch_size(classifier.device)
    recipe = Recipe(
        model=classifier.model,
        loader=loader,
        num_workers=num_workers,
        per_device_batch_size=batch_size,
        bit_depth=classifier.reading.bit_depth,
        max_pixels=classifier.reading.max_pixels,
    )
    files = _Files(paths)
    begin = first - first % batch_size  # the same batches, and so the same rounding, wherever it begins
    backend = evaluation_backend(recipe, classifier.processor, device, files)  # type: ignore[arg-type]
    # As `validate` has it: CUDA's fp32 kernels prefer the channels first.
    channels_last = device.type != "cuda" or classifier.precision != "fp32"
    stage = DeviceStage(device, classifier.processor, channels_last)
    errors: dict[int, str] = {}
    if device.type == "cpu":
        keep_freed_memory()
    allow_tf32(False)  # fp32 is fp32, as on the console
    network = fold_batchnorm(classifier.network)
    if channels_last:
        network.to(memory_format=torch.channels_last)

    def requests() -> Iterator[BatchRequest]:
        for start in range(begin, len(files), batch_size):
            yield BatchRequest(0, start // batch_size, np.arange(start, min(start + batch_size, len(files))))

    def readable(batches: Iterator[dict]) -> Iterator[dict]:
        for batch in batches:
            errors.update((int(bad.name), bad.reason) for bad in batch["bad"])
            if len(batch["index"]):
                yield batch

    found: dict[int, Answer] = {}
    following = begin
    with contextlib.closing(backend):
        for batch in stage(readable(backend.batches(requests()))):
            with torch.inference_mode(), classifier.autocast:
                logits = network(pixel_values=batch["pixel_values"]).logits.float()
            found.update(zip(batch["index"].tolist(), _told(logits, classifier, top_k, all_scores)))
            # A loader may tell of bad files later than of those behind them.
            while following in found or following in errors:
                answer = found.pop(following) if following in found else _unreadable(errors.pop(following))
                following += 1
                if following > first:
                    yield answer
        for number in range(following, len(files)):
            if number >= first:
                yield found[number] if number in found else _unreadable(errors[number])


def _unreadable(reason: str) -> Answer:
    return Answer(np.empty(0, np.int64), np.empty(0, np.float32), error=reason)


def _told(logits: torch.Tensor, classifier: Classifier, top_k: int | None, all_scores: bool) -> Iterator[Answer]:
    """Of logits (N, classes); in the order of transformers' pipeline, in which of equals the first class is first."""
    config = classifier.config
    several = is_multi_label(config)
    scores = logits.sigmoid() if config.num_labels == 1 else probabilities(logits, config)
    sorted_scores, order = scores.sort(dim=-1, descending=True, stable=True)
    most = config.num_labels if several else top_k or 5
    # Copies: rows wait for the disk in thousands, and would hold all classes of their batches.
    ranked, classes = sorted_scores[:, :most].cpu().numpy().copy(), order[:, :most].cpu().numpy().copy()
    passed = ranked >= (thresholds_of(config)[classes] if several else 0)
    every = scores.cpu().numpy() if all_scores else None
    for i in range(len(ranked)):
        own = passed[i]
        yield Answer(classes[i, own][:top_k], ranked[i, own][:top_k], None if every is None else every[i])
