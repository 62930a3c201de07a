"""Training libraries: each trains our checkpoint, or the stock model, saves it, and opens what it saved."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments, pipeline

from .conftest import CLASSES, SIZE


ROOT = Path(__file__).parents[2]


@pytest.fixture
def pictures(tmp_path):
    """train/ with four pictures of each class, val/ with two; every class has its own colour."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(CLASSES):
            place = tmp_path / "pictures" / split / name
            place.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 60, (80, 96, 3)) + 40 * np.array([label, 4 - label, label % 2 * 3])
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number}.png")
    return tmp_path / "pictures"


@pytest.fixture
def examples(pictures, folder):
    """The training pictures as the checkpoint's processor prepares them, in dicts that a model takes."""
    processor, found = AutoImageProcessor.from_pretrained(folder), []
    for label, name in enumerate(CLASSES):
        for path in sorted((pictures / "train" / name).iterdir()):
            pixels = processor(Image.open(path), return_tensors="pt")["pixel_values"][0]
            found.append({"pixel_values": pixels, "labels": label})
    return found


@pytest.fixture
def tensors(examples):
    pixels = torch.stack([example["pixel_values"] for example in examples])
    return torch.utils.data.TensorDataset(pixels, torch.tensor([example["labels"] for example in examples]))


class Logits(torch.nn.Module):
    """A model as libraries want it that know no outputs with names."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixels):
        return self.model(pixel_values=pixels).logits


def opened(folder):
    return AutoModelForImageClassification.from_pretrained(folder)


def arguments(output_dir, **changes):
    settings = {
        "output_dir": str(output_dir),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 5,
        "per_device_eval_batch_size": 10,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 0,
    }
    return TrainingArguments(**{**settings, **changes})


def accuracy(found):
    logits = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
    return {"accuracy": float((logits.argmax(-1) == found.label_ids).mean())}


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.client("Trainer: bf16, label smoothing, metrics, the best model", group="Training")
def test_trainer(folder, examples, tmp_path, photo):
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "bf16": True}
    trainer = Trainer(
        opened(folder),
        arguments(tmp_path / "run", label_smoothing_factor=0.1, metric_for_best_model="accuracy", **settings),
        train_dataset=examples,
        eval_dataset=examples,
        compute_metrics=accuracy,
        processing_class=AutoImageProcessor.from_pretrained(folder),
    )
    trainer.train()
    trainer.save_model()
    figures = trainer.evaluate()
    assert 0 <= figures["eval_accuracy"] <= 1 and np.isfinite(figures["eval_loss"])
    again = opened(tmp_path / "run")
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, msg=name)
    assert len(pipeline("image-classification", model=str(tmp_path / "run"))(photo)) == 5


@pytest.mark.client("Trainer: resume_from_checkpoint", group="Training")
def test_trainer_resumes(folder, examples, tmp_path):
    def trainer(**settings):
        return Trainer(opened(folder), arguments(tmp_path / "run", **settings), train_dataset=examples)

    whole = trainer(save_strategy="epoch")
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.client("Trainer: gradient_checkpointing", group="Training")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # transformers 5
def test_trainer_gradient_checkpointing(folder, examples, tmp_path, side):
    results = []
    for switched in (False, True):
        model = opened(folder)
        if side == "ours":
            model.config.survival_prob = 1.0
        settings = {"num_train_epochs": 1, "gradient_checkpointing": switched}
        trainer = Trainer(model, arguments(tmp_path / "run", **settings), train_dataset=examples)
        trainer.train()
        results.append(weights(trainer.model))
    counted = [{name: value for name, value in result.items() if "num_batches" in name} for result in results]
    assert counted[0] == counted[1]  # batch norm's statistics are of one forward pass, not of two


@pytest.mark.client("Trainer: hyperparameter_search (Optuna)", "optuna", group="Training")
def test_optuna(folder, examples, tmp_path):
    pytest.importorskip("optuna", reason="optuna is not installed")
    trainer = Trainer(
        None,
        arguments(tmp_path / "run", num_train_epochs=1, eval_strategy="epoch"),
        model_init=lambda trial: opened(folder),
        train_dataset=examples,
        eval_dataset=examples,
        compute_metrics=accuracy,
    )
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)},
        backend="optuna",
        n_trials=2,
        direction="maximize",
        compute_objective=lambda figures: figures["eval_accuracy"],
    )
    assert 1e-4 <= best.hyperparameters["learning_rate"] <= 1e-2


def script_transforms(processor):
    """Those of transformers' run_image_classification.py and run_image_classification_no_trainer.py, 4.57 and 5."""
    from torchvision.transforms import (
        CenterCrop,
        Compose,
        Normalize,
        RandomHorizontalFlip,
        RandomResizedCrop,
        Resize,
        ToTensor,
    )

    if "shortest_edge" in processor.size:
        size = processor.size["shortest_edge"]
    else:
        size = (processor.size["height"], processor.size["width"])
    normalize = Normalize(mean=processor.image_mean, std=processor.image_std)
    train = Compose([RandomResizedCrop(size), RandomHorizontalFlip(), ToTensor(), normalize])
    return train, Compose([Resize(size), CenterCrop(size), ToTensor(), normalize])


@pytest.mark.client(
    "run_image_classification.py (its transforms)",
    "torchvision",
    group="Training",
    step="`--image_processor_name` of a processor without a margin (docs/trainer.md), or it trains at the resize size",
)
def test_transformers_script(folder, pictures, side, tmp_path):
    from torchvision.datasets import ImageFolder

    from effnet_hf import EfficientNetNVImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder)
    if side == "ours":
        assert [transform(Image.new("RGB", (90, 90))).shape[1] for transform in script_transforms(processor)] == [
            72,
            72,
        ]
        EfficientNetNVImageProcessor.for_image_size(SIZE, margin=0).save_pretrained(tmp_path / "no-margin")
        processor = AutoImageProcessor.from_pretrained(tmp_path / "no-margin")
    train, evaluate = script_transforms(processor)
    assert train(Image.new("RGB", (90, 90))).shape == evaluate(Image.new("RGB", (90, 90))).shape == (3, SIZE, SIZE)

    def collate(batch):
        pixels, labels = zip(*batch, strict=True)
        return {"pixel_values": torch.stack(pixels), "labels": torch.tensor(labels)}

    trainer = Trainer(
        opened(folder),
        arguments(tmp_path / "run", num_train_epochs=1, remove_unused_columns=False),
        train_dataset=ImageFolder(pictures / "train", train),
        eval_dataset=ImageFolder(pictures / "val", evaluate),
        data_collator=collate,
        compute_metrics=accuracy,
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model()
    own = trainer.evaluate()["eval_accuracy"]
    answers = pipeline("image-classification", model=str(tmp_path / "run"), top_k=1)
    paths = sorted((pictures / "val").glob("*/*.png"))
    hits = [answers(str(path))[0]["label"] == path.parent.name for path in paths]
    assert abs(np.mean(hits) - own) <= 0.2  # what was evaluated is what a pipeline answers, but for the filter


@pytest.mark.client("Lightning", "lightning", group="Training")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_lightning(folder, tensors, tmp_path):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = opened(folder)

        def training_step(self, batch, index):
            return self.model(pixel_values=batch[0], labels=batch[1]).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    module = Module()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(tensors, 5, shuffle=True))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = Module.load_from_checkpoint(tmp_path / "last.ckpt")
    for name, value in module.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, msg=name)


@pytest.mark.client("fastai", "fastai", group="Training")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_fastai(folder, tensors, tmp_path):
    pytest.importorskip("fastai", reason="fastai is not installed")
    from fastai.callback import progress, schedule  # noqa: F401  # which give Learner its methods
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.losses import CrossEntropyLossFlat

    loaders = DataLoaders.from_dsets(tensors, tensors, bs=5, device="cpu")
    learner = Learner(loaders, Logits(opened(folder)), loss_func=CrossEntropyLossFlat(), path=tmp_path)
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(1, 1e-3)
        predicted, _ = learner.get_preds()
    assert predicted.shape == (20, 5)
    learner.model.model.save_pretrained(tmp_path / "saved")
    assert opened(tmp_path / "saved").config.id2label[1] == CLASSES[1]


@pytest.mark.client("Ignite", "pytorch-ignite", group="Training")
def test_ignite(folder, tensors):
    pytest.importorskip("ignite", reason="pytorch-ignite is not installed")
    from ignite.engine import create_supervised_evaluator, create_supervised_trainer
    from ignite.metrics import Accuracy

    model = Logits(opened(folder))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(tensors, 5)
    create_supervised_trainer(model, optimizer, torch.nn.functional.cross_entropy).run(loader, max_epochs=1)
    found = create_supervised_evaluator(model, metrics={"accuracy": Accuracy()}).run(loader)
    assert 0 <= found.metrics["accuracy"] <= 1


@pytest.mark.client("skorch", "skorch", group="Training")
def test_skorch(folder, tensors):
    skorch = pytest.importorskip("skorch", reason="skorch is not installed")
    net = skorch.NeuralNetClassifier(
        Logits(opened(folder)), criterion=torch.nn.CrossEntropyLoss, max_epochs=1, batch_size=5, train_split=None
    )
    net.set_params(verbose=0)
    net.fit(*tensors.tensors)
    assert net.predict(tensors.tensors[0]).shape == (20,)


FULLY_SHARDED = """
import sys, torch
from accelerate import Accelerator
from transformers import AutoModelForImageClassification
import effnet_hf
accelerator = Accelerator(cpu=True)
model = AutoModelForImageClassification.from_pretrained(sys.argv[1])
model = accelerator.prepare(model)
optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.01))
pixels, labels = torch.randn(5, 3, 64, 64), torch.arange(5)
for _ in range(2):
    loss = model(pixel_values=pixels, labels=labels).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
state = accelerator.get_state_dict(model)
if accelerator.is_main_process:
    accelerator.unwrap_model(model).save_pretrained(sys.argv[2], state_dict=state)
print(accelerator.distributed_type, loss.item())
accelerator.end_training()
"""


@pytest.mark.client(
    "Accelerate: FSDP 2, two processes",
    "accelerate",
    group="Training",
    limit="sharding saves nothing that matters of networks this small; `effnet-hf train` has DDP only",
)
def test_fsdp(folder, tmp_path):
    (tmp_path / "run.py").write_text(FULLY_SHARDED)
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--use_fsdp", "--fsdp_version", "2"]
    launch += ["--fsdp_auto_wrap_policy", "SIZE_BASED_WRAP", "--mixed_precision", "no", "--main_process_port", "0"]
    run([*launch, tmp_path / "run.py", folder, tmp_path / "saved"], ACCELERATE_USE_CPU="true")
    assert opened(tmp_path / "saved")(torch.randn(1, 3, 64, 64)).logits.shape == (1, 5)


def run(words, **environment):
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    told = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, **environment}
    found = subprocess.run(
        [sys.executable, *map(str, words)], env=os.environ | told, text=True, capture_output=True, timeout=500
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


@pytest.mark.client("Trainer: examples/trainer/trainer.py, push_to_hub", group="Training")
@pytest.mark.parametrize("side", ["ours"], indirect=True)
def test_example_with_trainer(folder, pictures, tmp_path, photo, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests/hub"))
    from loopback_hub import LoopbackHub

    with LoopbackHub() as hub:
        words = [ROOT / "examples/trainer/trainer.py", "--model", folder, "--data_dir", pictures]
        words += ["--output_dir", tmp_path / "run", "--num_train_epochs", "1", "--use_cpu", "true"]
        words += ["--per_device_train_batch_size", "5", "--push_to_hub", "true"]
        words += ["--hub_model_id", "me/mine", "--hub_token", "hf_writer"]
        told = run(
            words,
            HF_ENDPOINT=hub.url,
            HF_HUB_OFFLINE="0",
            HF_HUB_DISABLE_XET="1",
            HF_DATASETS_CACHE=str(tmp_path / "cache"),
        )
        pushed = hub.repos["me/mine"]["branches"]["main"]
    assert "eval_accuracy" in told and {"config.json", "model.safetensors", "preprocessor_config.json"} <= {*pushed}
    assert {answer["label"] for answer in pipeline("image-classification", str(tmp_path / "run"))(photo)} == {*CLASSES}


@pytest.mark.client("Accelerate: examples/trainer/no_trainer.py, two processes", "accelerate", group="Training")
@pytest.mark.parametrize("side", ["ours"], indirect=True)
def test_example_without_trainer(folder, pictures, tmp_path, photo):
    words = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0"]
    words += [ROOT / "examples/trainer/no_trainer.py", "--model", folder, "--data_dir", pictures]
    told = run([*words, "--output_dir", tmp_path / "run", "--epochs", "1", "--batch_size", "5"])
    assert "% of 10" in told
    assert {answer["label"] for answer in pipeline("image-classification", str(tmp_path / "run"))(photo)} == {*CLASSES}


LAUNCHED = """
import sys
from accelerate import {launcher}
from effnet_hf import load_recipe, train
flags = dict(model=sys.argv[1], data_dir=sys.argv[2], epochs=1, global_batch_size=10, num_workers=0, report=False)
flags |= dict(per_device_batch_size=5)
for number in (1, 2):
    {launcher}(train, (load_recipe("finetune", output_dir=f"{{sys.argv[3]}}-{{number}}", **flags),), num_processes=2)
"""


@pytest.mark.client("Accelerate: notebook_launcher and debug_launcher, two processes", "accelerate", group="Training")
@pytest.mark.parametrize("side", ["ours"], indirect=True)
@pytest.mark.parametrize("launcher", ["notebook_launcher", "debug_launcher"])
def test_launched_from_python(launcher, folder, pictures, tmp_path):
    (tmp_path / "run.py").write_text(LAUNCHED.format(launcher=launcher))
    told = run([tmp_path / "run.py", folder, pictures, tmp_path / "run"])
    assert told.count("5 per device x 2 processes") == 2
    assert opened(tmp_path / "run-2").config.id2label[0] == sorted(CLASSES)[0]


NOTEBOOK = [
    "%matplotlib inline\nimport matplotlib, signal, threading\nbackend = matplotlib.get_backend()",
    "from effnet_hf import load_recipe, train, validate_checkpoint",
    "flags = dict(model={model!r}, data_dir={data!r}, epochs=1, global_batch_size=10, num_workers=0, report=False)\n"
    "summary = train(load_recipe('finetune', output_dir={out!r} + '-1', **flags))\nprint(summary['epochs'], 'epoch')",
    "other = train(load_recipe('finetune', output_dir={out!r} + '-2', precision='bf16', **flags))",
    "found = []\n"
    "recipe = load_recipe('finetune', output_dir={out!r} + '-3', **flags)\n"
    "thread = threading.Thread(target=lambda: found.append(train(recipe)))\nthread.start()\nthread.join()\n"
    "assert found[0]['epochs'] == 1",
    "assert matplotlib.get_backend() == backend, matplotlib.get_backend()",
]


@pytest.mark.client("Jupyter kernel", "ipykernel", group="Training")
@pytest.mark.parametrize("side", ["ours"], indirect=True)
def test_notebook(folder, pictures, tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    import nbformat

    places = {"model": str(folder), "data": str(pictures), "out": str(tmp_path / "run")}
    cells = [cell.format(**places) if "{" in cell else cell for cell in NOTEBOOK]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=400, kernel_name="python3").execute()
    assert "1 epoch" in str(notebook.cells[2].outputs)
    assert (tmp_path / "run-3/model.safetensors").is_file()
