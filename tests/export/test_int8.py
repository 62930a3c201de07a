"""INT8 files of a calibrated checkpoint: the right graph, the same answers, honest tables."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score

from effnet_hf import EfficientNetNVForImageClassification
from effnet_hf.errors import UserError
from effnet_hf.export import ExportOptions, ONNXEfficientNet, export_model, ort_int8
from effnet_hf.export.check import whole_pixels_of
from effnet_hf.export.describe import Row
from effnet_hf.export.graph import draw_graph
from effnet_hf.export.network import ExportedNetwork
from effnet_hf.export.ort_int8 import fold_weights, for_ort_cpu, fuse_silu, identity, search_ranges, silu, take_out
from effnet_hf.export.runners import onnxruntime_runner, onnxruntime_session

from ..data.torture import photo
from .conftest import NAMES, as_arrays, listed, make_checkpoint


pytest.importorskip("modelopt", reason="needs the quant extra")
CPUINFO = Path("/proc/cpuinfo")
VNNI = not CPUINFO.is_file() or "vnni" in CPUINFO.read_text()


def make_quantized(tmp_path_factory, photos, placement):
    import torch

    from effnet_hf.export.check import FolderImages
    from effnet_hf.quantization import calibrate, quantize
    from effnet_hf.recipes import Recipe

    folder = make_checkpoint(tmp_path_factory.mktemp("float") / "model")
    model = EfficientNetNVForImageClassification.from_pretrained(folder)
    quantize(model, placement=placement)
    images = FolderImages(Recipe(data_dir=str(photos)), ["bird", "cat", "dog"])
    images = [images.open(i) for i in range(24)]
    calibrate(model, [torch.from_numpy(as_arrays(folder, images))])
    target = tmp_path_factory.mktemp("quantized") / "model"
    model.save_pretrained(target)
    (target / "preprocessor_config.json").write_bytes((folder / "preprocessor_config.json").read_bytes())
    return target


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, photos):
    """Calibrated on photographs, quantizers where NVIDIA puts them."""
    return make_quantized(tmp_path_factory, photos, "nvidia")


@pytest.fixture(scope="module")
def tensorrt(quantized, photos, tmp_path_factory):
    return export_model(
        str(quantized), tmp_path_factory.mktemp("out") / "trt", int8="tensorrt", data_dir=str(photos), command="x"
    )


def test_tensorrt_file_has_nvidias_pairs_and_int8_weights(quantized, tensorrt):
    model = onnx.load(tensorrt.file)
    weights = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert sum(tensor.name.endswith("weight_int8") for tensor in weights) == len(layers)
    producers = {name: node.op_type for node in model.graph.node for name in node.output}
    for layer in layers:
        assert producers[layer.input[0]] == producers[layer.input[1]] == "DequantizeLinear"
    for sum_ in (node for node in model.graph.node if node.op_type == "Add"):
        assert [producers[name] for name in sum_.input].count("DequantizeLinear") == 1  # the identity side
    stored = {tensor.name for tensor in model.graph.initializer}
    of_weights = [node.input[0] in stored for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert sum(of_weights) == len(layers) < len(of_weights) - len(layers)
    zeros = [n.input[2] for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in stored]
    assert len({*zeros}) == len(layers)  # one each, or ONNX Runtime cannot widen them where there is no VNNI
    large = [tensor for tensor in model.graph.initializer if len(tensor.dims) > 1]
    assert {tensor.data_type for tensor in large} == {onnx.TensorProto.INT8}  # nothing is stored as float beside it


def test_ranges_of_a_flat_folder_are_of_what_training_did_not_hold_out(quantized, photos, tmp_path):
    found = export_model(
        str(quantized), tmp_path / "cpu", int8="ort-cpu", data_dir=str(photos / "train"), val_fraction=0.25
    )
    assert found.images == "6 images of train"


def test_sessions_do_not_overflow_without_vnni(tensorrt):
    settings = onnxruntime_session(tensorrt.file).get_session_options()
    assert settings.get_session_config_entry("session.x64quantprecision") == "1"


def test_tensorrt_file_agrees_with_fake_quantization(tensorrt):
    names = [row.name for row in tensorrt.rows]
    assert names[0] == "checkpoint, fake-quantized, PyTorch" and any("tensorrt INT8, ONNX Runtime" in n for n in names)
    int8 = [row for row in tensorrt.rows if "INT8" in row.name]
    sure = int8 if VNNI else [row for row in int8 if "OpenVINO" not in row.name]  # without it OpenVINO's sums overflow
    assert min(row.agreement for row in sure) >= 95 and tensorrt.comparison.snr > 18
    for row in int8:
        assert row.times_float and row.megabytes < tensorrt.rows[1].megabytes
    text = tensorrt.summary()
    assert "times float" in text
    slower = [row for row in int8 if min(row.times_float) < 1]
    assert text.count("warning: ") == len(slower)
    card = (tensorrt.folder / "README.md").read_text()
    assert "INT8 beside float" in card and "tensorrt INT8, ONNX Runtime" in card
    assert not list(tensorrt.folder.glob("float*"))


def test_ort_cpu_file_keeps_learned_scales(quantized, photos, tmp_path):
    found = export_model(str(quantized), tmp_path / "cpu", int8="ort-cpu", data_dir=str(photos))
    assert f"signal to noise {found.comparison.snr:.1f} dB, 5 wanted" in found.summary()
    assert found.comparison.snr > 8 and found.rows[-1].name == "ort-cpu INT8, ONNX Runtime"
    model = onnx.load(found.file)
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    zeros = {node.input[1]: values[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert {zero.dtype for zero in zeros.values()} == {np.dtype(np.uint8)}
    learned = _learned_scales(quantized)
    kept = {np.float32(values[name]) for name, zero in zeros.items() if zero == 128}
    assert len(kept & learned) >= 0.8 * len(learned)
    producers = {name: node.op_type for node in model.graph.node for name in node.output}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    integer = [node for node in convolutions if producers.get(node.input[0]) == "DequantizeLinear"]
    assert len(integer) == len(convolutions) - 1  # all but the stem


def test_quantizers_placed_for_ort_cpu_leave_no_range_open(tmp_path_factory, photos, tmp_path, monkeypatch):
    searched = []

    def search(model, tensors, batches):
        searched.append(len(tensors))
        return search_ranges(model, tensors, batches)

    monkeypatch.setattr("effnet_hf.export.ort_int8.search_ranges", search)
    placed = make_quantized(tmp_path_factory, photos, "cpu")
    found = export_model(str(placed), tmp_path / "cpu", int8="ort-cpu", data_dir=str(photos))
    assert searched == [0] and found.comparison.snr > 8


def test_of_several_labels_it_is_measured_by_map(quantized, photos, tmp_path):
    shutil.copytree(quantized, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config |= {"problem_type": "multi_label_classification", "thresholds": [0.25, 0.5, 0.75]}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    rows = listed(photos, tmp_path / "labels.csv", "train") + listed(photos, tmp_path / "labels.csv", "val")
    data = {"data_dir": str(photos), "labels": str(tmp_path / "labels.csv"), "label_separator": ";"}
    found = export_model(str(tmp_path / "model"), tmp_path / "onnx", int8="ort-cpu", **data)
    model, rows = ONNXEfficientNet.from_pretrained(tmp_path / "onnx"), [row for row in rows if row[0].parts[0] == "val"]
    images = [Image.open(photos / path) for path, _ in rows]
    targets = np.array([[name in names for name in NAMES] for _, names in rows]).astype(int)
    by_hand = 100 * average_precision_score(targets, model(as_arrays(quantized, images)).logits.numpy())
    assert found.top1[0] == found.rows[-1].top1 == pytest.approx(by_hand, abs=0.01)
    assert "agreement on all labels" in found.summary() and "| mAP, % |" in (tmp_path / "onnx/README.md").read_text()
    told = {each["label"]: each for each in model.classify(images[0])}
    assert [told[name]["threshold"] for name in NAMES] == [0.25, 0.5, 0.75] and len(told) == 3


def _learned_scales(folder) -> set:
    model = EfficientNetNVForImageClassification.from_pretrained(folder)
    stem = "efficientnet.encoder.stem.conv.input"
    from effnet_hf.quantization import quantizers

    return {
        np.float32(float(quantizer._amax) / 127)
        for name, quantizer in quantizers(model).items()
        if not name.endswith(".weight") and name != stem
    }


@pytest.fixture
def drawn(quantized):
    model = EfficientNetNVForImageClassification.from_pretrained(quantized).eval()
    return draw_graph(ExportedNetwork(model, ExportOptions()), (64, 64), ExportOptions())


def test_weights_do_not_change_their_integers_by_folding_batch_norm(quantized, drawn):
    model = EfficientNetNVForImageClassification.from_pretrained(quantized)
    conv = model.efficientnet.encoder.stages[1].blocks[0].expand.conv
    scale = conv.weight_quantizer._amax / 127
    expected = (conv.weight / scale).round().clamp(-128, 127).detach().numpy()
    fold_weights(drawn)
    name = "model.efficientnet.encoder.stages.1.blocks.0.expand.conv.weight_int8"
    stored = next(onnx.numpy_helper.to_array(t) for t in drawn.graph.initializer if t.name == name)
    np.testing.assert_array_equal(np.abs(stored), np.abs(expected))  # a negative batch norm scale turns the sign


def test_taking_pairs_out_leaves_the_float_network(drawn):
    scales = take_out(drawn)
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in drawn.graph.node}
    assert "pixel_values" in scales.activations and len(scales.weights) > 10
    onnx.checker.check_model(drawn, full_check=True)


def test_silu_becomes_one_operator_with_the_same_values(drawn):
    import onnxruntime

    take_out(drawn)
    pixels = np.random.default_rng(0).standard_normal((2, 3, 64, 64), np.float32)
    outputs = []
    for fuse in (False, True):
        followed = fuse_silu(drawn) if fuse else None
        session = onnxruntime.InferenceSession(drawn.SerializeToString(), providers=["CPUExecutionProvider"])
        outputs.append(session.run(None, {"pixel_values": pixels})[0])
    assert len(followed) == sum(node.op_type == "QuickGelu" for node in drawn.graph.node) > 5
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-4)


def test_range_before_silu_spends_no_steps_on_the_negative_tail():
    values = np.linspace(-60, 12, ort_int8.BINS)
    counts = np.exp(-np.square((values + 1) / 4)) + 1e-3
    scale, zero = ort_int8._best(values, counts, silu)
    low, high = -zero * scale, (255 - zero) * scale
    assert -20 < low < -2 and 9 < high < 13
    plain_scale, plain_zero = ort_int8._best(values, np.ones(ort_int8.BINS), identity)
    assert plain_zero * plain_scale == pytest.approx(60, rel=0.05)


def test_a_diverged_network_is_one_sentence(drawn):
    take_out(drawn)
    (output,) = (node.output[0] for node in drawn.graph.node if node.op_type == "Conv" and "stem" in node.name)
    pixels = np.full((1, 3, 64, 64), np.nan, np.float32)
    with pytest.raises(UserError, match=r"gives NaN or infinity at .*stem.*: its training has diverged"):
        search_ranges(drawn, {output: silu}, [pixels])


def test_slower_int8_is_said():
    fast, slow = (
        Row(name, None, 100.0, 1.0, (1.0, 1.0), times) for name, times in (("a", (1.2, 1.3)), ("b", (2, 0.4)))
    )
    assert (fast.warning(), slow.warning()) == (None, "b is slower than float on this machine, 0.40 times its speed.")


def test_broken_int8_is_caught_and_leaves_nothing(quantized, tmp_path, monkeypatch):
    def spoil(model):
        fold_weights(model)
        for tensor in model.graph.initializer:
            if tensor.name.endswith("weight_int8"):
                array = onnx.numpy_helper.to_array(tensor)
                tensor.CopyFrom(onnx.numpy_helper.from_array(array[::-1].copy(), tensor.name))

    monkeypatch.setattr("effnet_hf.export.int8.fold_weights", spoil)
    with pytest.raises(UserError, match="does not compute what the checkpoint does"):
        export_model(str(quantized), tmp_path / "out", int8="tensorrt")
    assert list(tmp_path.iterdir()) == []


def test_float_and_quantized_checkpoints_are_told_apart(checkpoint, quantized, tmp_path):
    for model, options, named in (
        (checkpoint, {"int8": "tensorrt"}, "effnet-hf qat --help"),
        (quantized, {}, "add --int8"),
        (quantized, {"int8": "ort-cpu"}, "needs --data_dir"),
    ):
        with pytest.raises(UserError, match=named):
            export_model(str(model), tmp_path / "out", **options)


def test_for_ort_cpu_leaves_the_callers_images_alone(drawn):
    batches = [np.random.default_rng(i).standard_normal((2, 3, 64, 64), np.float32) for i in range(2)]
    before = [batch.copy() for batch in batches]
    assert for_ort_cpu(drawn, take_out(drawn), iter(batches)).graph.node
    for batch, copy in zip(batches, before):
        np.testing.assert_array_equal(batch, copy)


def test_layout_of_transformers_js_is_the_same_network_behind_the_graphs_preprocessing(quantized, photos, tmp_path):
    image = photo(5, 120, 100)
    settings = {"int8": "ort-cpu", "data_dir": str(photos), "num_images": 6}
    plain = export_model(str(quantized), tmp_path / "plain", **settings)
    layout = export_model(str(quantized), tmp_path / "js", layout="transformers.js", **settings)
    assert layout.file == tmp_path / "js/onnx/model_quantized.onnx"
    wanted = onnxruntime_runner(plain.file)(as_arrays(quantized, [image]))
    found = onnxruntime_runner(layout.file)(whole_pixels_of([image]))
    np.testing.assert_allclose(found, wanted, atol=0.1 * np.abs(wanted).max())
    assert json.loads((tmp_path / "js/config.json").read_text())["transformers.js_config"] == {"dtype": "q8"}
