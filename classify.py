"""Classify pictures with a checkpoint, through transformers' own pipeline.

python classify.py --model runs/b0 cat.jpg holiday/ 'shots/*.png'
find . -name '*.jpg' | python classify.py --model me/effnet-b4 --json -
"""

import glob
import json
import sys
from pathlib import Path

from effnet_hf.cli import ArgumentParser, at_least, run
from effnet_hf.errors import UserError


EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def main() -> int:
    parser = ArgumentParser(description="Classify pictures with a checkpoint.")
    parser.add_argument("pictures", nargs="+", help="files, folders, globs, or - for a list of files on stdin")
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id")
    parser.add_argument("--top_k", type=at_least(1), default=5, help="classes to print per picture")
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], default="fp32", help="arithmetic")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, …; a GPU if there is one")
    parser.add_argument("--batch_size", type=at_least(1), default=16, help="pictures at once")
    parser.add_argument("--json", action="store_true", help="print one JSON object per picture")
    parser.add_argument("--save_plot", metavar="PNG", help="draw the pictures with their bars")
    arguments = parser.parse_args()
    paths = find_pictures(arguments.pictures)

    from effnet_hf.inference import PLOT_FORMATS, Classifier, draw_predictions

    if arguments.save_plot and Path(arguments.save_plot).suffix not in PLOT_FORMATS:
        raise UserError(f"--save_plot {arguments.save_plot}: end its name in {', '.join(PLOT_FORMATS)}.")

    classifier = Classifier(arguments.model, device=arguments.device, precision=arguments.precision)
    results = []
    for result in classifier(paths, top_k=arguments.top_k, batch_size=arguments.batch_size):
        results.append(result)
        if result.error:
            print(f"classify.py: error: {result.path}: {result.error}", file=sys.stderr)
        elif arguments.json:
            print(json.dumps({"path": str(result.path), "predictions": result.predictions}))
        else:
            print(result.path)
            for prediction in result.predictions:
                print(f"  {100 * prediction['score']:5.1f} %  {prediction['label']}")
    if arguments.save_plot:
        draw_predictions(results, arguments.save_plot)
    return 2 if any(result.error for result in results) else 0


def find_pictures(words: list[str]) -> list[Path]:
    """The files that the command line names, in its order."""
    paths = []
    for word in words:
        if word == "-":
            paths += [Path(line.strip()) for line in sys.stdin if line.strip()]
        elif Path(word).is_dir():
            found = sorted(path for path in Path(word).rglob("*") if path.suffix.lower() in EXTENSIONS)
            if not found:
                raise UserError(f"{word} holds no pictures.")
            paths += found
        elif Path(word).exists():
            paths.append(Path(word))
        else:
            matches = sorted(map(Path, glob.glob(word, recursive=True)))
            if not matches:
                raise UserError(f"{word}: no such picture.")
            paths += matches
    if not paths:
        raise UserError("no picture was named.")
    return paths


if __name__ == "__main__":
    run(main)
