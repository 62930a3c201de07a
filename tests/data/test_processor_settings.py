"""Every loader prepares images as the processor says, or refuses in a sentence.

The table is the specification. Validation batches are compared with `processor(image)["pixel_values"]`:

    same     to the bit
    near     to half a grey level on average: DALI resizes by its own arithmetic; to the bit where nothing is resized
    shape    random pixels of that size
    refused  one of the sentences below
"""

import inspect
import io
import re

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from effnet_hf import EfficientNetNVImageProcessor
from effnet_hf.data import BatchPlan, DataSource, DeviceStage, Picture, TrainTransform, build_loaders
from effnet_hf.data.dali_pipeline import DaliPipeline, EncodedBatches, EvaluationPlanner
from effnet_hf.data.regions import library
from effnet_hf.data.sampler import ValidationPlan, mix
from effnet_hf.errors import UserError

from .torture import encode, photo


TABLE = """
setting                                   imagefolder  dali-cpu  dali-gpu  datasets  streamed  synthetic
the published evaluation                  same         same      near      same      same      shape
bilinear                                  same         same      near      same      same      shape
nearest                                   same         same      refused   same      same      shape
box                                       same         same      refused   same      same      shape
hamming                                   same         same      refused   same      same      shape
lanczos                                   same         same      refused   same      same      shape
a smaller margin                          same         same      near      same      same      shape
a crop wider than high                    same         same      near      same      same      shape
a crop higher than wide                   same         same      near      same      same      shape
a crop larger than the resized image      same         same      near      same      same      shape
one side of the crop larger               same         same      near      same      same      shape
do_resize false                           same         same      near      same      same      shape
do_resize false, a crop that needs edges  same         same      near      same      same      shape
do_rescale false                          same         same      near      same      same      shape
to [-1, 1] by another rescale_factor      same         same      near      same      same      shape
do_normalize false                        same         same      near      same      same      shape
neither rescaled nor normalised           same         same      near      same      same      shape
another mean and std                      same         same      near      same      same      shape
everything at once                        same         same      near      same      same      shape
bit_depth 16                              same         same      near      same      same      shape
do_center_crop false                      refused      refused   refused   refused   refused   refused
"""
SETTINGS: dict[str, dict] = {
    "the published evaluation": {},
    "bilinear": {"resample": Image.BILINEAR},
    "nearest": {"resample": Image.NEAREST},
    "box": {"resample": Image.BOX},
    "hamming": {"resample": Image.HAMMING},
    "lanczos": {"resample": Image.LANCZOS},
    "a smaller margin": {"size": 39},
    "a crop wider than high": {"crop_size": {"height": 24, "width": 48}},
    "a crop higher than wide": {"crop_size": {"height": 53, "width": 20}},
    "a crop larger than the resized image": {"size": 29, "crop_size": {"height": 72, "width": 95}},
    "one side of the crop larger": {"size": 29, "crop_size": {"height": 20, "width": 66}},
    "do_resize false": {"do_resize": False},
    "do_resize false, a crop that needs edges": {"do_resize": False, "crop_size": {"height": 101, "width": 64}},
    "do_rescale false": {"do_rescale": False, "image_mean": [123.7, 116.3, 103.5], "image_std": [58.4, 57.1, 57.4]},
    "to [-1, 1] by another rescale_factor": {"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0},
    "do_normalize false": {"do_normalize": False},
    "neither rescaled nor normalised": {"do_rescale": False, "do_normalize": False},
    "another mean and std": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.7, 0.8, 0.9]},
    "everything at once": {
        "size": 41, "crop_size": {"height": 40, "width": 56}, "resample": Image.BILINEAR, "rescale_factor": 1 / 256,
        "image_mean": 0.5, "image_std": [0.25, 0.5, 1.0],
    },
    "bit_depth 16": {"bit_depth": 16},
    "do_center_crop false": {"do_center_crop": False},
}  # fmt: skip
SENTENCES = {
    "do_center_crop false": "says do_center_crop false, so its images have many sizes and make no batch; set",
    "nearest": "says resample 0, which is nearest; use --loader imagefolder or dali-cpu",
    "box": "says resample 4, which is box; use",
    "hamming": "says resample 5, which is hamming; use",
    "lanczos": "says resample 1, which is lanczos; use",
}


def cells():
    head, *rows = (re.split(r"  +", line) for line in TABLE.strip().splitlines())
    return [(row[0], loader, outcome) for row in rows for loader, outcome in zip(head[1:], row[1:])]


def processor_for(setting: str) -> EfficientNetNVImageProcessor:
    return EfficientNetNVImageProcessor(**{"size": 64, "crop_size": 32, **SETTINGS[setting]})


def files() -> dict[str, bytes]:
    """Modes and aspect ratios that a folder may hold; of odd and even sides, as centres are rounded."""
    turned, deep = Image.Exif(), np.arange(70 * 90, dtype=np.uint16).reshape(70, 90) * 10
    turned[0x0112] = 6
    return {
        "landscape.jpg": encode(photo(0, 120, 81), "JPEG"),
        "portrait.jpg": encode(photo(1, 67, 101), "JPEG"),
        "square.jpg": encode(photo(2, 64, 64), "JPEG"),
        "tiny.jpg": encode(photo(3, 9, 7), "JPEG"),
        "panorama.jpg": encode(photo(4, 400, 12), "JPEG"),
        "tower.jpg": encode(photo(5, 11, 300), "JPEG"),
        "grey.jpg": encode(photo(6, 90, 70).convert("L"), "JPEG"),
        "cmyk.jpg": encode(photo(7, 90, 70).convert("CMYK"), "JPEG"),
        "turned.jpg": encode(photo(8, 90, 70), "JPEG", exif=turned),
        "alpha.png": encode(photo(9, 90, 71).convert("RGBA"), "PNG"),
        "palette.png": encode(photo(10, 90, 70).quantize(64), "PNG"),
        "deep.png": encode(Image.fromarray(deep), "PNG"),
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    """The same files as a folder and as parquet, both for training and validation, in the same order."""
    folder, parquet = tmp_path_factory.mktemp("folder"), tmp_path_factory.mktemp("named")
    rows = []
    for label, name in enumerate(("a", "b")):
        for file, data in sorted(files().items()):
            for split in ("train", "val"):
                (folder / split / name).mkdir(parents=True, exist_ok=True)
                (folder / split / name / file).write_bytes(data)
            rows.append({"image": {"bytes": data, "path": file}, "label": label})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    splits = {name: datasets.Dataset.from_list(rows, features=features) for name in ("train", "validation")}
    sizes = "".join(f"  - {{name: {name}, num_examples: {len(rows)}}}\n" for name in splits)
    kinds = "  - {name: image, dtype: image}\n  - {name: label, dtype: {class_label: {names: {'0': a, '1': b}}}}\n"
    (parquet / "README.md").write_text(f"---\ndataset_info:\n  features:\n{kinds}  splits:\n{sizes}---\n")
    for name, split in splits.items():
        split.to_parquet(parquet / f"{name}-00000-of-00001.parquet")
    return {"folder": str(folder), "named": str(parquet)}


@pytest.fixture
def build(sources, recipe):
    """Makes the loaders of a column; of `dali-gpu`, which needs a GPU, only what it refuses before it looks for one."""

    def make(loader: str, processor, plan=BatchPlan(5), **options):  # noqa: B008  # it is frozen
        if loader in ("datasets", "streamed"):
            options |= {"data_dir": None, "dataset_name": sources["named"], "streaming": loader == "streamed"}
        else:
            options |= {"data_dir": sources["folder"], "loader": loader}
        return build_loaders(recipe(**options), processor, plan)

    return make


def graph_of_dali_gpu(folder: str, processor):
    """Its validation batches, from its graph on a CPU."""
    split = DataSource.from_folder(folder).val
    batches = EncodedBatches(split, EvaluationPlanner(processor), 0, replace_bad=False)
    pipeline = DaliPipeline(batches, 0, 2, 5, torch.device("cpu"), num_threads=1)
    return DeviceStage("cpu", processor)(pipeline.batches(ValidationPlan(len(split), 5).requests()))


def expected(processor) -> torch.Tensor:
    images = [Image.open(io.BytesIO(data)) for _ in "ab" for _, data in sorted(files().items())]
    return processor(images, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("setting, loader, outcome", cells())
def test_the_table(sources, build, setting, loader, outcome):
    if loader == "dali-gpu":
        pytest.importorskip("nvidia.dali")
    if loader == "dali-cpu" and library() is None:
        pytest.skip("nvImageCodec is not installed")
    processor = processor_for(setting)
    on_a_cpu = loader == "dali-gpu" and processor.do_center_crop
    if outcome == "refused":
        with pytest.raises(UserError, match=re.escape(SENTENCES[setting])):
            graph_of_dali_gpu(sources["folder"], processor) if on_a_cpu else build(loader, processor)
        return
    if on_a_cpu:
        batches = list(graph_of_dali_gpu(sources["folder"], processor))
    else:
        with build(loader, processor) as ours:
            batches = [next(ours.val.epoch())] if loader == "synthetic" else list(ours.val.epoch())
    pixels = torch.cat([batch["pixel_values"] for batch in batches])
    theirs = expected(processor)
    assert pixels.dtype == theirs.dtype == torch.float32
    if outcome == "shape":
        assert pixels.shape[1:] == theirs.shape[1:]
    elif outcome == "same" or not processor.do_resize:
        assert torch.equal(pixels, theirs)
    else:
        grey_level = (processor.rescale_factor if processor.do_rescale else 1) / (
            min(processor.image_std) if processor.do_normalize else 1
        )
        assert (pixels - theirs).abs().mean((1, 2, 3)).max() < 0.5 * grey_level


@pytest.mark.parametrize("loader", ["imagefolder", "dali-cpu"])
@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "do_center_crop false"])
def test_training_images_have_its_crop_size_filter_and_values(sources, build, setting, loader):
    """The random crop is a training matter, all else is the processor's; `do_resize` and `size` are evaluation's."""
    if loader == "dali-cpu" and library() is None:
        pytest.skip("nvImageCodec is not installed")
    processor = processor_for(setting)
    transform, split = TrainTransform(processor), DataSource.from_folder(sources["folder"]).train
    with build(loader, processor, seed=3) as ours:
        batch = next(ours.train.epoch(1))
    for pixels, index in zip(batch["pixel_values"], batch["index"].tolist()):
        image = transform(Picture(split.read(index)), mix(3, 1, index))
        assert image.shape[:2] == (processor.crop_size["height"], processor.crop_size["width"])
        values = processor(image, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(pixels, values)


def test_the_sentence_names_the_checkpoint(build, sources, recipe):
    processor = EfficientNetNVImageProcessor(do_center_crop=False)
    with pytest.raises(UserError, match="^--model me/it: its preprocessor_config.json says do_center_crop false"):
        build_loaders(recipe(model="me/it", data_dir=sources["folder"]), processor, BatchPlan(4))


def test_every_setting_has_its_row():
    assert {row[0] for row in cells()} == set(SETTINGS)
    arguments = set(inspect.signature(EfficientNetNVImageProcessor).parameters) - {"kwargs"}
    assert arguments == {name for settings in SETTINGS.values() for name in settings}
