"""`effnet-hf scan DIR`: decodes every image of a folder before a run meets it."""

from contextlib import nullcontext

from .. import cli
from ..files import atomic_write


def main(argv: list[str] | None = None) -> int:
    """Prints what each split holds; 1 when a file is unreadable."""
    parser = cli.ArgumentParser(description="Check a folder of images before a run meets it.")
    parser.add_argument("folder", type=cli.path, help="a folder with train/ and val/, or with one folder per class")
    parser.add_argument("--num_workers", type=cli.at_least(0), help="processes; the free cores by default")
    parser.add_argument("--output", type=cli.path, help="write the unreadable files to this text file, one per line")
    arguments = parser.parse_args(argv)
    from ..data import scan_data_dir  # torch and datasets take seconds

    bad = []
    with atomic_write(arguments.output) if arguments.output else nullcontext() as output:
        for found in scan_data_dir(arguments.folder, arguments.num_workers):
            print(found.summary)
            bad += found.bad
        if output is not None:
            output.writelines(file.line() for file in bad)
    return 1 if bad else 0


if __name__ == "__main__":
    cli.run(main)
