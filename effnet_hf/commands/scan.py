"""`effnet-hf scan DIR`: looks at every image of a data set before a run meets it, and says what the run would do.

effnet-hf scan DIR --val_fraction 0.1 --save_plot samples.png
effnet-hf scan DIR --labels DIR/labels.csv --json
effnet-hf scan --dataset_name user/name
"""

import json
import os
from contextlib import nullcontext
from pathlib import Path

from .. import cli
from ..errors import UserError, printable
from ..files import atomic_write
from ..recipes import add_data_flags, data_options


PLOT_FORMATS = (".png", ".pdf", ".svg", ".webp")


def main(argv: list[str] | None = None) -> int:
    """Prints what each split holds; 1 when an image is unreadable or a run would refuse the data."""
    parser = cli.ArgumentParser(description="Check a data set before a run meets it.")
    parser.add_argument(
        "folder", nargs="?", type=cli.path, help="a folder with train/ and val/, or with one folder per class"
    )
    parser.add_argument("--num_workers", type=cli.at_least(0), help="processes; the free cores by default")
    parser.add_argument("--output", type=cli.path, help="write the unreadable files to this text file, one per line")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--save_plot", type=cli.path, metavar="PNG", help="draw some images of every class")
    add_data_flags(parser, but=("data_dir", "streaming", "classes_by_position"))
    arguments = parser.parse_args(argv)
    if arguments.output and not _is_text(arguments.output):
        raise UserError(f"--output {printable(arguments.output)} is there and no text file; name another.")
    if arguments.save_plot and Path(arguments.save_plot).suffix not in PLOT_FORMATS:
        raise UserError(f"--save_plot {arguments.save_plot}: end its name in {', '.join(PLOT_FORMATS)}.")
    if arguments.folder is None and not arguments.labels and not arguments.dataset_name:
        raise UserError("nothing to scan: name a folder, --labels FILE.csv or --dataset_name user/name.")
    from ..data import Reading, scan_data  # torch and datasets take seconds
    from ..recipes import Recipe

    recipe = Recipe(data_dir=arguments.folder, **data_options(arguments))
    with atomic_write(arguments.output) if arguments.output else nullcontext() as output:
        found = scan_data(recipe, arguments.num_workers)
        print(json.dumps(found.as_dict()) if arguments.json else found.text())
        if output is not None:
            output.writelines(file.line() for file in found.bad)
    if arguments.save_plot:
        from ..data.samples import draw_samples

        draw_samples(found, arguments.save_plot, Reading.of(recipe))
    return 1 if found.bad or found.refused else 0


def _is_text(path: str) -> bool:
    """Whether a list may take a file's place: an earlier list, or none yet."""
    if not os.path.isfile(path):
        return True  # what is no file is refused where it is written
    with open(path, "rb") as file:
        start = file.read(4096)
    try:
        start.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start >= len(start) - 3  # a letter that was cut in two
    return b"\0" not in start


if __name__ == "__main__":
    cli.run(main)
