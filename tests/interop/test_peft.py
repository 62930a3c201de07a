"""LoRA adapters that train, are saved, and give the same answers when they are opened again."""

import pytest
import torch

from .conftest import SIZE


pytestmark = pytest.mark.filterwarnings("ignore")
peft = pytest.importorskip("peft", reason="pip install peft")
IMAGES = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3])
OURS = {  # target_modules, modules_to_save
    "pointwise convolutions": (r".*\.(expand|project)\.conv", ["classifier", "bn"]),
    "linear layers": ("all-linear", ["classifier", "bn"]),
}
NORMS = ["classifier", "batchnorm", "expand_bn", "depthwise_norm", "project_bn", "top_bn"]
STOCK = {
    "pointwise convolutions": (r".*\.(expand_conv|project_conv)", NORMS),
    "linear layers": (["reduce"], NORMS),  # the stock model has none: convolutions do their work
}


def trained(model, target, kept):
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules=target, modules_to_save=kept)
    adapted = peft.get_peft_model(model, settings).train()
    optimizer = torch.optim.Adam([weight for weight in adapted.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = adapted(pixel_values=IMAGES, labels=LABELS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return adapted.eval()


@pytest.mark.client("PEFT LoRA", "peft", group="Training",
                    step="batch norm in modules_to_save: its statistics are not in an adapter",
                    limit="depthwise convolutions need a rank that their groups divide")  # fmt: skip
@pytest.mark.parametrize("layers", OURS)
def test_lora(folder, side, layers, tmp_path):
    from transformers import AutoModelForImageClassification

    def fresh():
        return AutoModelForImageClassification.from_pretrained(folder)

    adapted = trained(fresh(), *(OURS if side == "ours" else STOCK)[layers])
    adapted.save_pretrained(tmp_path / "adapter")
    opened = peft.PeftModel.from_pretrained(fresh(), tmp_path / "adapter").eval()
    with torch.no_grad():
        answers = adapted(pixel_values=IMAGES).logits
        assert torch.equal(opened(pixel_values=IMAGES).logits, answers)
        merged = opened.merge_and_unload()
        torch.testing.assert_close(merged(pixel_values=IMAGES).logits, answers, atol=1e-4, rtol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IMAGES).logits, answers, atol=1e-4, rtol=1e-3)
