"""`--dataset_name`: images of any `datasets` source, from the Hub or a local folder, downloaded first or streamed."""

import atexit
import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.webdataset import webdataset

from ..errors import UserError, first_line, printable
from .classes import known_by_name
from .labels import ANY, MULTI, PREFERRED_LABELS, Columns, choose, preferred_first, read_labels
from .names import role_of
from .remote import builder_of, copied, is_remote, of_each, require_plain, version
from .source import DataSource, Labeller, split_by_name
from .splits import Fold, Splits, choose_splits
from .stream import StreamedSplit


_KEPT = 7 * 86400  # seconds that the copy of a folder which has changed since is kept: a run may be reading it


def open_named(
    name: str,
    config: str | None = None,
    streaming: bool = False,
    val_fraction: float = 0.0,
    train: bool = True,
    class_names: list[str] | None = None,
    columns: Columns = ANY,
    val_split: str | None = None,
    fold: Fold | None = None,
    flag: str = "--dataset_name",
) -> DataSource:
    """The images of `datasets.load_dataset(name, config)`, or of a folder that `save_to_disk` wrote.

    Args:
        columns: which ones are meant; by default those called `image` and `label`, or the only ones of their kind.
        flag: the option that names it, for sentences.
        train, val_fraction, val_split, fold, class_names: as for `DataSource.from_folder`.

    Raises:
        UserError: it cannot be loaded, or lacks a split, images or labels.
    """
    require_plain(name, flag)
    where = f"{flag} {name}"
    notes: list[str] = []
    splits, files, whole = _load(name, config, streaming, where, notes)
    source = _Source(name, config, columns, where, Labeller(class_names, columns.classes_by_position), files)
    if whole and not train and not val_fraction and not fold:
        chosen = Splits(None, next(iter(splits)), [])
    else:
        chosen = choose_splits(
            splits, where, train=train, val_fraction=val_fraction, val_split=val_split, fold=fold,
            may_hold_out=not streaming,
        )  # fmt: skip
    source.labeller.notes += notes + chosen.notes
    if chosen.train is None:
        assert chosen.val is not None
        return source.labeller.source(None, source.split(splits[chosen.val], chosen.val))
    training = source.split(splits[chosen.train], chosen.train)
    if train:
        source.labeller.require_variety(training, where)
    if chosen.val is not None:
        held_out = source.split(splits[chosen.val], chosen.val)
    else:
        training, held_out = split_by_name(training, val_fraction, source.labeller.groups, fold)
    return source.labeller.source(training if train else None, held_out)


def _load(
    name: str, config: str | None, streaming: bool, where: str, notes: list[str]
) -> tuple[dict, Mapping[str, list[str]], bool]:
    """The splits and their files by name, and whether they are a single one that nobody called a split."""
    webdataset.WebDataset.DECODERS = _DECODERS  # a stream's too, which this process reads
    saved = is_saved(name)
    if saved and (streaming or config):
        option = "--streaming" if streaming else f"--dataset_config {config}"
        raise UserError(f"{where} is a folder that save_to_disk wrote, which has no use for {option}; leave it out.")
    try:
        splits, files = (datasets.load_from_disk(name), {}) if saved else _read(name, config, streaming, notes)
    except Exception as error:  # `datasets` raises nearly every kind; the first line is the useful one
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        raise UserError(f"{where} cannot be loaded: {printable(first_line(reason))}") from error
    if isinstance(splits, datasets.Dataset):
        own = str(splits.split)
        return {own if role_of(own) else "train": splits}, files, True
    return splits, files, False


def _read(name: str, config: str | None, streaming: bool, notes: list[str]) -> tuple[Any, Mapping[str, list[str]]]:
    """What `load_dataset` does, and the files.

    `datasets` keeps what it has read of a folder and knows it again by the paths and times of the files, of an address
    by their paths alone if there is no ETag. Files may have been overwritten under both, so our copies stand elsewhere,
    by all that the file system says of the files.
    """
    folder = is_remote(name) or os.path.isdir(name)
    place = name.rstrip("/") if is_remote(name) else os.path.abspath(name)
    key = hashlib.blake2b(place.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    home = os.path.join(datasets.config.HF_DATASETS_CACHE, "effnet_hf", key)
    builder = builder_of(name, config, cache_dir=home if folder else None)
    files = builder.config.data_files or {}
    if streaming:
        return builder.as_streaming_dataset(), files
    if not folder:
        builder.download_and_prepare()
        return builder.as_dataset(), files
    state, unknown = _state(builder.cache_dir, files)
    copy = os.path.join(home, state)
    if unknown:
        copy += f"-{secrets.token_hex(8)}"
        atexit.register(shutil.rmtree, copy, ignore_errors=True)
        notes.append(
            f"neither an ETag nor a time tells whether {_base(unknown)} of {printable(name)} has changed since it was"
            " copied: all files are copied anew at every start."
        )
    unpacked = datasets.DownloadConfig(cache_dir=os.path.join(copy, "downloads"), use_etag=False)
    builder.download_and_prepare(output_dir=os.path.join(copy, "rows"), download_config=unpacked)
    os.utime(copy)
    _remove_old(home)
    return builder.as_dataset(), files


def _state(key: str, files: Mapping[str, list[str]]) -> tuple[str, str | None]:
    """What changes with any of the files, as hexadecimal digits, and a file of which nobody can say.

    Args:
        key: what `datasets` knows them by, which has the content of README.md in it.
    """
    state = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16)
    unknown, named = None, [(str(split), path) for split, paths in files.items() for path in paths]
    for each, facts in zip(named, of_each(version, [path for _, path in named])):
        unknown = unknown if facts else each[1]
        state.update(repr((*each, facts)).encode("utf-8", "surrogateescape"))
    return state.hexdigest(), unknown


def _remove_old(home: str) -> None:
    with os.scandir(home) as copies:
        for copy in copies:
            with contextlib.suppress(OSError):  # another process removes it
                if copy.is_dir() and time.time() - copy.stat().st_mtime > _KEPT:
                    shutil.rmtree(copy.path, ignore_errors=True)


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
    files: Mapping[str, list[str]]
    rows: dict[str, int] = field(default_factory=dict)  # of the files that say it

    def split(self, dataset, split: str):
        where = f"split {split} of {self.name}"
        features = dataset.features or {}
        flat = _flat(features)
        image = self._image_column(features, where)
        labels = self._label_columns(features, flat, image, where)
        own = self._of_files(dataset, split, where)
        for name in labels:
            flat[name] = self._own_feature(flat[name], own, name, where)
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
        # A class that is not known may have no image: the stream is refused where it comes to one.
        used = known_by_name(feature.names, self.labeller.class_names)
        mapping = self.labeller.mapping(feature.names, where, used if len(used) else None)
        origin = self.name, self.config, split
        size = self._size(dataset, split)
        streamed = StreamedSplit(dataset, image, labels[0], mapping, feature.names, size, origin)
        streamed.require_labels()
        return streamed

    def _of_files(self, dataset, split: str, where: str) -> list[tuple[str, dict]]:
        """The files of a split whose schema may name classes, and their columns.

        Of a remote stream that needs no other question the first alone: each is a question or three.
        """
        files = [file for file in self.files.get(split) or [] if file.lower().endswith((".parquet", ".arrow"))]
        if len(files) > 1 and "://" in files[0] and isinstance(dataset, datasets.IterableDataset):
            if _told(dataset, split):
                self.labeller.notes.append(
                    f"of the {len(files):,} files of {where} only {_base(files[0])} was asked which number stands for"
                    f" which class; the other {len(files) - 1:,} are taken to agree. Without --streaming all are asked."
                )
                files = files[:1]
        described = list(of_each(_describe, files))
        self.rows |= {file: rows for file, (_, rows) in zip(files, described) if rows is not None}
        return [(file, columns) for file, (columns, _) in zip(files, described)]

    def _own_feature(self, feature, files: list[tuple[str, dict]], column: str, where: str):
        """The column as the split's own files describe it.

        `datasets` gives all files the names that README.md or the first file has, whatever the numbers in another one
        stand for by its own names.
        """
        first: tuple[str, list[str]] | None = None
        own = feature
        for file, columns in files:
            found = columns.get(column)
            names = _names_of(found)
            if names is None:
                continue
            if first is not None and names != first[1]:
                raise UserError(
                    f"{where}: its files {_base(first[0])} and {_base(file)} have different names, or the same in"
                    f" another order, in the column {printable(column)}; write both with one ClassLabel."
                )
            first, own = first or (file, names), found
        given = _names_of(feature)
        if first is None or first[1] == given:
            return feature
        if given is None or not set(given) & set(first[1]):
            raise UserError(
                f"{where}: its file {_base(first[0])} has the labels {_some(first[1])}, README.md or the first file of"
                f" all has {_some(given) if given else feature}; correct `dataset_info` there, or write all files with"
                " one ClassLabel."
            )
        self.labeller.notes.append(
            f"the labels of {where} are read by the names in its own files, {_some(first[1])}; README.md or the first"
            f" file of all has {_some(given)}."
        )
        return own

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
        if told := _told(dataset, split):
            return told
        files = self.files.get(split) or []
        counted = sum(self.rows.get(file, 0) for file in files)
        if not counted or not all(file in self.rows for file in files):
            raise UserError(
                f"{self.name} does not say how many images its split {split} has, which the schedule needs; drop"
                " --streaming, or add `dataset_info` with `num_examples` to the data set's README.md."
            )
        return counted


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


def _told(dataset, split: str) -> int | None:
    """How many images README.md says that a split has."""
    info = (dataset.info.splits or {}).get(split)
    return (info.num_examples or None) if info is not None else None


def _describe(file: str) -> tuple[dict, int | None]:
    """The columns of a Parquet or an Arrow file by its own schema, as those of `_flat`, none if nobody can say; and its
    rows where it is Parquet."""
    rows = None
    try:
        with fsspec.open(copied(file)) as opened:
            if file.lower().endswith(".parquet"):
                footer = pq.read_metadata(opened)
                schema, rows = footer.schema.to_arrow_schema(), footer.num_rows
            else:
                try:
                    schema = pa.ipc.open_stream(opened).schema
                except pa.ArrowInvalid:
                    schema = pa.ipc.open_file(opened).schema
        return _flat(datasets.Features.from_arrow_schema(schema)), rows
    except Exception as error:  # as `datasets`, which has opened it before
        if file.startswith("hf://"):  # of whose rows there may be a copy, without a network
            return {}, None
        raise UserError(f"{file} cannot be read: {printable(first_line(error))}") from error


def _names_of(feature) -> list[str] | None:
    return getattr(getattr(feature, "feature", feature), "names", None)


def _base(file: str) -> str:
    return printable(os.path.basename(file))


def _some(names: list[str]) -> str:
    return ", ".join(printable(name) for name in names[:3]) + (", …" if len(names) > 3 else "")


def _values(dataset: datasets.Dataset, name: str) -> pa.ChunkedArray:
    if name in dataset.column_names:
        return dataset.data.column(name)
    first, *rest = name.split(".")
    return pc.struct_field(dataset.data.column(first), rest)
