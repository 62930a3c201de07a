"""Worker counts, the sentence about limits, reading ahead, the device stage."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

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
    "device, cores, expected",
    [("cuda", 16, 15), ("cuda", 12.8, 11), ("cuda", 256, 32), ("cuda", 1, 0), ("cpu", 16, 1), ("cpu", 1.5, 0)],
)
def test_workers_leave_a_core_to_the_trainer(device, cores, expected):
    assert workers.choose_workers(device, cores) == expected


def spans(*bounds):
    return [set(range(*span)) for span in bounds]


@pytest.mark.parametrize(
    "masks, quota, expected",
    [
        # DGX H100: 224 CPUs, each half beside four GPUs. DGX A100: 256 CPUs in eight nodes, two GPUs beside a node.
        pytest.param(spans(*[(0, 112)] * 4, *[(112, 224)] * 4), None, 28, id="four GPUs a socket"),
        pytest.param(spans(*[(32 * (i // 2), 32 * (i // 2) + 32) for i in range(8)]), None, 16, id="two GPUs a node"),
        pytest.param(spans(*[(32 * i, 32 * i + 32) for i in range(8)]), None, 32, id="one GPU a node"),
        pytest.param(spans(*[(0, 224)] * 8), None, 28, id="no affinity"),
        pytest.param(spans(*[(0, 16)] * 8), None, 2, id="taskset on the launcher"),
        pytest.param(spans((0, 8), (4, 12)), None, 6, id="overlapping masks"),
        pytest.param(spans(*[(0, 112)] * 4, *[(112, 224)] * 4), 64, 8, id="a container's quota"),
        pytest.param(spans((0, 224)), 64, 64, id="one process"),
    ],
)
def test_cores_are_divided_by_those_that_share_them(tmp_path, monkeypatch, masks, quota, expected):
    if quota is not None:
        (tmp_path / "cpu.max").write_text(f"{quota * 100000} 100000\n")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(len(masks)))
    monkeypatch.setattr(workers, "_own_mask", lambda: masks[0])
    monkeypatch.setattr(workers, "_masks_of_all", lambda: masks)
    assert workers.own_cores(tmp_path, tmp_path / "none") == pytest.approx(expected)


@pytest.mark.parametrize("seen", [0, 7])
def test_processes_that_cannot_be_found_are_taken_to_share_every_core(tmp_path, monkeypatch, seen):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(workers, "_own_mask", lambda: set(range(16)))
    monkeypatch.setattr(workers, "_masks_of_all", lambda: [{i} for i in range(seen)])
    assert workers.own_cores(tmp_path, tmp_path / "none") == 2


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity masks are Linux's")
def test_masks_are_read_from_the_launchers_children(tmp_path):
    """Real processes: two ranks and a bystander without a rank, of which only the ranks count."""
    cores = sorted(os.sched_getaffinity(0))
    own, other = {cores[0]}, {cores[-1]}
    ranks = {**os.environ, "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    program = "import importlib.util as u, sys; s = u.spec_from_file_location('w', sys.argv[1]);"
    program += " w = u.module_from_spec(s); s.loader.exec_module(w); input(); print(w.own_cores('/none', '/none'))"
    waiting = [sys.executable, "-c", "input()"]
    without = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(argv, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            )
            for argv, env in (
                ([sys.executable, "-c", program, workers.__file__], ranks),
                (waiting, {**ranks, "LOCAL_RANK": "1"}),
                (waiting, without),
            )
        ]
        for process, mask in zip(started, (own, other, own)):
            os.sched_setaffinity(process.pid, mask)
        share, _ = started[0].communicate("go\n", timeout=60)
        for process in started[1:]:
            process.communicate("go\n", timeout=60)
    assert float(share) == (1 if own != other else 0.5)


def test_the_launcher_says_how_many_processes_share_the_machine(monkeypatch):
    monkeypatch.setattr(workers, "_own_mask", lambda: set(range(16)))
    monkeypatch.setattr(workers, "_quota", lambda root, membership: float("inf"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert workers.choose_workers("cuda") == 3
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert workers.choose_workers("cuda") == 15


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


@pytest.fixture
def pretended_cuda(monkeypatch):
    """CUDA's streams and events as stand-ins, and a stage on a CPU that thinks it is a GPU's; returns what was made."""
    made, waited = [], []

    class Stream:
        def __init__(self, device):
            made.append(self)

        def record_event(self):
            return object()

    current = SimpleNamespace(wait_event=waited.append)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)

    def stage():
        made_on_cpu = DeviceStage("cpu", IMAGENET_MEAN, IMAGENET_STD)
        made_on_cpu.stage = lambda batch: {name: batch[name] for name in ("pixel_values", "labels", "index")}
        made_on_cpu.device = torch.device("cuda")
        return made_on_cpu

    return SimpleNamespace(stage=stage, streams=made, waited=waited)


def test_a_stage_has_one_stream_for_all_its_epochs(pretended_cuda):
    train, val = pretended_cuda.stage(), pretended_cuda.stage()
    for _ in range(3):
        assert len(list(train(iter([host_batch()] * 4)))) == 4
        assert len(list(val(iter([host_batch()] * 2)))) == 2
    assert len(pretended_cuda.streams) == 2


def test_iterations_of_one_stage_may_overlap_or_be_left_early(pretended_cuda):
    stage = pretended_cuda.stage()
    left = stage(iter([host_batch(count=1 + i) for i in range(4)]))
    next(left)
    both = zip(stage(iter([host_batch(count=2)] * 3)), stage(iter([host_batch(count=3)] * 3)))
    assert [(len(a["labels"]), len(b["labels"])) for a, b in both] == [(2, 3)] * 3
    left.close()
    assert len(list(stage(iter([host_batch()])))) == 1
    assert len(pretended_cuda.streams) == 1
    assert len(set(map(id, pretended_cuda.waited))) == len(pretended_cuda.waited) == 8  # each batch's own event


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
