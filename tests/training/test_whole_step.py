"""One optimizer step of the whole recipe against an independent float64 re-implementation."""

import copy

import numpy as np
import torch
from accelerate import Accelerator

from effnet_hf.training import build_run, restore_run
from effnet_hf.training.loop import train_step
from effnet_hf.training.optim import learning_rate, set_learning_rate

from .workbench import small_recipe, write_squares


def test_step_with_accumulation_mixup_smoothing_and_rmsprop(tmp_path):
    """Two micro-batches, mixup targets, label smoothing, warm-up rate, no decay on batch norm, momentum buffer."""
    data = write_squares(tmp_path / "data")
    # 64 pixels: batch norm over the four values of a 1 x 1 map would amplify float32's rounding a thousandfold.
    changes = {"dropout_rate": 0.0, "survival_prob": 1.0, "ema_decay": 0.0, "weight_decay": 0.01, "image_size": 64}
    recipe = small_recipe(data, tmp_path / "run", **changes)
    run = build_run(recipe, Accelerator(gradient_accumulation_steps=2))
    restore_run(run)
    reference = copy.deepcopy(run.bare_model).double()
    square, buffer = {}, {}
    weights = {name: p.detach().numpy().copy() for name, p in reference.named_parameters()}
    fresh = dict(weights)
    norms = {name for name, module in reference.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}

    batches = iter(run.loaders.train.epoch(0))
    for update in range(2):
        rate = learning_rate(recipe, 0, update, 4)
        assert rate == 0.001 * (update + 1) / 4
        set_learning_rate(run.optimizer, rate)
        reference.zero_grad()
        reference.train()
        for _ in range(2):
            batch = next(batches)
            assert batch["labels"].dtype == torch.float32 and torch.allclose(batch["labels"].sum(1), torch.ones(4))
            train_step(run, batch)
            log_p = reference(batch["pixel_values"].double()).logits.log_softmax(-1)
            targets = batch["labels"].double()
            loss = (0.9 * -(targets * log_p).sum(1) + 0.1 * -log_p.mean(1)).mean()
            (loss / 2).backward()
        for name, parameter in reference.named_parameters():
            decay = 0.0 if name.rsplit(".", 1)[0] in norms else 0.01
            gradient = parameter.grad.numpy() + decay * weights[name]
            square[name] = 0.9 * square.get(name, 0.0) + 0.1 * gradient**2
            buffer[name] = 0.9 * buffer.get(name, 0.0) + gradient / (np.sqrt(square[name]) + 0.01)
            weights[name] = weights[name] - rate * buffer[name]
            parameter.data = torch.from_numpy(weights[name])
    run.loaders.close()
    run.report.close()

    for name, parameter in run.bare_model.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), weights[name], rtol=0, atol=1e-6, err_msg=name)
    moved = [np.abs(weights[name] - fresh[name]).max() > 1e-5 for name in weights]
    assert np.mean(moved) > 0.9  # not all: a shift before another batch norm has no gradient
