"""What DALI changes: a checkpoint's top-1, evaluation pixels, and AutoAugment operation by operation.

    python benchmarks/dali_difference.py --model runs/imagenette-b0 --data_dir imagenette

The graph of `dali-gpu` runs on the CPU here; on a GPU its decoder and its rounding are other ones.
"""

import random
from collections import Counter, defaultdict

import numpy as np
import torch
from lib.environment import LOADING, environment, resolve_device
from lib.report import table, write_figures
from PIL import Image

from effnet_hf import EfficientNetNVImageProcessor
from effnet_hf.checkpoint import open_checkpoint
from effnet_hf.cli import ArgumentParser, at_least, path, run
from effnet_hf.data import DataSource, DeviceStage, EvaluationTransform, auto_augment
from effnet_hf.data.auto_augment import Step
from effnet_hf.data.dali import quiet_build
from effnet_hf.data.dali_augment import DaliPolicy
from effnet_hf.data.dali_pipeline import DaliPipeline, EncodedBatches, EvaluationPlanner
from effnet_hf.data.sampler import BatchRequest, ValidationPlan
from effnet_hf.data.worker_pool import MicroBatches
from effnet_hf.training.precision import keep_freed_memory


BATCH = 50
DRAWS = 10_000
SIZE = 224  # of the images that operations are compared on


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=path, required=True, help="checkpoint folder")
    parser.add_argument("--data_dir", type=path, required=True, help="folder with val/<class>/… or <class>/…")
    parser.add_argument("--num_images", type=at_least(1), default=50, help="that operations are compared on")
    parser.add_argument("--output", type=path, help="write the figures to this JSON file as well")
    parser.old_spellings = {"--pictures": "--num_images"}
    arguments = parser.parse_args()
    device = resolve_device("cpu", threads=1)
    keep_freed_memory()
    checkpoint = open_checkpoint(arguments.model)
    split = DataSource.from_folder(arguments.data_dir, train=False, class_names=checkpoint.class_names).val
    figures = {
        "kind": "data",
        **environment(device, LOADING),
        "rows": [],
        "evaluation": compare_evaluation(checkpoint.load().eval(), checkpoint.processor, split),
        "operations": compare_operations(split, arguments.num_images),
    }
    for name in ("evaluation", "operations"):
        print(f"\n{table(figures[name])}")
    if arguments.output:
        write_figures(figures, arguments.output)


def compare_evaluation(network, processor, split) -> list[dict]:
    """Top-1 and loss by loader; predictions that change and the mean difference of a pixel, in grey levels."""
    stage, requests = DeviceStage("cpu", processor), ValidationPlan(len(split), BATCH).requests

    images = MicroBatches(split, EvaluationTransform(processor), 0, False)
    files = EncodedBatches(split, EvaluationPlanner(processor), 0, False)
    graph = DaliPipeline(files, 0, 2, BATCH, torch.device("cpu"), num_threads=1)
    sources = [(images[request] for request in requests()), graph.batches(requests())]
    sums: list[dict] = [defaultdict(float) for _ in sources]
    with torch.inference_mode():
        for batches in zip(*sources):
            for total, batch in zip(sums, batches):
                logits = network(pixel_values=stage.stage(batch)["pixel_values"]).logits
                predicted = logits.argmax(1)
                if total is sums[0]:
                    reference = predicted
                difference = (batch["pixel_values"].int() - batches[0]["pixel_values"].int()).abs()
                total["n"] += len(predicted)
                total["right"] += int((predicted == batch["labels"]).sum())
                total["changed"] += int((predicted != reference).sum())
                total["loss"] += float(torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum"))
                total["difference"] += float(difference.float().mean()) * len(predicted)
                total["largest"] = max(total["largest"], float(difference.max()))
    return [
        {
            "loader": name,
            "top1": 100 * total["right"] / total["n"],
            "loss": round(total["loss"] / total["n"], 4),
            "changed predictions": int(total["changed"]),
            "mean pixel difference": round(total["difference"] / total["n"], 3),
            "largest": int(total["largest"]),
        }
        for name, total in zip(("imagefolder and dali-cpu (the image processor's pixels)", "dali-gpu's graph"), sums)
    ]


def compare_operations(split, num_images: int) -> list[dict]:
    """How often each operation is drawn, and how far DALI's result is from Pillow's at the policy's levels."""
    processor = EfficientNetNVImageProcessor.for_image_size(SIZE)
    policy = DaliPolicy("autoaugment", processor)
    expected: dict[str, float] = defaultdict(float)
    for sub_policy in auto_augment.POLICY:
        for name, probability, _ in sub_policy:
            expected[name] += DRAWS * probability / len(auto_augment.POLICY)
    pillow = Counter(step.operation for seed in range(DRAWS) for step in auto_augment.draw(random.Random(seed)))
    dali = np.bincount(np.concatenate([policy.draw(random.Random(s)) for s in range(DRAWS)])[:, 0], minlength=13)
    pipeline = _policy_pipeline(policy)
    rows = np.linspace(0, len(split) - 1, num_images).astype(int)
    batch = MicroBatches(split, EvaluationTransform(processor), 0, False)[BatchRequest(0, 0, rows)]
    images = [Image.fromarray(square) for square in batch["pixel_values"].numpy()]
    table = []
    for number, name in enumerate(auto_augment.OPERATIONS):
        levels = sorted({level for pair in auto_augment.POLICY for op, _, level in pair if op == name}) or [5]
        steps = [
            Step(name, level, negative)
            for level in levels
            for negative in ((False, True) if name in auto_augment.SIGNED else (False,))
        ]
        means, largest = [], 0
        for step in steps:
            draws = np.array([(1 + number, step.level, step.negative), (0, 0, 0)], np.int32)
            (results,) = pipeline.run(images=[np.asarray(image) for image in images], draws=[draws] * len(images))
            for image, result in zip(images, results):
                theirs = np.asarray(auto_augment.apply(image, step)).astype(int)
                difference = np.abs(np.asarray(result).astype(int) - theirs)
                means.append(difference.mean())
                largest = max(largest, int(np.percentile(difference, 99)))
        table.append(
            {
                "operation": name,
                "expected": round(expected[name]),
                "drawn for Pillow": pillow[name],
                "drawn for DALI": int(dali[1 + number]),
                "mean pixel difference": round(float(np.mean(means)), 3),
                "99th percentile, worst image": largest,
            }
        )
    return table


def _policy_pipeline(policy: DaliPolicy):
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=256, num_threads=1, device_id=None, enable_conditionals=True, prefetch_queue_depth=1)
    def graph():
        images = fn.external_source(name="images", dtype=types.UINT8, ndim=3, layout="HWC")
        draws = fn.external_source(name="draws", dtype=types.INT32, ndim=2)
        return policy.apply(images, draws)

    with quiet_build():
        pipeline = graph()
        pipeline.build()
    return pipeline


if __name__ == "__main__":
    run(main)
