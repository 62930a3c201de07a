"""Images are opened here, in processes of their own that the system limits in memory and time.

A file of a few kilobytes can take gigabytes or minutes to open, and a damaged one can crash a decoder. A process that
does is replaced, and its image refused; the server itself never looks into one.
"""

import asyncio
import contextlib
import io
import json
import multiprocessing
import os
import queue
import resource
import signal
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image


MB = 2**20
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")  # others start programs (EPS) or are rare
PROCESSES = multiprocessing.get_context("forkserver")  # a new one takes no imports: tenths of a second


class Limits(NamedTuple):
    """What one image may take in a lane."""

    pixels: int
    memory: int  # bytes above what the process has when the model is loaded
    seconds: int  # of processor time


# WebP takes 16 bytes a pixel, the most of all; the quick ones also keep what the image before has left behind.
QUICK = Limits(13_000_000, 384 * MB, 1)
SLOW = Limits(50_000_000, 1024 * MB, 5)


def classified(model, data: bytes, limits: Limits) -> tuple[int, dict]:
    """Status and answer for one image."""
    from effnet_hf.image_processing_efficientnet_nv import to_rgb

    too_large = 413, {"detail": f"The image has more than {limits.pixels // 10**6} megapixels."}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opened = Image.open(io.BytesIO(data), formats=FORMATS)
            if opened.width * opened.height > limits.pixels:
                return too_large
            image = to_rgb(opened)
    except Image.DecompressionBombError:
        return too_large
    except MemoryError:
        return 413, {"detail": f"The image takes more than {limits.memory // MB} MB to open."}
    except Image.UnidentifiedImageError:
        return 415, {"detail": f"This file is not an image that can be read ({', '.join(FORMATS)})."}
    except Exception:  # Pillow's plugins raise OSError, SyntaxError, struct.error, RuntimeError, … on bad bytes
        return 415, {"detail": "This image is damaged and cannot be read."}
    return 200, {"width": image.width, "height": image.height, "predictions": model.classify(image, top_k=5)}


def work(pipe, folder: str, limits: Limits) -> None:
    """The life of a process that opens images: bytes come in, JSON goes out, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too; the server ends it when all is answered
    from effnet_hf.errors import UserError
    from effnet_hf.export import ONNXEfficientNet
    from effnet_hf.hub import download

    try:
        if not Path(folder).exists() and folder.count("/") == 1:
            folder = str(download(folder, patterns=["*.json", "*.onnx", "*.onnx_data"]))
        model = ONNXEfficientNet.from_pretrained(folder, threads=1)
    except UserError as error:
        pipe.send_bytes(json.dumps({"problem": str(error)}).encode())
        return
    model.classify(Image.new("RGB", (64, 64)))  # what the first one takes is no image's fault
    if limits == SLOW:
        os.nice(5)  # small images first
    with contextlib.suppress(OSError, StopIteration):  # Linux; macOS sets no such limit
        lines = Path("/proc/self/status").read_text().splitlines()
        used = 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmData:")))
        resource.setrlimit(resource.RLIMIT_DATA, (used + limits.memory, resource.RLIM_INFINITY))
    pipe.send_bytes(json.dumps({"classes": model.config.num_labels, "folder": folder}).encode())
    with contextlib.suppress(EOFError, OSError):  # the server is gone
        while True:
            data = pipe.recv_bytes()
            signal.setitimer(signal.ITIMER_PROF, limits.seconds)  # its signal ends the process, in any library
            answer = classified(model, data, limits)
            signal.setitimer(signal.ITIMER_PROF, 0)
            pipe.send_bytes(json.dumps(answer).encode())  # ASCII: a label's control characters stay escaped


class Worker:
    """A process that opens images, and its next one when it is lost."""

    def __init__(self, folder: str, limits: Limits):
        self.folder, self.limits, self.closed = folder, limits, False
        self.start()

    def start(self) -> None:
        self.pipe, theirs = PROCESSES.Pipe()
        self.process = PROCESSES.Process(target=work, args=(theirs, self.folder, self.limits), daemon=True)
        self.process.start()
        theirs.close()
        self.classes = 0  # until it has loaded the model

    def wait(self) -> None:
        """Until it can classify.

        Raises:
            ValueError: the folder cannot be opened; says why.
        """
        if not self.classes:
            hello = json.loads(self.pipe.recv_bytes())
            if "problem" in hello:
                raise ValueError(hello["problem"])
            self.classes, self.folder = hello["classes"], hello["folder"]  # which may be a copy of one from the Hub

    def classify(self, data: bytes) -> tuple[int, dict]:
        try:
            self.wait()
            self.pipe.send_bytes(data)
            if not self.pipe.poll(10 * self.limits.seconds):  # waits for something else than the processor
                self.process.kill()
            answer = tuple(json.loads(self.pipe.recv_bytes()))
            if self.limits == SLOW:
                self.process.kill()  # the next one needs all of the memory
                self.start()
            return answer
        except ValueError:
            self.start()
            return 500, {"detail": "The server cannot open its model any more."}
        except (EOFError, OSError):
            self.process.join()
            if self.closed:
                return 503, {"detail": "The server is ending."}
            code = self.process.exitcode
            self.start()
            if code in (-signal.SIGPROF, -signal.SIGKILL):
                return 413, {"detail": f"The image takes more than {self.limits.seconds} s to open."}
            if code == 1:  # an exception that is no image's; its traceback is on stderr
                return 500, {"detail": "The model does not take this image."}
            return 415, {"detail": "This image is damaged and cannot be read."}

    def close(self) -> None:
        self.closed = True
        self.process.kill()


class Lane:
    """Some workers with the same limits; images wait in line for them."""

    def __init__(self, folder: str, limits: Limits, size: int):
        self.workers = [Worker(folder, limits) for _ in range(size)]
        self.free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self.workers:
            self.free.put(worker)
        self.threads = ThreadPoolExecutor(size)  # each waits for one worker

    def classify(self, data: bytes) -> tuple[int, dict]:
        worker = self.free.get()
        try:
            return worker.classify(data)
        finally:
            self.free.put(worker)


class Classifier:
    """A quick lane with a worker a core, and a slow one for what that refuses as too large, one image at a time: large
    images keep nobody waiting but each other, and the memory of all is bounded."""

    def __init__(self, folder: str | os.PathLike):
        PROCESSES.set_forkserver_preload(["effnet_hf.export.runtime", "onnxruntime", "uvicorn", "fastapi"])
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.lanes = [Lane(str(folder), QUICK, cores), Lane(str(folder), SLOW, 1)]
        for lane in self.lanes:
            for worker in lane.workers:
                worker.wait()
        self.classes = self.lanes[0].workers[0].classes

    async def classify(self, data: bytes) -> tuple[int, dict]:
        for lane in self.lanes:
            status, answer = await asyncio.get_running_loop().run_in_executor(lane.threads, lane.classify, data)
            if status != 413:
                break
        return status, answer

    def close(self) -> None:
        for lane in self.lanes:
            lane.threads.shutdown(wait=False, cancel_futures=True)
            for worker in lane.workers:
                worker.close()
