"""What the tests of the serving example share: the example and its load test as modules, and callers."""

import asyncio
import importlib
import io
import json
import socket
import threading
import time
import warnings
from pathlib import Path

import pytest

from effnet_hf.export import ONNXEfficientNet


pytest.importorskip("fastapi", reason="needs the serve extra")
pytest.importorskip("httpx", reason="FastAPI's test client needs it")
ROOT = Path(__file__).parents[3]
APP = ROOT / "examples/serve/app.py"


def imported(path: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path.parent))
        return importlib.import_module(path.stem)


@pytest.fixture(scope="module")
def serve():
    return imported(APP)


@pytest.fixture(scope="module")
def workers(serve):
    return importlib.import_module("workers")


@pytest.fixture(scope="module")
def load():
    return imported(ROOT / "benchmarks/serve_load.py")


class Here:
    """The example's classifier without its processes."""

    def __init__(self, workers, folder):
        self.model, self.workers = ONNXEfficientNet.from_pretrained(folder), workers
        self.classes, self.closed, self.calls = self.model.config.num_labels, False, 0
        self.is_ready, self.may_answer = True, asyncio.Event()
        self.may_answer.set()

    async def classify(self, data: bytes) -> tuple[int, dict]:
        self.calls += 1
        await self.may_answer.wait()
        return self.workers.classified(self.model, data, self.workers.SLOW)

    def ready(self) -> bool:
        return self.is_ready

    def close(self) -> None:
        self.closed = True


HOSTS = ("testserver", "localhost", "127.0.0.1", "::1")


@pytest.fixture
def here(workers, exported):
    return Here(workers, exported)


@pytest.fixture
def app(serve, here):
    return serve.make_app(here, "birds & beasts", HOSTS)


@pytest.fixture
def client(app):
    return open_client(app)


def open_client(app):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it would rather have httpx2
        from fastapi.testclient import TestClient

    return TestClient(app)


def as_bytes(image, kind="JPEG", **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


def send(client, data: bytes, name="image.jpg"):
    return client.post("/classify", files={"image": (name, data)})


@pytest.fixture
def server(serve, app):
    """The app on a real port, with the example's own settings."""
    listener = socket.create_server(("127.0.0.1", 0))
    running = serve.Server(serve.configuration(app))
    thread = threading.Thread(target=running.run, args=([listener],), daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not running.started and time.monotonic() < deadline:
        time.sleep(0.02)
    running.port, running.thread = listener.getsockname()[1], thread
    yield running
    running.should_exit = True
    thread.join(15)
    assert not thread.is_alive()


@pytest.fixture
def address(server):
    return f"http://127.0.0.1:{server.port}"


def dial(server, *pieces: bytes) -> socket.socket:
    caller = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    for piece in pieces:
        caller.sendall(piece)
    return caller


def heard(caller: socket.socket) -> tuple[int | None, dict]:
    """Status and JSON of the answer, once the server has hung up; None if it said nothing."""
    answer = b""
    try:
        while piece := caller.recv(65_536):
            answer += piece
    except ConnectionError:
        pass
    caller.close()
    top, _, body = answer.partition(b"\r\n\r\n")
    return (int(top.split()[1]), json.loads(body)) if answer else (None, {})
