"""Worker counts, the sentence about limits, reading ahead, the device stage."""

import threading
import time

import numpy as np
import pytest
import torch

from effnet_hf import EfficientNetNVImageProcessor
from effnet_hf.data import workers
from effnet_hf.data.limits import limit_sentence
from effnet_hf.data.prefetch import DeviceStage
from effnet_hf.data.read_ahead import read_ahead
from effnet_hf.image_processing_efficientnet_nv import IMAGENET_MEAN, IMAGENET_STD


def host_batch(count=5, size=24):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8))
    return {"pixel_values": pixels, "labels": torch.arange(count), "index": torch.arange(count), "request": None}


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu.max": "nonsense"}, None),
        # A batch system's limit lies on the job's group, or on one above it.
        ({"cpu.max": "max 100000\n", "job/cpu.max": "300000 100000\n", "job/step/cpu.max": "max 100000\n"}, 3.0),
        ({"cpu/job/step/cpu.cfs_quota_us": "250000\n", "cpu/job/step/cpu.cfs_period_us": "100000\n"}, 2.5),
    ],
)
def test_container_quotas_count(tmp_path, monkeypatch, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "membership").write_text("5:cpu,cpuacct:/job/step\n3:memory:/\n0::/job/step\n")
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert workers.usable_cores(tmp_path, tmp_path / "membership") == (64 if expected is None else expected)


@pytest.mark.parametrize(
    "device, cores, processes, expected",
    [
        ("cuda", 16, 1, 15),
        ("cuda", 96, 8, 11),
        ("cuda", 256, 1, 32),
        ("cuda", 1, 1, 0),
        ("cpu", 16, 1, 1),
        ("cpu", 1.5, 1, 0),
    ],
)
def test_workers_leave_a_core_to_each_process(device, cores, processes, expected):
    assert workers.choose_workers(device, cores, processes) == expected


def test_the_launcher_says_how_many_processes_share_the_machine(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert workers.choose_workers("cuda", 16) == 3
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert workers.choose_workers("cuda", 16) == 15


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"data_wait": 0.2, "compute": 10}, "The device is the limit: it waits for data 2.0% of the time"),
        ({"data_wait": 0, "compute": 0}, "The device is the limit: it waits for data 0.0%"),
        ({"free_cores": 5.5, "num_workers": 2}, "could go up to 3.0x as fast; raise --num_workers from 2 to 7"),
        ({"device_type": "cuda"}, "so let the GPU decode: --loader dali-gpu (pip install nvidia-dali-cuda130)."),
        ({"device_type": "cuda", "dali_installed": True}, "so let the GPU decode: --loader dali-gpu."),
        ({}, "--loader dali-cpu decodes only what a crop needs (pip install"),
        ({"loader": "dali-cpu"}, "store the pictures smaller"),
        ({"loader": "dali-gpu", "device_type": "cuda"}, "store the pictures smaller"),
        ({"loader": "synthetic"}, "synthetic batches are made once"),
    ],
)
def test_the_limit_is_named_with_what_to_change(options, expected):
    sentence = limit_sentence(**{"data_wait": 2.0, "compute": 1.0, **options})
    assert expected in sentence and sentence.endswith(".") and "\n" not in sentence


def test_normalising_rounds_like_the_image_processor():
    batch = host_batch()
    ours = DeviceStage("cpu", IMAGENET_MEAN, IMAGENET_STD).stage(batch)["pixel_values"]
    processor = EfficientNetNVImageProcessor(do_resize=False, do_center_crop=False)
    assert torch.equal(ours, processor(list(batch["pixel_values"].numpy()), return_tensors="pt")["pixel_values"])


def test_the_mixer_sees_normalised_pixels():
    seen = []

    def mixer(pixels, labels, request):
        seen.append(pixels.clone())
        return pixels, labels

    plain = DeviceStage("cpu", IMAGENET_MEAN, IMAGENET_STD).stage(host_batch())["pixel_values"]
    DeviceStage("cpu", IMAGENET_MEAN, IMAGENET_STD, mixer=mixer).stage(host_batch())
    assert torch.equal(seen[0], plain)


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [True, False])
def test_the_side_stream_gives_the_cpus_batches_one_ahead(channels_last):
    fetched = []

    def source():
        for i in range(6):
            fetched.append(i)
            batch = host_batch(count=4 + i)
            yield {name: value.pin_memory() if torch.is_tensor(value) else value for name, value in batch.items()}

    expected = list(DeviceStage("cpu", IMAGENET_MEAN, IMAGENET_STD, channels_last)(iter(list(source()))))
    fetched.clear()
    for i, batch in enumerate(DeviceStage("cuda", IMAGENET_MEAN, IMAGENET_STD, channels_last)(source())):
        assert len(fetched) == min(i + 2, 6)
        assert torch.equal(batch["pixel_values"].cpu(), expected[i]["pixel_values"])
        assert batch["labels"].is_cuda and torch.equal(batch["labels"].cpu(), expected[i]["labels"])


def test_reading_ahead_keeps_order_and_runs_ahead():
    done = []

    def numbers():
        for i in range(10):
            done.append(i)
            yield i

    ahead = read_ahead(numbers(), depth=3)
    assert next(ahead) == 0
    deadline = time.monotonic() + 5
    while len(done) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 4 <= len(done) <= 6
    assert list(ahead) == list(range(1, 10))


def test_reading_ahead_passes_errors_on_and_stops_with_its_reader():
    def failing():
        yield 1
        raise OSError("gone")

    ahead = read_ahead(failing())
    assert next(ahead) == 1
    with pytest.raises(OSError, match="gone"):
        next(ahead)
    endless = read_ahead(iter(int, 1))
    next(endless)
    endless.close()
    assert not any(thread.name == "read_ahead" for thread in threading.enumerate())
