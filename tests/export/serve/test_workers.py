"""The serving example's processes: how they open a model, and what they say when they cannot."""

import json
import multiprocessing
import queue
import shutil
import signal
import threading
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from effnet_hf.errors import UserError
from effnet_hf.export import ONNXEfficientNet

from .conftest import as_bytes


class Pipe:
    """The worker's end of it, in this process: what it reads and what it has sent."""

    def __init__(self, *images: bytes):
        self.images, self.sent = list(images), []

    def recv_bytes(self) -> bytes:
        if not self.images:
            raise EOFError
        return self.images.pop(0)

    def send_bytes(self, data: bytes) -> None:
        self.sent.append(json.loads(data))


@pytest.fixture
def unlimited(workers, monkeypatch):
    """`work` in this process; gives the limits that it would have set, and the seconds."""
    limits = SimpleNamespace(set=[], seconds=[])
    monkeypatch.setattr(workers.signal, "setitimer", lambda _, seconds: limits.seconds.append(seconds))
    monkeypatch.setattr(workers, "limit", limits.set.append)
    return limits


def test_a_folder_that_is_not_there_is_said(workers, unlimited, tmp_path):
    workers.work(pipe := Pipe(), str(tmp_path / "none"), workers.QUICK)
    assert pipe.sent == [{"problem": f"{tmp_path / 'none'} is not a folder; name one that effnet-hf export wrote."}]


@pytest.mark.parametrize("folder", ["", "~nobody-of-this-name/m", "~nobody\x1b/m"])
def test_a_folder_that_is_no_name_is_said(workers, unlimited, folder):
    workers.work(pipe := Pipe(), folder, workers.QUICK)
    (said,) = pipe.sent
    assert said["problem"].startswith("argument --model: ") and said["problem"].isprintable()


def test_a_folder_may_begin_with_home(workers, unlimited, exported, monkeypatch):
    monkeypatch.setenv("HOME", str(exported.parent))
    workers.work(pipe := Pipe(), f"~/{exported.name}", workers.QUICK)
    assert pipe.sent[0]["folder"] == str(exported)


@pytest.mark.parametrize("error", [MemoryError(), PermissionError(13, "Permission denied", "m")], ids=repr)
def test_what_the_system_refuses_is_said(workers, unlimited, exported, monkeypatch, error):
    def from_pretrained(*_, **__):
        raise error

    monkeypatch.setattr(ONNXEfficientNet, "from_pretrained", from_pretrained)
    workers.work(pipe := Pipe(), str(exported), workers.QUICK)
    wanted = "m: Permission denied." if error.args else f"{exported} cannot be opened: it takes more than 4096 MB."
    assert pipe.sent == [{"problem": wanted}]


def test_a_server_that_is_gone_while_a_model_is_opened_leaves_no_traceback(workers, unlimited, exported):
    pipe = Pipe()
    pipe.send_bytes = lambda _: (_ for _ in ()).throw(BrokenPipeError)
    workers.work(pipe, str(exported), workers.QUICK)


def test_a_model_is_opened_under_limits(workers, unlimited, exported, image, monkeypatch):
    times = iter((5.0, 7.5))
    monkeypatch.setattr(workers.time, "process_time", lambda: next(times))
    pipe = Pipe(as_bytes(image))
    workers.work(pipe, str(exported), workers.QUICK)
    hello, (status, answer) = pipe.sent
    assert unlimited.set == [workers.START, workers.QUICK]
    assert unlimited.seconds == [0, workers.QUICK.seconds + 2.5, 0]  # the network's own time is no image's
    assert hello == {"classes": 3, "folder": str(exported), "said": "", "seconds": 2.5}
    assert status == 200 and answer["predictions"]


def test_a_model_that_cannot_answer_is_a_line_before_the_first_image(workers, unlimited, exported, monkeypatch):
    def run(self, fed):
        raise UserError("m answers with NaN.")

    monkeypatch.setattr(ONNXEfficientNet, "_run", run)
    workers.work(pipe := Pipe(), str(exported), workers.QUICK)
    assert pipe.sent == [{"problem": "m answers with NaN."}]


def test_a_model_that_stops_answering_ends_its_process_with_a_line(workers, unlimited, exported, image, monkeypatch):
    answers = [(200, {}), UserError("m answers with NaN.")]

    def classified(*_):
        if isinstance(answers[0], UserError):
            raise answers[0]
        return answers.pop(0)

    monkeypatch.setattr(workers, "classified", classified)
    with pytest.raises(SystemExit, match="m answers with NaN."):  # on stderr; multiprocessing makes it code 1
        workers.work(Pipe(b"", b""), str(exported), workers.QUICK)


def test_what_opening_says_is_said_once(workers, unlimited, exported, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(exported, tmp_path / "onnx")
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"bird"', '"owl"'))
    workers.work(pipe := Pipe(), str(folder), workers.QUICK)
    hello = json.dumps(pipe.sent[0]).encode()
    assert capsys.readouterr().err == ""

    def start(self):
        self.classes, self.pipe = 0, SimpleNamespace(recv_bytes=lambda: hello, closed=False)

    monkeypatch.setattr(workers.Worker, "start", start)
    assert workers.Classifier(folder).classes == 3
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "config.json has" in err and "taken as it is now" in err


HELLO = {"classes": 3, "folder": "m", "said": "", "seconds": 0.5}
ANSWER = (200, {"predictions": []})
PROBLEM = {"problem": "m is not a folder."}


class Process:
    """A worker's process and the server's end of its pipe: says what is given, then dies of `code`.

    Args:
        idle: it dies as soon as it has said hello, with nothing to do.
        stopped: it does not answer until it is killed.
    """

    def __init__(self, *says, code: int = 0, idle: bool = False, stopped: bool = False):
        self.says, self.exitcode, self.idle, self.got = list(says), code, idle, []
        self.closed, self.killed = False, threading.Event()
        if not stopped:
            self.killed.set()

    def is_alive(self) -> bool:
        return not self.idle

    def send_bytes(self, data: bytes) -> None:
        if self.idle or self.closed:
            raise BrokenPipeError
        self.got.append(data)

    def recv_bytes(self) -> bytes:
        if not self.says:
            assert self.killed.wait(5)
            raise EOFError
        return json.dumps(self.says.pop(0)).encode()

    def kill(self) -> None:
        self.killed.set()

    def close(self) -> None:
        self.closed = True

    def join(self, timeout: float) -> None: ...


@pytest.fixture
def worker_of(workers, monkeypatch):
    """A worker whose processes are these, one after the other; the last is there for ever."""

    def worker_of(*processes: Process, limits=workers.QUICK):
        coming = list(processes)

        def start(self):
            if not coming:
                raise BlockingIOError
            self.pipe = self.process = coming.pop(0)
            self.classes = 0

        monkeypatch.setattr(workers.Worker, "start", start)
        return workers.Worker("m", limits)

    return worker_of


def lives(code: int = 0, **kwargs) -> Process:
    return Process(HELLO, code=code, **kwargs)


def answers() -> Process:
    return Process(HELLO, ANSWER)


@pytest.mark.parametrize(
    ("processes", "status", "tried"),
    [
        ([answers()], 200, [1]),
        # lost, and not by the image
        ([lives(-signal.SIGKILL), answers()], 200, [1, 1]),
        ([lives(-signal.SIGTERM), answers()], 200, [1, 1]),
        ([lives(255), answers()], 200, [1, 1]),  # the process that starts processes was lost
        ([lives(), answers()], 200, [1, 1]),
        ([lives(idle=True), answers()], 200, [0, 1]),
        ([lives(-signal.SIGKILL, stopped=True), answers()], 200, [1, 1]),
        ([Process(code=-signal.SIGKILL), answers()], 200, [0, 1]),  # while it opened the model
        ([lives(-signal.SIGKILL), lives(-signal.SIGKILL), answers()], 503, [1, 1, 0]),
        ([lives(-signal.SIGKILL)], 503, [1]),  # and the system gives no other
        ([lives(255), lives(-signal.SIGTERM), answers()], 503, [1, 1, 0]),
        # by the image
        ([lives(-signal.SIGPROF), answers()], 413, [1, 0]),
        ([lives(-signal.SIGSEGV), answers()], 200, [1, 1]),
        ([lives(-signal.SIGSEGV), lives(-signal.SIGSEGV), answers()], 415, [1, 1, 0]),
        ([lives(-signal.SIGKILL), lives(-signal.SIGABRT), answers()], 415, [1, 1, 0]),
        # by the model
        ([lives(1), answers()], 500, [1, 0]),
        ([Process(PROBLEM), answers()], 200, [0, 1]),
        ([Process(PROBLEM), Process(PROBLEM), answers()], 503, [0, 0, 0]),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_an_image_is_not_blamed_for_a_process_that_was_lost(workers, worker_of, monkeypatch, processes, status, tried):
    monkeypatch.setattr(workers, "PATIENCE", 0.02)
    worker = worker_of(*processes)
    assert worker.classify(b"image")[0] == status
    assert [len(process.got) for process in processes] == tried
    if status != 503:
        assert worker.problem is None


def test_a_model_that_is_gone_is_said_once_and_is_there_again(worker_of, capsys):
    worker = worker_of(*[Process(PROBLEM) for _ in range(4)], answers())
    for _ in range(2):
        status, answer = worker.classify(b"")
        assert status == 503 and "cannot open its model" in answer["detail"] and worker.problem
    assert capsys.readouterr().err == "app.py: m is not a folder.\n"
    assert worker.classify(b"")[0] == 200 and worker.problem is None


def test_a_large_image_gets_its_answer_although_no_new_process_starts(workers, worker_of):
    worker = worker_of(answers(), limits=workers.SLOW)
    assert worker.classify(b"") == ANSWER and worker.pipe.closed


def test_a_worker_that_is_closed_starts_nothing(worker_of):
    worker = worker_of(first := lives(-signal.SIGKILL), answers())
    worker.wait()
    worker.close()
    assert worker.classify(b"") == (503, {"detail": "The server is ending."}) and worker.process is first


def test_asking_for_health_mends(workers, worker_of):
    worker = worker_of(answers(), Process(PROBLEM), answers())
    worker.wait()
    lane = object.__new__(workers.Lane)
    lane.workers, lane.free, lane.threads = [worker], queue.SimpleQueue(), SimpleNamespace(submit=done)
    classifier = object.__new__(workers.Classifier)
    classifier.lanes, classifier.looking = [lane], None
    assert classifier.ready()  # an image has the worker, so nobody else looks at it
    lane.free.put(worker)
    assert classifier.ready()
    worker.process.idle = True
    assert [classifier.ready() for _ in range(2)] == [False, True]
    assert lane.free.get_nowait() is worker


def done(function) -> Future:
    (future := Future()).set_result(function())
    return future


def test_ctrl_c_reaches_no_worker(workers, monkeypatch):
    blocked = []

    class Started:
        def __init__(self, **_): ...

        def start(self):
            blocked.append(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))

    context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=Started)
    monkeypatch.setattr(workers, "PROCESSES", context)
    monkeypatch.setattr(workers.resource_tracker, "ensure_running", lambda: None)
    worker = workers.Worker("m", workers.QUICK)
    assert blocked == [True] and signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.raises(EOFError):  # the other end is the process's alone
        worker.pipe.recv_bytes()


@pytest.mark.parametrize(
    ("code", "said"),
    [(-signal.SIGPROF, "30 s of processor time"), (-signal.SIGKILL, "the memory there is"), (1, None)],
)
def test_a_model_that_ends_the_process_that_opens_it(worker_of, code, said):
    worker = worker_of(Process(code=code))
    with pytest.raises(ValueError if said else EOFError, match=said and f"^m cannot be opened: .*more than {said}."):
        worker.wait()
