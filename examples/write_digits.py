"""Writes scikit-learn's 1,797 handwritten digits as an imagefolder: train/<class>/*.png and val/<class>/*.png.

    python examples/write_digits.py demo/digits

Every fifth image of a class is held out. The images are real: "Optical Recognition of Handwritten Digits", UCI,
as scikit-learn ships them, 8 x 8 pixels with 17 grey levels.
"""

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from effnet_hf.cli import ArgumentParser, path, run
from effnet_hf.files import atomic_folder


NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def main() -> None:
    parser = ArgumentParser(description="Write scikit-learn's digits as an imagefolder.")
    parser.add_argument("output", type=path, help="folder to write")
    target = parser.parse_args().output
    digits = load_digits()
    seen, count = dict.fromkeys(range(10), 0), {"train": 0, "val": 0}
    with atomic_folder(target, overwrite=True) as folder:
        for index, (image, label) in enumerate(zip(digits.images, digits.target)):
            split = "val" if seen[label] % 5 == 0 else "train"
            seen[label] += 1
            count[split] += 1
            file = folder / split / NAMES[label] / f"{index:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 255 / 16).round().astype(np.uint8)).resize(
                (32, 32), Image.Resampling.BICUBIC
            ).save(file)
    print(f"{target}: {count['train']} training and {count['val']} held-out images of 10 classes")


if __name__ == "__main__":
    run(main)
