"""The serving example: its answers, its limits, and the page in a real browser."""

import importlib.util
import io
import os
import shutil
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import pipeline

from effnet_hf import EfficientNetNVForImageClassification, EfficientNetNVImageProcessor
from effnet_hf.export import ONNXEfficientNet, export_model


pytest.importorskip("fastapi", reason="needs the serve extra")
pytest.importorskip("httpx", reason="FastAPI's test client needs it")
APP = Path(__file__).parents[2] / "examples/serve/app.py"


@pytest.fixture(scope="module")
def serve():
    spec = importlib.util.spec_from_file_location("serve_app", APP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def app(serve, exported):
    return serve.make_app(ONNXEfficientNet.from_pretrained(exported), name="birds & beasts")


@pytest.fixture
def client(app):
    return open_client(app)


def open_client(app):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it would rather have httpx2
        from fastapi.testclient import TestClient

    return TestClient(app)


def as_bytes(image, kind="JPEG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def send(client, data: bytes, name="image.jpg"):
    return client.post("/classify", files={"image": (name, data)})


def test_image_gives_its_classes_best_first(client, exported, image):
    answer = send(client, as_bytes(image, "PNG"))
    assert answer.status_code == 200
    body = answer.json()
    assert (body["width"], body["height"]) == image.size
    assert body["predictions"] == ONNXEfficientNet.from_pretrained(exported).classify(image)
    scores = [entry["score"] for entry in body["predictions"]]
    assert scores == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1)


@pytest.mark.parametrize("setting", [{"crop_size": {"height": 64, "width": 96}}, {"do_normalize": False}], ids=str)
def test_images_are_prepared_as_the_folder_says(serve, checkpoint, image, tmp_path, setting):
    shutil.copytree(checkpoint, tmp_path / "model")
    processor = EfficientNetNVImageProcessor(**{"size": 96, "crop_size": 64, **setting})
    processor.save_pretrained(tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "onnx")
    client = open_client(serve.make_app(ONNXEfficientNet.from_pretrained(tmp_path / "onnx")))
    found = send(client, as_bytes(image, "PNG")).json()["predictions"]
    model = EfficientNetNVForImageClassification.from_pretrained(tmp_path / "model")
    classify = pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    expected = {entry["label"]: entry["score"] for entry in classify(image)}
    assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["grey", "palette", "alpha", "turned", "WEBP"])
def test_every_kind_of_image_is_read(client, image, kind):
    modes = {"grey": "L", "palette": "P", "alpha": "RGBA"}
    data = as_bytes(image.convert(modes.get(kind, "RGB")), "WEBP" if kind == "WEBP" else "PNG")
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", exif=exif)
        data = buffer.getvalue()
    answer = send(client, data)
    assert answer.status_code == 200
    size = image.size[::-1] if kind == "turned" else image.size
    assert (answer.json()["width"], answer.json()["height"]) == size


def test_what_cannot_be_classified_gets_a_sentence(client, image, serve, monkeypatch):
    for data, status, named in (
        (b"no image at all", 415, "not an image"),
        (b"", 415, "not an image"),
        (as_bytes(image)[:900], 415, "damaged"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "not an image"),
    ):
        answer = send(client, data)
        assert answer.status_code == status and named in answer.json()["detail"], answer.text
    assert client.post("/classify").status_code == 422
    monkeypatch.setattr(serve, "MAX_PIXELS", 1000)
    answer = send(client, as_bytes(image))
    assert answer.status_code == 413 and "megapixels" in answer.json()["detail"]


def test_size_is_limited_with_and_without_a_length(client, serve, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (120, 120, 3), np.uint8)
    large = as_bytes(Image.fromarray(noise), "PNG")
    assert send(client, large).status_code == 200
    monkeypatch.setattr(serve, "MAX_BYTES", 20_000)
    answer = send(client, large)
    assert answer.status_code == 413 and "larger than" in answer.json()["detail"]

    def chunks():
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        yield large
        yield b"\r\n--x--\r\n"

    head = {"content-type": "multipart/form-data; boundary=x"}
    assert client.post("/classify", content=chunks(), headers=head).status_code == 413


def test_page_and_health(client):
    page = client.get("/")
    assert page.status_code == 200 and "birds &amp; beasts" in page.text and "{{" not in page.text
    assert client.get("/healthz").json() == {"ok": True, "classes": 3}


@pytest.fixture
def address(app):
    """The app on a real port."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


DROP = """([bytes, name]) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([new Uint8Array(bytes)], name));
    document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, cancelable: true }));
}"""


@pytest.mark.slow  # starts a browser
def test_page_in_a_real_browser(address, exported, image, tmp_path):
    browsers = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs a Chromium or Chrome on the PATH")
    best = ONNXEfficientNet.from_pretrained(exported).classify(image)
    image.save(tmp_path / "image.png")
    (tmp_path / "notes.txt").write_text("no image")
    with browsers.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 800, "height": 900})
        complaints = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)

        page.set_input_files("#file", tmp_path / "image.png")
        page.wait_for_selector("#result li:nth-child(3)")
        assert page.locator(".name").all_inner_texts() == [entry["label"] for entry in best]
        assert page.locator(".share").first.inner_text() == f"{100 * best[0]['score']:.1f} %"
        widths = [page.locator(".bar").nth(i).evaluate("bar => bar.style.width") for i in range(3)]
        assert [float(width[:-1]) for width in widths] == pytest.approx([100 * e["score"] for e in best], abs=0.01)
        assert page.locator("#drop img").count() == 1 and page.locator("#problem").inner_text() == ""
        page.wait_for_timeout(400)
        page.screenshot(path=os.environ.get("EFFNET_HF_SCREENSHOT", tmp_path / "page.png"))

        page.evaluate(DROP, [list((tmp_path / "notes.txt").read_bytes()), "notes.txt"])
        page.wait_for_function("document.getElementById('problem').textContent")
        assert "not an image" in page.locator("#problem").inner_text()
        assert page.locator("#result li").count() == 0 and page.locator("#drop img").count() == 0

        page.evaluate(DROP, [list((tmp_path / "image.png").read_bytes()), "image.png"])
        page.wait_for_selector("#result li:nth-child(3)")
        assert page.locator("#problem").inner_text() == ""
        assert complaints == []
        browser.close()
