"""What torch and torchvision make of the model: graphs, functions, counts, hooks, averages and copies."""

import copy
import pickle

import pytest
import torch

from .conftest import SIZE


pytestmark = pytest.mark.filterwarnings("ignore")
IMAGES = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
MODES = {"gradients": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def expected(model, images=IMAGES):
    with torch.no_grad():
        return model(images).logits


@pytest.mark.client("torch.jit.trace", "torch", group="Graphs")
@pytest.mark.parametrize("mode", MODES)
def test_jit_trace(classifier, mode, tmp_path):
    with MODES[mode]():
        traced = torch.jit.trace(classifier, IMAGES, strict=False)
    torch.jit.save(traced, tmp_path / "traced.pt")
    opened = torch.jit.load(tmp_path / "traced.pt")
    torch.testing.assert_close(opened(IMAGES)["logits"], expected(classifier))


@pytest.mark.client("from_pretrained(torchscript=True)", "torch", group="Graphs", limit="gone in transformers 5")
def test_torchscript(folder):
    import transformers
    from transformers import AutoModelForImageClassification

    if transformers.__version__ >= "5":
        pytest.skip("transformers 5 has no torchscript")
    model = AutoModelForImageClassification.from_pretrained(folder, torchscript=True).eval()
    assert isinstance(model(IMAGES), tuple)
    torch.testing.assert_close(torch.jit.trace(model, IMAGES)(IMAGES)[0], model(IMAGES)[0])


@pytest.mark.client("torch.export", "torch", group="Graphs")
@pytest.mark.parametrize("strict", [False, True])
def test_export(classifier, strict):
    axes = {"pixel_values": {0: torch.export.Dim("batch")}}
    program = torch.export.export(classifier, (), {"pixel_values": IMAGES}, dynamic_shapes=axes, strict=strict)
    one = torch.cat([IMAGES, IMAGES[:1]])
    torch.testing.assert_close(program.module()(pixel_values=one)["logits"], expected(classifier, one))


def nothing(side):
    """The arguments besides the images, without values."""
    return dict.fromkeys(("labels", "output_hidden_states", "return_dict")[: 2 if side == "ours" else 3])


@pytest.mark.client(
    "torch.fx.symbolic_trace", "torch", group="Graphs",
    step='`concrete_args={"labels": None, "output_hidden_states": None}`',
)  # fmt: skip
def test_fx(classifier, side):
    others = nothing(side)
    traced = torch.fx.symbolic_trace(classifier, concrete_args=others)
    torch.testing.assert_close(traced(IMAGES, *others.values())["logits"], expected(classifier))


@pytest.mark.client(
    "transformers.utils.fx.symbolic_trace", group="Graphs", step='`input_names=["pixel_values"], disable_check=True`',
    limit="its list of models has no EfficientNet; gone in transformers 5",
)  # fmt: skip
def test_transformers_fx(classifier):
    fx = pytest.importorskip("transformers.utils.fx", reason="transformers 5 has no fx")
    with pytest.raises(NotImplementedError, match="is not supported yet, supported models: "):
        fx.symbolic_trace(classifier, input_names=["pixel_values"])
    traced = fx.symbolic_trace(classifier, input_names=["pixel_values"], disable_check=True)
    one = torch.cat([IMAGES, IMAGES[:1]])
    torch.testing.assert_close(traced(pixel_values=one)["logits"], expected(classifier, one))


@pytest.mark.client(
    "torchvision, create_feature_extractor", "torchvision", group="Graphs",
    step='`concrete_args={"labels": None, "output_hidden_states": None}`, or the encoder',
)  # fmt: skip
def test_feature_extractor(classifier, side):
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    others = nothing(side)
    name = [name for name in get_graph_node_names(classifier, concrete_args=others)[1] if "blocks" in name][-1]
    found = create_feature_extractor(classifier, [name], concrete_args=others)(IMAGES)[name]
    assert found.dim() == 4 and found.isfinite().all()
    if side == "ours":
        encoder = classifier.efficientnet.encoder
        name = name.removeprefix("efficientnet.encoder.")
        torch.testing.assert_close(create_feature_extractor(encoder, [name])(IMAGES)[name], found)


@pytest.mark.client("torch.func: functional_call, vmap, grad", "torch", group="Graphs")
def test_func(classifier):
    weights = {name: parameter.detach() for name, parameter in classifier.named_parameters()}
    buffers, labels = dict(classifier.named_buffers()), torch.tensor([0, 1])

    def loss(weights, image, label):
        logits = torch.func.functional_call(classifier, {**weights, **buffers}, (image[None],)).logits
        return torch.nn.functional.cross_entropy(logits, label[None])

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, IMAGES, labels)
    for number in range(2):
        classifier.zero_grad()
        classifier(IMAGES[number, None], labels=labels[number, None]).loss.backward()
        for name, parameter in classifier.named_parameters():
            torch.testing.assert_close(each[name][number], parameter.grad, atol=1e-3, rtol=1e-3, msg=name)


@pytest.mark.client("torch.compile, one graph", "torch", group="Graphs")
def test_compile(classifier):
    compiled = torch.compile(classifier, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IMAGES).logits, expected(classifier), rtol=1e-4, atol=1e-5)


@pytest.mark.client("deepcopy, pickle", "torch", group="Graphs")
def test_pickle(classifier):
    again = pickle.loads(pickle.dumps(copy.deepcopy(classifier)))
    assert torch.equal(expected(again), expected(classifier))


@pytest.mark.client("torch.optim.swa_utils: SWA, EMA", "torch", group="Training")
def test_swa(classifier):
    from torch.optim.swa_utils import AveragedModel, update_bn

    average = AveragedModel(classifier, use_buffers=True)
    average.update_parameters(classifier)
    update_bn([IMAGES], average)
    assert average(IMAGES).logits.isfinite().all()


@pytest.mark.client("forward hooks, with gradients and without", "torch", group="Looking inside")
def test_forward_hooks(classifier):
    seen = {}
    for name, module in classifier.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(lambda _, __, output, name=name: seen.__setitem__(name, output.clone()))
    expected(classifier)
    without = dict(seen)
    classifier(IMAGES)
    assert all(torch.allclose(seen[name], value) for name, value in without.items()) and len(seen) > 5


@pytest.mark.client("torch.utils.flop_counter", "torch", group="Looking inside")
def test_flops(classifier):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        classifier(IMAGES[:1])
    assert counter.get_total_flops() > 1e6
