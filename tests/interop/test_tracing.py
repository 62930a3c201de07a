"""What draws a graph of the model, counts its work, or looks inside."""

import copy

import pytest
import torch

from .conftest import SIZE


pytestmark = pytest.mark.filterwarnings("ignore")
IMAGES = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
MODES = {"gradients": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def expected(model, images=IMAGES):
    with torch.no_grad():
        return model(images).logits


@pytest.mark.client("torch.jit.trace", "torch", group="graphs")
@pytest.mark.parametrize("mode", MODES)
def test_jit_trace(classifier, mode, tmp_path):
    with MODES[mode]():
        traced = torch.jit.trace(classifier, IMAGES, strict=False)
    torch.jit.save(traced, tmp_path / "traced.pt")
    opened = torch.jit.load(tmp_path / "traced.pt")
    torch.testing.assert_close(opened(IMAGES)["logits"], expected(classifier))


@pytest.mark.client("from_pretrained(torchscript=True)", "torch", group="graphs", limit="gone in transformers 5")
def test_torchscript(folder):
    import transformers
    from transformers import AutoModelForImageClassification

    if transformers.__version__ >= "5":
        pytest.skip("transformers 5 has no torchscript")
    model = AutoModelForImageClassification.from_pretrained(folder, torchscript=True).eval()
    assert isinstance(model(IMAGES), tuple)
    torch.testing.assert_close(torch.jit.trace(model, IMAGES)(IMAGES)[0], model(IMAGES)[0])


@pytest.mark.client("torch.export", "torch", group="graphs")
@pytest.mark.parametrize("strict", [False, True])
def test_export(classifier, strict):
    axes = {"pixel_values": {0: torch.export.Dim("batch")}}
    program = torch.export.export(classifier, (), {"pixel_values": IMAGES}, dynamic_shapes=axes, strict=strict)
    one = torch.cat([IMAGES, IMAGES[:1]])
    torch.testing.assert_close(program.module()(pixel_values=one)["logits"], expected(classifier, one))


@pytest.mark.client(
    "torch.fx.symbolic_trace",
    "torch",
    group="graphs",
    step="the encoder, or torch.export",
    limit="no model with **kwargs",
)
def test_fx(classifier, side):
    if side == "ours":
        with pytest.raises(NotImplementedError, match=r"use torch.export.export"):
            torch.fx.symbolic_trace(classifier)
        torch.fx.symbolic_trace(classifier.efficientnet.encoder)
    else:
        torch.fx.symbolic_trace(classifier)


@pytest.mark.client("create_feature_extractor", "torchvision", group="graphs", step="the encoder")
def test_feature_extractor(classifier):
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    encoder = classifier.efficientnet.encoder
    name = [name for name in get_graph_node_names(encoder)[1] if "blocks" in name][-1]
    assert create_feature_extractor(encoder, [name])(IMAGES)[name].dim() == 4


@pytest.mark.client("torch.func (functional_call, vmap, grad)", "torch", group="graphs")
def test_func(classifier):
    weights = {name: tensor.detach() for name, tensor in classifier.named_parameters()}

    def loss(weights, image):
        return torch.func.functional_call(classifier, weights, (image[None],)).logits.sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, IMAGES)
    classifier.zero_grad()
    classifier(IMAGES[:1]).logits.sum().backward()
    name, first = next(iter(classifier.named_parameters()))
    torch.testing.assert_close(each[name][0], first.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.client("FlopCounterMode", "torch", group="graphs")
def test_flops(classifier):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        classifier(IMAGES)
    assert counter.get_total_flops() > 1e5


@pytest.mark.client("torchinfo", "torchinfo", group="graphs")
def test_torchinfo(classifier):
    torchinfo = pytest.importorskip("torchinfo", reason="pip install torchinfo")
    found = torchinfo.summary(classifier, input_size=tuple(IMAGES.shape), verbose=0)
    assert found.total_params == sum(parameter.numel() for parameter in classifier.parameters())


@pytest.mark.client("ptflops", "ptflops", group="graphs")
def test_ptflops(classifier):
    ptflops = pytest.importorskip("ptflops", reason="pip install ptflops")
    flops, parameters = ptflops.get_model_complexity_info(
        classifier, (3, SIZE, SIZE), as_strings=False, print_per_layer_stat=False, backend="pytorch"
    )
    assert flops > 1e5 and parameters == sum(parameter.numel() for parameter in classifier.parameters())


@pytest.mark.client("thop", "thop", group="graphs")
def test_thop(classifier):
    thop = pytest.importorskip("thop", reason="pip install thop")
    assert thop.profile(copy.deepcopy(classifier), inputs=(IMAGES,), verbose=False)[0] > 1e5


@pytest.mark.client("fvcore", "fvcore", group="graphs")
def test_fvcore(classifier):
    fvcore = pytest.importorskip("fvcore.nn", reason="pip install fvcore")
    classifier.config.return_dict = False
    found = fvcore.FlopCountAnalysis(classifier, IMAGES).unsupported_ops_warnings(False)
    assert found.uncalled_modules_warnings(False).total() > 1e5


@pytest.mark.client("torchview", "torchview", group="graphs")
def test_torchview(classifier):
    torchview = pytest.importorskip("torchview", reason="pip install torchview")
    assert torchview.draw_graph(classifier, input_size=tuple(IMAGES.shape)).edge_list


@pytest.mark.client("captum (LayerGradCam, IntegratedGradients)", "captum", group="graphs")
def test_captum(classifier, side):
    attr = pytest.importorskip("captum.attr", reason="pip install captum")
    network = classifier.efficientnet
    layer = network.head.conv if side == "ours" else network.encoder.top_conv

    def logits(images):
        return classifier(images).logits

    assert attr.LayerGradCam(logits, layer).attribute(IMAGES, target=1).abs().max() > 0
    assert attr.IntegratedGradients(logits).attribute(IMAGES, target=1, n_steps=3).shape == IMAGES.shape


@pytest.mark.client("pytorch-grad-cam", "grad-cam", group="graphs", step="a module that returns the logits")
def test_grad_cam(classifier, side):
    cam = pytest.importorskip("pytorch_grad_cam", reason="pip install grad-cam")

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = classifier

        def forward(self, images):
            return self.model(images).logits

    network = classifier.efficientnet
    layer = network.head if side == "ours" else network.encoder.top_activation
    with cam.GradCAM(Logits(), [layer]) as explain:
        assert explain(IMAGES, None).shape == (2, SIZE, SIZE)
