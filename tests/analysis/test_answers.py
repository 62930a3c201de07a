"""Recording a validation: on one process, and on several that have different numbers of images."""

import pytest
import torch
from accelerate import Accelerator, PartialState

from effnet_hf.analysis import Recorder
from effnet_hf.analysis import answers as module


class Batches:
    """Five images in two batches, the last first."""

    num_samples = 5

    def epoch(self, epoch):
        for index in ([3, 4], [0, 1, 2]):
            pixels = torch.tensor(index, dtype=torch.float32)[:, None] + torch.zeros(1, 3)
            yield {"pixel_values": pixels, "labels": torch.tensor(index) % 3, "index": torch.tensor(index)}


class Doubling(torch.nn.Module):
    def forward(self, pixel_values):
        return type("Output", (), {"logits": 2 * pixel_values})


def test_validation_gives_its_answers():
    from effnet_hf.training.loop import validate

    recorder, accelerator = Recorder(), Accelerator(cpu=True)
    figures = validate(Doubling(), Batches(), accelerator, recorder=recorder)
    found = recorder.answers(accelerator, ["a", "b", "c"], temperature=2.0)
    assert figures["n"] == len(found) == 5
    assert found.index.tolist() == [0, 1, 2, 3, 4] and found.labels.tolist() == [0, 1, 2, 0, 1]
    assert found.logits.tolist() == [[2.0 * i] * 3 for i in range(5)]
    assert (found.temperature, found.several, found.logits.dtype.name) == (2.0, False, "float32")


def test_several_labels_are_kept_in_a_byte():
    recorder = Recorder()
    recorder.add(torch.zeros(2, 3), torch.tensor([[1.0, 0, 1], [0, 0, 0]]), torch.tensor([1, 0]))
    found = recorder.answers(Accelerator(cpu=True), ["a", "b", "c"], torch.full((3,), 0.5).numpy())
    assert found.labels.dtype.name == "uint8" and found.labels.tolist() == [[0, 0, 0], [1, 0, 1]] and found.several


class Processes:
    """Accelerate's collective calls between processes that take turns: each is asked with all others' tensors known."""

    def __init__(self, shares):
        self.shares, self.device, self.num_processes = shares, torch.device("cpu"), len(shares)
        self.is_main_process = True
        self.calls = iter(self._calls())

    def _calls(self):
        most = max(len(share[0]) for share in self.shares)
        yield torch.tensor([len(share[0]) for share in self.shares])
        for start in range(0, most, module.CHUNK):
            parts = [[column[start : start + module.CHUNK] for column in share] for share in self.shares]
            yield torch.tensor([len(part[0]) for part in parts])
            longest = max(len(part[0]) for part in parts)
            for column in zip(*parts):
                yield torch.cat(
                    [torch.nn.functional.pad(t, (0, 0) * (t.ndim - 1) + (0, longest - len(t))) for t in column]
                )

    def gather(self, tensor):
        found = next(self.calls)
        assert found.dtype == tensor.dtype and found.shape[1:] == tensor.shape[1:]
        return found

    def pad_across_processes(self, tensor):
        return tensor


@pytest.mark.parametrize("chunk", [2, 100])
@pytest.mark.parametrize("own", [[0, 3, 4], []])
def test_every_image_of_all_processes_comes_once(monkeypatch, chunk, own):
    monkeypatch.setattr(module, "CHUNK", chunk)

    def share(index):
        index = torch.tensor(index, dtype=torch.int64)
        return torch.stack([index + 1.0, index * 2.0], 1), (index + 1) % 2, index  # unlike padding, of image 0 too

    shares = [share(own), share([2, 1, 5, 6, 7, 0])]  # 0 comes twice: a stream that is filled up
    recorder = Recorder()
    if own:
        recorder.add(*shares[0])
    found = recorder.answers(Processes(shares), ["a", "b"])
    there = sorted({*own, 2, 1, 5, 6, 7, 0})
    assert found.index.tolist() == there and found.labels.tolist() == [(i + 1) % 2 for i in there]
    assert found.logits.tolist() == [[i + 1.0, 2.0 * i] for i in there]
    assert PartialState().num_processes == 1
