"""Ours and the peers as plain modules, and the training step that all of them are given."""

from collections.abc import Callable

import torch
from torch import nn

from effnet_hf.configuration import EfficientNetNVConfig
from effnet_hf.errors import UserError
from effnet_hf.modeling_efficientnet_nv import EfficientNetNVForImageClassification
from effnet_hf.recipes import Recipe, load_recipe
from effnet_hf.training import allow_tf32, build_optimizer, training_loss
from effnet_hf.tuning import tune_for_cpu_training


OURS, PEERS = "effnet_hf", ("timm", "torchvision", "transformers")
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
MODES = (
    "eager",
    "compile",
    "graphs",
    "qat",
)  # graphs: compiled, and replayed as CUDA graphs; qat: eager, fake-quantized
COMPILED = ("compile", "graphs")
AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}


def build(name: str, variant: str, image_size: int, num_labels: int = 1000) -> nn.Module:
    """A fresh network of `variant` in training mode, as its own library builds it; stochastic depth is off everywhere,
    because the libraries disagree about it, and dropout stays.

    Raises:
        UserError: a peer that has no such network.
    """
    if name == OURS:
        config = EfficientNetNVConfig.from_variant(variant, num_labels=num_labels, survival_prob=1.0)
        return EfficientNetNVForImageClassification(config)
    if not has(name, variant):
        raise UserError(f"{name} has no {variant}.")
    config = EfficientNetNVConfig.from_variant(variant)
    if name == "timm":
        import timm

        return timm.create_model(f"efficientnet_{variant}", num_classes=num_labels, drop_rate=config.dropout_rate)
    if name == "torchvision":
        import torchvision

        maker = getattr(torchvision.models, f"efficientnet_{variant}")
        return maker(num_classes=num_labels, stochastic_depth_prob=0.0)
    import transformers

    # Fresh weights of the stock class explode (its _init_weights); that is no matter for a clock.
    return transformers.EfficientNetForImageClassification(
        transformers.EfficientNetConfig(
            num_labels=num_labels,
            image_size=image_size,
            width_coefficient=config.width_coefficient,
            depth_coefficient=config.depth_coefficient,
            hidden_dim=config.hidden_dim,
            drop_connect_rate=0.0,
            dropout_rate=config.dropout_rate,
        )
    )


def has(name: str, variant: str) -> bool:
    """Only we have WideSE; B0 to B7 are everywhere."""
    return name == OURS or variant in {f"b{i}" for i in range(8)}


def logits_of(output) -> torch.Tensor:
    return getattr(output, "logits", output)


def set_precision(precision: str, device: torch.device) -> None:
    if device.type == "cpu" and precision in ("tf32", "fp16"):
        raise UserError(f"--precision {precision} needs a GPU; on a CPU there are fp32 and bf16.")
    allow_tf32(precision == "tf32")


def autocast(precision: str, device: torch.device):
    dtype = AUTOCAST.get(precision)
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def compiled(function, mode: str, ours: bool):
    """`torch.compile` as a user would ask for it; ours has to be one graph."""
    if mode in ("eager", "qat"):
        return function
    return torch.compile(
        function, fullgraph=ours, dynamic=False, mode="reduce-overhead" if mode == "graphs" else "default"
    )


def images(batch: int, size: int, device: torch.device, channels_last: bool) -> torch.Tensor:
    """Normalised noise; speed does not depend on what an image shows."""
    pixels = torch.randn(batch, 3, size, size, device=device)
    return pixels.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def placed(model: nn.Module, like: torch.Tensor) -> nn.Module:
    """On the device, in the dtype and in the memory format of `like`."""
    channels_last = like.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return model.to(like.device, like.dtype, memory_format=memory_format)


def training_step(
    name: str,
    model: nn.Module,
    pixels: torch.Tensor,
    precision: str = "fp32",
    mode: str = "eager",
    tuned: bool = True,
    recipe: Recipe | None = None,
    labels: torch.Tensor | None = None,
) -> Callable[[], torch.Tensor]:
    """One optimizer step: forward, cross entropy with label smoothing, backward, RMSprop.

    Ours is tuned as our loop tunes it; a peer gets torch's defaults. The loss stays on the device.

    Args:
        tuned: False leaves our network as it is.
        recipe: of the loss and of our optimizer, for a peer too; NVIDIA's at a small rate by default, and a peer has
            torch's own RMSprop.
        labels: (N,) or (N, classes); random classes of a thousand by default.
    """
    device = pixels.device
    channels_last = pixels.is_contiguous(memory_format=torch.channels_last)
    model = model.train().to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    if mode == "qat":
        from effnet_hf.quantization import calibrate, quantize

        quantize(model)
        calibrate(model, [pixels[:8]])
        model.train()
    labels = torch.randint(0, 1000, (len(pixels),), device=device) if labels is None else labels
    given = recipe
    recipe = given or load_recipe("b0", global_batch_size=len(pixels), learning_rate=1e-4, lr_scaling="none")
    if name == OURS and device.type == "cpu" and tuned:
        tune_for_cpu_training(model, pixels.shape[-1])
    if name == OURS or given:
        optimizer = build_optimizer(model, recipe)
    else:
        optimizer = torch.optim.RMSprop(
            model.parameters(), lr=1e-4, alpha=recipe.rmsprop_alpha, eps=recipe.rmsprop_eps, momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )  # fmt: skip
    scaler = torch.amp.GradScaler(device.type, init_scale=128.0, enabled=precision == "fp16")

    def forward(pixels, labels):
        return training_loss(logits_of(model(pixels)), labels, recipe.label_smoothing)

    forward = compiled(forward, mode, ours=name == OURS)

    def step() -> torch.Tensor:
        if mode == "graphs":
            torch.compiler.cudagraph_mark_step_begin()
        with autocast(precision, device):
            loss = forward(pixels, labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.detach()

    return step
