import pytest
import torch


pytest.importorskip("modelopt", reason="needs the quant extra: pip install -e '.[quant]'")


@pytest.fixture
def tiny_quantized(tiny_config):
    """Makes a tiny model with quantizers, batch-norm statistics that matter, and ranges from two random batches."""
    from effnet_hf import EfficientNetNVForImageClassification
    from effnet_hf.quantization import calibrate, quantize

    def make(calibrated: bool = True, config: dict | None = None, **settings):
        torch.manual_seed(0)
        model = EfficientNetNVForImageClassification(tiny_config(**(config or {}))).train()
        batches = [torch.randn(4, 3, 32, 32) for _ in range(2)]
        with torch.no_grad():
            for batch in batches * 4:
                model(batch)
        model.eval()
        quantize(model, **settings)
        if calibrated:
            calibrate(model, batches)
        return model

    return make
