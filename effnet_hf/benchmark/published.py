"""What NVIDIA published for the original (DeepLearningExamples, ConvNets READMEs, containers 20.12 and 21.03).

Pictures per second: training on one and on eight A100-80GB, inference on one. Baseline columns of our pages, and what
`benchmark.py scaling` is checked against.
"""

# (variant, precision): (per-device batch, one GPU, eight GPUs), container 21.03
TRAINING = {
    ("b0", "tf32"): (256, 1078, 8193),
    ("b0", "fp16"): (256, 2489, 16652),
    ("b4", "tf32"): (64, 157, 1223),
    ("b4", "fp16"): (128, 331, 2570),
    ("widese-b0", "tf32"): (256, 1078, 8244),
    ("widese-b0", "fp16"): (256, 2512, 16368),
    ("widese-b4", "tf32"): (64, 157, 1223),
    ("widese-b4", "fp16"): (128, 331, 2585),
}
# (variant, precision, GPUs) over several machines of eight
SEVERAL_MACHINES = {("b0", "fp16", 16): 29332, ("b4", "fp16", 64): 18900}
# (variant, precision): (eight GPUs in container 20.12, hours for 400 epochs with validation)
WHOLE_RUNS = {
    ("b0", "tf32"): (8225, 19),
    ("b0", "fp16"): (14391, 11),
    ("b4", "tf32"): (1204, 126),
    ("b4", "fp16"): (2341, 66),
}
# (variant, precision): {batch: pictures per second}, and mean milliseconds of batch 1
INFERENCE = {
    ("b0", "tf32"): ({1: 130, 64: 4656, 128: 5001, 256: 5154}, 9.33),
    ("b0", "fp16"): ({1: 105, 64: 6315, 128: 9311, 256: 10239}, 11.21),
    ("b4", "tf32"): ({1: 69, 64: 684, 128: 700, 256: 702}, 16.22),
    ("b4", "fp16"): ({1: 53, 64: 1332, 128: 1418, 256: 1442}, 20.45),
}


def training_ips(variant: str, precision: str) -> float | None:
    """On one A100; bf16 is compared with the original's fp16."""
    row = TRAINING.get((variant, _as_published(precision)))
    return row and row[1]


def inference_ips(variant: str, precision: str, batch: int) -> float | None:
    row = INFERENCE.get((variant, _as_published(precision)))
    return row and row[0].get(batch)


def _as_published(precision: str) -> str:
    return "fp16" if precision == "bf16" else precision
