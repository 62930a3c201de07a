"""Every Python x torch x transformers that we say we support: import, model tests, a tiny training, a tiny export.

    python tests/matrix/matrix.py            # all of them; an hour on two cores, 35 GB in .venv/matrix
    python tests/matrix/matrix.py py3.12 5.17.0    # those whose name holds both words

One environment per Python and torch; the transformers in it is exchanged. Everything else is the newest that fits, as
`pip install` would choose. Needs uv, whose environments share their files. Prints a table; exits with 1 if a cell
failed. What no installer can put together is in the table with the reason and is no failure. PYTHONS names the
interpreters, as `python3.12` or by path; uv downloads one that is not here.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path


ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".venv/matrix"
PYTHONS = os.environ.get("PYTHONS", "python3.11 python3.12 python3.13").split()
# torch compiles slower on 3.13.0 than on 3.13.1 and says so; it is right, and our tests take warnings for errors
PYTEST = ("-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore:Guards may run slower on Python 3.13.0")
STEPS = {
    "import": ("-c", "import effnet_hf, effnet_hf.training, effnet_hf.conversion, effnet_hf.export, effnet_hf.hub"),
    "model": (
        *PYTEST,
        "tests/test_configuration.py",
        "tests/test_image_processing.py",
        "tests/test_modeling.py",
        "tests/test_modeling_backbone.py",
        "tests/test_modeling_training.py",
        "tests/test_registration.py",
        "tests/test_remote_code.py",
    ),
    "train": (
        *PYTEST,
        "tests/test_quiet.py",
        "tests/test_scripts.py::test_profile_writes_a_trace_and_a_table",
        "tests/test_scripts.py::test_validate_prints_figures_or_json",
        "tests/training/test_loop.py::test_interrupted_run_resumes_bit_exactly",
    ),
    "export": (*PYTEST, "tests/export/test_float.py", "tests/export/test_runtime.py"),
}
# uv's words when the versions exclude each other, or when a package has no wheel and does not build
NOT_INSTALLABLE = ("No solution found", "Failed to build")


@dataclass
class Row:
    """One combination, and per step its seconds, negative where it failed."""

    python: str
    torch: str
    torchvision: str
    transformers: str
    seconds: dict[str, float] = field(default_factory=dict)
    reason: str = ""

    @property
    def name(self) -> str:
        return f"{label(self.python)} torch {self.torch} transformers {self.transformers}"


def label(python: str) -> str:
    """`python3.12`, `/opt/3.12.1/bin/python` -> `py3.12`."""
    version = re.findall(r"3\.\d+", python)
    if not version:
        sys.exit(f"matrix.py: error: PYTHONS holds {python!r}; name an interpreter with its version, e.g. python3.12")
    return f"py{version[-1]}"


def pinned(file: str, package: str) -> str:
    """The version that a file of requirements/ names."""
    return re.search(rf"^{package}==(\S+)$", (ROOT / "requirements" / file).read_text("utf-8"), re.M)[1]


def combinations() -> list[Row]:
    torches = [("2.11.0", "0.26.0"), (pinned("constraints.txt", "torch"), pinned("constraints.txt", "torchvision"))]
    transformers = [pinned("constraints.txt", "transformers"), "5.17.0", pinned("transformers5.txt", "transformers")]
    return [Row(python, *torch, version) for python, torch, version in product(PYTHONS, torches, transformers)]


def install(row: Row, uv: str, environment: dict) -> Path:
    """The interpreter of the row's environment; raises CalledProcessError with uv's words."""
    folder = FOLDER / f"{label(row.python)}-torch{row.torch}"
    python = folder / "bin/python"
    if not python.exists():
        subprocess.run([uv, "venv", "--quiet", "--python", row.python, folder], env=environment, check=True)
    wanted = [
        f"torch=={row.torch}",
        f"torchvision=={row.torchvision}",
        f"transformers=={row.transformers}",
        "pytest>=8.2",
    ]
    command = [uv, "pip", "install", "--quiet", "--upgrade", "--python", python, *wanted, "--editable", ".[onnx]"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stderr=subprocess.PIPE, text=True)
    return python


def check(row: Row, uv: str) -> None:
    """Fills in the row; what each step printed is in .venv/matrix/logs."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment.setdefault("UV_CACHE_DIR", str(FOLDER / "cache"))  # on the same disk, so that files can be shared
    environment.setdefault("OMP_NUM_THREADS", "1")
    try:
        python = install(row, uv, environment)
    except subprocess.CalledProcessError as error:
        row.reason = " ".join((error.stderr or str(error)).split())
        if not any(words in row.reason for words in NOT_INSTALLABLE):
            row.seconds["import"] = -1.0
        return
    logs = FOLDER / "logs"
    logs.mkdir(exist_ok=True)
    for step, arguments in STEPS.items():
        log = logs / f"{row.name.replace(' ', '-')}-{step}.log"
        start = time.monotonic()
        with log.open("w") as output:
            code = subprocess.run(
                [python, *arguments], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
            ).returncode
        seconds = time.monotonic() - start
        row.seconds[step] = seconds if code == 0 else -seconds
        if code:
            told = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
            failed = [line for line in told if line.startswith(("FAILED", "ERROR"))] or told[-1:]
            row.reason += f"{step}, see {log.relative_to(ROOT)}:\n  " + "\n  ".join(failed) + "\n"


def table(rows: list[Row]) -> str:
    """One line per combination: seconds, or FAILED; then the reasons."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}}" + "".join(f"{step:>12}" for step in STEPS)]
    for row in rows:
        cells = [f"{'FAILED' if (spent := row.seconds[step]) < 0 else f'{spent:.0f} s'}" for step in row.seconds]
        lines.append(f"{row.name:{width}}" + "".join(f"{cell:>12}" for cell in cells or ["cannot be installed"]))
    return "\n".join([*lines, *(f"\n{row.name}: {row.reason.strip()}" for row in rows if row.reason)])


def main(words: list[str]) -> int:
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if uv is None:
        sys.exit("matrix.py: error: uv is not installed; pip install uv")
    rows = [row for row in combinations() if all(word in row.name for word in words)]
    if not rows:
        sys.exit(
            f"matrix.py: error: no combination is called {' '.join(words)!r}; they are\n"
            + "\n".join(row.name for row in combinations())
        )
    FOLDER.mkdir(parents=True, exist_ok=True)
    for row in rows:
        check(row, uv)
        print(table([row]), flush=True)
    print(f"\n{table(rows)}")
    return int(any(spent < 0 for row in rows for spent in row.seconds.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
