"""An exported folder opened again: our own wrapper in a pipeline, and Optimum where it is installed."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoImageProcessor, pipeline

from effnet_hf import EfficientNetNVForImageClassification
from effnet_hf.errors import UserError
from effnet_hf.export import ONNXEfficientNet, export_model

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
