"""`build_loaders`: one interface in front of every backend."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..errors import UserError
from ..image_processing_efficientnet_nv import IMAGENET_MEAN, IMAGENET_STD, RESIZE_MARGIN
from ..recipes import Recipe
from .bad_files import BadFiles
from .dali import DaliDecoder, dali_is_installed, require_dali
from .dali_augment import DaliPolicy
from .dali_pipeline import DaliPipeline, EncodedBatches, EvaluationPlanner, TrainPlanner
from .imagefolder import MicroBatches, WorkerPool
from .limits import limit_sentence
from .mixup import BatchMixer
from .named_dataset import StreamedSplit, StreamedTrainingPlan, StreamedValidationPlan, open_named
from .prefetch import DeviceStage
from .sampler import TrainingPlan, ValidationPlan
from .source import DataSource, Split
from .synthetic import IMAGENET_SIZES, SyntheticBatches
from .transforms import EvaluationTransform, TrainTransform
from .workers import choose_workers, own_cores


log = logging.getLogger(__name__)


class Loader:
    """Batches of one split on this process's device.

    Attributes:
        num_samples: pictures in the split, all processes together.
        updates_per_epoch: optimizer steps per pass (training), or this process's batches (validation).
        bad_files: what could not be read so far.
        num_workers: loader processes.
    """

    def __init__(self, plan, backend, stage, bad_files: BadFiles, setting: "Setting", num_workers: int = 0):
        self.num_samples = plan.num_samples
        self.updates_per_epoch = plan.updates_per_epoch
        self.bad_files = bad_files
        self.num_workers = num_workers
        self._plan = plan
        self._backend = backend
        self._stage = stage
        self._setting = setting

    def epoch(self, epoch: int = 0, start_update: int = 0) -> Iterator[dict]:
        """Device batches `{"pixel_values", "labels", "index"}` of one pass, from update `start_update` on.

        `pixel_values` is float32 (N, 3, S, S), normalised; `labels` int64 (N,), or float32 (N, classes) under mixup and
        cutmix; `index` int64 (N,), on the CPU, the sample numbers. Training gives `steps_per_update` batches per
        update. What `start_update` skips is not decoded, and read only from a stream.

        Raises:
            UserError: too many unreadable files, or a loader process died.
        """
        batches = self._backend.batches(self._plan.requests(epoch, start_update))
        return batches if self._stage is None else self._stage(self._checked(batches))

    def limit(self, data_wait: float, compute: float) -> str:
        """What limits the run, in a sentence, from the seconds spent waiting for this loader and on all else."""
        setting = self._setting
        return limit_sentence(
            data_wait,
            compute,
            loader=setting.recipe.loader,
            num_workers=self.num_workers,
            free_cores=own_cores() - self.num_workers - 1,
            device_type=setting.device.type,
            dali_installed=dali_is_installed(),
        )

    def close(self) -> None:
        """Ends the loader processes; the loader must not be used afterwards."""
        self._backend.close()

    def _checked(self, batches):
        for batch in batches:
            for file in self.bad_files.report(batch["bad"]):
                log.warning("%s %s; it is passed over", file.name, file.reason)
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
    recipe: Recipe,
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
    setting = Setting(
        recipe, image_size, torch.device(device), rank, world_size, per_device_batch_size, steps_per_update,
        list(mean), list(std), resize_margin, channels_last,
    )  # fmt: skip
    if recipe.loader == "synthetic":
        return _synthetic(setting, class_names, train)
    if recipe.loader.startswith("dali"):
        require_dali()
    if recipe.loader == "dali-gpu" and setting.device.type != "cuda":
        raise UserError("--loader dali-gpu decodes on a CUDA GPU and this run has none; use --loader dali-cpu.")
    source = _open_source(recipe, train, class_names)
    if recipe.num_labels is not None and recipe.num_labels != len(source.class_names):
        raise UserError(f"--num_labels is {recipe.num_labels}, but the data has {len(source.class_names)} classes.")
    training = setting.loader(source.train, source.class_names, train=True) if train else None
    validation = setting.loader(source.val, source.class_names, train=False)
    return Loaders(source.class_names, training, validation, source.notes)


def _open_source(recipe, train: bool, class_names) -> DataSource:
    if recipe.data_dir:
        return DataSource.from_folder(recipe.data_dir, recipe.val_fraction, train, class_names)
    if recipe.dataset_name:
        name, config = recipe.dataset_name, recipe.dataset_config
        return open_named(name, config, recipe.streaming, recipe.val_fraction, train, class_names)
    raise UserError("no data: give --data_dir FOLDER, --dataset_name USER/NAME, or --loader synthetic.")


@dataclass
class Setting:
    """The arguments of `build_loaders`, and how each part of a loader follows from them."""

    recipe: Recipe
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

    def loader(self, split: Split | StreamedSplit, class_names: list[str], train: bool) -> Loader:
        recipe = self.recipe
        workers = choose_workers(self.device.type) if recipe.num_workers is None else recipe.num_workers
        if recipe.loader == "dali-gpu":
            workers = min(workers, 4) if recipe.num_workers is None else workers  # they only read files
            backend: DaliPipeline | WorkerPool = self.dali_pipeline(split, train, workers)
        else:
            backend = self.worker_pool(split, train, workers)
        listing = Path(recipe.output_dir) / "bad_files.txt" if train else None
        bad_files = BadFiles(listing, len(split), recipe.max_bad_files, recipe.strict)
        mixer = self.mixer(len(class_names)) if train else None
        stage = DeviceStage(self.device, self.mean, self.std, self.channels_last, mixer)
        return Loader(self.plan(split, train), backend, stage, bad_files, self, workers)

    def plan(self, split, train: bool):
        streamed = {"split": split} if isinstance(split, StreamedSplit) else {}
        if train:
            return (StreamedTrainingPlan if streamed else TrainingPlan)(
                num_samples=len(split), per_device_batch_size=self.per_device_batch_size, seed=self.recipe.seed,
                rank=self.rank, world_size=self.world_size, steps_per_update=self.steps_per_update, **streamed,
            )  # fmt: skip
        kind = StreamedValidationPlan if streamed else ValidationPlan
        return kind(len(split), self.per_device_batch_size, self.rank, self.world_size, **streamed)

    def worker_pool(self, split, train: bool, workers: int) -> WorkerPool:
        recipe = self.recipe
        if train:
            transform: TrainTransform | EvaluationTransform = TrainTransform(
                self.image_size, recipe.interpolation, recipe.crop_scale, recipe.horizontal_flip, recipe.augmentation
            )
        else:
            transform = EvaluationTransform(self.image_size, recipe.interpolation, self.resize_margin)
        decoder = DaliDecoder(self.per_device_batch_size) if recipe.loader == "dali-cpu" else None
        pictures = MicroBatches(split, transform, recipe.seed, replace_bad=train, decoder=decoder)
        return WorkerPool(pictures, workers, recipe.prefetch_factor, pin_memory=self.device.type == "cuda")

    def dali_pipeline(self, split, train: bool, workers: int) -> DaliPipeline:
        recipe = self.recipe
        if train:
            policy = None if recipe.augmentation == "none" else DaliPolicy(recipe.augmentation, self.image_size)
            planner: TrainPlanner | EvaluationPlanner = TrainPlanner(
                self.image_size, recipe.crop_scale, recipe.horizontal_flip, policy
            )
        else:
            planner = EvaluationPlanner(self.image_size, self.resize_margin)
        files = EncodedBatches(split, planner, recipe.seed, replace_bad=train)
        return DaliPipeline(
            files, workers, recipe.prefetch_factor, recipe.interpolation, self.per_device_batch_size, self.device
        )

    def mixer(self, num_classes: int) -> BatchMixer | None:
        if not (self.recipe.mixup or self.recipe.cutmix):
            return None
        return BatchMixer(num_classes, self.recipe.seed, self.recipe.mixup, self.recipe.cutmix)


def _synthetic(setting: Setting, class_names, train: bool) -> Loaders:
    names = class_names or [str(i) for i in range(setting.recipe.num_labels or 1000)]

    def loader(train: bool):
        plan = setting.plan(range(IMAGENET_SIZES[0 if train else 1]), train)
        mixer = setting.mixer(len(names)) if train else None
        backend = SyntheticBatches(
            setting.image_size, len(names), setting.device, setting.channels_last, setting.recipe.seed, mixer
        )
        return Loader(plan, backend, None, BadFiles(None, plan.num_samples), setting)

    return Loaders(names, loader(True) if train else None, loader(False))
