"""torchao's quantization of the linear layers: those of squeeze-excite, and the classifier's."""

import pytest
import torch

from .conftest import SIZE


pytestmark = pytest.mark.filterwarnings("ignore")
torchao = pytest.importorskip("torchao.quantization", reason="pip install torchao")
IMAGES = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
KINDS = ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"]
GROUP = "Quantization and pruning"
LIMIT = "quantizes linear layers only, no convolutions; its INT8 models cannot be saved as safetensors"


@pytest.mark.client("TorchAoConfig", "torchao", group=GROUP, limit=LIMIT)
@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_torchao_config(classifier, folder, kind, embeddings):
    from transformers import AutoModelForImageClassification, TorchAoConfig

    settings = TorchAoConfig(getattr(torchao, kind)(), include_input_output_embeddings=embeddings)
    model = AutoModelForImageClassification.from_pretrained(folder, quantization_config=settings).eval()
    assert any("Int8" in type(parameter.data).__name__ for parameter in model.parameters())
    with torch.no_grad():
        assert (model(IMAGES).logits - classifier(IMAGES).logits).abs().max() < 0.1


@pytest.mark.client("torchao.quantize_", "torchao", group=GROUP, limit="linear layers only, no convolutions")
def test_quantize(classifier):
    with torch.no_grad():
        before = classifier(IMAGES).logits
        torchao.quantize_(classifier, torchao.Int8WeightOnlyConfig())
        assert 0 < (classifier(IMAGES).logits - before).abs().max() < 0.1
