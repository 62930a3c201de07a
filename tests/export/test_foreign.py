"""ONNX files of others that could compute without end, and files that are none."""

import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from effnet_hf.errors import UserError
from effnet_hf.export import foreign
from effnet_hf.export.foreign import require_plain_graph


def value(name, kind=TensorProto.FLOAT, shape=None):
    return helper.make_tensor_value_info(name, kind, shape)


def graph_of(*nodes, name="g", into=("pixel_values",), out=("logits",)):
    return helper.make_graph(list(nodes), name, [value(each) for each in into], [value(each) for each in out])


def write(path, *nodes, **more):
    model = helper.make_model(graph_of(*nodes), opset_imports=[helper.make_opsetid("", 18)], ir_version=9, **more)
    path.write_bytes(model.SerializeToString())
    return path


INNER = graph_of(helper.make_node("Identity", ["a"], ["b"]), name="inner", into=(), out=("b",))
SAME = helper.make_node("Identity", ["pixel_values"], ["logits"])
REPEATED = [
    helper.make_node("Loop", ["many", "", "pixel_values"], ["logits"], body=INNER),
    helper.make_node("Scan", ["pixel_values"], ["logits"], body=INNER, num_scan_inputs=1),
    helper.make_node("If", ["yes"], ["logits"], then_branch=INNER, else_branch=INNER),
    helper.make_node("SequenceMap", ["pixel_values"], ["logits"], body=INNER),
    helper.make_node("BeamSearch", ["pixel_values"], ["logits"], domain="com.microsoft", decoder=INNER),
    helper.make_node("New", ["pixel_values"], ["logits"], domain="x", branches=[INNER]),
]


@pytest.mark.parametrize("node", REPEATED, ids=lambda node: node.op_type)
def test_operators_that_run_others_again_are_refused(tmp_path, node):
    path = write(tmp_path / "model.onnx", SAME, node)
    with pytest.raises(UserError, match="m cannot be opened: its model.onnx has operators with graphs inside"):
        require_plain_graph(path, "m")


def test_functions_are_refused(tmp_path):
    function = helper.make_function("x", "f", ["a"], ["b"], [SAME], [helper.make_opsetid("", 18)])
    path = write(tmp_path / "model.onnx", SAME, functions=[function])
    with pytest.raises(UserError, match="has functions, which no EfficientNet needs"):
        require_plain_graph(path, "m")


def test_a_graph_in_two_pieces_is_looked_through(tmp_path):
    """Protocol buffers join what comes twice."""
    path, more = write(tmp_path / "model.onnx", SAME), write(tmp_path / "more.onnx", REPEATED[0])
    path.write_bytes(path.read_bytes() + more.read_bytes())
    assert len(onnx.load(path).graph.node) == 2
    with pytest.raises(UserError, match="graphs inside"):
        require_plain_graph(path, "m")


def test_what_every_kind_of_field_holds_is_passed_over(tmp_path):
    weights = helper.make_tensor("w", TensorProto.FLOAT, [2], [6.0, 11.0])
    node = helper.make_node("Constant", [], ["w"], value=weights)
    rest = helper.make_node("Selu", ["pixel_values"], ["logits"], alpha=6.5, gamma=1.5, doc_string="2\x06")
    require_plain_graph(write(tmp_path / "model.onnx", node, rest, producer_version="7"), "m")
    eight_bytes = bytes([9 << 3 | 1, *range(8)])  # a field that ONNX has not, and would pass over
    (tmp_path / "model.onnx").write_bytes(eight_bytes + (tmp_path / "model.onnx").read_bytes())
    assert onnx.load(tmp_path / "model.onnx").graph.node[1].op_type == "Selu"
    require_plain_graph(tmp_path / "model.onnx", "m")


DAMAGED = {
    "a web page": b"<!doctype html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\n",
    "zeros": bytes(1000),
    "a length beyond the end": bytes([7 << 3 | 2, 100, 1]),
    "a number without an end": b"\xff" * 30,
    "a field that ends in its number": bytes([7 << 3]),
    "a tag of 64 bits": bytes([7 << 3 | 2, 3, 0xBA, 0x80, 0x80, 0x80, 0x80, 0x01, 0]),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_no_onnx_file(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(UserError, match="m cannot be opened: its model.onnx is damaged, cut short, or no ONNX file"):
        require_plain_graph(tmp_path / "model.onnx", "m")


def test_an_empty_file(tmp_path):
    (tmp_path / "model.onnx").touch()
    with pytest.raises(UserError, match="its model.onnx is empty"):
        require_plain_graph(tmp_path / "model.onnx", "m")


def test_cut_anywhere_it_is_refused_or_plain(tmp_path):
    """Never another exception, and never a wrong "plain"."""
    data, path = write(tmp_path / "model.onnx", SAME, REPEATED[0]).read_bytes(), tmp_path / "cut.onnx"
    for size in range(1, len(data), 4):
        path.write_bytes(data[:size])
        try:
            require_plain_graph(path, "m")
        except UserError:
            continue
        assert not onnx.load(path).graph.node, size


def test_a_file_of_tiny_fields_does_not_take_long(tmp_path, monkeypatch):
    monkeypatch.setattr(foreign, "_MOST", 1000)
    (tmp_path / "model.onnx").write_bytes(bytes([1 << 3, 1]) * 2_000_000)
    start = time.perf_counter()
    with pytest.raises(UserError, match="more than 1,000 parts"):
        require_plain_graph(tmp_path / "model.onnx", "m")
    assert time.perf_counter() - start < 1


def test_weights_are_not_read(tmp_path):
    model = onnx.load(write(tmp_path / "model.onnx", SAME))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.full(400_000, 3.5, np.float32), "w"))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    start = time.perf_counter()
    require_plain_graph(tmp_path / "model.onnx", "m")
    assert time.perf_counter() - start < 0.05
