"""What the clocks are made of: turns, ratios, counted bytes and FLOPs, peaks of memory."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from effnet_hf.benchmark import memory, roofline
from effnet_hf.benchmark.contenders import PEERS, build, logits_of, pictures, training_step
from effnet_hf.benchmark.timing import Samples, speed_up, take_turns
from effnet_hf.errors import UserError


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
    figures = own.summary(pictures=8)
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
    assert checkpointed["training_mb"] < 0.9 * plain["training_mb"]
    assert checkpointed["inference_mb"] == pytest.approx(plain["inference_mb"], rel=0.01)


def test_peers_are_the_same_network():
    counts = {name: sum(p.numel() for p in build(name, "b0", 64).parameters()) for name in ("effnet_hf", *PEERS)}
    assert set(counts.values()) == {5_288_548}
    with pytest.raises(UserError, match="timm has no widese-b0"):
        build("timm", "widese-b0", 64)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_step_trains(precision):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 1000))
    step = training_step("timm", model, pictures(8, 8, CPU, channels_last=True), precision)
    losses = [step().item() for _ in range(30)]
    assert losses[-1] < losses[0]
    assert logits_of(SimpleNamespace(logits=1)) == 1
