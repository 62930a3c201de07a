"""Real clients of our checkpoints, each beside the stock model of the same kind: `make interop`.

A test says which client it is by `@pytest.mark.client(name, package, …, group=…, step=…, limit=…)`, with a group of
`benchmarks/interop.py`, and takes `side` where the stock model has the same job; there the stock model's failure is
recorded, not ours to mend. What became of each goes to the file of `--interop_results`, to which several runs add. From
a copy of it under benchmarks/, `benchmarks/result_tables.py` writes docs/interop.md.
"""

import fcntl
import importlib.metadata
import json
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--interop_results", type=Path, help="a JSON file that what became of each client is added to")


def pytest_configure(config):
    config.stash[_RESULTS] = {}


_RESULTS = pytest.StashKey[dict]()
_HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.interop)


@pytest.fixture(params=["ours", "stock"])
def side(request):
    """Whose model the client is given."""
    return request.param


def _side(item) -> str:
    return getattr(item, "callspec", None) and item.callspec.params.get("side") or "ours"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    clients = list(item.iter_markers("client"))
    if not clients or (report.when != "call" and report.passed):
        return report
    told = "works" if report.passed else "skipped" if report.skipped else "fails"
    reason = "" if report.passed else call.excinfo.exconly().splitlines()[0][:200]
    if told == "fails" and _side(item) == "stock" and report.when == "call":
        report.outcome, report.wasxfail = "skipped", f"the stock model: {reason}"
    of_programs = {name[8:]: value for name, value in item.user_properties if name.startswith("version ")}
    for client in clients:
        versions = {name: _version(name) for name in ("transformers", *client.args[1:])} | of_programs
        entry = {"test": item.nodeid, "client": client.args[0], **client.kwargs, "versions": versions}
        entry |= {"side": _side(item), "result": told, "reason": reason}
        item.config.stash[_RESULTS][item.nodeid, client.args[0]] = entry
    return report


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def pytest_sessionfinish(session):
    file = session.config.getoption("--interop_results", None)  # which nobody can give where all of tests/ runs
    if file is None or not session.config.stash[_RESULTS]:
        return
    with file.open("a+", encoding="utf-8") as shared:
        fcntl.flock(shared, fcntl.LOCK_EX)  # pytest-xdist has several sessions that end at once
        shared.seek(0)
        known = json.loads(shared.read() or "[]")
        known += session.config.stash[_RESULTS].values()
        shared.truncate(0)
        shared.write(json.dumps(sorted(known, key=lambda entry: (entry["test"], entry["client"])), indent=1) + "\n")


CLASSES = ["coffee cup", "tabby cat", "tripod", "daisy", "steam locomotive"]
SIZE = 64


@pytest.fixture
def classifier(side, tiny_config):
    """A small network with five classes for 64-pixel images and statistics as after training, ours or the stock."""
    return make_classifier(side, tiny_config)


def make_classifier(side, tiny_config):
    import torch
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    from effnet_hf import EfficientNetNVForImageClassification

    names = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    torch.manual_seed(0)
    if side == "ours":
        model = EfficientNetNVForImageClassification(tiny_config(image_size=SIZE, **names))
    else:
        shape = {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320}
        model = EfficientNetForImageClassification(EfficientNetConfig(image_size=SIZE, **shape, **names))
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    momentums = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        torch.nn.init.ones_(norm.weight)  # the stock model begins with 0.02 times noise, and all logits equal
    with torch.no_grad():
        model.train()(torch.randn(16, 3, SIZE, SIZE))
    for norm, momentum in zip(norms, momentums):
        norm.momentum = momentum
    return model.eval()


@pytest.fixture
def folder(classifier, side, tmp_path):
    """The same, saved with its image processor: what `from_pretrained` and `pipeline` open."""
    from transformers import EfficientNetImageProcessor

    from effnet_hf import EfficientNetNVImageProcessor

    path = tmp_path / side
    classifier.save_pretrained(path)
    edges = {"height": SIZE, "width": SIZE}
    if side == "ours":
        processor = EfficientNetNVImageProcessor(size={"shortest_edge": SIZE + 8}, crop_size=edges)
    else:
        processor = EfficientNetImageProcessor(size=edges, crop_size=edges)
    processor.save_pretrained(path)
    return path


@pytest.fixture
def photo():
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8))
