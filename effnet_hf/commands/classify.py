"""Classify images with a checkpoint, through transformers' own pipeline.

effnet-hf classify --model runs/b0 cat.jpg holiday/ 'shots/*.png'
find . -name '*.jpg' | effnet-hf classify --model me/effnet-b4 --json -
"""

import glob
import json
import sys
from pathlib import Path

from ..cli import ArgumentParser, at_least, program_name, run
from ..errors import UserError


EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description="Classify images with a checkpoint.")
    parser.add_argument("images", nargs="+", help="files, folders, globs, or - for a list of files on stdin")
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id")
    parser.add_argument("--top_k", type=at_least(1), default=5, help="classes to print per image")
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], default="fp32", help="arithmetic")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, …; a GPU if there is one")
    parser.add_argument("--batch_size", type=at_least(1), default=16, help="images at once")
    parser.add_argument("--json", action="store_true", help="print one JSON object per image")
    parser.add_argument("--save_plot", metavar="PNG", help="draw the images with their bars")
    arguments = parser.parse_args(argv)
    paths = find_images(arguments.images)

    from ..inference import PLOT_FORMATS, Classifier, draw_predictions

    if arguments.save_plot and Path(arguments.save_plot).suffix not in PLOT_FORMATS:
        raise UserError(f"--save_plot {arguments.save_plot}: end its name in {', '.join(PLOT_FORMATS)}.")

    classifier = Classifier(arguments.model, device=arguments.device, precision=arguments.precision)
    results = []
    for result in classifier(paths, top_k=arguments.top_k, batch_size=arguments.batch_size):
        results.append(result)
        if result.error:
            print(f"{program_name()}: error: {result.path}: {result.error}", file=sys.stderr)
        elif arguments.json:
            print(json.dumps({"path": str(result.path), "predictions": result.predictions}))
        else:
            print(result.path)
            for prediction in result.predictions:
                print(f"  {100 * prediction['score']:5.1f} %  {prediction['label']}")
    if arguments.save_plot:
        draw_predictions(results, arguments.save_plot)
        print(f"plot: {arguments.save_plot}", file=sys.stderr)
    return 2 if any(result.error for result in results) else 0


def find_images(words: list[str]) -> list[Path]:
    """The files that the command line names, in its order."""
    paths = []
    for word in words:
        if word == "-":
            paths += [Path(line.strip()) for line in sys.stdin if line.strip()]
        elif Path(word).is_dir():
            found = sorted(path for path in Path(word).rglob("*") if path.suffix.lower() in EXTENSIONS)
            if not found:
                raise UserError(f"{word} holds no images.")
            paths += found
        elif Path(word).exists():
            paths.append(Path(word))
        else:
            matches = sorted(map(Path, glob.glob(word, recursive=True)))
            if not matches:
                raise UserError(f"{word}: no such image.")
            paths += matches
    if not paths:
        raise UserError("no image was named.")
    return paths


if __name__ == "__main__":
    run(main)
