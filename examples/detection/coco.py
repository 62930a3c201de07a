"""A folder in COCO's format as a data set, the mAP of a detector on it, and a picture of what it finds."""

import json
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


def read(root: Path, size: int) -> "tuple[Coco, Coco]":
    """Training and validation set of a folder.

    Raises:
        UserError: as [`Coco`]; or their categories differ.
    """
    data = Coco(root, "train", size, (v2.RandomHorizontalFlip(),))
    held_out = Coco(root, "val", size)
    if data.names != held_out.names:
        raise UserError(f"--data_dir {root}: the categories of train and val differ; they must be the same.")
    return data, held_out


class Coco(Dataset):
    """Pictures of 0 to 1 (3, size, size), stretched, with their `boxes` (n, 4) in pixels, corners, and `labels` (n,).

    Groups (`iscrowd`) and boxes without an area are left out; a picture without boxes stays.

    Raises:
        UserError: there is no annotation file, or several, or it is not what it should be.
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
                if not box.get("iscrowd"):
                    self.boxes[box["image_id"]].append([*map(float, box["bbox"]), labels[box["category_id"]]])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{files[0]} is not in COCO's format: {type(error).__name__} {error}.") from error
        if not self.images or not labels:
            raise UserError(f"{files[0]} has no {'categories' if self.images else 'images'}.")
        resize = [v2.Resize((size, size)), v2.ToDtype(torch.float32, scale=True), v2.SanitizeBoundingBoxes()]
        self.transform = v2.Compose([*augmentations, *resize])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        image = v2.functional.pil_to_tensor(Image.open(self.folder / self.images[index]["file_name"]).convert("RGB"))
        known = torch.tensor(self.boxes[self.images[index]["id"]], dtype=torch.float32).reshape(-1, 5)
        corners = ops.box_convert(known[:, :4], "xywh", "xyxy")
        boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=image.shape[-2:])
        image, target = self.transform(tv_tensors.Image(image), {"boxes": boxes, "labels": known[:, 4].long()})
        return image.as_subclass(torch.Tensor), {key: value.as_subclass(torch.Tensor) for key, value in target.items()}

    def loader(self, batch_size: int, shuffle: bool, num_workers: int) -> DataLoader:
        return DataLoader(self, batch_size, shuffle, num_workers=num_workers, collate_fn=_collate)


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
