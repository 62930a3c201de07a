"""`--dataset_name`: images of any `datasets` source, from the Hub or a local folder, downloaded first or streamed."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.webdataset import webdataset

from ..errors import UserError, first_line, printable
from .labels import ANY, MULTI, PREFERRED_LABELS, Columns, choose, preferred_first, read_labels
from .names import role_of
from .source import DataSource, Labeller, split_by_name
from .splits import Chosen, choose_splits
from .stream import StreamedSplit


def open_named(
    name: str,
    config: str | None = None,
    streaming: bool = False,
    val_fraction: float = 0.0,
    train: bool = True,
    class_names: list[str] | None = None,
    columns: Columns = ANY,
    val_split: str | None = None,
    flag: str = "--dataset_name",
) -> DataSource:
    """The images of `datasets.load_dataset(name, config)`, or of a folder that `save_to_disk` wrote.

    Args:
        columns: which ones are meant; by default those called `image` and `label`, or the only ones of their kind.
        flag: the option that names it, for sentences.
        train, val_fraction, val_split, class_names: as for `DataSource.from_folder`.

    Raises:
        UserError: it cannot be loaded, or lacks a split, images or labels.
    """
    where = f"{flag} {name}"
    splits, whole = _load(name, config, streaming, where)
    source = _Source(name, config, columns, where, Labeller(class_names, columns.classes_by_position))
    if whole and not train and not val_fraction:
        chosen = Chosen(None, next(iter(splits)), [])
    else:
        chosen = choose_splits(
            splits, where, train=train, val_fraction=val_fraction, val_split=val_split, may_hold_out=not streaming
        )
    source.labeller.notes += chosen.notes
    if chosen.train is None:
        assert chosen.val is not None
        return source.labeller.source(None, source.split(splits[chosen.val], chosen.val))
    training = source.split(splits[chosen.train], chosen.train)
    if train:
        source.labeller.require_variety(training, where)
    if chosen.val is not None:
        held_out = source.split(splits[chosen.val], chosen.val)
    else:
        training, held_out = split_by_name(training, val_fraction, by_class=source.labeller.label_sets is None)
    return source.labeller.source(training if train else None, held_out)


def _load(name: str, config: str | None, streaming: bool, where: str) -> tuple[dict, bool]:
    """The splits by name, and whether they are a single one that nobody called a split."""
    webdataset.WebDataset.DECODERS = _DECODERS  # a stream's too, which this process reads
    saved = is_saved(name)
    if saved and (streaming or config):
        option = "--streaming" if streaming else f"--dataset_config {config}"
        raise UserError(f"{where} is a folder that save_to_disk wrote, which has no use for {option}; leave it out.")
    try:
        splits = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, config, streaming=streaming)
    except Exception as error:  # load_dataset raises nearly every kind; the first line is the useful one
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        raise UserError(f"{where} cannot be loaded: {printable(first_line(reason))}") from error
    if isinstance(splits, datasets.Dataset):
        own = str(splits.split)
        return {own if role_of(own) else "train": splits}, True
    return splits, False


def is_saved(folder: str) -> bool:
    """Whether `save_to_disk` of `datasets` wrote a folder."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json"))


def _text(data: bytes) -> str:
    return data.decode("utf-8").strip()


# Of a WebDataset's members those that are text; `datasets` also has decoders that unpickle, or want other packages.
_DECODERS: dict[str, Callable] = {
    **dict.fromkeys(("txt", "text", "cls", "cls2", "index", "inx", "id"), _text),
    **dict.fromkeys(("json", "jsn"), json.loads),
}


@dataclass
class _Source:
    name: str
    config: str | None
    columns: Columns
    where: str
    labeller: Labeller

    def split(self, dataset, split: str):
        where = f"split {split} of {self.name}"
        features = dataset.features or {}
        flat = _flat(features)
        image = self._image_column(features, where)
        labels = self._label_columns(features, flat, image, where)
        if not isinstance(features[image], datasets.Image):
            dataset = dataset.cast_column(image, datasets.Image(decode=False))
        if isinstance(dataset, datasets.IterableDataset):
            return self._streamed(dataset, split, image, labels, flat)
        found = {name: (flat[name], _values(dataset, name)) for name in labels}
        return self.labeller.split(dataset, image, read_labels(found, self.columns, where), where)

    def _streamed(self, dataset, split: str, image: str, labels: list[str], flat: dict) -> StreamedSplit:
        feature, where = flat[labels[0]], f"split {split} of {self.name}"
        several = len(labels) > 1 or self.columns.label_separator or self.columns.problem_type == MULTI
        if several or isinstance(feature, (datasets.List, datasets.LargeList)):
            raise UserError("--streaming reads one label per image; leave it out for several.")
        if not isinstance(feature, datasets.ClassLabel) or "." in labels[0]:
            raise UserError(
                f"--streaming needs a ClassLabel column; {labels[0]!r} of {self.name} is {feature}. Leave --streaming"
                " out, or name the classes under `dataset_info` in the data set's README.md."
            )
        mapping = self.labeller.mapping(feature.names, where)
        streamed = StreamedSplit(
            dataset, image, labels[0], mapping, self._size(dataset, split), (self.name, self.config, split)
        )
        streamed.require_labels()
        return streamed

    def _image_column(self, features: dict, where: str) -> str:
        wanted = self.columns.image_column
        possible = [name for name, feature in features.items() if _holds_images(feature)]
        if wanted in features and getattr(features[wanted], "dtype", None) == "binary":
            possible.append(wanted)
        return self._choose("--image_column", wanted, possible, features, "images", where)

    def _label_columns(self, features: dict, flat: dict, image: str, where: str) -> list[str]:
        columns = [name for name in flat if name.split(".")[0] != image]
        if self.columns.label_column:
            choices = self.columns.label_column
            return [choose("--label_column", wanted, columns, columns, "labels", where) for wanted in choices]
        possible = [
            name
            for name in columns
            if name in PREFERRED_LABELS or isinstance(getattr(flat[name], "feature", flat[name]), datasets.ClassLabel)
        ]
        return [self._choose("--label_column", None, possible, features, "labels", where)]

    def _choose(self, flag: str, wanted: str | None, possible: list[str], features: dict, kind: str, where: str) -> str:
        possible = preferred_first(possible)
        chosen = choose(flag, wanted, possible, list(features), kind, where)
        if wanted is None and len(possible) > 1:
            others = ", ".join(printable(name) for name in possible if name != chosen)
            note = f"the {kind} are the column {chosen} of {self.name}; {flag} can name another: {others}."
            if note not in self.labeller.notes:
                self.labeller.notes.append(note)
        return chosen

    def _size(self, dataset, split: str) -> int:
        info = (dataset.info.splits or {}).get(split)
        if info is None or not info.num_examples:
            raise UserError(
                f"{self.name} does not say how many images its split {split} has, which the schedule needs; drop"
                " --streaming, or add `dataset_info` with `num_examples` to the data set's README.md."
            )
        return info.num_examples


def _holds_images(feature) -> bool:
    """Whether a column is one of images, or of what pandas makes of one."""
    return isinstance(feature, datasets.Image) or isinstance(feature, dict) and set(feature) == {"bytes", "path"}


def _flat(features: dict, prefix: str = "") -> dict:
    """The columns, and those within structures under names such as `json.label`."""
    flat: dict = {}
    for name, feature in features.items():
        if isinstance(feature, dict):
            flat |= _flat(feature, f"{prefix}{name}.")
        else:
            flat[prefix + name] = feature
    return flat


def _values(dataset: datasets.Dataset, name: str) -> pa.ChunkedArray:
    if name in dataset.column_names:
        return dataset.data.column(name)
    first, *rest = name.split(".")
    return pc.struct_field(dataset.data.column(first), rest)
