"""Fine-tunes a checkpoint with transformers' Trainer: docs/trainer.md.

    python examples/trainer/trainer.py --model MODEL --data_dir DIR --output_dir OUT
    accelerate launch examples/trainer/trainer.py --model MODEL --data_dir DIR --output_dir OUT --bf16 true

DIR has train/<class>/… and val/<class>/…. Every flag of TrainingArguments works; the defaults below are those of
`effnet-hf train --config finetune`.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import load_dataset
from torchvision.transforms import v2
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from effnet_hf.files import require_place  # and effnet_hf registers its models with the Auto classes


@dataclass
class Arguments:
    model: str = field(metadata={"help": "checkpoint folder or Hub id"})
    data_dir: str = field(metadata={"help": "folder with train/<class>/… and val/<class>/…"})
    image_size: int | None = field(default=None, metadata={"help": "pixels; default: the checkpoint's"})


class FineTuning(Trainer):
    def get_decay_parameter_names(self, model):
        """Trainer would let weight decay pull at batch norm's weights too, of which it knows neither class nor name."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]


def main() -> None:
    parser = HfArgumentParser((Arguments, TrainingArguments))  # type: ignore[arg-type]  # it says: one class
    is_ratio = "warmup_ratio" in TrainingArguments.__dataclass_fields__  # transformers 4
    parser.set_defaults(**{"warmup_ratio" if is_ratio else "warmup_steps": 0.1})
    parser.set_defaults(
        num_train_epochs=10,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        learning_rate=1e-3,
        weight_decay=0.01,
        lr_scheduler_type="cosine",
        label_smoothing_factor=0.1,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        remove_unused_columns=False,  # else the images go, before our transforms have seen them
        report_to=["none"],
    )
    ours, arguments = parser.parse_args_into_dataclasses()
    if not arguments.resume_from_checkpoint:
        with arguments.main_process_first(local=False):
            require_place(arguments.output_dir)
    set_seed(arguments.seed)

    dataset = load_dataset("imagefolder", data_dir=ours.data_dir)
    names = dataset["train"].features["label"].names
    size = {} if ours.image_size is None else {"image_size": ours.image_size}
    model = AutoModelForImageClassification.from_pretrained(
        ours.model,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        ignore_mismatched_sizes=True,  # a new classifier
        batch_norm_momentum=0.1,  # the running statistics must follow within a dozen steps
        **size,
    )
    sides = {"size": round(ours.image_size * 8 / 7), "crop_size": ours.image_size} if size else {}
    processor = AutoImageProcessor.from_pretrained(ours.model, **sides)

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

    def for_training(batch: dict) -> dict:
        return {"pixel_values": [augment(image.convert("RGB")) for image in batch["image"]], "label": batch["label"]}

    def for_evaluation(batch: dict) -> dict:
        return {"pixel_values": processor(batch["image"], return_tensors="pt")["pixel_values"], "label": batch["label"]}

    trainer = FineTuning(
        model=model,
        args=arguments,
        train_dataset=dataset["train"].with_transform(for_training),
        eval_dataset=dataset["validation"].with_transform(for_evaluation),
        processing_class=processor,  # saved with every checkpoint
        compute_metrics=lambda found: {"accuracy": float(np.mean(found.predictions.argmax(-1) == found.label_ids))},
    )
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()
    trainer.log_metrics("eval", trainer.evaluate())
    if arguments.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
