"""Draw the curves of one or several runs in one image.

effnet-hf plots runs/a runs/b --output_dir plots
"""

from pathlib import Path

from ..cli import ArgumentParser, path, run


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description="Draw the curves of one or several runs.")
    parser.old_spellings = {"--output": "--output_dir"}
    parser.add_argument("runs", nargs="+", type=path, help="output folders of train")
    parser.add_argument("--output_dir", type=path, default="plots", help="folder for curves.png")
    parser.add_argument("--overwrite", action="store_true", help="replace a curves.png that was not drawn here")
    arguments = parser.parse_args(argv)
    from ..training.plots import draw, labels, refuse_to_replace_a_drawing  # matplotlib takes a second

    target = Path(arguments.output_dir, "curves.png")
    if not arguments.overwrite:
        refuse_to_replace_a_drawing(target)
    for drawn in draw(labels(arguments.runs), target.parent):
        print(drawn)


if __name__ == "__main__":
    run(main)
