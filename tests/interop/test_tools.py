"""Tools that look into a network, count its work, explain it, compress it, or serve it; torch's: test_tracing.py."""

import copy

import pytest
import torch


def pixels(number=2, side=64):
    return torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(0))


class Logits(torch.nn.Module):
    """What the documentation of each of these tools has one write around a model of transformers."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).logits


LOOK = "Looking inside"


@pytest.mark.client("captum", "captum", group=LOOK)
def test_captum(classifier):
    attr = pytest.importorskip("captum.attr", reason="needs captum")
    method = attr.IntegratedGradients(Logits(classifier))
    attributions, error = method.attribute(pixels(1), target=1, n_steps=64, return_convergence_delta=True)
    assert attributions.shape == (1, 3, 64, 64) and attributions.abs().sum() > 0 and error.abs().max() < 0.5


@pytest.mark.client("captum", "captum", group=LOOK)
def test_captum_layers(classifier):
    attr = pytest.importorskip("captum.attr", reason="needs captum")
    last = [module for module in classifier.modules() if isinstance(module, torch.nn.Conv2d)][-1]
    map_ = attr.LayerGradCam(Logits(classifier), last).attribute(pixels(1).requires_grad_(), target=0)
    assert map_.shape[:2] == (1, 1) and map_.isfinite().all() and map_.abs().max() > 0
    saliency = attr.Saliency(Logits(classifier)).attribute(pixels(1).requires_grad_(), target=0)
    assert saliency.abs().sum() > 0


@pytest.mark.client("pytorch-grad-cam", "grad-cam", group=LOOK, step="a module that returns the logits")
def test_grad_cam(classifier):
    cam = pytest.importorskip("pytorch_grad_cam", reason="needs grad-cam")
    last = [module for module in classifier.modules() if isinstance(module, torch.nn.Conv2d)][-1]
    with cam.GradCAM(model=Logits(classifier), target_layers=[last]) as explain:
        map_ = explain(input_tensor=pixels(1), targets=None)
    assert map_.shape == (1, 64, 64)


@pytest.mark.client("torchinfo", "torchinfo", group=LOOK)
def test_torchinfo(classifier):
    torchinfo = pytest.importorskip("torchinfo", reason="needs torchinfo")
    found = torchinfo.summary(classifier, input_data=pixels(1), verbose=0)
    assert found.total_params == classifier.num_parameters() and found.total_mult_adds > 0


@pytest.mark.client("torchview", "torchview", group=LOOK)
def test_torchview(classifier):
    torchview = pytest.importorskip("torchview", reason="needs torchview")
    pytest.importorskip("graphviz", reason="needs graphviz")
    graph = torchview.draw_graph(Logits(classifier), input_data=pixels(1), device="cpu")
    assert len(graph.visual_graph.source) > 1000


@pytest.mark.client("fvcore", "fvcore", group=LOOK)
@pytest.mark.filterwarnings("ignore")
def test_fvcore(classifier):
    fvcore = pytest.importorskip("fvcore.nn", reason="needs fvcore")
    assert fvcore.FlopCountAnalysis(Logits(classifier), pixels(1)).total() > 1e5


@pytest.mark.client("ptflops", "ptflops", group=LOOK)
def test_ptflops(classifier):
    ptflops = pytest.importorskip("ptflops", reason="needs ptflops")
    macs, parameters = ptflops.get_model_complexity_info(
        Logits(classifier), (3, 64, 64), as_strings=False, print_per_layer_stat=False, verbose=False
    )
    assert macs > 1e6 and parameters == classifier.num_parameters()


@pytest.mark.client("thop", "ultralytics-thop", group=LOOK)
def test_thop(classifier):
    thop = pytest.importorskip("thop", reason="needs ultralytics-thop")
    macs, _ = thop.profile(Logits(classifier), inputs=(pixels(1),), verbose=False)
    assert macs > 1e5


SHRINK = "Quantization and pruning"


@pytest.mark.client("optimum-quanto, int8 weights", "optimum-quanto", group=SHRINK)
@pytest.mark.filterwarnings("ignore")
def test_quanto(classifier):
    quanto = pytest.importorskip("optimum.quanto", reason="needs optimum-quanto")
    model = copy.deepcopy(classifier)
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    with torch.no_grad():
        expected, found = classifier(pixels()).logits, model(pixels()).logits
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.client("torch.ao, dynamic quantization", group=SHRINK)
@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantization(classifier):
    model = torch.ao.quantization.quantize_dynamic(classifier, {torch.nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        expected, found = classifier(pixels()).logits, model(pixels()).logits
    assert 0 < (found - expected).abs().max() < 0.2 * expected.abs().max()


@pytest.mark.client("torch.nn.utils.prune", group=SHRINK)
def test_prune(classifier):
    from torch.nn.utils import prune

    model = copy.deepcopy(classifier)
    for module in [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]:
        prune.l1_unstructured(module, "weight", amount=0.3)
        prune.remove(module, "weight")
    assert model(pixels()).logits.isfinite().all()


@pytest.mark.client("NNCF, post-training quantization", "nncf", group=SHRINK)
@pytest.mark.filterwarnings("ignore")
def test_nncf(classifier):
    nncf = pytest.importorskip("nncf", reason="needs nncf")
    import openvino

    network = openvino.convert_model(Logits(classifier), example_input=pixels(1))
    quantized = nncf.quantize(network, nncf.Dataset([pixels(1) for _ in range(8)], lambda x: x.numpy()))
    found = openvino.compile_model(quantized, "CPU")(pixels(1).numpy())[0]
    with torch.no_grad():
        expected = classifier(pixels(1)).logits.numpy()
    assert abs(found - expected).max() < 0.3 * abs(expected).max()


@pytest.mark.client("LitServe", "litserve", group="Serving")
def test_litserve(folder, photo):
    litserve = pytest.importorskip("litserve", reason="needs litserve")
    from transformers import pipeline

    class Server(litserve.LitAPI):
        def setup(self, device):
            self.classify = pipeline("image-classification", model=str(folder))

        def decode_request(self, request):
            return photo

        def predict(self, image):
            return self.classify(image, top_k=1)

        def encode_response(self, output):
            return output[0]

    api = Server()
    api.setup("cpu")
    assert api.encode_response(api.predict(api.decode_request({})))["score"] > 0
