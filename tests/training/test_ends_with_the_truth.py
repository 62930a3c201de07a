"""How a run ends: without a console, by a signal, diverged, out of data. Each with the truth, and with nothing lost."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from effnet_hf import cli
from effnet_hf.errors import UserError
from effnet_hf.training import loop, metrics, publish, signals, train, validate_checkpoint
from effnet_hf.training.progress import Progress
from effnet_hf.training.report import Report
from effnet_hf.training.resume import Checkpoints
from effnet_hf.training.signals import EXIT_INTERRUPTED, Interruption

from .workbench import fingerprint, quantized_recipe, run, small_recipe, write_squares, write_tiny


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def recipe_of(squares, tiny, output, **changes):
    """2 epochs of 4 steps of 2 micro-batches; a second."""
    return small_recipe(squares, output, model=str(tiny), **{"image_size": None, **changes})


@pytest.fixture(scope="module")
def whole_run(squares, tiny, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert train(recipe_of(squares, tiny, output)) == 0
    return output


def as_command(function, stdout: int, stderr: int) -> int:
    """The exit code of a script that calls it, in a forked child whose consoles are these file descriptors."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            for number, descriptor in ((1, stdout), (2, stderr)):
                os.dup2(descriptor, number) if descriptor >= 0 else os.close(number)
            names = ((1, "stdout", stdout), (2, "stderr", stderr))
            with contextlib.ExitStack() as stack:
                for number, name, descriptor in names:
                    stream = os.fdopen(number, "w", buffering=1) if descriptor >= 0 else None
                    stack.enter_context(pytest.MonkeyPatch.context()).setattr(f"sys.{name}", stream)
                try:
                    cli.run(function, prog="train.py")
                except SystemExit as end:
                    code = end.code
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_training_outlives_its_reader(squares, tiny, whole_run, nobody, tmp_path):
    with open(tmp_path / "err", "wb") as err:
        assert as_command(lambda: train(recipe_of(squares, tiny, tmp_path / "run")), nobody, err.fileno()) == 0
    assert fingerprint(tmp_path / "run") == fingerprint(whole_run)
    said = (tmp_path / "err").read_text()
    assert said.count("\n") == 1 and "standard output: Broken pipe: the run goes on without" in said


@pytest.mark.parametrize("out, err", [("/dev/full", "/dev/full"), (None, None), ("nobody", "nobody")])
def test_a_training_needs_no_console(out, err, squares, tiny, nobody, tmp_path):
    numbers = [nobody if name == "nobody" else os.open(name, os.O_WRONLY) if name else -1 for name in (out, err)]
    recipe = recipe_of(squares, tiny, tmp_path / "run", epochs=1, quiet=False)
    assert as_command(lambda: train(recipe), *numbers) == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["updates"] == 4
    for row in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        json.loads(row)  # no word of the console among them


def test_a_stopped_training_says_so_to_its_scheduler_without_a_console(squares, tiny, nobody, tmp_path, monkeypatch):
    send_at(monkeypatch, loop, "learning_rate", 3)
    assert as_command(lambda: train(recipe_of(squares, tiny, tmp_path / "run")), nobody, nobody) == EXIT_INTERRUPTED


def send_at(monkeypatch, module, name: str, call: int, number=signal.SIGTERM) -> list:
    """Sends this process a signal when a function of a module is called for the n-th time."""
    calls, original = [], getattr(module, name)

    def called(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, called)
    return calls


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_every_signal_saves(number, squares, tiny, whole_run, tmp_path, monkeypatch, capsys):
    send_at(monkeypatch, loop, "set_learning_rate", 4, number)  # in the second half of a step
    recipe = recipe_of(squares, tiny, tmp_path / "run", resume="auto")
    assert train(recipe) == EXIT_INTERRUPTED
    assert f"{number.name}: saved; go on with --resume auto" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("update-*")] == ["update-00000002"]
    monkeypatch.undo()
    if number == signal.SIGTERM:
        assert train(recipe) == 0 and fingerprint(tmp_path / "run") == fingerprint(whole_run)


@pytest.mark.parametrize("call", [1, 5, 8], ids=["epoch 1", "its average", "epoch 2"])
def test_a_signal_in_validation_is_obeyed_at_once_and_loses_nothing(
    call, squares, tiny, whole_run, tmp_path, monkeypatch
):
    calls = send_at(monkeypatch, metrics, "topk_correct", call)  # 3 batches a validation
    recipe = recipe_of(squares, tiny, tmp_path / "run", resume="auto", checkpoint_every_epochs=call % 2)
    assert train(recipe) == EXIT_INTERRUPTED and len(calls) == call
    epoch = 0 if call < 7 else 1
    progress = Progress.read(tmp_path / f"run/checkpoints/update-{4 * epoch + 4:08d}/progress.json")
    assert (progress.epoch, progress.update, progress.is_trained) == (epoch, 4, True)
    monkeypatch.undo()
    assert train(recipe) == 0
    assert fingerprint(tmp_path / "run") == fingerprint(whole_run)


def test_an_epoch_is_saved_once_and_before_its_validation(squares, tiny, tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(Checkpoints, "save", noting(events, "save", Checkpoints.save))
    monkeypatch.setattr(loop, "validate", noting(events, "validate", loop.validate))
    assert train(recipe_of(squares, tiny, tmp_path, ema_decay=0.0, checkpoint_every_steps=4)) == 0
    assert events == ["save", "validate", "save", "validate"]
    assert train(recipe_of(squares, tiny, tmp_path, ema_decay=0.0, resume="auto")) == 0
    assert events[4:] == ["validate"]  # it is saved already


def noting(events: list, name: str, function):
    def noted(*args, **kwargs):
        events.append(name)
        return function(*args, **kwargs)

    return noted


def test_staged_jobs_go_one_epoch_further_each(squares, tiny, whole_run, tmp_path):
    for updates in (4, 8):
        assert train(recipe_of(squares, tiny, tmp_path / "run", resume="auto", run_epochs=1)) == 0
        assert json.loads((tmp_path / "run/summary.json").read_text())["updates"] == updates
    assert fingerprint(tmp_path / "run") == fingerprint(whole_run)


@pytest.mark.parametrize("given", [4, 3, 0], ids=["between two steps", "in the middle of one", "before the first"])
def test_a_stop_ends_a_wait_for_data(given, squares, tiny, whole_run, tmp_path, monkeypatch):
    """And takes back the half of a step that had been done: statistics of batch norm, draws of dropout."""
    monkeypatch.setattr(signals, "PATIENCE", 0.2)
    watch = Interruption.watch

    def stalled(batches):
        for number, batch in enumerate(batches):
            if number == given:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            yield batch

    monkeypatch.setattr(Interruption, "watch", lambda self, batches: watch(self, stalled(batches)))
    recipe, started = recipe_of(squares, tiny, tmp_path / "run", resume="auto"), time.monotonic()
    assert train(recipe) == EXIT_INTERRUPTED and time.monotonic() - started < 30
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("update-*")] == [f"update-{given // 2:08d}"]
    monkeypatch.undo()
    assert train(recipe) == 0
    assert fingerprint(tmp_path / "run") == fingerprint(whole_run)


def test_one_of_several_processes_cannot_save_alone():
    run = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=2), interruption=SimpleNamespace(received="SIGTERM")
    )
    with pytest.raises(UserError, match="SIGTERM, while this process waits for data and cannot save together"):
        loop.refuse_to_save_alone(run, signals.StoppedWaiting())
    loop.refuse_to_save_alone(run, signals.Stopped())  # they have agreed on this one


def test_a_signal_in_publishing_waits_until_it_is_done(squares, tiny, whole_run, tmp_path, monkeypatch):
    send_at(monkeypatch, publish, "draw", 1)
    assert train(recipe_of(squares, tiny, tmp_path / "run")) == 0
    assert fingerprint(tmp_path / "run") == fingerprint(whole_run)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {path.name for path in whole_run.iterdir()}


@pytest.mark.parametrize("push, code", [(False, 0), (True, EXIT_INTERRUPTED)])
def test_a_signal_while_a_tracker_uploads_changes_nothing(push, code, squares, tiny, tmp_path, monkeypatch):
    send_at(monkeypatch, Report, "close", 1)
    monkeypatch.setattr(publish, "push_folder", lambda *_, **__: pytest.fail("it takes minutes"))
    to_hub = {"push_to_hub": True, "hub_model_id": "me/x"} if push else {}
    assert train(recipe_of(squares, tiny, tmp_path, epochs=1, **to_hub)) == code
    assert json.loads((tmp_path / "summary.json").read_text())["updates"] == 4
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_was_published_is_not_pushed_after_a_signal(squares, tiny, tmp_path, monkeypatch, capsys):
    send_at(monkeypatch, publish, "draw", 1)
    monkeypatch.setattr(publish, "push_folder", lambda *_, **__: pytest.fail("it takes minutes"))
    recipe = recipe_of(squares, tiny, tmp_path, epochs=1, push_to_hub=True, hub_model_id="me/x")
    assert train(recipe) == EXIT_INTERRUPTED
    assert "SIGTERM: published, not pushed; go on with --resume auto" in capsys.readouterr().out


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_in_calibration_leaves_a_line(number, code, squares, tiny, tmp_path, monkeypatch):
    from effnet_hf.quantization import prepare

    send_at(monkeypatch, prepare, "calibrate", 1, number)
    with open(tmp_path / "err", "wb") as err, open(tmp_path / "out", "wb") as out:
        recipe = quantized_recipe(squares, tmp_path / "run", tiny, image_size=None)
        assert as_command(lambda: run(recipe), out.fileno(), err.fileno()) == code
    said = (tmp_path / "err").read_text()
    assert said == ("" if number == signal.SIGINT else f"train.py: stopped by {number.name}\n")


def test_what_is_ignored_stays_so(monkeypatch):
    """SIGHUP under nohup, SIGINT in a shell's background; SIGTERM and SIGUSR1 ask for an end all the same."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in Interruption.SIGNALS}
    try:
        with Interruption(SimpleNamespace(num_processes=1)):
            left = {number.name for number in Interruption.SIGNALS if signal.getsignal(number) == signal.SIG_IGN}
        assert left == {"SIGHUP", "SIGINT"}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_training_ends_with_its_launcher(monkeypatch):
    interruption = Interruption(SimpleNamespace(num_processes=1))
    assert not interruption.pending()  # started by nobody in particular, who may go
    monkeypatch.setattr(signals, "LAUNCHER_PID", os.getppid())
    interruption = Interruption(SimpleNamespace(num_processes=1))
    assert not interruption.agreed()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert interruption.agreed() and interruption.received == "the launcher has ended"


def test_a_training_in_a_thread_catches_no_signal_and_says_so(squares, tiny, tmp_path, capsys):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(train(recipe_of(squares, tiny, tmp_path, epochs=1))))
    thread.start()
    thread.join()
    assert codes == [0] and "none will save and stop it" in capsys.readouterr().out


def test_data_that_end_early_are_no_stop(squares, tiny, tmp_path, monkeypatch):
    watch = Interruption.watch
    monkeypatch.setattr(
        Interruption, "watch", lambda self, batches: (b for _, b in zip(range(5), watch(self, batches)))
    )
    with pytest.raises(UserError, match="epoch 1 ended after 2 of 4 steps: the data gave no more batches"):
        train(recipe_of(squares, tiny, tmp_path))


def spoiling(after: int, factor: float):
    """A training step after which the n-th leaves weights multiplied."""
    calls = []

    def step(run, batch):
        loss = loop_step(run, batch)
        calls.append(None)
        if len(calls) == 2 * after:
            with torch.no_grad():
                for parameter in run.bare_model.parameters():
                    parameter.mul_(factor)
        return loss

    loop_step = loop.train_step
    return step


def test_what_answers_nothing_finite_is_no_checkpoint(squares, tiny, tmp_path, monkeypatch):
    """Its weights are finite, and so was the loss of every step so far."""
    monkeypatch.setattr(loop, "train_step", spoiling(3, 1e25))
    recipe = recipe_of(squares, tiny, tmp_path, ema_decay=0.0, checkpoint_every_steps=1, epochs=1)
    with pytest.raises(UserError, match=r"the answer to a test image is nan in epoch 1, step 3.*whole: .*00000002\.$"):
        train(recipe)
    assert not (tmp_path / "checkpoints/update-00000003").exists() and not (tmp_path / "model.safetensors").exists()


def test_a_validation_that_is_no_number_is_not_published(squares, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda *_, **__: torch.tensor(float("nan")))
    monkeypatch.setattr(loop, "training_loss", lambda logits, *_: logits.mean())
    with pytest.raises(UserError, match=r"val.loss is nan in epoch 1, step 4: training has diverged"):
        train(recipe_of(squares, tiny, tmp_path))
    assert not {"model.safetensors", "summary.json", "README.md"} & {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "checkpoints/best").exists()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def broken(tiny, tmp_path_factory):
    """A model whose weights are finite, and whose answers are not."""
    folder = write_tiny(tmp_path_factory.mktemp("broken"))
    weights = load_file(folder / "model.safetensors")
    weights |= {name: tensor * 1e30 for name, tensor in weights.items() if tensor.is_floating_point()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_model_that_has_diverged_is_neither_measured_published_nor_quantized(broken, squares, tmp_path):
    with pytest.raises(UserError, match="the loss on 12 validation images is nan: the model has diverged"):
        validate_checkpoint(str(broken), str(squares), num_workers=0)
    with pytest.raises(UserError, match="the answer to a test image is nan in epoch 1, step 0"):
        train(recipe_of(squares, broken, tmp_path / "train", epochs=0, warmup_epochs=0))
    assert not (tmp_path / "train/model.safetensors").exists()
    with pytest.raises(UserError, match="the loss on 12 validation images is nan: the model has diverged"):
        run(quantized_recipe(squares, tmp_path / "qat", broken, image_size=None, epochs=0))
    assert not (tmp_path / "qat/quantization.json").exists()


ODD = [
    (
        {"learning_rate": 1e25, "lr_schedule": "step", "lr_step_gamma": 1e20, "lr_step_epochs": [0]},
        "has become 1e\\+45",
    ),
    ({"lr_schedule": "step", "lr_step_gamma": 1e30, "lr_step_epochs": [0] * 12}, "the learning rate has become inf"),
    ({"per_device_batch_size": 1, "image_size": 8}, "one image of this size at once leaves it one; raise --per_device"),
]


@pytest.mark.parametrize("changes, said", ODD, ids=[str(changes) for changes, _ in ODD])
def test_an_odd_value_is_one_sentence(changes, said, squares, tiny, tmp_path):
    changes = {"warmup_epochs": 0, "ema_decay": 0.0, **changes}
    with pytest.raises(UserError, match=said):
        train(recipe_of(squares, tiny, tmp_path, **changes))


def test_no_escape_of_others_reaches_the_console(capsys):
    Report(Accelerator(cpu=True)).line("a\x1b[2Jb\nc")
    assert capsys.readouterr().out == "a\\x1b[2Jb\nc\n"


@pytest.mark.slow  # forty launches and as many resumptions, two minutes
def test_a_signal_at_any_moment_ends_with_the_truth(squares, tiny, whole_run, tmp_path):
    """75 where everything is saved, 143 where there was nothing to save, 0 where it came while publishing."""
    codes, rng = [], random.Random(0)
    for number in range(40):
        delay = rng.uniform(0, 1.5)
        recipe = recipe_of(squares, tiny, tmp_path / f"{number}", resume="auto", checkpoint_every_steps=number % 3)
        with open(tmp_path / "err", "wb") as err, open(os.devnull, "wb") as out:

            def signalled(recipe=recipe, delay=delay):
                process = os.getpid()
                threading.Timer(delay, lambda: os.kill(process, signal.SIGTERM)).start()
                return train(recipe)

            code = as_command(signalled, out.fileno(), err.fileno())
        said, folder = (tmp_path / "err").read_text(), tmp_path / f"{number}"
        saved = sorted((folder / "checkpoints").glob("update-*"))
        assert said == ("train.py: stopped by SIGTERM\n" if code == 143 else "")
        assert code in (143, 0) or code == EXIT_INTERRUPTED and saved
        assert not list(folder.rglob(".*.tmp")), code
        assert train(recipe) == 0 and fingerprint(folder) == fingerprint(whole_run)
        codes.append(code)
    print({code: codes.count(code) for code in codes})
    assert codes.count(EXIT_INTERRUPTED) > 5


@pytest.mark.slow  # two launches of Accelerate
def test_sigterm_to_the_launcher_of_one_process_saves(squares, tiny, tmp_path):
    """It ends without a word to the training, which used to go on for ever."""
    recipe = recipe_of(squares, tiny, tmp_path / "run", epochs=500, image_size=32, quiet=False)
    (tmp_path / "long.yaml").write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1", "--cpu"]
    command += ["--mixed_precision=no", "--dynamo_backend=no", "-m", "effnet_hf.commands.train"]
    with open(tmp_path / "out", "wb") as out:
        launcher = subprocess.Popen([*command, "--config", tmp_path / "long.yaml"], stdout=out, stderr=out)
    while "epoch   2/" not in (tmp_path / "out").read_text():
        assert launcher.poll() is None, (tmp_path / "out").read_text()
        time.sleep(0.1)
    (training,) = psutil.Process(launcher.pid).children()
    launcher.terminate()
    training.wait(timeout=60)
    assert "the launcher has ended: saved; go on with --resume auto" in (tmp_path / "out").read_text()
    assert list((tmp_path / "run/checkpoints").glob("update-*"))
