"""What `effnet-hf space` writes, started with gradio where this package is not installed, and clicked in a browser."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from effnet_hf import EfficientNetNVImageProcessor
from tests.analysis.browser import BROWSER, browser

from .conftest import SIZE, make_classifier


_PATIENCE = 300  # seconds, for a machine that has other work
# What the Space's requirements.txt does not name, and this environment has.
_ABSENT = ("effnet_hf", "torchvision", "timm", "datasets", "accelerate", "modelopt", "sklearn", "matplotlib")
_START = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({_ABSENT!r}))
sys.path[:] = [place for place in sys.path if place != {str(Path(__file__).parents[2])!r}]
runpy.run_path("app.py", run_name="__main__")
"""


@pytest.fixture(params=["one label", "several labels"])
def space(request, tiny_config, tmp_path):
    """A Space of a classifier with a temperature or thresholds and of two images that gradio itself would turn or
    clip, and the answers of `classify` to these."""
    from effnet_hf.hub.space import write_space
    from effnet_hf.inference import Classifier

    several = request.param == "several labels"
    model = make_classifier("ours", tiny_config)
    if several:
        model.config.problem_type, model.config.thresholds = "multi_label_classification", [0.2, 0.9, 0.3, 0.9, 0.1]
    else:
        model.config.softmax_temperature = 1.7
    model.save_pretrained(tmp_path / "model")
    processor = EfficientNetNVImageProcessor(
        size={"shortest_edge": SIZE + 8}, crop_size={"height": SIZE, "width": SIZE}, bit_depth=12
    )
    processor.save_pretrained(tmp_path / "model")
    draws = np.random.default_rng(1)
    turned, deep = tmp_path / "turned.jpg", tmp_path / "deep.png"
    exif = Image.Exif()
    exif[274] = 6
    ramp = np.linspace(0, 255, 96 * 128 * 3).reshape(96, 128, 3) * draws.random((1, 1, 3))
    Image.fromarray(ramp.astype(np.uint8)).save(turned, exif=exif)
    Image.fromarray(draws.integers(0, 4096, (90, 100)).astype(np.uint16)).save(deep)
    write_space(str(tmp_path / "model"), tmp_path / "space", examples=[turned, deep], title="What is <it>?")
    expected = {}
    for answer in Classifier(str(tmp_path / "model"), device="cpu")([turned, deep]):
        assert answer.error is None
        expected[answer.path] = answer.predictions
    return tmp_path / "space", expected, several


@contextlib.contextmanager
def running(folder: Path, home: Path):
    """The address of the Space's page."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(home / "modules"), "GRADIO_TEMP_DIR": str(home / "gradio"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with open(home / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _START], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            until = time.monotonic() + _PATIENCE
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert process.poll() is None and time.monotonic() < until, (home / "log").read_text()
                time.sleep(0.3)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


def wait_for(page, script: str, click: str = ""):
    """What the script finds at last. The click comes again each minute: a button may be seen before it listens."""
    until = time.monotonic() + _PATIENCE
    again = 0.0
    while not (found := page.run(script)):
        assert time.monotonic() < until, page.run("document.body.innerText")
        if click and time.monotonic() > again:
            page.run(click)
            again = time.monotonic() + 60
        time.sleep(0.1)
    return found


def go(page, address: str) -> None:
    page.send("Emulation.setDeviceMetricsOverride", width=1100, height=760, deviceScaleFactor=1, mobile=False)
    page.send("Page.navigate", url=address)
    wait_for(page, "document.querySelectorAll('input[type=file]').length")
    wait_for(page, "document.querySelectorAll('.gallery img').length == 2")


def check_shown(page, answers: list[dict], click: str = "") -> None:
    """The page has, once it is done, the classes of the answers with their percentages."""
    script = """JSON.stringify([...document.querySelectorAll('.confidence-set')].map(
        row => [row.querySelector('.text').innerText, row.querySelector('.confidence').innerText]))"""
    wait_for(page, "document.querySelectorAll('.confidence-set .confidence').length", click)
    rows = dict(json.loads(page.run(script)))
    assert rows.keys() == {each["label"] for each in answers}
    for each in answers:
        assert abs(int(re.sub(r"\D", "", rows[each["label"]])) - 100 * each["score"]) <= 0.51


@pytest.mark.client(
    "Hugging Face Spaces (gradio)", "gradio", group="Serving", step="`effnet-hf space MODEL --output_dir DIR`",
    limit="gradio 6 needs transformers 5",
)  # fmt: skip
@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_space(space, tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed, or not with this transformers", exc_type=ImportError)
    from gradio_client import Client, handle_file

    folder, expected, several = space
    before = sorted(path.name for path in folder.rglob("*"))
    with running(folder, tmp_path) as address, browser() as page:
        client = Client(address, verbose=False)
        for path, answers in expected.items():
            told = client.predict(handle_file(path), api_name="/classify")
            told, labels = told if several else (told, None)
            scores = {each["label"]: each["confidence"] for each in told["confidences"]}
            assert scores == pytest.approx({each["label"]: each["score"] for each in answers}, abs=1e-4)
            if several:
                assert set(labels.split(", ")) == {each["label"] for each in answers if each["passed"]}

        turned, deep = expected
        go(page, address)
        assert page.run("document.querySelector('h1').innerText") == "What is <it>?"
        names = [Path(url).name for url in page.run("[...document.querySelectorAll('.gallery img')].map(i => i.src)")]
        assert names == ["deep.png", "turned.jpg"]
        check_shown(page, expected[turned], "document.querySelectorAll('button.gallery-item')[1].click()")

        clear = "document.querySelector('[aria-label=Clear], [aria-label=\"Remove Image\"]')?.click()"
        wait_for(page, "!document.querySelector('.confidence-set')", clear)
        where = page.send("Runtime.evaluate", expression="document.querySelector('input[type=file]')")["result"]
        page.send("DOM.setFileInputFiles", files=[str(deep)], objectId=where["objectId"])
        check_shown(page, expected[deep])
    assert sorted(path.name for path in folder.rglob("*")) == before  # or it could not be overwritten
