"""Trains RT-DETR (transformers) or RetinaNet (torchvision) with our backbone on a folder in COCO's format.

    python examples/detection/train_detector.py --detector rtdetr --backbone CHECKPOINT --data_dir DIR --output_dir OUT

DIR holds `train/` and `val/`, each with pictures and `annotations.json` (or Roboflow's `valid/`,
`_annotations.coco.json`; or COCO's `annotations/instances_train2017.json` beside `train2017/`). OUT gets weights,
`results.json` with mAP and `boxes.png` after --minutes; what is stopped is lost. `accelerate launch` takes it to many
processes, bf16, fp16. A pretrained backbone learns at a tenth of the rate. `export_detector.py` writes ONNX from OUT.
"""

import json
import math
import time
from argparse import Namespace

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast, set_seed
from coco import Coco, draw, evaluate, read
from safetensors.torch import save_file
from torch import nn
from torchvision import ops
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.transforms import v2
from transformers import AutoBackbone, PretrainedConfig, RTDetrConfig, RTDetrForObjectDetection, RTDetrImageProcessor

from effnet_hf import EfficientNetNVBackbone, EfficientNetNVConfig, EfficientNetNVImageProcessor
from effnet_hf.cli import ArgumentParser, above_zero, at_least, path, run
from effnet_hf.configuration import VARIANTS
from effnet_hf.detection import FeaturePyramid, load_backbone_weights
from effnet_hf.files import atomic_folder, require_place


clock = time.monotonic  # benchmarks/detection.py counts CPU time instead


def backbone(name: str, width: int) -> tuple[bool, nn.Module, PretrainedConfig, dict]:
    """Whether it is pretrained, it in torchvision's form, its configuration for transformers, and how to normalise."""
    pretrained = name not in VARIANTS
    pyramid = (FeaturePyramid.from_pretrained(name, "P3-P7", width) if pretrained
               else FeaturePyramid(EfficientNetNVConfig.from_variant(name), "P3-P7", width))  # fmt: skip
    return pretrained, pyramid, pyramid.body.config, {"image_mean": pyramid.image_mean, "image_std": pyramid.image_std}


class Detector(nn.Module):
    """Images of 0 to 1 (N, 3, size, size) and targets to a loss; images alone to boxes in pixels, scores, labels."""

    def __init__(self, args: Namespace, names: list[str]):
        super().__init__()
        width, self.size, self.rtdetr = args.width, args.image_size, args.detector == "rtdetr"
        self.pretrained, pyramid, config, self.preparation = backbone(args.backbone, width)
        if not self.rtdetr:
            head = RetinaNetHead(width, 9, len(names), lambda channels: nn.GroupNorm(channels // 8, channels))
            self.model = RetinaNet(pyramid, len(names), self.size, self.size, head=head, **self.preparation)
            return
        self.model = RTDetrForObjectDetection(RTDetrConfig(
            backbone_config=config, encoder_in_channels=AutoBackbone.from_config(config).channels,
            freeze_backbone_batch_norms=self.pretrained, encoder_hidden_dim=width, d_model=width,
            decoder_in_channels=[width] * 3, encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width, decoder_layers=3,
            num_queries=args.queries, num_denoising=args.queries // 2, id2label=dict(enumerate(names)),
        ))  # fmt: skip
        size = dict.fromkeys(("height", "width"), self.size)
        self.processor = RTDetrImageProcessor(size=size, do_normalize=True, **self.preparation)
        if self.pretrained:  # what has strides 2 and 4 does not train, as in the pyramid
            body = load_backbone_weights(self.model, args.backbone).model.backbone.model.encoder
            nn.ModuleList([body.stem, *body.stages[:2]]).requires_grad_(False)

    def forward(self, images: torch.Tensor, targets: list[dict] | None = None):
        if not self.rtdetr:
            return sum(self.model(list(images), targets).values()) if targets else self.model(list(images))
        pixels = v2.functional.normalize(images, self.processor.image_mean, self.processor.image_std)
        if not targets:
            sizes = [(self.size, self.size)] * len(images)
            return self.processor.post_process_object_detection(self.model(pixels), 0.0, sizes)
        boxes = [ops.box_convert(target["boxes"], "xyxy", "cxcywh") / self.size for target in targets]
        labels = [{"class_labels": target["labels"], "boxes": box} for target, box in zip(targets, boxes)]
        return self.model(pixels, labels=labels).loss


def save(detector: Detector, results: dict, output_dir: str, overwrite: bool, images: Coco | None = None) -> None:
    with atomic_folder(output_dir, overwrite) as folder:
        (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        if detector.rtdetr:
            detector.model.save_pretrained(folder)
            detector.processor.save_pretrained(folder)
        else:
            save_file(detector.model.state_dict(), folder / "model.safetensors")
        for body in [part for part in detector.modules() if isinstance(part, EfficientNetNVBackbone)]:  # to export it
            body.save_pretrained(folder / "backbone")
            EfficientNetNVImageProcessor(**detector.preparation).save_pretrained(folder / "backbone")
        if images:
            draw(detector, images, folder / "boxes.png")


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--detector", choices=["rtdetr", "retinanet"], required=True)
    parser.add_argument("--backbone", required=True, help="checkpoint folder or Hub id; or b0, b1, …: random weights")
    parser.add_argument("--data_dir", type=path, required=True)
    parser.add_argument("--output_dir", type=path, required=True)
    for flag, kind, value in (
        *(("minutes", above_zero, 10), ("lr", above_zero, 1e-3), ("batch_size", at_least(1), 16)),
        *(("image_size", at_least(32), 160), ("width", at_least(32), 64), ("queries", at_least(1), 50)),
        *(("seed", at_least(0), 0), ("num_workers", at_least(0), 2)),
    ):
        parser.add_argument(f"--{flag}", type=kind, default=value, help=f"{value} if not given")
    parser.add_argument("--overwrite", action="store_true", help="replace what this has written there before")
    args = parser.parse_args()
    set_seed(args.seed)
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    with accelerator.main_process_first():
        require_place(args.output_dir, args.overwrite)
    data, held_out = read(args)
    detector = Detector(args, list(data.names.values()))
    groups = [{"params": [], "initial_lr": rate * args.lr} for rate in (1, 0.1 if detector.pretrained else 1)]
    for name, parameter in detector.named_parameters():
        groups[".body." in name or "backbone.model" in name]["params"].append(parameter)
    loaders = (part.loader(args.batch_size, part is data, args.num_workers) for part in (data, held_out))
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    model, optimizer, train_loader, val_loader = accelerator.prepare(detector, optimizer, *loaders)
    begun, step, done = clock(), 0, 0.0
    while done < 1:
        for images, targets in train_loader:
            for group in optimizer.param_groups:  # a warm-up of 1/20, then a cosine
                group["lr"] = group["initial_lr"] * min(1, 20 * done) * (1 + math.cos(math.pi * done)) / 2
            loss = model.train()(images, targets)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 50 == 0:
                accelerator.print(f"step {step}, {done:.0%} of the time, loss {loss.item():.3f}", flush=True)
            spent = torch.tensor((clock() - begun) / 60 / args.minutes, device=accelerator.device)
            if (done := broadcast(spent).item()) >= 1:  # by the first process's clock: all stop at the same step
                break
    results = {**vars(args), "names": list(data.names.values()), "steps": step, "val_images": len(held_out)}
    if accelerator.is_main_process:  # before it is measured, of which something may fail
        save(detector, results, args.output_dir, args.overwrite)
    results |= evaluate(model, val_loader, accelerator)
    accelerator.print(f"mAP {results['map']:.3f}, at IoU 0.5 {results['map_50']:.3f}, on {len(held_out)} images")
    if accelerator.is_main_process:
        save(detector, results, args.output_dir, True, held_out)
    accelerator.end_training()


if __name__ == "__main__":
    run(main)
