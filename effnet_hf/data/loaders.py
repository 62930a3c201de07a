"""`build_loaders`: one interface in front of every backend."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..errors import UserError
from ..image_processing_efficientnet_nv import IMAGENET_MEAN, IMAGENET_STD, RESIZE_MARGIN
from .bad_files import BadFiles
from .imagefolder import MicroBatches, WorkerPool
from .mixup import BatchMixer
from .prefetch import DeviceStage
from .sampler import TrainingPlan, ValidationPlan
from .source import DataSource, Split
from .synthetic import IMAGENET_SIZES, SyntheticBatches
from .transforms import EvaluationTransform, TrainTransform
from .workers import choose_workers


log = logging.getLogger(__name__)


class Loader:
    """Batches of one split on this process's device.

    Attributes:
        num_samples: pictures in the split, all processes together.
        updates_per_epoch: optimizer steps per pass (training), or this process's batches (validation).
        bad_files: what could not be read so far.
        num_workers: loader processes.
    """

    def __init__(self, plan, backend, stage, bad_files: BadFiles, num_workers: int = 0):
        self.num_samples = plan.num_samples
        self.updates_per_epoch = plan.updates_per_epoch
        self.bad_files = bad_files
        self.num_workers = num_workers
        self._plan = plan
        self._backend = backend
        self._stage = stage

    def epoch(self, epoch: int = 0, start_update: int = 0) -> Iterator[dict]:
        """Device batches `{"pixel_values", "labels", "index"}` of one pass, from update `start_update` on.

        `pixel_values` is float32 (N, 3, S, S), normalised; `labels` int64 (N,), or float32 (N, classes) under mixup and
        cutmix; `index` int64 (N,) the sample numbers. Training gives `steps_per_update` batches per update. What
        `start_update` skips is not even read.

        Raises:
            UserError: too many unreadable files, or a loader process died.
        """
        batches = self._backend.batches(self._plan.requests(epoch, start_update))
        return batches if self._stage is None else self._stage(self._checked(batches))

    def close(self) -> None:
        """Ends the loader processes; the loader must not be used afterwards."""
        self._backend.close()

    def _checked(self, batches):
        for batch in batches:
            for file in self.bad_files.report(batch["bad"]):
                log.warning("%s %s; another picture takes its place", file.name, file.reason)
            if len(batch["index"]):
                yield batch


@dataclass
class Loaders:
    """What `build_loaders` returns; also a context manager that closes both.

    Attributes:
        class_names: in label order.
        train: None when built with `train=False`.
        notes: sentences about the data worth printing once.
    """

    class_names: list[str]
    train: Loader | None
    val: Loader
    notes: list[str] = field(default_factory=list)

    def close(self) -> None:
        for loader in (self.train, self.val):
            if loader is not None:
                loader.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def build_loaders(
    recipe,
    *,
    image_size: int,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    per_device_batch_size: int = 32,
    steps_per_update: int = 1,
    train: bool = True,
    mean: list[float] = IMAGENET_MEAN,
    std: list[float] = IMAGENET_STD,
    resize_margin: int = RESIZE_MARGIN,
    class_names: list[str] | None = None,
    channels_last: bool = True,
) -> Loaders:
    """The loaders that a recipe's data options describe.

    Args:
        recipe: its `DataOptions`, `seed`, `num_labels` and `output_dir` are read.
        image_size: side of the square picture, pixels.
        steps_per_update: micro-batches per optimizer step (gradient accumulation).
        train: False builds the validation loader only.
        mean, std: per channel, of pictures scaled to [0, 1].
        resize_margin: evaluation resizes the short side to `image_size + resize_margin`.
        class_names: label order to keep, for weights that already have one.

    Raises:
        UserError: no data, unusable data, a batch larger than the data, a missing optional package.
    """
    setting = _Setting(
        recipe, image_size, torch.device(device), rank, world_size, per_device_batch_size, steps_per_update,
        list(mean), list(std), resize_margin, channels_last,
    )  # fmt: skip
    if recipe.loader == "synthetic":
        return _synthetic(setting, class_names, train)
    source = _open_source(recipe, train, class_names)
    if recipe.num_labels is not None and recipe.num_labels != len(source.class_names):
        raise UserError(f"--num_labels is {recipe.num_labels}, but the data has {len(source.class_names)} classes.")
    training = setting.training_loader(source.train, source.class_names) if train else None
    validation = setting.validation_loader(source.val)
    return Loaders(source.class_names, training, validation, source.notes)


def _open_source(recipe, train: bool, class_names) -> DataSource:
    if recipe.data_dir:
        return DataSource.from_folder(recipe.data_dir, recipe.val_fraction, train, class_names)
    raise UserError("no data: give --data_dir FOLDER, --dataset_name USER/NAME, or --loader synthetic.")


@dataclass
class _Setting:
    recipe: object
    image_size: int
    device: torch.device
    rank: int
    world_size: int
    per_device_batch_size: int
    steps_per_update: int
    mean: list
    std: list
    resize_margin: int
    channels_last: bool

    def training_plan(self, num_samples: int) -> TrainingPlan:
        return TrainingPlan(
            num_samples, self.per_device_batch_size, self.recipe.seed, self.rank, self.world_size, self.steps_per_update
        )

    def validation_plan(self, num_samples: int) -> ValidationPlan:
        return ValidationPlan(num_samples, self.per_device_batch_size, self.rank, self.world_size)

    def mixer(self, num_classes: int) -> BatchMixer | None:
        if not (self.recipe.mixup or self.recipe.cutmix):
            return None
        return BatchMixer(num_classes, self.recipe.seed, self.recipe.mixup, self.recipe.cutmix)

    def stage(self, mixer=None) -> DeviceStage:
        return DeviceStage(self.device, self.mean, self.std, self.channels_last, mixer)

    def training_loader(self, split: Split, class_names: list[str]) -> Loader:
        recipe = self.recipe
        transform = TrainTransform(
            self.image_size, recipe.interpolation, recipe.crop_scale, recipe.horizontal_flip, recipe.augmentation
        )
        stage = self.stage(self.mixer(len(class_names)))
        listing = Path(recipe.output_dir) / "bad_files.txt"
        bad_files = BadFiles(listing, len(split), recipe.max_bad_files, recipe.strict)
        return self._loader(self.training_plan(len(split)), split, transform, stage, bad_files, replace_bad=True)

    def validation_loader(self, split: Split) -> Loader:
        transform = EvaluationTransform(self.image_size, self.recipe.interpolation, self.resize_margin)
        bad_files = BadFiles(None, len(split), self.recipe.max_bad_files, self.recipe.strict)
        return self._loader(self.validation_plan(len(split)), split, transform, self.stage(), bad_files, replace_bad=False)

    def _loader(self, plan, split, transform, stage, bad_files, replace_bad) -> Loader:
        workers = self.recipe.num_workers
        if workers is None:
            workers = choose_workers(self.device.type)
        dataset = MicroBatches(split, transform, self.recipe.seed, replace_bad)
        pool = WorkerPool(dataset, workers, self.recipe.prefetch_factor, pin_memory=self.device.type == "cuda")
        return Loader(plan, pool, stage, bad_files, workers)


def _synthetic(setting: _Setting, class_names, train: bool) -> Loaders:
    names = class_names or [str(i) for i in range(setting.recipe.num_labels or 1000)]

    def loader(plan, mixer):
        backend = SyntheticBatches(
            setting.image_size, len(names), setting.device, setting.channels_last, setting.recipe.seed, mixer
        )
        return Loader(plan, backend, None, BadFiles(None, plan.num_samples))

    training = loader(setting.training_plan(IMAGENET_SIZES[0]), setting.mixer(len(names))) if train else None
    return Loaders(names, training, loader(setting.validation_plan(IMAGENET_SIZES[1]), None))
