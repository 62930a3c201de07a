import time

import numpy as np
import pytest

from effnet_hf.data.sampler import (
    BalancedTrainingPlan,
    TrainingPlan,
    ValidationPlan,
    balanced_order,
    epoch_order,
    mix,
)
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


# ---- every class as often

UNBALANCED = np.repeat([2, 0, 5], [31, 7, 2])[np.random.default_rng(0).permutation(40)]  # of classes 0 to 5, three


def balanced(**options):
    return BalancedTrainingPlan(40, 4, labels=UNBALANCED, **options)


def test_a_balanced_epoch_has_every_class_as_often_and_as_many_updates():
    plan, plain = balanced(seed=1, steps_per_update=3), TrainingPlan(40, 4, seed=1, steps_per_update=3)
    assert plan.updates_per_epoch == plain.updates_per_epoch == 3
    for epoch in range(6):
        seen = sum(indices(plan, epoch), [])
        counts = np.bincount(UNBALANCED[seen], minlength=6)
        assert counts[[1, 3, 4]].tolist() == [0, 0, 0] and counts[[0, 2, 5]].tolist() == [12, 12, 12]


def test_what_does_not_divide_goes_round_the_classes_from_epoch_to_epoch():
    counts = sum(np.bincount(UNBALANCED[balanced_order(UNBALANCED, 40, 0, epoch)[0]]) for epoch in range(3))
    assert counts.tolist() == [40, 0, 40, 0, 0, 40]


def test_no_image_of_a_class_is_taken_again_before_all_others_were_over_all_epochs():
    taken = np.concatenate([balanced_order(UNBALANCED, 40, 7, epoch)[0] for epoch in range(31)])
    for name in (0, 2, 5):
        own = np.flatnonzero(name == UNBALANCED)
        times = np.bincount(taken, minlength=40)[own]
        assert times.max() - times.min() <= 1 and times.sum() in (413, 414)
    order = balanced_order(UNBALANCED, 40, 7, 3)[0]
    assert order.tolist() != np.sort(order).tolist()
    assert balanced_order(UNBALANCED, 40, 7, 4)[0].tolist() != balanced_order(UNBALANCED, 40, 8, 4)[0].tolist()


def test_the_balanced_order_never_changes_between_versions():
    order, repeats = balanced_order(np.array([0, 0, 0, 1]), 6, 42, 3)
    assert (order.tolist(), repeats.tolist()) == ([1, 3, 0, 3, 2, 3], [0, 0, 0, 1, 0, 2])


@pytest.mark.parametrize("update", [0, 1, 4])
def test_a_balanced_run_resumes_in_the_same_sequence_whatever_the_processes(update):
    plan = balanced(seed=3, steps_per_update=2)
    whole = [(r.slot, r.indices.tolist(), r.repeats.tolist()) for r in plan.requests(2, update)]
    assert whole == [(r.slot, r.indices.tolist(), r.repeats.tolist()) for r in plan.requests(2)][2 * update :]
    ranks = [list(balanced(seed=3, rank=rank, world_size=2).requests(2, update)) for rank in (0, 1)]
    together = [request for pair in zip(*ranks) for request in pair]
    assert whole == [(r.slot, r.indices.tolist(), r.repeats.tolist()) for r in together]


def test_an_image_has_another_seed_each_time_it_appears_and_the_plain_one_the_first_time():
    seeds = {}
    for request in balanced(seed=3).requests(1):
        for index, repeat, seed in zip(request.indices.tolist(), request.repeats.tolist(), request.seeds(3)):
            assert seed == (mix(3, 1, index, repeat) if repeat else mix(3, 1, index))
            seeds.setdefault(index, []).append(seed)
    rare = [seeds[index] for index in np.flatnonzero(UNBALANCED == 5).tolist()]
    assert all(len(each) > 5 and len(set(each)) == len(each) for each in rare)
    request = next(TrainingPlan(40, 4, seed=3).requests(1))
    assert request.repeats is None and request.seeds(3) == [mix(3, 1, index) for index in request.indices.tolist()]


def test_a_large_unbalanced_set_is_ordered_in_seconds():
    labels = np.concatenate([np.arange(999), np.full(500_000, 999)])  # 999 classes of a single image
    started = time.perf_counter()
    order, _ = balanced_order(labels, 500_000, 0, 5)
    assert np.bincount(labels[order]).tolist() == [500] * 1000
    assert time.perf_counter() - started < 10
