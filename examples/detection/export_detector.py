"""Writes what train_detector.py trained as ONNX: an image's bytes in; its boxes in pixels, scores and labels out.

    python examples/detection/export_detector.py OUT DIR

OUT/model.onnx takes `images` (1, 3, size, size), 0 to 255 in RGB, and normalises itself; OUT/results.json names the
labels. Before it is written, ONNX Runtime finds in images of the validation set what the model does: all boxes with at
least half the score of the best, within half a pixel and a score of 0.01. Else nothing is written.
"""

import json
import warnings
from argparse import Namespace
from pathlib import Path

import onnxruntime
import torch
from coco import Coco
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from train_detector import Detector
from transformers import RTDetrForObjectDetection, RTDetrImageProcessor

from effnet_hf.cli import ArgumentParser, path, run
from effnet_hf.errors import UserError, first_line
from effnet_hf.files import atomic_write


def reopen(folder: Path) -> Detector:
    """The trained detector, without what its backbone started from."""
    try:
        results = json.loads((folder / "results.json").read_text("utf-8"))
        detector = Detector(Namespace(**{**results, "backbone": str(folder / "backbone")}), results["names"])
        if detector.rtdetr:
            detector.model = RTDetrForObjectDetection.from_pretrained(folder)
            detector.processor = RTDetrImageProcessor.from_pretrained(folder)
        else:
            detector.model.load_state_dict(load_file(folder / "model.safetensors"))
    except (KeyError, AttributeError, ValueError, RuntimeError, SafetensorError) as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{folder} is not whole, or not of train_detector.py ({what}); train again.") from error
    return detector


NAMES = ["boxes", "scores", "labels"]


class Boxes(nn.Module):
    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found = self.detector(images / 255)[0]
        return found["boxes"], found["scores"], found["labels"]


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=path, help="what train_detector.py wrote")
    parser.add_argument("data_dir", type=path, help="folder in COCO's format, to compare on")
    args = parser.parse_args()
    folder = Path(args.folder)
    if not (folder / "results.json").is_file():
        raise UserError(f"{folder} has no results.json; name the --output_dir of a finished train_detector.py.")
    model = Boxes(reopen(folder)).eval()
    dataset = Coco(Path(args.data_dir), "val", model.detector.size)
    images = [(dataset[index][0] * 255).round().to(torch.uint8)[None] for index in range(min(8, len(dataset)))]
    with atomic_write(folder / "model.onnx", "wb") as file:
        with warnings.catch_warnings(action="ignore"):  # of tracing: torch.export cannot count what RetinaNet finds
            torch.onnx.export(model, (images[0],), file.name, input_names=["images"], output_names=NAMES, dynamo=False,
                              dynamic_axes={name: {0: "found"} for name in NAMES}, opset_version=17)  # fmt: skip
        session = onnxruntime.InferenceSession(file.name)
        count, pixels, scores = compare(model, session, images)
    print(
        f"{folder}/model.onnx: {count} boxes in {len(images)} images within {pixels:.1e} pixels, {scores:.1e} of score"
    )


def compare(
    model: Boxes, session: onnxruntime.InferenceSession, images: list[torch.Tensor]
) -> tuple[int, float, float]:
    """How many boxes were compared; by how many pixels, and by how much of a score, they differ at most.

    Equal scores may come in any order, so each box is compared with the nearest of its label.
    """
    count, pixels, scores = 0, 0.0, 0.0
    for image in images:
        with torch.inference_mode():
            ours = model(image)
        theirs = tuple(torch.from_numpy(array) for array in session.run(None, {"images": image.numpy()}))
        for one, other in ((ours, theirs), (theirs, ours)):
            for box, score, label in zip(*one):
                if score < one[1].max() / 2:
                    continue
                same = other[2] == label
                gaps = [[torch.inf, torch.inf]]
                for found, sure in zip(other[0][same], other[1][same]):
                    gaps.append([(found - box).abs().max().item(), (sure - score).abs().item()])
                gap = min(gaps, key=lambda gap: gap[0] / 0.5 + gap[1] / 0.01)
                count, pixels, scores = count + 1, max(pixels, gap[0]), max(scores, gap[1])
    if pixels > 0.5 or scores > 0.01:
        raise UserError(
            f"ONNX Runtime's boxes differ by {pixels:.2g} pixels, scores by {scores:.2g}; nothing written. A detector"
            " that has hardly trained chooses among nearly equal scores: train it for longer."
        )
    if not count:
        raise UserError("nothing is found in these images, so there is nothing to compare; train it for longer.")
    return count // 2, pixels, scores


if __name__ == "__main__":
    run(main)
