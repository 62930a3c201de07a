"""Runs a slow iterator (a network stream) in a thread, a few items ahead of whoever consumes it."""

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar


T = TypeVar("T")
_END = object()


def read_ahead(iterator: Iterator[T], depth: int = 4) -> Iterator[T]:
    """The same items; what the iterator raises is raised here. The thread ends when this generator is closed."""
    items: queue.Queue = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item) -> bool:
        while not stopped.is_set():
            try:
                items.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work():
        try:
            for item in iterator:
                if not put((item, None)):
                    return
            put((_END, None))
        except BaseException as error:  # handed to the consumer
            put((_END, error))

    thread = threading.Thread(target=work, name="read_ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = items.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        stopped.set()
        thread.join()
