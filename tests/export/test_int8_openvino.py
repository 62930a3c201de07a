"""`--int8 openvino` of a calibrated checkpoint: integer kernels, its own grids, right where sums overflow.

From a float checkpoint, by NNCF: tests/interop/test_openvino.py.
"""

import json
import platform
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from effnet_hf import EfficientNetNVForImageClassification
from effnet_hf.checkpoint import open_checkpoint
from effnet_hf.errors import UserError
from effnet_hf.export import ExportOptions, describe, export_model, openvino_runner
from effnet_hf.export import int8 as writing
from effnet_hf.export.check import Comparison
from effnet_hf.export.describe import Exported, Row
from effnet_hf.export.ort_int8 import fold_weights, spare_pairs
from effnet_hf.export.runners import onnxruntime_runner, openvino_compiled, runner_for

from .conftest import NAMES, as_arrays, listed
from .test_int8 import CPUINFO, VNNI, make_quantized


openvino = pytest.importorskip("openvino", reason="needs the openvino extra")
pytest.importorskip("modelopt", reason="needs the quant extra")
from effnet_hf.export import openvino_int8  # noqa: E402


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, photos):
    return make_quantized(tmp_path_factory, photos, "nvidia")


@pytest.fixture(scope="module")
def reduced(quantized, photos, tmp_path_factory):
    """Right on every machine."""
    folder = tmp_path_factory.mktemp("out") / "openvino"
    return export_model(
        str(quantized), folder, int8="openvino", reduce_range=True, data_dir=str(photos), command="export x"
    )


def changed(quantized, folder, **settings):
    """A copy with other settings in its config.json."""
    shutil.copytree(quantized, folder)
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def logits_of(folder, pixels):
    with torch.no_grad():
        return EfficientNetNVForImageClassification.from_pretrained(folder).eval()(torch.from_numpy(pixels)).logits


def test_all_layers_but_the_stem_run_as_integer_kernels(reduced):
    found = openvino_int8.kernels(openvino_compiled(str(reduced.file)))
    layers = {key: count for key, count in found.items() if key[0] in ("Convolution", "FullyConnected")}
    assert layers.pop(("Convolution", "f32")) == 1
    model = openvino.Core().read_model(reduced.file)
    kinds = [op.get_type_name() for op in model.get_ordered_ops()]
    drawn = sum(kinds.count(kind) for kind in ("Convolution", "GroupConvolution", "MatMul"))
    assert {precision for _, precision in layers} <= {"u8", "i8"} and sum(layers.values()) == drawn - 1 > 10
    # Activations, sums and products stand in those kernels.
    assert not any(kind in ("Swish", "MathsSigmoid") for kind, _ in found)


def test_folder_is_an_ir_that_says_what_it_is(reduced, quantized, photos):
    names = {path.name for path in reduced.folder.iterdir()}
    assert {"openvino_model.xml", "openvino_model.bin", "config.json", "preprocessor_config.json"} <= names
    assert not names & {"model.onnx", "float.onnx"}
    assert reduced.size == sum((reduced.folder / f"openvino_model.{end}").stat().st_size for end in ("xml", "bin"))
    told = openvino.Core().read_model(reduced.file).get_rt_info(["framework", "labels"])
    assert json.loads(told.astype(str)) == NAMES
    card = (reduced.folder / "README.md").read_text()
    assert "library_name: openvino" in card and "INT8 beside float" in card and "the file is right on every CPU" in card


def test_it_is_measured_beside_float_in_both_runtimes(reduced):
    assert reduced.runtime.startswith("OpenVINO") and reduced.comparison.snr > 12 and reduced.least_snr == 12
    assert [row.name for row in reduced.rows] == [
        "checkpoint, fake-quantized, PyTorch",
        "the same without quantizers, ONNX Runtime",
        "the same without quantizers, OpenVINO",
        "openvino INT8, OpenVINO",
    ]
    own = reduced.rows[-1]
    assert own.top1 == reduced.top1[0] and own.agreement >= 90 and len(own.times_float) == 2
    assert 2e-6 * (reduced.folder / "openvino_model.bin").stat().st_size < reduced.rows[1].megabytes
    said = reduced.summary()
    assert "note     INT8 is the quantized checkpoint's own" in said and "12 wanted" in said
    assert said.splitlines()[0].endswith(" MB, int8")


def test_cards_code_runs(reduced, image, monkeypatch, tmp_path):
    code = (reduced.folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    image.save("image.jpg")
    found: dict = {}
    exec(code.replace("path/to/this/folder", str(reduced.folder)), found)
    assert found["logits"].shape == (1, 3)


def integers_of(model):
    """Int8 weights by their layer's name in the checkpoint."""
    return {
        layer.get_friendly_name().removesuffix("/WithoutBiases"): np.array(integers.data)
        for layer, integers, _ in openvino_int8._layers(model)
    }


def test_weights_keep_the_checkpoints_integers_unless_their_range_is_reduced(quantized, reduced, tmp_path):
    checkpoint, options = open_checkpoint(str(quantized)), ExportOptions(int8="openvino")
    file = tmp_path / "openvino_model.xml"
    graph = writing.write_unproved(checkpoint, checkpoint.load().float().eval(), file, options)
    own = integers_of(openvino.Core().read_model(file))
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.graph.initializer}
    widened = {node.output[0]: node.input[0] for node in graph.graph.node if node.op_type == "DequantizeLinear"}
    layers = {
        node.name: stored[widened[node.input[1]]] for node in graph.graph.node if node.op_type in ("Conv", "Gemm")
    }
    assert len(own) > 5 and own.keys() <= layers.keys()
    for name, weights in own.items():
        np.testing.assert_array_equal(weights, layers[name])
    coarser = integers_of(openvino.Core().read_model(reduced.file))
    assert coarser.keys() == own.keys()
    assert max(largest_sum(weights) for weights in own.values()) > 32767  # or nothing was at stake
    assert max(largest_sum(weights) for weights in coarser.values()) <= 32767


def largest_sum(weights) -> int:
    """Of two products of uint8 with neighbours, as kernels without VNNI add them in 16 bits."""
    wide = weights.astype(int)
    ends = [np.maximum(sign * wide, 0) * 255 for sign in (1, -1)]
    return max(int((end[:, :-1:2] + end[:, 1::2]).max()) for end in ends)


def test_scales_grow_no_more_than_they_must():
    weights = np.array([[100, 20, -3, -3], [127, 127, 0, 0], [-128, 1, 1, -128], [-128, -128, 9, 9]], np.int8)
    np.testing.assert_allclose(spare_pairs(weights), [1, 2, 128 / 127, 256 / 127])
    # An odd number of inputs, several positions of a kernel, each by itself.
    kernel = np.zeros((1, 3, 1, 2), np.int8)
    kernel[0, :, 0] = [[127, 0], [0, 127], [127, 127]]
    assert spare_pairs(kernel) == [1]
    assert list(spare_pairs(np.full((2, 1, 3, 3), -128, np.int8))) == [1, 1]  # depthwise


@pytest.mark.skipif(
    not CPUINFO.is_file() or platform.machine() != "x86_64", reason="only Linux says which instructions an x86 CPU has"
)
def test_overflow_is_found_where_there_is_no_vnni():
    assert openvino_int8.overflows() == (not VNNI)


def test_answers_are_the_checkpoints_where_sums_overflow_too(quantized, reduced, photos):
    from PIL import Image

    images = [Image.open(path).convert("RGB") for path in sorted((photos / "val").rglob("*.png"))]
    pixels = as_arrays(quantized, images)
    wanted, found = logits_of(quantized, pixels).numpy(), openvino_runner(reduced.file)(pixels)
    assert np.square(wanted - found).mean() < 0.05 * np.square(wanted - wanted.mean(0)).mean()


@pytest.mark.parametrize("no_vnni", [True, False])
def test_wrong_answers_name_the_flag_where_sums_overflow_and_leave_nothing(quantized, tmp_path, monkeypatch, no_vnni):
    def spoil(model):
        fold_weights(model)
        for tensor in model.graph.initializer:
            if tensor.name.endswith("weight_int8"):
                array = onnx.numpy_helper.to_array(tensor)
                tensor.CopyFrom(onnx.numpy_helper.from_array(array[::-1].copy(), tensor.name))

    monkeypatch.setattr(openvino_int8, "fold_weights", spoil)
    monkeypatch.setattr(openvino_int8, "overflows", lambda: no_vnni)
    said = "this CPU has no VNNI.*add --reduce_range" if no_vnni else "does not compute what the checkpoint does"
    with pytest.raises(UserError, match=said):
        export_model(str(quantized), tmp_path / "out", int8="openvino", num_images=4)
    with pytest.raises(UserError, match="does not compute what the checkpoint does"):
        export_model(str(quantized), tmp_path / "out", int8="openvino", reduce_range=True, num_images=4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("no_vnni", [True, False])
def test_a_file_of_full_range_says_where_it_is_wrong(quantized, tmp_path, monkeypatch, no_vnni):
    monkeypatch.setattr(openvino_int8, "overflows", lambda: no_vnni)
    monkeypatch.setitem(writing.LEAST_SNR, "openvino", -20)
    found = export_model(str(quantized), tmp_path / "out", int8="openvino", num_images=4)
    said = "This CPU has no VNNI" if no_vnni else "for such machines write it with --reduce_range"
    assert said in found.notes[1] and said in (tmp_path / "out/README.md").read_text()
    assert f"note     {found.notes[1]}" in found.summary()


def test_probabilities_temperature_and_several_labels(quantized, photos, tmp_path):
    settings = {"int8": "openvino", "reduce_range": True, "num_images": 6}
    pixels = np.random.default_rng(0).standard_normal((2, 3, 64, 64), np.float32)
    plain = openvino_runner(export_model(str(quantized), tmp_path / "plain", **settings).file)(pixels)
    warm = changed(quantized, tmp_path / "warm", softmax_temperature=2.0)
    found = export_model(warm, tmp_path / "warm-ov", with_softmax=True, **settings)
    given = openvino_runner(found.file)(pixels)
    np.testing.assert_allclose(given, torch.from_numpy(plain / 2).softmax(-1).numpy(), atol=1e-3)
    assert "pixel_values -> probabilities" in found.summary() and "temperature, 2" in found.summary()
    several = changed(
        quantized, tmp_path / "tags", problem_type="multi_label_classification", thresholds=[0.25, 0.5, 0.75]
    )
    listed(photos, tmp_path / "labels.csv", "train")
    listed(photos, tmp_path / "labels.csv", "val")
    data = {"data_dir": str(photos), "labels": str(tmp_path / "labels.csv"), "label_separator": ";"}
    found = export_model(several, tmp_path / "tags-ov", int8="openvino", reduce_range=True, with_softmax=True, **data)
    given = openvino_runner(found.file)(pixels)
    np.testing.assert_allclose(given, torch.from_numpy(plain).sigmoid().numpy(), atol=1e-3)
    assert "agreement on all labels" in found.summary() and "| mAP, % |" in (tmp_path / "tags-ov/README.md").read_text()


WRONG = [  # (options, what the line names)
    ({"int8": "openvino", "format": "onnx"}, "--int8 openvino is written as --format openvino, not onnx"),
    ({"int8": "tensorrt", "format": "openvino"}, "--int8 tensorrt is written as --format onnx, not openvino"),
    ({"int8": "openvino", "layout": "transformers.js"}, "--layout transformers.js goes with --format onnx"),
    ({"int8": "openvino", "dtype": "fp16"}, "--int8 goes with --dtype fp32"),
    ({"int8": "openvino", "dynamic_image_size": True}, "--int8 goes without --dynamic_image_size"),
    ({"int8": "openvino", "with_preprocessing": True}, "--with_preprocessing goes with --format onnx"),
    ({"int8": "tensorrt", "reduce_range": True}, "--reduce_range goes with --int8 openvino or --int8 ort-cpu"),
    ({"reduce_range": True}, "--reduce_range goes with --int8"),
]


@pytest.mark.parametrize("options, named", WRONG, ids=[str(options) for options, _ in WRONG])
def test_what_makes_no_sense_is_refused_before_anything_is_read(options, named, tmp_path):
    with pytest.raises(UserError, match=named):
        export_model("no/such/model", tmp_path / "out", **options)


def test_format_follows_int8_and_a_float_checkpoint_needs_images_and_nncf(checkpoint, photos, tmp_path, monkeypatch):
    assert ExportOptions(int8="openvino").format == "openvino" and ExportOptions(int8="ort-cpu").format == "onnx"
    with pytest.raises(UserError, match="--int8 openvino needs --data_dir .* of a float checkpoint"):
        export_model(str(checkpoint), tmp_path / "out", int8="openvino")
    installed = writing.installed
    monkeypatch.setattr("effnet_hf.export.options.installed", lambda name: name != "nncf" and installed(name))
    with pytest.raises(UserError, match="^nncf is not installed: pip install nncf$"):
        export_model(str(checkpoint), tmp_path / "out", int8="openvino", data_dir=str(photos))
    assert list(tmp_path.iterdir()) == []


def test_command_writes_it_and_says_which_way(command, quantized, tmp_path):
    flags = ["--int8", "openvino", "--reduce_range", "--num_images", "4"]
    code, out, err = command("export", "--model", quantized, "--output_dir", tmp_path / "out", *flags)
    assert (code, err) == (0, "") and f"wrote    {tmp_path}/out/openvino_model.xml" in out
    assert "note     INT8 is the quantized checkpoint's own" in out and "openvino INT8, OpenVINO" in out


def test_the_file_alone_is_written_without_the_command(quantized, tmp_path):
    checkpoint, options = open_checkpoint(str(quantized)), ExportOptions(int8="openvino", reduce_range=True)
    writing.write_unproved(checkpoint, checkpoint.load().float().eval(), tmp_path / options.file_name, options)
    name, run = runner_for(tmp_path / options.file_name, options)
    assert name.startswith("OpenVINO") and run(np.zeros((2, 3, 64, 64), np.float32)).shape == (2, 3)


def test_ort_cpu_of_reduced_range_is_right_without_a_session_option(quantized, photos, tmp_path):
    found = export_model(
        str(quantized), tmp_path / "cpu", int8="ort-cpu", reduce_range=True, data_dir=str(photos), num_images=8
    )
    assert found.comparison.snr > 8 and "x64quantprecision" not in (tmp_path / "cpu/README.md").read_text()
    import onnxruntime

    pixels = np.random.default_rng(0).standard_normal((4, 3, 64, 64), np.float32)
    plain = onnxruntime.InferenceSession(found.file, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(
        plain.run(None, {"pixel_values": pixels})[0], onnxruntime_runner(found.file)(pixels), atol=0.1
    )


@pytest.mark.parametrize("machine, instead", [("x86_64", "on x86 CPUs give --int8 openvino"), ("arm64", "float file")])
def test_ort_cpu_says_when_it_is_not_worth_it(monkeypatch, machine, instead):
    monkeypatch.setattr(describe.platform, "machine", lambda: machine)

    def warnings(int8, *times):
        row = Row("x", None, 100.0, 1.0, (1.0, 1.0), times)
        comparison = Comparison(0.0, 100.0, 100.0, 20.0, 1.0)
        options = ExportOptions(int8=int8)
        return Exported(Path(), Path(), 1, options, "X 1", "2 images", comparison, rows=(row,)).warnings()

    (said,) = warnings("ort-cpu", 1.5, 1.2)
    assert "1.20 times the speed of float, not worth it on this machine" in said and instead in said
    (slower,) = warnings("ort-cpu", 0.5, 1.2)
    assert "0.50 times" in slower
    assert warnings("ort-cpu", 1.3, 1.4) == warnings("openvino", 1.1, 1.2) == []
