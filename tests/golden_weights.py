"""Weights and inputs of the golden figures, drawn by the recipe in `fixtures/nvidia_golden.json`, field `how`.

An oracle of its own: the names are mapped here once more, by hand, and not through the package's converters.
"""

import re
import zlib

import numpy as np
import torch


# ours -> the original's, in the spelling of its 2021-04-13 revision
_RENAMES = (
    (r"^efficientnet\.encoder\.stem\.", "stem."),
    (r"^efficientnet\.head\.", "features."),
    (r"^efficientnet\.encoder\.stages\.(\d+)\.blocks\.(\d+)\.", lambda m: f"layer{int(m[1]) + 1}.block{m[2]}."),
    (r"\.depthwise\.", ".depsep."),
    (r"\.project\.", ".proj."),
    (r"\.se\.reduce\.", ".se.squeeze."),
    (r"^classifier\.", "classifier.fc."),
)


def original_name(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def golden_state_dict(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    return {name: _draw(original_name(name), tensor, seed) for name, tensor in model.state_dict().items()}


def golden_input(k: int, batch: int, size: int, seed: int) -> torch.Tensor:
    pixels = np.random.RandomState(seed + k).standard_normal((batch, 3, size, size))
    return torch.from_numpy(pixels.astype(np.float32))


def _draw(key: str, like: torch.Tensor, seed: int) -> torch.Tensor:
    if key.endswith("num_batches_tracked"):
        return torch.zeros_like(like, device="cpu")  # the model whose names they are may be on `meta`
    # A 2-D squeeze-excite weight has the values and the fan-in of the original's 4-D one.
    z = np.random.RandomState(zlib.crc32(f"{seed}:{key}".encode())).standard_normal(tuple(like.shape))
    if key.endswith("running_var"):
        values = 1 + 0.1 * np.abs(z)
    elif key.endswith(("running_mean", "bias")):
        values = 0.1 * z
    elif ".bn." in key:
        values = 1 + 0.1 * z
    else:
        values = z * np.sqrt(2 / np.prod(like.shape[1:]))
    return torch.from_numpy(values.astype(np.float32))
