"""An exported folder opened again: our own wrapper in a pipeline, and Optimum where it is installed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper
from transformers import AutoImageProcessor, pipeline

from effnet_hf import EfficientNetNVForImageClassification
from effnet_hf.checkpoint import read_config, read_processor
from effnet_hf.errors import UserError
from effnet_hf.export import ONNXEfficientNet, export_model
from effnet_hf.manifest import write_manifest

from .conftest import NAMES, as_arrays


ROOT = Path(__file__).parents[2]


@pytest.fixture
def answers(checkpoint, image):
    """What the checkpoint itself says in PyTorch."""
    model = EfficientNetNVForImageClassification.from_pretrained(checkpoint)
    classify = pipeline("image-classification", model=model, image_processor=_processor(checkpoint), device="cpu")
    return {entry["label"]: entry["score"] for entry in classify(image)}


def _processor(folder):
    return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)


def same(found, answers):
    assert [entry["label"] for entry in found] == sorted(answers, key=answers.get, reverse=True)
    assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(answers, abs=1e-5)


def test_wrapper_is_a_model_for_transformers_pipeline(exported, image, answers, capfd):
    model = ONNXEfficientNet.from_pretrained(exported)
    classify = pipeline("image-classification", model=model, image_processor=_processor(exported), device="cpu")
    same(classify(image), answers)
    assert len(classify([image] * 3, batch_size=2, top_k=1)) == 3
    assert "not supported" not in capfd.readouterr().err
    same(model.pipeline(device="cpu")(image), answers)


def test_wrapper_takes_tensors_and_arrays(checkpoint, exported, image):
    model = ONNXEfficientNet.from_pretrained(exported, threads=1)
    array = as_arrays(checkpoint, [image])
    found = model(pixel_values=torch.from_numpy(array)).logits
    assert found.dtype == torch.float32 and found.shape == (1, 3)
    np.testing.assert_array_equal(found.numpy(), model(array).logits.numpy())
    assert model.to(torch.device("cpu")).eval() is model and not model.can_generate()
    assert model.metadata["labels"] == NAMES and model.metadata["image_size"] == 64
    assert model.config.num_labels == 3


@pytest.mark.parametrize("options", [{"with_softmax": True}, {"with_preprocessing": True}], ids=str)
def test_probabilities_come_out_the_same_whatever_the_graph_holds(checkpoint, image, answers, tmp_path, options):
    export_model(str(checkpoint), tmp_path / "out", **options)
    model = ONNXEfficientNet.from_pretrained(tmp_path / "out")
    found = model.classify(image)
    assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(answers, abs=1e-2)
    if "with_softmax" in options:
        same(model.pipeline(device="cpu")(image), answers)
    else:
        with pytest.raises(ValueError, match="preprocesses by itself"):
            model(as_arrays(checkpoint, [image]))


def test_what_is_no_exported_folder_is_refused_in_a_sentence(checkpoint, exported, tmp_path):
    (tmp_path / "broken").mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / "broken" / name).write_bytes((exported / name).read_bytes())
    (tmp_path / "broken/model.onnx").write_bytes((exported / "model.onnx").read_bytes()[:5000])
    for folder, named in (
        (checkpoint, "effnet-hf export --model"),
        (tmp_path / "none", "not a folder"),
        (exported / "config.json", "not a folder"),
        (tmp_path / "broken", "cannot be opened"),
    ):
        with pytest.raises(UserError, match=named) as caught:
            ONNXEfficientNet.from_pretrained(folder)
        assert "\n" not in str(caught.value)


@pytest.fixture
def folder(exported, tmp_path):
    """A copy to be changed."""
    return Path(shutil.copytree(exported, tmp_path / "onnx"))


def flip(path, place=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 0x40
    path.write_bytes(data)


def test_a_changed_model_is_refused_where_a_manifest_lies_beside_it(folder):
    ONNXEfficientNet.from_pretrained(folder)
    flip(folder / "model.onnx")
    with pytest.raises(UserError, match="model.onnx is not what was written.*where you changed it yourself, remove"):
        ONNXEfficientNet.from_pretrained(folder)
    (folder / "manifest.json").unlink()
    ONNXEfficientNet.from_pretrained(folder)  # what it answers depends on the bit


def test_a_model_that_the_manifest_does_not_know_is_refused(folder):
    kept = (folder / "model.onnx").rename(folder / "kept")
    write_manifest(folder)
    kept.rename(folder / "model.onnx")
    with pytest.raises(UserError, match="model.onnx is not in its manifest.json"):
        ONNXEfficientNet.from_pretrained(folder)
    flip(folder / "manifest.json")
    with pytest.raises(UserError, match="its manifest.json is damaged"):
        ONNXEfficientNet.from_pretrained(folder)


def test_an_edited_configuration_is_taken_with_a_line(folder, image, capsys):
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"bird"', '"owl"'))
    model = ONNXEfficientNet.from_pretrained(folder)
    assert "owl" in {entry["label"] for entry in model.classify(image)}
    err = capsys.readouterr().err
    assert f"{folder}: config.json has" in err and "it is taken as it is now" in err and err.count("\n") == 1


FLOAT, UINT8, INT64, DOUBLE = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT64, TensorProto.DOUBLE
PIXELS, LOGITS = ("pixel_values", FLOAT, ["N", 3, 64, 64]), ("logits", FLOAT, ["N", 3])
MISFITS = {  # inputs, outputs, what the sentence says
    "no input": ([], [LOGITS], "0 inputs and 1 outputs, and should have one each"),
    "two inputs": ([PIXELS, ("more", FLOAT, [1])], [LOGITS], "2 inputs and 1 outputs"),
    "two outputs": ([PIXELS], [LOGITS, ("more", FLOAT, [1])], "1 inputs and 2 outputs"),
    "other size": ([("pixel_values", FLOAT, ["N", 3, 99, 99])], [LOGITS], "99, 99.* should be .*'N', 3, 64, 64"),
    "other axes": ([("pixel_values", FLOAT, ["N", 64, 64, 3])], [LOGITS], "64, 64, 3.* should be .*'N', 3, 64, 64"),
    "fewer axes": ([("pixel_values", FLOAT, ["N", 3, 64])], [LOGITS], "pixel_values"),
    "double input": ([("pixel_values", DOUBLE, None)], [LOGITS], r"tensor\(double\).*should be tensor\(float\)"),
    "images of one size": ([("image", UINT8, [1, 80, 80, 3])], [LOGITS], "image tensor.*should be .*'height'"),
    "float images": ([("image", FLOAT, ["N", "h", "w", 3])], [LOGITS], r"should be tensor\(uint8\)"),
    "unknown input": ([("x", FLOAT, ["N", 3, 64, 64])], [LOGITS], "'x' where .* pixel_values or image"),
    "unknown output": ([PIXELS], [("y", FLOAT, ["N", 3])], "'y' where .* logits or probabilities"),
    "five classes": ([PIXELS], [("logits", FLOAT, ["N", 5])], r"logits tensor.*'N', 5.*should be .*\['N', 3\]"),
    "integers out": ([PIXELS], [("logits", INT64, ["N", 3])], r"tensor\(int64\)"),
    "text out": ([PIXELS], [("logits", TensorProto.STRING, ["N", 3])], r"tensor\(string\)"),
    "one number for each pixel": ([PIXELS], [("logits", FLOAT, ["N", 3, 64, 64])], "logits"),
}


@pytest.mark.parametrize(("inputs", "outputs", "named"), MISFITS.values(), ids=MISFITS.keys())
def test_a_graph_that_does_not_fit_its_folder_is_refused(exported, inputs, outputs, named):
    def described(values):
        kinds = [f"tensor({TensorProto.DataType.Name(kind).lower()})" for _, kind, _ in values]
        return [SimpleNamespace(name=v[0], type=kind, shape=v[2] or []) for v, kind in zip(values, kinds)]

    session = SimpleNamespace(get_inputs=lambda: described(inputs), get_outputs=lambda: described(outputs))
    config, processor = read_config(str(exported), "m"), read_processor(str(exported), "m")
    with pytest.raises(UserError, match=f"^m cannot be used: its model.onnx has.*{named}") as caught:
        ONNXEfficientNet(session, config, processor, "m")
    assert "\n" not in str(caught.value)


def test_a_batch_of_a_fixed_size_is_that_of_the_run(exported):
    def described(name, shape):
        return [SimpleNamespace(name=name, type="tensor(float)", shape=shape)]

    session = SimpleNamespace(
        get_inputs=lambda: described("pixel_values", [2, 3, 64, 64]), get_outputs=lambda: described("logits", [2, 3]),
        run=lambda *_: [np.zeros((2, 3), np.float32)],
    )  # fmt: skip
    config, processor = read_config(str(exported), "m"), read_processor(str(exported), "m")
    model = ONNXEfficientNet(session, config, processor, "m")
    assert model.forward(torch.zeros(2, 3, 64, 64)).logits.shape == (2, 3)
    with pytest.raises(UserError, match=r"gives \(2, 3\) numbers, and config.json says \(1, 3\)"):
        model.forward(torch.zeros(1, 3, 64, 64))


def put(folder, node, *constants):
    """Another graph into the folder, of one operator whose shapes are known only when it runs."""
    values = [helper.make_tensor_value_info(name, FLOAT, None) for name in ("pixel_values", "logits")]
    graph = helper.make_graph([node], "g", values[:1], values[1:], list(constants))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    (folder / "manifest.json").unlink()
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return ONNXEfficientNet.from_pretrained(folder)


def constant(name, value, kind=np.float32):
    return numpy_helper.from_array(np.array(value, kind), name)


STRANGE = {  # the operator, its constants, what the sentence says
    "a scalar": (helper.make_node("ReduceMean", ["pixel_values"], ["logits"], keepdims=0), [], r"gives \(\) numbers"),
    "images": (helper.make_node("Identity", ["pixel_values"], ["logits"]), [], r"gives \(1, 3, 64, 64\) numbers"),
    "NaN": (helper.make_node("Identity", ["c"], ["logits"]), [constant("c", [[0, np.nan, 1]])], "NaN or infinity"),
    "infinity": (helper.make_node("Identity", ["c"], ["logits"]), [constant("c", [[0, np.inf, 1]])], "NaN or inf"),
    "other sides": (helper.make_node("Add", ["pixel_values", "c"], ["logits"]), [constant("c", [1] * 7)], "run: "),
    "terabytes": (
        helper.make_node("Tile", ["pixel_values", "s"], ["logits"]),
        [constant("s", [1, 2**30, 1, 1], np.int64)],
        "cannot be run: ",
    ),
}


@pytest.mark.parametrize(("node", "constants", "named"), STRANGE.values(), ids=STRANGE.keys())
def test_a_strange_answer_is_a_sentence(folder, image, node, constants, named, capfd):
    model = put(folder, node, *constants)
    for ask in (lambda: model.classify(image), lambda: model(np.zeros((1, 3, 64, 64), np.float32))):
        with pytest.raises(UserError, match=named) as caught:
            ask()
        assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # ONNX Runtime would print its own


def test_other_labels_or_sizes_beside_the_graph_are_refused(folder):
    (folder / "manifest.json").unlink()
    names = ("config.json", "preprocessor_config.json")
    config, processor = (json.loads((folder / name).read_text()) for name in names)
    changed = (
        config | {"id2label": {"0": "a", "1": "b"}, "label2id": None},
        processor | {"crop_size": {"height": 48, "width": 48}},
    )
    for name, content in zip(names, changed):
        before = (folder / name).read_text()
        (folder / name).write_text(json.dumps(content))
        with pytest.raises(UserError, match="cannot be used: .*by config.json and preprocessor_config.json"):
            ONNXEfficientNet.from_pretrained(folder)
        (folder / name).write_text(before)
    assert ONNXEfficientNet.from_pretrained(folder)


def test_a_loop_is_refused_before_it_runs(folder):
    loop = helper.make_node("Loop", ["c", "", "pixel_values"], ["logits"], body=onnx.GraphProto(name="b"))
    with pytest.raises(UserError, match="operators with graphs inside"):
        put(folder, loop, constant("c", 2**62, np.int64))


@pytest.fixture
def optimum():
    if transformers.__version__ >= "5":
        pytest.skip("Optimum's ONNX exporter exists for transformers < 4.58 only")
    pytest.importorskip("optimum.onnxruntime", reason="needs the optimum extra")


@pytest.mark.optimum
@pytest.mark.filterwarnings("ignore")  # of Optimum's own and of tracing
class TestOptimum:
    def test_opens_our_folder_and_runs_in_pipelines(self, optimum, exported, image, answers):
        from optimum.onnxruntime import ORTModelForImageClassification
        from optimum.pipelines import pipeline as optimum_pipeline

        model = ORTModelForImageClassification.from_pretrained(exported)
        processor = _processor(exported)
        same(pipeline("image-classification", model=model, image_processor=processor)(image), answers)
        classify = optimum_pipeline("image-classification", model=model, image_processor=processor, accelerator="ort")
        same(classify(image), answers)

    def test_main_export_writes_a_folder_that_both_open(self, optimum, checkpoint, image, answers, tmp_path):
        from optimum.exporters.onnx import main_export
        from optimum.onnxruntime import ORTModelForImageClassification

        import effnet_hf.export.optimum  # noqa: F401

        main_export(str(checkpoint), output=tmp_path / "out", task="image-classification", do_validation=True)
        model = ORTModelForImageClassification.from_pretrained(tmp_path / "out")
        same(pipeline("image-classification", model=model, image_processor=_processor(checkpoint))(image), answers)
        same(ONNXEfficientNet.from_pretrained(tmp_path / "out").classify(image), answers)

    @pytest.mark.slow  # two fresh processes that import torch, transformers and Optimum
    def test_command_line_finds_us_by_itself(self, optimum, checkpoint, tmp_path):
        line = [sys.executable, "-c", "from optimum.commands.optimum_cli import main; main()", "export", "onnx"]
        line += ["--model", checkpoint, "--task", "image-classification", tmp_path / "out"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(line, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        assert (tmp_path / "out/model.onnx").is_file()

    def test_quantizer_makes_a_smaller_file_that_opens(self, optimum, exported, tmp_path):
        from optimum.onnxruntime import ORTModelForImageClassification, ORTQuantizer
        from optimum.onnxruntime.configuration import AutoQuantizationConfig

        model = ORTModelForImageClassification.from_pretrained(exported)
        quantizer = ORTQuantizer.from_pretrained(model)
        settings = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
        quantizer.quantize(save_dir=tmp_path / "int8", quantization_config=settings)
        small = next((tmp_path / "int8").glob("*.onnx"))
        assert small.stat().st_size < (exported / "model.onnx").stat().st_size
        assert ORTModelForImageClassification.from_pretrained(tmp_path / "int8", file_name=small.name) is not None
