"""A file of predictions: one row per image, in the order in which the images were named.

While it is made it is a hidden folder beside the file, `.NAME.partial`: the question (`question.json`: model, images,
flags) and the answers so far, in Parquet files of some seconds each, named by the numbers of their rows, with the size
and time of each image. Whatever ends the command, the next one with the same question goes on behind the last of them,
or behind the last one before an image that has changed.
"""

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from tqdm import tqdm

from ..cli import say
from ..errors import UserError, printable
from ..files import atomic_write, lock_beside, recover, remove, writing
from ..lock import held
from ..multi_label import is_multi_label
from ..reading import read_json
from .answers import Answer, answers
from .classifier import Classifier


PREDICTION_FORMATS = (".csv", ".parquet", ".jsonl")
PART_SECONDS, PART_ROWS = 5.0, 8192  # what an interruption loses at most, and what is held in memory
LINE_SECONDS = 30.0  # between two lines about progress, where there is no terminal for a bar
SEPARATOR = ";"  # of several labels in a cell of CSV, as `--label_separator` is used to
_QUESTION, _STATE = "question.json", "state"  # a column of the parts, and of them only
_PARTS_OF_THE_QUESTION = {
    "version": "the version of this program",
    "model": "--model",
    "images": "the list of images",
    "top_k": "--top_k",
    "all_scores": "--all_scores",
    "precision": "--precision",
    "runtime": "--runtime",
    "test_time_flip": "--test_time_flip",
    "bit_depth": "--bit_depth",
    "max_pixels": "--max_pixels",
    "loader": "--loader",
}


@dataclass(frozen=True)
class Predicted:
    """What `write_predictions` did.

    Attributes:
        path: of the file.
        images: rows in it.
        unreadable: of them without an answer.
        example: the first of those, in a sentence.
        images_per_second: of this call.
    """

    path: str
    images: int
    unreadable: int
    example: str
    images_per_second: float


def write_predictions(
    classifier: Classifier,
    paths: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    top_k: int | None = None,
    all_scores: bool = False,
    batch_size: int | None = None,
    num_workers: int | None = None,
    loader: Literal["imagefolder", "dali-cpu", "dali-gpu"] = "imagefolder",
    overwrite: bool = False,
    tell: Callable[[str], None] = say,
) -> Predicted:
    """Writes the predictions for image files into a CSV, Parquet or JSON Lines file, whole or not at all; what an
    interrupted call has done, the same call goes on with.

    The columns are `path`, `label`, `score`, `label_2`, `score_2`, … and `error`, why a file could not be read (null
    where it could). Where an image may have several labels they are `path`, `labels`, `scores`, `error`: the labels
    that pass their thresholds, the likeliest first, as lists (in CSV with `;` between them).

    Args:
        paths: of the images; names that are not UTF-8 are written with escapes.
        output: its ending says which format.
        top_k: so many classes; 5 by default, or all that an image has.
        all_scores: also `score:NAME`, the probability of every class.
        batch_size, num_workers, loader: see [`effnet_hf.inference.answers.answers`].
        overwrite: replace the file, and begin anew.
        tell: gets sentences for the user.

    Raises:
        UserError: the file exists, cannot be written, or is written by somebody else now; what was begun answers
            another question; a class cannot be told from two in CSV; the network answers with NaN.
    """
    target = _target(output, overwrite)
    if target.suffix == ".csv" and is_multi_label(classifier.config):
        named = [name for name in classifier.config.id2label.values() if SEPARATOR in name]
        if named:
            raise UserError(
                f"{output}: the class {named[0]} holds a {SEPARATOR!r}, which stands between the labels in CSV; name a"
                " .parquet or .jsonl file."
            )
    names = [os.fspath(path) for path in paths]
    layout = _Layout(classifier, top_k, all_scores)
    question = _question(classifier, names, layout) | {"loader": loader}
    with contextlib.ExitStack() as stack:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(lock_beside(target), str(target)))
        begun = _Begun(target, question, overwrite, pa.array([_state(name) for name in names], pa.string()))
        recover(target.parent, lambda name: name in (target.name, begun.folder.name))
        if changed := begun.forget_changed(names):
            tell(f"{printable(changed)} has changed since it was answered: again from there on, or a little before")
        first = begun.rows()
        if first:
            tell(f"going on behind {first:,} of {len(names):,} images that were answered before")
        stream = answers(classifier, names, first, top_k, all_scores, batch_size, num_workers, loader)
        started = time.monotonic()
        try:
            with contextlib.closing(stream), _keeping(begun, layout, names) as add:
                for answer in _with_progress(stream, first, len(names), tell):
                    add(answer)
            seconds = time.monotonic() - started
            unreadable, example = _publish(begun, layout, target)
        except BaseException:
            if kept := begun.rows():
                how = " without --overwrite" if overwrite else ""
                how += f", once {printable(output)} is moved away," if overwrite and target.exists() else ""
                tell(f"{kept:,} of {len(names):,} images are answered; the same command{how} goes on from there")
            raise
        remove(begun.folder)
    return Predicted(str(output), len(names), unreadable, example, (len(names) - first) / max(seconds, 1e-9))


def _target(output: str | os.PathLike, overwrite: bool) -> Path:
    """Where to write to; refused before hours of work, and not after them."""
    target = Path(os.path.realpath(output))
    if target.suffix not in PREDICTION_FORMATS:
        raise UserError(f"--output {output}: end its name in {', '.join(PREDICTION_FORMATS)}.")
    if os.path.isdir(target):
        raise UserError(f"--output {output} is a folder; name a file in it.")
    if os.path.lexists(target) and not os.path.isfile(target):
        raise UserError(f"--output {output} is a device or a pipe; name a file to write to.")
    if os.path.lexists(target) and not overwrite:
        raise UserError(f"--output {output} already exists; name another file, or allow it with --overwrite.")
    return target


class _Layout:
    """The columns, and how answers become rows."""

    def __init__(self, classifier: Classifier, top_k: int | None, all_scores: bool):
        config = classifier.config
        self.several = is_multi_label(config)
        self.top_k, self.all_scores = top_k, all_scores
        self.names = [_text(config.id2label[i]) for i in range(config.num_labels)]
        self.places = min(top_k or 5, config.num_labels)
        columns = [pa.field("path", pa.string())]
        if self.several:
            columns += [pa.field("labels", pa.list_(pa.string())), pa.field("scores", pa.list_(pa.float32()))]
        for place in range(0 if self.several else self.places):
            ending = f"_{place + 1}" if place else ""
            columns += [pa.field(f"label{ending}", pa.string()), pa.field(f"score{ending}", pa.float32())]
        if all_scores:
            columns += [pa.field(f"score:{name}", pa.float32()) for name in self.names]
        self.schema = pa.schema([*columns, pa.field("error", pa.string())])

    def table(self, paths: list[str], rows: list[Answer]) -> pa.Table:
        columns: list = [[_text(path) for path in paths]]
        if self.several:
            read = [row.error is None for row in rows]
            columns.append([[self.names[i] for i in row.classes] if ok else None for row, ok in zip(rows, read)])
            columns.append([row.scores if ok else None for row, ok in zip(rows, read)])
        for place in range(0 if self.several else self.places):
            columns.append([self.names[row.classes[place]] if row.error is None else None for row in rows])
            columns.append([row.scores[place] if row.error is None else None for row in rows])
        if self.all_scores:
            bad = np.array([row.error is not None for row in rows])
            scores = np.zeros((len(rows), len(self.names)), np.float32)
            for i, row in enumerate(rows):
                if row.probabilities is not None:
                    scores[i] = row.probabilities
            columns += [pa.array(column, mask=bad) for column in scores.T]
        columns.append([None if row.error is None else printable(row.error) for row in rows])
        return pa.table([pa.array(c, f.type) for c, f in zip(columns, self.schema)], schema=self.schema)


def _text(text: str) -> str:
    """As UTF-8, which all three formats are; a name that is not becomes one with escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _question(classifier: Classifier, paths: list[str], layout: _Layout) -> dict:
    """What is asked: equal questions have equal answers, but for the rounding of other devices and batches."""
    model = hashlib.sha256()
    for settings in (classifier.config.to_dict(), classifier.processor.to_dict()):
        kept = {
            name: value for name, value in settings.items() if name not in ("transformers_version", "_name_or_path")
        }
        model.update(json.dumps(kept, sort_keys=True, default=str).encode())
    for name, tensor in sorted(classifier.network.state_dict().items()):
        model.update(name.encode() + tensor.cpu().numpy().tobytes())
    images, here = hashlib.sha256(f"{len(paths)}".encode()), os.getcwd()
    for path in paths:
        images.update(os.fsencode(os.path.join(here, path)) + b"\0" + os.fsencode(path) + b"\0")
    return {
        "version": 2,
        "model": model.hexdigest(),
        "images": images.hexdigest(),
        "top_k": layout.top_k,
        "all_scores": layout.all_scores,
        "precision": classifier.precision,
        # In float only the rounding differs.
        "runtime": classifier.choice.runtime if classifier.choice and classifier.config.quantization else "torch",
        "test_time_flip": classifier.test_time_flip,
        "bit_depth": classifier.reading.bit_depth,
        "max_pixels": classifier.reading.max_pixels,
    }


def _state(path: str) -> str:
    """Of an image: another one where the file is another. No `st_ctime`: it is new in every copy of the same files."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return ""
    return f"{found.st_size} {found.st_mtime_ns} {found.st_mode:o}"  # the mode, which may be why it has no answer


class _Begun:
    """The answers so far, in the hidden folder.

    Args:
        states: of all images, from before any is read.
    """

    def __init__(self, target: Path, question: dict, overwrite: bool, states: pa.StringArray):
        self.folder, self.states = target.with_name(f".{target.name}.partial"), states
        file = self.folder / _QUESTION
        if os.path.lexists(self.folder):
            recover(self.folder, lambda name: True)
            if not file.is_file() and (not self.folder.is_dir() or os.listdir(self.folder)):
                raise UserError(f"{self.folder} is none of ours, and stands where answers are kept; move it away.")
            before = read_json(file) if file.is_file() else {}
            differing = [words for name, words in _PARTS_OF_THE_QUESTION.items() if before.get(name) != question[name]]
            if before and differing and not overwrite:
                raise UserError(
                    f"{self.folder} holds {self.rows():,} answers of a command that was interrupted, and this one asks"
                    f" something else ({', '.join(differing)} differ); repeat that command, name another --output, or"
                    " begin anew with --overwrite."
                )
            if differing or overwrite:
                remove(self.folder)
        if not os.path.lexists(self.folder):
            os.mkdir(self.folder)
            with atomic_write(file) as stream:
                json.dump(question, stream)

    def parts(self) -> list[tuple[Path, int]]:
        """Those that follow each other from the first row on, each with the number of the row behind it."""
        whole: list[tuple[Path, int]] = []
        for path in sorted(self.folder.glob("*.parquet")):
            start = whole[-1][1] if whole else 0
            with contextlib.suppress(ValueError, OSError):  # a damaged one, or no number
                stop = start + pq.read_metadata(path).num_rows
                if path.stem == f"{start:010d}-{stop:010d}":
                    whole.append((path, stop))
        return whole

    def rows(self) -> int:
        parts = self.parts()
        return parts[-1][1] if parts else 0

    def forget_changed(self, names: list[str]) -> str | None:
        """Removes the parts from the first one on that has an image which is another now; returns that image."""
        good, changed, start = set[Path](), None, 0
        for path, stop in self.parts():
            then = pq.ParquetFile(path).read([_STATE])[_STATE]
            different = pc.index(pc.not_equal(then, self.states[start:stop]), True).as_py()
            if different >= 0:
                changed = names[start + different]
                break
            good.add(path)
            start = stop
        for path in set(self.folder.glob("*.parquet")) - good:  # also those behind a damaged one
            remove(path)
        return changed

    def add(self, start: int, table: pa.Table) -> None:
        table = table.append_column(_STATE, self.states[start : start + table.num_rows])
        name = f"{start:010d}-{start + table.num_rows:010d}.parquet"
        with atomic_write(self.folder / name, "wb") as file:
            pq.write_table(table, file)


@contextlib.contextmanager
def _keeping(begun: _Begun, layout: _Layout, paths: list[str]) -> Iterator[Callable[[Answer], None]]:
    """Yields what takes the answers, in order. They go to the disk every few seconds, and however it ends."""
    kept, rows, last = begun.rows(), list[Answer](), time.monotonic()

    def keep() -> None:
        nonlocal kept, rows, last
        if rows:
            table, rows = layout.table(paths[kept : kept + len(rows)], rows), []  # gone, where they cannot be written
            begun.add(kept, table)
            kept += table.num_rows
        last = time.monotonic()

    def add(answer: Answer) -> None:
        rows.append(answer)
        if len(rows) == PART_ROWS or time.monotonic() - last > PART_SECONDS:
            keep()

    try:
        yield add
        keep()
    except BaseException:
        with contextlib.suppress(UserError):  # a full disk, which is what ended it
            keep()
        raise


def _with_progress(stream: Iterator[Answer], first: int, total: int, tell: Callable[[str], None]) -> Iterator[Answer]:
    """A bar on a terminal, elsewhere a line now and then."""
    live, started = sys.stderr.isatty(), time.monotonic()
    last = started
    with tqdm(total=total, initial=first, unit=" images", disable=not live, leave=False, dynamic_ncols=True) as bar:
        for number, answer in enumerate(stream, first + 1):
            yield answer
            bar.update()
            now = time.monotonic()
            if not live and now - last >= LINE_SECONDS:
                last, speed = now, (number - first) / (now - started)
                left = (total - number) / speed
                left_words = f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
                tell(f"{number:,} of {total:,} images, {speed:.1f} images/s, {left_words} left")


def _publish(begun: _Begun, layout: _Layout, target: Path) -> tuple[int, str]:
    """Makes the file of the parts. Returns how many images were unreadable, and a sentence about the first."""
    unreadable, example = 0, ""
    with atomic_write(target, "wb") as file, _WRITERS[target.suffix](file, layout.schema) as write:
        for table in _groups(pq.ParquetFile(path).read().drop_columns(_STATE) for path, _ in begun.parts()):
            bad = table.filter(pc.is_valid(table["error"]))
            if bad.num_rows and not unreadable:
                example = f"{bad['path'][0].as_py()} {bad['error'][0].as_py()}"
            unreadable += bad.num_rows
            write(table)
    return unreadable, example


def _groups(parts: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Of `PART_ROWS` rows each, wherever the parts begin: an interruption changes no byte of the file."""
    waiting: list[pa.Table] = []
    for part in parts:
        waiting.append(part)
        while sum(each.num_rows for each in waiting) >= PART_ROWS:
            rows = pa.concat_tables(waiting)
            yield rows[:PART_ROWS].combine_chunks()
            waiting = [rows[PART_ROWS:]]
    if any(each.num_rows for each in waiting):
        yield pa.concat_tables(waiting).combine_chunks()


@contextlib.contextmanager
def _parquet(file, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    with pq.ParquetWriter(file, schema) as writer:
        yield writer.write_table


@contextlib.contextmanager
def _csv(file, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    lists = [i for i, field in enumerate(schema) if pa.types.is_list(field.type)]
    for i in lists:
        schema = schema.set(i, pa.field(schema.names[i], pa.string()))
    options = pyarrow.csv.WriteOptions(quoting_style="needed")

    def write(table: pa.Table) -> None:
        for i in lists:
            joined = pc.binary_join(table.column(i).cast(pa.list_(pa.string())), SEPARATOR)
            table = table.set_column(i, schema.field(i), joined)
        writer.write_table(table)

    with pyarrow.csv.CSVWriter(file, schema, write_options=options) as writer:
        yield write


@contextlib.contextmanager
def _json_lines(file, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    # By way of their digits: a float32 made a float64 has ten more, which mean nothing.
    digits, numbers = schema, schema
    for i, field in enumerate(schema):
        if field.type in (pa.float32(), pa.list_(pa.float32())):
            plain = field.type == pa.float32()
            digits = digits.set(i, field.with_type(pa.string() if plain else pa.list_(pa.string())))
            numbers = numbers.set(i, field.with_type(pa.float64() if plain else pa.list_(pa.float64())))

    def write(table: pa.Table) -> None:
        for row in table.cast(digits).cast(numbers).to_pylist():
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    yield write


_WRITERS = {".csv": _csv, ".parquet": _parquet, ".jsonl": _json_lines}
