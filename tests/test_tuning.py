"""Folding, oneDNN, compilation and CUDA graphs change the speed and nothing else."""

import copy

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d
from transformers.models.rt_detr.modeling_rt_detr import replace_batch_norm

from effnet_hf import EfficientNetNVConfig, EfficientNetNVForImageClassification
from effnet_hf.export.network import fold_all
from effnet_hf.training.optim import training_loss
from effnet_hf.tuning import (
    CudaGraph,
    compile_for_inference,
    fold_batchnorm,
    split_depthwise_gradients,
    tune_for_cpu_training,
    use_onednn,
)


def freeze_as_torchvision(model):
    for block in [block for block in model.modules() if hasattr(block, "bn")]:
        live, block.bn = block.bn, FrozenBatchNorm2d(block.bn.num_features)
        block.bn.load_state_dict(live.state_dict())


@pytest.fixture
def lived_in(tiny_config):
    """Makes a small network whose batch norms have statistics, scales and shifts of their own."""

    def make(**overrides):
        model = EfficientNetNVForImageClassification(tiny_config(**overrides)).eval()
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                tensor.data.add_(0.5 * torch.rand_like(tensor))
        return model

    return make


def relative_error(measured: torch.Tensor, expected: torch.Tensor) -> float:
    return ((measured - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("overrides", [{}, {"padding": "same", "hidden_act": "relu6", "se_ratio": 0.0}])
def test_folding_leaves_the_logits_and_no_batch_norm(lived_in, overrides):
    model, pixels = lived_in(**overrides), torch.randn(4, 3, 33, 32)
    before = copy.deepcopy(model.state_dict())
    folded = fold_batchnorm(model)
    with torch.no_grad():
        expected = model(pixels).logits
        assert relative_error(folded(pixels).logits, expected) < 1e-5
        assert relative_error(fold_batchnorm(folded)(pixels).logits, expected) < 1e-5, "folding twice"
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()), "the original changed"


@pytest.mark.parametrize("frozen", [replace_batch_norm, freeze_as_torchvision])
def test_folding_takes_the_frozen_batch_norm_of_a_detector(frozen, lived_in):
    model, pixels = lived_in(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for norm in [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]:
            norm.running_var.uniform_(5e-4, 2e-3)
        expected = model(pixels).logits
        frozen(model)
        folded = fold_batchnorm(model)
        assert relative_error(folded(pixels).logits, expected) < 1e-5
    assert not any(hasattr(part, "running_var") for part in folded.modules())
    with pytest.raises(ValueError, match="cannot be trained"):
        folded.train()


def test_what_had_nothing_to_fold_can_be_trained():
    assert fold_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).train().training


def test_folding_is_exact_in_double_precision(lived_in):
    model, pixels = lived_in().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(fold_batchnorm(model)(pixels).logits, model(pixels).logits) < 1e-13


@pytest.mark.parametrize(
    "fold", [fold_batchnorm, lambda model: fold_all(copy.deepcopy(model))], ids=["tuning", "export"]
)
def test_folded_weights_are_rounded_once(lived_in, fold):
    model = lived_in()
    before, after = model.efficientnet.encoder.stem, fold(model).efficientnet.encoder.stem
    k = before.bn.weight.double() / (before.bn.running_var.double() + before.bn.eps).sqrt()
    shift = before.bn.bias.double() - before.bn.running_mean.double() * k
    for found, exact in (
        (after.conv.weight, before.conv.weight.double() * k[:, None, None, None]),
        (after.conv.bias, shift),
    ):
        assert found.dtype == torch.float32
        unit = torch.finfo(torch.float32).eps / 2
        assert ((found.double() - exact).abs() <= 1.001 * unit * exact.abs()).all()


def test_folding_keeps_channels_last_and_layers_of_other_classes(lived_in):
    class Quantized(nn.Conv2d):
        pass

    model = lived_in().to(memory_format=torch.channels_last)
    model.efficientnet.head.conv.__class__ = Quantized
    folded = fold_batchnorm(model)
    assert folded.efficientnet.encoder.stem.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert type(folded.efficientnet.head.bn) is nn.BatchNorm2d and folded.efficientnet.head.conv.bias is None


def test_a_folded_network_refuses_training_and_saving(lived_in, tmp_path):
    folded = fold_batchnorm(lived_in())
    with pytest.raises(ValueError, match="cannot be trained"):
        folded.train()
    with pytest.raises(ValueError, match="save the original"):
        folded.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_cpu_tuning_changes_neither_logits_nor_gradients_nor_what_is_saved(lived_in):
    plain = lived_in(dropout_rate=0.0, survival_prob=1.0).train()
    tuned = tune_for_cpu_training(copy.deepcopy(plain), image_size=128)
    pointwise = [m for m in tuned.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    assert pointwise and all(conv.dilation == (2, 2) for conv in pointwise)
    pixels, labels = torch.randn(4, 3, 96, 96), torch.tensor([0, 1, 2, 3])
    outputs = [model(pixels, labels=labels) for model in (plain, tuned)]
    for output in outputs:
        output.loss.backward()
    assert relative_error(outputs[1].logits, outputs[0].logits) < 1e-5
    for (name, expected), measured in zip(plain.named_parameters(), tuned.parameters()):
        torch.testing.assert_close(measured.grad, expected.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert plain.state_dict().keys() == tuned.state_dict().keys()
    assert plain.config.to_dict() == tuned.config.to_dict()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(9, 12), (8, 7)], ids=str)
@pytest.mark.parametrize("channels_last", [True, False])
def test_split_gradients_are_those_of_torch(stride, size, channels_last):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    plain = nn.Conv2d(6, 6, 5, stride, 2, groups=6, bias=False).to(memory_format=memory_format)
    split = split_depthwise_gradients(copy.deepcopy(plain))
    assert "_conv_forward" in vars(split)
    pixels = torch.randn(3, 6, *size).contiguous(memory_format=memory_format)
    first, second = pixels.clone().requires_grad_(), pixels.clone().requires_grad_()
    expected, measured = plain(first), split(second)
    gradient = torch.randn_like(expected)
    expected.backward(gradient)
    measured.backward(gradient)
    assert torch.equal(measured, expected)
    torch.testing.assert_close(second.grad, first.grad)
    torch.testing.assert_close(split.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-5)


def test_onednn_leaves_small_images_alone(lived_in):
    assert all(conv.dilation == (1, 1) for conv in use_onednn(lived_in(), 64).modules() if isinstance(conv, nn.Conv2d))


@pytest.mark.parametrize("overrides", [{}, {"padding": "same", "hidden_act": "relu6", "se_ratio": 0.0}])
def test_inference_is_one_graph(lived_in, overrides):
    torch._dynamo.reset()
    for model in (lived_in(**overrides), fold_batchnorm(lived_in(**overrides))):
        with torch.no_grad():
            explained = torch._dynamo.explain(model)(torch.randn(2, 3, 32, 32))
        assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons


@pytest.mark.slow  # traces every block of four whole networks
@pytest.mark.parametrize("variant", ["b0", "b4", "widese-b0", "widese-b4"])
def test_every_published_network_is_one_graph(variant):
    torch._dynamo.reset()
    model = EfficientNetNVForImageClassification(EfficientNetNVConfig.from_variant(variant)).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(2, 3, 64, 64), labels=torch.tensor([0, 1])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_training_step_is_one_graph_forwards_and_backwards(tiny_config):
    torch._dynamo.reset()
    # dropout and stochastic depth stay on: their draws must not break the graph
    model = EfficientNetNVForImageClassification(tiny_config(survival_prob=0.8)).train()
    tune_for_cpu_training(model, image_size=96)

    def loss_of(pixels, labels):
        return training_loss(model(pixels).logits, labels, 0.1)

    pixels, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    torch.compile(loss_of, fullgraph=True, backend="aot_eager")(pixels, labels).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.slow  # the C++ compiler works for a minute
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_inductor_gives_the_same_logits_and_the_same_step(tiny_config, lived_in):
    torch._dynamo.reset()
    pixels, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    model = lived_in()
    with torch.no_grad():
        compiled = compile_for_inference(model)
        assert relative_error(compiled(pixels).logits, model(pixels).logits) < 1e-4
        with torch.profiler.profile() as trace:
            compiled(pixels)
    if torch.backends.mkldnn.is_available():  # frozen weights; without them it is aten's convolution, and slow
        assert any(event.name == "mkldnn::_convolution_pointwise" for event in trace.events())
    config = tiny_config(survival_prob=1.0, dropout_rate=0.0)
    eager = EfficientNetNVForImageClassification(config).train()
    other = copy.deepcopy(eager)
    step = torch.compile(lambda pixels: training_loss(other(pixels).logits, labels, 0.1), fullgraph=True)
    loss = training_loss(eager(pixels).logits, labels, 0.1)
    loss.backward()
    compiled_loss = step(pixels)
    compiled_loss.backward()
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=1e-6)
    for (name, expected), measured in zip(eager.named_parameters(), other.parameters()):
        torch.testing.assert_close(measured.grad, expected.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_a_cuda_graph_needs_a_cuda_device(lived_in):
    with pytest.raises(ValueError, match="CUDA device"):
        CudaGraph(lived_in(), torch.randn(1, 3, 32, 32))


@pytest.mark.gpu
def test_a_cuda_graph_replays_the_network_on_new_images_and_new_weights(lived_in):
    model = lived_in().cuda()
    graph = CudaGraph(model, torch.randn(2, 3, 32, 32, device="cuda"))
    for _ in range(2):
        pixels = torch.randn(2, 3, 32, 32, device="cuda")
        with torch.inference_mode():
            torch.testing.assert_close(graph(pixels), model(pixels).logits)
        model.classifier.weight.data.mul_(2)
    with pytest.raises(ValueError, match="recorded for"):
        graph(torch.randn(3, 3, 32, 32, device="cuda"))
