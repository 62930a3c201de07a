"""The golden figures on a CUDA device, and what lower precision does to training. Run with `-m gpu`."""

import pytest
import torch

from effnet_hf import EfficientNetNVForImageClassification
from effnet_hf.training.optim import training_loss
from effnet_hf.training.precision import allow_tf32

from .golden_weights import golden_input
from .gpu_device import DEVICE, exact_products  # noqa: F401
from .test_golden import GOLDEN, SEED, VARIANTS, assert_figures, golden_model


pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_products")]


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_fp32_gives_the_originals_logits(variant, channels_last):
    figures, model = GOLDEN["weights"][variant], golden_model(variant).to(DEVICE)
    size = figures["image_size"]
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(golden_input(0, batch=4, size=size, seed=SEED).to(DEVICE))
        logits = model.eval()(golden_input(2, batch=2, size=size, seed=SEED).to(DEVICE)).logits.double().cpu()
    assert_figures(logits[:, :8], figures["eval_logits_first8"], 1e-3)
    assert_figures(logits.sum(1), figures["eval_logits_sum"], 1e-3)
    assert logits.argmax(1).tolist() == figures["eval_argmax"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp32_gives_the_originals_training_step(variant):
    figures, model = GOLDEN["weights"][variant]["train_step_96px_batch4"], golden_model(variant).train().to(DEVICE)
    pixels = golden_input(1, batch=4, size=96, seed=SEED).to(DEVICE)
    outputs = model(pixels, labels=torch.tensor([1, 2, 3, 4], device=DEVICE))
    assert_figures(outputs.logits[:, :4].detach().cpu(), figures["logits_first4"], 1e-3)
    assert_figures(outputs.loss.detach().cpu(), figures["loss"], 1e-3)


def losses_of_200_steps(config, precision: str) -> torch.Tensor:
    """Of a network that learns to tell four directions of a wave, on the same batches whatever the precision."""
    torch.manual_seed(0)
    allow_tf32(precision == "tf32")
    model = EfficientNetNVForImageClassification(config).train().to(DEVICE, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=128.0, enabled=dtype is torch.float16)
    generator = torch.Generator().manual_seed(1)
    y, x = torch.meshgrid(torch.linspace(0, 12, 32), torch.linspace(0, 12, 32), indexing="ij")
    waves = torch.stack([torch.sin(x), torch.sin(y), torch.sin(x + y), torch.sin(x - y)])
    losses = []
    for _ in range(200):
        labels = torch.randint(0, 4, (32,), generator=generator)
        pixels = waves[labels][:, None] + 0.5 * torch.randn(32, 3, 32, 32, generator=generator)
        with torch.autocast(DEVICE, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            logits = model(pixels.to(DEVICE)).logits
        loss = training_loss(logits, labels.to(DEVICE), 0.1)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).cpu()


@pytest.mark.parametrize("precision", ["tf32", "fp16", "bf16"])
def test_200_steps_in_lower_precision_track_the_loss_of_fp32(precision, tiny_config):
    if precision == "fp16" and DEVICE == "cpu":
        pytest.skip("a CPU has no fp16")
    config = tiny_config(num_labels=4, dropout_rate=0.0, survival_prob=1.0)
    expected = losses_of_200_steps(config, "fp32").view(10, 20).mean(1)
    measured = losses_of_200_steps(config, precision).view(10, 20).mean(1)
    assert expected[-1] < 0.6 * expected[0], "the task is learnt at all"
    torch.testing.assert_close(measured, expected, rtol=0.05, atol=0.03)
