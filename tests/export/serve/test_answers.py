"""The serving example: its answers, what it refuses, and the page in a real browser."""

import json
import os
import shutil
import socket
import struct
import sys
import time

import numpy as np
import pytest
from PIL import Image, features
from transformers import pipeline

from effnet_hf import (
    EfficientNetNVForImageClassification,
    EfficientNetNVImageProcessor,
    image_processing_efficientnet_nv,
)
from effnet_hf.export import ONNXEfficientNet, export_model

from .conftest import HOSTS, Here, as_bytes, open_client, send


def test_image_gives_its_classes_best_first(client, exported, image):
    answer = send(client, as_bytes(image, "PNG"))
    assert answer.status_code == 200
    body = answer.json()
    assert (body["width"], body["height"]) == image.size
    assert body["predictions"] == ONNXEfficientNet.from_pretrained(exported).classify(image)
    scores = [entry["score"] for entry in body["predictions"]]
    assert scores == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1)


def test_of_several_labels_those_come_first_that_an_image_has(serve, workers, exported, image, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "onnx")
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config |= {"problem_type": "multi_label_classification", "thresholds": [0.0, 1.0, 0.0]}
    (folder / "config.json").write_text(json.dumps(config))
    client = open_client(serve.make_app(Here(workers, folder), hosts=HOSTS))
    told = send(client, as_bytes(image, "PNG")).json()["predictions"]
    assert [each["passed"] for each in told] == [True, True, False] and told[-1]["label"] == "cat"
    assert "not-passed" in client.get("/").text


def test_an_image_may_be_the_body(client, image):
    data = as_bytes(image, "PNG")
    expected = send(client, data).json()
    for kind in ("image/png", "image/anything", "application/octet-stream"):
        assert client.post("/classify", content=data, headers={"content-type": kind}).json() == expected


@pytest.mark.parametrize("setting", [{"crop_size": {"height": 64, "width": 96}}, {"do_normalize": False}], ids=str)
def test_images_are_prepared_as_the_folder_says(serve, workers, checkpoint, image, tmp_path, setting):
    shutil.copytree(checkpoint, tmp_path / "model")
    processor = EfficientNetNVImageProcessor(**{"size": 96, "crop_size": 64, **setting})
    processor.save_pretrained(tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "onnx")
    client = open_client(serve.make_app(Here(workers, tmp_path / "onnx"), hosts=HOSTS))
    found = send(client, as_bytes(image, "PNG")).json()["predictions"]
    model = EfficientNetNVForImageClassification.from_pretrained(tmp_path / "model")
    classify = pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    expected = {entry["label"]: entry["score"] for entry in classify(image)}
    assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["grey", "palette", "alpha", "turned", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
def test_every_kind_of_image_is_read(client, image, kind):
    modes = {"grey": "L", "palette": "P", "alpha": "RGBA"}
    data = as_bytes(image.convert(modes.get(kind, "RGB")), kind if kind.isupper() else "PNG")
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        data = as_bytes(image, "JPEG", exif=exif)
    answer = send(client, data)
    assert answer.status_code == 200
    size = image.size[::-1] if kind == "turned" else image.size
    assert (answer.json()["width"], answer.json()["height"]) == size


def broken(image) -> dict[str, tuple[bytes, str]]:
    avif = as_bytes(image, "AVIF") if features.check("avif") else b"\0\0\0\x1cftypavif\0\0\0\0"
    return {
        "text": (b"no image at all", "not an image"),
        "nothing": (b"", "not an image"),
        "half a JPEG": (as_bytes(image)[:900], "damaged"),
        "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop", "not an image"),
        "BLP": (b"BLP2" + struct.pack("<i", 1) + b"\2\x08\0\0" + struct.pack("<II", 16, 16), "not an image"),
        "ICO": (as_bytes(image, "ICO"), "not an image"),
        "half an AVIF": (avif[: len(avif) // 2], ""),
        "bent AVIF": (avif[:200] + bytes(byte ^ 85 for byte in avif[200:]), ""),
        "half a TIFF": (as_bytes(image, "TIFF")[:500], ""),
        "half a WebP": (as_bytes(image, "WEBP")[:300], ""),
        "half a GIF": (as_bytes(image, "GIF")[:300], ""),
        "half a BMP": (as_bytes(image, "BMP")[:300], ""),
        "half a PPM": (as_bytes(image, "PPM")[:300], ""),
        "PPM of words": (b"P3 9 9 255\nfour five six", ""),
    }


def test_what_cannot_be_classified_gets_a_sentence(client, image):
    for name, (data, named) in broken(image).items():
        answer = send(client, data)
        assert answer.status_code == 415 and named in answer.json()["detail"], (name, answer.text)


def test_a_damaged_file_of_every_format_is_no_error_of_ours(workers, here, image):
    random = np.random.default_rng(0)
    for kind in workers.FORMATS:
        if kind == "AVIF" and not features.check("avif"):
            continue
        data = as_bytes(image, kind)
        for _ in range(20):
            bent = bytearray(data)
            for place in random.integers(0, min(len(bent), 400), 4):
                bent[place] = random.integers(256)
            status, answer = workers.classified(here.model, bytes(bent), workers.QUICK)
            assert status in (200, 413, 415) and (status == 200 or answer["detail"].endswith(".")), answer


def test_pixels_and_memory_are_limited(workers, here, image, monkeypatch):
    grey = as_bytes(Image.fromarray(np.zeros((300, 300), np.uint16)), "PNG")
    assert workers.classified(here.model, grey, workers.QUICK)[0] == 200
    small = workers.Limits(80_000, workers.MB, 1)
    status, answer = workers.classified(here.model, grey, small)
    assert status == 413 and "megapixels" in answer["detail"]
    huge = as_bytes(Image.new("1", (20_000, 15_000)), "PNG")  # Pillow's own limit
    assert workers.classified(here.model, huge, workers.SLOW)[0] == 413

    def raises(error):
        def function(*_, **__):
            raise error

        return function

    session = type("Session", (), {"run": raises(RuntimeError("Failed to allocate memory for requested buffer"))})()
    for owner, name, value in (
        (here.model, "classify", raises(MemoryError())),
        (here.model, "session", session),
        (image_processing_efficientnet_nv, "to_rgb", raises(MemoryError())),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            status, answer = workers.classified(here.model, grey, workers.QUICK)
        assert status == 413 and "384 MB" in answer["detail"], name


def test_size_is_limited_with_and_without_a_length(client, serve, here, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (120, 120, 3), np.uint8)
    large = as_bytes(Image.fromarray(noise), "PNG")
    assert send(client, large).status_code == 200
    monkeypatch.setattr(serve, "MAX_BYTES", 20_000)
    here.calls, taken = 0, 0

    def chunks(last):
        nonlocal taken
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        for _ in range(last):
            taken += 1
            yield large
        yield b"\r\n--x--\r\n"

    form = {"content-type": "multipart/form-data; boundary=x"}
    raw = {"content-type": "image/png"}
    for answer in (
        send(client, large),
        client.post("/classify", content=large, headers=raw),
        client.post("/classify", content=chunks(1), headers=form),
        client.post("/classify", content=b"", headers=raw | {"content-length": str(10**12)}),
    ):
        assert answer.status_code == 413 and "larger than" in answer.json()["detail"]
    assert client.post("/classify", content=chunks(1000), headers=form).status_code == 413
    assert here.calls == 0


def disposition(text: str) -> bytes:
    return b"--x\r\nContent-Disposition: form-data; " + text.encode() + b"\r\n\r\n"


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (disposition('name="image"') + b"abc\r\n--x--\r\n", b"abc"),
        (disposition("name=image; filename*=utf-8''%1b.jpg") + b"abc\r\n--x--", b"abc"),
        (b"before\r\n" + disposition('name="image"') + b"a\r\n\r\nb\r\n--x--\r\nafter", b"a\r\n\r\nb"),
        (disposition('name="other"') + b"\r\n" + disposition('name="image"') + b"abc\r\n--x--\r\n", b"abc"),
        (disposition('name="other"; filename="name=image"') + b"abc\r\n--x--\r\n", None),
        (disposition('name="image"') + b"abc\r\n" + disposition('name="image"') + b"abc\r\n--x--\r\n", None),
        (disposition('name="image"') + b"abc", None),
        (disposition('name="image"')[2:] + b"abc\r\n--x--\r\n", None),
        (b"--x\r\n\r\n\r\n" * 100_000 + disposition('name="image"') + b"abc\r\n--x--\r\n", None),
        (b"\r\n" * 1_000_000, None),
        (b"", None),
    ],
    ids="plain unquoted preamble second other-name twice cut no-dashes many-parts lines empty".split(),
)
def test_a_form_is_read(client, serve, here, monkeypatch, body, found):
    got = []

    async def classify(data):
        got.append(data)
        return 200, {}

    monkeypatch.setattr(here, "classify", classify)
    start = time.perf_counter()
    answer = client.post("/classify", content=body, headers={"content-type": "multipart/form-data; boundary=x"})
    assert time.perf_counter() - start < 2
    assert got == ([] if found is None else [found])
    if found is None:
        assert answer.status_code == 422 and "one image" in answer.json()["detail"]


def test_other_bodies_are_refused(client):
    assert client.post("/classify").status_code == 422
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/mixed; boundary=x", "\x7f;;=", ""):
        answer = client.post("/classify", content=b"abc", headers={"content-type": kind})
        assert answer.status_code == 415 and "form field" in answer.json()["detail"]
    for boundary in ("", "; boundary=", "; boundary=" + 71 * "x"):
        head = {"content-type": f"multipart/form-data{boundary}"}
        assert client.post("/classify", content=b"abc", headers=head).status_code == 422


def test_page_health_and_no_description(client, serve, here):
    page = client.get("/")
    assert page.status_code == 200 and "birds &amp; beasts" in page.text and "{{" not in page.text
    assert client.get("/healthz").json() == {"ok": True, "classes": 3}
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert client.get(path).status_code == 404
    documented = open_client(serve.make_app(here, hosts=HOSTS, docs=True))
    for path in ("/docs", "/openapi.json"):
        assert documented.get(path).status_code == 200
        assert documented.get(path, headers={"host": "evil.example"}).status_code == 400


def test_a_server_without_a_model_says_so(client, here, image, monkeypatch):
    async def classify(data):
        return 503, {"detail": "no model."}

    here.is_ready = False
    monkeypatch.setattr(here, "classify", classify)
    for answer, said in (
        (client.get("/healthz"), "cannot open its model"),
        (send(client, as_bytes(image)), "no model."),
    ):
        assert answer.status_code == 503 and answer.headers["retry-after"] and said in answer.json()["detail"]


@pytest.mark.parametrize(
    ("host", "answered"),
    [
        ("localhost", True),
        ("LOCALHOST:8000", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("evil.example", False),
        ("evil.example:8000", False),
        ("localhost.evil.example", False),
        ("evil.example@localhost", False),
        ("localhost:8000@evil.example", False),
        ("127.0.0.2", False),
        ("[::1", False),
        ("", False),
    ],
)
def test_only_its_own_names_are_answered(client, image, host, answered):
    head = {"host": host, "content-type": "image/jpeg"}
    for method, path, status in (
        ("GET", "/healthz", 200),
        ("GET", "/", 200),
        ("POST", "/classify", 200),
        ("POST", "/classify/", 404),  # no redirect to a name that a caller chose
        ("GET", "/other", 404),
        ("PUT", "/classify", 405),
        ("OPTIONS", "/classify", 405),
    ):
        answer = client.request(method, path, content=as_bytes(image), headers=head, follow_redirects=False)
        assert answer.status_code == (status if answered else 400), (path, answer.text)
        if not answered:
            assert "that name" in answer.json()["detail"]


def test_a_server_for_all_addresses_answers_to_its_own(serve):
    assert serve.names_of("127.0.0.1") == set()
    names = serve.names_of("0.0.0.0")
    assert {"127.0.0.1", socket.gethostname()} <= names and "0.0.0.0" not in names


def test_labels_reach_a_terminal_as_ascii(client, here, image):
    here.model.config.id2label[0] = "\x1b[2J\x9b\u202egnp.<script>"
    answer = send(client, as_bytes(image), name="\x1b[2J.jpg")
    assert answer.content.isascii() and b"\x1b" not in answer.content
    assert "\x1b[2J\x9b\u202egnp.<script>" in {entry["label"] for entry in answer.json()["predictions"]}


def test_too_many_are_told_to_come_back(client, serve, here, image, monkeypatch):
    data = as_bytes(image)
    monkeypatch.setattr(serve, "MAX_WAITING", 0)
    answer = send(client, data)
    assert answer.status_code == 503 and answer.headers["retry-after"] == "5" and "waiting" in answer.json()["detail"]
    assert here.calls == 0
    monkeypatch.undo()
    monkeypatch.setattr(serve, "ALL_BYTES", 100)  # of one, it takes its share
    assert send(client, data).status_code == 503
    monkeypatch.undo()
    monkeypatch.setattr(serve, "WAIT_SECONDS", 0.2)
    here.may_answer.clear()
    assert send(client, data).status_code == 503
    here.may_answer.set()
    monkeypatch.undo()
    assert send(client, data).status_code == 200


def test_a_port_in_use_is_one_line(serve, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments in (["--port", str(port)], ["--port", "70000"], ["--host", "no.such.host.invalid"]):
            monkeypatch.setattr(sys, "argv", ["app.py", "--model", "m", *arguments])
            with pytest.raises(SystemExit) as stop:
                serve.main()
            err = capsys.readouterr().err
            assert stop.value.code == 2 and err.startswith("app.py: error: ") and err.count("\n") == 1


def test_a_model_that_cannot_be_opened_is_one_line(serve, monkeypatch, capsys):
    def classifier(folder):
        raise ValueError("none is not a folder.")

    monkeypatch.setattr(serve, "Classifier", classifier)
    monkeypatch.setattr(sys, "argv", ["app.py", "--model", "none", "--port", "0"])
    with pytest.raises(SystemExit) as stop:
        serve.main()
    assert stop.value.code == 2 and capsys.readouterr().err == "app.py: error: none is not a folder.\n"


def test_ctrl_c_while_it_loads_is_quiet(serve, monkeypatch, capsys):
    def classifier(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(serve, "Classifier", classifier)
    monkeypatch.setattr(sys, "argv", ["app.py", "--model", "m", "--port", "0"])
    with pytest.raises(SystemExit) as stop:
        serve.main()
    assert stop.value.code == 130 and capsys.readouterr() == ("", "")


def test_a_wrong_flag_is_one_line(serve, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["app.py", "--model", "m", "--prot\x1b[2J\n", "ü"])
    with pytest.raises(SystemExit):
        serve.main()
    assert capsys.readouterr().err == "app.py: error: unrecognized arguments: --prot\\x1b[2J\\n ü\n"


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
