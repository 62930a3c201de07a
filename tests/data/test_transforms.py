import io
import random
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from effnet_hf import EfficientNetNVImageProcessor
from effnet_hf.data.pictures import Box, Picture
from effnet_hf.data.transforms import EvaluationTransform, TrainTransform, draw_geometry, resize

from .torture import encode, odd_files, photo


JPEG = encode(photo(1, 300, 200), "JPEG")


def sized(size, resample=Image.BICUBIC):
    return EfficientNetNVImageProcessor.for_image_size(size, resample=resample)


def geometries(width, height, count=3000, scale=0.08):
    rng = random.Random(0)
    return [draw_geometry(rng, width, height, scale, 0.5) for _ in range(count)]


def test_crops_have_the_areas_shapes_and_places_of_torchvisions():
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    blank = torch.zeros(3, 375, 500)
    theirs = np.array([RandomResizedCrop.get_params(blank, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(3000)])
    ours = np.array([(g.box.top, g.box.left, g.box.height, g.box.width) for g in geometries(500, 375)])
    for name, of in {
        "area": lambda b: b[:, 2] * b[:, 3] / (375 * 500),
        "log ratio": lambda b: np.log(b[:, 3] / b[:, 2]),
        "top": lambda b: b[:, 0] / 375,
        "left": lambda b: b[:, 1] / 500,
    }.items():
        assert stats.ks_2samp(of(ours), of(theirs)).pvalue > 0.01, name
    assert abs(np.mean([g.flip for g in geometries(500, 375)]) - 0.5) < 0.04


@pytest.mark.parametrize("width, height", [(1, 1), (1, 500), (5000, 3), (7, 7), (10_000, 10)])
def test_crops_stay_inside_any_picture(width, height):
    for box, _ in geometries(width, height, 300):
        assert box.width >= 1 and box.height >= 1 and box.left >= 0 and box.top >= 0
        assert box.left + box.width <= width and box.top + box.height <= height


def test_a_panorama_falls_back_to_its_middle():
    (box, _) = geometries(4000, 100, 1)[0]
    assert box == Box((4000 - 133) // 2, 0, 133, 100)


@pytest.mark.parametrize("resample", Image.Resampling)
@pytest.mark.parametrize("size", [(37, 53), (224, 224), (500, 301), (900, 20)])
def test_resizing_is_pillows_but_for_the_last_bit(resample, size):
    image = photo(2, *size)
    ours = resize(torch.from_numpy(np.array(image)).permute(2, 0, 1), (80, 96), resample).numpy().astype(int)
    theirs = np.asarray(image.resize((96, 80), resample)).astype(int)
    assert ours.shape == (80, 96, 3) and abs(ours - theirs).max() <= (1 if resample in (2, 3) else 0)


@pytest.mark.parametrize("resample", Image.Resampling)
def test_training_crops_are_resized_with_the_processors_filter_to_its_crop_size(resample):
    processor = EfficientNetNVImageProcessor(crop_size={"height": 40, "width": 56}, resample=resample, do_resize=False)
    transform, picture = TrainTransform(processor, horizontal_flip=0.0), Picture(JPEG)
    box = draw_geometry(random.Random(3), picture.width, picture.height, 0.08, 0.0).box
    region = picture.rgb().crop((box.left, box.top, box.left + box.width, box.top + box.height))
    expected = np.asarray(region.resize((56, 40), resample)).astype(int)
    assert abs(transform(picture, 3).astype(int) - expected).max() <= (1 if resample in (2, 3) else 0)


def test_a_picture_looks_the_same_for_the_same_seed_only():
    transform = TrainTransform(sized(48), augmentation="autoaugment")
    first = transform(Picture(JPEG), 7)
    assert first.shape == (48, 48, 3) and first.dtype == np.uint8
    assert np.array_equal(first, transform(Picture(JPEG), 7))
    assert not np.array_equal(first, transform(Picture(JPEG), 8))


def test_flip_mirrors():
    plain = TrainTransform(sized(48), horizontal_flip=0.0)(Picture(JPEG), 3)
    mirrored = TrainTransform(sized(48), horizontal_flip=1.0)(Picture(JPEG), 3)
    assert np.array_equal(plain[:, ::-1], mirrored)


def test_full_scale_crops_keep_the_whole_of_a_square():
    boxes = {g.box for g in geometries(64, 64, 200, scale=1.0)}
    assert Box(0, 0, 64, 64) in boxes and all(box.width * box.height > 0.9 * 64 * 64 for box in boxes)


@pytest.mark.parametrize("name", ["randaugment", "trivialaugment"])
def test_torchvisions_policies_depend_on_the_seed_alone_and_leave_torchs_generator(name):
    transform = TrainTransform(sized(48), augmentation=name)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = transform(Picture(JPEG), 7)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert np.array_equal(first, transform(Picture(JPEG), 7))
    assert len({transform(Picture(JPEG), seed).tobytes() for seed in range(8)}) > 5


def test_policies_come_after_crop_and_flip():
    transform = TrainTransform(sized(48), augmentation="none")
    transform.policy = lambda image, rng: image.point(lambda value: 255 - value)
    assert np.array_equal(transform(Picture(JPEG), 5), 255 - TrainTransform(sized(48))(Picture(JPEG), 5))


@pytest.mark.parametrize("resample", [Image.BILINEAR, Image.BICUBIC])
@pytest.mark.parametrize("name", sorted(odd_files()))
def test_evaluation_pixels_are_the_image_processors(name, resample):
    data = odd_files()[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow about broken EXIF
        expected = sized(40, resample)(Image.open(io.BytesIO(data)), do_rescale=False, do_normalize=False)
    ours = EvaluationTransform(sized(40, resample))(Picture(data))
    assert ours.dtype == np.uint8 and np.array_equal(ours.transpose(2, 0, 1), expected["pixel_values"][0])


def test_crop_scale_is_the_smallest_share():
    areas = [g.box.width * g.box.height / (400 * 400) for g in geometries(400, 400, scale=0.3)]
    assert 0.295 < min(areas) < 0.31


@pytest.mark.parametrize("gap, factors", [(0, {1}), (1, {1, 2, 4}), (2, {1, 2}), (3, {1})])
def test_a_jpeg_is_reduced_where_its_crop_still_is_so_many_times_the_size(monkeypatch, gap, factors):
    data, asked = encode(photo(1, 500, 400), "JPEG"), []
    crop = Picture.crop
    monkeypatch.setattr(Picture, "crop", lambda self, *args: asked.append(args) or crop(self, *args))
    transform = TrainTransform(sized(80), reducing_gap=gap)
    full = TrainTransform(sized(80))
    for seed in range(40):
        ours, theirs = transform(Picture(data), seed), full(Picture(data), seed)
        (box, reduced), (same, whole) = asked[-2:]
        assert ours.shape == (80, 80, 3) and box == same and whole == 1
        room = min(box.width, box.height) / 80
        assert reduced == max([1] + [f for f in (2, 4, 8) if gap and room >= gap * f])
        assert np.array_equal(ours, theirs) if reduced == 1 else np.abs(ours.astype(int) - theirs).mean() < 12
    assert {reduced for _, reduced in asked} == factors


def test_randaugment_has_as_many_operations_and_the_magnitude_that_are_asked_for():
    def mean_change(strength):
        plain = TrainTransform(sized(48))
        transform = TrainTransform(sized(48), augmentation="randaugment", randaugment=strength)
        assert (transform.policy._transform.num_ops, transform.policy._transform.magnitude) == strength
        changes = [
            np.abs(transform(Picture(JPEG), seed).astype(int) - plain(Picture(JPEG), seed)) for seed in range(30)
        ]
        return np.mean(changes)

    assert mean_change((1, 3)) < mean_change((2, 9)) < mean_change((4, 28))
    default = TrainTransform(sized(48), augmentation="randaugment")
    same = TrainTransform(sized(48), augmentation="randaugment", randaugment=(2, 9))
    assert np.array_equal(default(Picture(JPEG), 7), same(Picture(JPEG), 7))
