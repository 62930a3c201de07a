"""Checkpoints that real trainers wrote are read by `convert`, and what it writes for others opens there."""

import argparse
import pathlib

import pytest
import torch

from effnet_hf.conversion import load_foreign


@pytest.mark.client("Lightning checkpoint, read by convert", "lightning", group="Checkpoints of others")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["plain", "hydra"])
def test_lightning(kind, tmp_path):
    """With a path, a namespace, or Hydra's settings among its hyperparameters, and the state of callbacks."""
    lightning = pytest.importorskip("lightning", reason="needs lightning")
    timm = pytest.importorskip("timm")
    settings: dict = {"root": pathlib.Path("/data"), "args": argparse.Namespace(lr=0.1, out=pathlib.Path("x"))}
    if kind == "hydra":
        settings["args"] = pytest.importorskip("omegaconf").OmegaConf.create({"lr": 0.1, "sizes": [1, None]})

    class Module(lightning.LightningModule):
        def __init__(self, root, args):
            super().__init__()
            self.save_hyperparameters()
            self.model = timm.create_model("tf_efficientnet_b0", num_classes=5)

        def training_step(self, batch, _):
            loss = torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 1e-6, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])]

    callbacks = lightning.pytorch.callbacks
    saver = callbacks.ModelCheckpoint(dirpath=tmp_path, save_last=True)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=[saver, callbacks.EarlyStopping("loss")],
    )  # fmt: skip
    module = Module(**settings)
    trainer.fit(module, torch.utils.data.DataLoader([(torch.rand(3, 64, 64), 1)] * 4, batch_size=2))
    found = load_foreign(tmp_path / "last.ckpt", arch="tf_efficientnet_b0")
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = module.model.eval()(pixels)
        torch.testing.assert_close(found.model()(pixels).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.client("timm's trainer checkpoint, read by convert", "timm", group="Checkpoints of others")
def test_timms_trainer(tmp_path):
    from timm.models import create_model
    from timm.utils import CheckpointSaver, ModelEmaV3

    network = create_model("efficientnet_b0", num_classes=5).eval()
    args = argparse.Namespace(model="efficientnet_b0", data_dir=pathlib.Path("/data"), output=pathlib.Path("x"))
    saver = CheckpointSaver(
        network, torch.optim.SGD(network.parameters(), 0.1), args, model_ema=ModelEmaV3(network),
        checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path),
    )  # fmt: skip
    saver.save_checkpoint(3, 71.25)
    pixels = torch.randn(2, 3, 64, 64)
    for averaged in (False, True):
        found = load_foreign(tmp_path / "model_best.pth.tar", ema=averaged)
        with torch.no_grad():
            torch.testing.assert_close(found.model()(pixels).logits, network(pixels), rtol=0, atol=1e-5)


@pytest.mark.client("accelerate save_state, read by convert", "accelerate", group="Checkpoints of others")
def test_accelerates_state(tmp_path):
    from accelerate import Accelerator
    from timm.models import create_model

    accelerator = Accelerator(cpu=True)
    network = create_model("tf_efficientnet_b0", num_classes=5).eval()
    network, _ = accelerator.prepare(network, torch.optim.SGD(network.parameters(), 0.1))
    accelerator.save_state(str(tmp_path / "state"))
    found = load_foreign(tmp_path / "state/model.safetensors", arch="tf_efficientnet_b0")
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(found.model()(pixels).logits, network(pixels), rtol=0, atol=1e-5)
