"""gpu_check.py without a GPU: how it starts, ends and merges sections (stubs), and all of it tiny (slow)."""

import contextlib
import importlib
import io
import json
import os
import runpy
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from lib import page

from effnet_hf.errors import UserError


ROOT = Path(__file__).parents[2]
FACTS = {
    "date": "2026-01-02",
    "commit": None,
    "hardware": {"device": "cuda", "name": "a card", "threads": 1},
    "versions": {},
    "command": "python benchmarks/gpu_check.py",
}


@pytest.fixture
def gpu():
    """The modules behind the script, by name."""
    return importlib.import_module


@pytest.fixture
def check(gpu, tmp_path):
    """Runs stub sections, each a piece of Python that knows WORK, and returns the rows of verify.json by name."""
    runner, script = gpu("gpu.runner"), gpu("gpu_check")

    def start(*stubs, seconds=60.0, jobs=2):
        work = tmp_path / "work"
        run = runner.Runner(tmp_path / "out", work, time.monotonic() + seconds, lambda: FACTS)
        todo = []
        for name, limit, code, *target in stubs:
            code = f"WORK = {str(work)!r}\n{textwrap.dedent(code)}"
            todo.append(runner.Section(name, limit, "measure" if target else "verify", ("-c", code), *target))
        script.run_all(run, todo, jobs)
        run.end_all("over")
        gpu("gpu.summary").write(run.out, run.rows)
        return {row["name"]: row for row in json.loads((tmp_path / "out" / "verify.json").read_text())["rows"]}

    return start


ROWS = """
    import json, sys
    for name in {names!r}:
        with open(f"{{WORK}}/rows/{section}.jsonl", "a") as file:
            row = dict(section={section!r}, name=name, status="pass", evidence="1", seconds=0.1, output=[])
            file.write(json.dumps(row) + chr(10))
"""


def rows(section, *names, then="pass"):
    return textwrap.dedent(ROWS).format(names=names, section=section) + then


def test_a_section_whose_time_is_over_is_killed_with_all_it_started_and_keeps_what_it_had(check, tmp_path):
    code = rows("slow", "before", then="import subprocess, time\n") + textwrap.dedent(f"""
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
        open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
        time.sleep(60)
    """)
    started = time.monotonic()
    found = check(("slow", 3, code), ("fine", 20, rows("fine", "another")))
    assert time.monotonic() - started < 15
    assert found["before"]["status"] == found["another"]["status"] == "pass"
    assert found["slow"]["status"] == "skipped" and "stopped after" in found["slow"]["evidence"]
    pid = int((tmp_path / "pid").read_text())
    while time.monotonic() - started < 30 and _runs(pid):  # what is killed on a busy machine takes a moment to go
        time.sleep(0.1)
    assert not _runs(pid), "torchrun's workers would go on"


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_section_that_fails_shows_its_last_lines_and_stops_nobody(check, tmp_path):
    code = "print('one'); raise ValueError('broken')"
    found = check(("bad", 20, code), ("good", 20, rows("good", "fine")), jobs=1)
    assert found["fine"]["status"] == "pass" and found["bad"]["status"] == "fail"
    assert found["bad"]["output"][0] == "one" and found["bad"]["output"][-1] == "ValueError: broken"
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "FAIL bad: exit code 1" in summary and "ValueError: broken" in summary


def test_what_no_time_is_left_for_is_named_and_all_ends_in_time(check):
    started = time.monotonic()
    found = check(("long", 5, "import time; time.sleep(60)"), ("next", 40, "pass"), seconds=6, jobs=1)
    assert time.monotonic() - started < 8
    assert found["next"]["status"] == "skipped" and "--only next runs it" in found["next"]["evidence"]


FIGURES = """
    import json
    row = dict(variant="b0", by="effnet_hf", mode="eager", precision="bf16", layout="channels_last", batch=8,
               image_size=32, wall_ms={ms}, wall_ms_q25=1.0, wall_ms_q75=1.0, ips=1.0, steps=3,
               speed_up=dict(timm=dict(wall={ratio})), same_mode=dict(timm=dict(wall={ratio})))
    figures = dict(kind="train", command="benchmark.py {name}", settings=dict(peers=["timm"]), rows=[row],
                   left_out=["{name} one"])
    json.dump(figures, open(f"{{WORK}}/figures/{name}.json", "w"))
"""


def figures(name, ratio):
    return textwrap.dedent(FIGURES).format(name=name, ms=2.0, ratio=ratio)


def test_another_run_replaces_its_own_rows_and_leaves_the_others(check, tmp_path):
    one, two = ("one", 20, figures("one", 1.5), "train.json"), ("two", 20, figures("two", 1.1), "train.json")
    check(one, two, ("claims", 20, rows("claims", "first", "second")))
    found = check(("two", 20, figures("two", 1.2), "train.json"), ("claims", 20, rows("claims", "second")))
    assert set(found) == {"measured: one", "measured: two", "second"}
    merged = json.loads((tmp_path / "out" / "train.json").read_text())
    assert {row["section"]: row["speed_up"]["timm"]["wall"] for row in merged["rows"]} == {"one": 1.5, "two": 1.2}
    assert len(merged["rows"]) == 2
    assert merged["left_out"] == ["one: one one", "two: two one"]
    assert merged["command"] == "benchmark.py one\nbenchmark.py two"
    text = page.write_page(tmp_path / "out").read_text()
    for line in ("## What works", "3 pass, 0 fail, 0 skipped.", "| second | pass | 1 |", "x timm, same mode"):
        assert line in text
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "2 fail" not in summary and "3 pass, 0 fail, 0 skipped." in summary and "## Training step: b0" in summary


def test_a_measurement_without_a_row_has_failed(check):
    found = check(("empty", 20, "print('no device')", "train.json"))
    assert found["measured: empty"]["status"] == "fail" and found["measured: empty"]["output"] == ["no device"]


def test_verify_json_is_whole_while_sections_write(check, tmp_path):
    code = rows("many", *map(str, range(5)), then="import time; time.sleep(0.5)")
    watched = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import json, sys, time\n"
            "end = time.time() + 3\n"
            "while time.time() < end:\n"
            "    try: text = open(sys.argv[1]).read()\n"
            "    except FileNotFoundError: continue\n"
            "    json.loads(text)\n",
            str(tmp_path / "out" / "verify.json"),
        ]
    )
    found = check(("many", 20, code), ("more", 20, rows("more", "a", "b")))
    assert watched.wait() == 0 and len(found) == 7


def test_a_row_says_why_it_failed_or_was_skipped_and_lets_nothing_out(gpu, tmp_path, monkeypatch):
    """A command that had its time and is not done has failed; one that was cut off, or never started, has not."""
    module = gpu("gpu.rows")
    monkeypatch.setattr(module, "TO_START", 1.0)
    monkeypatch.setattr(module, "TO_END", 2.0)
    (tmp_path / "rows").mkdir()
    book = module.Book("here", tmp_path, True, time.time() + 60)
    with book.row("fails"):
        raise KeyError("weight")
    with book.row("is skipped"):
        raise module.Skip("there is no DALI")
    with book.row("calls"):
        module.call(["-c", "print('last words'); raise SystemExit(3)"], 20)
    for name, limit in (("waits", 2.0), ("is cut off", 1.5), ("is not started", 0.5)):
        with book.row(name):
            module.call(["-c", "print('so far', flush=True); import time; time.sleep(30)"], limit)
    found = {row["name"]: row for row in map(json.loads, book.file.read_text().splitlines())}
    assert found["fails"]["evidence"] == "KeyError: 'weight'" and "raise KeyError" in "\n".join(
        found["fails"]["output"]
    )
    assert (found["is skipped"]["status"], found["is skipped"]["evidence"]) == ("skipped", "there is no DALI")
    assert "exit code 3 instead of 0" in found["calls"]["evidence"] and found["calls"]["output"] == ["last words"]
    assert "not done after 2 s" in found["waits"]["evidence"] and found["waits"]["output"] == ["so far"]
    assert [found[name]["status"] for name in ("waits", "is cut off", "is not started")] == [
        "fail",
        "skipped",
        "skipped",
    ]
    assert "no time left" in found["is not started"]["evidence"] and "cut off" in found["is cut off"]["evidence"]


def test_a_script_that_waits_for_its_turn_finds_what_it_would_find_alone(monkeypatch, capsys):
    """In this process, where most of its imports have been made."""
    waiting, script = str(ROOT / "benchmarks/gpu/waiting.py"), str(ROOT / "benchmarks/loop_overhead.py")
    monkeypatch.setattr(sys, "path", [str(Path(waiting).parent), *sys.path])
    for said in ("", "go\n"):
        monkeypatch.setattr(sys, "argv", [waiting, script, "--help"])
        monkeypatch.setattr(sys, "stdin", io.StringIO(said))
        with pytest.raises(SystemExit) if said else contextlib.nullcontext(SystemExit(0)) as end:
            runpy.run_path(waiting, run_name="__main__")
        assert ("--burst" in capsys.readouterr().out) == bool(said)
    assert end.value.code == 0 and sys.argv[1:] == ["--help"] and sys.path[0] == str(ROOT / "benchmarks")


def test_every_measurement_can_be_made_small_and_goes_to_one_of_eight_files(gpu, tmp_path):
    script = gpu("gpu_check")
    for rehearse in (False, True):
        found = script.sections(tmp_path, rehearse)
        assert len({section.name for section in found}) == len(found)
        files = {section.target for section in found if section.target} | {"verify.json", "summary.md"}
        assert files == {"train.json", "inference.json", "loop.json", "roofline.json", "memory.json",
                         "fused.json", "verify.json", "summary.md"}  # fmt: skip
    words = " ".join(word for section in script.sections(tmp_path, True) for word in section.words)
    assert "cuda" not in words and "bf16" not in words and " 256 " not in words


def test_only_runs_the_gate_and_what_it_names(gpu, tmp_path):
    script = gpu("gpu_check")
    known = script.sections(tmp_path, False)
    assert [section.name for section in script.choose(known, "qat,train-b0")] == ["gate", "qat", "train-b0"]
    assert script.choose(known, "") == known
    with pytest.raises(UserError, match="--only trian: there is no such section"):
        script.choose(known, "trian")


@pytest.mark.slow  # ten minutes on two cores: some thirty processes
def test_all_of_it_rehearses(tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu_check.py", "--rehearse", "--out", out, "--work", tmp_path / "work"],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found = json.loads((out / "verify.json").read_text())["rows"]
    assert done.returncode == 0, [row for row in found if row["status"] == "fail"]
    assert len(list(out.iterdir())) == 8 and not [path for path in out.iterdir() if path.is_dir()]
    page.write_page(out)
