"""A folder in COCO's format as a data set, the mAP of a detector on it, and a picture of what it finds."""

import json
import math
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchmetrics.detection import MeanAveragePrecision
from torchvision import ops, tv_tensors
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, save_image

from effnet_hf.errors import UserError
from effnet_hf.image_processing_efficientnet_nv import to_rgb


def read(args: Namespace) -> "tuple[Coco, Coco]":
    """Training and validation set of `--data_dir`.

    Raises:
        UserError: as [`Coco`]; or their categories differ, or pycocotools is missing, or the detector cannot have sizes
            as these.
    """
    _require_sizes(args)
    root, size = Path(args.data_dir), args.image_size
    if not find_spec("pycocotools"):
        raise UserError("mAP needs pycocotools: pip install torchmetrics pycocotools.")
    data = Coco(root, "train", size, (v2.RandomHorizontalFlip(),))
    held_out = Coco(root, "val", size)
    if data.names != held_out.names:
        raise UserError(f"--data_dir {root}: the categories of train and val differ; they must be the same.")
    return data, held_out


class Coco(Dataset):
    """Pictures of 0 to 1 (3, size, size), stretched, with their `boxes` (n, 4) in pixels, corners, and `labels` (n,).

    Groups (`iscrowd`) and boxes of less than a pixel are left out; a picture without boxes stays.

    Raises:
        UserError: there is no annotation file, or several, or it is not what it should be, or a picture is missing.
    """

    def __init__(self, root: Path, split: str, size: int, augmentations: tuple = ()):
        files = [*root.glob(f"{split}*/*annotations*.json"), *root.glob(f"annotations/instances_{split}*.json")]
        if len(files) != 1:
            raise UserError(f"--data_dir {root} has {len(files)} annotation files of {split!r}, not one; see --help.")
        self.folder = files[0].parent
        if self.folder.name == "annotations":
            self.folder = root / files[0].stem.removeprefix("instances_")
        try:
            content = json.loads(files[0].read_text("utf-8"))
            self.names = {one["id"]: one["name"] for one in sorted(content["categories"], key=lambda one: one["id"])}
            self.images, labels = content["images"], {number: label for label, number in enumerate(self.names)}
            self.boxes: dict = {image["id"]: [] for image in self.images}
            for box in content["annotations"]:
                if box["category_id"] not in labels or box["image_id"] not in self.boxes:
                    raise ValueError(f"annotation {box.get('id')} is of a category or an image that is not listed")
                left, top, width, height = map(float, box["bbox"])
                if not 0 <= width < math.inf > height >= 0 or not math.isfinite(left + top):
                    raise ValueError(f"annotation {box.get('id')} has the box {box['bbox']}")
                if not box.get("iscrowd"):
                    self.boxes[box["image_id"]].append([left, top, width, height, labels[box["category_id"]]])
            missing = [one["file_name"] for one in self.images if not (self.folder / one["file_name"]).is_file()]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{files[0]} is not in COCO's format: {type(error).__name__}: {error}.") from error
        if not self.images or not labels:
            raise UserError(f"{files[0]} has no {'categories' if self.images else 'images'}.")
        for kind, listed in (("categories", self.names), ("images", self.boxes)):
            if len(listed) < len(content[kind]):
                raise UserError(f"{files[0]} has two {kind} of one id.")
        if missing:
            raise UserError(f"{self.folder / missing[0]} is missing, and {files[0]} lists it.")
        if not any(min(box[2:4]) >= 1 for boxes in self.boxes.values() for box in boxes):
            raise UserError(f"{files[0]} has no box of a pixel or more; bbox is left, top, width, height in pixels.")
        resize = [v2.Resize((size, size)), v2.ToDtype(torch.float32, scale=True), v2.SanitizeBoundingBoxes()]
        self.transform = v2.Compose([*augmentations, *resize])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        image = v2.functional.pil_to_tensor(self._open(self.images[index]))
        known = torch.tensor(self.boxes[self.images[index]["id"]], dtype=torch.float32).reshape(-1, 5)
        corners = ops.box_convert(known[:, :4], "xywh", "xyxy")
        boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=image.shape[-2:])
        image, target = self.transform(tv_tensors.Image(image), {"boxes": boxes, "labels": known[:, 4].long()})
        return image.as_subclass(torch.Tensor), {key: value.as_subclass(torch.Tensor) for key, value in target.items()}

    def _open(self, listed: dict) -> Image.Image:
        file = self.folder / listed["file_name"]
        try:
            with Image.open(file) as opened:
                image = to_rgb(opened)  # turned as EXIF says; 16 bits become 8
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read as a picture: {error}") from error
        said = listed.get("width", image.width), listed.get("height", image.height)
        if image.size != said:
            raise UserError(f"{file} has {image.width} x {image.height} pixels, and its annotations are of {said}.")
        return image

    def loader(self, batch_size: int, shuffle: bool, num_workers: int) -> DataLoader:
        return DataLoader(self, batch_size, shuffle, num_workers=num_workers, collate_fn=_collate)


def _require_sizes(args: Namespace) -> None:
    """Raises `UserError` for sizes that a detector cannot have."""
    if args.width % 8:
        raise UserError(f"--width {args.width}: it must be a multiple of 8, for heads and norms of 8.")
    if args.detector == "rtdetr" and args.image_size % 32:
        raise UserError(f"--image_size {args.image_size}: RT-DETR needs a multiple of 32.")
    places = sum((args.image_size // stride) ** 2 for stride in (8, 16, 32))
    if args.detector == "rtdetr" and args.queries > places:
        raise UserError(f"--queries {args.queries}: RT-DETR has {places} places at --image_size {args.image_size}.")


def _collate(rows: list[tuple]) -> tuple[torch.Tensor, list[dict]]:
    images, targets = zip(*rows)
    return torch.stack(images), list(targets)


def evaluate(model: torch.nn.Module, loader, accelerator: Accelerator) -> dict[str, float]:
    """COCO's mAP and its like; -1 is what cannot be said, as of small objects where there are none."""
    metric = MeanAveragePrecision(sync_on_compute=False)  # `gather_for_metrics` has done it, without what pads a batch
    metric.warn_on_many_detections = False
    model.eval()
    for images, targets in loader:
        with torch.inference_mode():
            found = model(images)
        pairs = [[{name: _plain(value) for name, value in one.items()} for one in pair] for pair in zip(found, targets)]
        pairs = accelerator.gather_for_metrics(pairs, use_gather_object=True)
        metric.update([found for found, _ in pairs], [target for _, target in pairs])
    return {name: round(value.item(), 4) for name, value in metric.compute().items() if value.numel() == 1}


def _plain(value: torch.Tensor) -> torch.Tensor:
    return value.cpu().float() if value.is_floating_point() else value.cpu()


def draw(detector: torch.nn.Module, dataset: Coco, file: Path, count: int = 8, threshold: float = 0.5) -> None:
    """The first pictures at twice their size, with what is found in them at `threshold` or above."""
    device, names, sheet = next(detector.parameters()).device, list(dataset.names.values()), []
    for index in range(min(count, len(dataset))):
        image = dataset[index][0]
        with torch.inference_mode():
            found = detector.eval()(image[None].to(device))[0]
        sure = found["scores"] >= threshold
        boxes, labels, scores = (found[name][sure].cpu() for name in ("boxes", "labels", "scores"))
        told = [f"{names[label]} {score:.2f}" for label, score in zip(labels, scores)]
        image = v2.functional.resize(image, [2 * side for side in image.shape[-2:]])
        looks = {"colors": "red", "width": 3, "label_colors": "white", "fill_labels": True}
        sheet.append(draw_bounding_boxes(image, 2 * boxes, told, **looks) if told else image)
    save_image(torch.stack(sheet), file, nrow=4)
