"""The last step, on the device: uint8 -> float, normalise, mix; one batch ahead on a side stream under CUDA."""

from collections.abc import Iterator
from functools import cached_property

import torch

from .mixup import BatchMixer


class DeviceStage:
    """Turns host batches into device batches.

    A host batch is `{"pixel_values": uint8 (N, H, W, 3), "labels": int64 (N,), "index": int64 (N,), "request"}`; a
    device batch has float32 (N, 3, H, W) pixels, labels int64 (N,) or float32 (N, classes) when mixed, and no request.

    Args:
        mean, std: per channel, in units of pictures scaled to [0, 1].
        mixer: mixup or cutmix, or None.
    """

    def __init__(self, device: torch.device, mean, std, channels_last: bool = True, mixer: BatchMixer | None = None):
        self.device = torch.device(device)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.mixer = mixer
        self._mean = torch.tensor(mean, dtype=torch.float32, device=self.device)
        self._std = torch.tensor(std, dtype=torch.float32, device=self.device)

    def __call__(self, batches: Iterator[dict]) -> Iterator[dict]:
        if self.device.type != "cuda":
            yield from map(self.stage, batches)
            return
        staged = self._stage_beside(batches)
        while staged is not None:
            following = self._stage_beside(batches)
            batch, ready = staged
            current = torch.cuda.current_stream(self.device)
            current.wait_event(ready)
            for tensor in batch.values():
                if tensor.is_cuda:
                    tensor.record_stream(current)
            yield batch
            staged = following

    def stage(self, batch: dict) -> dict:
        """One batch, on the current stream.

        The three operations are those of `EfficientNetNVImageProcessor`, in its order, so that their rounding agrees.
        """
        pixels = self._normalise(batch["pixel_values"].to(self.device, non_blocking=True))
        labels = batch["labels"].to(self.device, non_blocking=True)
        if self.mixer is not None:
            pixels, labels = self.mixer(pixels, labels, batch["request"])
        return {"pixel_values": pixels, "labels": labels, "index": batch["index"]}

    def _normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (N, H, W, 3) -> float32 (N, 3, H, W)."""
        count, height, width, channels = pixels.shape
        # Whole rows against a row of repeated statistics, a picture at a time where a cache is small: five times as
        # fast on a CPU as broadcasting three numbers over a batch.
        mean, std = self._mean.repeat(width), self._std.repeat(width)
        rows = torch.empty((count, height, width * channels), dtype=torch.float32, device=self.device)
        chunk = 1 if self.device.type == "cpu" else max(count, 1)
        for source, target in zip(pixels.view(rows.shape).split(chunk), rows.split(chunk)):
            target.copy_(source).mul_(1 / 255).sub_(mean).div_(std)
        pixels = rows.view(count, height, width, channels).permute(0, 3, 1, 2)
        return pixels.contiguous(memory_format=self.memory_format)

    @cached_property
    def _side(self) -> torch.cuda.Stream:
        """One stream for all epochs: the allocator keeps a pool of memory per stream and never moves it to another.

        Iterations that overlap, or that were left early, are in order on it, and each of their batches has an event of
        its own.
        """
        return torch.cuda.Stream(self.device)

    def _stage_beside(self, batches):
        with torch.cuda.stream(self._side):
            batch = next(batches, None)
            return None if batch is None else (self.stage(batch), self._side.record_event())
