"""`build_loaders`: one interface in front of every backend."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from ..checkpoint import require_one_size
from ..errors import UserError
from ..image_processing_efficientnet_nv import EfficientNetNVImageProcessor
from ..recipes import Recipe
from ..run_folder import RunFolder
from .bad_files import BadFiles
from .class_weights import class_weights
from .cores import choose_workers, own_cores
from .dali import dali_is_installed, require_dali
from .dali_pipeline import DaliPipeline, EncodedBatches, EvaluationPlanner, TrainPlanner
from .device_stage import IMAGENET_SIZES, BatchMixer, DeviceStage, RandomEraser, SyntheticBatches, SyntheticImages
from .listing import DataListing
from .opening import open_data
from .pictures import Reading
from .regions import library, require_library
from .remote import require_plain
from .sampler import BalancedTrainingPlan, BatchPlan, TrainingPlan, ValidationPlan
from .source import DataSource, Split
from .stream import StreamedSplit, StreamedTrainingPlan, StreamedValidationPlan
from .survey import images_per_class
from .transforms import EvaluationTransform, TrainTransform
from .worker_pool import MicroBatches, WorkerPool


FREE = 0.05  # a device that waits less than this share of its time is kept busy
log = logging.getLogger(__name__)


class Loader:
    """Batches of one split on this process's device.

    Attributes:
        num_samples: images in the split, all processes together.
        updates_per_epoch: optimizer steps per pass (training), or this process's batches (validation).
        bad_files: what could not be read so far.
        num_workers: loader processes.
    """

    def __init__(self, plan, backend, stage: DeviceStage | None, bad_files: BadFiles, kind: str, device_type: str):
        self.num_samples = plan.num_samples
        self.updates_per_epoch = plan.updates_per_epoch
        self.bad_files = bad_files
        self.num_workers = backend.num_workers
        self._plan = plan
        self._backend = backend
        self._stage = stage
        self._kind = kind
        self._device_type = device_type
        self._trains = isinstance(plan, TrainingPlan)

    def epoch(self, epoch: int = 0, start_update: int = 0) -> Iterator[dict]:
        """Device batches `{"pixel_values", "labels", "index"}` of one pass, from update `start_update` on.

        `pixel_values` is float32 (N, 3, H, W), in validation what the processor gives; `labels` int64 (N,), or float32
        (N, classes) under mixup and cutmix, and of 0 and 1 where an image has several; `index` int64 (N,), on the CPU,
        the sample numbers. Training gives `plan.accumulation_steps` batches per update. What `start_update` skips is
        not decoded, and read only from a stream.

        Raises:
            UserError: too many unreadable files, or a loader process died.
        """
        batches = self._backend.batches(self._plan.requests(epoch, start_update))
        return batches if self._stage is None else self._stage(self._checked(batches))

    def limit(self, data_wait: float, compute: float) -> str:
        """What limits the run, in a sentence, from the seconds spent waiting for this loader and on all else."""
        return limit_sentence(
            data_wait,
            compute,
            loader=self._kind,
            num_workers=self.num_workers,
            free_cores=own_cores() - self.num_workers - 1,
            device_type=self._device_type,
            dali_installed=dali_is_installed(),
            decodes_parts=library() is not None,
        )

    def close(self) -> None:
        """Ends the loader processes; the loader must not be used afterwards."""
        self._backend.close()

    def _checked(self, batches):
        for batch in batches:
            for file in self.bad_files.report(batch["bad"]):
                log.warning("%s; it is passed over", file)
            if len(batch["index"]):
                yield batch
            elif self._trains:
                raise UserError(
                    "none of the images of a step on one device could be read, nor any that were tried in their place"
                    f" (the last: {batch['bad'][-1]}); mend the data, or raise --per_device_batch_size."
                )


@dataclass
class Loaders:
    """What `build_loaders` returns; also a context manager that closes both.

    Attributes:
        class_names: in label order.
        train: None when built with `train=False`.
        listing: describes the images of both, by name, label and size; asks for the size of every file, so one process
            calls it.
        notes_on_copies: given that description, sentences about images that are trained and validated on.
        notes: sentences about the data worth printing once.
        present, label_sets: see `DataSource`.
        class_weights: float32 (classes,), of the training loss; None where all are alike.
        images: the validation images, to be looked at again; None where that cannot be: of a stream, or synthetic.
    """

    class_names: list[str]
    train: Loader | None
    val: Loader
    listing: Callable[[], DataListing]
    notes_on_copies: Callable[[DataListing], list[str]]
    notes: list[str] = field(default_factory=list)
    present: np.ndarray | None = None
    label_sets: np.ndarray | None = None
    class_weights: np.ndarray | None = None
    images: Split | None = None

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
    processor: EfficientNetNVImageProcessor,
    plan: BatchPlan,
    device: torch.device | str = "cpu",
    *,
    train: bool = True,
    class_names: list[str] | None = None,
    channels_last: bool = True,
) -> Loaders:
    """The loaders that a recipe's data options describe, for images prepared as the processor says.

    Args:
        recipe: its `DataOptions`, `seed`, `num_labels` and `output_dir` are read, but for `interpolation` and
            `resize_margin`, which the processor was made from.
        processor: its `crop_size` is the size of every image and its filter resizes all of them; validation batches are
            its `pixel_values`, training batches are rescaled and normalised as it does.
        plan: images per device, processes, and which of them this is.
        train: False builds the validation loader only.
        class_names: label order to keep, for weights that already have one.

    Raises:
        UserError: no data, unusable data, a batch larger than the data, a missing optional package, a processor whose
            images make no batch or that the loader cannot follow.
    """
    device = torch.device(device)
    require_one_size(processor, f"--model {recipe.model}" if recipe.model else "the image processor")
    source = _open_source(recipe, device, train, class_names)
    if train and recipe.sampler == "balanced" and source.label_sets is not None:
        raise UserError(
            "--sampler balanced needs one label per image: with several, to take one class more often takes others"
            " along; use --class_weights balanced."
        )
    weights = _class_weights(recipe, source) if train and recipe.class_weights is not None else None

    def loader(split, trains: bool) -> Loader:
        mixer, eraser = None, None
        if trains and recipe.random_erasing:
            eraser = RandomEraser(recipe.seed, recipe.random_erasing)
        if trains and (recipe.mixup or recipe.cutmix):
            mixer = BatchMixer(len(source.class_names), recipe.seed, recipe.mixup, recipe.cutmix)
        stage: DeviceStage | None = DeviceStage(device, processor, channels_last, mixer, source.label_sets, eraser)
        backend: SyntheticBatches | DaliPipeline | WorkerPool
        if recipe.loader == "synthetic":
            classes = len(source.class_names)
            backend = SyntheticBatches(device, processor, classes, recipe.seed, channels_last, mixer, eraser)
            stage = None
        elif recipe.loader == "dali-gpu":
            backend = _dali_pipeline(recipe, processor, plan, device, split, trains)
        else:
            backend = _worker_pool(recipe, processor, plan, device, split, trains)
        listed = RunFolder(recipe.output_dir).bad_files if train else None  # `validate` has no folder of its own
        name = "train" if trains else "val"
        bad_files = BadFiles(listed, len(split), recipe.max_bad_files, recipe.strict, name)
        return Loader(_sample_plan(recipe, plan, split, trains), backend, stage, bad_files, recipe.loader, device.type)

    training = loader(source.train, trains=True) if train else None
    validation = loader(source.val, trains=False)
    streams: list = [split for split in (source.train, source.val) if isinstance(split, StreamedSplit)]
    source.notes += filter(None, (split.note_on_files(plan.world_size) for split in streams))
    return Loaders(
        source.class_names, training, validation, source.listing, source.notes_on_copies,
        [*source.notes, *Reading.of(recipe, processor).notes], source.present,
        source.label_sets, class_weights=weights, images=source.val if isinstance(source.val, Split) else None,
    )  # fmt: skip


def _open_source(recipe: Recipe, device: torch.device, train: bool, class_names: list[str] | None) -> DataSource:
    """The images, after the refusals that need none."""
    if recipe.loader == "synthetic":
        if recipe.dataset_name:  # the run's files name it, though it is not read
            require_plain(recipe.dataset_name, "--dataset_name")
        names = class_names or [str(i) for i in range(recipe.num_labels or 1000)]
        return DataSource(names, *map(SyntheticImages, IMAGENET_SIZES))  # type: ignore[arg-type]
    _require_loader(recipe, device)
    return open_data(recipe, train, class_names)


def _require_loader(recipe: Recipe, device: torch.device) -> None:
    if recipe.loader == "dali-cpu":
        require_library()
    if recipe.loader != "dali-gpu":
        return
    require_dali()
    if device.type != "cuda":
        raise UserError("--loader dali-gpu decodes on a CUDA GPU and this run has none; use --loader dali-cpu.")


def evaluation_backend(
    recipe: Recipe, processor: EfficientNetNVImageProcessor, device: torch.device, split: Split
) -> "DaliPipeline | WorkerPool":
    """What reads and prepares images for evaluation as a recipe's `loader`, `num_workers`, `per_device_batch_size`,
    `bit_depth` and `max_pixels` say; whoever asks it for batches says of which images.

    Raises:
        UserError: the loader is not installed, needs a GPU, or cannot follow the processor.
    """
    require_one_size(processor, f"--model {recipe.model}")
    _require_loader(recipe, device)
    assert recipe.per_device_batch_size is not None
    make = _dali_pipeline if recipe.loader == "dali-gpu" else _worker_pool
    return make(recipe, processor, BatchPlan(recipe.per_device_batch_size), device, split, False)


def _class_weights(recipe: Recipe, source: DataSource) -> np.ndarray:
    """Those that the recipe asks for; says in the source's notes what they are."""
    assert isinstance(source.train, Split) and recipe.class_weights is not None
    names, several = source.class_names, source.label_sets is not None
    counts = images_per_class(source.train.labels, len(names), source.label_sets)
    even = recipe.sampler == "balanced"
    weights = class_weights(recipe.class_weights, names, counts, len(source.train), several, even)
    least, most = int(weights.argmin()), int(weights.argmax())
    source.notes.append(
        f"class weights of the training loss: {weights[least]:.3g} ({names[least]}) to {weights[most]:.3g}"
        f" ({names[most]}); the validation loss has none."
    )
    return weights


def _sample_plan(recipe: Recipe, plan: BatchPlan, split, train: bool):
    streamed = {"split": split} if isinstance(split, StreamedSplit) else {}
    if train:
        sizes = len(split), plan.per_device, recipe.seed, plan.rank, plan.world_size, plan.accumulation_steps
        if recipe.sampler == "balanced":
            return BalancedTrainingPlan(*sizes, labels=split.labels)
        return StreamedTrainingPlan(*sizes, split=split) if streamed else TrainingPlan(*sizes)
    kind = StreamedValidationPlan if streamed else ValidationPlan
    return kind(len(split), plan.per_device, plan.rank, plan.world_size, **streamed)


def _worker_pool(recipe: Recipe, processor, plan: BatchPlan, device: torch.device, split, train: bool) -> WorkerPool:
    transform: TrainTransform | EvaluationTransform = EvaluationTransform(processor)
    if train:
        library()  # imported once, before the workers are forked
        transform = TrainTransform(processor, **_augmentation(recipe), reducing_gap=recipe.reducing_gap)
    reading = Reading.of(recipe, processor)
    images = MicroBatches(split, transform, recipe.seed, replace_bad=train, reading=reading)
    workers = choose_workers(device.type) if recipe.num_workers is None else recipe.num_workers
    return WorkerPool(images, workers, recipe.prefetch_factor, pin_memory=device.type == "cuda")


def _dali_pipeline(recipe: Recipe, processor, plan: BatchPlan, device: torch.device, split, train: bool):
    planner = TrainPlanner(processor, **_augmentation(recipe)) if train else EvaluationPlanner(processor)
    files = EncodedBatches(split, planner, recipe.seed, replace_bad=train, reading=Reading.of(recipe, processor))
    # They only read files: a few will do.
    workers = min(choose_workers(device.type), 4) if recipe.num_workers is None else recipe.num_workers
    return DaliPipeline(files, workers, recipe.prefetch_factor, plan.per_device, device)


def _augmentation(recipe: Recipe) -> dict:
    names = "crop_scale", "horizontal_flip", "augmentation"
    strength = recipe.randaugment_operations, recipe.randaugment_magnitude
    return {"randaugment": strength, **{name: getattr(recipe, name) for name in names}}


def limit_sentence(
    data_wait: float,
    compute: float,
    *,
    loader: str = "imagefolder",
    num_workers: int = 0,
    free_cores: float = 0,
    device_type: str = "cpu",
    dali_installed: bool = False,
    decodes_parts: bool = True,
) -> str:
    """Says whether loading or computing limits a run, and what to change.

    Args:
        data_wait: seconds spent waiting for batches.
        compute: seconds spent on everything else of the same steps.
        loader: `--loader`.
        num_workers: loader processes of this training process.
        free_cores: cores that this process could still give to loading.
        device_type: "cuda" or "cpu".
        dali_installed: whether DALI could be used.
        decodes_parts: whether nvImageCodec is installed, which decodes only what a crop needs.
    """
    total = data_wait + compute
    share = data_wait / total if total > 0 else 0.0
    if share < FREE:
        return f"The device is the limit: it waits for data {share:.1%} of the time; faster loading would not help."
    gain = f", and could go up to {total / compute:.1f}x as fast" if compute * 100 > total else ""
    if loader == "synthetic":
        advice = "synthetic batches are made once, in the first step; measure a later one"
    elif free_cores >= 1:
        advice = f"raise --num_workers from {num_workers} to {num_workers + int(free_cores)}, there are idle cores"
    elif device_type == "cuda" and loader != "dali-gpu":
        advice = "all cores are busy, so let the GPU decode: --loader dali-gpu"
        advice += "" if dali_installed else " (pip install nvidia-dali-cuda130)"
    elif loader == "imagefolder" and not decodes_parts:
        advice = "all cores are busy; pip install nvidia-nvimgcodec-cu13, and only what a crop needs is decoded"
    else:
        advice = "all cores are busy; store the images smaller, short side about 1.5 times the crop, or augment less"
    return f"The loader is the limit: the device waits for data {share:.0%} of the time{gain}; {advice}."
