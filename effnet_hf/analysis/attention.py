"""Grad-CAM: which part of an image speaks for a class. Own code: it is thirty lines, and a library would bring ten."""

import torch

from ..modeling_efficientnet_nv import EfficientNetNVForImageClassification


FEWEST = 4  # rows and columns of a map that says where something is


def attention(
    network: EfficientNetNVForImageClassification, pixel_values: torch.Tensor, classes: torch.Tensor
) -> torch.Tensor:
    """Where a network sees what speaks for each of some classes, as in "Grad-CAM" (Selvaraju et al., 2017).

    The channels of the last feature map that has at least four rows and columns (of an image of 224 pixels that is the
    one before the pooling, 7 x 7), each weighted by the mean of the gradient of the class's logit, summed, and kept
    where it is positive.

    Args:
        network: left as it was: its mode, its gradients and its hooks.
        pixel_values: (N, 3, height, width), as the image processor gives them.
        classes: int64 (N, K).

    Returns:
        float32 (N, K, rows, columns) on the CPU; each map is divided by its largest value, which is then 1. All 0
        where nothing speaks for the class.
    """
    was_training, found = network.training, []

    def keep(layer, inputs, output: torch.Tensor) -> torch.Tensor:
        # A leaf in the place of the map: nothing below it is differentiated, and no weight gets a gradient.
        found.append(output.detach().requires_grad_())
        return found[-1]

    network.eval()
    hook = _last_map(network, pixel_values[:1]).register_forward_hook(keep)
    try:
        with torch.inference_mode(False), torch.enable_grad():  # whose clones autograd may keep
            logits = network(pixel_values=pixel_values.clone()).logits
            seen = found[0]
            speaking = logits.gather(1, classes.clone().to(logits.device)).sum(0)
            maps = []
            for one in speaking:
                (gradient,) = torch.autograd.grad(one, seen, retain_graph=True)
                maps.append((gradient.mean((2, 3), keepdim=True) * seen.detach()).sum(1).relu())
    finally:
        hook.remove()
        network.train(was_training)
    weighted = torch.stack(maps, 1).float().cpu()
    return weighted / weighted.amax((2, 3), keepdim=True).clamp(min=torch.finfo().tiny)


@torch.no_grad()
def _last_map(network: EfficientNetNVForImageClassification, image: torch.Tensor) -> torch.nn.Module:
    """The part of a network that makes the map; the stem where no map has so many rows and columns."""
    parts = [network.efficientnet.encoder.stem, *network.efficientnet.encoder.stages, network.efficientnet.head]
    maps = network(pixel_values=image, output_hidden_states=True).hidden_states
    sides = [min(each.shape[2:]) for each in (*maps, maps[-1])]  # the head keeps the size of the last stage
    return next((part for part, side in zip(parts[::-1], sides[::-1]) if side >= FEWEST), parts[0])
