"""Draw the curves of one or several runs in one image.

effnet-hf plots runs/a runs/b --output_dir plots
"""

import os
from pathlib import Path

from ..cli import ArgumentParser, path, run
from ..errors import UserError


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description="Draw the curves of one or several runs.")
    parser.old_spellings = {"--output": "--output_dir"}
    parser.add_argument("runs", nargs="+", type=path, help="output folders of train")
    parser.add_argument("--output_dir", type=path, default="plots", help="folder for curves.png")
    parser.add_argument("--overwrite", action="store_true", help="replace a curves.png that was not drawn here")
    arguments = parser.parse_args(argv)
    from ..training.plots import draw, labels  # matplotlib takes a second

    target = Path(arguments.output_dir, "curves.png")
    if not arguments.overwrite and os.path.lexists(target) and not _is_ours(target):
        raise UserError(
            f"{target} may not have been drawn by this command; move it away, name another --output_dir, or replace it"
            " with --overwrite."
        )
    for drawn in draw(labels(arguments.runs), target.parent):
        print(drawn)


def _is_ours(target: Path) -> bool:
    from PIL import Image

    from ..training.plots import SOFTWARE

    if not target.is_file():  # a pipe would be waited for
        return False
    try:
        with Image.open(target) as image:
            return image.info.get("Software") == SOFTWARE
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # whatever it is
        return False


if __name__ == "__main__":
    run(main)
