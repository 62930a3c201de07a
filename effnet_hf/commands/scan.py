"""`effnet-hf scan DIR`: decodes every image of a folder before a run meets it."""

import os
from contextlib import nullcontext

from .. import cli
from ..errors import UserError, printable
from ..files import atomic_write


def main(argv: list[str] | None = None) -> int:
    """Prints what each split holds; 1 when a file is unreadable."""
    parser = cli.ArgumentParser(description="Check a folder of images before a run meets it.")
    parser.add_argument("folder", type=cli.path, help="a folder with train/ and val/, or with one folder per class")
    parser.add_argument("--num_workers", type=cli.at_least(0), help="processes; the free cores by default")
    parser.add_argument("--output", type=cli.path, help="write the unreadable files to this text file, one per line")
    arguments = parser.parse_args(argv)
    if arguments.output and not _is_text(arguments.output):
        raise UserError(f"--output {printable(arguments.output)} is there and no text file; name another.")
    from ..data import scan_data_dir  # torch and datasets take seconds

    bad = []
    with atomic_write(arguments.output) if arguments.output else nullcontext() as output:
        for found in scan_data_dir(arguments.folder, arguments.num_workers):
            print(found.summary)
            bad += found.bad
        if output is not None:
            output.writelines(file.line() for file in bad)
    return 1 if bad else 0


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
