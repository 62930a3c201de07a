"""Float exports: every option's graph, what it promises, and that a wrong file is never put in place."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from effnet_hf import EfficientNetNVForImageClassification
from effnet_hf.checkpoint import open_checkpoint
from effnet_hf.errors import UserError
from effnet_hf.export import ExportOptions, check, export_model, graph
from effnet_hf.export.api import check_images
from effnet_hf.export.graph import shape_of
from effnet_hf.export.network import ExportedNetwork
from effnet_hf.recipes import Recipe

from ..data.torture import photo
from .conftest import NAMES, as_arrays, make_checkpoint


ROOT = Path(__file__).parents[2]


def run_file(path, array):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: array})[0]


def logits_of(checkpoint, array):
    model = EfficientNetNVForImageClassification.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        return model(torch.from_numpy(array)).logits.numpy()


def test_folder_holds_one_file_and_what_opens_it(exported):
    names = {path.name for path in exported.iterdir()}
    assert names == {
        *("model.onnx", "config.json", "preprocessor_config.json", "README.md", "manifest.json"),
        *("configuration.py", "image_processing_efficientnet_nv.py"),
    }
    model = onnx.load(exported / "model.onnx")
    assert shape_of(model.graph.input[0]) == ["batch", 3, 64, 64] and model.graph.input[0].name == "pixel_values"
    assert shape_of(model.graph.output[0]) == ["batch", 3] and model.graph.output[0].name == "logits"
    assert model.opset_import[0].version == 18
    kinds = {node.op_type for node in model.graph.node}
    assert not kinds & {"BatchNormalization", "Identity", "Constant", "Dropout"}
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(facts["labels"]) == NAMES and facts["image_size"] == "64"
    assert json.loads(facts["image_mean"])[0] == 0.485 and facts["variant"] == "custom"
    assert "model.safetensors" not in json.loads((exported / "config.json").read_text())["auto_map"].values()


def test_batches_of_any_size_give_the_checkpoints_logits(checkpoint, exported):
    images = as_arrays(checkpoint, [photo(i, 90, 110) for i in range(5)])
    expected = logits_of(checkpoint, images)
    assert expected.std() > 1  # else agreement would mean nothing
    for size in (1, 2, 5):
        np.testing.assert_allclose(run_file(exported / "model.onnx", images[:size]), expected[:size], atol=1e-4)


def test_recipe_of_the_run_is_stored_in_the_file(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "run")
    (tmp_path / "run/recipe.yaml").write_text("epochs: 3\n")
    export_model(open_checkpoint(str(tmp_path / "run")), tmp_path / "out")
    facts = {entry.key: entry.value for entry in onnx.load(tmp_path / "out/model.onnx").metadata_props}
    assert facts["recipe"] == "epochs: 3\n"


def test_softmax_dynamo_and_free_sides(checkpoint, tmp_path):
    options = {"with_softmax": True, "exporter": "dynamo", "dynamic_image_size": True}
    found = export_model(str(checkpoint), tmp_path / "out", **options)
    assert found.comparison.agreement == 100
    model = onnx.load(found.file)
    assert shape_of(model.graph.input[0]) == ["batch", 3, "height", "width"]
    larger = np.random.default_rng(0).standard_normal((2, 3, 96, 128), np.float32)
    expected = torch.from_numpy(logits_of(checkpoint, larger)).softmax(-1).numpy()
    np.testing.assert_allclose(run_file(found.file, larger), expected, atol=1e-4)


@pytest.mark.parametrize("dtype, kind", [("fp16", onnx.TensorProto.FLOAT16), ("bf16", onnx.TensorProto.BFLOAT16)])
def test_half_precision_halves_the_weights_and_keeps_float_inputs(checkpoint, exported, tmp_path, dtype, kind):
    found = export_model(str(checkpoint), tmp_path / "out", dtype=dtype)
    model = onnx.load(found.file)
    weights = [tensor for tensor in model.graph.initializer if len(tensor.dims) >= 2]
    assert weights and {tensor.data_type for tensor in weights} == {kind}
    assert {v.type.tensor_type.elem_type for v in (model.graph.input[0], model.graph.output[0])} == {1}
    assert 1e-4 < found.comparison.difference < 0.5
    assert ("float32 arithmetic" in found.runtime) == (dtype == "bf16")


def test_padding_same_is_exported_and_refused_with_free_sides(tmp_path):
    source = make_checkpoint(tmp_path / "same", padding="same", hidden_act="relu6", se_ratio=0.0)
    assert export_model(str(source), tmp_path / "out").comparison.difference < 1e-4
    with pytest.raises(UserError, match="padding: same"):
        export_model(str(source), tmp_path / "free", dynamic_image_size=True)


def test_openvinos_format_is_checked_in_its_own_runtime(checkpoint, tmp_path):
    """As pt2's is, below."""
    pytest.importorskip("openvino", reason="needs the openvino extra")
    found = export_model(str(checkpoint), tmp_path / "out", format="openvino")
    assert found.runtime.startswith("OpenVINO")
    assert found.comparison.difference < 1e-4 and found.file.is_file() and found.size > 50_000
    assert not (tmp_path / "out/model.onnx").exists()


def test_preprocessing_in_the_graph_is_the_image_processor(checkpoint, tmp_path):
    found = export_model(str(checkpoint), tmp_path / "out", with_preprocessing=True)
    sizes = [(97, 64), (64, 97), (300, 201), (96, 96), (61, 40), (1200, 50), (33, 700)]
    for i, size in enumerate(sizes):
        image = photo(i, *size)
        logits = logits_of(checkpoint, as_arrays(checkpoint, [image]))
        expected = torch.from_numpy(logits).softmax(-1).numpy()
        np.testing.assert_allclose(run_file(found.file, np.asarray(image)[None]), expected, atol=1e-2)


def test_folding_keeps_the_function_and_the_original(checkpoint):
    model = EfficientNetNVForImageClassification.from_pretrained(checkpoint).eval()
    exported = ExportedNetwork(model, ExportOptions())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in exported.modules())
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(exported(pixels), model(pixels).logits, atol=1e-4, rtol=1e-4)


def test_images_of_a_folder_give_accuracy_and_cover_all_classes(checkpoint, photos, tmp_path):
    found = export_model(str(checkpoint), tmp_path / "out", data_dir=str(photos), num_images=9)
    assert found.images == f"9 images of {photos.name}" and found.top1[0] == found.top1[1]
    images = check_images(open_checkpoint(str(checkpoint)), Recipe(data_dir=str(photos)), 9, ExportOptions())
    assert sorted(set(images.labels)) == [0, 1, 2]
    assert "generated" in export_model(str(checkpoint), tmp_path / "generated").images
    own = export_model(str(checkpoint), tmp_path / "own", data_dir=str(photos), num_images=9, with_preprocessing=True)
    assert own.top1 == found.top1 and f"top1     {own.top1[0]:.2f} % on these" in own.summary()
    assert f"Top-1 on 9 images of {photos.name}, %" in (tmp_path / "own/README.md").read_text()


def test_images_that_training_held_out_of_a_flat_folder(checkpoint, photos, tmp_path):
    opened, flat = open_checkpoint(str(checkpoint)), str(photos / "train")
    held_out = check_images(opened, Recipe(data_dir=flat, val_fraction=0.25), None, ExportOptions())
    assert len(held_out) == 6 and sorted(held_out.labels) == [0, 0, 1, 1, 2, 2]
    (tmp_path / "zebra").symlink_to(photos / "val/dog")
    for name in ("bird", "cat"):
        (tmp_path / name).symlink_to(photos / "val" / name)
    assert check_images(opened, Recipe(data_dir=str(tmp_path)), None, ExportOptions()).labels is None  # no dog


def test_wrong_weights_are_caught_and_leave_nothing(checkpoint, tmp_path, monkeypatch):
    def spoil(network, *arguments):
        with torch.no_grad():
            network.model.classifier.weight[0, 0] += 0.5
        return draw(network, *arguments)

    draw = graph.draw_graph
    monkeypatch.setattr(graph, "draw_graph", spoil)
    with pytest.raises(UserError, match="does not compute what the checkpoint does"):
        export_model(str(checkpoint), tmp_path / "new/out")
    assert list(tmp_path.iterdir()) == []


def test_invalid_graph_and_fixed_batch_are_caught(checkpoint, tmp_path, monkeypatch):
    def fixed(model, options):
        pass

    monkeypatch.setattr("effnet_hf.export.graph.name_axes", fixed)
    monkeypatch.setattr("effnet_hf.export.graph._with_torchscript", _without_axes)
    with pytest.raises(UserError, match=r"\[2, 3, 64, 64\] instead of pixel_values \['batch'"):
        export_model(str(checkpoint), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def _without_axes(network, example, options):
    import io

    buffer = io.BytesIO()
    names = {"input_names": ["pixel_values"], "output_names": ["logits"]}
    torch.onnx.export(network, (example,), buffer, opset_version=18, dynamo=False, **names)
    return onnx.load_from_string(buffer.getvalue())


def test_without_the_onnx_package_a_sentence_names_it_and_pt2_is_written(checkpoint, tmp_path):
    code = """
import sys
from pathlib import Path
sys.modules.update(onnx=None, onnxruntime=None, onnxscript=None)
from effnet_hf.errors import UserError
from effnet_hf.export import export_model, options
options.installed = lambda package: sys.modules.get(package, 0) is not None
try:
    export_model(sys.argv[1], sys.argv[2])
except UserError as error:
    print(error)
found = export_model(sys.argv[1], sys.argv[2], format="pt2")
print(found.comparison.agreement, found.runtime.split()[0], found.comparison.difference < 1e-4, found.size > 50_000)
"""
    line = [sys.executable, "-c", code, checkpoint, tmp_path / "out"]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    said = ["onnx is not installed: pip install onnx", "100.0 torch True True"]
    assert done.stdout.splitlines() == said, done.stderr
    assert (tmp_path / "out/model.pt2").is_file() and not (tmp_path / "out/model.onnx").exists()


def test_comparison_tells_ties_from_mistakes():
    reference = np.array([[1.0, 2.0], [3.0, 0.0]])
    tie = check.compare(np.array([[1.0, 1.0001], [3.0, 0.0]]), np.array([[1.0002, 1.0001], [3.0, 0.0]]))
    assert tie.agreement == 50 and tie.certain_agreement == 100
    wrong = check.compare(reference, np.array([[1.0, 2.0], [3.0, 3.1]]))
    assert wrong.agreement == 50 and wrong.difference == pytest.approx(3.1)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_outputs_that_overflow_are_refused_like_any_others_that_differ(value):
    comparison = check.compare(np.eye(2), np.array([[1.0, 0.0], [0.0, value]]))
    with pytest.raises(UserError, match="does not compute what the checkpoint does: in ONNX Runtime it differs by"):
        check.require_equal(comparison, ExportOptions(dtype="fp16"), "ONNX Runtime")
