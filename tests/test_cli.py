"""What every script shares: who speaks, and when; and what a console that is gone, or a signal, does to it."""

import ast
import contextlib
import importlib
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from effnet_hf import commands
from effnet_hf.cli import ArgumentParser, command_line, invocation, path, run
from effnet_hf.commands import plots
from effnet_hf.errors import OneProcessError, UserError


ROOT = Path(__file__).resolve().parents[1]


def failing(kind: type):
    def main():
        raise kind("a.png is broken.")

    return main


@pytest.mark.parametrize(
    "rank, kind, said",
    [
        (None, UserError, "train.py: error: a.png is broken.\n"),
        ("0", OneProcessError, "train.py: error: a.png is broken.\n"),
        ("1", UserError, ""),
        ("1", OneProcessError, "train.py: error: process 9: a.png is broken.\n"),
    ],
    ids=["alone", "the first", "another, of what all meet", "another, of what it met alone"],
)
def test_an_error_is_said_once_and_never_lost(rank, kind, said, monkeypatch, capsys):
    for name, value in (("LOCAL_RANK", rank), ("RANK", rank and "9")):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        run(failing(kind), prog="train.py")
    assert capsys.readouterr().err == said


def test_the_process_group_is_left_at_the_end(monkeypatch):
    """NCCL warns at exit where nobody does, and a rank that dies meanwhile can hang the others."""
    import torch.distributed as dist

    def main():
        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)

    with pytest.raises(SystemExit, match="0"):
        run(main, prog="train.py")
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    "words, wanted",
    [
        (["--overwrite"], True),
        (["--overwrite", "true", "x"], True),
        (["--overwrite=true"], True),
        (["--overwrite", "False"], False),
        (["--overwrite=false"], False),
        (["--overwrite", "--overwrite", "false"], False),
    ],
)
def test_a_switch_understands_what_a_recipes_does(words, wanted):
    parser = ArgumentParser()
    parser.add_argument("x", nargs="*")
    parser.add_argument("--overwrite", action="store_true")
    assert parser.parse_args(words).overwrite is wanted


@pytest.mark.parametrize(
    "program, named, typed",
    [
        (f"{ROOT}/train.py", "python qat.py", "python train.py --seed 1"),
        ("/somewhere/else/train.py", "effnet-hf qat", "python train.py --seed 1"),
        (f"{ROOT}/effnet_hf/commands/train.py", "effnet-hf qat", "effnet-hf train --seed 1"),
        ("/bin/effnet-hf train", "effnet-hf qat", "effnet-hf train --seed 1"),
        (f"{ROOT}/effnet_hf/__main__.py train", "effnet-hf qat", "effnet-hf train --seed 1"),
    ],
)
def test_a_message_names_the_command_that_the_user_has(program, named, typed, monkeypatch):
    monkeypatch.setattr(sys, "argv", [*program.split(), "--seed", "1", "--hub_token", "secret", "--hub-token=secret"])
    assert invocation("qat") == named and command_line() == typed


@pytest.mark.parametrize("module, command", [("effnet_hf.data.scan", "scan"), ("effnet_hf.training.plots", "plots")])
def test_a_module_that_was_once_run_says_what_took_its_place(module, command, monkeypatch, capsys):
    importlib.import_module(module)
    monkeypatch.delitem(sys.modules, module)
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module(module, run_name="__main__")
    assert capsys.readouterr().err == f"this is `effnet-hf {command}` now\n"


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "is empty; name a file or folder"),
        ("a\0b", "holds a zero byte, which no name has: a\\x00b"),
        ("~nobody-here/x", "~nobody-here/x: there is no such user; a name that begins with ~ is ./~nobody-here/x"),
    ],
)
def test_a_flag_takes_no_place_that_is_none(text, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        plots.main(["runs/a", "--output_dir", text])
    assert capsys.readouterr().err.endswith(f"error: argument --output_dir: {said}\n")


def test_a_tilde_is_the_home_folder_unless_a_file_is_called_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    Path("~old.png").touch()
    assert [path(text) for text in ("~/x", "~old.png", "a~b")] == ["/home/me/x", "~old.png", "a~b"]


_PLACES = {
    "runs",
    "folder",
    "output",
    "--output",
    "--output_dir",
    "--out",
    "--work",
    "--data_dir",
    "--images",
    "--kills",
}


@pytest.mark.parametrize("tree", ["effnet_hf/commands", "examples", "benchmarks"])
def test_every_flag_that_names_a_place_reads_it_as_one(tree):
    calls = [
        (file.name, call)
        for file in (ROOT / tree).rglob("*.py")
        for call in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument"
    ]
    places = [(name, call) for name, call in calls if getattr(call.args[0], "value", "") in _PLACES]
    assert places
    for name, call in places:
        kinds = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert kinds.get("type") in ("path", "cli.path"), f"{name}: {ast.unparse(call.args[0])}"


def in_child(main, prog: str, out: str | int | None, err) -> int:
    """The exit code of a script, in a forked child whose standard output is a file, a descriptor, or closed."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
            os.close(1)
            if out is not None:
                os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT) if isinstance(out, (str, Path)) else out, 1)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "stdout", None if out is None else os.fdopen(1, "w"))
                patch.setattr(sys, "stderr", os.fdopen(2, "w", buffering=1))
                try:
                    run(main, prog)
                except SystemExit as end:
                    code = end.code
                except BaseException as error:
                    print(repr(error), file=sys.stderr)
                with contextlib.suppress(AttributeError):  # closed: it was None
                    try:
                        sys.stdout.flush()
                    except OSError:
                        code = 120  # as Python's own end does
        finally:
            with contextlib.suppress(Exception):
                os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def printing(marker: Path, code: int = 0):
    """Prints more than a buffer holds, and then does its work."""

    def main():
        for _ in range(3):
            print("x" * 10_000, flush=True)
        marker.write_text("done")
        return code

    return main


@pytest.mark.parametrize("code", [0, 7, 75])
def test_a_command_outlives_its_reader_and_keeps_its_exit_code(code, nobody, tmp_path):
    assert in_child(printing(tmp_path / "marker", code), "convert.py", nobody, tmp_path / "err") == code
    assert (tmp_path / "marker").exists() and (tmp_path / "err").read_text() == ""


@pytest.mark.parametrize("prog", ["classify.py", "effnet-hf classify"])
def test_classify_ends_with_its_reader(prog, nobody, tmp_path):
    assert in_child(printing(tmp_path / "marker"), prog, nobody, tmp_path / "err") == 0
    assert not (tmp_path / "marker").exists() and (tmp_path / "err").read_text() == ""


@pytest.mark.parametrize("prog, code", [("validate.py", 0), ("classify.py", 0), ("scan.py", 1)])
def test_what_could_not_be_printed_is_an_error(prog, code, tmp_path):
    """`validate.py … > figures.txt` on a full disk."""
    assert in_child(printing(tmp_path / "marker", code), prog, "/dev/full", tmp_path / "err") == 2
    said = f"{prog}: error: cannot write to standard output: No space left on device.\n"
    assert (tmp_path / "err").read_text() == said


@pytest.mark.parametrize("out", ["/dev/full", "nobody"])
@pytest.mark.parametrize(
    "end, code, said",
    [
        (UserError("a.png is broken."), 2, "convert.py: error: a.png is broken.\n"),
        (SystemExit(2), 2, ""),
        (KeyboardInterrupt(), 130, ""),
        (KeyboardInterrupt("SIGTERM"), 143, "convert.py: stopped by SIGTERM\n"),
        (RuntimeError("a bug"), 70, "RuntimeError('a bug')\n"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("prog", ["convert.py", "classify.py"])
def test_an_end_is_what_it_is_whether_or_not_somebody_reads(prog, end, code, said, out, nobody, tmp_path):
    def main():
        print("what a buffer holds")
        raise end

    assert in_child(main, prog, nobody if out == "nobody" else out, tmp_path / "err") == code
    assert (tmp_path / "err").read_text() == said.replace("convert.py", prog)


def test_a_closed_console_gets_no_file_of_ours(tmp_path):
    """`>&-`: the next file that is opened would be standard output."""

    def main():
        with open(tmp_path / "file", "w") as file:
            print("said")
            os.write(1, b"said by a library")
            file.write("written")

    assert in_child(main, "train.py", None, tmp_path / "err") == 0
    assert (tmp_path / "file").read_text() == "written" and (tmp_path / "err").read_text() == ""


def test_a_broken_pipe_to_something_else_is_no_success(tmp_path):
    def main():
        raise BrokenPipeError(32, "Broken pipe")  # of a loader process

    assert in_child(main, "classify.py", tmp_path / "out", tmp_path / "err") == 70
    assert "BrokenPipeError" in (tmp_path / "err").read_text()


def test_a_letter_that_the_console_lacks_is_written_as_an_escape(tmp_path, monkeypatch):
    with open(tmp_path / "out", "w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(SystemExit, match="0"):
            run(lambda: print("Käfer \udcff"), "classify.py")
        monkeypatch.undo()
    assert (tmp_path / "out").read_text() == "K\\xe4fer \\udcff\n"


@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138), (signal.SIGINT, 130)]
)
def test_a_signal_ends_a_command_in_order(number, code, tmp_path, capsys):
    """As Ctrl-C always did: what is half-written is removed, nothing is a traceback."""
    cleaned = []

    def main():
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            cleaned.append(True)

    with pytest.raises(SystemExit, match=str(code)):
        run(main, "convert.py")
    said = "" if number == signal.SIGINT else f"convert.py: stopped by {number.name}\n"
    assert capsys.readouterr() == ("", said) and cleaned
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def test_a_signal_to_a_forked_helper_is_a_matter_of_its_own(capfd):
    def main():
        pid = os.fork()
        if pid == 0:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            finally:
                os._exit(1)
        return 5 if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM else 6

    with pytest.raises(SystemExit, match="5"):
        run(main, "scan.py")
    assert capfd.readouterr() == ("", "")


def test_no_escape_of_others_reaches_the_terminal(capsys):
    def main():
        raise UserError("a\x1b[2Jb.png\nis broken.")

    with pytest.raises(SystemExit, match="2"):
        run(main, "train.py")
    assert capsys.readouterr().err == "train.py: error: a\\x1b[2Jb.png is broken.\n"
    with pytest.raises(SystemExit, match="2"):
        ArgumentParser(prog="x").parse_args(["--\x1b[2J"])
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize("command", [["train.py"], ["-m", "effnet_hf", "train"]], ids=" ".join)
def test_ctrl_c_while_libraries_are_imported_is_quiet(command, tmp_path):
    process = subprocess.Popen([sys.executable, *command, "--help"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "libtorch" not in maps.read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 130


def test_an_unknown_command_is_an_error_of_the_program(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["effnet-hf", "trian"])
    with pytest.raises(SystemExit) as end:
        commands.main()
    assert end.value.code == 2 and capsys.readouterr().err.startswith("effnet-hf: error: there is no command trian;")
