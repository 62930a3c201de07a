"""Every command prepares images as a checkpoint's processor says, or refuses in a line; docs/data.md has the table.

The probe is the loss (or the probabilities) of one network on images of odd sizes: wrong pixels give another.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from effnet_hf import EfficientNetNVForImageClassification, EfficientNetNVImageProcessor
from effnet_hf.commands.classify import main as classify
from effnet_hf.commands.export import main as export
from effnet_hf.commands.scan import main as scan
from effnet_hf.commands.validate import main as validate
from effnet_hf.errors import UserError
from effnet_hf.export import ONNXEfficientNet, export_model
from effnet_hf.inference import Classifier
from effnet_hf.tables import markdown_table
from effnet_hf.training import train, validate_checkpoint

from .conftest import forget_accelerator
from .training.conftest import cheap_runs  # noqa: F401
from .training.workbench import quantized_recipe, read_rows, small_recipe


PAGE = Path(__file__).parents[1] / "docs/data.md"
SETTINGS = {
    "the published evaluation": {},
    "`resample`: Lanczos": {"resample": Image.LANCZOS},
    "`resample`: nearest": {"resample": Image.NEAREST},
    "`do_resize` false": {"do_resize": False},
    "`crop_size` not square": {"crop_size": {"height": 32, "width": 48}},
    "`crop_size` larger than the resized image": {"size": 24},
    "`do_rescale` false": {"do_rescale": False, "image_mean": 120.0, "image_std": 60.0},
    "another `rescale_factor`": {"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0},
    "`do_normalize` false": {"do_normalize": False},
    "`bit_depth` 12, of images of 12 bits in 16": {"bit_depth": 12},
    "`do_center_crop` false": {"do_center_crop": False},
}
STILL = {
    "learning_rate": 0.0,
    "batch_norm_momentum": 0.0,
    "ema_decay": 0.0,
    "mixup": 0.0,
    "epochs": 1,
    "warmup_epochs": 0,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """DIR/{train,val}/{a,b}/N.png: noise of many sizes, different in both halves."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split in ("train", "val"):
        for label in "ab":
            folder = root / split / label
            folder.mkdir(parents=True)
            for number, (height, width) in enumerate([(40, 61), (57, 44), (90, 41), (48, 48)]):
                pixels = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((width, height), Image.BICUBIC).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def deep_images(images, tmp_path_factory):
    """The same in grey, 12 bits of 16."""
    root = tmp_path_factory.mktemp("deep")
    for path in images.rglob("*.png"):
        deep = root / path.relative_to(images)
        deep.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(Image.open(path).convert("L"), np.uint16) * 16).save(deep)
    return root


@pytest.fixture(scope="module")
def network(request):
    from .conftest import tiny_config

    torch.manual_seed(0)
    config = tiny_config.__wrapped__()(id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}, survival_prob=1.0)
    model = EfficientNetNVForImageClassification(config).eval()
    with torch.no_grad():
        model.classifier.weight.mul_(20)  # so that other pixels are seen in the loss
    return model


def expected(network, processor, images) -> tuple[float, list[list[float]]]:
    """Loss over the validation images, and their probabilities, from the processor itself."""
    losses, probabilities = [], []
    for label, name in enumerate("ab"):
        for path in sorted((images / "val" / name).iterdir()):
            pixels = processor(Image.open(path), return_tensors="pt")["pixel_values"].float()
            with torch.inference_mode():
                logits = network(pixels).logits
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor([label])).item())
            probabilities.append(logits.softmax(-1)[0].tolist())
    return float(np.mean(losses)), probabilities


def by_label(predictions: list[dict]) -> list[float]:
    found = {entry["label"]: entry["score"] for entry in predictions}
    return [found["a"], found["b"]]


# Each gives a loss or probabilities, from the checkpoint `model` and the folder `images`, writing below `scratch`.


def by_train(model, images, scratch):
    recipe = small_recipe(images, scratch, model=model, image_size=None, resize_margin=None, **STILL)
    assert train(recipe.replace(global_batch_size=4, per_device_batch_size=4)) == 0
    return read_rows(scratch, "val")[-1]["val.loss"]


def by_validate(model, images, scratch):
    return validate_checkpoint(model, str(images), num_workers=0, per_device_batch_size=3, top_k=2)["loss"]


def by_classify(model, images, scratch):
    paths = sorted((images / "val").rglob("*.png"))
    return [by_label(found.predictions) for found in Classifier(model, device="cpu")(paths, batch_size=3)]


def by_pipeline(model, images, scratch):
    run = pipeline("image-classification", model=model, device="cpu")
    return [by_label(run(str(path))) for path in sorted((images / "val").rglob("*.png"))]


def by_qat(model, images, scratch):
    from effnet_hf.quantization import Quantization

    settings = {**STILL, "epochs": 0, "global_batch_size": 4}
    recipe = quantized_recipe(images, scratch, model, image_size=None, resize_margin=None, **settings)
    assert train(recipe, Quantization(recipe)) == 0
    return json.loads((scratch / "quantization.json").read_text())["float"]["loss"]


def by_export(model, images, scratch):
    export_model(model, scratch / "onnx", data_dir=str(images), num_images=2)
    opened = ONNXEfficientNet.from_pretrained(scratch / "onnx")
    facts = opened.metadata
    assert facts["resample"] == Image.Resampling(opened.processor.resample).name.lower()
    return [by_label(opened.classify(Image.open(path))) for path in sorted((images / "val").rglob("*.png"))]


def by_preprocessing_inside(model, images, scratch):
    export_model(model, scratch / "whole", with_preprocessing=True, num_images=2)
    opened = ONNXEfficientNet.from_pretrained(scratch / "whole")
    return [by_label(opened.classify(Image.open(path))) for path in sorted((images / "val").rglob("*.png"))]


COMMANDS = {
    "train": by_train,
    "validate": by_validate,
    "classify": by_classify,
    "`pipeline`": by_pipeline,
    "qat": by_qat,
    "export": by_export,
    "export `--with_preprocessing`": by_preprocessing_inside,
}


def drawn() -> dict[tuple[str, str], str]:
    """The table of docs/data.md: (setting, command) to what happens."""
    table = PAGE.read_text("utf-8").split("<!-- preparation -->\n")[1].split("\n<!-- /preparation -->")[0]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    return {(row[0], command): cell for row in rows for command, cell in zip(header[1:], row[1:])}


def test_the_table_has_every_pair():
    header = ["in preprocessor_config.json", *COMMANDS]
    cells = drawn()
    rows = [[setting, *(cells.get((setting, command), "?") for command in COMMANDS)] for setting in SETTINGS]
    assert markdown_table(header, rows) in PAGE.read_text("utf-8")
    assert "?" not in cells.values()


@pytest.mark.parametrize("setting", SETTINGS)
def test_same_pixels_or_a_refusal(setting, network, images, deep_images, tmp_path):
    images = deep_images if "bit_depth" in SETTINGS[setting] else images
    processor = EfficientNetNVImageProcessor(**{"size": 40, "crop_size": 32, **SETTINGS[setting]})
    model = tmp_path / "model"
    network.save_pretrained(model)
    processor.save_pretrained(model)
    loss, probabilities = expected(network, processor, images)
    cells, found = drawn(), {}
    for command, run in COMMANDS.items():
        forget_accelerator()
        try:
            figure = run(str(model), images, tmp_path / command.strip("`"))
        except UserError as error:
            found[command] = "refused"
            assert any(word in str(error) for word in ("do_center_crop", "bilinear", "resample")), error
            continue
        tolerance = 2e-2 if "preprocessing" in command else 1e-4  # its own resizing, see export/check.py
        wanted = loss if isinstance(figure, float) else probabilities
        if cells[setting, command] == "other pixels":
            found[command] = "same pixels" if np.allclose(figure, wanted, atol=10 * tolerance) else "other pixels"
            continue
        found[command] = "same pixels"
        np.testing.assert_allclose(figure, wanted, atol=tolerance, err_msg=command)
    assert found == {command: cells[setting, command] for command in COMMANDS}


def test_a_depth_is_saved_by_training_and_another_is_said(network, deep_images, tmp_path, capsys):
    network.save_pretrained(tmp_path / "model")
    EfficientNetNVImageProcessor(size=40, crop_size=32).save_pretrained(tmp_path / "model")
    start = {"model": str(tmp_path / "model"), "image_size": None, "resize_margin": None}
    recipe = small_recipe(deep_images, tmp_path / "run", **start, **STILL, bit_depth=12)
    assert train(recipe.replace(global_batch_size=4, per_device_batch_size=4)) == 0
    saved = tmp_path / "run/best"
    saved = saved if saved.is_dir() else tmp_path / "run"
    assert json.loads((saved / "preprocessor_config.json").read_text())["bit_depth"] == 12
    assert 'classify(to_rgb(Image.open("cat.jpg"), bit_depth=12), top_k=5)' in (saved / "README.md").read_text()
    loss = expected(network, EfficientNetNVImageProcessor(size=40, crop_size=32, bit_depth=12), deep_images)[0]
    assert by_validate(str(saved), deep_images, None) == pytest.approx(loss, abs=1e-4)
    said = []
    validate_checkpoint(
        str(saved), str(deep_images), num_workers=0, per_device_batch_size=3, top_k=2, bit_depth=14, tell=said.append
    )
    assert "deep images are read with --bit_depth 14, and the checkpoint was trained with 12" in said
    image = str(next((deep_images / "val/a").iterdir()))
    capsys.readouterr()
    assert classify([image, "--model", str(saved), "--bit_depth", "14", "--device", "cpu"]) == 0
    assert "--bit_depth 14, and the checkpoint was trained with 12" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "validate", "classify", "scan", "export"])
def test_one_limit_of_pixels(command, network, images, tmp_path, capsys):
    """All images have more than a thousand pixels: none is read, wherever."""
    network.save_pretrained(tmp_path / "model")
    EfficientNetNVImageProcessor(size=40, crop_size=32).save_pretrained(tmp_path / "model")
    model, data = ["--model", str(tmp_path / "model")], ["--data_dir", str(images)]
    limit, sentence = ["--max_pixels", "1000"], "pixels, and --max_pixels is 1,000"
    if command in ("classify", "scan"):
        words = [*map(str, (images / "val").rglob("*.png")), *model] if command == "classify" else [str(images)]
        assert {"classify": classify, "scan": scan}[command]([*words, *limit]) != 0
        out, err = capsys.readouterr()
        assert (out + err).count(sentence) >= 8
        return
    with pytest.raises(UserError, match=sentence):
        if command == "train":
            train(small_recipe(images, tmp_path / "run", max_pixels=1000, global_batch_size=4, per_device_batch_size=4))
        else:
            {"validate": validate, "export": export}[command](
                [*model, *data, *limit, *(["--output_dir", str(tmp_path / "onnx")] if command == "export" else [])]
            )
