"""Every option of a training run, grouped by topic. `Recipe` is their union; `train --help` prints these texts.

Defaults are those of NVIDIA's published EfficientNet runs where they name one. `None` means "derived": from the
variant (image size, dropout, …), from the machine (workers, precision) or from `accelerate launch` (precision).
"""

import math
from dataclasses import dataclass, field
from typing import Literal


def option(default, help: str, low: float | None = None, high: float = math.inf):
    """A field of a recipe and a flag of that name; numbers, also those of a list, lie between `low` and `high`."""
    metadata = {"help": help, "low": low, "high": high}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelOptions:
    _argument_group_name = "model"

    variant: str = option("b0", "architecture: b0…b7, widese-b0…widese-b7, lite0…lite4")
    model: str | None = option(None, "start from these weights: a folder or a Hub id; a new head if classes differ")
    num_labels: int | None = option(None, "insist on this number of classes; the data decides otherwise", low=1)
    image_size: int | None = option(
        None, "side of the square image, pixels; the checkpoint's or the variant's by default"
    )
    dropout_rate: float | None = option(None, "dropout before the classifier; the variant's by default")
    survival_prob: float | None = option(None, "stochastic depth, 1 is off; the variant's by default")
    stochastic_depth_mode: Literal["batch", "row"] | None = option(None, "a draw per batch (NVIDIA, default) or image")
    batch_norm_momentum: float | None = option(None, "PyTorch's meaning; 0.01 by default")
    batch_norm_eps: float | None = option(None, "0.001 by default")
    conv_init: Literal["fan_in", "fan_out"] | None = option(
        None, "Kaiming mode of fresh convolutions, fan_in by default"
    )
    sync_batch_norm: bool = option(False, "batch statistics over all processes (the original: each its own)")
    gradient_checkpointing: bool = option(False, "recompute block activations: less memory, about a third more time")


@dataclass(frozen=True)
class DataOptions:
    _argument_group_name = "data"

    data_dir: str | None = option(None, "folder with train/<class>/… and val/<class>/…, or with <class>/…")
    dataset_name: str | None = option(None, "a `datasets` source instead of a folder, e.g. user/name")
    dataset_config: str | None = option(None, "configuration name of that dataset")
    streaming: bool = option(False, "stream that dataset instead of downloading it first")
    val_fraction: float = option(
        0.0, "share of the training images held out when there is no val/ folder, by file name", low=0, high=0.9
    )
    val_split: str | None = option(
        None, "folder or split of the validation images, where it is not called val: test, or any other name"
    )
    labels: str | None = option(
        None, "CSV file of images and labels, instead of class folders; paths are below data_dir"
    )
    image_column: str | None = option(None, "column of the images; `image`, or the only one, by default")
    label_column: list[str] = option(
        [], "column of the labels, `label` by default; several columns of 0 and 1 are several labels per image"
    )
    label_separator: str | None = option(None, "what stands between several labels in one cell, e.g. ';'")
    folds: int = option(
        0, "k-fold cross-validation: divide the training images into so many parts, each class evenly", low=0, high=100
    )
    fold: int = option(0, "which part to validate on, from 1; the others are trained on", low=0, high=100)
    problem_type: Literal["single_label_classification", "multi_label_classification"] | None = option(
        None, "one label per image or several; what the labels look like decides by default"
    )
    classes_by_position: bool = option(
        False, "where the data's class names are not the checkpoint's: take both in order"
    )
    bit_depth: int | None = option(
        None, "bits of the values in deep images that do not say what white is; 1 for floats up to 1", low=1, high=32
    )
    max_pixels: int = option(178_956_970, "refuse images of more pixels, width times height", low=1)
    loader: Literal["imagefolder", "dali-cpu", "dali-gpu", "synthetic"] = option("imagefolder", "input pipeline")
    num_workers: int | None = option(
        None, "loader processes per device; from the machine's free cores by default", low=0, high=512
    )
    prefetch_factor: int = option(2, "batches each worker prepares ahead", low=1, high=64)
    interpolation: Literal["bilinear", "bicubic"] | None = option(
        None, "resampling of crops and evaluation; the checkpoint's, or bicubic"
    )
    resize_margin: int | None = option(
        None, "evaluation resizes the short side to image_size + this, then crops; the checkpoint's, or 32", low=0
    )
    crop_scale: float = option(
        0.08, "smallest area of a random training crop, as a share of the image", low=1e-4, high=1
    )
    reducing_gap: int = option(
        0, "decode JPEGs at 1/2, 1/4 or 1/8 where a training crop still is this many times its final size; 0 never",
        low=0, high=64,
    )  # fmt: skip
    horizontal_flip: float = option(0.5, "probability of mirroring a training image", low=0, high=1)
    augmentation: Literal["none", "autoaugment", "randaugment", "trivialaugment"] = option("none", "per-image policy")
    randaugment_operations: int = option(2, "operations that randaugment applies to an image", low=1, high=14)
    randaugment_magnitude: int = option(9, "their strength, of 30", low=0, high=30)
    random_erasing: float = option(
        0.0, "probability of a training image to lose a rectangle of up to a third of its area", low=0, high=1
    )
    mixup: float = option(0.0, "alpha of mixup's Beta distribution, 0 is off", low=0)
    cutmix: float = option(0.0, "alpha of cutmix's Beta distribution, 0 is off", low=0)
    sampler: Literal["shuffled", "balanced"] = option(
        "shuffled", "an epoch has every training image once, or every class as often and as many images"
    )
    strict: bool = option(False, "stop at the first unreadable image instead of replacing it")
    max_bad_files: float = option(
        0.01, "stop when more than this share of a split is unreadable; one image may be, but for 0", low=0, high=1
    )


@dataclass(frozen=True)
class OptimizationOptions:
    _argument_group_name = "optimization"

    epochs: int = option(400, "passes over the training data; also the horizon of the learning-rate schedule", low=0)
    global_batch_size: int = option(4096, "images per optimizer step, over all devices and accumulation steps", low=1)
    per_device_batch_size: int | None = option(None, "images a device handles at once; accumulation is derived", low=1)
    hardware: str | None = option(
        None, "preset of batch, precision and workers: t4, v100-16g, v100-32g, a100, h100, h200, cpu"
    )
    optimizer: Literal["rmsprop", "sgd", "adamw"] = option("rmsprop", "torch's own")
    learning_rate: float = option(0.08, "peak rate at a global batch of `lr_batch_size`", low=0)
    lr_batch_size: int = option(4096, "global batch that `learning_rate` is stated for", low=1)
    lr_scaling: Literal["none", "linear", "sqrt"] = option(
        "linear", "how the rate follows another global batch; `none` if you give --learning_rate"
    )
    lr_schedule: Literal["cosine", "linear", "step", "constant"] = option("cosine", "after the warm-up")
    lr_update: Literal["epoch", "step"] = option("epoch", "change the rate once per epoch (NVIDIA) or every step")
    warmup_epochs: float = option(16, "linear warm-up", low=0)
    end_lr: float = option(0.0, "final rate of the cosine schedule", low=0)
    lr_step_epochs: list[int] = option(
        [30, 60, 80], "epochs at which the step schedule multiplies by lr_step_gamma", low=0
    )
    lr_step_gamma: float = option(0.1, "factor of the step schedule", low=0)
    momentum: float = option(0.9, "of RMSprop and SGD", low=0, high=1)
    nesterov: bool = option(False, "SGD only")
    weight_decay: float = option(1e-5, "L2 on everything but batch norm", low=0)
    bn_weight_decay: bool = option(False, "apply weight decay to batch norm as well")
    rmsprop_alpha: float = option(0.9, "smoothing of the squared gradient", low=0, high=1)
    rmsprop_eps: float = option(0.01, "added outside the root", low=0)
    adam_betas: list[float] = option([0.9, 0.999], "of AdamW", low=0, high=1 - 1e-6)
    label_smoothing: float = option(0.1, "training loss only; validation is plain cross entropy", low=0, high=1)
    class_weights: str | None = option(
        None,
        "what a class weighs in the training loss: `balanced`, a CSV or JSON file of classes and weights, or `none`",
    )
    layer_decay: float = option(
        1.0,
        "learning rate of each stage, as a share of the next one's, from the classifier down; 1 is off",
        low=0.01,
        high=1,
    )
    freeze: Literal["none", "stages", "backbone"] = option(
        "none", "keep a --model's stem and stages as they are, or its whole backbone: all but the classifier"
    )
    freeze_epochs: int = option(0, "freeze for so many epochs, then train everything; 0 is all epochs", low=0)
    gradient_clip: float = option(0.0, "largest gradient norm, 0 is off", low=0)
    distillation_weight: float = option(
        0.0, "share of the loss that follows a teacher's logits instead of the labels", low=0, high=1
    )
    distillation_temperature: float = option(1.0, "softens teacher and student alike", low=0.01)
    teacher: str | None = option(None, "checkpoint to distil from; the one of --model by default")
    ema_decay: float = option(0.0, "moving average of the weights, validated and saved too; 0 is off", low=0, high=1)
    early_stopping_patience: int = option(0, "stop after so many epochs without a new best, 0 is off", low=0)


@dataclass(frozen=True)
class PrecisionOptions:
    _argument_group_name = "precision and speed"

    precision: Literal["fp32", "tf32", "fp16", "bf16"] | None = option(
        None, "what `accelerate launch` says, or else the GPU's fastest; fp32 on a CPU"
    )
    loss_scale: float = option(128.0, "initial fp16 loss scale", low=1)
    dynamic_loss_scale: bool = option(False, "let the loss scale grow every 100 steps; otherwise it only shrinks")
    channels_last: bool | None = option(None, "memory format; by default on, but for fp32 and tf32 on CUDA")
    compile: Literal["none", "full", "blocks", "graphs"] = option(
        "none", "torch.compile the model as a whole, stage by stage, or as CUDA graphs"
    )
    deterministic: bool = option(False, "the same bits from every run on the same kind of GPU; slower")


@dataclass(frozen=True)
class QuantizationOptions:
    _argument_group_name = "quantization (qat)"

    placement: Literal["none", "nvidia", "cpu"] = option("none", "where quantizers stand; `none` is a float model")
    calibration_method: Literal["percentile", "entropy", "max"] = option("percentile", "ranges of activations")
    calibration_percentile: float = option(
        99.99, "share of the magnitudes, in percent, that a range covers", low=1, high=100
    )
    calibration_batches: int = option(10, "training batches per device to calibrate on", low=1)
    skip_calibration: bool = option(False, "keep the ranges of a --model that is quantized already")
    narrow_range: bool = option(False, "integers -127 to 127 instead of -128 to 127")
    qat_batch_norm: Literal["train", "frozen", "folded"] = option(
        "train", "go on as in training, keep the statistics, or fold into the convolutions before fine-tuning"
    )
    float_layers: list[str] = option([], "layers without quantizers, by module name; shell wildcards")
    sensitivity: Literal["none", "sqnr", "accuracy"] = option(
        "none", "report what each layer's quantizers cost alone: signal to noise of the logits, or top-1"
    )
    sensitivity_batches: int = option(4, "validation batches per device for that report, 0 is all", low=0)


@dataclass(frozen=True)
class RunOptions:
    _argument_group_name = "run"

    output_dir: str = option("runs/train", "where the model, checkpoints, metrics and plots go")
    overwrite: bool = option(False, "start afresh in an output_dir that holds another run")
    seed: int = option(42, "of weights, sample order and augmentation", low=0, high=2**32 - 1)
    resume: str | None = option(
        None, "continue from a checkpoint folder, or `auto`: the newest one in output_dir if any"
    )
    accept_changed_data: bool = option(False, "go on with --resume although images were added, removed or replaced")
    run_epochs: int = option(0, "stop after so many epochs of this launch (staged jobs), 0 is all of them", low=0)
    select_best: Literal["top1", "macro_recall", "macro_f1", "loss", "map", "f1"] | None = option(
        None, "figure that decides which epoch is best, and early stopping; top1, or map with several labels per image"
    )
    report: bool = option(
        True,
        "draw the first batch, the curves after every epoch, and write a report on the best model to output_dir/report",
    )
    top_k: int = option(5, "k of the second accuracy", low=1)
    log_every: int = option(20, "optimizer steps between two lines of metrics", low=1)
    report_to: list[str] = option([], "Accelerate trackers: tensorboard, wandb, trackio, …")
    profile: bool = option(False, "write a torch profiler trace of a few steps to output_dir/profile")
    quiet: bool = option(False, "no progress bars, one line per epoch")
    checkpoint_every_epochs: int = option(1, "0 writes none but the last", low=0)
    checkpoint_every_steps: int = option(0, "also within an epoch, every so many optimizer steps", low=0)
    checkpoint_every_minutes: float = option(0.0, "also within an epoch, every so many minutes", low=0)
    keep_checkpoints: int = option(2, "how many of the newest to keep; the best one is kept besides", low=1)
    push_to_hub: bool = option(False, "upload output_dir when done")
    hub_model_id: str | None = option(None, "repository to push to, e.g. me/effnet-b4")
    hub_private: bool = option(False, "create it private")
    hub_revision: str | None = option(None, "branch to push to")


TRAINING_GROUPS = (ModelOptions, DataOptions, OptimizationOptions, PrecisionOptions, RunOptions)
GROUPS = (*TRAINING_GROUPS, QuantizationOptions)
