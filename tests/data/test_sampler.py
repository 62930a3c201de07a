import numpy as np
import pytest

from effnet_hf.data.sampler import TrainingPlan, ValidationPlan, epoch_order, mix
from effnet_hf.errors import UserError


def indices(plan, epoch=0, start_update=0):
    return [request.indices.tolist() for request in plan.requests(epoch, start_update)]


def test_order_is_a_permutation_that_only_seed_and_epoch_decide():
    orders = {(seed, epoch): epoch_order(1000, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)}
    for order in orders.values():
        assert sorted(order) == list(range(1000))
    assert len({tuple(order) for order in orders.values()}) == 4
    assert epoch_order(1000, 0, 1).tolist() == orders[0, 1]


def test_order_never_changes_between_versions():
    # A checkpoint written today must find its position in next year's release.
    assert epoch_order(10, 42, 3).tolist() == [8, 0, 3, 7, 1, 4, 2, 9, 6, 5]
    assert mix(1, 2, 3) == 15020427595393229491


def test_order_of_neighbours_is_unrelated():
    order = epoch_order(100_000, 0, 0)
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.01
    assert abs(np.corrcoef(order, epoch_order(100_000, 0, 1))[0, 1]) < 0.01
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.01


def test_two_ranks_and_two_accumulation_steps_see_the_same_micro_batches():
    accumulating = list(TrainingPlan(100, 4, seed=1, steps_per_update=2).requests(7))
    first, second = (list(TrainingPlan(100, 4, seed=1, rank=r, world_size=2).requests(7)) for r in (0, 1))
    together = [request for pair in zip(first, second) for request in pair]
    assert [request.slot for request in together] == [request.slot for request in accumulating] == list(range(24))
    for a, b in zip(accumulating, together):
        assert a.indices.tolist() == b.indices.tolist()


def test_an_epoch_uses_each_picture_at_most_once_and_drops_less_than_a_global_batch():
    plan = TrainingPlan(103, 4, steps_per_update=3)
    seen = sum(indices(plan), [])
    assert plan.updates_per_epoch == 8 and len(seen) == len(set(seen)) == 96


@pytest.mark.parametrize("update", [0, 1, 5, 12])
def test_resume_continues_the_same_sequence(update):
    plan = TrainingPlan(100, 4, seed=3, rank=1, world_size=2)
    assert indices(plan, 2, update) == indices(plan, 2)[update:]


def test_a_batch_larger_than_the_data_names_the_numbers_and_the_flag():
    with pytest.raises(
        UserError, match=r"64 images \(8 per device x 4 devices x 2 .*has 60; lower --global_batch_size"
    ):
        TrainingPlan(60, 8, world_size=4, steps_per_update=2)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("num_samples", [1, 7, 20, 41])
def test_validation_sees_every_picture_once_over_all_ranks(world_size, num_samples):
    plans = [ValidationPlan(num_samples, 4, rank, world_size) for rank in range(world_size)]
    seen = [index for plan in plans for batch in indices(plan) for index in batch]
    assert sorted(seen) == list(range(num_samples))
    assert [len(indices(plan)) for plan in plans] == [plan.batches_per_epoch for plan in plans]
