"""What good callers of examples/serve notice of bad ones: the figures of benchmarks/2026-11-26-serve.md.

    python benchmarks/serve_load.py --model runs/b0-onnx --images DIR --output serve.json

Starts the server and sends waves of good requests, all at once, first alone, then while as many bad clients do what
`bad_clients` lists, each again and again. Then the server is told to end while requests are half-sent and others wait
for their answers. Server and clients share the machine.
"""

import argparse
import asyncio
import collections
import contextlib
import io
import itertools
import os
import signal
import statistics
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Coroutine
from pathlib import Path

import numpy as np
import psutil
from lib.environment import environment, resolve_device
from lib.report import table, write_figures
from PIL import Image, features

from effnet_hf.cli import ArgumentParser, at_least, path, run
from effnet_hf.errors import UserError


APP = Path(__file__).parents[1] / "examples/serve/app.py"
PACKAGES = ("onnxruntime", "fastapi", "uvicorn", "h11", "pillow")
PATIENCE = 120  # seconds that a client waits for anything
MB = 2**20
ASK_HEALTH = """
import select, sys, time, urllib.request
while not select.select([sys.stdin], [], [], 0.1)[0]:
    start = time.perf_counter()
    with urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/healthz", timeout=100) as answer:
        answer.read()
    print(time.perf_counter() - start, flush=True)
"""
Client = Callable[[int], Coroutine[None, None, str]]  # takes the port; says how it ended


def head(length: int | None, kind: str = "image/jpeg", host: str = "localhost", path: str = "/classify") -> bytes:
    body = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\n{body}\r\n\r\n".encode()


def whole(data: bytes, **kwargs) -> bytes:
    return head(len(data), **kwargs) + data


def form(data: bytes, name: str = "image", before: bytes = b"") -> bytes:
    disposition = f'Content-Disposition: form-data; name="{name}"; filename="\x1b[2J.jpg"\r\n\r\n'.encode()
    body = before + b"--edge\r\n" + disposition + data + b"\r\n--edge--\r\n"
    return whole(body, kind="multipart/form-data; boundary=edge")


async def said(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    """Status and body of the answer; `closed` where the server hangs up."""
    try:
        answer = await asyncio.wait_for(reader.read(), PATIENCE)
    except TimeoutError:
        return "nothing", b""
    top, _, body = answer.partition(b"\r\n\r\n")
    return (top.split()[1].decode() if top.startswith(b"HTTP/") else "closed"), body


async def exchange(port: int, *pieces: bytes, pause: float = 0.0) -> tuple[str, bytes]:
    """Sends the pieces, `pause` seconds apart, and waits for the answer or for the end of the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        try:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                if pause and not reader.at_eof():
                    await asyncio.sleep(pause)
        except OSError:
            pass  # the server hung up; it may have said why
        return await said(reader)
    except OSError:
        return "closed", b""
    finally:
        writer.close()


def sends(*pieces: bytes, pause: float = 0.0) -> Client:
    async def client(port: int) -> str:
        return (await exchange(port, *pieces, pause=pause))[0]

    return client


def leaves(data: bytes) -> Client:
    """Sends a whole request and hangs up at once."""

    async def client(port: int) -> str:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(data)
        writer.close()
        return "left"

    return client


def does_not_read(data: bytes, seconds: float) -> Client:
    """Asks for answers and never looks at them."""

    async def client(port: int) -> str:
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        for _ in range(20):
            writer.write(data)
        await asyncio.sleep(seconds)
        writer.close()
        return "left"

    return client


def encoded(image: Image.Image, kind: str, **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


def many_scans(side: int, count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again: seconds of work in some kilobytes."""
    data = encoded(Image.new("RGB", (side, side)), "JPEG", progressive=True, subsampling=0)
    return data[:-2] + count * data[data.rfind(b"\xff\xda") : -2] + data[-2:]


def png_of_text(chunks: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(900_000)))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunks * text + chunk(b"IDAT", b"")


def bad_clients(good: bytes, side: int = 7000, seconds: float = 60.0) -> dict[str, tuple[Client, str]]:
    """Every kind of bad client, and how it should end: with a status, or `closed` where nothing was asked.

    Args:
        good: an image that can be classified.
        side: of the images that are too large for their files.
        seconds: how long those who dawdle would like to.
    """
    dribble = int(2 * seconds)
    broken = encoded(Image.new("RGB", (64, 64)), "AVIF")[:-9] if features.check("avif") else b"\0\0\0\x1cftypavif"
    grey16 = encoded(Image.fromarray(np.zeros((side, side), np.uint16)), "PNG")
    long = [b"100000\r\n" + bytes(MB) + b"\r\n"] * 12
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop"
    webp = encoded(Image.new("RGB", (side, side)), "WEBP", quality=1)
    edges = b"--edge\r\n\r\n\r\n" * 500_000
    return {
        # connections
        "sends nothing": (sends(pause=seconds), "408"),
        "sends its head slowly": (sends(*[b"GET / HTTP/1.1\r\nX: "], *[b"a"] * dribble, pause=0.5), "408"),
        "sends half a body": (sends(head(2 * len(good)), good), "408"),
        "sends its body slowly": (sends(head(MB), *[b"a"] * dribble, pause=0.5), "408"),
        "sends half a form": (sends(form(good)[:-20]), "408"),
        "sends no HTTP": (sends(b"\x16\x03\x01\x02\x00" * 9 + b"\r\n\r\n"), "400"),
        "sends a head of 1 MB": (sends(b"GET / HTTP/1.1\r\nX: " + b"a" * MB), "400"),
        "lies about its length": (sends(head(10**12), good), "413"),
        "leaves": (leaves(whole(good)), "left"),
        "does not read its answers": (does_not_read(whole(good), seconds / 10), "left"),
        "calls another host": (sends(whole(good, host="evil.example")), "400"),
        # bodies
        "sends 12 MB without a length": (sends(head(None), *long, b"0\r\n\r\n"), "413"),
        "sends 40,000 chunks of a byte": (sends(head(None), b"1\r\na\r\n" * 40_000, b"0\r\n\r\n"), "400"),
        "sends a form of 500,000 parts": (sends(whole(edges, kind="multipart/form-data; boundary=edge")), "422"),
        "sends a form with 9 MB in front": (sends(form(good, name="other", before=bytes(9 * MB) + b"\r\n")), "422"),
        # images
        "a 16-bit PNG of 49 megapixels": (sends(whole(grey16)), "200"),
        "a PNG of 196 megapixels": (sends(whole(encoded(Image.new("1", (2 * side, 2 * side)), "PNG"))), "413"),
        "a WebP of 49 megapixels": (sends(whole(webp)), "200"),
        "a JPEG of 9,000 scans": (sends(whole(many_scans(side // 2, 9000))), "413"),
        "a PNG with 72 MB of text": (sends(form(png_of_text(80))), "415"),
        "a broken AVIF": (sends(form(broken)), "415"),
        "a BLP": (sends(form(b"BLP2" + struct.pack("<i", 1) + b"\2\x08\0\0" + struct.pack("<II", 16, 16))), "415"),
        "an endless EPS": (sends(form(eps)), "415"),
        "half a JPEG": (sends(form(good[: len(good) // 2])), "415"),
        "a text": (sends(form(b"no image at all")), "415"),
    }


class Served:
    """The example in a process of its own.

    Attributes:
        peak: MB, the largest sum of the proportional set sizes of its processes that was seen.
    """

    def __init__(self, model: str):
        command = [sys.executable, str(APP), "--model", model, "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("http://"):
            raise UserError(f"the server does not start: {line or 'it said nothing.'}")
        self.port, self.peak = int(line.rsplit(":", 1)[1]), 0.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def megabytes(self) -> float:
        total, server = 0, psutil.Process(self.process.pid)
        for process in (server, *server.children(recursive=True)):
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                pass  # it was replaced
        self.peak = max(self.peak, total / 1e6)
        return total / 1e6

    async def watch(self) -> None:
        while True:
            await asyncio.to_thread(self.megabytes)
            await asyncio.sleep(0.1)


@contextlib.asynccontextmanager
async def health_asked(port: int, seconds: list[float]):
    """Fills `seconds` with how long /healthz took, asked ten times a second by a process that does nothing else."""
    arguments = [sys.executable, "-c", ASK_HEALTH, str(port)]
    asking = await asyncio.create_subprocess_exec(*arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield
    finally:
        output, _ = await asking.communicate(b"end")
        seconds += map(float, output.split())


async def wave(port: int, requests: list[bytes]) -> list[tuple[str, float]]:
    """Status and seconds of requests that are all sent at once."""

    async def one(request: bytes) -> tuple[str, float]:
        start = time.perf_counter()
        status, _ = await exchange(port, request)
        return status, time.perf_counter() - start

    return await asyncio.gather(*map(one, requests))


async def again_and_again(kind: str, client: Client, port: int, ends: dict[str, collections.Counter]) -> None:
    while True:
        ends[kind][await client(port)] += 1
        await asyncio.sleep(1)


async def measure(server: Served, images: list[bytes], waves: int, good: int, bad: int, kinds: dict) -> dict:
    """Waves of `good` requests while `bad` clients are there: their figures, and how the bad ones ended."""
    ends: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    health: list[float] = []
    found: list[tuple[str, float]] = []
    server.peak = 0.0
    tasks = [asyncio.create_task(server.watch())]
    async with health_asked(server.port, health):
        for _, (kind, (client, _)) in zip(range(bad), itertools.cycle(kinds.items())):
            tasks.append(asyncio.create_task(again_and_again(kind, client, server.port, ends)))
        await asyncio.sleep(2 if bad else 0)
        for number in range(waves):
            chosen = [images[(number * good + i) % len(images)] for i in range(good)]
            found += await wave(server.port, [form(data) for data in chosen])
    for task in tasks:
        task.cancel()
    for error in await asyncio.gather(*tasks, return_exceptions=True):
        if not isinstance(error, asyncio.CancelledError) and error is not None:
            raise error
    seconds = sorted(second for _, second in found)
    row = {
        "clients": f"{good} good" + (f", {bad} bad" if bad else " (baseline)"),
        "n": len(found),
        "failed": sum(status != "200" for status, _ in found),
        "p50, s": statistics.median(seconds),
        "p99, s": seconds[int(0.99 * len(seconds))],
        "longest, s": seconds[-1],
        "/healthz, longest, s": max(health),
        "peak memory, MB": server.peak,
        "load of the machine": os.getloadavg()[0],
    }
    return {"row": row, "ends": {kind: dict(counts) for kind, counts in ends.items()}}


async def end(server: Served, images: list[bytes], half_sent: int, good: int) -> dict:
    """SIGTERM while requests are half-sent and others are being answered."""
    half = [asyncio.create_task(exchange(server.port, form(images[0])[:-30])) for _ in range(half_sent)]
    await asyncio.sleep(3)
    requests = [form(images[i % len(images)]) for i in range(good)]
    there = [asyncio.create_task(exchange(server.port, request)) for request in requests]
    await asyncio.wait(there, return_when=asyncio.FIRST_COMPLETED)
    start = time.perf_counter()
    server.process.send_signal(signal.SIGTERM)
    code = await asyncio.to_thread(server.process.wait)
    seconds = time.perf_counter() - start
    answers = collections.Counter(status for status, _ in await asyncio.gather(*there))
    refused = collections.Counter(status for status, _ in await asyncio.gather(*half))
    return {"seconds": seconds, "exit code": code, "waiting for answers": dict(answers), "half-sent": dict(refused)}


def surprises(found: dict, kinds: dict) -> list[str]:
    """Kinds of bad clients that ended otherwise than they should. Two ends are never wrong: 503, and `closed`, because
    who is refused while he is still sending may not see why."""
    return [
        f"{kind}: {counts}, not {kinds[kind][1]}"
        for kind, counts in found["ends"].items()
        if not set(counts) <= {kinds[kind][1], "503", "closed"}
    ]


async def everything(arguments, images: list[bytes]) -> dict:
    kinds = bad_clients(images[0])
    with Served(arguments.model) as server:
        idle = server.megabytes()
        await measure(server, images, 1, 20, 0, kinds)  # warm
        found = []
        for bad in (0, arguments.bad):
            found.append(await measure(server, images, arguments.waves, arguments.good, bad, kinds))
            print(found[-1]["row"], flush=True)
        ended = await end(server, images, arguments.half_sent, arguments.good)
    odd = surprises(found[-1], kinds)
    rows = [entry["row"] for entry in found]
    return {"load": rows, "idle_mb": idle, "bad": found[-1]["ends"], "surprises": odd, "end": ended}


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=path, required=True, help="folder that `effnet-hf export` wrote")
    parser.add_argument("--images", type=path, required=True, help="folder of JPEG files for the good requests")
    parser.add_argument("--good", type=at_least(1), default=200, help="requests at once")
    parser.add_argument("--bad", type=at_least(1), default=200, help="bad clients at once")
    parser.add_argument("--waves", type=at_least(1), default=5, help="of good requests, one after the other")
    parser.add_argument("--half_sent", type=at_least(0), default=800, help="requests that are half-sent at the end")
    parser.add_argument("--output", type=path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    images = [path.read_bytes() for path in sorted(Path(arguments.images).rglob("*.[jJ][pP]*[gG]"))[:500]]
    if not images:
        raise UserError(f"--images {arguments.images} holds no JPEG file.")
    figures = {"kind": "serve", **environment(resolve_device("cpu", threads=1), PACKAGES)}
    figures |= asyncio.run(everything(arguments, images))
    print(f"\n{table(figures['load'])}\n\nbad: {figures['bad']}\nend: {figures['end']}")
    for line in figures["surprises"]:
        print(f"surprise: {line}")
    if arguments.output:
        write_figures(figures, arguments.output)
    return 0


if __name__ == "__main__":
    run(main)
