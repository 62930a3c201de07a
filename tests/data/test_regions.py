import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from effnet_hf import EfficientNetNVImageProcessor
from effnet_hf.data import BatchPlan, build_loaders, pictures, regions
from effnet_hf.data.pictures import Box, Picture
from effnet_hf.data.regions import decode_region, library
from effnet_hf.errors import UserError

from .test_loaders import collect, same
from .torture import encode, odd_files, photo


@pytest.fixture
def installed():
    if library() is None:
        pytest.skip("nvImageCodec is not installed")


def with_library(monkeypatch, module):
    """As if that were installed, or with None nothing."""
    monkeypatch.setitem(sys.modules, "nvidia", SimpleNamespace(nvimgcodec=module) if module else None)
    monkeypatch.setattr(regions, "library", library.__wrapped__)


def many_jpegs():
    yield from (data for data in odd_files().values() if Picture(data).plain_jpeg)
    for options in ({"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}):
        for mode in ("RGB", "L"):
            yield encode(photo(2, 131, 77).convert(mode), "JPEG", **options)


def test_rectangles_are_pillows_bit_for_bit(installed):
    rng, count = random.Random(0), 0
    for data in many_jpegs():
        picture = Picture(data)
        whole = np.asarray(picture.rgb())
        for _ in range(5):
            width, height = rng.randint(1, picture.width), rng.randint(1, picture.height)
            left, top = rng.randint(0, picture.width - width), rng.randint(0, picture.height - height)
            part = decode_region(data, left, top, width, height)
            assert np.array_equal(part.permute(1, 2, 0).numpy(), whole[top : top + height, left : left + width])
            count += 1
    assert count >= 80


def test_what_is_no_jpeg_is_left_to_others(installed, capfd):
    assert decode_region(b"nonsense", 0, 0, 4, 4) is None
    assert decode_region(b"", 0, 0, 4, 4) is None
    assert decode_region(encode(photo(0), "JPEG"), 0, 0, 4, 4).shape == (3, 4, 4)  # and it still works


def test_without_it_crops_are_the_same(installed, monkeypatch):
    picture, box = Picture(encode(photo(1), "JPEG")), Box(5, 7, 20, 30)
    expected = picture.crop(box)
    calls = []
    decode = pictures.decode_region
    monkeypatch.setattr(pictures, "decode_region", lambda *args: calls.append(args) or decode(*args))
    assert torch.equal(picture.crop(box), expected) and len(calls) == 1
    picture.crop(Box(0, 0, picture.width, picture.height))
    assert len(calls) == 1  # the whole is simplejpeg's
    with_library(monkeypatch, None)
    assert torch.equal(picture.crop(box), expected) and decode_region(picture.data, *box) is None


def test_an_old_one_which_asks_for_a_gpu_counts_as_none(monkeypatch):
    with_library(monkeypatch, SimpleNamespace(Decoder=None))
    assert regions.library() is None and decode_region(b"", 0, 0, 1, 1) is None
    with pytest.raises(
        UserError, match=r"^--loader dali-cpu needs .* run `pip install --upgrade nvidia-nvimgcodec-cu13`"
    ):
        regions.require_library()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("gap", [0, 1])
def test_dali_cpu_gives_imagefolders_batches_with_and_without_it(installed, loaders, monkeypatch, workers, gap):
    options = {"augmentation": "autoaugment", "mixup": 0.2, "num_workers": workers, "reducing_gap": gap}
    fast = loaders({**options, "loader": "dali-cpu"})
    batches = collect(fast.train.epoch(3)), collect(fast.val.epoch())
    with_library(monkeypatch, None)
    plain = loaders(options)
    assert same(batches[0], collect(plain.train.epoch(3))) and same(batches[1], collect(plain.val.epoch()))
    with pytest.raises(UserError, match="--loader dali-cpu needs"):
        loaders({"loader": "dali-cpu"})


def test_dali_cpu_resumes_where_it_was(installed, loaders):
    options = {"loader": "dali-cpu", "augmentation": "randaugment", "reducing_gap": 1}
    ours = loaders(options, plan=BatchPlan(4, accumulation_steps=2))
    whole = collect(ours.train.epoch(4))
    assert len(whole) == 14 and same(whole[2 * 5 :], collect(ours.train.epoch(4, start_update=5)))


def test_on_real_photographs_dali_cpu_gives_imagefolders_batches(installed, real_pictures, recipe, monkeypatch):
    options, batches = {"data_dir": str(real_pictures("imagenet_samples.tar")), "num_workers": 0}, []
    for loader in ("dali-cpu", "imagefolder"):
        processor = EfficientNetNVImageProcessor.for_image_size(96)
        with build_loaders(recipe(loader=loader, **options), processor, BatchPlan(32), train=False) as ours:
            batches.append(collect(ours.val.epoch()))
    assert same(*batches)


def test_a_gap_changes_training_alone(loaders):
    full, reduced = loaders({"reducing_gap": 0}), loaders({"reducing_gap": 1})
    assert not same(collect(full.train.epoch()), collect(reduced.train.epoch()))
    assert same(collect(full.val.epoch()), collect(reduced.val.epoch()))
