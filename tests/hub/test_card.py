import dataclasses
import re

import pytest
from huggingface_hub import ModelCard

from effnet_hf import EfficientNetNVImageProcessor
from effnet_hf.hub import CardFacts, describe_preprocessing, render_card, software_versions


MINIMAL = CardFacts(name="Net", variant="b4", num_labels=1000, image_size=380, preprocessing="As is.")
FULL = CardFacts(
    name="EfficientNet B0 on Imagenette",
    variant="b0",
    num_labels=10,
    image_size=224,
    preprocessing="Resize.",
    model_id="me/x",
    base_model="timm/efficientnet_b0.ra_in1k",
    dataset="Imagenette subset",
    dataset_id="frgfm/imagenette",
    n_eval=1000,
    metrics={"top1": 95.1, "top5": 99.8, "loss": float("nan"), "top3": 98},
    recipe={"lr": 1e-3, "betas": (1, 2), "data": {"path": None}},
    command="python train.py --config b0",
    hardware="2 CPU cores",
    versions={"torch": "2.6"},
    notes=["Warm-started."],
    limits=["Ten classes only."],
    tables=[("INT8", ["precision", "ms"], [["fp32", 12.3456], ["a|b", 3]])],
    plots=["curves.png"],
    onnx_files=["model.onnx"],
    tags=["b0", "mine"],
)


def test_metadata_is_what_the_hub_reads():
    data = ModelCard(render_card(FULL)).data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "apache-2.0",
        "transformers",
        "image-classification",
    )
    assert (data.datasets, data.metrics) == (["frgfm/imagenette"], ["accuracy"])
    assert data.base_model == "timm/efficientnet_b0.ra_in1k"
    assert data.tags == ["image-classification", "efficientnet", "b0", "mine"]
    found = [(result.metric_name, result.metric_type, result.metric_value) for result in data.eval_results]
    assert found == [  # a loss that is not a number is no YAML number
        ("Top-1 accuracy (%)", "accuracy", 95.1),
        ("Top-5 accuracy (%)", "accuracy", 99.8),
        ("top3", "top3", 98.0),
    ]
    assert {result.dataset_name for result in data.eval_results} == {"Imagenette subset"}


@pytest.mark.parametrize("name", ["s3://bucket/set", "https://host/set", "/home/me/set", "runs/b0", "two words"])
def test_metadata_names_no_folder_and_no_address(name, tmp_path, monkeypatch):
    (tmp_path / "runs/b0").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    data = ModelCard(render_card(dataclasses.replace(FULL, dataset_id=name, base_model=name))).data
    assert data.datasets is None and data.base_model is None
    assert {result.dataset_type for result in data.eval_results} == {"imagefolder"}


def test_body_shows_every_fact():
    card = render_card(FULL)
    for text in (
        "# EfficientNet B0 on Imagenette\n\n> Warm-started.\n",
        'pipeline("image-classification", "me/x", trust_remote_code=True)',
        'InferenceSession("model.onnx")',
        "Preprocessing: Resize.",
        "Imagenette subset, 1000 images",
        "| Top-1 accuracy (%) | 95.1 |",
        "| Cross-entropy loss | nan |",
        "![curves.png](curves.png)",
        "### INT8\n\n| precision | ms |\n|---|---|\n| fp32 | 12.35 |\n| a\\|b | 3 |",
        "python train.py --config b0",
        "Hardware: 2 CPU cores.",
        "Software: torch 2.6.",
        "lr: 0.001\nbetas:\n- 1\n- 2\ndata:\n  path: null\n```",
        "- Ten classes only.\n",
    ):
        assert text in card, text


def test_absent_facts_leave_no_trace():
    card = render_card(MINIMAL)
    data = ModelCard(card).data
    assert data.eval_results is None and data.metrics is None and data.base_model is None and data.datasets is None
    assert "No accuracy was measured" in card
    for text in ("ONNX", "How it was made", "Hardware", "Software", "None", "{{", "{%", "\n\n\n"):
        assert text not in card
    assert "\n\n\n" not in render_card(FULL)


def test_metadata_takes_only_repository_ids_as_base_model():
    card = render_card(dataclasses.replace(MINIMAL, base_model="an NGC file"))
    assert "weights from an NGC file" in card and ModelCard(card).data.base_model is None


def test_metrics_need_a_dataset():
    with pytest.raises(ValueError, match="must name the dataset"):
        dataclasses.replace(MINIMAL, metrics={"top1": 1.0})


def test_recipe_of_any_objects_is_printed(tmp_path):
    assert f"path: {tmp_path}" in render_card(dataclasses.replace(MINIMAL, recipe={"path": tmp_path}))


def test_preprocessing_in_words():
    processor = EfficientNetNVImageProcessor.for_image_size(224)
    assert describe_preprocessing(processor) == (
        "Resize the short side to 256 pixels (bicubic), centre crop 224 x 224, scale to [0, 1], subtract the mean "
        "(0.485, 0.456, 0.406), divide by the standard deviation (0.229, 0.224, 0.225)."
    )
    bare = EfficientNetNVImageProcessor(do_resize=False, do_center_crop=False, rescale_factor=0.5, do_normalize=False)
    assert describe_preprocessing(bare) == "Rescale by 0.5."
    deep = describe_preprocessing(EfficientNetNVImageProcessor.for_image_size(224, bit_depth=12))
    assert deep.startswith("Scale images of more than 8 bits, whose values have 12, to 8, resize the short side")


def test_versions_leave_out_what_is_not_installed():
    versions = software_versions("pillow", "no-such-package")
    assert {"python", "torch", "transformers", "pillow"} <= set(versions) and "no-such-package" not in versions


EVIL = "a\x1b[2J [x](http://evil) <img src=x> `id`\n\n# Title\n```\n{{ facts }} {% raw %} 例"


def test_words_of_others_stay_words():
    """No link, no HTML, no heading, no end of a code block, no escape for a terminal, and nothing for the template."""
    facts = dataclasses.replace(
        FULL,
        name=EVIL,
        dataset=EVIL,
        base_model=EVIL,
        hardware=EVIL,
        command=EVIL,
        notes=[EVIL],
        limits=[EVIL],
        recipe={"data_dir": EVIL, "float_layers": [EVIL]},
        tables=[(EVIL, [EVIL, "ms"], [[EVIL, 1]])],
    )
    card = render_card(facts)
    plain = render_card(FULL)
    assert "\x1b" not in card and "{{ facts }}" in card and "例" in card
    assert card.count("\n# ") == plain.count("\n# ") and card.count("\n```") == plain.count("\n```")
    text = card.split("## How it was made")[0].split("---", 2)[2] + card.split("## Limits")[1]
    assert "](http" not in text.replace(r"\]", "") and "<img" not in text.replace(r"\<", "")
    assert ModelCard(card).data.tags == ModelCard(plain).data.tags


@pytest.mark.parametrize("depth", [None, 12])
@pytest.mark.parametrize("several", [False, True])
def test_every_block_of_code_is_python(depth, several):
    card = render_card(dataclasses.replace(FULL, bit_depth=depth, multi_label=several))
    blocks = re.findall("```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 3 and all(compile(block, "card", "exec") for block in blocks)
    assert blocks[0].startswith(
        "from PIL import Image\nfrom tr" if depth else "from transformers import pipeline\n\nclas"
    )
    assert ('classify(to_rgb(Image.open("cat.jpg"), bit_depth=12)' in card) == bool(depth)
    assert "clips images of more than 8 bits" in card and "\n\n\n" not in card


def test_several_labels_are_told_by_their_own_figures_and_a_sigmoid():
    facts = {"name": "x", "variant": "b0", "num_labels": 3, "image_size": 32, "preprocessing": "none", "dataset": "d"}
    card = render_card(CardFacts(**facts, multi_label=True, metrics={"map": 81.5, "f1": 70.25, "loss": 0.125}))
    for words in ("logits.sigmoid()", "| Mean average precision (%) | 81.5 |", "| Binary cross-entropy loss | 0.125 |"):
        assert words in card
    assert "softmax" not in card and "metrics:\n- map" in card
