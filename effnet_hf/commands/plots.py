"""Draw the curves of one or several runs in one image.

effnet-hf plots runs/a runs/b --output_dir plots
"""

from pathlib import Path

from ..cli import ArgumentParser, run


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description="Draw the curves of one or several runs.")
    parser.old_spellings = {"--output": "--output_dir"}
    parser.add_argument("runs", nargs="+", help="output folders of train")
    parser.add_argument("--output_dir", default="plots", help="folder for curves.png")
    arguments = parser.parse_args(argv)
    from ..training.plots import draw, labels  # matplotlib takes a second

    for path in draw(labels(arguments.runs), Path(arguments.output_dir)):
        print(path)


if __name__ == "__main__":
    run(main)
