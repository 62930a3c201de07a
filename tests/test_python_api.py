"""`from effnet_hf import load_recipe, train`: what a script and a notebook get, and how they are left."""

import ast
import os
import signal
from pathlib import Path

import matplotlib
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import effnet_hf
from effnet_hf import UserError, load_recipe, qat, train, training, validate_checkpoint
from effnet_hf.training import loop

from .training.workbench import cheap_training, quantized_recipe, small_recipe, write_squares


@pytest.fixture(scope="module", autouse=True)
def cheap():
    with cheap_training():
        yield


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("squares"), per_class=6, validation=2)


def one_epoch(squares, output_dir, **changes):
    return small_recipe(squares, output_dir, **{"epochs": 1, "ema_decay": 0.0, "augmentation": "none", **changes})


def switches():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.allow_tf32,
        matplotlib.get_backend().lower(),
        *(signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)),
    )


def test_every_name_is_there_and_only_when_asked_for():
    assert {*effnet_hf.__all__} <= {*dir(effnet_hf)}
    for name in effnet_hf.__all__:
        assert getattr(effnet_hf, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'tran'"):
        effnet_hf.tran  # noqa: B018
    tree = ast.parse(Path(effnet_hf.__file__).read_text("utf-8"))
    at_once = {node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.level}
    light = {"__about__", "cli", "errors"}
    assert at_once == light  # start-up: what is imported at the top costs every `import effnet_hf`


def test_train_returns_its_figures_and_leaves_the_process_as_it_was(squares, tmp_path, capsys):
    matplotlib.use("svg")
    before = switches()
    summary = train(one_epoch(squares, tmp_path / "first", deterministic=True))
    assert summary["epochs"] == 1 and 0 <= summary["top1"] <= 100 and summary["updates"] == 2
    assert switches() == before
    # Accelerate keeps one precision per process; a second run in another one would be refused
    other = train(one_epoch(squares, tmp_path / "second", precision="bf16", image_size=32))
    assert other["updates"] == 2 and "bf16" in capsys.readouterr().out
    assert AcceleratorState._shared_state == {}  # or `notebook_launcher` would refuse
    figures = validate_checkpoint(str(tmp_path / "second"), str(squares), num_workers=0, precision="fp32")
    assert figures["top1"] == pytest.approx(other["top1"], abs=100 / 6) and switches() == before


def test_a_signal_saves_and_stops_what_comes_after_too(squares, tmp_path, monkeypatch):
    recipe, step = one_epoch(squares, tmp_path / "run"), loop.train_step

    def interrupted(run, batch):
        if run.interruption.received is None:
            os.kill(os.getpid(), signal.SIGINT)  # the stop button of a notebook
        return step(run, batch)

    monkeypatch.setattr(loop, "train_step", interrupted)
    before = switches()
    with pytest.raises(KeyboardInterrupt, match="goes on with resume='auto'"):
        train(recipe)
    assert switches() == before
    monkeypatch.setattr(loop, "train_step", step)
    assert train(recipe.replace(resume="auto"))["updates"] == 2


def test_what_the_commands_refuse_is_refused_here(squares, tmp_path):
    with pytest.raises(UserError, match=r"call effnet_hf\.qat\(recipe\)"):
        train(load_recipe("quant-b0", model="runs/b0", data_dir=str(squares), output_dir=str(tmp_path / "no")))
    with pytest.raises(UserError, match="no data"):
        train(load_recipe("imagenette", output_dir=str(tmp_path / "no")))
    with pytest.raises(UserError, match="no data"):
        qat(load_recipe("quant-b0", model="runs/b0", output_dir=str(tmp_path / "no")))
    assert not (tmp_path / "no").exists()


def test_somebody_elses_accelerator_is_not_taken_away(squares, tmp_path):
    theirs = Accelerator(cpu=True, mixed_precision="bf16")
    with pytest.raises(UserError, match="this process has an Accelerator of its own, in bf16, .* this run wants fp32"):
        train(one_epoch(squares, tmp_path / "run", precision="fp32"))
    train(one_epoch(squares, tmp_path / "run", precision="bf16", image_size=32))
    assert theirs.mixed_precision == "bf16"


def test_qat_trains_with_quantizers(squares, tmp_path, monkeypatch):
    pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed")
    recipe, given = quantized_recipe(squares, tmp_path, tmp_path / "float"), []
    monkeypatch.setattr(training, "train", lambda *arguments: given.append(arguments) or 0)
    (tmp_path / "summary.json").write_text('{"top1": 50}')
    assert qat(recipe) == {"top1": 50}
    assert given[0][0] is recipe and given[0][1].recipe is recipe


def test_what_is_no_recipe_and_no_option_is_said():
    with pytest.raises(UserError, match="unknown option 'epoch' of a recipe. Did you mean 'epochs'"):
        effnet_hf.load_recipe("finetune", epoch=3)
    for function in (effnet_hf.train, effnet_hf.qat):
        for given in ("finetune", None):
            with pytest.raises(UserError, match="is no recipe; give load_recipe"):
                function(given)
