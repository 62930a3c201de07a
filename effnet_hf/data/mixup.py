"""Mixup and cutmix on the device, after normalisation; labels become soft.

One lambda ~ Beta(alpha, alpha), not folded to >= 0.5, and one permutation per micro-batch and rank, as in NVIDIA's
recipe. Both are a function of (seed, epoch, slot): resumed and re-sharded runs mix the same pictures.
"""

import numpy as np
import torch

from .sampler import BatchRequest, mix


_STREAM = 0x6D69787570  # keeps these draws apart from those of the pictures


class BatchMixer:
    """Mixes a batch with a permutation of itself: `mixup`, `cutmix`, or one of both by a coin when both are on.

    Args:
        mixup, cutmix: alpha of the Beta distribution, 0 is off.
    """

    def __init__(self, num_classes: int, seed: int, mixup: float = 0.0, cutmix: float = 0.0):
        self.num_classes = num_classes
        self.seed = seed
        self.mixup = mixup
        self.cutmix = cutmix

    def __call__(self, pixels: torch.Tensor, labels: torch.Tensor, request: BatchRequest):
        """(N, 3, H, W) float and (N,) int64 -> the mixed pixels and (N, classes) float32 labels."""
        rng = np.random.Generator(np.random.PCG64(mix(self.seed, request.epoch, request.slot, _STREAM)))
        cut = self.cutmix > 0 and (self.mixup == 0 or rng.random() < 0.5)
        alpha = self.cutmix if cut else self.mixup
        lam = float(rng.beta(alpha, alpha))
        order = torch.from_numpy(rng.permutation(len(labels))).to(pixels.device, non_blocking=True)
        if cut:
            top, bottom, left, right = draw_box(rng, pixels.shape[-2], pixels.shape[-1], lam)
            lam = 1 - (bottom - top) * (right - left) / (pixels.shape[-2] * pixels.shape[-1])
            pixels = pixels.clone(memory_format=torch.preserve_format)
            pixels[:, :, top:bottom, left:right] = pixels[order, :, top:bottom, left:right]
        else:
            pixels = pixels * lam + pixels[order] * (1 - lam)
        one_hot = torch.nn.functional.one_hot(labels, self.num_classes).to(torch.float32)
        return pixels, one_hot * lam + one_hot[order] * (1 - lam)


def draw_box(rng: np.random.Generator, height: int, width: int, lam: float) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of a rectangle of area 1 - `lam` around a random centre, clipped to the picture.

    This is timm's `rand_bbox`, which can only draw from numpy's process-wide generator.
    """
    ratio = (1 - lam) ** 0.5
    cut_height, cut_width = int(height * ratio), int(width * ratio)
    y, x = int(rng.integers(0, height)), int(rng.integers(0, width))
    top, bottom = np.clip([y - cut_height // 2, y + (cut_height + 1) // 2], 0, height)
    left, right = np.clip([x - cut_width // 2, x + (cut_width + 1) // 2], 0, width)
    return int(top), int(bottom), int(left), int(right)
