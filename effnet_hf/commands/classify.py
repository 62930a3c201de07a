"""Classify images with a checkpoint: a few on the console, through transformers' own pipeline, or whole folders into a
file of predictions, through the loaders of training.

effnet-hf classify --model runs/b0 cat.jpg holiday/ 'shots/*.png'
effnet-hf classify --model runs/b0 photos/ --output predictions.csv     or .parquet, .jsonl; interrupted, it goes on
find . -name '*.jpg' | effnet-hf classify --model me/effnet-b4 --json -
"""

import argparse
import glob
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..cli import ArgumentParser, at_least, path, program_name, run, say
from ..errors import UserError, printable
from .runtime import add_runtime_flag


if TYPE_CHECKING:
    from ..inference import Classifier


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description="Classify images with a checkpoint.")
    parser.add_argument("images", nargs="+", type=path, help="files, folders, globs, or - for a list of files on stdin")
    parser.add_argument("--model", type=path, required=True, help="checkpoint folder or Hub id")
    parser.add_argument(
        "--top_k", type=at_least(1), help="classes to print per image; 5, or all that pass where it may have several"
    )
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], default="fp32", help="arithmetic")
    add_runtime_flag(parser)
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, …; a GPU if there is one")
    parser.add_argument(
        "--batch_size", type=at_least(1), help="images at once; 16, and 128 on a GPU where --output is given"
    )
    parser.add_argument(
        "--bit_depth",
        type=int,
        choices=range(1, 33),
        metavar="N",
        help="bits of the values in deep images that do not say what white is; the checkpoint's by default",
    )
    parser.add_argument(
        "--max_pixels", type=at_least(1), default=178_956_970, help="refuse images of more pixels, width times height"
    )
    parser.add_argument(
        "--test_time_flip",
        action="store_true",
        help="mean of the probabilities of each image and its mirror image; twice the work",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per image")
    parser.add_argument("--save_plot", type=path, metavar="PNG", help="draw the images with their bars")
    parser.add_argument(
        "--output", type=path, metavar="FILE", help="write a .csv, .parquet or .jsonl file of predictions instead"
    )
    parser.add_argument("--all_scores", action="store_true", help="--output: also the probability of every class")
    parser.add_argument(
        "--num_workers", type=at_least(0), help="--output: loader processes; from the machine by default"
    )
    parser.add_argument(
        "--loader", choices=["imagefolder", "dali-cpu", "dali-gpu"], help="--output: input pipeline; imagefolder"
    )
    parser.add_argument("--overwrite", action="store_true", help="--output: replace the file, and begin anew")
    arguments = parser.parse_args(argv)
    refuse_what_means_nothing(arguments)
    paths = find_images(arguments.images)
    for flag in ("save_plot", "output"):
        refuse_to_replace_an_image(flag, getattr(arguments, flag), paths)

    from ..inference import PLOT_FORMATS, Classifier, draw_predictions

    if arguments.save_plot and Path(arguments.save_plot).suffix not in PLOT_FORMATS:
        raise UserError(f"--save_plot {arguments.save_plot}: end its name in {', '.join(PLOT_FORMATS)}.")

    classifier = Classifier(
        arguments.model,
        device=arguments.device,
        precision=arguments.precision,
        bit_depth=arguments.bit_depth,
        max_pixels=arguments.max_pixels,
        test_time_flip=arguments.test_time_flip,
        runtime=arguments.runtime,
        batch_size=arguments.batch_size if arguments.output else min(len(paths), arguments.batch_size or 16),
    )
    for note in classifier.reading.notes:
        say(note)
    if classifier.choice is not None:
        say(f"runtime: {classifier.choice}")
    if arguments.output:
        return predict(classifier, paths, arguments)
    results = []
    for result in classifier(paths, top_k=arguments.top_k, batch_size=arguments.batch_size or 16):
        results.append(result)
        if result.error:
            print(f"{program_name()}: error: {printable(result.path)} {result.error}", file=sys.stderr)
        elif arguments.json:
            print(json.dumps({"path": str(result.path), "predictions": result.predictions}))
        else:
            print(printable(result.path))
            for prediction in result.predictions:
                if prediction.get("passed", True):
                    print(f"  {100 * prediction['score']:5.1f} %  {printable(prediction['label'])}{least(prediction)}")
            if not any(prediction.get("passed", True) for prediction in result.predictions):
                best = result.predictions[0]
                nearest = f"{printable(best['label'])}, {100 * best['score']:.1f} %{least(best)}"
                print(f"  no label: none passes its threshold; the most likely is {nearest}")
    if arguments.save_plot:
        draw_predictions(results, arguments.save_plot, reading=classifier.reading)
        print(f"plot: {printable(arguments.save_plot)}", file=sys.stderr)
    return 2 if any(result.error for result in results) else 0


def refuse_what_means_nothing(arguments: argparse.Namespace) -> None:
    """Raises `UserError` for flags that do nothing beside the others."""
    if arguments.output:
        for flag in ("json", "save_plot"):
            if getattr(arguments, flag):
                raise UserError(f"--{flag} is for the console, and --output writes a file; leave one of them out.")
        return
    for flag in ("all_scores", "num_workers", "loader", "overwrite"):
        value = getattr(arguments, flag)
        if value is not None and value is not False:  # 0 workers are some
            raise UserError(f"--{flag} needs --output, the file to write predictions to.")


def refuse_to_replace_an_image(flag: str, file: str | None, paths: list[Path]) -> None:
    """Raises `UserError` where the file to write is one of those to read."""
    if file is not None and os.path.exists(file) and any(p.exists() and p.samefile(file) for p in paths):
        raise UserError(f"--{flag} {printable(file)} is one of the images; name another file.")


def predict(classifier: "Classifier", paths: list[Path], arguments: argparse.Namespace) -> int:
    """The file of predictions, and a line about it. A file that cannot be read is a row of it, and no failure."""
    from ..inference import write_predictions

    done = write_predictions(
        classifier,
        paths,
        arguments.output,
        top_k=arguments.top_k,
        all_scores=arguments.all_scores,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        loader=arguments.loader or "imagefolder",
        overwrite=arguments.overwrite,
    )
    unread = ""
    if done.unreadable:
        unread = f", {done.unreadable:,} of them unreadable, see column error (the first: {printable(done.example)})"
    text = f"predictions: {printable(done.path)}, {done.images:,} images{unread}, {done.images_per_second:.1f} images/s"
    print(text, file=sys.stderr)
    if done.unreadable == done.images:
        raise UserError("none of the images can be read, so the file has no predictions, only the reasons.")
    return 0


def least(prediction: dict) -> str:
    """From which probability on an image has the label, where each has a threshold of its own."""
    return f" (from {100 * prediction['threshold']:.1f} %)" if "threshold" in prediction else ""


def find_images(words: list[str]) -> list[Path]:
    """The files that the command line names, in its order."""
    paths: list[str] = []
    for word in words:
        if word == "-":
            paths += _listed()
        elif os.path.isdir(word):
            paths += _in_folder(word)
        elif os.path.exists(word):
            paths.append(word)
        else:
            matches = _without_junk(set(_matches(word + "/*" if word.endswith("**") else word)))
            if word.endswith("**"):
                matches = [match for match in matches if not os.path.isdir(match)]
            if not matches:
                raise UserError(f"{word}: no such image.")
            paths += matches
    if not paths:
        raise UserError("no image was named.")
    return list(map(Path, paths))


def _matches(pattern: str) -> list[str]:
    """`**` enters a folder once, whatever links lead to it; `glob` follows those that lead back without an end."""
    head, stars, rest = re.sub(r"(\*\*/)+", "**/", pattern).partition("**/")
    if not stars or head and head[-1] != "/":
        return glob.glob(pattern)
    found = []
    for top in glob.glob(head) if head else [""]:
        seen = set()
        for folder, below, _ in os.walk(top or ".", followlinks=True):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                below.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            below[:] = sorted(name for name in below if name[0] != ".")
            place = folder if top else folder[2:]
            found += _matches(os.path.join(glob.escape(place), rest))
    return found


def _without_junk(matches: set[str]) -> list[str]:
    """Sorted, without `Thumbs.db`, `@eaDir` and the like; hidden files are the pattern's to name."""
    from ..data.names import is_junk

    return sorted(m for m in matches if not any(is_junk(part) and part[0] != "." for part in Path(m).parts))


def _in_folder(folder: str) -> list[str]:
    from ..data import list_images  # torch and datasets take seconds

    found, note = list_images(folder)
    if not found:
        raise UserError(f"{folder} holds no images. {note}".rstrip())
    if note:
        print(f"note: {printable(note)}", file=sys.stderr)
    return found


def _listed() -> list[str]:
    """The lines of stdin, in whatever encoding file names have."""
    if sys.stdin is None:  # closed
        return []
    raw = getattr(sys.stdin, "buffer", None)
    text = os.fsdecode(raw.read()) if raw is not None else sys.stdin.read()
    return [os.path.expanduser(line) for line in re.split("\r?\n", text) if line.strip()]


if __name__ == "__main__":
    run(main)
