"""A quantized network as a graph of torch's: quantizers are plain operations in it, equal to modelopt's to the bit."""

import io

import pytest
import torch

from effnet_hf.quantization_efficientnet_nv import _through, _through_in_a_graph, quantizers


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("placement", ["nvidia", "cpu"])
def test_every_quantizer_rounds_as_modelopts(placement, tiny_quantized):
    for name, quantizer in quantizers(tiny_quantized(placement=placement)).items():
        if quantizer._amax.dim():
            quantizer._amax.view(-1)[0] = 0.0  # of a channel without weights
        amax = quantizer._amax
        x = (
            torch.randn(*(amax.shape if amax.dim() else (4,)), *[] if amax.dim() else (8, 3, 3)) * amax.max() * 2
        ).clone()
        x.requires_grad_()
        seen = []
        for function in (_through, _through_in_a_graph):
            y = function(quantizer, x)
            seen += [(y.detach(), torch.autograd.grad(y.sum(), x)[0])]
        assert torch.equal(seen[0][0], seen[1][0]), name
        inside = (x.abs() < amax).detach()
        torch.testing.assert_close(seen[0][1][inside], seen[1][1][inside], msg=name)
    quantizer.disable()
    assert _through_in_a_graph(quantizer, x) is x


@pytest.mark.filterwarnings(
    "ignore:.*(torch.jit|is_gradient_checkpointing).*:FutureWarning", "ignore::torch.jit.TracerWarning"
)
def test_traced_and_saved(tiny_quantized):
    model, file = tiny_quantized().eval(), io.BytesIO()
    torch.jit.save(torch.jit.trace(model, IMAGES, strict=False), file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(IMAGES)["logits"], model(IMAGES).logits)


def test_exported(tiny_quantized):
    block = tiny_quantized().efficientnet.encoder.stages[1].blocks[1].eval()  # one: exporting takes seconds
    maps = torch.randn(2, 24, 8, 8)
    program = torch.export.export(block, (maps,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for x in (maps, torch.cat([maps] * 2)):
        assert torch.equal(program.module()(x), block(x))
