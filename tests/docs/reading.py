"""What the documentation says to type, taken out of it: commands, Python, links."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
_STARTS = ("effnet-hf ", "python ", "accelerate launch", "torchrun ", "make ", "pip install", "python3 ")
_FOREIGN = ("git ", "docker ")  # their flags are theirs
_COMPARISON = re.compile(r"^\| (NVIDIA's scripts|the original's?.*?|original) \|.*?(?=\n\n|\Z)", re.S | re.M)
_SCRIPT = re.compile(r"(train|qat|export|validate|classify|convert|benchmark)\.py ")


class Found(NamedTuple):
    """A piece of a page; `where` names it in a test."""

    page: str
    line: int
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line} {' '.join(self.text.split())[:90]}"


def python_blocks() -> list[Found]:
    return [found for page in PAGES for found in _fences(page, "python")]


def commands() -> list[Found]:
    """Every command of every page: in ```bash blocks, in indented blocks, and between backticks."""
    found = []
    for page in PAGES:
        blocks = _fences(page, "bash") + _fences(page, "sh") + _indented(page)
        for block in blocks:
            found += _lines(block)
        for code in _inline(page):
            launches = re.search(r"\.py| -m ", code.text)
            names_a_launcher_only = code.text.startswith(("accelerate", "torchrun")) and not launches
            if (code.text.startswith(_STARTS) or _SCRIPT.match(code.text)) and not names_a_launcher_only:
                found.append(code)
    return found + _recipe_heads()


def _recipe_heads() -> list[Found]:
    """The command that each recipe opens with."""
    found = []
    for path in sorted(ROOT.glob("effnet_hf/recipes/*.yaml")):
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if line.startswith("#   ") and line[4:].startswith(_STARTS):
                command = re.split(r"\s{2,}", line[4:])[0]
                found.append(Found(str(path.relative_to(ROOT)), number, command))
    return found


def flags() -> list[Found]:
    """Every `--flag` that a page names in its prose or tables."""
    named = {}
    for page in PAGES:
        for code in _inline(page):
            if not code.text.startswith((*_STARTS, *_FOREIGN)):
                for flag in re.findall(r"(?<![\w-])--[a-z][a-z_0-9-]+", code.text):
                    named.setdefault((code.page, flag), Found(code.page, code.line, flag))
    return list(named.values())


def links() -> list[Found]:
    """Targets of Markdown links and pictures that are no web addresses."""
    found = []
    for page in PAGES:
        for line, text in enumerate(page.read_text("utf-8").splitlines(), 1):
            for target in re.findall(r"\]\(([^)\s]+)\)", text):
                if not re.match(r"[a-z]+:", target):
                    found.append(Found(str(page.relative_to(ROOT)), line, target))
    return found


def words(command: str) -> list[str]:
    """As a shell would split it, without a comment, `…`, and the brackets around what may be left out."""
    command = re.sub(r"\s+#\s.*$", "", command).replace("[", "").replace("]", "")
    return [word for word in shlex.split(command) if word not in ("…", "...")]


def alternatives(words: list[str]) -> list[list[str]]:
    """`--a x|y` stands for `--a x` and `--a y`."""
    most = max(len(word.split("|")) for word in words)
    return [[word.split("|")[i % len(word.split("|"))] for word in words] for i in range(most)]


def _fences(page: Path, language: str) -> list[Found]:
    text, name = page.read_text("utf-8"), str(page.relative_to(ROOT))
    pattern = re.compile(rf"^```{language}\n(.*?)^```$", re.S | re.M)
    return [Found(name, text[: match.start(1)].count("\n") + 1, match[1]) for match in pattern.finditer(text)]


def _indented(page: Path) -> list[Found]:
    found, fenced = [], False
    for line, text in enumerate(page.read_text("utf-8").splitlines(), 1):
        fenced ^= text.startswith("```")
        if not fenced and text.startswith("    "):
            command = re.split(r"\s{2,}", text.strip())[0]  # what stands to the right of it explains it
            found.append(Found(str(page.relative_to(ROOT)), line, command))
    return found


def _lines(block: Found) -> list[Found]:
    found, started, parts = [], block.line, []
    for number, line in enumerate(block.text.splitlines(), block.line):
        if not parts:
            started = number
        parts.append(line.rstrip().removesuffix("\\").strip())
        if not line.rstrip().endswith("\\"):
            text = " ".join(parts).strip()
            parts = []
            if text.startswith(_STARTS) or _SCRIPT.match(text):
                found.append(Found(block.page, started, text))
    return found


def _inline(page: Path) -> list[Found]:
    text, name = page.read_text("utf-8"), str(page.relative_to(ROOT))
    text = re.sub(r"^```.*?^```$", lambda match: "\n" * match[0].count("\n"), text, flags=re.S | re.M)
    text = _COMPARISON.sub(_without_first_cells, text)
    pattern = re.compile(r"`([^`]+)`")
    return [Found(name, text[: m.start()].count("\n") + 1, " ".join(m[1].split())) for m in pattern.finditer(text)]


def _without_first_cells(table: re.Match) -> str:
    """A table that compares the original's commands, in its first column, with ours."""
    return re.sub(r"^\|(?:[^|`]|`[^`]*`)*\|", "| |", table[0], flags=re.M)
