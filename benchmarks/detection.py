"""Our pretrained B0 as a detector's backbone beside random weights and ResNets, in the same CPU time of one thread.

    python examples/detection/draw_set.py IMAGENETTE work/set --classes n02102040 n03028079 n03417042 n03888257
    python benchmarks/detection.py work --weights b0-lite0

IMAGENETTE has `train/` and `val/` with a folder per class; `--weights` is a B0 warm-started from Lite0's ImageNet
weights (README.md, job 2). Every run is examples/detection/train_detector.py in a process of its own, with
`process_time` for its clock, no loader processes, and for ResNets another backbone in the place of ours. Runs that
`work` has are kept, so that it goes on where it was stopped. It writes work/results.json.
"""

import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from lib.environment import describe_cpu

from effnet_hf.cli import ArgumentParser, above_zero, at_least, path, run
from effnet_hf.files import atomic_write


RESNETS = {
    "resnet18": {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]},
    "resnet50": {"layer_type": "bottleneck", "depths": [3, 4, 6, 3], "hidden_sizes": [256, 512, 1024, 2048]},
}
DETECTORS = {"retinanet": "RetinaNet", "rtdetr": "RT-DETR"}
CONTENDERS = {
    "b0-lite0": "**B0, pretrained**",
    "b0": "B0, random weights (baseline)",
    "resnet18": "ResNet-18, random weights",
    "resnet50": "ResNet-50, random weights",
}
LIBRARIES = ("torch", "torchvision", "transformers", "accelerate", "torchmetrics", "pycocotools")


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("work", type=path, help="folder with set/, and where the results go")
    parser.add_argument("--weights", type=path, required=True, help="checkpoint of the pretrained B0")
    parser.add_argument("--minutes", type=above_zero, default=8, help="of CPU time, each run (%(default)s)")
    parser.add_argument("--seeds", type=at_least(1), default=1, help="how many (%(default)s)")
    parser.add_argument("--detectors", nargs="+", choices=DETECTORS, default=list(DETECTORS))
    parser.add_argument("--backbones", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--one", nargs=3, metavar=("DETECTOR", "BACKBONE", "SEED"), help="this run, in this process")
    args = parser.parse_args()
    work = Path(args.work)
    if args.one:
        return train(work, args.weights, args.minutes, *args.one)
    for seed in range(args.seeds):
        for detector, backbone in ((d, b) for d in args.detectors for b in args.backbones):
            if not folder_of(work, detector, backbone, seed).exists():
                given = [args.work, "--weights", args.weights, "--minutes", str(args.minutes)]
                command = [sys.executable, __file__, *given, "--one", detector, backbone, str(seed)]
                if code := subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode:
                    sys.exit(code)  # it has said why
    runs = [json.loads(file.read_text()) for file in sorted(work.glob("runs/*/results.json"))]
    for row in runs:
        del row["data_dir"], row["output_dir"]
    facts = {"processor": describe_cpu(), "threads": 1, "versions": {name: version(name) for name in LIBRARIES}}
    have = {(row["detector"], row["backbone"]) for row in runs}
    table = [summary(runs, *pair) for pair in ((d, b) for d in DETECTORS for b in CONTENDERS) if pair in have]
    with atomic_write(work / "results.json") as file:
        file.write(json.dumps(facts | {"table": table, "runs": runs}, indent=1) + "\n")


def summary(runs: list[dict], detector: str, backbone: str) -> dict:
    rows = [row for row in runs if (row["detector"], row["backbone"]) == (detector, backbone)]

    def seeds(key: str, form: str) -> str:
        return ", ".join(form.format(row[key]) for row in rows)

    facts = {"detector": DETECTORS[detector], "backbone": CONTENDERS[backbone], "mAP": seeds("map", "{:.3f}")}
    facts |= {"mAP at IoU 0.5": seeds("map_50", "{:.3f}"), "optimizer steps": seeds("steps", "{}")}
    return facts | {"CPU minutes": seeds("minutes", "{:g}"), "validation images": seeds("val_images", "{}")}


def folder_of(work: Path, detector: str, backbone: str, seed: int | str) -> Path:
    return work / "runs" / f"{detector}-{backbone}-{seed}"


def train(work: Path, weights: str, minutes: float, detector: str, backbone: str, seed: str) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples/detection"))
    import train_detector as example

    example.clock = time.process_time
    if backbone in RESNETS:
        example.backbone = resnet
    flags = {"detector": detector, "backbone": weights if backbone == "b0-lite0" else backbone, "minutes": minutes}
    flags |= {"data_dir": work / "set", "output_dir": folder_of(work, detector, backbone, seed), "seed": seed}
    flags |= {"num_workers": 0}
    sys.argv[1:] = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    example.main()
    file = folder_of(work, detector, backbone, seed) / "results.json"
    with atomic_write(file) as opened:
        opened.write(json.dumps(json.loads(file.read_text()) | {"backbone": backbone}, indent=1) + "\n")


def resnet(name: str, width: int):
    """What the example's `backbone` gives, for a ResNet with random weights: torchvision's and transformers' own."""
    from torchvision import models
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7
    from transformers import ResNetConfig

    layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
    last, channels = LastLevelP6P7(width, width), RESNETS[name]["hidden_sizes"][1:]
    pyramid = BackboneWithFPN(getattr(models, name)(), layers, channels, width, last)
    return False, pyramid, ResNetConfig(**RESNETS[name], out_indices=[2, 3, 4]), {}


if __name__ == "__main__":
    run(main)
