"""What NVIDIA published for the original on one A100-80GB (DeepLearningExamples, ConvNets READMEs, container 21.03).

Images per second, the baseline columns of our pages; bf16 is compared with the original's fp16.
"""

TRAINING = {
    ("b0", "tf32"): 1078, ("b0", "fp16"): 2489, ("b4", "tf32"): 157, ("b4", "fp16"): 331,
    ("widese-b0", "tf32"): 1078, ("widese-b0", "fp16"): 2512, ("widese-b4", "tf32"): 157, ("widese-b4", "fp16"): 331,
}  # fmt: skip
# (variant, precision): {batch: images per second}
INFERENCE = {
    ("b0", "tf32"): {1: 130, 64: 4656, 128: 5001, 256: 5154},
    ("b0", "fp16"): {1: 105, 64: 6315, 128: 9311, 256: 10239},
    ("b4", "tf32"): {1: 69, 64: 684, 128: 700, 256: 702},
    ("b4", "fp16"): {1: 53, 64: 1332, 128: 1418, 256: 1442},
}


def training_ips(variant: str, precision: str) -> int | None:
    return TRAINING.get((variant, _as_published(precision)))


def inference_ips(variant: str, precision: str, batch: int) -> int | None:
    return INFERENCE.get((variant, _as_published(precision)), {}).get(batch)


def _as_published(precision: str) -> str:
    return "fp16" if precision == "bf16" else precision
