"""How long a run looks at its data before the first step: listing, sizes, images that are trained and validated on.

    python benchmarks/start_up.py --classes 1000 --train 1281 --val 50

The files are links to a few thousand others of as many sizes, in a temporary folder that the system has in memory.
"""

import os
import platform
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np

from effnet_hf.cli import ArgumentParser, at_least, path, run
from effnet_hf.data import DataSource


CONTENTS = 5_000  # ext4 allows 65,000 links to a file
SIZES = 20_000, 200_000  # bytes, of ImageNet's most JPEGs


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=at_least(2), default=1000, help="folders")
    parser.add_argument("--train", type=at_least(1), default=1281, help="training images per class")
    parser.add_argument("--val", type=at_least(1), default=50, help="validation images per class")
    parser.add_argument("--scratch", type=path, help="where to make the files")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as root:
        count = write_tree(Path(root), arguments.classes, {"train": arguments.train, "val": arguments.val})
        versions = f"Python {platform.python_version()}, datasets {datasets.__version__}"
        print(f"{count:,} files, {os.cpu_count()} cores, {versions}")
        timed("names of all files alone", lambda: [os.listdir(folder) for folder in Path(root, "data").glob("*/*")])
        source = timed("folders listed", lambda: DataSource.from_folder(str(Path(root, "data"))))
        listing = timed("sizes asked for", source.listing)
        print(*timed("equal images looked for", lambda: source.notes_on_copies(listing)), sep="\n")


def write_tree(root: Path, classes: int, images: dict[str, int]) -> int:
    """Makes `data/<split>/<class>/<image>` and returns how many there are."""
    sizes = np.random.default_rng(0).permutation(np.linspace(*SIZES, CONTENTS).astype(int))
    for number, size in enumerate(sizes):
        with open(root / f"{number}.jpg", "wb") as file:
            file.truncate(size)
    count = 0
    for split, each in images.items():
        for label in range(classes):
            folder = root / "data" / split / f"n{label:08}"
            folder.mkdir(parents=True)
            for image in range(each):
                os.link(root / f"{count % CONTENTS}.jpg", folder / f"{folder.name}_{image}.JPEG")
                count += 1
    return count


def timed(name: str, function):
    started, computed = time.perf_counter(), time.process_time()
    found = function()
    seconds = time.perf_counter() - started
    print(f"{name}: {seconds:.1f} s, of them {time.process_time() - computed:.1f} s of computing", flush=True)
    return found


if __name__ == "__main__":
    run(main)
