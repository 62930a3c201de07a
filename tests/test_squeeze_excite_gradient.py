"""Squeeze-excite's mean gives its gradient as one number per channel: same bits, one layout."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from effnet_hf import EfficientNetNVForImageClassification
from effnet_hf.quantization_efficientnet_nv import GlobalAvgPool2d


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [(7, 7), (1, 1), (5, 12)])
def test_value_and_gradient_are_torchs_to_the_bit(size, dtype, channels_last):
    pixels = torch.randn(3, 5, *size).to(dtype)
    if channels_last:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    gradient = torch.randn(3, 5, 1, 1).to(dtype)
    results = []
    for pool in (GlobalAvgPool2d(), nn.AdaptiveAvgPool2d(1)):
        leaf = pixels.clone().requires_grad_()
        mean = pool(leaf)
        results.append((mean.detach(), *torch.autograd.grad(mean, leaf, gradient)))
    assert all(torch.equal(own, theirs) for own, theirs in zip(*results))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # torch's own forward mode
def test_every_kind_of_derivative_is_right():
    pool, pixels = GlobalAvgPool2d(), torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    squared = lambda x: pool(x).square()  # noqa: E731
    assert torch.autograd.gradcheck(squared, pixels, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(squared, pixels)
    per_picture = torch.func.vmap(torch.func.grad(lambda x: pool(x[None]).square().sum()))(pixels.detach())
    torch.testing.assert_close(per_picture, torch.autograd.grad(squared(pixels).sum(), pixels)[0])


class MixedLayouts(TorchDispatchMode):
    """Counts operations that read maps of both layouts."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        maps = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor) and x.dim() == 4]
        maps = [x for x in maps if min(x.shape[1:]) > 1]
        last = [x.is_contiguous(memory_format=torch.channels_last) for x in maps]
        plain = [x.is_contiguous() for x in maps]
        if any(last) and any(plain):
            self.names.append(operation.name())
        return operation(*args, **(kwargs or {}))


def test_a_channels_last_backward_pass_reads_one_layout(tiny_config):
    """Five blocks: with torch's own pooling five sums of a contiguous and a channels-last gradient. What is left is the
    head's, of the smallest map."""
    counts = {}
    for kind in (GlobalAvgPool2d, nn.AdaptiveAvgPool2d):
        model = EfficientNetNVForImageClassification(tiny_config()).train().to(memory_format=torch.channels_last)
        for module in model.modules():
            if type(module) is GlobalAvgPool2d:
                module.__class__ = kind
        pixels = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
        loss = model(pixel_values=pixels, labels=torch.tensor([0, 1])).loss
        with MixedLayouts() as mixed:
            loss.backward()
        counts[kind] = mixed.names
    own, theirs = counts[GlobalAvgPool2d], counts[nn.AdaptiveAvgPool2d]
    assert theirs.count("aten::add.Tensor") + theirs.count("aten::add_.Tensor") == 5, theirs
    assert own == ["aten::silu_backward", "aten::native_batch_norm_backward"], own


def test_the_compiler_sees_torchs_own_operation(tiny_config):
    exported = torch.export.export(
        EfficientNetNVForImageClassification(tiny_config()).train(), (torch.randn(2, 3, 32, 32),)
    )
    assert sum("adaptive_avg_pool2d" in str(node.target) for node in exported.graph.nodes) == 6
