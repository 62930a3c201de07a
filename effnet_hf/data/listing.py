"""What a run trains and validates on, so that a resumed run notices when it is something else.

One row per image: its split, its name, its label, its size in bytes. The names are relative to the data folder, which
may be moved. A file that was overwritten in place changes the time of no folder, so every size is asked for anew.
"""

import contextlib
import json
import os
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import UserError, first_line, printable


SCHEMA = pa.schema([("split", pa.string()), ("name", pa.string()), ("label", pa.int64()), ("size", pa.int64())])
UNKNOWN = -1
_THREADS = 16  # a network's answers take longer than their questions
_CHUNK = 4096
_MOST_ROWS = 100_000_000  # images; the largest public lists of labelled ones have 14 million
_CLASSES, _SETS = b"class_names", b"label_sets"


@dataclass(frozen=True)
class DataListing:
    """Attributes:
    class_names: in label order.
    table: of `SCHEMA`; -1 is a label or a size that is not known. No name stands twice in a split.
    label_sets: uint8 (sets, classes) where an image has several labels; a label of the table is then one of its rows.
    """

    class_names: list[str]
    table: pa.Table
    label_sets: np.ndarray | None = None

    def write(self, path: str | os.PathLike | IO[bytes]) -> None:
        """As Parquet."""
        facts = {_CLASSES: json.dumps(self.class_names).encode()}
        if self.label_sets is not None:
            facts[_SETS] = json.dumps([np.flatnonzero(row).tolist() for row in self.label_sets]).encode()
        table = self.table.replace_schema_metadata(facts)
        names = {"name": "DELTA_BYTE_ARRAY"}  # neighbours have most of their name in common
        pq.write_table(table, path, compression="zstd", use_dictionary=["split"], column_encoding=names)

    @classmethod
    def read(cls, path: str | os.PathLike) -> "DataListing":
        """What `write` wrote.

        Raises:
            UserError: it is something else, or damaged.
        """
        try:
            with open(path, "rb") as file, pq.ParquetFile(file) as parquet:
                if parquet.metadata.num_rows > _MOST_ROWS:  # which compress to nothing, and are read at once
                    raise ValueError(f"it has {parquet.metadata.num_rows:,} rows")
                table = parquet.read()
            table.validate(full=True)
            facts = table.schema.metadata or {}
            class_names = json.loads(facts[_CLASSES])
            labels = table.column("label")
            if table.schema.remove_metadata() != SCHEMA or any(column.null_count for column in table.columns):
                raise ValueError("its columns are others")
            if not isinstance(class_names, list) or not all(isinstance(name, str) for name in class_names):
                raise ValueError("its class names are no words")
            if len(set(class_names)) < len(class_names):
                raise ValueError("a class name stands twice")
            label_sets = _read_sets(facts[_SETS], len(class_names)) if _SETS in facts else None
            known = len(class_names if label_sets is None else label_sets)
            if len(table) and not -1 <= pc.min(labels).as_py() <= pc.max(labels).as_py() < known:
                raise ValueError("it has a label without a class")
        except KeyError:
            raise UserError(f"{path} is no list of a run's data.") from None
        except (pa.ArrowException, OSError, ValueError, RecursionError, MemoryError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
            raise UserError(f"{path}, a list of a run's data, cannot be read: {printable(reason)}") from None
        return cls(class_names, table.replace_schema_metadata(None), label_sets)

    def class_difference(self, now: "DataListing") -> str | None:
        """What has become of the classes, as part of a sentence; None if nothing has."""
        before, after = self.class_names, now.class_names
        if before == after:
            if (self.label_sets is None) == (now.label_sets is None):
                return None
            ways = ("one label", "several")[:: 1 if self.label_sets is None else -1]
            return "an image had {}, has {} now".format(*ways)
        known, found = set(before), set(after)
        gone, new = [name for name in before if name not in found], [name for name in after if name not in known]
        if not gone and not new:
            first = next(i for i, pair in enumerate(zip(before, after)) if pair[0] != pair[1])
            return f"the classes have another order: number {first} was {before[first]}, is {after[first]} now"
        if gone:
            images = self._sizes_of(gone[0])
            renamed = next((name for name in new if np.array_equal(images, now._sizes_of(name))), None)
            if renamed is not None:
                return f"class {gone[0]} is called {renamed} now{_and_more(max(len(gone), len(new)))}"
            return f"class {gone[0]} is gone{_and_more(len(gone) + len(new))}"
        return f"class {new[0]} is new{_and_more(len(new))}"

    def difference(self, now: "DataListing") -> str | None:
        """The first image that is another one, as part of a sentence, and how many more are; None if none is."""
        places, *tables = self._with_one_numbering(now)
        tables = [_in_one_spelling(table) for table in tables]
        if tables[0].equals(tables[1]):
            return None
        keys = ["split", "name"]
        before, after = (table.append_column("row", pa.array(np.arange(len(table)))) for table in tables)
        both = before.join(after, keys, join_type="full outer", right_suffix="_now")
        gone, new = pc.is_null(both["size_now"]), pc.is_null(both["size"])
        other = pc.or_(pc.not_equal(both["size"], both["size_now"]), pc.not_equal(both["label"], both["label_now"]))
        changed = both.filter(pc.or_(pc.or_(gone, new), pc.fill_null(other, False)))
        if not len(changed):
            return None if len(before) < 2 else "the images have another order"
        place = pc.coalesce(changed["row"], changed["row_now"])
        row = changed.slice(int(np.argmin(place.to_numpy())), 1).to_pylist()[0]
        said = f"{_what_happened(row, changed, places)}{_and_more(len(changed))}"
        return unicodedata.normalize("NFC", said)  # pyarrow 17 gives all names in NFD

    def _with_one_numbering(self, now: "DataListing") -> tuple[list[str], pa.Table, pa.Table]:
        """What to say of an image that had each label, and both tables: a label is the same number in both."""
        if self.label_sets is None or now.label_sets is None:
            return [f"was in class {name}" for name in self.class_names], self.table, now.table
        sets, numbers = np.unique(np.concatenate([self.label_sets, now.label_sets]), axis=0, return_inverse=True)
        numbers, tables = numbers.reshape(-1), []
        for listing, own in ((self, numbers[: len(self.label_sets)]), (now, numbers[len(self.label_sets) :])):
            labels = np.append(own, UNKNOWN)[listing.table["label"].to_numpy()]
            tables.append(listing.table.set_column(2, "label", pa.array(labels, pa.int64())))
        words = ([self.class_names[i] for i in np.flatnonzero(row)] for row in sets)
        return [f"was {', '.join(names)}" if names else "had no label" for names in words], *tables

    def _sizes_of(self, class_name: str) -> np.ndarray:
        number = self.class_names.index(class_name)
        if self.label_sets is None:
            own = pc.equal(self.table["label"], number)
        else:
            own = pa.array(self.label_sets[self.table["label"].to_numpy(), number] != 0)
        return np.sort(self.table.filter(own)["size"].to_numpy())


def _read_sets(text: bytes, classes: int) -> np.ndarray:
    listed = json.loads(text)
    if not isinstance(listed, list) or not all(
        isinstance(row, list) and all(type(number) is int and 0 <= number < classes for number in row) for row in listed
    ):
        raise ValueError("its sets of labels are none")
    sets = np.zeros((len(listed), classes), np.uint8)
    for numbers, row in zip(listed, sets):
        row[numbers] = 1
    return sets


def _and_more(count: int) -> str:
    return f" (and {count - 1:,} more)" if count > 1 else ""


def _in_one_spelling(table: pa.Table) -> pa.Table:
    """With names in NFC: a copy from or to macOS may spell them otherwise."""
    names = table["name"]
    if pc.all(pc.string_is_ascii(names), min_count=0).as_py():
        return table
    return table.set_column(SCHEMA.get_field_index("name"), "name", pc.utf8_normalize(names, form="NFC"))


def _what_happened(row: dict, changed: pa.Table, places: list[str]) -> str:
    name = row["name"]
    if row["size"] is None:
        moved = _twin(changed, row["split"], name, row["size_now"], "size")
        return f"{name} is new" if moved is None else f"{name} {_place(places, moved['label'])}"
    if row["size_now"] is None:
        moved = _twin(changed, row["split"], name, row["size"], "size_now")
        if moved is None:
            return f"{name} is gone"
        return f"{moved['name']} {_place(places, row['label'])}"
    if row["size"] != row["size_now"]:
        return f"{name} has {_bytes(row['size_now'])}, had {_bytes(row['size'])}"
    return f"{name} {_place(places, row['label'])}"


def _twin(changed: pa.Table, split: str, name: str, size: int, column: str) -> dict | None:
    """The other half of a file that was moved to another class: of its name and size, and not on both sides."""
    absent = "size_now" if column == "size" else "size"
    same = pc.and_(pc.equal(changed[column], size), pc.is_null(changed[absent]))
    found = changed.filter(pc.and_(pc.fill_null(same, False), pc.equal(changed["split"], split)))
    base = os.path.basename(name)
    return next((row for row in found.to_pylist() if os.path.basename(row["name"]) == base and "/" in name), None)


def _place(places: list[str], label: int) -> str:
    return places[label] if 0 <= label < len(places) else f"was in class number {label}"


def _bytes(size: int) -> str:
    return "an unknown number of bytes" if size == UNKNOWN else f"{size:,} bytes"


def rows(split: str, names: pa.ChunkedArray | pa.Array | list[str], labels: np.ndarray, sizes: np.ndarray) -> pa.Table:
    """A part of a `DataListing.table`."""
    columns = pa.array([split] * len(labels), pa.string()), names, pa.array(labels), pa.array(sizes)
    return pa.table(list(columns), names=SCHEMA.names).cast(SCHEMA)


def sizes_of_files(paths: list[str]) -> np.ndarray:
    """In bytes, int64; -1 for what is not there."""
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(_sizes, chunks))
    return np.concatenate([np.empty(0, np.int64), *found])


def _sizes(paths: list[str]) -> np.ndarray:
    sizes = np.full(len(paths), UNKNOWN, np.int64)
    for i, path in enumerate(paths):
        with contextlib.suppress(OSError, ValueError):
            sizes[i] = os.stat(path).st_size
    return sizes


def rows_of_files(split: str, root: str, prefix: str, paths: pa.ChunkedArray, labels: np.ndarray) -> pa.Table:
    """Of a folder's files: `prefix` and what stands after `root` in the paths are their names."""
    below = pc.utf8_slice_codeunits(paths, len(os.path.join(root, "")))
    return rows(split, pc.binary_join_element_wise(prefix, below, ""), labels, sizes_of_files(paths.to_pylist()))


def rows_of_dataset(split: str, images: pa.ChunkedArray, labels: np.ndarray, numbers: np.ndarray | None) -> pa.Table:
    """Of a column of undecoded images. What is embedded is not read: Arrow knows where each row begins and ends.

    Args:
        numbers: the rows that are meant, all by default.
    """
    sizes = pc.binary_length(pc.struct_field(images, "bytes")).cast(pa.int64())
    sizes, paths = pc.fill_null(sizes, UNKNOWN).to_numpy(), pc.struct_field(images, "path")
    numbers = np.arange(len(images)) if numbers is None else numbers
    sizes, paths = sizes[numbers], paths.take(pa.array(numbers))
    files = np.flatnonzero((sizes == UNKNOWN) & paths.is_valid().to_numpy())
    sizes[files] = sizes_of_files(paths.take(pa.array(files)).to_pylist())
    base = pc.replace_substring_regex(pc.fill_null(paths, ""), r"(?s)^.*[/\\\\]", "")
    names = pc.binary_join_element_wise("row", pc.cast(pa.array(numbers), pa.string()), base, " ")
    return rows(split, pc.utf8_rtrim_whitespace(names), labels, sizes)
