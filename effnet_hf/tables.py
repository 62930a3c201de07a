"""Tables for a terminal and for Markdown, from a header and rows of cells that are text already."""

from collections.abc import Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns for a terminal: the first one to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    first, *others = widths
    return "\n".join(
        "  ".join([line[0].ljust(first), *(cell.rjust(width) for cell, width in zip(line[1:], others))])
        for line in (header, *rows)
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same in Markdown; a `|` within a cell is escaped."""
    lines = [header, *rows]
    if {len(line) for line in lines} != {len(header)}:
        raise ValueError(f"every row needs {len(header)} cells.")
    first, *others = ("|" + "".join(f" {cell} |" if cell else " |" for cell in map(_escaped, line)) for line in lines)
    return "\n".join([first, "|" + "---|" * len(header), *others])


def _escaped(cell: str) -> str:
    return cell.replace("|", r"\|")
