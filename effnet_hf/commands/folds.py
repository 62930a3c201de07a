"""Sum the runs of a k-fold cross-validation: mean and deviation over the folds, and figures of all images at once.

effnet-hf folds 'runs/f*' --output_dir folds
"""

import glob

from ..cli import ArgumentParser, path, run
from ..files import require_place


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description="Sum the runs of a k-fold cross-validation.")
    parser.add_argument(
        "runs", nargs="+", type=path, help="output folders, or globs, of train with --folds K --fold 1 to K"
    )
    parser.add_argument(
        "--output_dir",
        type=path,
        default="folds",
        help="folder for folds.json, folds.csv, classes.csv, predictions.csv",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what this command wrote there before")
    arguments = parser.parse_args(argv)
    require_place(arguments.output_dir, arguments.overwrite)
    runs = [folder for word in arguments.runs for folder in sorted(glob.glob(word)) or [word]]
    from ..analysis import sum_folds  # torch takes seconds

    found = sum_folds(runs)
    written = found.write(arguments.output_dir, arguments.overwrite)
    print(found.text())
    for each in written:
        print(each)


if __name__ == "__main__":
    run(main)
