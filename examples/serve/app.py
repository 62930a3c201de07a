"""A page that classifies images with an exported folder: drop one, see the five likeliest classes, or the
labels that pass.

    pip install -e '.[onnx,serve]'
    effnet-hf export --model runs/b0 --output_dir runs/b0-onnx
    python examples/serve/app.py --model runs/b0-onnx              then open http://127.0.0.1:8000

    curl -F image=@cat.jpg http://127.0.0.1:8000/classify          the same as JSON
    curl -H 'Content-Type: image/jpeg' --data-binary @cat.jpg http://127.0.0.1:8000/classify

An example to start from, for Linux and macOS: no accounts, no encryption. This process reads requests, counts and times
them, and never looks into an image, which processes of their own do (workers.py); it imports neither torch nor our
package.
"""

import argparse
import asyncio
import contextlib
import html
import json
import re
import resource
import socket
import sys
from pathlib import Path
from typing import Any

import h11
import psutil
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol
from workers import MB, Classifier


MAX_BYTES = 10 * MB  # of an image
ALL_BYTES = 128 * MB  # of all images that are being sent or wait; small ones are taken up to twice of it
MAX_WAITING = 500  # complete requests that are not answered yet
MAX_CONNECTIONS = 1000
SEND_SECONDS = 30  # from a connection's beginning to its request's last byte
WAIT_SECONDS = 60  # from there to its answer
LINGER_SECONDS = 2  # in which a client that was answered may go on sending, to nobody
GRACE_SECONDS = 5  # for the requests that are there when the server is told to end
PAGE = Path(__file__).with_name("page.html")
LOCAL = ("localhost", "127.0.0.1", "::1")


def make_app(classifier, name: str = "EfficientNet", hosts=LOCAL, docs: bool = False) -> FastAPI:
    """`GET /` is the page, `POST /classify` takes one image, as form field `image` or as the body.

    Every refusal is JSON whose `detail` is a sentence: 400 for a Host that is none of `hosts`, 413 for an image that is
    too large to send or to open, 415 for what is no image, 422 for a form without one, 500 where the
    model gives no answer, 503 with Retry-After when too many wait or there is no model. `docs` adds FastAPI's /docs.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        classifier.close()

    # Without a description of the interface there is no page about it.
    openapi_url = "/openapi.json" if docs else None
    app = FastAPI(title=name, lifespan=lifespan, openapi_url=openapi_url, redirect_slashes=False)
    app.add_middleware(KnownHost, hosts=hosts)
    page = PAGE.read_text("utf-8").replace("{{name}}", html.escape(name))
    held: dict[Request, int] = {}  # bytes of the images that are being sent or wait
    waiting: set[Request] = set()

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=400)  # nobody reads it

    @app.get("/", response_class=HTMLResponse)
    async def show_page() -> str:
        return page

    @app.get("/healthz")
    async def healthz() -> dict:
        if not classifier.ready():
            raise busy("The server cannot open its model; its stderr says why.")
        return {"ok": True, "classes": classifier.classes}

    @app.post("/classify")
    async def classify(request: Request) -> Response:
        try:
            image = image_of(await read(request), request.headers.get("content-type", ""))
            if len(waiting) >= MAX_WAITING:
                raise busy()
            waiting.add(request)
            status, answer = await answered(request, image)
            if status == 503:
                raise busy(answer["detail"])
            return Response(json.dumps(answer), status, media_type="application/json")
        except asyncio.CancelledError:  # the time to end is over
            raise busy("The server is ending.") from None
        finally:
            held.pop(request, None)
            waiting.discard(request)

    async def read(request: Request) -> bytes:
        body, most = bytearray(), MAX_BYTES + 16_384  # the lines of a form
        if int(request.headers.get("content-length") or 0) > most:
            raise too_large()
        async for chunk in request.stream():
            body += chunk
            held[request] = len(body)
            if len(body) > most:
                raise too_large()
            if sum(held.values()) > ALL_BYTES and len(body) > ALL_BYTES // len(held):
                raise busy()  # of many, those who send more than their share
        return bytes(body)

    async def answered(request: Request, image: bytes) -> tuple[int, dict]:
        """What the classifier says, unless the client leaves or it takes too long."""

        async def leaves() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        result, left = asyncio.ensure_future(classifier.classify(image)), asyncio.ensure_future(leaves())
        try:
            await asyncio.wait({result, left}, timeout=WAIT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if result.done():
                return result.result()
            if left.done():
                raise ClientDisconnect
            raise busy()
        finally:
            result.cancel()
            left.cancel()

    return app


class KnownHost:
    """Refuses every request for a name that is none of `hosts`, whatever its path: a page of somebody else's may have
    led a browser here by its own name."""

    def __init__(self, app, hosts):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope, receive, send) -> None:
        app = self.app
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host", "").lower()
            found = re.fullmatch(r"(?:\[([\da-f:.]+)\]|([\w.-]+))(?::\d+)?", host)
            if not found or (found[1] or found[2]) not in self.hosts:
                detail = "This server does not answer to that name; --allow_host adds one."
                app = JSONResponse({"detail": detail}, 400)
        await app(scope, receive, send)


def image_of(body: bytes, content_type: str) -> bytes:
    """The image in a request's body.

    A form is split here: the library's parser walks through it in Python, byte by byte where it is made to.
    """
    kind, options = parse_options_header(content_type)
    if kind.startswith(b"image/") or kind == b"application/octet-stream":
        image = body
    elif kind == b"multipart/form-data" or not body:
        boundary = options.get(b"boundary", b"")
        parts = (b"\r\n" + body).split(b"\r\n--" + boundary, 32)[1:-1] if 1 <= len(boundary) <= 70 else []
        images = [content for head, _, content in (part.partition(b"\r\n\r\n") for part in parts) if names_image(head)]
        if len(images) != 1:
            raise HTTPException(422, "Send one image as the form field `image`.")
        image = images[0]
    else:
        raise HTTPException(415, "Send the form field `image`, or an image as the body with its Content-Type.")
    if len(image) > MAX_BYTES:
        raise too_large()
    return image


def names_image(head: bytes) -> bool:
    for line in head[:4096].split(b"\r\n"):
        key, _, value = line.partition(b":")
        if key.strip().lower() == b"content-disposition":
            return parse_options_header(value)[1].get(b"name") == b"image"
    return False


def too_large() -> HTTPException:
    return HTTPException(413, f"The image is larger than {MAX_BYTES // MB} MB.")


def busy(sentence: str = "Too many images are waiting; try again in some seconds.") -> HTTPException:
    return HTTPException(503, sentence, {"Retry-After": "5"})


class Lingering:
    """A transport that hears its client out for a moment when it is closed: one that is still sending would otherwise
    be cut off before it has read its answer."""

    def __init__(self, transport, loop):
        self.transport, self.loop, self.closed = transport, loop, False

    def __getattr__(self, name: str):
        return getattr(self.transport, name)

    def is_closing(self) -> bool:
        return self.closed or self.transport.is_closing()

    def write(self, data: bytes) -> None:
        if not self.closed:
            self.transport.write(data)

    def close(self) -> None:
        if not self.is_closing():
            self.closed = True
            self.loop.call_later(LINGER_SECONDS, self.transport.abort)
            with contextlib.suppress(OSError):  # the client is gone already
                self.transport.write_eof()
                self.transport.resume_reading()


class Connection(H11Protocol):
    """uvicorn's connection with the limits that uvicorn lacks: how many there are, how long a request may be sent, and
    how much of what is sent may be something else than a body."""

    def connection_made(self, transport) -> None:
        lingering: Any = Lingering(transport, self.loop)
        super().connection_made(lingering)
        self.since, self.inside, self.around = self.loop.time(), 0, 0  # bytes of the body, and others
        self.timers = [
            self.loop.call_later(SEND_SECONDS, self.check_sent),
            self.loop.call_later(2 * (SEND_SECONDS + WAIT_SECONDS), transport.abort),  # it does not read its answer
        ]
        if len(self.connections) > MAX_CONNECTIONS:  # whoever has been sending for longest makes room
            there = [one for one in self.connections if isinstance(one, Connection) and not one.transport.is_closing()]
            if len(there) > MAX_CONNECTIONS:
                min((one for one in there if one.is_sending()), key=lambda one: one.since).transport.abort()

    def data_received(self, data: bytes) -> None:
        """In pieces, because of chunks of one byte: 300 KB of them would keep this process busy for a second."""
        while data and not self.transport.is_closing():
            cycle = self.cycle
            plain = cycle is not None and all(name != b"transfer-encoding" for name, _ in cycle.scope["headers"])
            size = len(data) if plain else 512 + self.inside // 100
            piece, data = data[:size], data[size:]
            before = len(cycle.body) if cycle else 0
            super().data_received(piece)
            if cycle and not plain:
                self.inside += len(cycle.body) - before
                self.around += len(piece) - (len(cycle.body) - before)
                if self.around > 1024 + self.inside // 100:
                    self.refuse("400 Bad Request", "The request has too much around its body; send larger chunks.")

    def is_sending(self) -> bool:
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def check_sent(self) -> None:
        if self.is_sending():
            self.refuse("408 Request Timeout", f"The request was not there after {SEND_SECONDS} s.")

    def send_400_response(self, msg: str) -> None:
        self.refuse("400 Bad Request", msg)

    def refuse(self, status: str, sentence: str) -> None:
        if not self.transport.is_closing() and not (self.cycle and self.cycle.response_started):
            body = json.dumps({"detail": sentence})
            head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            self.transport.write(f"{head}Connection: close\r\n\r\n{body}".encode())
        self.transport.close()
        if self.cycle:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def shutdown(self) -> None:
        """The server ends: what is there is still answered, what is being sent is not."""
        if self.transport.is_closing():
            self.transport.abort()
        elif self.is_sending():
            self.refuse("503 Service Unavailable", "The server is ending.")
        else:
            super().shutdown()

    def connection_lost(self, exc) -> None:
        for timer in self.timers:
            timer.cancel()
        super().connection_lost(exc)


def names_of(host: str) -> set[str]:
    """Of an address that stands for all of this machine's: these, and the machine's names."""
    if host not in ("0.0.0.0", "::"):
        return set()
    addresses = {entry.address.partition("%")[0] for entries in psutil.net_if_addrs().values() for entry in entries}
    return {socket.gethostname(), socket.getfqdn(), *addresses}


class OneLineErrors(argparse.ArgumentParser):
    def error(self, message: str):
        shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in message)
        self.exit(2, f"{self.prog}: error: {shown}\n")


def main() -> None:
    try:
        serve()
    except KeyboardInterrupt:  # while it loads; later the server ends by it when all is answered
        sys.exit(130)


def serve() -> None:
    parser = OneLineErrors(description="Serve a page that classifies images.", allow_abbrev=False)
    parser.add_argument("--model", required=True, help="folder that `effnet-hf export` wrote, or a Hub id of one")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=8000, help="where to listen; 0 chooses one that is free")
    parser.add_argument("--allow_host", nargs="+", default=[], help="more names that this server answers to")
    parser.add_argument("--docs", action="store_true", help="add FastAPI's page about the interface, /docs")
    args = parser.parse_args()
    hosts = {name.lower() for name in (*LOCAL, args.host, *args.allow_host, *names_of(args.host))}
    try:
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        listener = socket.create_server((args.host, args.port), family=family)
    except (OSError, OverflowError) as error:
        parser.error(f"cannot listen on --host {args.host} --port {args.port}: {error}")
    try:
        classifier = Classifier(args.model)
    except (EOFError, ValueError) as error:
        parser.error(str(error) or "no image can be classified; what went wrong stands above")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 4 * MAX_CONNECTIONS), most))
    app = make_app(classifier, Path(args.model).name, hosts, args.docs)
    name = f"[{args.host}]" if ":" in args.host else args.host
    print(f"http://{name}:{listener.getsockname()[1]}", flush=True)
    Server(configuration(app)).run(sockets=[listener])


def configuration(app: FastAPI) -> Config:
    return Config(
        app,
        http=Connection,
        ws="none",
        backlog=MAX_CONNECTIONS,
        headers=[("Connection", "close")],  # one request each: one time limit for all that a client can drag out
        timeout_graceful_shutdown=GRACE_SECONDS,
        log_level="error",
    )


if __name__ == "__main__":
    main()
