import contextlib
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from effnet_hf import EfficientNetNVImageProcessor
from effnet_hf.data.device_stage import BatchMixer, DeviceStage, RandomEraser, draw_box
from effnet_hf.data.sampler import BatchRequest


def host_batch(count=5, size=24):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8))
    return {"pixel_values": pixels, "labels": torch.arange(count), "index": torch.arange(count), "request": None}


def test_normalising_rounds_like_the_image_processor():
    batch = host_batch()
    ours = DeviceStage("cpu", EfficientNetNVImageProcessor()).stage(batch)["pixel_values"]
    processor = EfficientNetNVImageProcessor(do_resize=False, do_center_crop=False)
    assert torch.equal(ours, processor(list(batch["pixel_values"].numpy()), return_tensors="pt")["pixel_values"])


def test_the_mixer_sees_normalised_pixels():
    seen = []

    def mixer(pixels, labels, request):
        seen.append(pixels.clone())
        return pixels, labels

    plain = DeviceStage("cpu", EfficientNetNVImageProcessor()).stage(host_batch())["pixel_values"]
    DeviceStage("cpu", EfficientNetNVImageProcessor(), mixer=mixer).stage(host_batch())
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
        made_on_cpu = DeviceStage("cpu", EfficientNetNVImageProcessor())
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

    expected = list(DeviceStage("cpu", EfficientNetNVImageProcessor(), channels_last)(iter(list(source()))))
    fetched.clear()
    for i, batch in enumerate(DeviceStage("cuda", EfficientNetNVImageProcessor(), channels_last)(source())):
        assert len(fetched) == min(i + 2, 6)
        assert torch.equal(batch["pixel_values"].cpu(), expected[i]["pixel_values"])
        assert batch["labels"].is_cuda and torch.equal(batch["labels"].cpu(), expected[i]["labels"])


# ---- mixup and cutmix


def request(slot=0, epoch=0):
    return BatchRequest(epoch, slot, np.arange(8))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 16, 12, generator=generator), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])


def test_mixup_is_one_weight_and_one_permutation_of_the_batch(batch):
    pixels, labels = batch[0], torch.arange(8)  # every picture its own class: soft labels show who was mixed
    for slot in range(10):
        mixed, soft = BatchMixer(8, seed=0, mixup=0.2)(pixels, labels, request(slot))
        others = soft - torch.diag(soft.diagonal())
        order = torch.where(others.sum(1) > 0, others.argmax(1), labels)
        assert sorted(order.tolist()) == list(range(8))
        moved = order != labels
        weight = soft.diagonal()[moved][0]
        assert torch.equal(soft.diagonal()[moved], weight.expand(int(moved.sum())))
        assert torch.allclose(mixed, pixels * weight + pixels[order] * (1 - weight), atol=1e-6)
        assert torch.allclose(soft.sum(1), torch.ones(8))


def test_it_is_a_function_of_seed_epoch_and_slot(batch):
    pixels, labels = batch

    def first(seed=0, epoch=0, slot=0):
        return BatchMixer(5, seed=seed, mixup=0.2)(pixels, labels, request(slot, epoch))[1]

    assert torch.equal(first(), first())
    others = [first(seed=1), first(epoch=1), first(slot=1)]
    assert not any(torch.equal(first(), other) for other in others)


def test_the_process_wide_generators_are_left_alone(batch):
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    BatchMixer(5, seed=0, mixup=0.2, cutmix=1.0)(*batch, request())
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])


def test_the_weight_follows_the_beta_distribution_unfolded():
    labels = torch.tensor([0, 1])
    weights = []
    for slot in range(2000):
        _, soft = BatchMixer(2, seed=3, mixup=0.2)(torch.zeros(2, 3, 1, 1), labels, request(slot))
        weights.append(float(soft[0, 0]))
    # A permutation of two leaves them in place half the time (weight 1): look at the others.
    moved = [weight for weight in weights if weight < 1]
    assert 800 < len(moved) < 1200
    assert stats.kstest(moved, stats.beta(0.2, 0.2).cdf).pvalue > 0.01


def test_cutmix_swaps_a_rectangle_and_weighs_labels_by_its_area(batch):
    pixels, labels = batch
    for slot in range(20):
        mixed, soft = BatchMixer(5, seed=0, cutmix=1.0)(pixels, labels, request(slot))
        changed = (mixed != pixels).any(1)
        partner_share = changed.float().mean((1, 2))
        for i in range(8):
            if not changed[i].any():
                continue
            rows, columns = changed[i].any(1).nonzero(), changed[i].any(0).nonzero()
            box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
            assert changed[i].sum() == box
            assert abs(float(soft[i, labels[i]]) - (1 - float(partner_share[i]))) < 1e-6 or soft[i].max() == 1
    assert torch.allclose(soft.sum(1), torch.ones(8))


def test_cutmix_boxes_are_timms():
    timm = pytest.importorskip("timm.data.mixup")
    if "cut_h + 1" not in inspect.getsource(timm.rand_bbox):
        pytest.skip("this timm makes boxes of odd sides a pixel too small")
    for seed in range(50):
        lam = seed / 50
        ours = draw_box(np.random.default_rng(seed), 40, 60, lam)
        with pytest.MonkeyPatch.context() as patch:  # timm draws from numpy itself: give it our numbers
            own = np.random.default_rng(seed)
            patch.setattr(timm.np.random, "randint", lambda low, high, size=None, own=own: int(own.integers(low, high)))
            theirs = timm.rand_bbox((1, 3, 40, 60), lam)
        assert ours == tuple(int(x) for x in theirs)


def test_both_kinds_take_turns(batch):
    pixels, labels = batch
    mixer = BatchMixer(5, seed=0, mixup=0.2, cutmix=1.0)
    cut = 0
    for slot in range(100):
        mixed, _ = mixer(pixels, labels, request(slot))
        values = set(pixels.flatten().tolist())
        cut += set(mixed.flatten().tolist()) <= values
    assert 30 < cut < 70


def test_memory_format_is_kept(batch):
    pixels = batch[0].contiguous(memory_format=torch.channels_last)
    for options in ({"mixup": 0.2}, {"cutmix": 1.0}):
        mixed, _ = BatchMixer(5, seed=0, **options)(pixels, batch[1], request())
        assert mixed.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("how", [{"mixup": 0.4}, {"cutmix": 1.0}], ids=str)
def test_several_labels_become_targets_and_are_mixed_as_the_images_are(how):
    sets = np.array([[0, 0, 0], [1, 0, 1], [1, 1, 1], [0, 1, 0], [0, 0, 1]], np.uint8)
    batch = host_batch() | {"labels": torch.tensor([4, 1, 0, 1, 3]), "request": request(3)}
    plain = DeviceStage("cpu", EfficientNetNVImageProcessor(), label_sets=sets).stage(batch)
    assert plain["labels"].tolist() == sets[[4, 1, 0, 1, 3]].tolist() and plain["labels"].dtype == torch.float32
    mixer = BatchMixer(5, seed=0, **how)
    mixed = DeviceStage("cpu", EfficientNetNVImageProcessor(), mixer=mixer, label_sets=sets).stage(batch)
    pixels, shares = mixer(plain["pixel_values"], torch.arange(5), request(3))  # every image its own class
    assert torch.equal(mixed["pixel_values"], pixels) and not torch.equal(pixels, plain["pixel_values"])
    assert torch.allclose(mixed["labels"], shares @ plain["labels"])


# ---- random erasing


def erased(probability=1.0, seed=0, slot=0, epoch=0, count=8, size=(32, 48)):
    """Where a batch without a zero has lost something, bool (count, height, width)."""
    pixels = torch.randn((count, 3, *size), generator=torch.Generator().manual_seed(1)).abs() + 0.1
    before = pixels.clone()
    RandomEraser(seed, probability)(pixels, request(slot, epoch))
    lost = (pixels == 0).all(1)
    assert torch.equal(pixels.permute(0, 2, 3, 1)[~lost], before.permute(0, 2, 3, 1)[~lost])
    return lost


def test_an_image_loses_one_rectangle_of_torchvisions_areas_and_shapes():
    areas, ratios = [], []
    for slot in range(60):
        for lost in erased(slot=slot):
            rows, columns = torch.where(lost.any(1))[0], torch.where(lost.any(0))[0]
            height, width = len(rows), len(columns)
            assert lost.sum() == height * width and rows[-1] - rows[0] == height - 1
            areas.append(height * width / (32 * 48))
            ratios.append(height / width)
    assert 0.01 < min(areas) < 0.04 and 0.31 < max(areas) < 0.35
    assert min(ratios) < 0.4 and 2.2 < max(ratios) < 3.8  # a tall one of a third does not fit
    assert stats.kstest(areas, stats.uniform(0.02, 0.31).cdf).statistic < 0.1


def test_as_many_images_as_the_probability_says_lose_something():
    share = np.mean([erased(0.25, slot=slot).any((1, 2)).float().mean() for slot in range(100)])
    assert share == pytest.approx(0.25, abs=0.04)
    assert not erased(0.0).any()


def test_erasing_is_a_function_of_seed_epoch_and_slot_and_differs_between_images():
    first = erased()
    assert torch.equal(first, erased())
    for other in (erased(seed=1), erased(epoch=1), erased(slot=1)):
        assert not torch.equal(first, other)
    assert len({tuple(lost.flatten().tolist()) for lost in first}) == 8


def test_erasing_comes_after_normalising_and_before_mixing():
    seen = []

    def mixer(pixels, labels, request):
        seen.append(pixels.clone())
        return pixels, labels

    batch = {**host_batch(8), "request": request()}
    processor = EfficientNetNVImageProcessor()
    plain = DeviceStage("cpu", processor).stage(batch)["pixel_values"]
    DeviceStage("cpu", processor, mixer=mixer, eraser=RandomEraser(0, 1.0)).stage(batch)
    changed = seen[0] != plain
    assert changed.any() and (seen[0][changed] == 0).all()
