"""What recording and measuring a validation costs beside the validation itself: python benchmarks/report_cost.py

50,000 images of 1,000 classes, with logits drawn beforehand in place of a network's. Prints the seconds of a validation
without and with a recorder, of measuring all figures, and the most memory that the process has used; and what share of
a validation that is which handles `--speed` images per second.
"""

import resource
import time

import torch
from accelerate import Accelerator

from effnet_hf.analysis import Recorder, measure
from effnet_hf.cli import ArgumentParser, at_least, run
from effnet_hf.training.loop import validate


class Drawn:
    """Batches whose pixels are the logits."""

    def __init__(self, images: int, classes: int, size: int = 256):
        self.num_samples, self.size, generator = images, size, torch.Generator().manual_seed(0)
        self.labels = torch.randint(classes, (images,), generator=generator).sort().values
        self.block = torch.randn((size, classes), generator=generator)

    def epoch(self, epoch: int):
        for start in range(0, self.num_samples, self.size):
            labels = self.labels[start : start + self.size]
            logits = self.block[: len(labels)].clone()
            logits[torch.arange(len(labels)), labels] += 4.5
            yield {"pixel_values": logits, "labels": labels, "index": torch.arange(start, start + len(labels))}


class Given(torch.nn.Module):
    def forward(self, pixel_values):
        return type("Output", (), {"logits": pixel_values})


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description="Seconds and memory of recording and measuring a validation.")
    parser.add_argument("--count", type=at_least(1), default=50_000)
    parser.add_argument("--classes", type=at_least(2), default=1000)
    parser.add_argument("--speed", type=at_least(1), default=1000, help="images per second of a validation")
    args = parser.parse_args(argv)
    batches, accelerator = Drawn(args.count, args.classes), Accelerator(cpu=True)
    validate(Given(), batches, accelerator)
    start = peak()
    recorder = Recorder()
    plain = seconds(lambda: validate(Given(), batches, accelerator))
    recorded = seconds(lambda: validate(Given(), batches, accelerator, recorder=recorder))
    answers = recorder.answers(accelerator, [f"class {i}" for i in range(args.classes)])
    assert answers is not None
    measured = seconds(lambda: measure(answers))
    print(f"{args.count:,} images, {args.classes:,} classes, {torch.get_num_threads()} threads, processor time")
    print(f"validation without a network {plain:.1f} s, with a recorder {recorded:.1f} s, measuring {measured:.1f} s")
    print(f"memory: {start:,.0f} MB before, {peak():,.0f} MB at most")
    share = (recorded - plain + measured) / (args.count / args.speed)
    print(f"beside a validation at {args.speed:,} images/s: {share:.1%}")


def seconds(work) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    run(main)
