"""Pickles that torch itself would not write: each is refused in a moment, in a line, and what torch writes is read."""

import argparse
import datetime
import io
import pathlib
import pickle
import sys
import types
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode

from effnet_hf.errors import UserError
from effnet_hf.reading import read_tensors, short
from effnet_hf.stand_ins import Settings


SET, ORDERED, ENCODE = b"cbuiltins\nset\n", b"ccollections\nOrderedDict\n", b"c_codecs\nencode\n"
HEX = b"X\x03\x00\x00\x00hex"
CAST = b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n({}ctorch\nfloat64\nX\x03\x00\x00\x00cpu\x89tR"
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"


def write(path, described: bytes) -> None:
    """A torch file of this pickle; `{}` in it is a tensor of ten thousand million numbers in four bytes."""
    good = io.BytesIO()
    torch.save([torch.zeros(1).expand(10**10)], good)
    with zipfile.ZipFile(good) as good_file, zipfile.ZipFile(path, "w") as archive:
        for name in good_file.namelist():
            content = good_file.read(name)
            if name.endswith("data.pkl"):
                tensor = content[content.index(b"ctorch._utils") : content.rindex(b"a.")]
                content = b"\x80\x02" + described.replace(b"{}", tensor) + b"."
            archive.writestr(name, content)


def doubled(times: int, first: bytes, double: bytes) -> bytes:
    """Something that holds the one before it twice, and so on: `[]` in `double` fetches it."""
    steps = [first + b"q\x00"]
    steps += [double.replace(b"[]", b"h" + bytes([i])) + b"q" + bytes([i + 1]) for i in range(times)]
    return b"".join(steps)


def text(words: bytes) -> bytes:
    return b"X" + len(words).to_bytes(4, "little") + words


def long(number: int) -> bytes:
    return b"\x8a\x0a" + number.to_bytes(10, "little", signed=True)


NAMESPACE, EMPTY = b"cargparse\nNamespace\n", b")\x81"
MEMBER = b"cPIL.Image\nResampling\n"
COPIED = b"(}q\x00(" + b"".join(text(b"%d" % i) + b"N" for i in range(999)) + b"u"
LISTED = b"(]q\x00(" + b"K\x01" * 999 + b"e(" + b"K\x01" * 999 + b"tq\x01"


def with_attribute(tensor, name="sum"):
    setattr(tensor, name, 5)
    return tensor


TOO_DEEP, MORE = "is too deep, multiplies, or is more than 8 MiB", "so it holds more than tensors"


@pytest.mark.parametrize(
    "content, words",
    {
        "a key of tuples of tuples": (b"}(" + doubled(49, b"K\x01", b"[][]\x86") + b"K\x01u", TOO_DEEP),
        "a key of wide tuples": (b"}(" + doubled(7, b"K\x01", b"(" + b"[]" * 99 + b"t") + b"K\x01u", TOO_DEEP),
        "a key a hundred thousand tuples deep": (b"}K\x01" + b"\x85" * 100_000 + b"K\x01s", TOO_DEEP),
        "a call of lists of lists": (b"(" + doubled(60, b"]K\x01a", b"][]a[]a") + b")R", TOO_DEEP),
        "a call of what is no function": (b"]]a)R", MORE),
        "a text doubled forty times": (ENCODE * 40 + b"X\x01\x00\x00\x00a" + (HEX + b"\x86R") * 40, MORE),
        "an expanded tensor's set": (SET + b"{}\x85R", MORE),
        "a set of a list's expanded tensor": (SET + b"]{}a\x85R", MORE),
        "attributes from an expanded tensor": (ORDERED + b")R{}b", MORE),
        "an expanded tensor for arguments": (ORDERED + b"{}R", MORE),
        "an expanded tensor for items": (ORDERED + b"{}\x85R", MORE),
        "an expanded tensor for an item": (ORDERED + b"]{}a\x85R", MORE),
        "an expanded tensor for a key": (ORDERED + b"](](" + b"{}K\x01ee\x85R", MORE),
        "an item that grows later": (ORDERED + b"](](X\x01\x00\x00\x00aK\x01eq\x00e\x85h\x00K\x01a0R", MORE),
        "an expanded tensor for a size": (STORAGE + b"{}tQ", MORE),
        "an expanded tensor changed": (b"{}{}b", MORE),
        "a cast of an expanded tensor": (CAST, "a pickled torch._utils._rebuild_device_tensor_from_cpu_tensor"),
        "an expanded tensor": (b"{}", "it claims 10,000,000,000 numbers of 4 bytes"),
        "a tensor of a size": (b"ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85\x81", "a pickled torch.FloatTensor"),
        "a dictionary's own method": (ORDERED + b")R}X\x05\x00\x00\x00itemsK\x05sb", "it has the attribute 'items'"),
        "a dictionary copied again and again": (COPIED + (NAMESPACE + EMPTY + b"h\x00b") * 200 + b"t", TOO_DEEP),
        "an ordered dictionary's copied attributes": (COPIED + (ORDERED + b")Rh\x00b") * 200 + b"t", TOO_DEEP),
        "a set of one list again and again": (LISTED + (SET + b"h\x00\x85R") * 200 + b"t", TOO_DEEP),
        "a set of one tuple again and again": (LISTED + (SET + b"h\x01\x85R") * 200 + b"t", TOO_DEEP),
        "an ordered dictionary of a dictionary": (COPIED + ORDERED + b"h\x00\x85Rt", MORE),
        "a long text encoded again and again": (
            b"(" + text(b"a" * 9000) + b"q\x00" + (ENCODE + b"h\x00" + text(b"latin1") + b"\x86R") * 200 + b"t",
            TOO_DEEP,
        ),
        "a text that is slow to encode": (ENCODE + text(b"a") + text(b"punycode") + b"\x86R", MORE),
        "keys of one hash": (b"}(" + b"".join(long(i * (2**61 - 1)) + b"N" for i in range(4000)) + b"u", TOO_DEEP),
        "keys of one hash in several steps": (
            b"}(" + b"".join(long(i * (2**61 - 1)) + b"Nu(" for i in range(4000)) + b"u",
            TOO_DEEP,
        ),
        "a set of one hash": (
            SET + b"](" + b"".join(long(i * (2**61 - 1)) for i in range(4000)) + b"e\x85R",
            TOO_DEEP,
        ),
        "tuples for keys": (b"}(" + b"".join(long(i) + b"\x85N" for i in range(4000)) + b"u", TOO_DEEP),
        "a member that is filled later": (MEMBER + b"}\x85R(" + b"K\x01K\x02u", "is damaged"),
        "a member that is a list": (MEMBER + b"]\x85Rq\x00" + b"(K\x01e", "is damaged"),
        "a member that is a tensor": (MEMBER + b"{}\x85R", "is damaged"),
        "what is not in the memo": (b"h\x07", "is damaged"),
        "a mark too few": (b"t", "is damaged"),
    }.values(),
)
def test_a_pickle_that_torch_would_not_write(content, words, tmp_path):
    write(tmp_path / "x.pth", content)
    with pytest.raises(UserError) as raised:
        read_tensors(tmp_path / "x.pth")
    assert words in str(raised.value), raised.value


@pytest.mark.parametrize(
    "value, words",
    [
        (with_attribute(torch.ones(3)), "a pickled torch._tensor._rebuild_from_type_v2"),
        (with_attribute(torch.nn.Parameter(torch.ones(3))), "a pickled torch._utils._rebuild_parameter_with_state"),
        (torch.ones(3).to(torch.float8_e4m3fn), "x is not a plain tensor but torch.strided, torch.float8_e4m3fn"),
        (torch.ones(3).to(torch.uint16), "x is not a plain tensor"),
        (torch.ones(3, dtype=torch.complex64).conj().imag, "x is not a plain tensor"),
    ],
)
def test_a_tensor_that_is_not_plain(value, words, tmp_path):
    torch.save({"x": value}, tmp_path / "x.pth")
    with pytest.raises(UserError) as raised:
        read_tensors(tmp_path / "x.pth")
    assert words in str(raised.value), raised.value


@pytest.mark.parametrize("new", [True, False])
def test_a_whole_training_checkpoint_is_read(new, tmp_path):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
    content = {
        "model": network.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
        "parameters": dict(network.named_parameters()), "again": [(0.9, 0.99)] * 5000, "rng": torch.get_rng_state(),
        "others": [b"\x80", {1, 2}, torch.Size((3, 4)), torch.device("cpu"), None, Counter("aab")],
        "half": torch.ones(3, dtype=torch.bfloat16), "nested": ((1, (2,)), [[3]]), "none": torch.empty(0),
    }  # fmt: skip
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=new)
    found, _ = read_tensors(tmp_path / "x.pth")
    assert found.keys() == content.keys() and found["others"] == content["others"]
    assert all(torch.equal(found["model"][name], tensor) for name, tensor in network.state_dict().items())
    assert found["optimizer"]["param_groups"] == content["optimizer"]["param_groups"]


@pytest.mark.parametrize("attributes", [True, False])
def test_an_ordered_dict_of_python_2_is_read(attributes, tmp_path):
    class Python2(pickle._Pickler):
        def reducer_override(self, value):
            if type(value) is not OrderedDict:
                return NotImplemented
            state = ({"_metadata": OrderedDict()},) if attributes and value else ()
            return OrderedDict, ([[name, entry] for name, entry in value.items()],), *state

    def dump(value, file, protocol):
        Python2(file, protocol).dump(value)

    as_python_2 = types.SimpleNamespace(Pickler=Python2, dump=dump, __name__="pickle")
    content = OrderedDict(
        (f"layer{i}.weight", torch.full((2,), float(i))) for i in range(2500)
    )  # of more than one batch
    torch.save({"state_dict": content}, tmp_path / "x.pth", as_python_2, _use_new_zipfile_serialization=False)
    found = read_tensors(tmp_path / "x.pth")[0]["state_dict"]
    assert list(found) == list(content) and all(torch.equal(found[name], content[name]) for name in content)


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_newer_pickle_is_named(protocol, tmp_path):
    torch.save({"x": torch.ones(2)}, tmp_path / "x.pth", pickle_protocol=protocol)
    with pytest.raises(UserError, match=f"saved with pickle protocol {protocol}, .* the default of torch.save"):
        read_tensors(tmp_path / "x.pth")


@pytest.mark.parametrize("first", b"{[")
def test_a_safetensors_file_may_begin_like_a_json_text(first, tmp_path):
    """With the length of its header, which need not be a multiple of eight."""
    header = b'{"bias": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'.ljust(256 + first)
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert read_tensors(tmp_path / "model.safetensors")[0] == {"bias": torch.zeros(1)}


def test_a_value_is_shortened_whatever_holds_it():
    endless: list = []
    endless += [endless, endless]
    deep: dict = {}
    for _ in range(60):
        deep = OrderedDict(a=deep, b=deep)
    assert max(len(short(value)) for value in (endless, deep, Counter({"a": deep}), [deep] * 1000)) < 200


# Settings of a trainer: one class by name, which becomes a dictionary.

DUMP = b"cnumpy._core.multiarray\nscalar\n"
ARRAY = b"cnumpy._core.multiarray\n_reconstruct\n)R"
DEFAULT = b"ccollections\ndefaultdict\n"
DTYPE = b"cnumpy\ndtype\nX\x02\x00\x00\x00f8\x89\x88\x87R"


class Options(argparse.Namespace):
    pass


@pytest.mark.parametrize("new", [True, False])
def test_a_namespace_and_numpys_numbers_are_read_as_plain_data(new, tmp_path):
    numbers = [np.float64(71.25), np.float32(0.5), np.int64(-3), np.bool_(True), np.float16(2), np.uint8(200)]
    args = argparse.Namespace(lr=0.1, sizes=[3, 4], nested=argparse.Namespace(a=None), weights=torch.ones(2))
    allowed = torch.serialization.get_safe_globals()
    content = {"args": args, "metrics": numbers, "big": np.dtype(">f8").type(3), "all": [(args, numbers[0])] * 9}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=new)
    found = read_tensors(tmp_path / "x.pth")[0]
    assert found["args"] == {"lr": 0.1, "sizes": [3, 4], "nested": {"a": None}, "weights": found["args"]["weights"]}
    assert isinstance(found["args"], dict) and not hasattr(found["args"], "__dict__")
    assert found["metrics"] == [71.25, 0.5, -3, True, 2.0, 200] and found["big"] == 3.0
    assert {type(number) for number in found["metrics"]} == {float, int, bool}
    assert set(torch.serialization.get_safe_globals()) == set(allowed)  # other torch.loads take no more


def test_files_are_read_in_several_threads_whatever_the_user_allows(tmp_path):
    torch.save({"args": argparse.Namespace(lr=1)}, tmp_path / "x.pth")
    usual = set(torch.serialization.get_safe_globals())
    for allowed in ([], [argparse.Namespace, (argparse.Namespace, "pathlib.PosixPath"), Options]):
        torch.serialization.add_safe_globals(allowed)
        try:
            with ThreadPoolExecutor(8) as threads:
                found = [content for content, _ in threads.map(read_tensors, [tmp_path / "x.pth"] * 100)]
            assert found == [{"args": {"lr": 1}}] * 100
            assert {type(content["args"]) for content in found} == {Settings}
            assert set(torch.serialization.get_safe_globals()) == {*usual, *allowed}
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(list(usual))


def test_keys_of_the_usual_kinds_are_read_in_any_number(tmp_path):
    pairs = {(i, "a"): i for i in range(500)}
    content = {
        "w": torch.ones(2),
        "names": {i: f"n{i}" for i in range(3_000)},
        "seen": set(range(9_000)),
        "of": pairs,
    }
    content["ids"] = {2**46 + 64 * i: {"step": i} for i in range(200)}  # of torch 1.4's optimizers
    torch.save(content, tmp_path / "x.pth")
    found = read_tensors(tmp_path / "x.pth")[0]
    assert all(found[name] == content[name] for name in ("names", "seen", "of")) and len(found["ids"]) == 200


def test_names_of_methods_in_a_namespace_are_keys_like_others(tmp_path):
    names = ("__setstate__", "__class__", "__dict__", "update", "items", "keys", "__reduce__", "__getattr__")
    entries = b"".join(text(name.encode()) + b"K\x03" for name in names)
    write(tmp_path / "x.pth", b"}" + text(b"args") + NAMESPACE + EMPTY + b"}(" + entries + b"ub}(" + entries + b"ubs")
    found = read_tensors(tmp_path / "x.pth")[0]["args"]
    assert list(found) == list(names) and set(found.values()) == {3} and callable(found.items)


@pytest.mark.parametrize(
    "content, words",
    {
        "called": (NAMESPACE + b")R", "argparse.Namespace besides"),
        "with arguments": (NAMESPACE + text(b"a") + b"\x85\x81", "argparse.Namespace besides"),
        "of an expanded tensor": (NAMESPACE + b"{}\x81", MORE),
        "without a call": (NAMESPACE + b"}b", MORE),
        "built from a list": (NAMESPACE + EMPTY + b"]b", MORE),
        "built from two": (NAMESPACE + EMPTY + b"}}\x86b", MORE),
        "built from a function": (NAMESPACE + EMPTY + ENCODE + b"b", MORE),
        "built from an expanded tensor": (NAMESPACE + EMPTY + b"{}b", MORE),
        "that holds an expanded tensor": (
            NAMESPACE + EMPTY + b"}" + text(b"x") + b"{}sb",
            "claims 10,000,000,000 numbers",
        ),
        "a dictionary built as one": (b"}}b", MORE),
        "a call's result built": (ENCODE + text(b"a") + text(b"hex") + b"\x86R}b", MORE),
        "another class's": (b"cargparse\nArgumentParser\n" + EMPTY, "argparse.ArgumentParser besides"),
        "found by a dotted name": (b"cargparse\nNamespace.__init__\n" + EMPTY, "argparse.Namespace.__init__ besides"),
        "its own class as a key": (b"}" + NAMESPACE + EMPTY + b"K\x01s", "is damaged"),
        "deep ones": (
            b"(" + doubled(60, NAMESPACE + EMPTY, NAMESPACE + EMPTY + b"}" + text(b"a") + b"[]sb") + b"t",
            "",
        ),
        "a function of it": (b"cos\nsystem\n" + text(b"true") + b"\x85R", "os.system besides"),
        "in a namespace, a function": (NAMESPACE + EMPTY + b"}" + text(b"f") + b"cos\nsystem\nsb", "os.system besides"),
        "a number of a function": (DUMP + ENCODE + text(b"a") + b"\x86R", "is damaged"),
        "a number of no bytes": (DUMP + DTYPE + text(b"abcdefgh") + b"\x86R", "is damaged"),
        "a number of an expanded tensor": (DUMP + b"{}{}\x86R", "is damaged"),
        "a number type of objects": (b"cnumpy\ndtype\n" + text(b"O8") + b"\x85R", ""),
        "a number type built of a map": (DTYPE + b"}b", MORE),
        "numpy's other functions": (b"cnumpy._core.multiarray\nfromfile\n" + text(b"x") + b"\x85R", "fromfile besides"),
        "a number of what is no type": (DUMP + b"cnumpy\ndtype\n{}\x85R" + text(b"a") + b"\x86R", "is damaged"),
        "an array of an expanded tensor": (ARRAY + b"{}b", MORE),
        "an array built of a map": (ARRAY + b"}b", MORE),
        "a simple namespace of an expanded tensor": (b"ctypes\nSimpleNamespace\n{}\x85R", ""),
        "a path of an expanded tensor": (b"cpathlib\nPosixPath\n{}\x85R", "is damaged"),
        "a default dictionary of a function": (DEFAULT + b"cos\nsystem\n\x85R", "os.system besides"),
        "a type called": (b"c__builtin__\nlist\n{}\x85R", "builtins.list besides"),
        "OmegaConf's own code": (b"comegaconf.omegaconf\nOmegaConf\n" + EMPTY, "OmegaConf besides"),
    }.values(),
)
def test_a_namespace_is_no_way_in(content, words, tmp_path):
    write(tmp_path / "x.pth", content)
    try:
        found = read_tensors(tmp_path / "x.pth")[0]
    except UserError as error:
        assert words and words in str(error) and "\n" not in str(error), error
    else:
        assert not words, found


def test_a_class_made_from_namespace_is_refused(tmp_path):
    torch.save({"args": Options(lr=1)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="Options besides plain tensors"):
        read_tensors(tmp_path / "x.pth")


RECORDS = np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")])


def class_of(module: str, monkeypatch):
    """Lightning's AttributeDict by one of its names, without Lightning."""
    parts = module.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    made = type("AttributeDict", (dict,), {"__module__": module})
    sys.modules[module].AttributeDict = made  # type: ignore[attr-defined]
    return made


def test_what_trainers_keep_beside_weights_is_read_as_plain_data(tmp_path, monkeypatch):
    modules = ("lightning.fabric.utilities.data", "pytorch_lightning.utilities.parsing")
    lightning, older = (class_of(module, monkeypatch) for module in modules)
    content = {
        "paths": [pathlib.Path("/data/x"), pathlib.Path("y/z.pth"), pathlib.PureWindowsPath("C:/a/b")],
        "dates": [datetime.datetime(2026, 1, 2, 3), datetime.date(2026, 1, 2), datetime.timedelta(1)],
        "aware": datetime.datetime.now(datetime.UTC),
        "hparams": [lightning(lr=0.1, root=pathlib.Path("/r")), older(a=older(b=[1])), types.SimpleNamespace(c=2)],
        "groups": [defaultdict(list, {"a": [1]}), defaultdict(dict), deque([1, 2], maxlen=3), frozenset([1])],
        "state": np.random.get_state(),
        "arrays": [np.zeros((0, 3)), np.arange(3), np.array(["a", "bc"]), np.eye(2, dtype=">f4")],
        "filters": [InterpolationMode.BILINEAR, Image.Resampling.BICUBIC],
        "words": [np.str_("été"), np.bytes_(b"x"), np.str_(""), np.bytes_(b"")],
        "dated": [np.datetime64("2026-01-02"), np.timedelta64(3, "s"), np.longdouble(2), RECORDS[0], RECORDS],
        "objects": np.array([None, "a", 2**70], dtype=object),
        "days": np.array(["2026-01-02"], dtype="datetime64[D]"),
        "others": [range(3), slice(1, 2), 1 + 2j, b"", np.float32, torch.float16, torch.strided, 2**70],
    }
    torch.save({"model": {"w": torch.ones(2)}, **content}, tmp_path / "x.pth")
    found = read_tensors(tmp_path / "x.pth")[0]
    assert found.keys() == {"model", *content} and torch.equal(found["model"]["w"], torch.ones(2))
    assert found["paths"] == ["/data/x", "y/z.pth", "C:\\a\\b"]
    assert found["hparams"] == [{"lr": 0.1, "root": "/r"}, {"a": {"b": [1]}}, {"c": 2}]
    assert found["groups"] == [{"a": [1]}, {}, [1, 2], None] and found["filters"] == ["bilinear", 3]
    assert (
        found["words"] == ["été", b"x", "", b""] and found["dated"][:4] == [None] * 4 and found["dates"] == [None] * 3
    )
    assert {type(value) for value in found["hparams"]} == {dict, Settings}


def test_hydras_settings_are_read_as_plain_data(tmp_path):
    made = pytest.importorskip("omegaconf").OmegaConf.create({"a": [1, None, "x", 2.5, True], "b": {"c": "${a}"}})
    torch.save({"w": torch.ones(2), "cfg": made}, tmp_path / "x.pth")
    found = read_tensors(tmp_path / "x.pth")[0]
    assert torch.equal(found["w"], torch.ones(2)) and type(found["cfg"]) is Settings


def test_a_network_pickled_whole_is_refused(tmp_path):
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="it holds a pickled torch.nn.modules.linear.Linear besides"):
        read_tensors(tmp_path / "x.pth")
