"""Fused kernels for a training step on a GPU: an experiment, which nothing uses but `benchmark.py fused`.

    fuse_for_gpu_training(model)

It stays only if a card shows what docs/speed.md asks of it.
"""

from .layers import fuse_for_gpu_training


__all__ = ["fuse_for_gpu_training"]
