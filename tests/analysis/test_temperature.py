"""`validate --calibrate`: the temperature is found, stored, and carried by every way of using the network."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import pipeline

from effnet_hf import EfficientNetNVConfig, EfficientNetNVForImageClassification, manifest
from effnet_hf.analysis import store_temperature
from effnet_hf.checkpoint import open_checkpoint
from effnet_hf.commands import validate
from effnet_hf.conversion import load_foreign, write_foreign
from effnet_hf.errors import UserError
from effnet_hf.export.network import ExportedNetwork
from effnet_hf.export.options import ExportOptions
from effnet_hf.files import lock_beside
from effnet_hf.lock import held
from effnet_hf.recipes import Recipe
from effnet_hf.run_folder import MARK, RunFolder
from effnet_hf.training import evaluation, open_start

from ..data.probe import SIDE, WORDS, digits, held_out, write_probe


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The digits that the probe was not trained on: it takes a few of them for others."""
    folder = tmp_path_factory.mktemp("data")
    for digit, numbers in held_out(36).items():
        (folder / "val" / WORDS[digit]).mkdir(parents=True)
        for number in numbers:
            digits()[0][number].save(folder / "val" / WORDS[digit] / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    folder = write_probe(tmp_path_factory.mktemp("probe") / "probe")
    manifest.write_manifest(folder)
    return folder


@pytest.fixture
def model(probe, tmp_path):
    return shutil.copytree(probe, tmp_path / "model")


def run(capsys, *arguments):
    validate.main([*map(str, arguments), "--num_workers", "0"])
    return capsys.readouterr().out


def with_temperature(folder, temperature):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"softmax_temperature": temperature}))
    (folder / "manifest.json").unlink(missing_ok=True)
    return folder


def test_temperature_is_stored_and_found_again(capsys, model, data):
    flags = "--model", model, "--data_dir", data, "--calibrate", "--json"
    first, second = (json.loads(run(capsys, *flags)) for _ in range(2))
    found = first["calibration"]["temperature"]
    assert found != 1 and EfficientNetNVConfig.from_pretrained(model).softmax_temperature == found
    assert second["calibration"]["temperature"] == second["calibration"]["temperature_before"] == found
    assert second["ece"] == pytest.approx(first["calibration"]["ece"], abs=1e-5)
    assert second["loss"] == pytest.approx(first["calibration"]["nll"], abs=1e-5) and second["loss"] < first["loss"]
    assert second["top1"] == first["top1"] and second["macro_recall"] == first["macro_recall"]
    assert first["calibration"]["written"] == ["config.json"] and first["weighted_f1"] > 90
    assert manifest.problem(model) is None
    lines = run(capsys, "--model", model, "--data_dir", data, "--calibrate")
    assert f"temperature {found:g} -> {found:g}, stored in config.json" in lines and "which it was fitted on" in lines

    image = digits()[0][0].convert("RGB")
    network, processor = (
        EfficientNetNVForImageClassification.from_pretrained(model).eval(),
        open_checkpoint(model).processor,
    )
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    answers = pipeline("image-classification", model=str(model), top_k=10)(image)
    with torch.no_grad():
        network.config.softmax_temperature = None
        expected = (network(pixels).logits / found).softmax(-1)[0]
    by_name = {each["label"]: each["score"] for each in answers}
    assert [by_name[network.config.id2label[i]] for i in range(10)] == pytest.approx(expected.tolist(), abs=1e-6)


def test_evaluation_divides_and_training_does_not(model):
    network = EfficientNetNVForImageClassification.from_pretrained(model)
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = {mode: network.train(mode)(pixels).logits for mode in (False, True)}  # the second moves batch norm
        network.load_state_dict(load_file(model / "model.safetensors"))
        network.config.softmax_temperature = 4.0
        assert torch.equal(network.eval()(pixels).logits, plain[False] / 4)
        assert torch.equal(network.train()(pixels).logits, plain[True])


@pytest.mark.parametrize("wrong", [0, -1.0, "2", True, float("nan"), float("inf")])
def test_temperature_is_a_positive_number(wrong):
    with pytest.raises(ValueError, match="softmax_temperature must be a number in"):
        EfficientNetNVConfig(num_labels=2, softmax_temperature=wrong)


def test_temperature_is_for_one_label_and_these_classes():
    with pytest.raises(ValueError, match="softmax_temperature needs one label per image"):
        EfficientNetNVConfig(num_labels=2, softmax_temperature=2.0, problem_type="multi_label_classification")
    config = EfficientNetNVConfig(num_labels=2, softmax_temperature=2.0).to_dict()
    assert EfficientNetNVConfig.from_dict(config).softmax_temperature == 2
    assert EfficientNetNVConfig.from_dict(config, num_labels=3).softmax_temperature is None


def test_training_starts_without_and_says_so(model, tmp_path):
    recipe = Recipe(model=str(with_temperature(model, 2.5)), distillation_weight=0.5, output_dir=str(tmp_path / "run"))
    start = open_start(recipe)
    assert start.config.softmax_temperature is None and start.checkpoint.load().config.softmax_temperature is None
    assert start.teacher.load().config.softmax_temperature is None
    assert len(start.notes) == 1 and "2.5, its temperature; not here" in start.notes[0]


def test_exports_carry_it(model):
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    before = open_checkpoint(str(model)).load()
    network = open_checkpoint(str(with_temperature(model, 2.0))).load()
    program = torch.export.export(ExportedNetwork(network, ExportOptions()), (pixels,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(pixels), before(pixels).logits / 2, atol=1e-4, rtol=1e-4)
        shares = ExportedNetwork(network, ExportOptions(with_softmax=True))(pixels)
        torch.testing.assert_close(shares, (before(pixels).logits / 2).softmax(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["out.safetensors", "folder"])
def test_other_projects_get_it_within_the_classifier(model, tmp_path, name):
    before = open_checkpoint(str(model)).load()
    converted = load_foreign(str(with_temperature(model, 2.0)))
    write_foreign(converted, "timm", tmp_path / name, force=True)
    file = tmp_path / name if name.endswith(".safetensors") else tmp_path / name / "model.safetensors"
    state = load_file(file)
    assert torch.equal(state["classifier.weight"], before.classifier.weight.detach() / 2)
    assert torch.equal(state["classifier.bias"], before.classifier.bias.detach() / 2)
    back = load_foreign(str(file))
    assert back.config.softmax_temperature is None
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(back.model()(pixels).logits, before(pixels).logits / 2)


def test_code_of_another_version_is_replaced_where_it_is_as_it_was_written(capsys, model, data):
    code = model / "modeling_efficientnet_nv.py"
    ours = code.read_text()
    code.write_text("# of an earlier version\n" + ours)
    with pytest.raises(UserError, match="of another version, or an edited one"):
        run(capsys, "--model", model, "--data_dir", data, "--calibrate")
    manifest.write_manifest(model)
    assert "temperature 1 -> " in run(capsys, "--model", model, "--data_dir", data, "--calibrate")
    assert code.read_text() == ours and manifest.problem(model) is None


def test_what_cannot_be_calibrated_is_one_sentence(capsys, model, data, tmp_path):
    def refused(*flags):
        with pytest.raises(UserError) as error:
            run(capsys, "--data_dir", data, *flags)
        assert (model / "config.json").read_bytes() == before
        return str(error.value)

    before = (model / "config.json").read_bytes()
    assert "leave out --restrict_classes" in refused("--model", model, "--calibrate", "--restrict_classes")
    right = tmp_path / "right" / "val" / "zero"
    shutil.copytree(data / "val" / "zero", right)
    assert "the answers to these 36 images are all right" in refused(
        "--model", model, "--calibrate", "--data_dir", right.parent.parent
    )
    before = with_temperature(model, None).joinpath("config.json").read_bytes()
    config = json.loads(before) | {"problem_type": "multi_label_classification"}
    before = json.dumps(config).encode()
    (model / "config.json").write_bytes(before)
    assert "has several labels per image" in refused("--model", model, "--calibrate")


def test_model_of_the_hub_is_downloaded_first(model):
    from effnet_hf.analysis import require_storable
    from effnet_hf.checkpoint import Checkpoint

    with pytest.raises(UserError, match="hf download me/effnet --local-dir DIR"):
        require_storable(Checkpoint("me/effnet", "--model", EfficientNetNVConfig.from_pretrained(model)))


def test_report_of_a_validation(capsys, model, data, tmp_path):
    folder = tmp_path / "report"
    shown = run(capsys, "--model", model, "--data_dir", data, "--report", folder)
    assert f"report {folder}/report.html" in shown and "over classes: recall" in shown
    figures = json.loads((folder / "figures.json").read_text())
    top1 = float(shown.split("top1 ")[1].split()[0])
    assert round(100 * figures["accuracy"]["value"], 2) == top1 and figures["n"] == len(list(data.rglob("*.png")))
    run(capsys, "--model", model, "--data_dir", data, "--report", folder)  # a report replaces a report
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="is not empty and no report"):
        run(capsys, "--model", model, "--data_dir", data, "--report", other)
    assert (other / "thesis.txt").read_text() == "years"
    assert figures["calibration"]["fitted"] is not None


def no_report(folder, *more):
    """An earlier report, and what somebody added."""
    folder.mkdir(parents=True)
    for name in ("report.html", "figures.json"):
        (folder / name).write_text("old")
    manifest.write_manifest(folder)
    for name in more:
        (folder / name).write_text("mine")
    return folder


@pytest.mark.parametrize(
    "place, said",
    [
        (lambda base, model: no_report(base / "old", "mine.txt"), "holds what was not written here, e.g. mine.txt"),
        (lambda base, model: no_report(base / "old", "report.html"), "not written here, e.g. report.html"),
        (lambda base, model: model, "holds --model .*, which overwriting would remove"),
        (lambda base, model: base / "run" / "report", "is a part of the run in "),
        (lambda base, model: "/proc/x", "cannot write /proc/x"),
        (lambda base, model: base / "file" / "x", "file is a file"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_report_without_a_place_is_refused_before_anything_is_measured(
    model, tmp_path, monkeypatch, place, said, overwrite
):
    monkeypatch.setattr(evaluation, "build_loaders", None)
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / MARK).touch()
    folder = place(tmp_path, model)
    before = {path: path.is_dir() or path.read_bytes() for path in tmp_path.rglob("*")}
    if folder == model and not overwrite:
        said = "is not empty and no report"
    with pytest.raises(UserError, match=said):
        evaluation.validate_checkpoint(str(model), str(tmp_path), report=str(folder), overwrite=overwrite)
    assert {path: path.is_dir() or path.read_bytes() for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("flag", ["restrict_classes", "test_time_flip"])
def test_no_temperature_is_advised_that_cannot_be_stored(model, data, tmp_path, monkeypatch, flag):
    written = {}
    monkeypatch.setattr(
        evaluation, "write_report", lambda *_, **options: written.update(options) or {"page": "report.html"}
    )
    evaluation.validate_checkpoint(
        str(model), str(data), report=str(tmp_path / "report"), num_workers=0, tell=str, **{flag: True}
    )
    found = written["figures"].calibration
    assert (found.fitted, found.after, found.ece_held_out) == (None, None, None) and found.now.ece > 0
    assert f"(--{flag})" in written["facts"]["answers"] and f"(--{flag})" in found.none_as


@pytest.mark.parametrize("of_a_run", [False, True])
def test_a_folder_that_is_being_written_gets_none(model, of_a_run):
    if of_a_run:
        (model / MARK).write_text('{"effnet_hf": 1, "made": [], "pending": {}}')
    before = (model / "config.json").read_text()
    lock = RunFolder(model).lock if of_a_run else lock_beside(model)
    with held(lock, str(model)), pytest.raises(UserError, match="in use by another process"):
        store_temperature(open_checkpoint(str(model)), 2.0)
    assert (model / "config.json").read_text() == before


def test_class_that_is_never_found_is_named(capsys, model, tmp_path):
    (tmp_path / "data" / "val" / "zero").mkdir(parents=True)
    (tmp_path / "data" / "val" / "one").mkdir()
    right = held_out(4)[0]
    for number in right:
        digits()[0][number].save(tmp_path / "data" / "val" / "zero" / f"{number}.png")
    digits()[0][right[0]].save(tmp_path / "data" / "val" / "one" / "a.png")
    shown = run(capsys, "--model", model, "--data_dir", tmp_path / "data")
    assert "top1 80.00 %" in shown and "recall 50.00 %" in shown and "never found: one" in shown
    assert np.isfinite(float(shown.split("calibration error ")[1].split()[0]))


def test_class_that_is_never_found_is_named_in_words(capsys):
    figures = {"top1": 50.0, "classes": 2, "loss": 1.0, "macro_recall": 50.0, "macro_f1": 50.0, "ece": 0.5}
    figures |= {"n": 2, "total_ips": 1.0, "classes_of_the_checkpoint": 2, "classes_of_the_data": 2}
    for never, said in (
        (["n03888257", "cat"], "n03888257 parachute, cat"),
        (["tench, Tinca tinca", "cat"], "tench, Tinca tinca; cat"),
    ):
        validate.show(figures | {"never_found": never}, top_k=5)
        assert f"never found: {said}\n" in capsys.readouterr().out


@pytest.mark.parametrize(("held_out", "warns"), [(0.03, False), (0.2, True), (None, False)])
def test_temperature_that_other_images_are_no_better_with_is_said(capsys, held_out, warns):
    found = {"temperature": 2.0, "temperature_before": 1.0, "ece": 0.01, "ece_before": 0.04, "ece_held_out": held_out}
    figures = {"top1": 50.0, "classes": 2, "loss": 1.0, "n": 20, "total_ips": 1.0, "classes_of_the_checkpoint": 2}
    figures |= {"classes_of_the_data": 2, "calibration": found | {"nll": 1.0, "nll_before": 1.1, "written": ["x.py"]}}
    validate.show(figures, top_k=5)
    assert ("no better than before: 20 images are too few" in capsys.readouterr().out) == warns
