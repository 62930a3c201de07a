"""A job on two "machines" (launchers on loopback) loses a process, or a whole machine, and mends itself.

    python tests/training/elastic.py FOLDER [--scenario NAME …] [--launcher torchrun|accelerate] [--json FILE]

Each machine is a launcher of its own with one training process; they know each other by an address only. SIGKILL
falls in the middle of an epoch, on

  worker    the second machine's process
  first     the first machine's process, which writes the checkpoints and holds the lock
  machine   the second machine as a whole, launcher and process, which is then started again by the same command
  shrink    the second machine for good, where one is enough (--nnodes 1:2): the other goes on alone

Exit code 0 means that every job ended by itself, with the weights, optimizer, average, random states and figures of
two processes that nobody disturbed, to the bit; after `shrink` (of a recipe that draws nothing per process), with
their losses within 1e-5.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil


try:
    from .workbench import cheap_training, fingerprint, read_rows, small_recipe, write_squares
except ImportError:  # as a script
    sys.path.insert(0, str(Path(__file__).parent))
    sys.path.insert(0, str(Path(__file__).parents[2]))  # this checkout, not a package installed from elsewhere
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from workbench import (  # type: ignore[no-redef]
        cheap_training,
        fingerprint,
        read_rows,
        small_recipe,
        write_squares,
    )

from accelerate import debug_launcher

from effnet_hf.cli import ArgumentParser
from effnet_hf.training import train


KILL_AT = 7  # steps of the first epoch's 20
SETTINGS = {"checkpoint_every_steps": 3, "quiet": False}
STEADY = {"survival_prob": 1.0, "dropout_rate": 0.0, "mixup": 0.0}  # what draws per process, left out
# Without it torch leaves a launcher that comes back waiting for an address that the others told once only.
AGAIN = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1"],
    # --multi_gpu, because without a GPU it starts several processes through MPI otherwise; ours then find none.
    "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--mixed_precision=no"],
}


class Job:
    """Two machines that run one recipe."""

    def __init__(self, folder: Path, nodes: str = "2", launcher: str = "torchrun", restarts: int = 3, **changes):
        folder.mkdir(parents=True)
        self.output, self.nodes, self.launcher, self.restarts = folder / "run", nodes, launcher, restarts
        self.document = folder / "recipe.yaml"
        self.document.write_text(small_recipe(data_in(folder.parent), self.output, **changes).to_yaml())
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.logs = [folder / f"machine-{number}.log" for number in range(2)]
        self.machines = [self.start(number) for number in range(2)]

    def start(self, number: int, *flags: str) -> subprocess.Popen:
        command = [*LAUNCHERS[self.launcher], "--rdzv_backend=c10d"]
        command += [f"--rdzv_conf=is_host={int(number == 0)},last_call_timeout=2"]
        if self.launcher == "torchrun":
            command += [f"--nnodes={self.nodes}", f"--rdzv_endpoint=127.0.0.1:{self.port}", "--rdzv_id=job"]
        else:
            command += ["--num_machines=2", "--num_processes=2", f"--machine_rank={number}"]
            command += ["--main_process_ip=127.0.0.1", f"--main_process_port={self.port}"]
        command += [f"--max_restarts={self.restarts}", "--monitor_interval=0.2"]
        command += [__file__, "--worker", "--config", str(self.document), "--resume", "auto"]
        environment = {**os.environ, **AGAIN, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        with open(self.logs[number], "a") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def process(self, number: int) -> psutil.Process:
        """The training process of a machine."""
        tree = psutil.Process(self.machines[number].pid).children(recursive=True)
        return next(each for each in tree if "--worker" in each.cmdline() and not _launches(each))

    def wait_for(self, steps: int, seconds: float = 600) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if (self.output / "metrics.jsonl").is_file() and len(read_rows(self.output, "train")) >= steps:
                return
            if any(machine.poll() is not None for machine in self.machines):
                break
            time.sleep(0.01)
        self.end()
        raise SystemExit(f"the job never came to step {steps}:\n{self.said()}")

    def wait(self, seconds: float = 600) -> list[int]:
        end = time.monotonic() + seconds
        try:
            return [machine.wait(max(0.1, end - time.monotonic())) for machine in self.machines]
        except subprocess.TimeoutExpired:
            raise SystemExit(f"the job did not end:\n{self.said()}") from None
        finally:
            self.end()

    def end(self) -> None:
        for machine in self.machines:
            if machine.poll() is None:
                _kill(machine.pid)

    def said(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in self.logs)


def _launches(process: psutil.Process) -> bool:
    return any("torch.distributed.run" in word or "accelerate" in word for word in process.cmdline())


def _kill(pid: int) -> None:
    """A machine's end: launcher and all."""
    tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    for process in tree:
        process.kill()
    psutil.wait_procs(tree, 10)


def play(scenario: str, folder: Path, launcher: str = "torchrun") -> Job:
    """Runs a job through a scenario to its end.

    Raises:
        SystemExit: it did not end well, or never began again.
    """
    job = Job(folder, "1:2" if scenario == "shrink" else "2", launcher, **changes_of(scenario))
    job.wait_for(KILL_AT)
    if scenario in ("worker", "first"):
        job.process(int(scenario == "worker")).send_signal(signal.SIGKILL)
    else:
        _kill(job.machines[1].pid)
        job.machines[1].wait()
        job.machines[1:] = [] if scenario == "shrink" else [job.start(1)]
    codes = job.wait()
    if any(codes) or not (job.output / "summary.json").is_file() or len(read_rows(job.output, "run")) < 2:
        raise SystemExit(f"{scenario}: the machines ended with {codes}:\n{job.said()}")
    return job


def changes_of(scenario: str) -> dict:
    return SETTINGS | (STEADY if scenario == "shrink" else {})


def undisturbed(folder: Path, scenario: str) -> Path:
    """The same recipe by two processes, once for all scenarios that have it; its folder."""
    output = folder / ("steady" if scenario == "shrink" else "usual")
    if not output.exists():
        recipe = small_recipe(data_in(folder), output, **changes_of(scenario))
        with cheap_training():
            debug_launcher(train, args=(recipe,), num_processes=2)
    return output


def data_in(folder: Path) -> Path:
    data = folder / "data"
    return data if data.is_dir() else write_squares(data, per_class=54)


def differing(ours: Path, usual: Path, scenario: str) -> list[str]:
    """What of a job's end is not the usual one's."""
    if scenario == "shrink":
        pairs = zip(*([row["train.loss"] for row in read_rows(run, "train")] for run in (ours, usual)), strict=True)
        return [f"loss of step {i + 1}: {a} and {b}" for i, (a, b) in enumerate(pairs) if abs(a - b) > 1e-5 * abs(b)]
    found, wanted = fingerprint(ours), fingerprint(usual)
    return [name for name in wanted if found[name] != wanted[name]]


def main(folder: Path, scenarios: list[str], launcher: str, result: Path | None) -> int:
    results = []
    for scenario in scenarios:
        usual, started = undisturbed(folder, scenario), time.monotonic()
        job = play(scenario, folder / scenario, launcher)
        wrong = differing(job.output, usual, scenario)
        restarts = len(read_rows(job.output, "run")) - 1
        what = "like the undisturbed one" if not wrong else f"DIFFERENT: {', '.join(wrong)}"
        print(f"{scenario:<8} {restarts} restart(s), {time.monotonic() - started:.0f} s: {what}", flush=True)
        results.append({"name": scenario, "launcher": launcher, "restarts": restarts, "wrong": wrong})
    if result is not None:
        result.write_text(json.dumps(results, indent=1) + "\n")
    return int(any(each["wrong"] for each in results))


def work() -> None:
    """A training process: `train.py` with a small B0."""
    from effnet_hf.commands import run_command

    sys.argv.remove("--worker")
    with cheap_training():
        run_command("train")


if __name__ == "__main__":
    if "--worker" in sys.argv:
        work()
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenario", nargs="+", choices=["worker", "first", "machine", "shrink"])
    parser.add_argument("--launcher", choices=LAUNCHERS, default="torchrun")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    every = ["worker", "first", "machine", "shrink"] if arguments.launcher == "torchrun" else ["worker", "first"]
    sys.exit(main(arguments.folder, arguments.scenario or every, arguments.launcher, arguments.json))
