"""What a training step takes of a device's memory: the committed table, the count behind it, the device's share."""

from types import SimpleNamespace

import pytest
import torch

from effnet_hf.configuration import VARIANTS, EfficientNetNVConfig
from effnet_hf.recipes import load_recipe
from effnet_hf.training import memory
from effnet_hf.training.memory import MIB, LiveBytes, column, count_step, memory_table, training_need


@pytest.mark.parametrize(
    "variant, precision, checkpointing", [("b0", "bf16", False), ("b0", "fp32", True), ("lite4", "fp32", False)]
)
def test_the_table_is_what_counting_gives(variant, precision, checkpointing):
    """If this fails, the model keeps other tensors than it did: run benchmarks/activation_memory.py."""
    counted = count_step(EfficientNetNVConfig.from_variant(variant), precision, checkpointing)
    assert counted == pytest.approx(memory_table()[variant][column(precision, checkpointing)], rel=0.01)


def test_the_table_knows_every_variant():
    assert list(memory_table()) == list(VARIANTS)
    assert memory_table()["widese-b4"]["parameters"] == 34_927_246 and memory_table()["b0"]["parameters"] == 5_288_548
    for variant, row in memory_table().items():
        assert row["image_size"] == EfficientNetNVConfig.from_variant(variant).image_size
        assert row["half"] < row["single"] < 2 * row["half"]
        assert row["half_checkpointed"] < row["half"] / 2 and row["single_checkpointed"] < row["single"] / 2


def test_figures_that_others_counted_are_met():
    """Saved activations alone, MiB a picture, counted by another script (issue 14): ours have what moves on top."""
    for variant, half, single in (("b0", 42.2, 84.2), ("b4", 313.9, 624.5)):
        row = memory_table()[variant]
        assert half < row["half"] < 1.1 * half and single < row["single"] < 1.1 * single


def test_the_count_is_what_a_real_step_holds(tiny_config):
    """On real tensors of the CPU the same peak, to the byte."""
    config, peaks = tiny_config(), []
    for precision in ("fp32", "bf16"):
        with LiveBytes() as live:
            memory.take_step(config, precision, False, 64, torch.device("cpu"), live.begin)
        staged = 4.25 * 4 * 3 * 32**2
        peaks.append(((live.peak - live.began) / 64 + staged) / MIB)
        assert count_step(config, precision) == pytest.approx(peaks[-1], rel=0.01)
    assert peaks[1] < 0.7 * peaks[0]


def test_living_bytes_are_counted_once_and_given_back():
    with LiveBytes() as live:
        a = torch.zeros(1000)
        view, b = a.view(10, 100), torch.ones(500)
        assert live.now == 6000
        del a
        assert live.now == 6000  # the view still holds it
        del view
        assert live.now == 2000 and live.peak == 6000
        live.begin()
        assert live.peak == 2000
        del b


def test_an_architecture_of_its_own_is_counted_and_a_label_is_not_believed(tiny_config):
    need = training_need(load_recipe("b0"), tiny_config(variant="b7"), 32, "fp32")
    assert need.per_image == MIB * count_step(tiny_config(), "fp32")
    assert need.what == "this architecture, counted just now, at 32 px"
    unnamed = EfficientNetNVConfig.from_variant("b4", variant=None, num_labels=3)
    need = training_need(load_recipe("b0"), unnamed, 760, "tf32")
    assert need.what == "b4 at 760 px" and need.per_image == 4 * MIB * memory_table()["b4"]["single"]


def test_usable_memory_is_the_cards_unless_others_hold_some_and_the_least_of_all_processes(monkeypatch):
    accelerator = SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(memory.accelerate.utils, "gather_object", lambda own: own)
    for free, expected in ((9700, 8500), (9000, 8500), (5800, 5700)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10000))
        assert memory.usable_memory(accelerator) == expected
    monkeypatch.setattr(memory.accelerate.utils, "gather_object", lambda own: [*own, 1234])
    assert memory.usable_memory(accelerator) == 1234
    assert memory.usable_memory(SimpleNamespace(device=torch.device("cpu"))) is None
