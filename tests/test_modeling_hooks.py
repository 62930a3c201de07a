"""What looks into the network, hooks, tracers and modes, sees the same values with and without gradients."""

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from effnet_hf import EfficientNetNVBackbone, EfficientNetNVForImageClassification, EfficientNetNVModel
from effnet_hf.export.network import fold_all
from effnet_hf.modeling_efficientnet_nv import ConvNormAct, SqueezeExcite
from effnet_hf.tuning import fold_batchnorm


PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def network(tiny_config):
    def make(**overrides):
        torch.manual_seed(0)
        model = EfficientNetNVForImageClassification(tiny_config(**overrides)).eval()
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                tensor.data.add_(0.3 * torch.rand_like(tensor))
        return model

    return make


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if hasattr(value, "values") else value if isinstance(value, (list, tuple)) else ()
    return [tensor for each in values for tensor in tensors_in(each)]


def seen_by(model, watch, gradients):
    """The very tensors that `watch(model, keep)` hands to `keep`, looked at after the forward pass."""
    kept = []
    handles = watch(model, lambda *values: kept.extend(tensors_in(values)))
    with torch.set_grad_enabled(gradients):
        model(PIXELS)
    for handle in handles:
        handle.remove()
    return [tensor.detach().clone() for tensor in kept]


def on(*kinds):
    """Hooks on every module of these kinds."""

    def watch(model, keep):
        modules = [module for module in model.modules() if isinstance(module, kinds)]
        after = [module.register_forward_hook(lambda module, given, got: keep(given, got)) for module in modules]
        return after + [module.register_forward_pre_hook(lambda module, given: keep(given)) for module in modules]

    return watch


def before_activations(model, keep):
    return [
        module.act.register_forward_pre_hook(lambda module, given: keep(given))
        for module in model.modules()
        if isinstance(module, ConvNormAct) and module.act is not None
    ]


def everywhere(model, keep):
    return [nn.modules.module.register_module_forward_hook(lambda module, given, got: keep(given, got))]


def before_everything(model, keep):
    return [nn.modules.module.register_module_forward_pre_hook(lambda module, given: keep(given))]


WATCHERS = {
    "every module": on(nn.Module),
    "batch norm": on(nn.BatchNorm2d),
    "convolutions": on(nn.Conv2d),
    "activations": on(nn.SiLU, nn.ReLU, nn.ReLU6),
    "before activations": before_activations,
    "blocks": on(ConvNormAct),
    "global": everywhere,
    "global, before": before_everything,
}
FORMS = {
    "plain": ({}, lambda model: model),
    "relu6": ({"hidden_act": "relu6"}, lambda model: model),
    "relu, same padding": ({"hidden_act": "relu", "padding": "same"}, lambda model: model),
    "folded": ({}, fold_batchnorm),
    "folded, relu6": ({"hidden_act": "relu6"}, fold_batchnorm),
    "exported": ({}, lambda model: fold_all(copy.deepcopy(model))),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("watcher", WATCHERS)
def test_a_hook_sees_the_same_with_and_without_gradients(watcher, form, network):
    overrides, make = FORMS[form]
    model = make(network(**overrides))
    expected, found = (seen_by(model, WATCHERS[watcher], gradients) for gradients in (True, False))
    # Folded networks have no batch norm of torch's.
    assert len(found) == len(expected) and (expected or watcher == "batch norm" and form not in list(FORMS)[:3])
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    with torch.inference_mode():
        model(PIXELS)  # the hooks are gone, and it goes on


def test_one_hook_is_enough(network):
    """A hook on one batch norm among many, as feature extractors set it."""
    model = network()
    norm = model.efficientnet.encoder.stages[1].blocks[0].depthwise.bn
    kept = []
    norm.register_forward_hook(lambda module, given, got: kept.append(got))
    with torch.no_grad():
        model(PIXELS)
    model(PIXELS)
    assert torch.equal(*kept) and kept[0].min() < -0.3  # SiLU's values are never that low


class Keeper(nn.Module):
    """A module that somebody put in the place of batch norm."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.kept = norm, []

    def forward(self, x):
        self.kept.append(self.norm(x))
        return self.kept[-1]


def test_a_module_put_there_keeps_what_it_made(network):
    model = network()
    stem = model.efficientnet.encoder.stem
    stem.bn = Keeper(stem.bn)
    with torch.no_grad():
        model(PIXELS)
    model(PIXELS)
    assert torch.equal(*stem.bn.kept)


def test_a_forward_put_on_one_module_keeps_what_it_made(network):
    stem, kept = network().efficientnet.encoder.stem, []
    forward = stem.bn.forward
    stem.bn.forward = lambda x: kept.append(forward(x)) or kept[-1]
    with torch.no_grad():
        stem(PIXELS)
    stem(PIXELS)
    assert torch.equal(*kept)


@pytest.mark.parametrize(
    "place, name",
    [
        *((kind, "forward") for kind in (nn.BatchNorm2d, nn.Conv2d, nn.Linear, nn.SiLU)),
        *((nn.functional, name) for name in ("batch_norm", "conv2d", "linear", "adaptive_avg_pool2d", "silu")),
        *((nn.Module, "__call__"), (nn.Module, "_call_impl"), (nn.Conv2d, "_conv_forward")),
    ],
)
def test_a_tool_in_the_place_of_a_function_of_torch_keeps_what_it_saw(place, name, network, monkeypatch):
    model, original, kept = network(), getattr(place, name), []

    def wrapped(*given, **named):
        got = original(*given, **named)
        if isinstance(got, torch.Tensor):
            kept.append(got)
        return got

    monkeypatch.setattr(place, name, wrapped)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            model(PIXELS)
    half = len(kept) // 2
    assert half and all(torch.equal(a, b) for a, b in zip(kept[:half], kept[half:]))


@pytest.mark.parametrize("base", [TorchFunctionMode, TorchDispatchMode])
def test_a_mode_sees_what_was_computed(base, network):
    class Recorder(base):
        def __init__(self):
            super().__init__()
            self.kept = []

        def dispatch(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if "batch_norm" in str(func):
                self.kept += [(tensor, tensor.detach().clone()) for tensor in tensors_in(result)[:1]]
            return result

        __torch_function__ = __torch_dispatch__ = dispatch

    with torch.no_grad(), Recorder() as recorder:
        network()(PIXELS)
    assert recorder.kept and all(torch.equal(kept, at_once) for kept, at_once in recorder.kept)


def test_torchvisions_feature_extractor(network):
    encoder = network().efficientnet.encoder
    with torch.no_grad():
        norms = [name for name in get_graph_node_names(encoder)[1] if name.endswith(".bn")]
        found = create_feature_extractor(encoder, norms)(PIXELS)
    expected = create_feature_extractor(encoder, norms)(PIXELS)
    assert len(norms) > 5 and all(torch.equal(found[name], expected[name]) for name in norms)


def compare_graphs(model):
    graphs = []
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            traced = torch.jit.trace(model, PIXELS, strict=False)  # which runs it again and compares the graphs
            graphs.append([node.kind() for node in traced.inlined_graph.nodes()])
            exported = torch.export.export(model, (PIXELS,))
            torch.testing.assert_close(traced(PIXELS)["logits"], model(PIXELS).logits)
        called = [str(node.target) for node in exported.graph.nodes] + graphs[-1]
        assert any("silu" in name for name in called) and not any("silu_" in name for name in called)
    assert graphs[0] == graphs[1]


def test_traced_and_exported_graphs_do_not_depend_on_gradients(network):
    """In a process of its own: exporting with gradients starts threads, after which no other test could fork."""
    program = (
        "import pickle, sys; from tests.test_modeling_hooks import *; compare_graphs(pickle.load(sys.stdin.buffer))"
    )
    line = [sys.executable, "-W", "ignore", "-c", program]
    subprocess.run(line, input=pickle.dumps(network()), cwd=Path(__file__).parents[1], check=True)


@pytest.mark.filterwarnings(
    "ignore:.*(torch.jit|is_gradient_checkpointing).*:FutureWarning", "ignore::torch.jit.TracerWarning"
)
@pytest.mark.parametrize("form", ["plain", "folded", "relu, same padding"])
def test_a_traced_network_is_saved_and_takes_other_sizes(form, network):
    overrides, make = FORMS[form]
    model = make(network(**overrides))
    model.config.torchscript = True  # as from_pretrained(torchscript=True) does on transformers 4.57
    assert isinstance(model(PIXELS), tuple) and "logits" in model(PIXELS, return_dict=True)
    traced = torch.jit.trace(model, PIXELS)  # strictly: no dict
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    opened = torch.jit.freeze(torch.jit.load(file).eval())
    for images in (PIXELS, torch.randn(3, 3, 48, 33)):
        with torch.no_grad():
            torch.testing.assert_close(opened(images)[0], model(images)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "kind",
    [EfficientNetNVForImageClassification, EfficientNetNVModel, EfficientNetNVBackbone],
    ids=lambda c: c.__name__,
)
def test_what_tools_ask_of_every_model(kind, tiny_config):
    model = kind(tiny_config()).eval()
    model.enable_input_require_grads()  # by PEFT, for gradient checkpointing
    assert isinstance(model.get_input_embeddings(), ConvNormAct)
    assert tensors_in(model(PIXELS, return_dict=False))[0].requires_grad


@pytest.mark.parametrize(
    ("kind", "others"),
    [
        (EfficientNetNVForImageClassification, ("labels", "output_hidden_states")),
        (EfficientNetNVModel, ("output_hidden_states",)),
        (EfficientNetNVBackbone, ("output_hidden_states",)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("return_dict", [True, False])
def test_torch_fx_traces_what_has_no_other_arguments(kind, others, return_dict, tiny_config):
    model = kind(tiny_config(return_dict=return_dict, softmax_temperature=1.5)).eval()
    nothing = dict.fromkeys(others)
    traced = torch.fx.symbolic_trace(model, concrete_args=nothing)
    for images in (PIXELS, torch.randn(3, 3, 48, 33)):
        found, wanted = traced(images, *nothing.values()), model(images)
        assert isinstance(found, dict if return_dict else tuple)
        for one, other in zip(tensors_in(found), tensors_in(wanted), strict=True):
            assert torch.equal(one, other)
    for given in ({}, nothing | {others[-1]: True}):
        with pytest.raises(NotImplementedError, match=r"torch.fx traces .* or use torch.export.export\(model"):
            torch.fx.symbolic_trace(model, concrete_args=given)


@pytest.mark.parametrize("form", FORMS)
def test_unwatched_activations_overwrite_their_input(form, network):
    """What keeps inference as fast, and as small, as it was."""
    overrides, make = FORMS[form]
    stem = make(network(**overrides)).efficientnet.encoder.stem
    operations = []
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), profile(activities=[ProfilerActivity.CPU]) as profiled:
            stem(PIXELS)
        operations.append({event.key for event in profiled.key_averages()})
    name = {nn.SiLU: "silu", nn.ReLU6: "hardtanh", nn.ReLU: "relu"}[type(stem.act)]
    assert f"aten::{name}_" in operations[0] and f"aten::{name}_" not in operations[1]


@pytest.mark.parametrize("form", FORMS)
def test_unwatched_layers_are_computed_without_calls_of_their_modules(form, network):
    """The interpreter's share of inference; the numbers are those of the modules."""
    overrides, make = FORMS[form]
    model, calls = make(network(**overrides)), []

    def count(frame, event, argument):
        if event == "call" and frame.f_code is nn.Module._call_impl.__code__:
            calls.append(type(frame.f_locals["self"]))

    with torch.no_grad():
        sys.setprofile(count)
        try:
            quick = model(PIXELS).logits
        finally:
            sys.setprofile(None)
    assert not {nn.Conv2d, nn.BatchNorm2d, nn.SiLU} & set(calls) and calls.count(nn.Linear) == 1  # the classifier
    assert torch.equal(quick, model(PIXELS).logits)


def test_weights_that_are_swapped_for_one_call_are_used(network):
    model = network()
    swapped = {name: tensor + 0.1 for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    with torch.no_grad():
        found = torch.func.functional_call(model, swapped, (PIXELS,)).logits
        model.load_state_dict(swapped, strict=False, assign=True)
        assert torch.equal(found, model(PIXELS).logits)


def replica_of(module):
    """What DataParallel's replicate makes of a module in inference: its tensors are plain attributes."""
    replica = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        if parameter is None:
            replica._parameters[name] = None
        else:
            setattr(replica, name, parameter.detach())
    for name, child in module._modules.items():
        replica._modules[name] = child and replica_of(child)
    return replica


def with_plain_attributes(kind, *names):
    def put(model):
        for module in (module for module in model.modules() if isinstance(module, kind)):
            for name in (name for name in names if getattr(module, name) is not None):
                tensor = getattr(module, name).detach() * 1.1
                delattr(module, name)
                setattr(module, name, tensor)
        return model

    return put


def with_functions_as_activations(model):
    for module in (module for module in model.modules() if isinstance(module, (ConvNormAct, SqueezeExcite))):
        if module.act is not None:
            del module.act
            module.act = nn.functional.silu
    return model


@pytest.mark.parametrize(
    "change",
    [
        replica_of,
        with_functions_as_activations,
        with_plain_attributes(nn.Conv2d, "weight"),
        with_plain_attributes(nn.Linear, "bias"),
        *(with_plain_attributes(nn.BatchNorm2d, name) for name in ("weight", "bias", "running_mean", "running_var")),
    ],
)
def test_what_stands_in_the_place_of_modules_and_parameters_is_used(change, network):
    model, plain = change(network()), network()
    with torch.no_grad():
        found, before = model(PIXELS).logits, plain(PIXELS).logits
    assert torch.equal(found, model(PIXELS).logits)
    assert torch.equal(found, before) == (change in (replica_of, with_functions_as_activations))


def test_an_activation_called_by_itself_leaves_its_input(network):
    act, x = network().efficientnet.encoder.stem.act, torch.randn(2, 3)
    with torch.no_grad():
        assert act(x) is not x and not torch.equal(act(x), x)
