"""`--freeze` and `--layer_decay`: what trains, how fast, and that a resumed run knows it."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from effnet_hf import EfficientNetNVForImageClassification
from effnet_hf.errors import UserError
from effnet_hf.recipes import Recipe, parse_recipe
from effnet_hf.run_folder import RunFolder
from effnet_hf.training import build_run, freezing, restore_run, train_step
from effnet_hf.training.optim import build_optimizer, parameter_groups, set_learning_rate
from effnet_hf.training.progress import Progress
from effnet_hf.training.state import TrainingState

from ..conftest import forget_accelerator
from .test_optim import model_on_meta
from .workbench import fingerprint, quantized_recipe, run, small_recipe, write_squares, write_tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("squares"), per_class=8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def launch(recipe):
    forget_accelerator()
    return run(recipe)


def newest(folder):
    return load_file(RunFolder(folder).all_checkpoints()[-1] / "model.safetensors")


def fine_tuning(data, tiny, folder, **changes):
    settings = {"model": str(tiny), "image_size": 32, "epochs": 2, "warmup_epochs": 0, "freeze": "stages"}
    return small_recipe(data, folder, **{**settings, **changes})


@pytest.mark.parametrize("optimizer", ["rmsprop", "adamw"])
@pytest.mark.parametrize(
    "what, trained", [("backbone", ("classifier.",)), ("stages", ("classifier.", "efficientnet.head."))]
)
def test_what_is_frozen_stays_to_the_bit(what, trained, optimizer, data, tiny, tmp_path):
    """Weights, decay, statistics of batch norm and optimizer, although the loop validates and saves in between."""
    recipe = fine_tuning(
        data, tiny, tmp_path, freeze=what, optimizer=optimizer, weight_decay=0.1, epochs=1, checkpoint_every_steps=1
    )
    launch(recipe)
    before, after = load_file(tiny / "model.safetensors"), newest(tmp_path)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if name.startswith(trained)
    }
    checkpoint = RunFolder(tmp_path).all_checkpoints()[-1]
    average = load_file(checkpoint / "average.safetensors")
    assert all(torch.equal(average[name], before[name]) for name in before if not name.startswith(trained))
    optimized = load_file(checkpoint / "optimizer.safetensors")
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    weights = {name for name in before if not name.endswith(statistics)}
    assert {name.rpartition("/")[0] for name in optimized} == {name for name in weights if name.startswith(trained)}


def test_frozen_parts_answer_as_in_evaluation_and_have_no_backward_pass(data, tiny, tmp_path):
    started = build_run(fine_tuning(data, tiny, tmp_path, gradient_checkpointing=True), Accelerator())
    restore_run(started)
    network, pixels = started.bare_model, torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = network.eval().efficientnet.encoder(pixels)[-1]
    found = network.train().efficientnet.encoder(pixels)[-1]
    assert torch.equal(found, wanted) and not found.requires_grad
    assert network.dropout.training and network.efficientnet.head.training
    train_step(started, next(iter(started.train_loader.epoch(0))))
    assert all(parameter.grad is None for parameter in network.efficientnet.encoder.parameters())
    started.loaders.close()
    started.report.close()


def test_a_thawed_run_resumes_to_the_bit(data, tiny, tmp_path):
    """From within the frozen epoch, from its end, and from within the first epoch of all, with rates by stage."""
    settings = {"freeze_epochs": 1, "layer_decay": 0.5, "epochs": 2, "checkpoint_every_steps": 1, "keep_checkpoints": 9}
    launch(fine_tuning(data, tiny, tmp_path / "whole", **settings))
    before, after = load_file(tiny / "model.safetensors"), newest(tmp_path / "whole")
    assert not any(torch.equal(before[name], after[name]) for name in before if name.endswith("bn.running_mean"))
    for update in (2, 3, 4):
        checkpoint = RunFolder(tmp_path / "whole").checkpoint(update)
        launch(fine_tuning(data, tiny, tmp_path / str(update), resume=str(checkpoint), **settings))
        assert fingerprint(tmp_path / str(update)) == fingerprint(tmp_path / "whole")
    with pytest.raises(UserError, match=r"was trained with --freeze_epochs 1, not 2; resume with its value"):
        launch(fine_tuning(data, tiny, tmp_path / "2", resume="auto", **{**settings, "freeze_epochs": 2}))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "sgd"},
        {"optimizer": "sgd", "nesterov": True, "layer_decay": 0.5},
        {"optimizer": "sgd", "momentum": 0.0},
        {"optimizer": "adamw"},
        {"optimizer": "rmsprop"},
    ],
    ids=["sgd", "nesterov by stage", "no momentum", "adamw", "rmsprop"],
)
def test_every_optimizer_goes_on_after_the_thaw_and_after_a_resume_there(settings, accumulation, tiny, tmp_path):
    """Two steps, and two of thawed weights that end with the same weights to the bit: of the same run, and of what was
    saved before the thaw and after its first step."""
    recipe = Recipe(freeze="backbone", freeze_epochs=1, learning_rate=0.01, **settings)
    accelerator, pixels = (
        SimpleNamespace(scaler=None, num_processes=1, process_index=0),
        torch.randn(accumulation, 2, 3, 16, 16),
    )

    loaded = EfficientNetNVForImageClassification.from_pretrained(tiny).train()

    def started():
        model = copy.deepcopy(loaded)
        state = TrainingState(accelerator, model, build_optimizer(model, recipe), None)
        return state, freezing.Freezing(model, recipe)

    def step(state, number):
        torch.manual_seed(number)
        for images in pixels:
            state.model(pixel_values=images).logits.square().mean().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()

    whole, frozen = started()
    for number in range(4):
        if number in (2, 3):
            (tmp_path / str(number)).mkdir()
            save_file(whole.model.state_dict(), tmp_path / str(number) / "model.safetensors")
            whole.write(tmp_path / str(number), [])
        if number == 2:
            frozen.thaw(whole.model, whole.optimizer, accelerator)
        step(whole, number)
    first, last = load_file(tmp_path / "2/model.safetensors"), whole.model.state_dict()
    assert not any(torch.equal(first[name], last[name]) for name in first if name.endswith("conv.weight"))
    for begin in (2, 3):
        again, frozen = started()
        again.read(tmp_path / str(begin), Progress(total_updates=begin, num_processes=0))
        frozen.thaw(again.model, again.optimizer, accelerator)
        for number in range(begin, 4):
            step(again, number)
        assert all(torch.equal(tensor, last[name]) for name, tensor in again.model.state_dict().items())


@pytest.mark.parametrize("before, now", [(0.9, 0.9), (0.0, 0.9), (0.9, 0.0)])
@pytest.mark.parametrize("nesterov", [False, True])
def test_a_thawed_weight_takes_the_steps_of_torchs_plain_sgd(before, now, nesterov):
    """Also where momentum was switched on or off meanwhile."""
    weights = {}
    for fused in (False, True):
        early, late = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
        optimizer = torch.optim.SGD([early, late], lr=0.1, momentum=0.9, nesterov=nesterov, fused=fused)
        for step, momentum in enumerate((before, before, now, now, 0.9)):
            optimizer.param_groups[0].update(momentum=momentum, nesterov=nesterov and momentum > 0)
            if step == 2 and fused:
                freezing._rest(optimizer)
            early.grad, late.grad = (torch.full((3,), float(step)), torch.full((3,), 2.0 - step) if step > 1 else None)
            optimizer.step()
        weights[fused] = early, late
    assert all(torch.allclose(*pair) for pair in zip(*weights.values()))


def test_quantization_aware_training_freezes_and_thaws(data, tiny, tmp_path):
    recipe = quantized_recipe(
        data, tmp_path, tiny, image_size=32, freeze="backbone", freeze_epochs=1, optimizer="sgd", nesterov=True,
        ema_decay=0.0, calibration_batches=1,
    )  # fmt: skip
    assert launch(recipe) == 0
    before, after = load_file(tiny / "model.safetensors"), newest(tmp_path)
    frozen = load_file(RunFolder(tmp_path).checkpoint(3) / "model.safetensors")
    assert {name for name in before if not torch.equal(before[name], frozen[name])} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert not any(torch.equal(before[name], after[name]) for name in before if name.endswith("conv.weight"))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model": None}, "--freeze stages keeps pretrained weights as they are; give them with --model"),
        ({"compile": "graphs"}, "--freeze changes what a step computes"),
    ],
    ids=["fresh weights", "graphs"],
)
def test_what_cannot_be_frozen_is_refused(settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        freezing.check_fine_tuning(Recipe(**{"model": "somebody/model", "freeze": "stages", **settings}))


def test_epochs_of_nothing_are_refused():
    with pytest.raises(
        UserError, match="--freeze_epochs 2 says for how long, not what; add --freeze stages or backbone"
    ):
        Recipe(freeze_epochs=2)
    recipe, _ = parse_recipe(["--freeze", "stages", "--freeze_epochs", "2"])
    assert (recipe.freeze, recipe.freeze_epochs) == ("stages", 2)


def test_rates_fall_by_stage_from_the_classifier_to_the_stem():
    model = model_on_meta("b0")
    recipe = Recipe(layer_decay=0.5, learning_rate=1.0, lr_scaling="none", optimizer="sgd", weight_decay=0.25)
    optimizer = build_optimizer(model, recipe)
    set_learning_rate(optimizer, 0.1)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    network = model.efficientnet
    parts = [network.encoder.stem, *network.encoder.stages, network.head]
    for distance, part in zip((8, 7, 6, 5, 4, 3, 2, 1, 0), parts):
        for name, parameter in part.named_parameters():
            decay = 0.0 if ".bn." in f".{name}" else 0.25
            assert found[id(parameter)] == (pytest.approx(0.1 * 0.5**distance), decay)
    assert found[id(model.classifier.weight)] == (0.1, 0.25)
    assert len(found) == sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_without_it_the_groups_are_two_as_ever():
    assert [set(group) for group in parameter_groups(model_on_meta("b0"), Recipe())] == [{"params", "weight_decay"}] * 2


def test_the_log_has_the_rate_that_the_schedule_says(data, tiny, tmp_path, capsys):
    settings = {"freeze": "none", "layer_decay": 0.5, "epochs": 1, "lr_schedule": "constant"}
    launch(fine_tuning(data, tiny, tmp_path, **settings))
    assert '"train.lr": 0.001,' in (tmp_path / "metrics.jsonl").read_text()
    assert "the classifier's rate; the stem's is 6.25e-05" in capsys.readouterr().out
