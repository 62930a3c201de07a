"""Writes scikit-learn's 1,797 handwritten digits as an imagefolder: train/<class>/*.png and val/<class>/*.png.

    python examples/write_digits.py demo/digits

Every fifth image of a class is held out. The images are real: "Optical Recognition of Handwritten Digits", UCI,
as scikit-learn ships them, 8 x 8 pixels with 17 grey levels.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from effnet_hf.cli import ArgumentParser, run
from effnet_hf.files import atomic_folder


NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def main() -> None:
    parser = ArgumentParser(description="Write scikit-learn's digits as an imagefolder.")
    parser.add_argument("output", help="folder to write")
    target = Path(parser.parse_args().output)
    digits = load_digits()
    seen = dict.fromkeys(range(10), 0)
    with atomic_folder(target, overwrite=True) as folder:
        for index, (image, label) in enumerate(zip(digits.images, digits.target)):
            split = "val" if seen[label] % 5 == 0 else "train"
            seen[label] += 1
            path = folder / split / NAMES[label] / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 255 / 16).round().astype(np.uint8)).resize(
                (32, 32), Image.Resampling.BICUBIC
            ).save(path)
    count = {split: sum(1 for _ in (target / split).glob("*/*.png")) for split in ("train", "val")}
    print(f"{target}: {count['train']} training and {count['val']} held-out images of 10 classes")


if __name__ == "__main__":
    run(main)
