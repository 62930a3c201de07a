import os
import tarfile
from pathlib import Path

import datasets
import pytest

from effnet_hf import EfficientNetNVImageProcessor
from effnet_hf.data import BatchPlan, build_loaders
from effnet_hf.recipes import load_recipe

from .torture import encode, photo


@pytest.fixture(autouse=True, scope="session")
def own_index_cache(tmp_path_factory):
    """Folder indexes go to a temporary place, not to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """`train/` with 3 classes of 20 small pictures and `val/` with 7 each: JPEGs of many shapes, some PNGs."""
    root = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 20), ("val", 7)):
        for label, name in enumerate(("bird", "cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = photo(100 * label + i, 60 + 5 * i, 90 - 2 * i)
                if i % 7 == 3:
                    (folder / f"{i:02}.png").write_bytes(encode(image.convert("L"), "PNG"))
                else:
                    (folder / f"{i:02}.jpg").write_bytes(encode(image, "JPEG", quality=90))
    return root


@pytest.fixture
def recipe(pictures, tmp_path):
    """Makes a recipe on the small folder."""

    def make(**overrides):
        settings = {"data_dir": str(pictures), "num_workers": 0, "output_dir": str(tmp_path / "run"), "mixup": 0.0}
        settings = {"augmentation": "none", "seed": 5, **settings, **overrides}
        return load_recipe("b0", **settings)

    return make


@pytest.fixture
def loaders(recipe):
    """Makes loaders of 32-pixel images, four at a time, and closes them."""
    made = []

    def make(recipe_options=None, processor=None, plan=BatchPlan(4), **arguments):  # noqa: B008  # it is frozen
        processor = processor or EfficientNetNVImageProcessor.for_image_size(32)
        made.append(build_loaders(recipe(**(recipe_options or {})), processor, plan, **arguments))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(scope="session")
def real_pictures(tmp_path_factory):
    """Unpacks `imagenet_samples.tar` or `imagenette224_sub4k.tar` of the folder EFFNET_HF_DATA; skips without it."""
    home = Path(os.environ.get("EFFNET_HF_DATA", Path(__file__).parents[3] / "shared" / "data"))

    def unpack(name: str) -> Path:
        archive = home / name
        if not archive.exists():
            pytest.skip(f"{archive} is missing; EFFNET_HF_DATA names the folder that holds it")
        folder = tmp_path_factory.mktemp(archive.stem)
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        return folder

    return unpack
