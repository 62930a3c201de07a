"""Fine-tunes a checkpoint in a loop of one's own, with Accelerate and without Trainer: docs/trainer.md.

    python examples/trainer/no_trainer.py --model MODEL --data_dir DIR --output_dir OUT
    accelerate launch --num_processes 2 examples/trainer/no_trainer.py --model MODEL --data_dir DIR --output_dir OUT

DIR has train/<class>/… and val/<class>/…. The defaults are those of `effnet-hf train --config finetune`.
"""

from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from transformers import AutoImageProcessor, AutoModelForImageClassification, get_cosine_schedule_with_warmup

from effnet_hf.cli import ArgumentParser, path, run
from effnet_hf.files import require_place
from effnet_hf.image_processing_efficientnet_nv import to_rgb  # and effnet_hf registers its models


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=path, required=True, help="checkpoint folder or Hub id")
    parser.add_argument("--data_dir", type=path, required=True)
    parser.add_argument("--output_dir", type=path, required=True)
    parser.add_argument("--image_size", type=int, help="pixels; default: the checkpoint's")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=16, help="per process")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    accelerator = Accelerator()
    with accelerator.main_process_first():
        require_place(flags.output_dir)
    set_seed(flags.seed)

    size, sides = {}, {}
    if flags.image_size is not None:
        size, sides = {"image_size": flags.image_size}, {"crop_size": flags.image_size}
        sides["size"] = round(flags.image_size * 8 / 7)
    processor = AutoImageProcessor.from_pretrained(flags.model, **sides)

    # `crop_size` is what the network sees. `size` is only what evaluation resizes to, before it crops.
    crop = processor.crop_size["height"], processor.crop_size["width"]
    augment = v2.Compose(
        [
            v2.RandomResizedCrop(crop, scale=(0.5, 1), interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(processor.image_mean, processor.image_std),
        ]
    )
    workers = {"num_workers": flags.num_workers}
    training = ImageFolder(f"{flags.data_dir}/train", augment, loader=upright)
    train_loader = DataLoader(training, flags.batch_size, shuffle=True, drop_last=True, **workers)
    prepare = partial(processor, return_tensors="pt")
    validation = ImageFolder(f"{flags.data_dir}/val", lambda image: prepare(image)["pixel_values"][0], loader=upright)
    val_loader = DataLoader(validation, batch_size=64, **workers)

    model = AutoModelForImageClassification.from_pretrained(
        flags.model,
        id2label=dict(enumerate(training.classes)),
        label2id=training.class_to_idx,
        ignore_mismatched_sizes=True,  # a new classifier
        batch_norm_momentum=0.1,  # the running statistics must follow within a dozen steps
        **size,
    )
    weights: dict[bool, list] = {False: [], True: []}
    for parameter in model.parameters():
        weights[parameter.ndim > 1].append(parameter)  # batch norm and biases decay not
    groups = [{"params": weights[True], "weight_decay": 0.01}, {"params": weights[False], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=flags.learning_rate)
    steps = flags.epochs * len(train_loader)  # of all processes, as Accelerate moves a schedule on
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    model, optimizer, train_loader, val_loader, schedule = accelerator.prepare(
        model, optimizer, train_loader, val_loader, schedule
    )

    for epoch in range(flags.epochs):
        model.train()
        for pixels, labels in train_loader:
            loss = cross_entropy(model(pixel_values=pixels).logits.float(), labels, label_smoothing=0.1)
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        model.eval()
        hits, images = 0, 0
        for pixels, labels in val_loader:
            with torch.inference_mode():
                answers = model(pixel_values=pixels).logits.argmax(-1)
            answers, labels = accelerator.gather_for_metrics((answers, labels))
            hits, images = hits + int((answers == labels).sum()), images + len(labels)
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}, top1 {100 * hits / images:.2f} % of {images:,}")

    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(flags.output_dir)
        processor.save_pretrained(flags.output_dir)


def upright(path: str) -> Image.Image:
    with Image.open(path) as image:
        return to_rgb(image)  # as EXIF says; torchvision's own loader would not turn it


if __name__ == "__main__":
    run(main)
