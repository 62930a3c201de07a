"""Optimizers, learning-rate schedules and the loss: NVIDIA's arithmetic, term by term."""

import math

import torch
from torch import nn

from ..errors import UserError
from ..recipes import Recipe


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict]:
    """Batch norm without weight decay, everything else with it, biases of linear layers included (as the original).

    B0 has 98 tensors in the first group and 115 in the second, B4 192 and 226.

    With `layer_decay` d there are two groups for every stage, with an `lr_scale` that [`set_learning_rate`] multiplies
    the rate by: 1 for classifier and head convolution, d for the last stage, d^2 for the one before it, and so on to
    the stem. (timm's `param_groups_layer_decay` counts blocks instead, of which B0 has 16 and B7 55.)
    """
    kinds = (nn.BatchNorm2d, nn.SyncBatchNorm)
    norms = {id(p) for m in model.modules() if isinstance(m, kinds) for p in m.parameters(recurse=False)}
    norm_decay = recipe.weight_decay if recipe.bn_weight_decay else 0.0
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if id(p) in norms], "weight_decay": norm_decay},
        {"params": [p for p in parameters if id(p) not in norms], "weight_decay": recipe.weight_decay},
    ]
    return groups if recipe.layer_decay == 1 else _by_stage(groups, model, recipe.layer_decay)


def _by_stage(groups: list[dict], model: nn.Module, decay: float) -> list[dict]:
    encoder = model.efficientnet.encoder
    parts = [encoder.stem, *encoder.stages]
    scales = {id(p): decay ** (len(parts) - i) for i, part in enumerate(parts) for p in part.parameters()}
    divided = []
    for group in groups:
        for scale in sorted({scales.get(id(p), 1.0) for p in group["params"]}):
            params = [p for p in group["params"] if scales.get(id(p), 1.0) == scale]
            divided.append({**group, "params": params, "lr_scale": scale})
    return divided


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """torch's own RMSprop, SGD or AdamW, in the implementation that measures fastest where the weights are.

    SGD and AdamW are fused: on one CPU thread 2 and 2.8 times as fast as a loop over B0's tensors. RMSprop has no fused
    form. On a GPU `foreach` saves it thousands of launches; on a CPU a loop is 1.2 times as fast, because a tensor is
    still in the cache when its next operation comes (benchmarks/2026-11-25-cpu.md).

    RMSprop is not TensorFlow's variant: eps is added outside the root, the mean square starts at 0, and the learning
    rate multiplies the momentum buffer, not what enters it.
    """
    groups, rate = parameter_groups(model, recipe), peak_learning_rate(recipe)
    if recipe.optimizer == "rmsprop":
        on_cpu = next(model.parameters()).device.type == "cpu"
        return torch.optim.RMSprop(
            groups, lr=rate, alpha=recipe.rmsprop_alpha, eps=recipe.rmsprop_eps, momentum=recipe.momentum,
            foreach=not on_cpu,
        )  # fmt: skip
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=True)
    return torch.optim.AdamW(groups, lr=rate, betas=(recipe.adam_betas[0], recipe.adam_betas[1]), fused=True)


def peak_learning_rate(recipe: Recipe) -> float:
    """`learning_rate`, scaled from the batch it is stated for to the batch in use."""
    ratio = recipe.global_batch_size / recipe.lr_batch_size
    factor = {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[recipe.lr_scaling]
    return recipe.learning_rate * factor


def learning_rate(recipe: Recipe, epoch: int, update: int, updates_per_epoch: int) -> float:
    """The rate of one optimizer step: a pure function, so there is no scheduler state to lose.

    With `lr_update="epoch"` it is the original's, constant within an epoch: warm-up `peak * (e + 1) / warmup`, then
    with w warm-up epochs of E: cosine `end + (1 + cos(pi (e - w) / (E - w))) / 2 * (peak - end)`, linear
    `peak * (1 - (e - w) / (E - w))`, step `peak * gamma^(number of lr_step_epochs passed)`. With `"step"` e counts in
    fractions of an epoch and the warm-up starts at one step's worth.
    """
    peak, warmup = peak_learning_rate(recipe), recipe.warmup_epochs
    if recipe.lr_update == "epoch":
        position, next_position = float(epoch), float(epoch + 1)
    else:
        position = epoch + update / updates_per_epoch
        next_position = epoch + (update + 1) / updates_per_epoch
    if position < warmup:
        return peak * min(next_position / warmup, 1.0)
    share = (position - warmup) / max(recipe.epochs - warmup, 1e-12)
    if recipe.lr_schedule == "cosine":
        return recipe.end_lr + 0.5 * (1 + math.cos(math.pi * share)) * (peak - recipe.end_lr)
    if recipe.lr_schedule == "linear":
        return peak * (1 - share)
    if recipe.lr_schedule == "step":
        steps = sum(position >= milestone for milestone in recipe.lr_step_epochs)
        return peak * math.prod([recipe.lr_step_gamma] * steps)  # infinite, where a power would raise
    return peak


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of the next step, of a group with an `lr_scale` that share of it.

    Raises:
        UserError: the optimizer's arithmetic cannot hold it.
    """
    if not rate <= torch.finfo(torch.float32).max:
        raise UserError(
            f"the learning rate has become {rate:g}, more than its arithmetic can hold; lower --learning_rate, --end_lr"
            " or --lr_step_gamma."
        )
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def layer_rates(optimizer: torch.optim.Optimizer, rate: float) -> str:
    """What `layer_decay` makes of a rate, in a sentence."""
    lowest = min(group.get("lr_scale", 1.0) for group in optimizer.param_groups)
    return f"that is the classifier's rate; the stem's is {rate * lowest:.4g}, the stages' lie between them"


def training_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    label_smoothing: float,
    multi_label: bool = False,
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross entropy in fp32 against class indices (N,) or mixed-up probabilities (N, classes).

    `(1 - eps) * -sum(t log p) + eps * mean(-log p)`, which is torch's own definition for both kinds of target.

    Args:
        multi_label: binary cross entropy against (N, classes), the mean over images and classes, as transformers'; a
            target t becomes `t (1 - eps) + eps / 2`.
        class_weights: float32 (classes,), the factor of each class's term, of smoothed and mixed-up targets too. The
            sum is divided by the number of images, not by their weights as torch does for indices: so a batch has the
            same gradient whole and in parts. With `multi_label`, of the terms for having a label (`pos_weight`).
    """
    if multi_label:
        targets = targets * (1 - label_smoothing) + label_smoothing / 2
        return nn.functional.binary_cross_entropy_with_logits(logits.float(), targets, pos_weight=class_weights)
    if class_weights is not None:
        total = nn.functional.cross_entropy(
            logits.float(), targets, class_weights, label_smoothing=label_smoothing, reduction="sum"
        )
        return total / len(logits)
    return nn.functional.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)


def distillation_loss(
    logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float, multi_label: bool = False
) -> torch.Tensor:
    """Kullback-Leibler divergence from the teacher's softened probabilities, times T^2 (arXiv:1503.02531).

    Args:
        multi_label: each class is a question of its own, answered by a sigmoid; the mean over images and classes.
    """
    if multi_label:
        student, teacher = (torch.stack([x, -x]).float() / temperature for x in (logits, teacher_logits))
        log_probs, targets = nn.functional.logsigmoid(student), nn.functional.logsigmoid(teacher)
        divergence = nn.functional.kl_div(log_probs, targets, reduction="sum", log_target=True) / logits.numel()
        return divergence * temperature**2
    log_probs, targets = (nn.functional.log_softmax(x.float() / temperature, -1) for x in (logits, teacher_logits))
    return nn.functional.kl_div(log_probs, targets, reduction="batchmean", log_target=True) * temperature**2
