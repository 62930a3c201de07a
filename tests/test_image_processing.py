"""The image processor is torchvision's evaluation transform to the pixel, for whatever file a user may have."""

import json
import logging

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, PILToTensor, Resize, ToTensor
from transformers import AutoImageProcessor, pipeline

from effnet_hf import EfficientNetNVForImageClassification, EfficientNetNVImageProcessor
from effnet_hf.image_processing_efficientnet_nv import resize_and_crop, to_rgb


SMALL = EfficientNetNVImageProcessor.for_image_size(32)


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, channels), np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def opened(path) -> Image.Image:
    with Image.open(path) as picture:
        picture.load()
    return picture


def processed_bytes(picture, processor=SMALL) -> torch.Tensor:
    """Geometry alone, as bytes: what has to match to the last bit."""
    return processor(picture, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values[0].to(torch.uint8)


def expected_bytes(picture: Image.Image, size: int = 32) -> torch.Tensor:
    resize = Resize(size + 32, InterpolationMode.BICUBIC)
    return Compose([resize, CenterCrop(size), PILToTensor()])(picture.convert("RGB"))


# Geometry and values ------------------------------------------------------------------------------------------------


def test_the_default_is_the_published_evaluation_of_b0():
    processor = EfficientNetNVImageProcessor()
    assert processor.to_dict() == EfficientNetNVImageProcessor.for_image_size(224).to_dict()
    assert (processor.size, processor.crop_size) == ({"shortest_edge": 256}, {"height": 224, "width": 224})
    assert Image.Resampling(processor.resample) == Image.Resampling.BICUBIC
    picture = noise(500, 375)
    transform = Compose(
        [
            Resize(256, InterpolationMode.BICUBIC),
            CenterCrop(224),
            ToTensor(),
            Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    pixel_values = processor(picture, return_tensors="pt").pixel_values
    assert pixel_values.shape == (1, 3, 224, 224)
    assert pixel_values.dtype == torch.float32
    torch.testing.assert_close(pixel_values[0], transform(picture), rtol=0, atol=1e-6)
    assert torch.equal(processed_bytes(picture, processor), expected_bytes(picture, 224))


def test_random_sizes_match_torchvision_to_the_bit():
    random = np.random.RandomState(0)
    for case in range(150):
        crop = int(random.randint(1, 48))
        short = int(random.randint(1, 200))
        long = int(short * random.uniform(1, 5))
        width, height = (short, long) if case % 2 else (long, short)
        picture = noise(width, height, seed=case)
        ours = processed_bytes(picture, EfficientNetNVImageProcessor.for_image_size(crop))
        assert torch.equal(ours, expected_bytes(picture, crop)), (width, height, crop)


@pytest.mark.parametrize("resample", [Image.Resampling.BILINEAR, Image.Resampling.NEAREST, Image.Resampling.BICUBIC])
def test_the_filter_can_be_chosen(resample):
    picture = noise(90, 71)
    names = {2: InterpolationMode.BILINEAR, 0: InterpolationMode.NEAREST, 3: InterpolationMode.BICUBIC}
    expected = Compose([Resize(64, names[int(resample)]), CenterCrop(32), PILToTensor()])(picture)
    assert torch.equal(
        processed_bytes(picture, EfficientNetNVImageProcessor.for_image_size(32, resample=resample)), expected
    )
    assert torch.equal(
        SMALL(picture, resample=resample, do_rescale=False, do_normalize=False, return_tensors="pt").pixel_values[0],
        expected.float(),
    )


@pytest.mark.parametrize("crop", [(40, 30), (31, 64), (100, 20), (101, 99)])
def test_a_crop_larger_than_the_picture_is_padded_with_black(crop):
    picture = noise(50, 51)
    expected = PILToTensor()(CenterCrop(crop)(picture))
    ours = PILToTensor()(resize_and_crop(picture, None, crop))
    assert torch.equal(ours, expected)


def test_one_white_and_one_black_pixel_have_frozen_values():
    for colour, frozen in (
        ("white", [2.2489083, 2.4285715, 2.6400001]),
        ("black", [-2.117904, -2.0357141, -1.8044444]),
    ):
        pixel_values = SMALL(Image.new("RGB", (1, 1), colour), return_tensors="pt").pixel_values
        assert pixel_values.shape == (1, 3, 32, 32)
        for channel, value in enumerate(frozen):
            torch.testing.assert_close(pixel_values[0, channel], torch.full((32, 32), value), rtol=0, atol=1e-6)


def test_each_step_can_be_switched_off():
    picture = noise(70, 90)
    raw = np.asarray(picture).transpose(2, 0, 1)

    def process(**settings):
        off = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}
        return SMALL(picture, return_tensors="np", **{**off, **settings}).pixel_values[0]

    np.testing.assert_array_equal(process(), raw)
    assert process().dtype == np.float32  # a network takes no bytes
    assert process(do_resize=True).shape == (3, 82, 64)
    np.testing.assert_array_equal(process(do_center_crop=True), raw[:, 29:61, 19:51])
    np.testing.assert_allclose(process(do_rescale=True), raw / 255, atol=1e-6)
    mean, std = np.array([[[1.0]], [[2]], [[3]]]), np.array([[[4.0]], [[5]], [[6]]])
    normalized = process(do_normalize=True, image_mean=[1, 2, 3], image_std=[4, 5, 6])
    np.testing.assert_allclose(normalized, (raw - mean) / std, atol=1e-5)
    np.testing.assert_array_equal(process(do_normalize=True, image_mean=0, image_std=1), raw)


# Any file a user may have -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "YCbCr"])
def test_jpegs_of_every_colour_model(tmp_path, mode):
    path = tmp_path / "picture.jpg"
    noise(81, 64, mode).save(path, quality=90)
    assert torch.equal(processed_bytes(opened(path)), expected_bytes(opened(path)))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "1", "P"])
def test_pngs_of_every_mode_lose_their_alpha(tmp_path, mode):
    path = tmp_path / "picture.png"
    source = noise(81, 64, mode) if mode not in "1P" else noise(81, 64).convert(mode)
    source.save(path)
    assert opened(path).mode == mode
    assert torch.equal(processed_bytes(opened(path)), expected_bytes(opened(path)))


@pytest.mark.parametrize("transparency", [3, bytes(range(200))])
def test_palettes_with_transparency_keep_their_colours(tmp_path, transparency):
    path, opaque = tmp_path / "picture.png", noise(81, 64).quantize(200)
    opaque.save(path, transparency=transparency)
    assert torch.equal(processed_bytes(opened(path)), expected_bytes(opaque))


def test_webp_and_the_first_frame_of_an_animation(tmp_path):
    first, second = noise(81, 64, seed=1).quantize(64), noise(81, 64, seed=2).quantize(64)
    first.save(tmp_path / "picture.gif", save_all=True, append_images=[second])
    assert torch.equal(processed_bytes(opened(tmp_path / "picture.gif")), expected_bytes(first))
    noise(81, 64).save(tmp_path / "picture.webp", lossless=True)
    assert torch.equal(processed_bytes(opened(tmp_path / "picture.webp")), expected_bytes(noise(81, 64)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright_by_their_exif(tmp_path, orientation):
    # undoes what orientation n says the camera did
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # values of Image.Transpose
    stored = noise(90, 60)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    upright = stored.transpose(Image.Transpose(turns[orientation])) if orientation > 1 else stored
    assert torch.equal(processed_bytes(opened(tmp_path / "photo.png")), expected_bytes(upright))


def test_exif_does_not_survive_to_turn_a_picture_twice(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(90, 60).save(tmp_path / "photo.jpg", exif=exif)
    once = to_rgb(opened(tmp_path / "photo.jpg"))
    assert once.size == (60, 90)
    assert to_rgb(once).size == (60, 90)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    deep = np.random.RandomState(0).randint(0, 65536, (64, 81), np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    expected = expected_bytes(Image.fromarray((deep >> 8).astype(np.uint8)))
    assert torch.equal(processed_bytes(opened(tmp_path / "deep.png")), expected)
    assert torch.equal(processed_bytes(deep), expected)  # the same as an array


def test_a_one_pixel_picture_and_a_panorama(tmp_path):
    assert torch.equal(
        processed_bytes(Image.new("RGB", (1, 1), (1, 2, 3))),
        torch.tensor([1, 2, 3], dtype=torch.uint8)[:, None, None].expand(3, 32, 32),
    )
    gradient = np.linspace(0, 255, 10_000).astype(np.uint8)
    for array in (np.tile(gradient, (10, 1)), np.tile(gradient[:, None], (1, 10))):
        ours = processed_bytes(Image.fromarray(array)).int()
        # within a sub-pixel shift of torchvision, which resizes the 60,000 pixels that nobody sees as well
        assert (ours - expected_bytes(Image.fromarray(array)).int()).abs().max() <= 1


def test_a_panorama_is_cut_before_it_is_resized(monkeypatch):
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda image, size, *args: sizes.append(size) or resize(image, size, *args)
    )
    for shape in ((10, 10_000), (10_000, 10), (1, 3000)):
        processed_bytes(Image.fromarray(np.zeros(shape, np.uint8)))
    assert sizes == [(64 * 16, 64), (64, 64 * 16), (64 * 16, 64)]


# Arrays and tensors -------------------------------------------------------------------------------------------------


def test_arrays_and_tensors_equal_their_picture():
    picture = noise(50, 70)
    hwc = np.asarray(picture)
    chw = hwc.transpose(2, 0, 1)
    expected = processed_bytes(picture)
    for array in (hwc, chw, torch.tensor(hwc), torch.tensor(chw), hwc.astype(np.int64), hwc.astype(np.float32)):
        assert torch.equal(processed_bytes(array), expected)
    for array in (hwc / 255, (chw / 255).astype(np.float32), torch.tensor(chw) / 255):
        full = SMALL(array, return_tensors="pt").pixel_values
        assert torch.equal(full, SMALL(picture, return_tensors="pt").pixel_values)
    with_alpha = np.concatenate([hwc, hwc[:, :, :1]], axis=2)
    assert torch.equal(processed_bytes(with_alpha), expected)
    grey = hwc[:, :, 0]
    for array in (grey, grey[None], grey[:, :, None], torch.tensor(grey), [grey], [[grey]]):
        assert torch.equal(processed_bytes(array), processed_bytes(Image.fromarray(grey)))
    mask = grey > 127
    assert np.array_equal(SMALL(mask).pixel_values, SMALL(Image.fromarray(mask)).pixel_values)


def test_arrays_between_zero_and_one_stay_there_without_rescaling():
    picture = noise(50, 70)
    array = np.asarray(picture) / 255
    kept = SMALL(array, do_rescale=False, return_tensors="pt").pixel_values
    torch.testing.assert_close(kept, SMALL(picture, return_tensors="pt").pixel_values, rtol=0, atol=1e-6)


def test_a_shape_that_reads_both_ways_is_read_by_its_kind_or_as_told():
    strip = np.random.RandomState(0).randint(0, 256, (3, 40, 3), np.uint8)
    as_rows, as_planes = Image.fromarray(strip), Image.fromarray(np.ascontiguousarray(strip.transpose(1, 2, 0)))
    assert torch.equal(processed_bytes(strip), processed_bytes(as_rows))
    assert torch.equal(processed_bytes(torch.tensor(strip)), processed_bytes(as_planes))

    def told(data_format):
        return SMALL(strip, input_data_format=data_format, return_tensors="pt").pixel_values

    assert torch.equal(told("channels_first"), SMALL(as_planes, return_tensors="pt").pixel_values)
    assert torch.equal(told("channels_last"), SMALL(as_rows, return_tensors="pt").pixel_values)


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.zeros((5, 6, 7)), r"pixels of 1, 3 or 4 channels, got an array of shape \(5, 6, 7\)"),
        (np.zeros((0, 6, 3)), r"pixels of 1, 3 or 4 channels, got an array of shape \(0, 6, 3\)"),
        (np.zeros(7), r"two or three dimensions, got an array of shape \(7,\)"),
        (np.full((8, 8, 3), -0.5), "normalised already"),
        (np.full((8, 8, 3), 256), "Pixels must lie in 0 to 255 or 0 to 1, got 256 to 256"),
        (np.full((8, 8, 3), np.nan), "Pixels must lie in 0 to 255"),
    ],
)
def test_arrays_that_are_no_picture_are_refused_with_a_sentence(array, sentence):
    with pytest.raises(ValueError, match=sentence):
        SMALL(array)


def test_batches_are_stacked_in_order_in_the_wanted_layout():
    pictures = [noise(50 + i, 70, seed=i) for i in range(3)]
    batch = SMALL(pictures, return_tensors="pt").pixel_values
    assert batch.shape == (3, 3, 32, 32)
    for one, picture in zip(batch, pictures):
        assert torch.equal(one, SMALL(picture, return_tensors="pt").pixel_values[0])
    last = SMALL(pictures, data_format="channels_last", return_tensors="np").pixel_values
    np.testing.assert_array_equal(last, batch.permute(0, 2, 3, 1).numpy())
    unstacked = SMALL(pictures).pixel_values
    assert isinstance(unstacked, list)
    np.testing.assert_array_equal(unstacked[1], batch[1].numpy())
    stacked_input = torch.stack([torch.tensor(np.asarray(p.resize((40, 40)))).permute(2, 0, 1) for p in pictures])
    assert SMALL(stacked_input, return_tensors="pt").pixel_values.shape == (3, 3, 32, 32)


def test_the_callers_picture_is_left_alone():
    picture = noise(90, 60, "RGBA")
    before = picture.tobytes()
    SMALL(picture)
    assert (picture.mode, picture.size, picture.tobytes()) == ("RGBA", (90, 60), before)


# Settings, saving, Auto classes, pipeline ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"size": {"height": 64, "width": 64}}, "size must be 1 to 16384 pixels or {'shortest_edge': pixels}, got {'h"),
        ({"size": 0}, "size must be 1 to 16384 pixels"),
        ({"size": 10**9}, "size must be 1 to 16384 pixels"),
        ({"size": True}, "size must be 1 to 16384 pixels"),
        ({"size": "256"}, "size must be 1 to 16384 pixels or {'shortest_edge': pixels}, got '256'"),
        ({"size": [256]}, "size must be 1 to 16384 pixels"),
        ({"size": {"shortest_edge": 8.0}}, "size must be 1 to 16384 pixels"),
        ({"crop_size": {"height": 3}}, "crop_size must be 1 to 16384 pixels or {'height', 'width'}"),
        ({"crop_size": -1}, "crop_size must be 1 to 16384 pixels"),
        ({"crop_size": {"height": 8, "width": 10**9}}, "crop_size must be 1 to 16384 pixels"),
        ({"rescale_factor": "1/255"}, "rescale_factor must be a number above 0, got '1/255'"),
        ({"rescale_factor": 0}, "rescale_factor must be a number above 0, got 0"),
        ({"rescale_factor": float("nan")}, "rescale_factor must be a number above 0, got nan"),
        ({"rescale_factor": float("inf")}, "rescale_factor must be a number above 0, got inf"),
        ({"rescale_factor": True}, "rescale_factor must be a number above 0, got True"),
        ({"resample": 17}, r"resample must be one of 0 \(nearest\), .*, got 17"),
        ({"resample": True}, "resample must be one of"),
        ({"resample": "bicubic"}, "resample must be one of"),
        (
            {"image_mean": [0.5, 0.5]},
            r"image_mean must be a number or a list of three, one per colour, got \[0.5, 0.5\]",
        ),
        ({"image_mean": "abc"}, "image_mean must be a number or a list of three"),
        ({"image_mean": [0.5, 0.5, float("nan")]}, "image_mean must be a number or a list of three"),
        ({"image_mean": [0.5, 0.5, None]}, "image_mean must be a number or a list of three"),
        ({"image_std": [1, 1, 0]}, r"image_std must be a number above 0 or a list of three, .* got \[1, 1, 0\]"),
        ({"image_std": -1}, "image_std must be a number above 0"),
        ({"image_std": True}, "image_std must be a number above 0"),
        ({"image_std": 1e300}, "image_std must be a number above 0"),
        ({"do_resize": "false"}, "do_resize must be true or false, got 'false'"),
        ({"do_center_crop": 1}, "do_center_crop must be true or false, got 1"),
        ({"do_rescale": 0}, "do_rescale must be true or false, got 0"),
        ({"do_normalize": [True]}, "do_normalize must be true or false"),
    ],
)
def test_bad_settings_are_refused_with_a_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        EfficientNetNVImageProcessor(**settings)
    with pytest.raises(ValueError, match=sentence):
        SMALL(noise(8, 8), **settings)


def test_saving_and_loading_keep_every_setting(tmp_path):
    processor = EfficientNetNVImageProcessor(
        size=100, crop_size={"height": 90, "width": 80}, resample=2, do_normalize=False, image_mean=[0.1, 0.2, 0.3]
    )
    processor.save_pretrained(tmp_path)
    for door in (EfficientNetNVImageProcessor, AutoImageProcessor):
        loaded = door.from_pretrained(tmp_path)
        assert type(loaded) is EfficientNetNVImageProcessor
        assert loaded.to_dict() == processor.to_dict()
        picture = noise(120, 130)
        np.testing.assert_array_equal(loaded(picture).pixel_values, processor(picture).pixel_values)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "EfficientNetNVImageProcessor"
    assert (saved["size"], saved["crop_size"]) == ({"shortest_edge": 100}, {"height": 90, "width": 80})
    overridden = EfficientNetNVImageProcessor.from_pretrained(tmp_path, size=50, crop_size=40)
    assert (overridden.size, overridden.crop_size) == ({"shortest_edge": 50}, {"height": 40, "width": 40})


@pytest.mark.xfail(
    transformers.__version__ < "5",
    reason="transformers 4.57 announces a torchvision twin for every processor that is saved without one; only "
    "use_fast=False in the call silences it",
    strict=True,
)
def test_opening_it_through_the_auto_class_logs_no_warning(tmp_path, caplog):
    SMALL.save_pretrained(tmp_path)
    transformers.utils.logging.warning_once.cache_clear()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        AutoImageProcessor.from_pretrained(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_pipeline_classifies_a_file_as_training_would(tiny_config, tmp_path):
    model = EfficientNetNVForImageClassification(tiny_config(id2label={i: f"class {i}" for i in range(5)})).eval()
    model.save_pretrained(tmp_path)
    SMALL.save_pretrained(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "photo.png"
    noise(90, 60, "RGBA").save(path, exif=exif)

    logits = model(SMALL(opened(path), return_tensors="pt").pixel_values).logits[0]
    expected = {f"class {i}": score for i, score in enumerate(logits.softmax(0).tolist())}
    classify = pipeline("image-classification", model=str(tmp_path))
    assert type(classify.image_processor) is EfficientNetNVImageProcessor
    for source in (str(path), opened(path)):
        answer = classify(source, top_k=5)
        assert {row["label"]: row["score"] for row in answer} == pytest.approx(expected, rel=1e-5)
        assert [row["label"] for row in answer] == sorted(expected, key=expected.get, reverse=True)
