"""MiB of device memory that an image takes in a training step: python benchmarks/activation_memory.py

Counts every named architecture on tensors without storage and writes effnet_hf/recipes/memory.yaml; minutes on one CPU
core. On a GPU the allocator's own peak is printed beside the count, and nothing is written:

    python benchmarks/activation_memory.py --device cuda --variants b0 b4 widese-b4
"""

from pathlib import Path

import torch

from effnet_hf import recipes
from effnet_hf.cli import ArgumentParser, at_least, run
from effnet_hf.configuration import VARIANTS, EfficientNetNVConfig
from effnet_hf.files import atomic_write
from effnet_hf.training.memory import MIB, STAGED, column, count_step, parameter_count, take_step


TABLE = Path(recipes.__file__).with_name("memory.yaml")
HEAD = """\
# MiB of device memory that one image takes in a training step at the variant's own size, counted by
# `python benchmarks/activation_memory.py`: pixels, what the backward pass needs, the gradients in flight and the batch
# that the loader prepares meanwhile. half: fp16, bf16; single: fp32, tf32; checkpointed: --gradient_checkpointing true.
"""
WAYS = [(precision, checkpointing) for precision in ("bf16", "fp32") for checkpointing in (False, True)]


def count_row(variant: str) -> str:
    config = EfficientNetNVConfig.from_variant(variant)
    row: dict[str, int | str] = {"image_size": config.image_size, "parameters": parameter_count(config)}
    row |= {column(*way): f"{count_step(config, *way):.1f}" for way in WAYS}
    return f"{variant}: {{{', '.join(f'{name}: {value}' for name, value in row.items())}}}"


def measure(config: EfficientNetNVConfig, precision: str, checkpointing: bool, images: int) -> tuple[float, float]:
    """MiB an image by the GPU's allocator: at its peak, and what it reserved; without what a loader would hold."""
    device, before = torch.device("cuda"), []

    def begin():
        torch.cuda.reset_peak_memory_stats()
        before.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))

    take_step(config, precision, checkpointing, images, device, lambda: None)  # cuDNN tries its algorithms
    torch.cuda.empty_cache()
    take_step(config, precision, checkpointing, images, device, begin)
    torch.cuda.synchronize()
    peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    allocated, reserved = ((peak - start) / images / MIB for peak, start in zip(peaks, before[0]))
    return allocated, reserved


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="VARIANT")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: compare, write nothing")
    parser.add_argument("--num_images", type=at_least(1), default=32, help="in the step that is measured on cuda")
    parser.old_spellings = {"--pictures": "--num_images"}
    arguments = parser.parse_args(argv)
    if arguments.device == "cpu":
        rows = []
        for variant in arguments.variants:
            rows.append(count_row(variant))
            print(rows[-1], flush=True)
        if arguments.variants == list(VARIANTS):
            with atomic_write(TABLE) as file:
                file.write(HEAD + "\n".join(rows) + "\n")
        return 0
    torch.backends.cudnn.benchmark = True
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.num_images} images; MiB an image")
    print("| variant | way | counted | allocated | reserved |\n|---|---|---|---|---|")
    for variant in arguments.variants:
        config = EfficientNetNVConfig.from_variant(variant)
        for way in WAYS:
            counted = count_step(config, *way) - STAGED * 4 * config.num_channels * config.image_size**2 / MIB
            try:
                allocated, reserved = measure(config, *way, arguments.num_images)
            except torch.OutOfMemoryError:
                print(f"| {variant} | {column(*way)} | {counted:.1f} | out of memory | |", flush=True)
                continue
            print(f"| {variant} | {column(*way)} | {counted:.1f} | {allocated:.1f} | {reserved:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    run(main)
