"""The model card: one dataclass of facts in, the README.md of a checkpoint folder out.

The text is in `model_card.md.jinja`, next to this file. A number enters a card only if somebody measured it: a fact
that is missing leaves its section out, nothing is filled in from a table.
"""

import importlib.metadata
import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image

from ..errors import printable
from ..tables import markdown_table


TEMPLATE = Path(__file__).with_name("model_card.md.jinja")

# key of CardFacts.metrics: (name in the card, type in the Hub's model-index)
_METRICS = {
    "top1": ("Top-1 accuracy (%)", "accuracy"),
    "top5": ("Top-5 accuracy (%)", "accuracy"),
    "map": ("Mean average precision (%)", "map"),
    "f1": ("F1, mean of the classes (%)", "f1"),
    "loss": ("Cross-entropy loss", "loss"),
}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class CardFacts:
    """What a model card says.

    Args:
        name: the title, e.g. `"EfficientNet B0, fine-tuned on Imagenette"`.
        variant: `"b0"`, `"widese-b4"`, …; becomes a tag.
        num_labels: classes.
        image_size: of the evaluated image, its side or (height, width), pixels.
        preprocessing: the evaluation preprocessing in words, see [`describe_preprocessing`].
        model_id: what `from_pretrained` is given in the examples; a placeholder without it.
        base_model: where the weights come from: a Hub id (then also metadata), or any words.
        license: a Hub licence id; `None` leaves it unstated.
        dataset: the data's name, as it should be read; `dataset_id`: its Hub id, for the metadata,
            which get none of a folder or an address.
        n_eval: number of images behind `metrics`.
        multi_label: whether an image may have several labels.
        bit_depth: of the values in images of more than 8 bits, where the image processor says so.
        metrics: measured values, `top1` and `top5`, or `map` and `f1`, in percent, `loss`; other keys are printed by
            their own name.
        recipe: every setting of the run.
        command: the command that made this folder.
        hardware: e.g. `"1 x NVIDIA H200, 16 CPU cores"`.
        versions: package name to version, see [`software_versions`].
        notes: one sentence each, first thing after the title: what a reader must know before using the weights.
        limits: one sentence each, for the last section.
        tables: (title, header, rows), e.g. of latencies or of INT8 against FP32.
        plots, onnx_files: names of files in the folder.
        library: the Hub's name of the library that opens the folder.
        usage: Markdown, instead of how a folder of PyTorch weights is used.
    """

    name: str
    variant: str
    num_labels: int
    image_size: int | tuple[int, int]
    preprocessing: str
    model_id: str | None = None
    base_model: str | None = None
    license: str | None = "apache-2.0"
    dataset: str | None = None
    dataset_id: str | None = None
    n_eval: int | None = None
    multi_label: bool = False
    bit_depth: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    command: str | None = None
    hardware: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    limits: Sequence[str] = ()
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[Any]]]] = ()
    plots: Sequence[str] = ()
    onnx_files: Sequence[str] = ()
    tags: Sequence[str] = ()
    library: str = "transformers"
    usage: str | None = None

    def __post_init__(self):
        if self.metrics and not self.dataset:
            raise ValueError(f"A card with metrics {dict(self.metrics)} must name the dataset they were measured on.")


def render_card(facts: CardFacts) -> str:
    """The model card as Markdown with its YAML head, as the Hub reads it."""
    metadata = _metadata(facts)  # YAML, which is safe by itself
    said = ("name", "variant", "preprocessing", "dataset", "base_model", "hardware", "notes", "limits", "tables")
    facts = replace(
        facts,
        **{name: _inert(getattr(facts, name)) for name in said},
        command=None if facts.command is None else printable(facts.command),
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        facts=facts,
        model=facts.model_id or "path/to/this/folder",
        metrics=[(_metric_name(key, facts), _number(value)) for key, value in facts.metrics.items()],
        metrics_table=_table,
        pixels="{} x {}".format(*((facts.image_size,) * 2 if isinstance(facts.image_size, int) else facts.image_size)),
        recipe=yaml.safe_dump(_plain(facts.recipe), sort_keys=False, allow_unicode=True, width=math.inf).strip(),
    )
    return str(card).rstrip() + "\n"


def describe_preprocessing(processor) -> str:
    """A processor's steps in one sentence, e.g. for `CardFacts.preprocessing`."""
    steps = []
    if processor.bit_depth is not None:
        steps.append(f"scale images of more than 8 bits, whose values have {processor.bit_depth}, to 8")
    if processor.do_resize:
        filter_ = Image.Resampling(processor.resample).name.lower()
        steps.append(f"resize the short side to {processor.size['shortest_edge']} pixels ({filter_})")
    if processor.do_center_crop:
        steps.append(f"centre crop {processor.crop_size['height']} x {processor.crop_size['width']}")
    if processor.do_rescale:
        steps.append("scale to [0, 1]" if math.isclose(processor.rescale_factor, 1 / 255) else "rescale by "
                     f"{processor.rescale_factor:.6g}")  # fmt: skip
    if processor.do_normalize:
        mean, std = (
            ", ".join(f"{value:.6g}" for value in values) for values in (processor.image_mean, processor.image_std)
        )
        steps.append(f"subtract the mean ({mean}), divide by the standard deviation ({std})")
    sentence = ", ".join(steps) or "none"
    return sentence[0].upper() + sentence[1:] + "."


def software_versions(*packages: str) -> dict[str, str]:
    """Installed versions of Python, of what every run uses, and of `packages`; what is not installed is left out."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "accelerate", *packages):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _metadata(facts: CardFacts) -> ModelCardData:
    # The Hub rejects a base_model or data set that is not a repository id, and a number that is not finite.
    dataset_id = _on_hub(facts.dataset_id)
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset_id or "imagefolder",
            dataset_name=str(facts.dataset),
            dataset_split="validation",
            metric_type=_METRICS.get(key, (key, key))[1],
            metric_name=_metric_name(key, facts),
            metric_value=round(float(value), 4),
        )
        for key, value in facts.metrics.items()
        if math.isfinite(value)
    ]
    return ModelCardData(
        license=facts.license,
        library_name=facts.library,
        pipeline_tag="image-classification",
        tags=list(dict.fromkeys(["image-classification", "efficientnet", facts.variant, *facts.tags])),
        datasets=[dataset_id] if dataset_id else None,
        metrics=["map" if facts.multi_label else "accuracy"] if results else None,
        base_model=_on_hub(facts.base_model),
        model_name=facts.name if results else None,
        eval_results=results or None,
    )


def _on_hub(name: str | None) -> str | None:
    """A repository's id; None of an address, words, or a folder of this machine, which may look like one."""
    return name if name and HUB_ID.fullmatch(name) and not os.path.exists(name) else None


def _metric_name(key: str, facts: CardFacts) -> str:
    if key == "loss" and facts.multi_label:
        return "Binary cross-entropy loss"
    return _METRICS.get(key, (key, key))[0]


def _inert(value: Any) -> Any:
    """Words of others (a folder's, a file's, a layer's name) as Markdown shows them: no link, no picture, no HTML, no
    new line."""
    if isinstance(value, str):
        return re.sub(r"[\\`\[\]<>]", r"\\\g<0>", printable(value))
    return [_inert(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    return markdown_table(header, [[_number(cell) for cell in row] for row in rows])


def _plain(value: Any) -> Any:
    """Tuples, paths, numpy numbers, … as what YAML can say, every text in one line: none ends the block of the card."""
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return json.loads(json.dumps(value)) if isinstance(value, (int, float, bool, NoneType)) else printable(value)
