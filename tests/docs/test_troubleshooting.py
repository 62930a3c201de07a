"""The messages that docs/troubleshooting.md quotes are ones that the code says."""

import re

import pytest

from .reading import ROOT


PAGE = ROOT / "docs/troubleshooting.md"
COMMANDS = ("effnet-hf ", "pip ", "docker ")
_QUOTED = re.compile(r"(?m)^    (\S.*)$")


def messages() -> list[str]:
    return [line for line in _QUOTED.findall(PAGE.read_text("utf-8")) if not line.startswith(COMMANDS)]


@pytest.fixture(scope="module")
def sentences() -> str:
    """The package's source with the pieces of every string joined, as Python joins them, and without {names}."""
    source = "\n".join(path.read_text("utf-8") for path in sorted((ROOT / "effnet_hf").rglob("*.py")))
    return re.sub(r"""["']\s*\n\s*f?["']|\{[^{}]*\}""", "", source)


@pytest.mark.parametrize("message", messages())
def test_message_is_in_the_code(message, sentences):
    parts = [part.strip(" .,:;") for part in re.split(r"…|\(…\)", message)]
    assert [part for part in parts if part not in sentences] == []


def test_the_page_quotes_messages():
    assert len(messages()) > 10
