"""What the clocks are made of: turns, ratios, counted bytes and FLOPs, peaks of memory."""

import time
from types import SimpleNamespace

import pytest
import torch
from lib import memory, roofline, train
from lib.contenders import PEERS, build, images, logits_of, training_step
from lib.environment import resolve_device
from lib.timing import Samples, ratios, speed_up, take_turns
from torch import nn

from effnet_hf import EfficientNetNVConfig
from effnet_hf.errors import UserError
from effnet_hf.recipes import load_recipe
from effnet_hf.training import steps


CPU = torch.device("cpu")


def test_contenders_take_turns_in_changing_order_and_warm_up_is_not_counted():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    samples = take_turns(steps, CPU, rounds=6, warmup=2, burst=2)
    turns = ["".join(calls[i : i + 6 : 2]) for i in range(0, len(calls), 6)]
    assert len(turns) == 8 and all(sorted(turn) == ["a", "b", "c"] for turn in turns) and len(set(turns)) > 1
    assert {len(own.wall) for own in samples.values()} == {len(own.cpu) for own in samples.values()} == {6}


def test_no_round_starts_after_the_deadline_once_three_are_counted():
    samples = take_turns({"a": lambda: None}, CPU, rounds=50, deadline=time.monotonic() - 1)
    assert len(samples["a"].wall) == 3


def test_denormal_numbers_are_zero_while_steps_are_timed_and_only_then():
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor cannot")

    def smallest() -> float:
        return (torch.full((8,), 1e-39) * 0.5).sum().item()

    seen = []
    take_turns({"a": lambda: seen.append(smallest())}, CPU, rounds=1)
    assert set(seen) == {0.0} and smallest() > 0


def test_a_summary_has_medians_quartiles_and_percentiles_in_milliseconds():
    own = Samples(wall=[0.001 * i for i in range(1, 102)], cpu=[0.002] * 101)
    figures = own.summary(images=8)
    assert figures["wall_ms"] == figures["p50_ms"] == pytest.approx(51)
    assert (figures["wall_ms_q25"], figures["wall_ms_q75"]) == pytest.approx((26, 76))
    assert figures["p99_ms"] == pytest.approx(100) and figures["cpu_ms"] == pytest.approx(2)
    assert figures["ips"] == pytest.approx(8 / 0.051) and figures["steps"] == 101


def test_a_speed_up_is_the_median_of_the_ratios_within_a_round():
    fast, slow = Samples([1, 1, 9], [1, 1, 1]), Samples([2, 2, 9], [3, 3, 30])  # the third round was disturbed
    assert speed_up(fast, slow, on_cpu=True) == {"wall": 2, "cpu": 3, "cpu_best": 3}
    assert "cpu" not in speed_up(fast, slow, on_cpu=False)


def test_counted_flops_are_the_papers_and_a_training_step_has_three_times_as_many():
    b0 = roofline.count("b0", 224)
    assert b0["inference"]["flops"] == pytest.approx(2 * 0.386e9, rel=0.02)  # 0.39 G multiply-adds
    assert b0["training"]["flops"] == pytest.approx(3 * b0["inference"]["flops"])
    assert b0["inference"]["fused_bytes"] < b0["inference"]["eager_bytes"] < b0["training"]["eager_bytes"]
    half = roofline.count("b0", 224, torch.bfloat16)
    assert half["inference"]["eager_bytes"] == pytest.approx(b0["inference"]["eager_bytes"] / 2, rel=0.02)


def test_bytes_are_those_of_inputs_and_outputs():
    x, weight = torch.zeros(2, 3, 8, 8), torch.zeros(4, 3, 1, 1)
    with roofline.ByteCounter() as counter:
        y = torch.conv2d(x, weight)
        y.view(-1)
        y + 1
    product = 4 * (x.numel() + weight.numel() + y.numel())
    assert counter.product_bytes == product and counter.bytes == product + 4 * 2 * y.numel()


def test_bounds_follow_from_peaks():
    figures = {"flops": 1e9, "eager_bytes": 2e8, "fused_bytes": 1e8}
    bounds = roofline.bound(figures, {"tb_per_s": 1, "tflops": 2})
    assert bounds == {"compute_ips": 2000, "eager_memory_ips": 5000, "fused_memory_ips": 10000}


def test_the_peak_of_memory_counts_what_lives_at_once():
    def step():
        first = torch.ones(2**18)  # 1 MiB
        del first
        second = torch.ones(2**18)
        return second + second  # 2 MiB at once

    assert memory.peak(step, CPU, living=2**20) == pytest.approx(3, abs=0.01)


def test_checkpointing_lowers_the_peak_of_training():
    plain, checkpointed = (
        memory.peaks("effnet_hf", "b0", 64, 4, "fp32", checkpointing, CPU) for checkpointing in (False, True)
    )
    # 23 MiB of 119 in a process of its own, 11 of 103 with torch 2.9; a difference, because tensors of other tests
    # are in both peaks.
    assert plain["training_mb"] - checkpointed["training_mb"] > 8
    assert checkpointed["inference_mb"] == pytest.approx(plain["inference_mb"], rel=0.01)


def test_peers_are_the_same_network():
    counts = {name: sum(p.numel() for p in build(name, "b0", 64).parameters()) for name in ("effnet_hf", *PEERS)}
    assert set(counts.values()) == {5_288_548}
    with pytest.raises(UserError, match="timm has no widese-b0"):
        build("timm", "widese-b0", 64)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_step_trains(precision):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 1000))
    step = training_step("timm", model, images(8, 8, CPU, channels_last=True), precision)
    losses = [step().item() for _ in range(30)]
    assert losses[-1] < losses[0]
    assert logits_of(SimpleNamespace(logits=1)) == 1


def test_a_contender_whose_memory_is_full_is_out_and_the_others_go_on():
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    told = []
    samples = take_turns(
        {"a": lambda: None, "b": full}, CPU, rounds=3, failed=lambda name, error: told.append((name, str(error)))
    )
    assert told == [("b", "CUDA out of memory.")] and samples.keys() == {"a"} and len(samples["a"].wall) == 3
    with pytest.raises(torch.OutOfMemoryError):
        take_turns({"b": full}, CPU, rounds=1)


def test_a_peer_is_compared_eager_in_our_mode_and_at_its_best():
    def taking(seconds):
        return Samples([seconds] * 3, [seconds] * 3)

    samples = {("timm", "eager"): taking(6), ("timm", "compile"): taking(3), ("torchvision", "eager"): taking(9)}
    found = ratios(taking(2), samples, PEERS, ("frozen", "compile"), "eager", torch.device("cuda"))
    assert found["speed_up"] == {"timm": {"wall": 3}, "torchvision": {"wall": 4.5}}
    assert found["same_mode"] == {"timm": {"wall": 1.5}}
    assert found["best"] == {
        "timm": {"wall": 1.5, "mode": "compile"},
        "torchvision": {"wall": 4.5, "mode": "eager"},
    }


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_memory_of_inference_is_measured_in_the_rows_precision(monkeypatch, precision, dtype):
    seen = []
    monkeypatch.setattr(memory, "logits_of", lambda output: seen.append(output.logits.dtype) or output.logits)
    figures = memory.peaks("effnet_hf", "b0", 32, 2, precision, False, CPU)
    assert set(seen) == {dtype} and figures["inference_mb"] > 0


def test_whole_optimizer_steps_are_timed_and_nothing_waits_for_the_device_in_between(monkeypatch, tmp_path):
    told, whole = [], steps.train_step

    def step(run, batch):
        told.append("step")
        return whole(run, batch)

    monkeypatch.setattr(steps, "train_step", step)
    monkeypatch.setattr(steps, "_wait_for", lambda device: told.append("wait"))
    recipe = load_recipe(
        "b0", loader="synthetic", image_size=32, per_device_batch_size=2, global_batch_size=4, output_dir=str(tmp_path),
        precision="fp32", ema_decay=0.9, quiet=True,
    )  # fmt: skip
    figures = steps.benchmark_steps(recipe, "train", 3)
    assert told == ["step"] * 2 * steps.WARMUP + ["wait"] + ["step"] * 2 * 3
    assert figures["steps"] == 3 and figures["images_per_step"] == 4
    assert figures["latency_p50"] <= figures["latency_p99"] <= figures["latency_max"]
    assert 0 < figures["total_ips"] <= figures["compute_ips"]


@pytest.mark.parametrize("name", ["effnet_hf", "timm"])
def test_a_step_on_a_given_batch_computes_in_its_precision_with_our_optimizer(name):
    class Probe(nn.Linear):
        seen: list = []

        def forward(self, pixels):
            output = super().forward(pixels)
            self.seen.append(output.dtype)
            return output

    recipe, labels = load_recipe("b0", global_batch_size=2), torch.tensor([0, 1])
    for precision in ("fp32", "bf16"):
        probe = Probe(4, 3)
        before = probe.weight.detach().clone()
        step = training_step(name, probe, torch.randn(2, 4, 1, 1).flatten(1), precision, recipe=recipe, labels=labels)
        assert step().isfinite() and not torch.equal(probe.weight, before)
    assert Probe.seen == [torch.float32, torch.bfloat16]


def test_fp32_is_not_tf32_before_anybody_asks():
    torch.backends.cudnn.allow_tf32 = True
    resolve_device("cpu")
    assert not torch.backends.cudnn.allow_tf32


class TestLargestBatch:
    """`--batch_size largest`, with a device that is full from some batch on."""

    @pytest.fixture
    def largest(self, monkeypatch):
        monkeypatch.setattr(train, "build", lambda *_: nn.Identity())
        monkeypatch.setattr(train, "largest_map", lambda *_: 2**20)
        monkeypatch.setattr(train, "images", lambda batch, *_: torch.empty(batch))

        def search(most, error):
            tried, released = [], []
            monkeypatch.setattr(train, "release", released.append)  # which goes through all of this process's objects

            def step_of(name, model, pixels, precision):
                tried.append(len(pixels))
                if len(pixels) > most:
                    raise error
                return lambda: None

            monkeypatch.setattr(train, "training_step", step_of)
            found = train.largest_batch("b0", "bf16", "nchw", 224, CPU)
            assert len(released) == len(tried)
            return found, tried

        return search

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
            RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
            RuntimeError("GET was unable to find an engine to execute this computation"),
            RuntimeError("Expected canUse32BitIndexMath(input) to be true, but got false."),
        ],
        ids=str,
    )
    def test_what_cuda_says_of_too_much_halves_the_batch(self, largest, error):
        assert largest(100, error)[0] == 64

    def test_no_tensor_gets_more_elements_than_32_bits_count(self, largest):
        found, tried = largest(10**9, None)
        assert found == max(tried) == 1024  # 2,048 images would be 2^31 elements

    def test_another_error_is_not_taken_for_a_full_memory(self, largest):
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            largest(100, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))

    def test_where_nothing_fits_it_says_so(self, largest):
        with pytest.raises(UserError, match="not even one image"):
            largest(0, torch.OutOfMemoryError("CUDA out of memory."))

    def test_the_largest_map_of_b0_is_the_first_expansions(self):
        assert train.largest_map(EfficientNetNVConfig.from_variant("b0"), 224) == 96 * 112 * 112
