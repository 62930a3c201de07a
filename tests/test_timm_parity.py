"""The same weights give the same logits here and in timm, which NVIDIA's original agrees with to the bit."""

import re
from functools import partial

import pytest
import timm
import torch
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.models.efficientnet import EfficientNet
from torch import nn

from effnet_hf import EfficientNetNVConfig, EfficientNetNVForImageClassification


def timm_name(name: str) -> str:
    name = re.sub(r"^efficientnet\.encoder\.stages\.(\d+)\.blocks\.(\d+)\.", r"blocks.\1.\2.", name)
    name = name.replace(".se.reduce.", ".se.conv_reduce.").replace(".se.expand.", ".se.conv_expand.")
    name = re.sub(r"^efficientnet\.encoder\.stem\.conv", "conv_stem", name)
    name = re.sub(r"^efficientnet\.encoder\.stem\.bn", "bn1", name)
    name = re.sub(r"^efficientnet\.head\.conv", "conv_head", name)
    name = re.sub(r"^efficientnet\.head\.bn", "bn2", name)
    # the first stage does not expand, and timm counts a block's norms from its first layer
    first = name.startswith("blocks.0.")
    parts = {
        "expand.conv": "conv_pw",
        "expand.bn": "bn1",
        "depthwise.conv": "conv_dw",
        "depthwise.bn": "bn1" if first else "bn2",
        "project.conv": "conv_pw" if first else "conv_pwl",
        "project.bn": "bn2" if first else "bn3",
    }
    for ours, theirs in parts.items():
        name = re.sub(rf"^(blocks\.\d+\.\d+)\.{ours}", rf"\1.{theirs}", name)
    return name


def timm_widese(width: float, depth: float) -> nn.Module:
    """timm's builder with squeeze widths of 1.5 x the block's input, i.e. a quarter of what it expands to."""
    rows = ["ds_r1_k3_s1_e1_c16_se0.25", "ir_r2_k3_s2_e6_c24", "ir_r2_k5_s2_e6_c40", "ir_r3_k3_s2_e6_c80"]
    rows += ["ir_r3_k5_s1_e6_c112", "ir_r4_k5_s2_e6_c192", "ir_r1_k3_s1_e6_c320"]
    round_width = partial(round_channels, multiplier=width)
    return EfficientNet(
        block_args=decode_arch_def([[row if "se" in row else f"{row}_se1.5"] for row in rows], depth),
        num_features=round_width(1280),
        round_chs_fn=round_width,
        act_layer=nn.SiLU,
        norm_layer=partial(nn.BatchNorm2d, eps=1e-3),
    )


@pytest.mark.parametrize(
    ("variant", "build", "size"),
    [
        ("b0", lambda: timm.create_model("efficientnet_b0", bn_eps=1e-3), (224, 224)),
        ("b0", lambda: timm.create_model("efficientnet_b0", bn_eps=1e-3), (97, 130)),
        ("b4", lambda: timm.create_model("efficientnet_b4", bn_eps=1e-3), (191, 190)),
        ("widese-b0", lambda: timm_widese(1.0, 1.0), (97, 130)),
        ("widese-b4", lambda: timm_widese(1.4, 1.8), (97, 130)),
        # TensorFlow's padding differs between even and odd sizes
        ("lite0", lambda: timm.create_model("tf_efficientnet_lite0", bn_eps=1e-3), (96, 98)),
        ("lite4", lambda: timm.create_model("tf_efficientnet_lite4", bn_eps=1e-3), (97, 130)),
    ],
    ids=["b0", "b0-odd", "b4-odd", "widese-b0", "widese-b4", "lite0-even", "lite4-odd"],
)
def test_timm_gives_the_same_logits_for_the_same_weights(variant, build, size):
    ours = EfficientNetNVForImageClassification(EfficientNetNVConfig.from_variant(variant)).eval()
    with torch.no_grad():
        for module in ours.modules():
            if isinstance(module, nn.BatchNorm2d):  # untrained statistics of 0 and 1 would hide a mix-up
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    tensor.add_(0.1 * torch.rand_like(tensor))

    theirs = build().eval()
    state, wanted = {timm_name(name): tensor for name, tensor in ours.state_dict().items()}, theirs.state_dict()
    assert state.keys() == wanted.keys()
    theirs.load_state_dict({name: tensor.reshape(wanted[name].shape) for name, tensor in state.items()})

    pixels = torch.randn(2, 3, *size)
    with torch.no_grad():
        logits, expected = ours(pixels).logits, theirs(pixels)
    assert (logits - expected).abs().max() / expected.abs().max() < 1e-5
