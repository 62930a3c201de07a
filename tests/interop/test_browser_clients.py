"""Exports in JavaScript: transformers.js and ONNX Runtime, in Node and in a real browser, against Python's answers.

npm ci --ignore-scripts --prefix tests/interop/js
npm ci --ignore-scripts --prefix examples/browser
"""

import contextlib
import functools
import http.server
import itertools
import json
import runpy
import shutil
import subprocess
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from effnet_hf import EfficientNetNVForImageClassification, EfficientNetNVImageProcessor
from effnet_hf.export import export_model
from effnet_hf.export.check import whole_pixels_of

from ..analysis.browser import BROWSER, browser
from ..data.torture import photo as drawn_photo
from .conftest import CLASSES, SIZE


ROOT = Path(__file__).parents[2]
JS, PAGE = ROOT / "tests/interop/js", ROOT / "examples/browser"
DTYPES = {"fp32": 1e-4, "fp16": 5e-3, "q8": 2e-2}  # and the largest allowed difference of a probability

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs chromium or chrome")
needs_packages = pytest.mark.skipif(
    not (JS / "node_modules").is_dir(), reason="needs: npm ci --ignore-scripts --prefix tests/interop/js"
)
needs_runtime = pytest.mark.skipif(
    not (PAGE / "node_modules").is_dir(), reason="needs: npm ci --ignore-scripts --prefix examples/browser"
)


def say_version(record_property, package, folder=JS):
    said = json.loads((folder / "node_modules" / package / "package.json").read_text())
    record_property(f"version {package}", said["version"])


def python_answers(folder, image):
    """Of our checkpoint in PyTorch, label to probability."""
    model = EfficientNetNVForImageClassification.from_pretrained(folder).eval()
    processor = EfficientNetNVImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        probabilities = model(**processor(image, return_tensors="pt")).logits.softmax(-1)[0]
    return dict(zip(CLASSES, probabilities.tolist()))


def exported(side, folder, tmp_path, dtype="fp32"):
    """The layout of transformers.js, the image that a client is asked about, and Python's answers."""
    if side == "ours":
        image = drawn_photo(3, 700, 500)
        if dtype == "q8":
            return tmp_path / "js", image, quantized_answers(folder, tmp_path, image)
        export_model(folder, tmp_path / "js", layout="transformers.js", dtype=dtype, num_images=2)
        return tmp_path / "js", image, python_answers(folder, image)
    if dtype != "fp32":
        pytest.skip("Optimum's exporter writes fp16 on GPUs only, and q8 by other means")
    exporters = pytest.importorskip("optimum.exporters.onnx", reason="needs optimum-onnx")
    from transformers import pipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is older than torch
        exporters.main_export(
            folder,
            output=tmp_path / "js",
            task="image-classification",
            library_name="transformers",
            do_validation=False,
        )
    (tmp_path / "js/onnx").mkdir()
    (tmp_path / "js/model.onnx").rename(tmp_path / "js/onnx/model.onnx")
    image = drawn_photo(3, SIZE, SIZE)  # which it need not resize: its answers would be others
    return tmp_path / "js", image, {each["label"]: each["score"] for each in pipeline(
        "image-classification", str(folder))(image, top_k=5)}  # fmt: skip


def quantized_answers(folder, tmp_path, image):
    """Writes the INT8 layout of the checkpoint after calibration; what ONNX Runtime in Python computes from it."""
    pytest.importorskip("modelopt", reason="needs the quant extra")
    import onnxruntime

    from effnet_hf.quantization import calibrate, quantize

    model, data = EfficientNetNVForImageClassification.from_pretrained(folder), tmp_path / "data"
    for split, name in itertools.product(("train", "val"), CLASSES):
        (data / split / name).mkdir(parents=True)
        drawn_photo(CLASSES.index(name), 120, 100).save(data / split / name / "1.png")
    processor = EfficientNetNVImageProcessor.from_pretrained(folder)
    quantize(model)
    images = [Image.open(file) for file in sorted(data.glob("train/*/*"))]
    calibrate(model, [processor(images, return_tensors="pt")["pixel_values"]])
    model.save_pretrained(tmp_path / "int8")
    processor.save_pretrained(tmp_path / "int8")
    export_model(tmp_path / "int8", tmp_path / "js", layout="transformers.js", int8="ort-cpu", data_dir=str(data))
    session = onnxruntime.InferenceSession(tmp_path / "js/onnx/model_quantized.onnx")
    (logits,) = session.run(None, {"pixel_values": whole_pixels_of([image])})
    return dict(zip(CLASSES, torch.from_numpy(logits).softmax(-1)[0].tolist()))


def node(*arguments):
    done = subprocess.run(["node", *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def require_same(found, wanted, tolerance):
    assert {each["label"] for each in found} == set(wanted)
    assert max(abs(each["score"] - wanted[each["label"]]) for each in found) <= tolerance


@contextlib.contextmanager
def served(folder):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def wait_for(page, expression, seconds=90):
    until = time.monotonic() + seconds
    while not (found := page.run(expression)):
        assert time.monotonic() < until, page.complaints[-3:]
        time.sleep(0.1)
    return found


@needs_node
@needs_packages
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.client(
    "transformers.js in Node", group="Browsers", step="`export --layout transformers.js`",
    limit="sharp applies colour profiles, which Python's Pillow does not",
)  # fmt: skip
def test_transformers_js_in_node(side, folder, dtype, tmp_path, record_property):
    say_version(record_property, "@huggingface/transformers")
    path, image, wanted = exported(side, folder, tmp_path, dtype)
    image.save(tmp_path / "image.png")
    options = {} if side == "ours" else {"dtype": dtype}  # ours says its own in config.json
    (found,) = node(JS / "classify.mjs", path, json.dumps(options), tmp_path / "image.png")
    require_same(found, wanted, DTYPES[dtype])


HTML = """<!doctype html><script type="module">
import { env, pipeline } from '/node_modules/@huggingface/transformers/dist/transformers.min.js';
Object.assign(env, { allowRemoteModels: false, allowLocalModels: true, localModelPath: '/', useBrowserCache: false });
env.backends.onnx.wasm.wasmPaths = '/node_modules/onnxruntime-web/dist/';
try {
  const classify = await pipeline('image-classification', 'js', %s);
  window.answers = await classify('/image.png', { top_k: null });
} catch (error) { window.answers = String(error); }
</script>"""


@needs_browser
@needs_packages
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.client(
    "transformers.js in a browser", group="Browsers", step="`export --layout transformers.js`",
    limit="applies colour profiles and blends transparency, which Pillow does not; WebGPU was not run",
)  # fmt: skip
def test_transformers_js_in_a_browser(side, folder, dtype, tmp_path, record_property):
    say_version(record_property, "@huggingface/transformers")
    _, image, wanted = exported(side, folder, tmp_path, dtype)
    image.save(tmp_path / "image.png")
    options = "{}" if side == "ours" else json.dumps({"dtype": dtype})
    (tmp_path / "index.html").write_text(HTML % options)
    (tmp_path / "node_modules").symlink_to(JS / "node_modules")
    with served(tmp_path) as address, browser() as page:
        page.send("Page.navigate", url=f"{address}/index.html")
        found = wait_for(page, "window.answers")
        record_property("version chromium", page.send("Browser.getVersion")["product"])
    assert isinstance(found, list), found
    require_same(found, wanted, DTYPES[dtype])


@needs_node
@needs_packages
@pytest.mark.parametrize("side", ["ours"], indirect=True)
@pytest.mark.client("onnxruntime-node", group="Browsers", step="`export --with_preprocessing`", limit="")
def test_onnxruntime_node(folder, tmp_path, record_property):
    say_version(record_property, "onnxruntime-node")
    export_model(folder, tmp_path / "onnx", with_preprocessing=True, num_images=2)
    image = drawn_photo(3, 700, 500)
    (tmp_path / "bytes").write_bytes(np.asarray(image).tobytes())
    found = node(JS / "run.mjs", tmp_path / "onnx/model.onnx", tmp_path / "bytes", image.height, image.width)
    np.testing.assert_allclose(found, list(python_answers(folder, image).values()), atol=1e-4)


def odd_images(folder):
    """As cameras, phones and drawing programs save them."""
    image, turned = drawn_photo(3, 700, 500), Image.Exif()
    turned[0x0112] = 6
    image.save(folder / "turned.jpg", exif=turned)
    image.convert("L").save(folder / "grey.jpg")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("P").save(folder / "palette.gif")
    image.resize((4000, 3000)).save(folder / "large.jpg", subsampling=2)
    alpha = Image.linear_gradient("L").resize(image.size)
    Image.merge("RGBA", (*image.split(), alpha)).save(folder / "transparent.png")
    return sorted(folder.iterdir())


@needs_browser
@needs_runtime
@pytest.mark.parametrize("side", ["ours"], indirect=True)
@pytest.mark.client(
    "onnxruntime-web (WebAssembly), examples/browser", group="Browsers",
    step="`export --with_preprocessing`, `build.py`", limit="WebGPU was not run",
)  # fmt: skip
def test_page_without_a_server(folder, tmp_path, record_property):
    say_version(record_property, "onnxruntime-web", PAGE)
    export_model(folder, tmp_path / "onnx", with_preprocessing=True, num_images=2)
    runpy.run_path(str(PAGE / "build.py"))["main"](
        ["--model", f"{tmp_path / 'onnx'}", "--output", f"{tmp_path / 'page.html'}"]
    )
    (tmp_path / "odd").mkdir()
    with browser() as page:
        record_property("version chromium", page.send("Browser.getVersion")["product"])
        page.open(tmp_path / "page.html")
        wait_for(page, "!document.getElementById('said').textContent")
        for file in odd_images(tmp_path / "odd"):
            rows = _given(page, file)
            assert [row["label"] for row in rows] == [
                row["label"] for row in sorted(rows, key=lambda row: -row["score"])
            ]
            require_same(rows, python_answers(folder, Image.open(file)), 1e-4)
        (tmp_path / "text.jpg").write_text("no image")
        assert _given(page, tmp_path / "text.jpg") == []
        assert (
            page.run("document.getElementById('said').textContent")
            == "text.jpg is no image that this browser can read."
        )
        fetched = [address[:5] for address in page.requests if not address.startswith(("data:", "blob:"))]
        assert fetched == ["file:"]  # the page, and nothing else


def _given(page, file):
    """The rows that the page shows of a file that is chosen."""
    page.run("document.getElementById('said').className = ''; document.getElementById('result').replaceChildren()")
    chooser = page.send("Runtime.evaluate", expression="document.getElementById('file')")["result"]["objectId"]
    page.send("DOM.setFileInputFiles", files=[str(file)], objectId=chooser)
    wait_for(page, "document.querySelector('#result li') || document.getElementById('said').className ? 1 : 0")
    rows = "[...document.querySelectorAll('#result li')]"
    return page.run(f"{rows}.map(row => ({{label: row.firstChild.textContent, score: Number(row.dataset.score)}}))")
