"""The serving example's connections: callers who dawdle, flood, lie or leave, and the end of the server."""

import asyncio
import json
import shutil
import signal
import time

import numpy as np
import pytest
from PIL import Image

from .conftest import as_bytes, dial, heard


@pytest.mark.parametrize("sent", ["nothing", "half a head", "half a body", "half a form", "half the chunks"])
def test_who_does_not_finish_is_told(server, serve, load, image, monkeypatch, sent):
    monkeypatch.setattr(serve, "SEND_SECONDS", 0.4)
    data = as_bytes(image)
    pieces = {
        "nothing": [],
        "half a head": [b"GET / HTTP/1.1\r\nHost: "],
        "half a body": [load.head(2 * len(data)) + data],
        "half a form": [load.form(data)[:-5]],
        "half the chunks": [load.head(None) + b"5\r\nabcde\r\n"],
    }
    start = time.perf_counter()
    status, body = heard(dial(server, *pieces[sent]))
    assert status == 408 and "was not there" in body["detail"] and time.perf_counter() - start < 5
    assert heard(dial(server, load.whole(data)))[0] == 200


def test_a_connection_carries_one_request(server, load, image):
    """Else a client could hold a connection with answered requests."""
    status, body = heard(dial(server, 3 * load.whole(as_bytes(image))))
    assert status == 200 and body["width"] == image.width


def test_who_is_refused_while_sending_sees_why(server, load):
    body = bytes(8_000_000)
    for status, request in (
        (400, load.whole(body, host="evil.example")),
        (404, load.whole(body, path="/other")),
        (413, load.whole(body + body, kind="image/png")),
        (413, load.head(None) + 12 * (b"100000\r\n" + bytes(2**20) + b"\r\n")),
        (415, load.whole(body, kind="text/plain")),
        (400, load.head(None) + b"1\r\na\r\n" * 400_000),
        (400, b"GET / HTTP/1.1\r\nX: " + body),
    ):
        found, answer = heard(dial(server, request))
        assert found == status and answer["detail"], (status, found)


def test_chunks_of_one_byte_are_refused_early(server, load):
    start = time.process_time()
    status, body = heard(dial(server, load.head(None), b"1\r\na\r\n" * 40_000))
    assert status == 400 and "larger chunks" in body["detail"] and time.process_time() - start < 0.5
    data = bytes(300_000)
    chunks = [b"400\r\n" + data[i : i + 1024] + b"\r\n" for i in range(0, 299_008, 1024)]
    assert heard(dial(server, load.head(None), *chunks, b"0\r\n\r\n"))[0] == 415  # read, and no image


def test_what_is_no_http_is_refused_in_json(server):
    status, body = heard(dial(server, b"\x16\x03\x01\x02\x00\r\n\r\n"))
    assert status == 400 and body["detail"]
    assert heard(dial(server, b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n"))[0] == 400


def test_the_slowest_sender_makes_room(server, serve, load, image, monkeypatch):
    monkeypatch.setattr(serve, "MAX_CONNECTIONS", 5)
    data = as_bytes(image)
    slow = [dial(server, load.head(2 * len(data)) + data) for _ in range(5)]
    time.sleep(0.2)
    for _ in range(3):
        assert heard(dial(server, load.whole(data)))[0] == 200
    assert heard(slow[0]) == (None, {})
    slow[4].sendall(data)
    assert heard(slow[4])[0] in (200, 415)  # the youngest were kept; twice a JPEG is one with something behind it


def test_a_share_is_all_that_one_of_many_gets(server, serve, load, image, monkeypatch):
    data = as_bytes(image)
    monkeypatch.setattr(serve, "ALL_BYTES", 300_000)
    greedy = [dial(server, load.head(2_000_000), bytes(140_000)) for _ in range(2)]
    time.sleep(0.3)
    greedy.append(dial(server, load.head(2_000_000), bytes(140_000)))
    assert heard(greedy[2])[0] == 503
    assert heard(dial(server, load.whole(data)))[0] == 200


def test_who_leaves_is_not_waited_for(server, here, load, image, caplog):
    here.may_answer.clear()
    caller = dial(server, load.whole(as_bytes(image)))
    while not here.calls:
        time.sleep(0.02)
    caller.close()
    deadline = time.monotonic() + 10
    while server.server_state.tasks and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not server.server_state.tasks and not caplog.records
    here.may_answer.set()


def test_the_end_waits_for_answers_but_not_for_senders(server, serve, here, load, image, monkeypatch, caplog):
    monkeypatch.setattr(serve, "GRACE_SECONDS", 2)
    data = as_bytes(image)
    here.may_answer.clear()
    half = [dial(server, load.head(2 * len(data)) + data) for _ in range(20)] + [dial(server) for _ in range(20)]
    there = dial(server, load.whole(data))
    while not here.calls:
        time.sleep(0.02)
    start = time.perf_counter()
    server.should_exit = True
    for caller in half:
        assert heard(caller)[0] == 503
    assert server.thread.is_alive()
    here.may_answer._loop.call_soon_threadsafe(here.may_answer.set)
    assert heard(there)[0] == 200
    server.thread.join(10)
    assert not server.thread.is_alive() and time.perf_counter() - start < 5
    assert here.closed and not caplog.records


def test_the_end_does_not_wait_for_ever(server, here, load, image, caplog):
    server.config.timeout_graceful_shutdown = 1
    here.may_answer.clear()
    there = dial(server, load.whole(as_bytes(image)))
    while not here.calls:
        time.sleep(0.02)
    server.should_exit = True
    status, body = heard(there)
    assert status == 503 and "ending" in body["detail"]
    server.thread.join(10)
    assert not server.thread.is_alive()


@pytest.fixture(scope="module")
def served(load, exported):
    with load.Served(str(exported)) as served:
        yield served


def ask(load, served, request: bytes) -> tuple[int, dict]:
    status, body = asyncio.run(load.exchange(served.port, request))
    return int(status), json.loads(body)


@pytest.mark.slow  # starts the server: its processes import torch
def test_an_image_that_is_slow_or_kills_its_process_is_refused_alone(load, served, image):
    good = load.form(as_bytes(image))
    assert ask(load, served, good)[0] == 200
    status, body = ask(load, served, load.form(load.many_scans(3500, 9000)))
    assert status == 413 and "5 s" in body["detail"]
    for side, status in ((5000, 200), (7000, 200), (7200, 413)):  # of 25, 49 and 52 megapixels
        deep = as_bytes(Image.fromarray(np.zeros((side, side), np.uint16)), "PNG")
        assert ask(load, served, load.form(deep))[0] == status
    assert ask(load, served, good)[0] == 200


@pytest.mark.slow  # starts the server: its processes import torch
def test_a_good_image_is_answered_whatever_becomes_of_the_processes(load, exported, image, tmp_path):
    good, health = load.form(as_bytes(image)), b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    folder = shutil.copytree(exported, tmp_path / "onnx")

    def send_all(sent: signal.Signals, server: bool = False) -> None:
        for child in load.psutil.Process(served.process.pid).children():  # the one that starts the others
            for process in [*child.children(), *([child] if server else [])]:
                process.send_signal(sent)

    with load.Served(str(folder)) as served:
        for sent, server in ((signal.SIGKILL, False), (signal.SIGTERM, False), (signal.SIGKILL, True)):
            send_all(sent, server)
            assert [ask(load, served, good)[0] for _ in range(4)] == [200] * 4
        send_all(signal.SIGSTOP)
        assert ask(load, served, good)[0] == 200
        folder.rename(tmp_path / "away")
        send_all(signal.SIGKILL)
        assert {ask(load, served, good)[0] for _ in range(16)} == {503}
        assert ask(load, served, health)[0] == 503
        (tmp_path / "away").rename(folder)
        deadline = time.monotonic() + 30
        while ask(load, served, health)[0] == 503 and time.monotonic() < deadline:  # mends it without an image
            time.sleep(0.1)
        assert [ask(load, served, good)[0] for _ in range(4)] == [200] * 4


@pytest.mark.slow  # starts the server: its processes import torch
def test_good_callers_do_not_notice_bad_ones(load, served, image):
    images = [as_bytes(image)]
    kinds = load.bad_clients(images[0])
    found = asyncio.run(load.measure(served, images, 3, 20, len(kinds), kinds))
    assert found["row"]["failed"] == 0 and found["row"]["n"] == 60
    assert found["row"]["/healthz, longest, s"] < 10  # of a machine that runs other tests
    assert load.surprises(found, kinds) == []
    ended = asyncio.run(load.end(served, images, half_sent=100, good=20))
    assert ended["seconds"] < 10 and ended["waiting for answers"] == {"200": 20}
