"""Four variants against figures measured on the original implementation (`fixtures/nvidia_golden.json`)."""

import json
from pathlib import Path

import pytest
import torch

from effnet_hf import EfficientNetNVConfig, EfficientNetNVForImageClassification

from .golden_weights import golden_input, golden_state_dict, original_name


GOLDEN = json.loads((Path(__file__).parent / "fixtures" / "nvidia_golden.json").read_text())
SEED, VARIANTS = GOLDEN["seed"], sorted(GOLDEN["weights"])


def golden_model(variant: str) -> EfficientNetNVForImageClassification:
    # Every train-mode pass of the figures was made without dropout and stochastic depth.
    config = EfficientNetNVConfig.from_variant(variant, dropout_rate=0.0, survival_prob=1.0)
    with torch.device("meta"):
        model = EfficientNetNVForImageClassification(config)
    model.load_state_dict(golden_state_dict(model, SEED), strict=True, assign=True)
    return model.requires_grad_(True)


def assert_figures(measured, expected, relative: float) -> None:
    """`relative` is measured on the whole row of figures: a logit that is zero by chance has no relative error."""
    measured = torch.as_tensor(measured, dtype=torch.float64)
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert measured.shape == expected.shape
    error = (measured - expected).abs().max() / expected.abs().max()
    assert error <= relative, f"relative error {error:.1e}: {measured.tolist()} instead of {expected.tolist()}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_evaluation_gives_the_originals_logits_and_feature_maps(variant):
    figures, model = GOLDEN["weights"][variant], golden_model(variant)
    size = figures["image_size"]
    assert model.config.image_size == size
    assert sum(parameter.numel() for parameter in model.parameters()) == figures["params"]
    assert len(model.state_dict()) == figures["state_dict_keys"]

    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(golden_input(0, batch=4, size=size, seed=SEED))
        outputs = model.eval()(golden_input(2, batch=2, size=size, seed=SEED), output_hidden_states=True)

    logits, stages = outputs.logits.double(), outputs.hidden_states[1:]
    assert_figures(logits[:, :8], figures["eval_logits_first8"], 1e-4)
    assert_figures(logits.sum(1), figures["eval_logits_sum"], 1e-4)
    assert_figures(logits.std(1), figures["eval_logits_std"], 1e-4)
    assert logits.argmax(1).tolist() == figures["eval_argmax"]
    assert [list(stage.shape) for stage in stages] == figures["stage_shapes"]
    assert_figures([stage.double().abs().mean() for stage in stages], figures["stage_mean_abs"], 1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_train_step_gives_the_originals_loss_gradients_and_running_statistics(variant):
    figures, model = GOLDEN["weights"][variant]["train_step_96px_batch4"], golden_model(variant).train()
    outputs = model(golden_input(1, batch=4, size=96, seed=SEED), labels=torch.tensor([1, 2, 3, 4]))
    outputs.loss.backward()

    assert_figures(outputs.logits[:, :4].detach(), figures["logits_first4"], 1e-3)
    assert_figures(outputs.loss.detach(), figures["loss"], 1e-3)
    gradients = {original_name(name): parameter.grad for name, parameter in model.named_parameters()}
    for name, norm in figures["grad_norms"].items():
        assert_figures(gradients[name].norm(), norm, 1e-3)
    assert_figures(model.efficientnet.encoder.stem.bn.running_mean.sum(), figures["stem_running_mean_sum"], 1e-3)
