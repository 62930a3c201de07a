"""Where in a state dict the network is: wrappers put names before its own, and losses, teachers and averages beside it.

Found by its dialect's names, with whatever before them: `net.`, `backbone.`, `model.module.`, `student.encoder.`, …
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..configuration import EfficientNetNVConfig
from ..errors import UserError, printable
from .dialect import HEAD, STEM, Dialect
from .source import is_average


_MOST_NAMED = 4


@dataclass(frozen=True)
class Network:
    """A network in a state dict.

    Attributes:
        dialect: whose names it has.
        prefix: what stands before them: `""`, or it ends with a dot.
        keys: its tensors: their name in the file, to that in the dialect.
        notes: what was done to the names, one sentence each.
    """

    dialect: Dialect
    prefix: str
    keys: dict[str, str]
    notes: tuple[str, ...] = ()


def find_network(
    tensors: Mapping[str, torch.Tensor],
    dialects: Iterable[Dialect],
    where: str = "the file",
    prefix: str | None = None,
    ema: bool = False,
) -> Network:
    """The network in a state dict, and what its tensors are called in its dialect; others beside it are passed over.

    Args:
        where: what to call the file in a sentence.
        prefix: look at the names that begin so, and at no others.
        ema: of a network and its average, take the average.

    Raises:
        UserError: there is none, several, or one whose names fit several dialects.
    """
    dialects, notes = tuple(dialects), list[str]()
    shown = ", ".join(printable(key) for key in list(tensors)[:3]) + (", …" if len(tensors) > 3 else "")
    chosen = tensors
    if prefix is not None:
        prefix = prefix.rstrip(".") + "."
        chosen = {key: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        if left := tensors.keys() - chosen.keys():
            notes.append(f"Left out what is not under {prefix}: {_few(left)}.")
    networks = _networks(chosen, dialects)
    if not networks:
        known = "; ".join(f"{dialect.name} {dialect.layers[STEM]}.weight" for dialect in dialects)
        under = f" under {printable(prefix)}" if prefix else ""
        raise UserError(
            f"No EfficientNet that we know{under}: no stem or head under a known name ({known}), but {shown}."
        )
    if len(networks) > 1:
        wanted = [network for network in networks if is_average(network.prefix) == ema]
        names = " and ".join(printable(network.prefix) or "no prefix" for network in networks)
        if len(wanted) != 1:
            raise UserError(
                f"{where} holds {len(networks)} networks, under {names}; choose one with --prefix, e.g. --prefix"
                f" {printable(max(network.prefix for network in networks))}"
            )
        others = [network for network in networks if network is not wanted[0]]
        hint = "" if ema else "; --ema takes the averaged one"
        notes.append(f"The file holds networks under {names}; this is that under {wanted[0].prefix or 'none'}{hint}.")
        roots = [_root(other.prefix, wanted[0].prefix) for other in others]
        chosen = {
            key: tensor for key, tensor in chosen.items()
            if key in wanted[0].keys or not any(root and key.startswith(root) for root in roots)
        }  # fmt: skip
        if "" in roots:  # the other has no prefix of its own
            chosen = {key: tensor for key, tensor in chosen.items() if key.startswith(wanted[0].prefix)}
        networks = wanted
    return _named(networks[0], chosen, notes)


def _networks(tensors: Mapping[str, torch.Tensor], dialects: tuple[Dialect, ...]) -> list[Network]:
    """Every network that shares no tensor with one that explains more names, the largest first."""
    places = set()
    for key in tensors:
        if key.endswith(".weight"):
            parts = key.split(".")
            for i in range(len(parts) - 1):
                rest = ".".join(parts[i:])
                places |= {
                    ("".join(f"{part}." for part in parts[:i]), dialect)
                    for dialect in dialects
                    if dialect.respell(rest) in (f"{dialect.layers[STEM]}.weight", f"{dialect.layers[HEAD]}.weight")
                }
    found = []
    for prefix, dialect in places:
        keys = {key: dialect.respell(key[len(prefix) :]) for key in tensors if key.startswith(prefix)}
        found.append(Network(dialect, prefix, {key: name for key, name in keys.items() if _is_ours(name, dialect)}))
    found.sort(key=lambda network: (-len(network.keys), len(network.prefix), network.prefix))
    networks: list[Network] = []
    for network in found:
        rival = next((other for other in networks if other.keys.keys() & network.keys.keys()), None)
        if rival is None and 2 * len(network.keys) >= len(found[0].keys):
            networks.append(network)
        elif rival and len(rival.keys) == len(network.keys) and rival.dialect is not network.dialect:
            names = ", ".join(sorted((rival.dialect.name, network.dialect.name)))
            raise UserError(f"The names fit several dialects ({names}): {_few(tensors)}. Choose one with --from.")
    return networks


def _named(network: Network, tensors: Mapping[str, torch.Tensor], notes: list[str]) -> Network:
    """With every other name that is left, and the classifier under the dialect's own name where it has another."""
    dialect, prefix, own = network.dialect, network.prefix, network.dialect.layers["classifier"]
    keys = {key: dialect.respell(key.removeprefix(prefix)) if key.startswith(prefix) else key for key in tensors}
    strange = [key for key in keys if key not in network.keys and not key.endswith("._amax")]
    head = next((tensors[key] for key, name in network.keys.items() if name == f"{dialect.layers[HEAD]}.weight"), None)
    if f"{own}.weight" not in keys.values() and head is not None and len(strange) == 2:
        called = strange[0].rsplit(".", 1)[0]
        weight, bias = (tensors.get(f"{called}.{name}") for name in ("weight", "bias"))
        if weight is not None and bias is not None and weight.shape == (len(bias), len(head)):
            keys |= {f"{called}.weight": f"{own}.weight", f"{called}.bias": f"{own}.bias"}
            notes.append(f"{called} was taken for the classifier: the one layer besides, a linear one of its features.")
    if prefix:
        notes.append(f"The names begin with {prefix}, which was taken off.")
    if len(set(keys.values())) < len(keys):
        twice = next(name for name in keys.values() if list(keys.values()).count(name) > 1)
        raise UserError(f"{printable(twice)} stands in it with and without {printable(prefix)}; choose with --prefix.")
    return replace(network, keys=keys, notes=tuple(notes))


def _is_ours(name: str, dialect: Dialect) -> bool:
    return name.rsplit(".", 1)[0] in _modules(dialect)


@lru_cache(maxsize=8)
def _modules(dialect: Dialect) -> frozenset[str]:
    """Names of a dialect's modules: those of the deepest variant have all others' among them, or nearly so."""
    names = (dialect.module_names(EfficientNetNVConfig.from_variant(name)).values() for name in ("b0", "b7"))
    return frozenset(name for each in names for name in each)


def _root(other: str, own: str) -> str:
    """The part of another network's prefix that nothing of ours begins with; nothing where there is none."""
    parts = other.split(".")[:-1]
    roots = ["".join(f"{part}." for part in parts[: i + 1]) for i in range(len(parts))]
    return next((root for root in roots if not own.startswith(root)), "")


def _few(keys: Iterable[str]) -> str:
    names = sorted(printable(key) for key in keys)
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
