"""The fused kernels on a CPU, in Triton's interpreter. `test_functions.py` runs this file in a process of its own,
because TRITON_INTERPRET=1 has to be set before triton is imported."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm, silu

from effnet_hf import EfficientNetNVForImageClassification
from effnet_hf.fused import functions, fuse_for_gpu_training, kernels, layers
from effnet_hf.fused.layers import FusedConvNormAct, FusedMBConv
from effnet_hf.modeling_efficientnet_nv import MBConv


assert kernels.INTERPRETED
FP32 = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles and blocks of channels even of a small map, the last ones incomplete."""
    monkeypatch.setattr(functions, "_TILE", 128)
    monkeypatch.setattr(functions, "_CHANNELS", 8)


@pytest.fixture
def fused_layers(monkeypatch):
    """Names of batch norms' weights, one for each layer that ran in our kernels."""
    called, merged = [], functions.merged
    monkeypatch.setattr(functions, "merged", lambda partial, norm: called.append(norm) or merged(partial, norm))
    return called


def channels_last(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype).contiguous(memory_format=torch.channels_last)


def doubles(*tensors):
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def assert_gradients(output, inputs, expected, references, **tolerance):
    gradient = torch.randn_like(output)
    found = torch.autograd.grad(output, inputs, gradient)
    right = torch.autograd.grad(expected, references, gradient.double())
    for number, (mine, theirs) in enumerate(zip(found, right)):
        torch.testing.assert_close(mine.double(), theirs, msg=lambda text, at=number: f"{at}: {text}", **tolerance)


def norm_like(norm):
    """A batch norm of the same settings and state in float64."""
    return copy.deepcopy(norm).double()


def lived_in(channels, **settings):
    norm = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01, **settings)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.data.add_(torch.rand_like(tensor))
    return norm


def assert_same_state(norm, reference, **tolerance):
    for name, tensor in norm.state_dict().items():
        torch.testing.assert_close(tensor.double(), reference.state_dict()[name].double(), msg=name, **tolerance)


@pytest.mark.parametrize(
    "kernel, stride, shape",
    [(3, 1, (1, 13, 9, 7)), (5, 1, (3, 4, 4, 6)), (3, 2, (3, 4, 4, 6)), (5, 2, (1, 13, 9, 7)), (5, 2, (2, 3, 2, 1))],
    ids=str,
)
def test_depthwise_with_its_statistics(small_tiles, kernel, stride, shape):
    x, weight = channels_last(*shape).requires_grad_(), torch.randn(shape[1], 1, kernel, kernel, requires_grad=True)
    exact = doubles(x, weight)
    y, partial = functions.Depthwise.apply(x, weight, stride)
    expected = torch.conv2d(*exact, stride=stride, padding=kernel // 2, groups=shape[1])
    assert y.is_contiguous(memory_format=torch.channels_last) and not partial.requires_grad
    torch.testing.assert_close(y.double(), expected, **FP32)
    assert_gradients(y, [x, weight], expected, exact, rtol=1e-4, atol=1e-4)
    moments = functions.merged(partial, lived_in(shape[1])).double()
    variance, mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(moments, torch.stack([mean, (variance + 1e-3).rsqrt()]), **FP32)


def test_the_variance_survives_a_large_mean(small_tiles):
    y, norm = channels_last(3, 11, 9, 13) + 1000, lived_in(11)
    reference = norm_like(norm)
    moments = functions.merged(functions.statistics(y), norm)
    reference(y.double())
    assert_same_state(norm, reference, rtol=1e-5, atol=1e-6)
    variance = torch.var(y.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(moments[1].double(), (variance + 1e-3).rsqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(1, 5, 3, 2), (3, 19, 7, 5), (2, 8, 47, 46)], ids=str)
def test_activated(small_tiles, monkeypatch, shape):
    if shape[-1] > 40:  # large enough for two parts of an image
        monkeypatch.setattr(functions, "_TILE", 4096)
    y, norm = channels_last(*shape).requires_grad_(), lived_in(shape[1])
    inputs = [y, norm.weight, norm.bias]
    exact = doubles(*inputs)
    moments = functions.merged(functions.statistics(y.detach()), norm)
    output = functions.Activated.apply(y, moments, norm.weight, norm.bias, norm.eps)
    expected = silu(batch_norm(exact[0], None, None, exact[1], exact[2], True, 0.0, 1e-3))
    torch.testing.assert_close(output.double(), expected, **FP32)
    assert_gradients(output, inputs, expected, exact, rtol=1e-4, atol=5e-5)


def gated(y, weight, bias, reduce, reduce_bias, expand, expand_bias):
    """silu(batch norm) under squeeze-excite's gate, in torch's own operations."""
    z = silu(batch_norm(y, None, None, weight, bias, True, 0.0, 1e-3))
    inner = silu(nn.functional.linear(z.mean((2, 3)), reduce, reduce_bias))
    return z * nn.functional.linear(inner, expand, expand_bias).sigmoid()[:, :, None, None]


def gate_inputs(*shape, dtype=torch.float32):
    channels, norm = shape[1], lived_in(shape[1])
    reduce, expand = nn.Linear(channels, 3), nn.Linear(3, channels)
    inputs = [channels_last(*shape, dtype=dtype).requires_grad_(), norm.weight, norm.bias]
    inputs += [reduce.weight, reduce.bias, expand.weight, expand.bias]
    for tensor in inputs[3:]:
        tensor.data.mul_(3)  # gates far from one half
    return inputs, functions.merged(functions.statistics(inputs[0].detach()), norm)


@pytest.mark.parametrize("shape", [(1, 5, 3, 2), (3, 19, 7, 5), (2, 8, 47, 46)], ids=str)
def test_gated(small_tiles, monkeypatch, shape):
    if shape[-1] > 40:
        monkeypatch.setattr(functions, "_TILE", 4096)
    (y, *others), moments = gate_inputs(*shape)
    exact = doubles(y, *others)
    output = functions.Gated.apply(y, moments, *others, 1e-3)
    expected = gated(*exact)
    torch.testing.assert_close(output.double(), expected, **FP32)
    assert_gradients(output, [y, *others], expected, exact, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype):
    (y, *others), moments = gate_inputs(3, 19, 7, 5, dtype=dtype)
    exact = doubles(y, *others)
    output = functions.Gated.apply(y, moments, *others, 1e-3)
    expected = gated(*exact)
    unit = torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 else 2)  # which the interpreter cuts off
    assert output.dtype == dtype
    assert ((output.double() - expected).abs() <= 1.01 * unit * expected.abs() + 1e-5).all()
    gradient = torch.randn_like(output)
    found = torch.autograd.grad(output, [y, *others], gradient)
    right = torch.autograd.grad(expected, exact, gradient.double())
    assert ((found[0].double() - right[0]).abs() <= 1.01 * unit * right[0].abs() + 1e-5).all()
    for mine, theirs in zip(found[1:], right[1:]):  # of float32
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-4, atol=1e-4)


def test_gradients_of_gradients_are_torchs():
    (y, *others), moments = gate_inputs(2, 4, 3, 3)
    exact = doubles(y, *others)

    def penalty(output, inputs):
        gradients = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
        return sum(gradient.square().sum() for gradient in gradients)

    outputs = functions.Gated.apply(y, moments, *others, 1e-3), gated(*exact)
    second = [torch.autograd.grad(penalty(out, ins), ins) for out, ins in zip(outputs, ([y, *others], exact))]
    for mine, theirs in zip(*second):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=1e-2)

    output = functions.Activated.apply(y, moments, others[0], others[1], 1e-3)
    expected = silu(batch_norm(exact[0], None, None, exact[1], exact[2], True, 0.0, 1e-3))
    second = [
        torch.autograd.grad(penalty(out, ins), ins) for out, ins in ((output, [y, *others[:2]]), (expected, exact[:3]))
    ]
    for mine, theirs in zip(*second):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=1e-2)


@pytest.fixture
def network(tiny_config):
    """A training network of two blocks, 3 and 5 pixels wide, in channels-last."""

    def make(**overrides):
        settings = {
            "kernel_sizes": [3, 5], "strides": [1, 2], "num_block_repeats": [1, 1], "expand_ratios": [1, 2],
            "out_channels": [16, 24], "stem_channels": 8, "head_channels": 32, "survival_prob": 1.0,
            "dropout_rate": 0.0,
        }  # fmt: skip
        model = EfficientNetNVForImageClassification(tiny_config(**{**settings, **overrides})).train()
        return model.to(memory_format=torch.channels_last)

    return make


LAYERS = 5  # stem, two depthwise, one expansion, head
LABELS = torch.tensor([0, 1, 2])


def step(model, pixels):
    loss = model(pixels, labels=LABELS[: len(pixels)]).loss
    loss.backward()
    return loss.detach()


def assert_same_step(mine, right, rtol=1e-4, atol=1e-5):
    for (name, expected), found in zip(right.named_parameters(), mine.parameters()):
        torch.testing.assert_close(found.grad.double(), expected.grad.double(), rtol=rtol, atol=atol, msg=name)
    for (name, expected), found in zip(right.named_buffers(), mine.buffers()):
        torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("batch, depthwise", [(3, True), (1, True), (2, False)])
def test_a_training_step_of_a_network(network, fused_layers, batch, depthwise):
    plain, pixels = network(), channels_last(batch, 3, 33, 29)
    exact, fused = copy.deepcopy(plain).double(), fuse_for_gpu_training(copy.deepcopy(plain), depthwise)
    for _ in range(2):  # the statistics move on twice
        losses = step(fused, pixels), step(exact, pixels.double())
        torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-5, atol=1e-6)
    assert_same_step(fused, exact)
    assert len(fused_layers) == 2 * LAYERS
    assert fused.state_dict().keys() == plain.state_dict().keys()
    assert fused.config.to_dict() == exact.config.to_dict()


def test_a_fused_network_is_copied_pickled_saved_and_evaluated(network, tmp_path):
    plain = network()
    fused = fuse_for_gpu_training(copy.deepcopy(plain))
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert {type(block) for block in other.modules() if isinstance(block, MBConv)} == {FusedMBConv}
    fused.save_pretrained(tmp_path)
    opened = EfficientNetNVForImageClassification.from_pretrained(tmp_path).eval()
    pixels = channels_last(2, 3, 32, 32)
    assert not any(isinstance(layer, FusedConvNormAct) for layer in opened.modules())
    assert torch.equal(fused.eval()(pixels).logits, opened(pixels).logits)


def test_bfloat16_as_autocast_gives_it(network, fused_layers):
    plain, pixels = network(), channels_last(3, 3, 32, 32)
    exact, fused = copy.deepcopy(plain).double(), fuse_for_gpu_training(copy.deepcopy(plain))
    step(exact, pixels.double())
    errors = []
    for model in (plain, fused):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(pixels, labels=LABELS).loss
        loss.backward()
        pairs = zip(model.parameters(), exact.parameters())
        squares = [((own.grad - right.grad).square().sum(), right.grad.square().sum()) for own, right in pairs]
        errors.append((sum(error for error, _ in squares) / sum(norm for _, norm in squares)).sqrt().item())
    assert len(fused_layers) == LAYERS
    assert errors[1] < 1.1 * errors[0] < 0.1, errors  # not further from the exact gradient than torch's own way


def test_checkpointing_takes_note_of_a_batch_once(network, fused_layers):
    plain, pixels = network(), channels_last(2, 3, 32, 32)
    kept = fuse_for_gpu_training(copy.deepcopy(plain))
    again = fuse_for_gpu_training(copy.deepcopy(plain))
    again.gradient_checkpointing_enable()
    assert torch.equal(step(kept, pixels), step(again, pixels))
    assert_same_step(again, kept, rtol=0, atol=0)
    assert len(fused_layers) == LAYERS + LAYERS + 3  # the blocks' own a second time


def _each(kind, change):
    return lambda model, pixels: [change(module) for module in model.modules() if isinstance(module, kind)] and None


def _hook(kind):
    return _each(kind, lambda module: module.register_forward_hook(lambda *_: None))


def _accumulate(norm):
    norm.momentum = None


REFUSED = {
    "evaluation": lambda model, pixels: model.eval() and None,
    "nchw": lambda model, pixels: model.to(memory_format=torch.contiguous_format) and pixels.contiguous(),
    "float64": lambda model, pixels: model.double() and pixels.double(),
    "cumulative statistics": _each(nn.BatchNorm2d, _accumulate),
    "norms in evaluation": _each(nn.BatchNorm2d, lambda norm: norm.eval()),
    "hooks on norms": _hook(nn.BatchNorm2d),
    "hooks on activations": _hook(nn.SiLU),
    "backward hooks": _each(nn.BatchNorm2d, lambda norm: norm.register_full_backward_hook(lambda *_: None)),
    "another class": _each(nn.BatchNorm2d, lambda norm: setattr(norm, "__class__", type("Own", (nn.BatchNorm2d,), {}))),
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_falls_back(network, fused_layers, change):
    plain, pixels = network(), channels_last(3, 3, 32, 32)
    fused = fuse_for_gpu_training(copy.deepcopy(plain))
    given = [other if (other := change(model, pixels)) is not None else pixels for model in (plain, fused)]
    assert torch.equal(step(fused, given[1]), step(plain, given[0]))
    assert_same_step(fused, plain, rtol=0, atol=0)
    assert fused_layers == []


@pytest.mark.parametrize("overrides", [{"hidden_act": "relu"}, {"padding": "same"}], ids=str)
def test_falls_back_where_the_network_is_another(network, fused_layers, overrides):
    plain, pixels = network(**overrides), channels_last(3, 3, 32, 32)
    fused = fuse_for_gpu_training(copy.deepcopy(plain))
    step(fused, pixels)
    step(plain, pixels)
    # Of `same` padding a 1x1 convolution has none: expansion and head are as ever.
    assert len(fused_layers) == (2 if "padding" in overrides else 0)
    assert_same_step(fused, plain)


def test_falls_back_without_triton(network, fused_layers, monkeypatch):
    monkeypatch.setattr(layers, "functions", None)
    plain, pixels = network(), channels_last(3, 3, 32, 32)
    fused = fuse_for_gpu_training(copy.deepcopy(plain))
    assert torch.equal(step(fused, pixels), step(plain, pixels))


@pytest.mark.parametrize("place, layers", [("se.reduce", LAYERS), ("depthwise.bn", LAYERS - 2), ("depthwise", LAYERS)])
def test_a_hook_on_one_module_is_called(network, fused_layers, place, layers):
    """Squeeze-excite with a hook in it runs as modules, and batch norm and SiLU before it still in our kernels."""
    fused, seen = fuse_for_gpu_training(network()), []
    for block in (block for block in fused.modules() if isinstance(block, MBConv)):
        block.get_submodule(place).register_forward_hook(lambda *_: seen.append(1))
    step(fused, channels_last(3, 3, 32, 32))
    assert (len(seen), len(fused_layers)) == (2, layers)


def test_a_hook_on_the_convolution_leaves_our_own_one_out(network, fused_layers, monkeypatch):
    fused, seen = fuse_for_gpu_training(network()), []
    for block in (block for block in fused.modules() if isinstance(block, MBConv)):
        block.depthwise.conv.register_forward_hook(lambda *_: seen.append(1))
    monkeypatch.setattr(functions, "Depthwise", None)
    step(fused, channels_last(3, 3, 32, 32))
    assert (len(seen), len(fused_layers)) == (2, LAYERS)


def test_quantized_layers_stay(network, fused_layers):
    pytest.importorskip("modelopt")
    from effnet_hf.quantization import quantize

    plain = network()
    quantize(plain)
    for quantizer in (part for part in plain.modules() if hasattr(part, "_amax")):
        quantizer._amax.fill_(3.0)
    plain.train()
    fused, pixels = fuse_for_gpu_training(copy.deepcopy(plain)), channels_last(3, 3, 32, 32)
    losses = step(fused, pixels), step(plain, pixels)
    torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-2)  # a rounding can go the other way
    assert len(fused_layers) == LAYERS  # of batch norm and SiLU; the rest is quantized


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # torch's own forward mode
def test_transforms_and_modes_see_torchs_operations(network, fused_layers):
    layer = fuse_for_gpu_training(network()).efficientnet.head
    x, buffers = channels_last(2, layer.conv.in_channels, 4, 4), dict(layer.named_buffers())

    def call(x, buffers):
        return torch.func.functional_call(layer, buffers, (x,)).sum()

    transformed = torch.func.grad(call)(x, buffers)
    with torch.autograd.forward_ad.dual_level():
        layer(torch.autograd.forward_ad.make_dual(x, x))
    with torch.utils.flop_counter.FlopCounterMode(display=False) as flops:
        layer(x)
    assert flops.get_total_flops() and fused_layers == []
    x.requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(layer(x).sum(), x)[0], transformed, rtol=1e-4, atol=1e-5)
    assert len(fused_layers) == 1
