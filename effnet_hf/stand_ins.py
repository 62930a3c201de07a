"""What the harmless objects that trainers pickle beside weights become here: plain values, and never objects of the
classes that a file names. `reading.py` hands them to torch's own reader, by name."""

import re
from collections.abc import Callable
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np


class Settings(dict):
    """What an `argparse.Namespace` or a node of OmegaConf becomes: a dictionary. Nothing of the file becomes an
    attribute, where it could stand for a method."""

    __slots__ = ()

    def __setstate__(self, state: dict) -> None:
        self.update(state)


class Dictionary:
    """What Lightning's `AttributeDict` becomes: a dictionary, for torch's reader fills no other class's."""

    def __new__(cls) -> dict:  # type: ignore[misc]
        return {}


class NumberType:
    """What the `numpy.dtype` of a pickled number or array becomes, whatever it is of: `number` judges."""

    __slots__ = ("code", "order")

    def __init__(self, code: str, *_: Any):
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = {"<": "<", ">": ">"}.get(state[1], "=")


class Array:
    """What a numpy array becomes, a random generator's state for one: nothing of it is read."""

    __slots__ = ()

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: tuple) -> None:
        pass


def number(kind: NumberType, content: bytes) -> bool | int | float | complex | str | bytes | None:
    """What a pickled numpy number or text becomes: Python's. Dates, records and objects are passed over."""
    if not re.fullmatch(r"b1|f[248]|c8|c16|[iu][1248]|[SU]\d{1,5}", kind.code):
        return None
    if kind.code in ("S0", "U0"):
        return b"" if kind.code == "S0" else ""
    (value,) = np.frombuffer(content, np.dtype(kind.order + kind.code))
    return value.item()


def settings(*_: Any) -> Settings:
    return Settings()


def path(*parts: str) -> str:
    return str(PurePosixPath(*parts))


def windows_path(*parts: str) -> str:
    return str(PureWindowsPath(*parts))


def member(value: str | int) -> str | int:
    """What a member of an enumeration becomes: its value. Of anything else torch's reader would fill the original,
    unseen by `reading.py`."""
    if not isinstance(value, (str, int)):
        raise ValueError(f"a member of an enumeration is a {type(value).__name__}")
    return value


def dictionary(*_: Any) -> dict:
    return {}


def sequence(*_: Any) -> list:
    return []


def passed_over(*_: Any) -> None:
    """What nobody here asks for: dates, ranges, types."""


# Made by NEWOBJ, filled by BUILD.
_FILLED = (
    "argparse.Namespace",
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig")),
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata")),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Boolean", "Float", "Integer", "Path", "String")),
)
# Made by NEWOBJ, filled as dictionaries are.
_DICTIONARIES = tuple(
    f"{module}.AttributeDict"
    for module in (
        "lightning.fabric.utilities.data",
        "lightning_fabric.utilities.data",
        "lightning.pytorch.utilities.parsing",
        "pytorch_lightning.utilities.parsing",
    )
)
NEW = {**dict.fromkeys(_FILLED, Settings), **dict.fromkeys(_DICTIONARIES, Dictionary)}
# Called with their arguments. Python 3.13 has its paths in a module of their own.
CALLED: dict[str, Callable[..., Any]] = {
    "numpy.dtype": NumberType,
    "types.SimpleNamespace": settings,
    "torchvision.transforms.functional.InterpolationMode": member,
    "PIL.Image.Resampling": member,
    "collections.defaultdict": dictionary,
    "collections.deque": sequence,
    "builtins.frozenset": passed_over,
    **{f"numpy.{core}.multiarray.scalar": number for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": Array for core in ("core", "_core")},
    **{f"pathlib{home}.{kind}": path for home in ("", "._local") for kind in ("PosixPath", "PurePosixPath")},
    **{
        f"pathlib{home}.{kind}": windows_path for home in ("", "._local") for kind in ("WindowsPath", "PureWindowsPath")
    },
    **{f"datetime.{kind}": passed_over for kind in ("date", "datetime", "time", "timedelta", "timezone")},
    **{f"builtins.{kind}": passed_over for kind in ("bytes", "complex", "range", "slice")},
}
# Named, and not called: what a default dictionary makes, what OmegaConf says of its types.
_NAMED = (
    "numpy.ndarray",
    "typing.Any",
    *(f"numpy.{kind}{bits}" for kind in ("float", "int", "uint") for bits in (8, 16, 32, 64)),
    *(f"builtins.{kind}" for kind in ("bool", "dict", "float", "int", "list", "str")),
)
ALL: dict[str, Callable[..., Any]] = {**dict.fromkeys(_NAMED, passed_over), **NEW, **CALLED}
