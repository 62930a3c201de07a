"""`effnet-hf space`: what its folder holds, what is refused, its upload; tests/interop/test_space.py opens the page."""

import ast
import re
import shutil
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from effnet_hf import EfficientNetNVForImageClassification, EfficientNetNVImageProcessor
from effnet_hf.commands import space as command
from effnet_hf.errors import UserError
from effnet_hf.hub import CardFacts, push_folder, render_card, space, transfer
from effnet_hf.hub.space import write_space
from tests.conftest import tiny_config


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    torch.manual_seed(0)
    config = tiny_config.__wrapped__()(id2label={0: "crane", 1: "cat", 2: "it's"})
    EfficientNetNVForImageClassification(config).save_pretrained(folder)
    EfficientNetNVImageProcessor.for_image_size(32).save_pretrained(folder)
    facts = CardFacts(
        name="Cranes [and] cats", variant="custom", num_labels=3, image_size=32, preprocessing="Resize.",
        license="cc-by-4.0", plots=["plots/curves.png"],
    )  # fmt: skip
    (folder / "README.md").write_text(render_card(facts))
    (folder / "modeling_efficientnet_nv.py").write_text("raise SystemExit('somebody else wrote this')")
    return folder


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "a photo.jpg"
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(path)
    return path


def front_matter(folder) -> dict:
    return yaml.safe_load((folder / "README.md").read_text("utf-8").split("---")[1])


def names(app: str) -> dict:
    """The constants of the app, which must be valid Python."""
    body = ast.parse(app).body
    return {
        node.targets[0].id: node.value.value
        for node in body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }


def test_a_folder_becomes_a_space_of_its_own(model, photo, tmp_path, capsys):
    target = tmp_path / "space"
    command.main([str(model), "--output", str(target), "--examples", str(photo), "--top_k", "7"])
    said = capsys.readouterr().out.splitlines()
    assert said[1:4] == [f"model    copied from {model}", "license  cc-by-4.0", "examples 1"]
    assert (target / "examples/a photo.jpg").read_bytes() == photo.read_bytes()
    head = front_matter(target)
    assert head["sdk"] == "gradio" and head["sdk_version"] == space.GRADIO and head["app_file"] == "app.py"
    assert head["title"] == "Cranes [and] cats" and head["license"] == "cc-by-4.0" and "models" not in head
    assert names((target / "app.py").read_text()) == {"TITLE": "Cranes [and] cats", "TOP_K": 3}
    card = (target / "model_card.md").read_text()
    assert "3 classes" in card and "![" not in card and not card.startswith("---")
    # The code is ours, whatever lay beside the weights.
    assert "class EfficientNetNV" in (target / "model/modeling_efficientnet_nv.py").read_text()
    kept = EfficientNetNVForImageClassification.from_pretrained(target / "model")
    for name, tensor in EfficientNetNVForImageClassification.from_pretrained(model).state_dict().items():
        assert torch.equal(kept.state_dict()[name], tensor), name

    with pytest.raises(UserError, match="already exists and is not empty"):
        write_space(str(model), target)
    write_space(str(model), target, overwrite=True)
    assert not (target / "examples").exists()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds what was not written here, e\.g\. mine.txt"):
        write_space(str(model), target, overwrite=True)


def test_a_repository_is_referred_to(model, tmp_path, monkeypatch):
    notes = write_space(str(model), tmp_path / "one", model_id="me/x", title='"""<b>\nit\'s 🌼')
    assert notes[0] == f"model    loaded from me/x, which must hold what is in {model} when the Space starts"
    assert not (tmp_path / "one/model").exists() and front_matter(tmp_path / "one")["models"] == ["me/x"]
    said = names((tmp_path / "one/app.py").read_text())
    assert said["MODEL"] == "me/x" and said["TITLE"] == '"""<b>\\nit\'s 🌼'
    with pytest.raises(UserError, match="--hub_model_id me x is no repository of the Hub"):
        write_space(str(model), tmp_path / "two", model_id="me x")

    opened = space.open_checkpoint(str(model))
    monkeypatch.setattr(space, "open_checkpoint", lambda *_: opened)
    monkeypatch.setattr(space, "download", lambda *_, **__: model)
    assert write_space("me/y", tmp_path / "two")[0] == "model    loaded from me/y when the Space starts"
    monkeypatch.setattr(space, "download", lambda *_, **__: tmp_path)
    with pytest.raises(UserError, match="holds no modeling_efficientnet_nv.py"):
        write_space("me/y", tmp_path / "three")
    assert not (tmp_path / "three").exists()


def test_what_is_refused_leaves_nothing(model, photo, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.jpg").write_bytes(photo.read_bytes()[:200])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / photo.name).write_bytes(photo.read_bytes())
    Image.new("RGB", (8, 8)).save(tmp_path / "scan.tif")
    (tmp_path / "many").mkdir()
    for number in range(25):
        (tmp_path / f"many/{number}.jpg").write_bytes(photo.read_bytes())
    monkeypatch.setattr(space, "LARGEST", 5_000_000)
    (tmp_path / "large.bmp").write_bytes(bytes(6_000_000))
    for examples, words in (
        (["none.jpg"], "there is no such image"),
        (["empty"], "holds no images"),
        (["torn.jpg"], "torn.jpg "),
        (["scan.tif"], "browsers do not show such a file"),
        (["many"], "names 25 images; a page has room for 24"),
        (["large.bmp"], "has more than 5 MB"),
        ([photo.name, f"other/{photo.name}"], "another example has this name"),
    ):
        with pytest.raises(UserError, match=re.escape(words)) as told:
            write_space(str(model), tmp_path / "space", examples=[tmp_path / each for each in examples])
        assert "\n" not in str(told.value) and not (tmp_path / "space").exists()


@pytest.mark.parametrize(
    "words, told",
    [
        ([], "name one model"),
        (["a", "--model", "b"], "name one model"),
        (["a", "--push_to_hub"], "--push_to_hub needs --hub_space_id"),
        (["a", "--hub_space_id", "me/y"], "--hub_space_id does nothing without --push_to_hub"),
        (["a", "--hub_private"], "--hub_private does nothing without --push_to_hub"),
        (["a", "--hub_token", "hf_x"], "--hub_token does nothing without --push_to_hub"),
        (["a", "--title", " \t"], "--title is empty"),
    ],
)
def test_flags_that_mean_nothing(words, told, tmp_path):
    with pytest.raises(UserError, match=told):
        command.main([*words, "--output_dir", str(tmp_path / "space")])


NO_CLASSES, INT8 = {"num_labels": 0}, {"quantization": {}}


@pytest.mark.parametrize("change, told", [(NO_CLASSES, "has no classifier"), (INT8, "is quantized")])
def test_only_float_classifiers(change, told, model, tmp_path, monkeypatch):
    opened = space.open_checkpoint(str(model))
    for name, value in change.items():
        setattr(opened.config, name, value)
    monkeypatch.setattr(space, "open_checkpoint", lambda *_: opened)
    with pytest.raises(UserError, match=told):
        write_space(str(model), tmp_path / "space")


@pytest.mark.parametrize("by", ["EXIF", "XMP"])
def test_a_place_in_a_picture_is_said_and_not_pushed(by, model, photo, tmp_path):
    exif, xmp = Image.Exif(), None
    if by == "EXIF":
        exif.get_ifd(0x8825)[1] = "N"
    else:
        xmp = b"<x:xmpmeta exif:GPSLatitude='1,2N'/>"
    Image.open(photo).save(photo, exif=exif, xmp=xmp)
    words = [str(model), "--output_dir", str(tmp_path / "pushed"), "--examples", str(photo)]
    with pytest.raises(UserError, match="--push_to_hub: a photo.jpg says .* where it was taken"):
        command.main([*words, "--push_to_hub", "--hub_space_id", "me/y"])
    assert not (tmp_path / "pushed").exists()
    assert (
        "WARNING: the EXIF or XMP of a photo.jpg says where it was taken"
        in write_space(str(model), tmp_path / "space", model_id="me/x", examples=[photo])[-1]
    )


def test_an_edited_page_is_not_overwritten(model, tmp_path):
    target = tmp_path / "space"
    write_space(str(model), target, model_id="me/x")
    (target / "app.py").write_text("print('mine')")
    with pytest.raises(UserError, match=r"e\.g\. app.py, and overwriting would remove it"):
        write_space(str(model), target, model_id="me/x", overwrite=True)
    assert (target / "app.py").read_text() == "print('mine')"


@pytest.mark.parametrize("card", ["---\na: [\n---\n", "---\n- 1\n---\n"])
def test_a_card_that_is_none_is_one_sentence(card, model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model/README.md").write_text(card)
    with pytest.raises(UserError, match=r"README.md is no model card: [^\n]*$"):
        write_space(str(tmp_path / "model"), tmp_path / "space", model_id="me/x")


def test_upload_asks_for_a_space(model, tmp_path, monkeypatch):
    asked = []

    class Api:
        def __init__(self, token):
            assert token == "hf_x"

        def __getattr__(self, name):
            def answer(*arguments, **options):
                asked.append((name, options.get("repo_type"), options.get("space_sdk")))
                assert ("model/*" in options.get("delete_patterns", ())) is (name == "upload_folder")
                if name == "upload_folder":
                    raise OSError("the network is gone")
                return type("Answer", (), {"repo_id": "me/y", "private": True})

            return answer

    monkeypatch.setattr(transfer, "HfApi", Api)
    with pytest.raises(UserError, match="hf upload me/y .* --private --delete .*model_card.md --repo-type space$"):
        push_folder(tmp_path, "me/y", private=True, token="hf_x", space_sdk="gradio")
    assert asked == [("create_repo", "space", "gradio"), ("repo_info", "space", None), ("upload_folder", "space", None)]
    assert "gradio" not in sys.modules
