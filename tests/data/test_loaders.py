import shutil
import threading
import time

import pytest
import torch
from PIL import Image

from effnet_hf import EfficientNetNVImageProcessor
from effnet_hf.data import BatchPlan, build_loaders
from effnet_hf.data.loaders import limit_sentence
from effnet_hf.data.source import DataSource
from effnet_hf.errors import UserError


def collect(batches):
    return [(b["index"].tolist(), b["labels"].tolist(), b["pixel_values"]) for b in batches]


def same(a, b):
    return len(a) == len(b) and all(x[:2] == y[:2] and torch.equal(x[2], y[2]) for x, y in zip(a, b))


EVERYTHING = {"augmentation": "autoaugment", "mixup": 0.2, "cutmix": 1.0}


def test_batches_have_the_promised_form(loaders):
    ours = loaders(plan=BatchPlan(4, accumulation_steps=2))
    assert ours.class_names == ["bird", "cat", "dog"] and ours.notes == []
    assert ours.train.num_samples == 60 and ours.train.updates_per_epoch == 7 and ours.val.num_samples == 21
    batches = list(ours.train.epoch(0))
    assert len(batches) == 14
    for batch in batches:
        assert set(batch) == {"pixel_values", "labels", "index"}
        assert batch["pixel_values"].shape == (4, 3, 32, 32) and batch["pixel_values"].dtype == torch.float32
        assert batch["pixel_values"].is_contiguous(memory_format=torch.channels_last)
        assert batch["labels"].shape == batch["index"].shape == (4,)
        assert batch["labels"].dtype == batch["index"].dtype == torch.int64


def test_labels_belong_to_their_pictures(loaders, pictures):
    split = DataSource.from_folder(str(pictures)).train
    for batch in loaders().train.epoch(0):
        assert batch["labels"].tolist() == [split.label(i) for i in batch["index"].tolist()]


def test_channels_first_when_asked(loaders):
    batch = next(loaders(channels_last=False).train.epoch(0))
    assert batch["pixel_values"].is_contiguous()


def test_mixing_makes_labels_soft_in_training_only(loaders):
    ours = loaders(EVERYTHING)
    labels = next(ours.train.epoch(0))["labels"]
    assert labels.shape == (4, 3) and labels.dtype == torch.float32
    assert next(ours.val.epoch())["labels"].dtype == torch.int64


def test_any_number_of_workers_gives_identical_batches(loaders):
    runs = [collect(loaders({**EVERYTHING, "num_workers": workers}).train.epoch(2)) for workers in (0, 1, 2)]
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_gives_the_batches_of_the_uninterrupted_run(loaders, workers):
    ours = loaders({**EVERYTHING, "num_workers": workers}, plan=BatchPlan(4, accumulation_steps=2))
    whole = collect(ours.train.epoch(4))
    assert same(whole[2 * 3 :], collect(ours.train.epoch(4, start_update=3)))
    assert not same(whole, collect(ours.train.epoch(5)))


def test_what_resume_skips_is_not_even_opened(loaders, monkeypatch):
    ours = loaders()
    split = ours.train._backend._dataset.split
    opened = []
    read = split.read
    monkeypatch.setattr(split, "read", lambda index: opened.append(index) or read(index))
    resumed = [i for b in ours.train.epoch(0, start_update=13) for i in b["index"].tolist()]
    assert opened == resumed and len(resumed) == 8


def test_two_ranks_see_what_one_accumulating_rank_sees(loaders):
    one = collect(loaders(EVERYTHING, plan=BatchPlan(4, accumulation_steps=2)).train.epoch(1))
    plans = (BatchPlan(4, world_size=2, rank=rank) for rank in (0, 1))
    first, second = (collect(loaders(EVERYTHING, plan=plan).train.epoch(1)) for plan in plans)
    assert same(one, [batch for pair in zip(first, second) for batch in pair])


def test_an_epoch_left_early_does_not_disturb_the_next(loaders):
    ours = loaders({"num_workers": 2})
    expected = collect(ours.train.epoch(1))
    for _ in range(3):
        iterator = ours.train.epoch(0)
        next(iterator)
        iterator.close()
    assert same(expected, collect(ours.train.epoch(1)))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_sees_every_picture_once_and_in_the_processors_pixels(loaders, pictures, world_size):
    split = DataSource.from_folder(str(pictures)).val
    processor = EfficientNetNVImageProcessor.for_image_size(32)
    seen = []
    for rank in range(world_size):
        ours = loaders(EVERYTHING, plan=BatchPlan(4, world_size, rank=rank), train=False)
        assert ours.train is None
        for batch in ours.val.epoch():
            seen += batch["index"].tolist()
            expected = processor([Image.open(split.name(i)) for i in batch["index"].tolist()], return_tensors="pt")
            assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert sorted(seen) == list(range(21))


def test_on_real_photographs_evaluation_is_the_processors(real_pictures, recipe):
    root = real_pictures("imagenet_samples.tar")
    processor = EfficientNetNVImageProcessor.for_image_size(224)
    with build_loaders(recipe(data_dir=str(root)), processor, BatchPlan(83), train=False) as ours:
        (batch,) = ours.val.epoch()
    split = DataSource.from_folder(str(root), train=False).val
    for row in range(0, 83, 4):
        expected = processor(Image.open(split.name(row)), return_tensors="pt")["pixel_values"][0]
        assert torch.equal(batch["pixel_values"][row], expected)


def test_synthetic_batches_are_made_once(loaders):
    ours = loaders({"data_dir": None, "loader": "synthetic", "num_labels": 7, "mixup": 0.2})
    assert len(ours.class_names) == 7 and ours.train.num_samples == 1_281_167
    iterator = ours.train.epoch(0)
    first, second = next(iterator), next(iterator)
    assert first["pixel_values"].data_ptr() == second["pixel_values"].data_ptr()
    assert first["labels"].shape == (4, 7) and first["index"].tolist() != second["index"].tolist()
    validation = next(ours.val.epoch())
    assert abs(float(validation["pixel_values"].std()) - 1) < 0.1
    assert validation["labels"].dtype == torch.int64 and int(validation["labels"].max()) < 7
    assert sum(1 for _ in ours.train.epoch(0, start_update=ours.train.updates_per_epoch - 2)) == 2


def test_problems_are_named_with_their_flag(loaders):
    with pytest.raises(
        UserError,
        match="no data: give --data_dir DIR, --labels FILE.csv, --dataset_name user/name, or --loader synthetic",
    ):
        loaders({"data_dir": None})
    with pytest.raises(UserError, match="--num_labels is 5, but the data has 3 classes"):
        loaders({"num_labels": 5})
    with pytest.raises(UserError, match="lower --global_batch_size, e.g. to 8"):
        loaders(plan=BatchPlan(61))
    with pytest.raises(UserError, match="dali-gpu decodes on a CUDA GPU and this run has none; use --loader dali-cpu"):
        pytest.importorskip("nvidia.dali")
        loaders({"loader": "dali-gpu"})


def test_a_dead_worker_is_one_sentence(loaders):
    ours = loaders({"num_workers": 1})
    pool = ours.train._backend
    prepare = pool._dataset.prepare
    pool._dataset.prepare = lambda picture, seed: time.sleep(0.2) or prepare(picture, seed)
    iterator = ours.train.epoch(0)
    next(iterator)
    (worker,) = pool._loader._iterator._workers
    threading.Timer(0.3, worker.kill).start()  # while we wait for the next batch
    with pytest.raises(UserError, match=r"a loader process died .*--num_workers.*--shm-size"):
        list(iterator)


def test_closing_ends_the_workers(loaders):
    ours = loaders({"num_workers": 2})
    next(ours.train.epoch(0))
    workers = ours.train._backend._loader._iterator._workers
    ours.close()
    assert not any(process.is_alive() for process in workers)


def test_the_loader_says_what_limits_a_run(loaders):
    ours = loaders()
    assert ours.train.limit(0.01, 10).startswith("The device is the limit")
    assert ours.train.limit(5, 5).startswith("The loader is the limit: the device waits for data 50% of the time")


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"data_wait": 0.2, "compute": 10}, "The device is the limit: it waits for data 2.0% of the time"),
        ({"data_wait": 0, "compute": 0}, "The device is the limit: it waits for data 0.0%"),
        ({"free_cores": 5.5, "num_workers": 2}, "could go up to 3.0x as fast; raise --num_workers from 2 to 7"),
        ({"device_type": "cuda"}, "so let the GPU decode: --loader dali-gpu (pip install nvidia-dali-cuda130)."),
        ({"device_type": "cuda", "dali_installed": True}, "so let the GPU decode: --loader dali-gpu."),
        ({"decodes_parts": False}, "pip install nvidia-nvimgcodec-cu13, and only what a crop needs is decoded"),
        ({}, "store the images smaller"),
        ({"loader": "dali-cpu"}, "store the images smaller"),
        ({"loader": "dali-gpu", "device_type": "cuda"}, "store the images smaller"),
        ({"loader": "synthetic"}, "synthetic batches are made once"),
    ],
)
def test_the_limit_is_named_with_what_to_change(options, expected):
    sentence = limit_sentence(**{"data_wait": 2.0, "compute": 1.0, **options})
    assert expected in sentence and sentence.endswith(".") and "\n" not in sentence


def test_a_balanced_epoch_shows_a_repeated_image_differently_each_time(loaders, pictures, tmp_path):
    few = tmp_path / "few"
    for name, count in (("bird", 2), ("cat", 20), ("dog", 20)):
        for split in ("train", "val"):
            (few / split / name).mkdir(parents=True)
            for file in sorted((pictures / "train" / name).iterdir())[:count]:
                shutil.copy(file, few / split / name)
    options = {"data_dir": str(few), "sampler": "balanced"}
    plain = collect(loaders(options).train.epoch(1))
    workers = collect(loaders({**options, "num_workers": 2}).train.epoch(1))
    assert same(plain, workers) and same(plain[3:], collect(loaders(options).train.epoch(1, start_update=3)))
    labels = torch.tensor(sum((labels for _, labels, _ in plain), []))
    assert labels.bincount().tolist() in ([13, 13, 14], [13, 14, 13], [14, 13, 13])
    first = [pixels[i] for index, _, pixels in plain for i, number in enumerate(index) if number == 0]
    assert len(first) in (6, 7) and len({image.numpy().tobytes() for image in first}) == len(first)


def test_erasing_and_strength_reach_every_pipeline_of_training_alone(loaders):
    ours = loaders({"random_erasing": 1.0, "horizontal_flip": 0.0})
    assert all((batch["pixel_values"] == 0).all(1).any() for batch in ours.train.epoch())
    assert not any((batch["pixel_values"] == 0).all(1).any() for batch in ours.val.epoch())
    synthetic = loaders({"random_erasing": 1.0, "loader": "synthetic"})
    assert (next(synthetic.train.epoch())["pixel_values"] == 0).all(1).any()
    strong = loaders({"augmentation": "randaugment", "randaugment_operations": 3, "randaugment_magnitude": 1})
    policy = strong.train._backend._dataset.transform.policy._transform
    assert (policy.num_ops, policy.magnitude) == (3, 1)


def test_class_weights_are_those_of_the_training_images_and_said(loaders, recipe, tmp_path):
    (tmp_path / "weights.csv").write_text("bird,1\ncat,1\ndog,4\n")
    ours = loaders({"class_weights": str(tmp_path / "weights.csv")})
    assert ours.class_weights.tolist() == [0.5, 0.5, 2.0]
    assert "class weights of the training loss: 0.5 (bird) to 2 (dog); the validation loss has none." in ours.notes
    assert loaders({"class_weights": "balanced"}).class_weights.tolist() == [1.0, 1.0, 1.0]
    assert loaders().class_weights is None
    assert loaders({"class_weights": "balanced"}, train=False).class_weights is None


def test_several_labels_cannot_be_sampled_evenly_but_weighed(loaders, pictures, tmp_path):
    rows = [f"train/{name}/{i:02}.{'png' if i % 7 == 3 else 'jpg'},{label}" for name, label in
            (("bird", "bird"), ("cat", "bird;cat"), ("dog", "dog")) for i in range(20)]  # fmt: skip
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *rows]))
    options = {"labels": str(tmp_path / "labels.csv"), "label_separator": ";", "folds": 2, "fold": 1}
    with pytest.raises(UserError, match="--sampler balanced needs one label per image.*--class_weights balanced"):
        loaders({**options, "sampler": "balanced"})
    ours = loaders({**options, "class_weights": "balanced"})
    counts = ours.label_sets[[ours.train._backend._dataset.split.label(i) for i in range(30)]].sum(0)
    assert ours.class_weights == pytest.approx((30 - counts) / counts)
