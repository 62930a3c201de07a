"""Random batches that already lie on the device: what a run costs when loading costs nothing."""

from collections.abc import Iterator

import torch

from .mixup import BatchMixer
from .sampler import BatchRequest


IMAGENET_SIZES = (1_281_167, 50_000)


class SyntheticBatches:
    """One batch of N(0, 1) pixels and random labels, made once and handed out again and again.

    It stands in for a backend together with its device stage: `batches` yields device batches.
    """

    def __init__(
        self, image_size, num_classes, device, channels_last: bool, seed: int, mixer: BatchMixer | None = None
    ):
        self._image_size = image_size
        self._num_classes = num_classes
        self._device = torch.device(device)
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._seed = seed
        self._mixer = mixer
        self._made: tuple[torch.Tensor, torch.Tensor] | None = None

    def batches(self, requests: Iterator[BatchRequest]) -> Iterator[dict]:
        for request in requests:
            count = len(request.indices)
            if self._made is None or len(self._made[0]) < count:
                self._made = self._make(request)
            pixels, labels = self._made
            yield {
                "pixel_values": pixels[:count],
                "labels": labels[:count],
                "index": torch.from_numpy(request.indices),
            }

    def close(self):
        self._made = None

    def _make(self, request):
        generator = torch.Generator().manual_seed(self._seed)
        shape = (len(request.indices), 3, self._image_size, self._image_size)
        pixels = torch.randn(shape, generator=generator).to(self._device, memory_format=self._memory_format)
        labels = torch.randint(self._num_classes, shape[:1], generator=generator).to(self._device)
        return self._mixer(pixels, labels, request) if self._mixer else (pixels, labels)
