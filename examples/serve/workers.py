"""Images are opened here, in processes of their own that the system limits in memory and time.

A file of a few kilobytes can take gigabytes or minutes to open, and a damaged one can crash a decoder. A process that
does is replaced, and its image refused; the server itself never looks into one. Where a process was lost for another
reason, its image is tried again in the next one.
"""

import argparse
import asyncio
import contextlib
import io
import json
import multiprocessing
import os
import queue
import resource
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import resource_tracker
from pathlib import Path
from typing import NamedTuple

from PIL import Image


MB = 2**20
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")  # others start programs (EPS) or are rare
PROCESSES = multiprocessing.get_context("forkserver")  # a new one takes no imports: tenths of a second
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)  # a decoder's own doing
PATIENCE = 10  # times the processor's time: how long to wait for a process that something else keeps


class Limits(NamedTuple):
    """What one image may take in a lane."""

    pixels: int
    memory: int  # bytes above what the process has when the model is loaded
    seconds: float  # of processor time, without the network's


# WebP takes 16 bytes a pixel, the most of all; the quick ones also keep what the image before has left behind.
QUICK = Limits(13_000_000, 384 * MB, 1)
SLOW = Limits(50_000_000, 1024 * MB, 5)
START = Limits(0, 4096 * MB, 30)  # of opening the model and a first answer; a small file can ask for any amount


def classified(model, data: bytes, limits: Limits) -> tuple[int, dict]:
    """Status and answer for one image."""
    from effnet_hf.errors import UserError
    from effnet_hf.image_processing_efficientnet_nv import UnclearPixels, to_rgb

    too_large = 413, {"detail": f"The image has more than {limits.pixels // 10**6} megapixels."}
    no_memory = 413, {"detail": f"The image takes more than {limits.memory // MB} MB to open."}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opened = Image.open(io.BytesIO(data), formats=FORMATS)
            if opened.width * opened.height > limits.pixels:
                return too_large
            image = to_rgb(opened, model.processor.bit_depth)
    except Image.DecompressionBombError:
        return too_large
    except MemoryError:
        return no_memory
    except UnclearPixels as error:
        return 415, {"detail": f"The image {error}."}
    except Image.UnidentifiedImageError:
        return 415, {"detail": f"This file is not an image that can be read ({', '.join(FORMATS)})."}
    except Exception:  # Pillow's plugins raise OSError, SyntaxError, struct.error, RuntimeError, … on bad bytes
        return 415, {"detail": "This image is damaged and cannot be read."}
    try:
        predictions = model.classify(image)
    except MemoryError:
        return no_memory
    except UserError as error:  # as ONNX Runtime says it, where the graph preprocesses
        if "alloc" in str(error.__cause__):
            return no_memory
        raise
    return 200, {"width": image.width, "height": image.height, "predictions": predictions}


def limit(limits: Limits) -> None:
    """From now on; when the time is up, a signal ends the process, in any library."""
    signal.setitimer(signal.ITIMER_PROF, limits.seconds)
    with contextlib.suppress(OSError, StopIteration):  # Linux; macOS sets no such limit
        lines = Path("/proc/self/status").read_text().splitlines()
        used = 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmData:")))
        resource.setrlimit(resource.RLIMIT_DATA, (used + limits.memory, resource.RLIM_INFINITY))


def work(pipe, folder: str, limits: Limits) -> None:
    """The life of a process that opens images: bytes come in, JSON goes out, until the pipe is closed."""
    from effnet_hf.errors import UserError

    with contextlib.suppress(EOFError, OSError):  # the server is gone
        opened = open_model(folder, limits)
        if isinstance(opened, str):
            pipe.send_bytes(json.dumps({"problem": opened}).encode())
            return
        model, hello = opened
        seconds = limits.seconds + hello["seconds"]
        pipe.send_bytes(json.dumps(hello).encode())
        while True:
            data = pipe.recv_bytes()
            signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process, in any library
            try:
                answer = classified(model, data, limits)
            except UserError as error:
                sys.exit(str(error))  # on stderr, because it names folders of this machine
            signal.setitimer(signal.ITIMER_PROF, 0)
            pipe.send_bytes(json.dumps(answer).encode())  # ASCII: a label's control characters stay escaped


def open_model(folder: str, limits: Limits):
    """The model and what the server is told about it, or the sentence that says why there is none."""
    from effnet_hf.cli import path
    from effnet_hf.errors import printable, sentence_of
    from effnet_hf.export import ONNXEfficientNet
    from effnet_hf.hub import download

    limit(START)
    said = io.StringIO()  # one worker's is enough
    try:
        folder = path(folder)
        if not os.path.exists(folder) and folder.count("/") == 1:
            folder = str(download(folder, patterns=["*.json", "*.onnx", "*.onnx_data"]))
        with contextlib.redirect_stderr(said):
            model = ONNXEfficientNet.from_pretrained(folder, threads=1)
            start = time.process_time()
            model.classify(Image.new("RGB", (64, 64)))  # what the first one takes is no image's fault
            seconds = time.process_time() - start
    except argparse.ArgumentTypeError as error:
        return printable(f"argument --model: {error}")
    except MemoryError:
        return f"{printable(folder)} cannot be opened: it takes more than {START.memory // MB} MB."
    except Exception as error:
        if problem := sentence_of(error):
            return problem
        raise
    if limits == SLOW:
        os.nice(5)  # small images first
    limit(limits)
    signal.setitimer(signal.ITIMER_PROF, 0)
    return model, {"classes": model.config.num_labels, "folder": folder, "said": said.getvalue(), "seconds": seconds}


class Worker:
    """A process that opens images, and its next one when it is lost.

    Attributes:
        problem: why the model could not be opened, the last time that it was tried.
    """

    def __init__(self, folder: str, limits: Limits):
        self.folder, self.limits, self.closed = folder, limits, False
        self.seconds: float | None = None  # of processor time that the network takes; known once a model was opened
        self.problem: str | None = None
        self.start()

    def start(self) -> None:
        pipe, theirs = PROCESSES.Pipe()
        process = PROCESSES.Process(target=work, args=(theirs, self.folder, self.limits), daemon=True)
        # Ctrl-C reaches all; the server ends them when all is answered. Who starts the tracker lifts the block.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with theirs:
                process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.pipe, self.process = pipe, process
        self.classes = 0  # until it has loaded the model

    def wait(self) -> None:
        """Until it can classify, in a new process if the one that could is dead.

        Raises:
            ValueError: the folder cannot be opened; says why.
            EOFError, OSError: there is no process; what went wrong stands on stderr.
        """
        if self.pipe.closed or (self.classes and not self.process.is_alive()):
            self.start()
        if not self.classes:
            try:
                with self.killed_after(None if self.seconds is None else START.seconds):  # a download takes its time
                    hello = json.loads(self.pipe.recv_bytes())
            except (EOFError, OSError):
                self.process.join(PATIENCE)
                code = self.process.exitcode or 0
                if self.closed or code >= 0:
                    raise
                most = f"{START.seconds} s of processor time" if code == -signal.SIGPROF else "the memory there is"
                raise ValueError(
                    f"{self.folder} cannot be opened: its process died; it may need more than {most}."
                ) from None
            if "problem" in hello:
                raise ValueError(hello["problem"])
            self.classes, self.folder = hello["classes"], hello["folder"]  # which may be a copy of one from the Hub
            self.said, self.seconds = hello["said"], hello["seconds"]

    def mend(self) -> bool:
        """Whether it can classify, after all that can be done about it; `problem` and stderr say why not."""
        try:
            self.wait()
        except (ValueError, EOFError, OSError) as error:
            if self.closed:
                return False
            problem = str(error) or "A process could not open the model."
            if problem != self.problem:
                print(f"app.py: {problem}", file=sys.stderr, flush=True)
            self.problem = problem
            self.process.kill()
            self.pipe.close()  # the next one who asks tries again
            return False
        self.problem = None
        return True

    def renew(self) -> None:
        """A new process in place of this one, which loads while nobody waits for it."""
        self.process.kill()
        self.pipe.close()
        if not self.closed:
            with contextlib.suppress(EOFError, OSError):  # the system has none to give; `wait` asks again
                self.start()

    @contextlib.contextmanager
    def killed_after(self, seconds: float | None):
        """`seconds` of processor time, and `PATIENCE` with it: the process may be stopped, or wait for something."""
        if seconds is None:
            yield
            return
        timer = threading.Timer(PATIENCE * seconds, self.process.kill)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def classify(self, data: bytes) -> tuple[int, dict]:
        """Tries twice: not every process that is lost was lost to its image (the system takes some when memory runs
        out), and an image that ends its process should not do so for ever."""
        for _ in range(2):
            code = None
            if self.mend():
                try:
                    with self.killed_after(self.limits.seconds + (self.seconds or 0)):
                        self.pipe.send_bytes(data)
                        answer = tuple(json.loads(self.pipe.recv_bytes()))
                except (EOFError, OSError):
                    self.process.join(PATIENCE)
                    code = self.process.exitcode
                else:
                    if self.limits == SLOW:
                        self.renew()  # the next one needs all of the memory
                    return answer
                self.renew()
            if self.closed:
                return 503, {"detail": "The server is ending."}
            if code == -signal.SIGPROF:
                return 413, {"detail": f"The image takes more than {self.limits.seconds} s to open."}
            if code == 1:  # an exception that is no image's; stderr has it
                return 500, {"detail": "The model does not take this image."}
        if code is not None and -code in CRASHES:
            return 415, {"detail": "This image is damaged and cannot be read."}
        if self.problem:
            return 503, {"detail": "The server cannot open its model; try again later."}
        return 503, {"detail": "The process that opened the image was lost, twice; try again in some seconds."}

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

    def mend(self) -> None:
        """Looks after every worker that has no image now; a process must not be looked at by two threads."""
        for _ in self.workers:
            try:
                worker = self.free.get_nowait()
            except queue.Empty:
                return
            try:
                worker.mend()
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
        self.looking: Future | None = None
        first = self.lanes[0].workers[0]
        self.classes = first.classes
        print(first.said, end="", file=sys.stderr, flush=True)

    async def classify(self, data: bytes) -> tuple[int, dict]:
        for lane in self.lanes:
            status, answer = await asyncio.get_running_loop().run_in_executor(lane.threads, lane.classify, data)
            if status != 413:
                break
        return status, answer

    def ready(self) -> bool:
        """Whether a worker has a model, as far as it is known. Whoever asks has the idle ones looked after for the next
        time, because a server that says no may get no images, which would mend them too."""
        if self.looking is None or self.looking.done():
            self.looking = self.lanes[0].threads.submit(self.lanes[0].mend)
        return not all(worker.problem for worker in self.lanes[0].workers)

    def close(self) -> None:
        for lane in self.lanes:
            lane.threads.shutdown(wait=False, cancel_futures=True)
            for worker in lane.workers:
                worker.close()
