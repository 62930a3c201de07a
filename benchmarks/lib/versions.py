"""Which versions are declared in setup.cfg, and which the tests were run with, by the files of requirements/."""

import configparser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


ROOT = Path(__file__).resolve().parents[2]
# Extras of this project's own tools, and the one that exact versions of others leave no choice.
NOT_FOR_USERS = ("dev", "docs", "optimum")
# Converters that only `make interop` installs, as requirements/interop-*.txt say.
BESIDE = ("executorch", "coreml", "litert", "ncnn", "nncf")


def declared() -> list[tuple[str, Requirement]]:
    """Every requirement of setup.cfg, with the extra that it belongs to (`""`: always installed)."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    groups = {"": setup["options"]["install_requires"], **setup["options.extras_require"]}
    lines = ((extra, line) for extra, text in groups.items() for line in text.splitlines())
    return [(extra, Requirement(line)) for extra, line in lines if line and not line.startswith("#")]


def pinned(file: str) -> dict[str, str]:
    """`name==version` lines of a file of requirements/, by their normalised names."""
    path = ROOT / "requirements" / file
    lines = (line.split("#")[0].strip() for line in path.read_text("utf-8").splitlines())
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def versions() -> str:
    """The table of docs/install.md."""
    from effnet_hf.tables import markdown_table  # and with it torch

    floors, usual, newer, newest = map(pinned, ("floors.txt", "constraints.txt", "transformers5.txt", "newest.txt"))
    rows = []
    for extra, requirement in declared():
        if extra in (*NOT_FOR_USERS, *BESIDE):
            continue
        name = canonicalize_name(requirement.name)
        tested = ", ".join(dict.fromkeys(x[name] for x in (usual, newer) if name in x))
        group = f"`{extra}`" if extra else ""
        rows.append([requirement.name, group, str(requirement.specifier), floors[name], tested, newest[name]])
    return markdown_table(["package", "extra", "declared", "`make floors`", "`make test`", "`make newest`"], rows)
