"""The folders of `readings.md`: each maker writes the digits of `probe.py` below a folder, in one of the ways that
people keep images in."""

import csv
import io
import json
import shutil
import tarfile
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, TiffImagePlugin

from .probe import WORDS, digits, held_out, trained


LETTERS = dict(zip(sorted(WORDS), "abcdefghij"))  # other names, in the order of the probe's classes
FOLDERS: dict[str, Callable[[Path], None]] = {}
Save = Callable[[Image.Image, Path], None]


def folder(name: str):
    """Registers a maker under the words of its row."""

    def register(make):
        FOLDERS[name] = make
        return make

    return register


def save(image: Image.Image, path: Path) -> None:
    image.save(path)


def write(
    root: Path,
    names: Iterable[str] = WORDS,
    train: str = "train",
    val: str = "val",
    ending: str = ".png",
    save: Save = save,
) -> None:
    """DIR/<train>/<class>/N and DIR/<val>/<class>/N; "" leaves a split out."""
    names = list(names)
    for split, numbers in ((train, trained()), (val, held_out())):
        for digit, own in numbers.items() if split else ():
            place = root / split / names[digit]
            place.mkdir(parents=True)
            for number in own:
                save(digits()[0][number], place / f"{number}{ending}")


def listed(root: Path, below: str = "") -> list[tuple[str, str, int]]:
    """All images in one folder; as (split, file name, digit)."""
    rows = []
    for split, numbers in (("train", trained()), ("val", held_out())):
        (root / below / split).mkdir(parents=True, exist_ok=True)
        for digit, own in numbers.items():
            for number in own:
                digits()[0][number].save(root / below / split / f"{number}.png")
                rows.append((split, f"{split}/{number}.png", digit))
    return rows


def table(split: str, **columns) -> pa.Table:
    """A parquet table of images and the columns that `columns` makes of a digit."""
    numbers = [
        (digit, number) for digit, own in (trained() if split == "train" else held_out()).items() for number in own
    ]
    images = [{"bytes": as_png(digits()[0][number]), "path": f"{number}.png"} for _, number in numbers]
    made = {name: [make(digit) for digit, _ in numbers] for name, make in columns.items()}
    return pa.table({"image": images, **made})


def as_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(root: Path, features: dict, validation: str = "validation", edit=None, **columns) -> None:
    """DIR/data/{train,validation}.parquet, whose `image` is an Image."""
    described = datasets.Features({"image": datasets.Image(), **features})
    (root / "data").mkdir(parents=True)
    for split, name in (("train", "train"), ("val", validation)):
        made = table(split, **columns)
        made = edit(split, made) if edit is not None else made
        made = made.cast(described.arrow_schema)
        pq.write_table(made, root / "data" / f"{name}-00000-of-00001.parquet")


def write_csv(path: Path, header: Iterable[str] | None, rows: Iterable[Iterable], **dialect) -> None:
    with open(path, "w", newline="", encoding=dialect.pop("encoding", "utf-8")) as file:
        writer = csv.writer(file, **dialect)
        if header is not None:
            writer.writerow(header)
        writer.writerows(rows)


# Labels: what the class folders are called.

folder("class folders `zero` … `nine`")(write)
folder("class folders `Zero` … `Nine`")(lambda root: write(root, map(str.title, WORDS)))
folder("class folders `0` … `9`")(lambda root: write(root, map(str, range(10))))
folder("class folders `00` … `09`")(lambda root: write(root, [f"0{digit}" for digit in range(10)]))
folder("class folders `a` … `j`")(lambda root: write(root, [LETTERS[word] for word in WORDS]))
folder("class folders `0` … `9` in the order of the checkpoint")(
    lambda root: write(root, [str(sorted(WORDS).index(word)) for word in WORDS])
)


@folder("`train/` of all ten, `val/` of `one`, `two`, `three`")
def _(root: Path) -> None:
    write(root)
    for word in set(WORDS) - {"one", "two", "three"}:
        shutil.rmtree(root / "val" / word)


@folder("class folders `one`, `two`, `three` only")
def _(root: Path) -> None:
    write(root)
    for word in set(WORDS) - {"one", "two", "three"}:
        for split in ("train", "val"):
            shutil.rmtree(root / split / word)


@folder("class folders in words and `eleven`")
def _(root: Path) -> None:
    write(root)
    for split in ("train", "val"):
        shutil.copytree(root / split / "one", root / split / "eleven")


@folder("`café` spelled in NFC in train, in NFD in val, beside `one`")
def _(root: Path) -> None:
    for split, form, numbers in (("train", "NFC", trained()), ("val", "NFD", held_out())):
        for name, digit in ((unicodedata.normalize(form, "café"), 2), ("one", 1)):
            place = root / split / name
            place.mkdir(parents=True)
            for number in numbers[digit]:
                digits()[0][number].save(place / f"{number}.png")


# Labels: columns and lists.

IN_ORDER = {"label": datasets.ClassLabel(names=list(WORDS))}


@folder("parquet, ClassLabel `label` in the order zero … nine")
def _(root: Path) -> None:
    write_parquet(root, IN_ORDER, label=lambda digit: digit)


@folder("parquet, ClassLabels `parity` and `label`")
def _(root: Path) -> None:
    parity = {"parity": datasets.ClassLabel(names=["even", "odd"])}
    write_parquet(root, parity | IN_ORDER, parity=lambda digit: digit % 2, label=lambda digit: digit)


@folder("parquet, ClassLabels `parity` and `digit`")
def _(root: Path) -> None:
    features = {"parity": datasets.ClassLabel(names=["even", "odd"]), "digit": IN_ORDER["label"]}
    write_parquet(root, features, parity=lambda digit: digit % 2, digit=lambda digit: digit)


def every_tenth(value):
    """Makes the label of every tenth row `value`."""

    def edit(split: str, made: pa.Table) -> pa.Table:
        labels = made.column("label").to_pylist()
        labels[::10] = [value] * len(labels[::10])
        return made.set_column(made.column_names.index("label"), "label", pa.array(labels))

    return edit


@folder("parquet, every tenth label null")
def _(root: Path) -> None:
    write_parquet(root, IN_ORDER, edit=every_tenth(None), label=lambda digit: digit)


@folder("parquet, every tenth label -1")
def _(root: Path) -> None:
    write_parquet(root, IN_ORDER, edit=every_tenth(-1), label=lambda digit: digit)


@folder("parquet, words, every tenth empty")
def _(root: Path) -> None:
    write_parquet(root, {"label": datasets.Value("string")}, edit=every_tenth(""), label=lambda digit: WORDS[digit])


@folder("parquet, floats with NaN in every tenth row")
def _(root: Path) -> None:
    write_parquet(root, {"label": datasets.Value("float64")}, edit=every_tenth(float("nan")), label=float)


@folder("parquet, all of `validation` -1")
def _(root: Path) -> None:
    def edit(split: str, made: pa.Table) -> pa.Table:
        if split == "train":
            return made
        return made.set_column(1, "label", pa.array([-1] * len(made)))

    write_parquet(root, IN_ORDER, edit=edit, label=lambda digit: digit)


@folder("parquet, every tenth image null")
def _(root: Path) -> None:
    def edit(split: str, made: pa.Table) -> pa.Table:
        images = made.column("image").to_pylist()
        images[::10] = [None] * len(images[::10])
        return made.set_column(0, "image", pa.array(images, made.schema.field("image").type))

    write_parquet(root, IN_ORDER, edit=edit, label=lambda digit: digit)


@folder("`save_to_disk`")
def _(root: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), **IN_ORDER})
    splits = {
        name: datasets.Dataset(table(split, label=lambda digit: digit).cast(features.arrow_schema))
        for split, name in (("train", "train"), ("val", "validation"))
    }
    datasets.DatasetDict(splits).save_to_disk(root / "data")


def write_shards(root: Path, ending: str, make: Callable[[int], bytes]) -> None:
    (root / "data").mkdir(parents=True)
    for split, name, numbers in (("train", "train", trained()), ("val", "validation", held_out())):
        with tarfile.open(root / "data" / f"{name}-000.tar", "w") as tar:
            for digit, own in numbers.items():
                for number in own:
                    for suffix, content in (("png", as_png(digits()[0][number])), (ending, make(digit))):
                        entry = tarfile.TarInfo(f"{split}{number}.{suffix}")
                        entry.size = len(content)
                        tar.addfile(entry, io.BytesIO(content))


@folder("WebDataset with `.cls`")
def _(root: Path) -> None:
    write_shards(root, "cls", lambda digit: str(digit).encode())


@folder("WebDataset with `.json`")
def _(root: Path) -> None:
    write_shards(root, "json", lambda digit: json.dumps({"label": WORDS[digit]}).encode())


@folder("`labels.csv` of path and word")
def _(root: Path) -> None:
    rows = listed(root)
    write_csv(root / "labels.csv", ["path", "label"], ((path, WORDS[digit]) for _, path, digit in rows))


@folder("`labels.csv` of path and number, without a header")
def _(root: Path) -> None:
    write_csv(root / "labels.csv", None, ((path, digit) for _, path, digit in listed(root)))


@folder("`labels.csv`, every tenth label empty")
def _(root: Path) -> None:
    rows = [(path, WORDS[digit]) for _, path, digit in listed(root)]
    rows[::10] = [(path, "") for path, _ in rows[::10]]
    write_csv(root / "labels.csv", ["path", "label"], rows)


@folder("`labels.csv` with a file that is not there")
def _(root: Path) -> None:
    rows = [(path, WORDS[digit]) for _, path, digit in listed(root)]
    write_csv(root / "labels.csv", ["path", "label"], [*rows, ("val/gone.png", "one")])


@folder("`labels.csv` with two labels for one image")
def _(root: Path) -> None:
    rows = [(path, WORDS[digit]) for _, path, digit in listed(root)]
    write_csv(root / "labels.csv", ["path", "label"], [*rows, (rows[-1][0], "one")])


@folder("`metadata.csv` in `train/` and `val/`")
def _(root: Path) -> None:
    rows = listed(root)
    for split in ("train", "val"):
        own = ((path.partition("/")[2], WORDS[digit]) for place, path, digit in rows if place == split)
        write_csv(root / split / "metadata.csv", ["file_name", "label"], own)


# Folders: which are splits, and what in them is an image.

folder("`train/` `val/`")(write)
folder("`train/` `valid/`")(lambda root: write(root, val="valid"))
folder("`Training/` `Validation/`")(lambda root: write(root, train="Training", val="Validation"))
folder("`Train/` `Dev/`")(lambda root: write(root, train="Train", val="Dev"))
folder("`TRAIN/` `VAL/`")(lambda root: write(root, train="TRAIN", val="VAL"))
folder("`Training/` `Testing/`")(lambda root: write(root, train="Training", val="Testing"))
folder("`train/` `test/`")(lambda root: write(root, val="test"))
folder("class folders alone")(lambda root: write(root, train="", val="."))


@folder("`train/` `valid/` `test/`")
def _(root: Path) -> None:
    write(root, val="valid")
    shuffled = [WORDS[(digit + 1) % 10] for digit in range(10)]  # whoever measures on it sees it
    write(root, names=shuffled, train="", val="test")


@folder("`train/` `val/` and a flat `test/` without labels")
def _(root: Path) -> None:
    write(root)
    (root / "test").mkdir()
    for number in range(5):
        digits()[0][number].save(root / "test" / f"{number}.png")


@folder("`train/` `val/` and `valid/`")
def _(root: Path) -> None:
    write(root)
    shutil.copytree(root / "val", root / "valid")


@folder("junk beside and in the class folders")
def _(root: Path) -> None:
    write(root)
    for split in ("train", "val"):
        for junk in ("@eaDir", ".ipynb_checkpoints", "__MACOSX"):
            shutil.copytree(root / split / "one", root / split / "two" / junk)
            shutil.copytree(root / split / "one", root / split / junk)
        (root / split / "two" / "._1.png").write_bytes(b"\0\5\26\7\0\2\0\0")
        (root / split / "two" / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
        (root / split / "two" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
        (root / split / "desktop.ini").write_text("[.ShellClassInfo]\n")


for _ending in (".jfif", ".jpe", ".JPG"):
    folder(f"`{_ending}`")(
        lambda root, ending=_ending: write(
            root, ending=ending, save=lambda image, path: image.save(path, "JPEG", quality=100)
        )
    )
for _ending in (".ppm", ".webp", ".gif", ".avif"):
    folder(f"`{_ending}`")(
        lambda root, ending=_ending: write(
            root, ending=ending, save=lambda image, path: image.save(path, lossless=True, quality=100)
        )
    )


# Pixels: what the values of a file mean.


def deep(values: Callable[[np.ndarray], np.ndarray], tags: dict | None = None, ending: str = ".tiff"):
    """A maker of files whose pixels are `values` of the bytes 0 … 255."""

    def save_deep(image: Image.Image, path: Path) -> None:
        info = TiffImagePlugin.ImageFileDirectory_v2()
        for tag, value in (tags or {}).items():
            info[tag] = value
        made = Image.fromarray(values(np.asarray(image)))
        made.save(path, **({"tiffinfo": info} if ending == ".tiff" else {}))

    return lambda root: write(root, ending=ending, save=save_deep)


def bits(count: int):
    return lambda grey: (grey.astype(np.uint32) * (2**count - 1) // 255).astype(np.uint16)


S_MIN, S_MAX = 340, 341  # SMinSampleValue, SMaxSampleValue
folder("PNG of 16 bits")(deep(bits(16), ending=".png"))
folder("PNG of 16 bits that holds 12")(deep(bits(12), ending=".png"))
folder("PNG of 16 bits that holds 8")(deep(bits(8), ending=".png"))
folder("TIFF of 16 bits")(deep(bits(16)))
folder("TIFF of 16 bits, SMaxSampleValue 4095")(deep(bits(12), {S_MIN: 0, S_MAX: 4095}))
folder("TIFF of floats 0 … 1")(deep(lambda grey: grey.astype(np.float32) / 255))
folder("TIFF of floats 0 … 1, SMin- and SMaxSampleValue")(
    deep(lambda grey: grey.astype(np.float32) / 255, {S_MIN: 0.0, S_MAX: 1.0})
)
folder("TIFF of floats 0 … 65535")(deep(lambda grey: grey.astype(np.float32) * 257))


def in_mode(mode: str) -> Save:
    def save_in_mode(image: Image.Image, path: Path) -> None:
        image.convert("RGB").convert(mode).save(path) if mode in ("CMYK", "YCbCr") else image.convert(mode).save(path)

    return save_in_mode


for _mode, _ending in {
    "L": ".png",
    "LA": ".png",
    "RGB": ".png",
    "RGBA": ".png",
    "P": ".png",
    "CMYK": ".tiff",
    "YCbCr": ".tiff",
}.items():
    folder(f"mode {_mode}")(lambda root, mode=_mode, ending=_ending: write(root, ending=ending, save=in_mode(mode)))
