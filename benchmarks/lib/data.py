"""How many images per second one core prepares: our loaders beside timm's, torchvision's and `datasets`'.

    python benchmark.py data --data_dir FOLDER

Every row turns the same JPEGs into normalised float32 batches in this process, without workers, with one thread. Speed
is images per second of CPU time, which a busy machine disturbs less than wall time does; the rows take turns within
every round, so that ratios compare like with like.
"""

import contextlib
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from effnet_hf import cli
from effnet_hf.data import BatchPlan, DataSource, DeviceStage, auto_augment, build_loaders, pictures
from effnet_hf.data.dali import require_dali
from effnet_hf.data.folder import open_folder, scan_tree
from effnet_hf.data.regions import library
from effnet_hf.errors import UserError
from effnet_hf.image_processing_efficientnet_nv import IMAGENET_MEAN, IMAGENET_STD, EfficientNetNVImageProcessor
from effnet_hf.recipes import load_recipe
from effnet_hf.training import keep_freed_memory

from .decoders import measure_decoders
from .environment import LOADING, environment, resolve_device
from .flags import settings
from .report import table, write_figures
from .timing import Samples, take_turns


BASELINES = ("timm create_loader", "torchvision reference", "torchvision v2 on tensors")
COPIES = 4  # links to each image, so that a small folder fills whole batches
CPU = torch.device("cpu")


def main(argv: list[str] | None = None) -> int:
    parser = cli.ArgumentParser(prog="benchmark.py data", description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=cli.path, required=True, help="folder of class folders with JPEGs")
    parser.add_argument("--image_size", type=cli.at_least(1), default=224, help="side of the training crop")
    parser.add_argument("--batch_size", type=cli.at_least(1), default=32, help="images per batch")
    parser.add_argument("--batches", type=cli.at_least(1), default=4, help="batches per row and round")
    parser.add_argument(
        "--rounds", type=cli.at_least(1), default=9, help="measured rounds, after one that is not counted"
    )
    parser.add_argument(
        "--megapixels",
        type=cli.at_least(0),
        default=0,
        help="enlarge the images first, with grain; 0 does not",
    )
    parser.add_argument("--augmentation", nargs="+", choices=["none", "autoaugment"], default=["none", "autoaugment"])
    parser.add_argument(
        "--tree_classes", type=cli.at_least(0), default=0, help="also time opening a tree of this many classes x 300"
    )
    parser.add_argument("--output", type=cli.path, help="write the figures to this JSON file as well")
    arguments = parser.parse_args(argv)
    if arguments.output and Path(arguments.output).is_dir():  # not after a quarter of an hour
        raise UserError(f"--output {arguments.output} is a folder; name a file to write to.")
    resolve_device("cpu", threads=1)
    keep_freed_memory()  # for all rows alike, as our training does on a CPU
    figures = {"kind": "data", **environment(CPU, LOADING), "settings": settings(arguments)}
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.megapixels:
            arguments.data_dir = _enlarged(arguments.data_dir, Path(scratch), arguments.megapixels)
        figures["rows"] = measure_throughput(arguments)
        figures["decoders"] = measure_decoders(scan_tree(arguments.data_dir).paths, arguments.rounds)
    if arguments.tree_classes:
        figures["opening"] = measure_opening(arguments.tree_classes)
    for name in ("rows", "decoders", "opening"):
        if name in figures:
            print(f"\n{table(figures[name])}")
    if arguments.output:
        write_figures(figures, arguments.output)
    return 0


def measure_throughput(arguments) -> list[dict]:
    """One dictionary per row: `name`, `augmentation`, and images per CPU second in the best and the median round.

    `ratio` is to the faster of `BASELINES`: best round to best round, and the median of the ratios within a round. What
    else runs on a machine only ever slows a round down, so the best one says most about the code.
    """
    with tempfile.TemporaryDirectory() as scratch:
        root = _linked_tree(Path(arguments.data_dir), Path(scratch), arguments.batch_size)
        steps: dict[tuple[str, str], Callable] = {}
        loaders: list = []
        for augmentation in arguments.augmentation:
            for name, make in _rows().items():
                try:
                    batches = make(root, arguments, augmentation, loaders)
                except ImportError as error:
                    print(f"left out: {name} ({error})")
                    continue
                if (dtype := next(batches).dtype) != torch.float32:
                    raise AssertionError(f"{name} gives {dtype}")
                steps[name, augmentation] = partial(next, batches)
        samples = take_turns(steps, CPU, arguments.rounds, warmup=1, burst=arguments.batches)
        for each in loaders:
            each.close()
    return _ratios(samples, arguments.batch_size)


def _ratios(samples: dict[tuple[str, str], Samples], images: int) -> list[dict]:
    rows = []
    for (name, augmentation), own in samples.items():
        if not min(own.cpu):
            raise UserError(f"a round of {name} is too short for this machine's clock; raise --batches.")
        peers = [samples[key].cpu for key in samples if key[0] in BASELINES and key[1] == augmentation] or [own.cpu]
        rows.append(
            {
                "name": name,
                "augmentation": augmentation,
                "ips_best": images / min(own.cpu),
                "ips_median": images / statistics.median(own.cpu),
                "ratio_best": min(map(min, peers)) / min(own.cpu),
                "ratio_median": statistics.median(min(others) / mine for *others, mine in zip(*peers, own.cpu)),
                "rounds": len(own.cpu),
            }
        )
    return rows


def _rows() -> dict[str, Callable]:
    return {
        "timm create_loader": _timm,
        "torchvision reference": _torchvision,
        "torchvision v2 on tensors": _torchvision_tensors,
        "datasets set_transform": _datasets,
        "effnet_hf imagefolder": _ours("imagefolder"),
        "effnet_hf imagefolder, --reducing_gap 2": _ours("imagefolder", reducing_gap=2),
        "effnet_hf imagefolder, --reducing_gap 1": _ours("imagefolder", reducing_gap=1),
        "effnet_hf dali-cpu": _ours("dali-cpu"),
        "effnet_hf imagefolder without nvImageCodec": _without("decode_region"),
        "effnet_hf imagefolder without nvImageCodec, --reducing_gap 2": _without("decode_region", reducing_gap=2),
        "effnet_hf imagefolder, Pillow only": _without("decode_region", "simplejpeg"),
        "effnet_hf dali-gpu's graph on the CPU": _dali_graph,
    }


class PolicyTransform:
    """Our AutoAugment as a torchvision transform: every row runs the same policy."""

    def __init__(self):
        self._rng = random.Random(0)

    def __call__(self, image):
        return auto_augment.auto_augment(image, self._rng)


def _processor(arguments) -> EfficientNetNVImageProcessor:
    return EfficientNetNVImageProcessor.for_image_size(arguments.image_size)


def _require_dali() -> None:
    try:
        require_dali()
    except UserError as error:
        raise ImportError(error) from None


def _ours(loader: str, **options) -> Callable:
    def make(root, arguments, augmentation, loaders) -> Iterator[torch.Tensor]:
        if loader == "dali-cpu" and library() is None:
            raise ImportError("nvImageCodec is not installed")
        options.update(loader=loader, num_workers=0, augmentation=augmentation, mixup=0)
        recipe = load_recipe("b0", data_dir=str(root), **options)
        ours = build_loaders(recipe, _processor(arguments), BatchPlan(arguments.batch_size))
        loaders.append(ours)
        assert ours.train is not None
        train = ours.train
        return (batch["pixel_values"] for epoch in count() for batch in train.epoch(epoch))

    return make


def _without(*decoders: str, **options) -> Callable:
    """`imagefolder` as if these of the module `pictures` were not installed."""

    def make(root, arguments, augmentation, loaders):
        ours = _ours("imagefolder", **options)(root, arguments, augmentation, loaders)
        while True:
            with contextlib.ExitStack() as stack:
                for name in decoders:
                    stack.enter_context(_replaced(name))
                batch = next(ours)
            yield batch

    return make


@contextlib.contextmanager
def _replaced(name: str) -> Iterator[None]:
    decoder = getattr(pictures, name)
    setattr(pictures, name, None if name == "simplejpeg" else lambda *_: None)
    try:
        yield
    finally:
        setattr(pictures, name, decoder)


def _dali_graph(root, arguments, augmentation, loaders):
    from effnet_hf.data.dali_pipeline import DaliPipeline, EncodedBatches, TrainPlanner
    from effnet_hf.data.sampler import TrainingPlan

    _require_dali()
    split, processor = DataSource.from_folder(str(root)).train, _processor(arguments)
    files = EncodedBatches(split, TrainPlanner(processor, augmentation=augmentation), 0, True)
    pipeline = DaliPipeline(files, 0, 2, arguments.batch_size, CPU, num_threads=1, queue_depth=1)
    loaders.append(pipeline)
    plan, stage = TrainingPlan(len(split), arguments.batch_size), DeviceStage(CPU, processor)
    return (batch["pixel_values"] for e in count() for batch in stage(pipeline.batches(plan.requests(e))))


def _timm(root, arguments, augmentation, loaders):
    from timm.data import create_dataset, create_loader

    dataset = create_dataset("", root=str(root / "train"))
    loader = create_loader(
        dataset, input_size=(3, arguments.image_size, arguments.image_size), batch_size=arguments.batch_size,
        is_training=True, use_prefetcher=False, interpolation="bicubic", color_jitter=None, num_workers=0,
        persistent_workers=False, device=CPU,
    )  # fmt: skip
    if augmentation != "none":
        dataset.transform.transforms.insert(2, PolicyTransform())  # after crop and flip
    return (pixels for _ in count() for pixels, _ in loader)


def _torchvision(root, arguments, augmentation, loaders):
    from torchvision.datasets import ImageFolder

    return _loaded(ImageFolder(root / "train", _reference_transform(arguments, augmentation)), arguments)


def _torchvision_tensors(root, arguments, augmentation, loaders):
    """The reference's `--backend tensor --use-v2`; with a policy by way of Pillow, which ours is written for."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    policy = [] if augmentation == "none" else [v2.ToPILImage(), PolicyTransform(), v2.PILToTensor()]
    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomResizedCrop(arguments.image_size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(0.5),
            *policy,
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    return _loaded(ImageFolder(root / "train", transform), arguments)


def _datasets(root, arguments, augmentation, loaders):
    from datasets import Image

    transform = _reference_transform(arguments, augmentation)
    dataset = open_folder(root / "train")[0].cast_column("image", Image())
    dataset.set_transform(
        lambda rows: {"image": [transform(image.convert("RGB")) for image in rows["image"]], "label": rows["label"]}
    )
    return (batch["image"] for batch in _loaded(dataset, arguments, whole=True))


def _reference_transform(arguments, augmentation):
    """`ClassificationPresetTrain` of torchvision's training reference."""
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(
                arguments.image_size, interpolation=transforms.InterpolationMode.BICUBIC, antialias=True
            ),
            transforms.RandomHorizontalFlip(0.5),
            *([] if augmentation == "none" else [PolicyTransform()]),
            transforms.PILToTensor(),
            transforms.ConvertImageDtype(torch.float32),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def _loaded(dataset, arguments, whole: bool = False) -> Iterator:
    loader = torch.utils.data.DataLoader(dataset, batch_size=arguments.batch_size, shuffle=True, drop_last=True)
    return (batch if whole else batch[0] for _ in count() for batch in loader)


def measure_opening(classes: int) -> list[dict]:
    """Seconds to open a tree of `classes` x 300 hard-linked files: `name`, `seconds`, `pictures`."""
    import datasets
    from torchvision.datasets import ImageFolder

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        root, cache = Path(scratch, "tree"), Path(scratch, "cache")
        for label in range(classes):
            folder = root / f"n{label:08}"
            folder.mkdir(parents=True)
            if label % 200 == 0:  # a file can have 65,000 links on ext4
                source = Path(scratch, f"{label}.jpg")
                Image.new("RGB", (8, 8)).save(source)
            for i in range(300):
                os.link(source, folder / f"{i:04}.jpg")
        for folder in (root, *root.iterdir()):
            os.utime(folder, (time.time() - 100,) * 2)
        saved, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, cache
        datasets.disable_progress_bars()
        try:
            for name, function in {
                "effnet_hf": lambda: open_folder(root),
                "effnet_hf, scan alone": lambda: scan_tree(root),
                "torchvision ImageFolder": lambda: ImageFolder(root),
                "datasets imagefolder": lambda: datasets.load_dataset(
                    "imagefolder", data_dir=str(root), cache_dir=str(cache), split="train"
                ),
            }.items():
                started = time.perf_counter()
                function()
                rows.append({"name": name, "seconds": time.perf_counter() - started, "pictures": classes * 300})
                print(f"{name}: {rows[-1]['seconds']:.2f} s", flush=True)
        finally:
            datasets.config.HF_DATASETS_CACHE = saved
    return rows


def _linked_tree(source: Path, scratch: Path, batch_size: int) -> Path:
    """`train/` with each image of `source` linked `COPIES` times, and a `val/` of one link each."""
    tree = scan_tree(source)
    if len(tree.classes) < 2:
        raise UserError(f"--data_dir {source} needs at least two class folders.")
    if COPIES * len(tree.paths) < batch_size:
        raise UserError(f"--data_dir {source} has {len(tree.paths)} images; lower --batch_size to {COPIES} times that.")
    for split, copies in (("train", COPIES), ("val", 1)):
        for number, (path, label) in enumerate(zip(tree.paths, tree.labels)):
            folder = scratch / split / tree.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            for copy in range(copies):
                (folder / f"{copy}_{number}{Path(path).suffix}").symlink_to(Path(path).resolve())
    return scratch


def _enlarged(source: str, scratch: Path, megapixels: int) -> str:
    """About a dozen of the images, of so many pixels, with noise of 3 grey levels, at quality 90: a camera's bytes per
    pixel, but not its detail."""
    tree, rng = scan_tree(source), np.random.default_rng(0)
    for number in range(0, len(tree.paths), max(1, len(tree.paths) // 12)):
        image = Image.open(tree.paths[number]).convert("RGB")
        factor = (1e6 * megapixels / (image.width * image.height)) ** 0.5
        image = image.resize((round(factor * image.width), round(factor * image.height)), Image.Resampling.BICUBIC)
        grain = rng.normal(0, 3, (image.height, image.width, 3)).round()
        folder = scratch / tree.classes[tree.labels[number]]
        folder.mkdir(exist_ok=True)
        noisy = (np.asarray(image) + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number}.jpg", quality=90, subsampling=2)
    return str(scratch)
