import functools
import importlib.util
import random

import numpy as np
import pytest
import torch
from PIL import Image

from effnet_hf import EfficientNetNVImageProcessor
from effnet_hf.data import auto_augment
from effnet_hf.data.auto_augment import Step
from effnet_hf.data.bad_files import BadFiles
from effnet_hf.data.dali import quiet_build, require_dali
from effnet_hf.data.dali_augment import DaliPolicy
from effnet_hf.data.dali_pipeline import DaliPipeline, EncodedBatches, EvaluationPlanner, TrainPlanner
from effnet_hf.data.sampler import BalancedTrainingPlan, TrainingPlan, ValidationPlan
from effnet_hf.data.source import DataSource
from effnet_hf.data.transforms import EvaluationTransform, TrainTransform
from effnet_hf.data.worker_pool import MicroBatches
from effnet_hf.errors import UserError

from . import torture


needs_dali = pytest.mark.skipif(importlib.util.find_spec("nvidia") is None, reason="NVIDIA DALI is not installed")
SIZE = 48
PROCESSOR = EfficientNetNVImageProcessor.for_image_size(SIZE)


def test_without_dali_the_pip_line_is_named(monkeypatch, loaders):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"run `pip install nvidia-dali-cuda130`.*nvidia-dali-cuda120"):
        loaders({"loader": "dali-gpu"})


def test_a_dali_that_is_too_old_is_refused(monkeypatch):
    monkeypatch.setattr("effnet_hf.data.dali.dali_is_installed", lambda: True)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.1.1")
    with pytest.raises(
        UserError, match="needs DALI 2.2 or newer, this is 2.1.1; run `pip install --upgrade nvidia-dali"
    ):
        require_dali()


@needs_dali
def test_with_dali_nothing_is_said():
    pytest.importorskip("nvidia.dali")
    require_dali()


@pytest.fixture(autouse=True, scope="module")
def dali():
    return pytest.importorskip("nvidia.dali")


# ---- the policies


def test_both_executors_draw_the_same_operations_ten_thousand_times():
    policy, counts = DaliPolicy("autoaugment", PROCESSOR), np.zeros(13, int)
    for seed in range(10_000):
        steps = auto_augment.draw(random.Random(seed))
        rows = policy.draw(random.Random(seed))
        applied = [row for row in rows.tolist() if row[0]]
        names = ["", *auto_augment.OPERATIONS]
        assert [Step(names[op], level, bool(sign)) for op, level, sign in applied] == steps
        counts += np.bincount(rows[:, 0], minlength=13)
    expected = {name: 0.0 for name in auto_augment.OPERATIONS}
    for sub_policy in auto_augment.POLICY:
        for name, probability, _ in sub_policy:
            expected[name] += 400 * probability
    for count, (name, mean) in zip(counts[1:], expected.items()):
        assert abs(count - mean) <= 4 * mean**0.5, name


@functools.cache
def policy_pipeline(dali, policy):
    from nvidia.dali import fn, types

    @dali.pipeline_def(batch_size=64, num_threads=1, device_id=None, enable_conditionals=True, prefetch_queue_depth=1)
    def graph():
        images = fn.external_source(name="images", dtype=types.UINT8, ndim=3, layout="HWC")
        draws = fn.external_source(name="draws", dtype=types.INT32, ndim=2)
        return policy.apply(images, draws)

    with quiet_build():
        pipeline = graph()
        pipeline.build()
    return pipeline


# Mean absolute difference to Pillow, in grey levels, on smooth pictures: nothing where both compute the same numbers,
# rounding where DALI does not round in between, interpolation where Pillow is bicubic, and another formula in equalize.
LARGEST_DIFFERENCE = {
    "shear_x": 3.0, "shear_y": 3.0, "translate_x": 0, "translate_y": 0, "rotate": 0.5, "color": 0.7, "posterize": 0,
    "solarize": 0, "solarize_add": 0, "autocontrast": 0.7, "equalize": 6.0, "invert": 0,
}  # fmt: skip


def test_every_operation_at_every_level_agrees_with_pillow(dali):
    pipeline = policy_pipeline(dali, DaliPolicy("autoaugment", PROCESSOR))
    image = torture.photo(5, SIZE, SIZE)
    for number, name in enumerate(auto_augment.OPERATIONS):
        signs = (False, True) if name in auto_augment.SIGNED else (False,)
        levels = range(2, 11) if name == "posterize" else range(11)  # DALI keeps a bit where Pillow keeps none
        steps = [Step(name, level, negative) for level in levels for negative in signs]
        draws = [np.array([(1 + number, s.level, s.negative), (0, 0, 0)], np.int32) for s in steps]
        (results,) = pipeline.run(images=[np.asarray(image)] * len(steps), draws=draws)
        for result, step in zip(results, steps):
            expected = np.asarray(auto_augment.apply(image, step)).astype(int)
            difference = np.abs(np.asarray(result).astype(int) - expected).mean()
            assert difference <= LARGEST_DIFFERENCE[name], step


def test_two_steps_are_applied_in_order(dali):
    pipeline = policy_pipeline(dali, DaliPolicy("autoaugment", PROCESSOR))
    image = torture.photo(5, SIZE, SIZE)
    steps = [Step("solarize", 3), Step("posterize", 6)]
    rows = [(1 + auto_augment.OPERATIONS.index(step.operation), step.level, 0) for step in steps]
    (results,) = pipeline.run(
        images=[np.asarray(image)] * 2, draws=[np.array(rows, np.int32), np.array(rows[::-1], np.int32)]
    )
    forwards, backwards = image, image
    for first, second in zip(steps, reversed(steps)):
        forwards, backwards = auto_augment.apply(forwards, first), auto_augment.apply(backwards, second)
    assert np.array_equal(np.asarray(results[0]), np.asarray(forwards))
    assert np.array_equal(np.asarray(results[1]), np.asarray(backwards))


@pytest.mark.parametrize("name", ["randaugment", "trivialaugment"])
def test_torchvisions_policies_have_the_same_operations_in_dali(dali, name):
    from torchvision import transforms

    kind = {"randaugment": transforms.RandAugment, "trivialaugment": transforms.TrivialAugmentWide}[name]()
    space = kind._augmentation_space(31, (224, 224)) if name == "randaugment" else kind._augmentation_space(31)
    renamed = {"autocontrast": "auto_contrast", "shearx": "shear_x", "sheary": "shear_y"}
    renamed |= {"translatex": "translate_x", "translatey": "translate_y"}
    theirs = {renamed.get(op.lower(), op.lower()): magnitudes for op, (magnitudes, _) in space.items()}
    suite = [operation.args[0] for operation in DaliPolicy(name, EfficientNetNVImageProcessor()).operations()]
    assert {operation.name for operation in suite} == set(theirs) and len(suite) == 14
    for operation in suite:
        if operation.mag_range is not None and operation.name not in ("posterize", "solarize"):
            assert np.allclose(operation.mag_range[-1], float(theirs[operation.name][-1]), rtol=0.01), operation.name


def test_randaugments_strength_is_drawn_for_dali_too():
    draws = DaliPolicy("randaugment", PROCESSOR, (3, 21)).draw(random.Random(0))
    assert draws.shape == (3, 3) and draws[:, 1].tolist() == [21] * 3
    planner = TrainPlanner(PROCESSOR, augmentation="randaugment", randaugment=(1, 4))
    assert planner.policy.steps == 1 and planner.policy.draw(random.Random(0))[0, 1] == 4
    usual = TrainPlanner(PROCESSOR, augmentation="randaugment").policy.draw(random.Random(0))
    assert usual.shape == (2, 3) and usual[:, 1].tolist() == [9, 9]


@pytest.mark.parametrize("name", ["randaugment", "trivialaugment"])
def test_torchvisions_policies_run_and_change_pictures(dali, name):
    policy = DaliPolicy(name, PROCESSOR)
    pipeline = policy_pipeline(dali, policy)
    image = np.asarray(torture.photo(5, SIZE, SIZE))
    draws = [policy.draw(random.Random(seed)) for seed in range(64)]
    assert len({row[0] for draw in draws for row in draw}) >= 12
    (first,) = pipeline.run(images=[image] * 64, draws=draws)
    first = [np.asarray(result).copy() for result in first]
    (again,) = pipeline.run(images=[image] * 64, draws=draws)
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(first, again))
    assert sum(not np.array_equal(result, image) for result in first) > 40


# ---- the pipeline of dali-gpu, its graph run on the CPU


def pipeline(split, planner, workers=0, replace_bad=True, seed=5, batch=4):
    files = EncodedBatches(split, planner, seed, replace_bad)
    return DaliPipeline(files, workers, 2, batch, torch.device("cpu"), num_threads=1)


def train_planner(name=None):
    return TrainPlanner(PROCESSOR, augmentation=name or "none")


def differences(ours, theirs):
    return [
        float((a["pixel_values"].int() - b["pixel_values"].int()).abs().float().mean()) for a, b in zip(ours, theirs)
    ]


def test_the_graph_makes_imagefolders_training_pictures_from_the_same_draws(pictures):
    split = DataSource.from_folder(str(pictures)).train
    plan = TrainingPlan(60, 4, seed=5)
    for name, largest in ((None, 0.6), ("autoaugment", 4.0)):
        reference = MicroBatches(split, TrainTransform(PROCESSOR, augmentation=name or "none"), 5, True)
        theirs = [reference[request] for request in plan.requests(1)]
        ours = list(pipeline(split, train_planner(name)).batches(plan.requests(1)))
        assert len(ours) == len(theirs) == 15
        for a, b in zip(ours, theirs):
            assert a["labels"].tolist() == b["labels"].tolist() and a["index"].tolist() == b["index"].tolist()
        assert max(differences(ours, theirs)) < largest


def test_a_balanced_epoch_is_that_of_imagefolder_repeats_and_all(pictures):
    split = DataSource.from_folder(str(pictures)).train
    split = split.subset(np.flatnonzero(split.labels * 20 + 3 > np.arange(60)))  # 3 birds, all cats and dogs
    plan = BalancedTrainingPlan(len(split), 4, seed=5, labels=split.labels)
    reference = MicroBatches(split, TrainTransform(PROCESSOR), 5, True)
    theirs = [reference[request] for request in plan.requests(1)]
    ours = list(pipeline(split, train_planner()).batches(plan.requests(1)))
    for a, b in zip(ours, theirs, strict=True):
        assert a["labels"].tolist() == b["labels"].tolist() and a["index"].tolist() == b["index"].tolist()
    assert max(differences(ours, theirs)) < 0.6


def test_the_graph_evaluates_like_the_image_processor(pictures):
    split = DataSource.from_folder(str(pictures)).val
    plan = ValidationPlan(21, 4)
    reference = MicroBatches(split, EvaluationTransform(PROCESSOR), 5, False)
    ours = list(pipeline(split, EvaluationPlanner(PROCESSOR), replace_bad=False).batches(plan.requests()))
    assert sum((batch["index"].tolist() for batch in ours), []) == list(range(21))
    assert max(differences(ours, [reference[request] for request in plan.requests()])) < 0.6


@pytest.mark.parametrize(
    "size", [(300, 200), (200, 301), (101, 97), (48, 48), (1, 1), (900, 10), (10, 900), (640, 640)]
)
@pytest.mark.parametrize("margin", [-11, -4, 0, 32, 33, 7])
def test_evaluation_sizes_and_crops_are_the_processors(size, margin):
    class Sized:
        width, height = size

    processor = EfficientNetNVImageProcessor.for_image_size(SIZE, margin)
    box, (height, width), (top, left), flip, _ = EvaluationPlanner(processor)(Sized)
    ramp = Image.fromarray(
        np.arange(size[0] * size[1], dtype=np.uint32).astype(np.uint8).reshape(size[1], size[0])
    ).convert("RGB")
    region = ramp.crop((box.left, box.top, box.left + box.width, box.top + box.height))
    resized = region.resize((width, height), Image.BICUBIC) if region.size != (width, height) else region
    ours = resized.crop((left, top, left + SIZE, top + SIZE))
    assert not flip and ours.tobytes() == processor.resize_and_crop(ramp).tobytes()


@pytest.mark.parametrize("workers", [0, 1])
def test_the_graph_resumes_and_can_be_left_early(pictures, workers):
    split, plan = DataSource.from_folder(str(pictures)).train, TrainingPlan(60, 4, seed=5)
    ours = pipeline(split, train_planner("trivialaugment"), workers)
    whole = list(ours.batches(plan.requests(2)))
    iterator = ours.batches(plan.requests(0))
    next(iterator)
    iterator.close()
    rest = list(ours.batches(plan.requests(2, 6)))
    assert len(whole) == 15 and len(rest) == 9
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(whole[6:], rest))
    ours.close()


@pytest.fixture(scope="module")
def tortured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torture")
    return folder, torture.write(folder)


def test_the_graph_survives_the_torture_folder(tortured):
    folder, fate = tortured
    split = DataSource.from_folder(str(folder), val_fraction=0, train=True).train
    plan = ValidationPlan(len(split), 8)  # in order, every file
    for replace_bad in (True, False):
        bad_files = BadFiles(None, len(split), 1.0)
        ours, seen = pipeline(split, train_planner(), replace_bad=replace_bad, batch=8), 0
        for batch in ours.batches(plan.requests()):
            bad_files.report(batch["bad"])
            seen += len(batch["index"])
        bad = sum(kind == "bad" for kind in fate.values())
        assert bad_files.count == bad and seen == len(split) - (0 if replace_bad else bad)


def test_batches_without_a_readable_file_are_passed_over(tmp_path):
    for i in range(12):
        for name in ("a", "b"):
            (tmp_path / name).mkdir(exist_ok=True)
            data = torture.encode(torture.photo(i), "JPEG") if 4 <= i < 6 else b""
            (tmp_path / name / f"{i:02}.jpg").write_bytes(data)
    split = DataSource.from_folder(str(tmp_path), train=False).val
    ours = pipeline(split, EvaluationPlanner(PROCESSOR), replace_bad=False, batch=2)
    batches = list(ours.batches(ValidationPlan(24, 2).requests()))
    assert [len(b["index"]) for b in batches] == [2, 2, 0]
    assert sum(len(b["bad"]) for b in batches) == 20


def test_a_file_that_dali_refuses_costs_time_but_changes_nothing(pictures, monkeypatch):
    split, plan = DataSource.from_folder(str(pictures)).train, TrainingPlan(60, 4, seed=5)
    expected = list(pipeline(split, train_planner()).batches(plan.requests(0)))
    ours = pipeline(split, train_planner())
    prepare = ours._files.prepare

    def spoil(picture, seed):
        encoded = prepare(picture, seed)
        spoilt = picture.plain_jpeg and ours._files._trust_jpegs and picture.width == 95
        return encoded._replace(data=np.frombuffer(b"nonsense", np.uint8)) if spoilt else encoded

    monkeypatch.setattr(ours._files, "prepare", spoil)
    batches = list(ours.batches(plan.requests(0)))
    assert [b["index"].tolist() for b in batches] == [b["index"].tolist() for b in expected]
    assert all(b["bad"] == [] for b in batches)
    assert max(differences(batches, expected)) < 1.0


@pytest.mark.gpu
@pytest.mark.parametrize("name", [None, "autoaugment", "randaugment", "trivialaugment"])
def test_on_a_gpu_the_graph_gives_nearly_the_cpus_pictures(real_pictures, name):
    split = DataSource.from_folder(str(real_pictures("imagenet_samples.tar")), train=False).val
    plan = TrainingPlan(83, 16, seed=5)
    on_cpu = list(pipeline(split, train_planner(name), batch=16).batches(plan.requests(0)))
    files = EncodedBatches(split, train_planner(name), 5, True)
    on_gpu = DaliPipeline(files, 0, 2, 16, torch.device("cuda", 0))
    for a, b in zip(on_cpu, on_gpu.batches(plan.requests(0))):
        assert b["pixel_values"].is_cuda and a["index"].tolist() == b["index"].tolist()
        assert float((a["pixel_values"].int() - b["pixel_values"].cpu().int()).abs().float().mean()) < 2.5


@pytest.mark.gpu
def test_on_a_gpu_the_whole_loader_works(loaders):
    cpu, gpu = loaders({}, device="cpu"), loaders({"loader": "dali-gpu", "num_workers": 2}, device="cuda")
    for a, b in zip(cpu.val.epoch(), gpu.val.epoch()):
        assert b["pixel_values"].is_cuda and a["index"].tolist() == b["index"].tolist()
        assert float((a["pixel_values"] - b["pixel_values"].cpu()).abs().mean()) < 0.03
    assert len(list(gpu.train.epoch(0, start_update=3))) == 12
