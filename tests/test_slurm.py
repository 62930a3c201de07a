"""examples/slurm.sbatch against programs that stand for Slurm's: its two machines are this one."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from accelerate import debug_launcher

from effnet_hf.training import train

from .training.workbench import fingerprint, read_rows, small_recipe, write_squares


ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples/slurm.sbatch"
SRUN = """#!/bin/bash
# A task on each machine; its exit code is the highest.
for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node SLURM_PROCID=$node "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do wait "$task"; code=$?; [ $code -le ${worst:-0} ] || worst=$code; done
exit ${worst:-0}
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) for node in $(seq "$SLURM_NNODES"); do echo 127.0.0.1; done ;;
    requeue) echo "$2" >> "$QUEUE" ;;
esac
"""
LAUNCHES = '#!/bin/bash\nexec "$PYTHON" -m torch.distributed.run "$@"\n'
# In torchrun's place: notes what it was given, and does to the folder what a run does.
NOTES = """#!/bin/bash
printf '%s\\n' "$@" > "$NOTES.$SLURM_NODEID"
[ "$SLURM_NODEID" = 0 ] || exit 1
mkdir -p "$OUTPUT/checkpoints"
case $DOES in
    save) mkdir "$OUTPUT/checkpoints/update-$RANDOM$RANDOM"; exit 1 ;;
    end) touch "$OUTPUT/summary.json" ;;
esac
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Slurm is Linux's")


def directives() -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", SCRIPT.read_text(), re.M))


class Cluster:
    """A queue with one job in it."""

    def __init__(self, folder: Path, torchrun: str, **environment: str):
        self.queue, self.log = folder / "requeued", folder / "slurm.out"
        commands = folder / "bin"
        commands.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("torchrun", torchrun)):
            (commands / name).write_text(text)
            (commands / name).chmod(0o755)
        self.environment = {
            **os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": directives()["nodes"], "SLURM_GPUS_ON_NODE": "1",
            "QUEUE": str(self.queue), "PYTHON": sys.executable, "GLOO_SOCKET_IFNAME": "lo", **environment,
        }  # fmt: skip

    def start(self, *arguments) -> subprocess.Popen:
        """What `sbatch` does once it is the job's turn."""
        self.queue.unlink(missing_ok=True)
        with open(self.log, "a") as log:
            command = ["bash", str(SCRIPT), *map(str, arguments)]
            return subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=log, stderr=subprocess.STDOUT)

    def wait(self, job: subprocess.Popen, seconds: float = 600) -> bool:
        """Until it ends; whether it is in the queue again."""
        try:
            job.wait(seconds)
        finally:
            if job.poll() is None:
                for process in [*psutil.Process(job.pid).children(recursive=True), job]:
                    process.kill()
        return self.queue.is_file()

    def warn(self, job: subprocess.Popen) -> None:
        """`--signal`: to every process of the step, and not to the batch script."""
        name = directives()["signal"].partition("@")[0]
        assert not name.startswith("B:")
        (srun,) = psutil.Process(job.pid).children()
        for process in srun.children(recursive=True):
            process.send_signal(getattr(signal, f"SIG{name}"))


@pytest.fixture
def told(tmp_path):
    """Runs the script with a `torchrun` that only notes: what each machine is given, whether the job is requeued."""

    def run(does: str, output: Path, *more: str) -> tuple[list[list[str]], bool]:
        place = tmp_path / f"cluster-{len(list(tmp_path.iterdir()))}"
        place.mkdir()
        cluster = Cluster(place, NOTES, NOTES=str(place / "given"), OUTPUT=str(output), DOES=does)
        again = cluster.wait(cluster.start("b4", "/data/with a blank", output, *more))
        return [(place / f"given.{node}").read_text().splitlines() for node in range(2)], again

    return run


def test_both_machines_are_told_the_same_run_and_the_first_is_the_meeting_place(told, tmp_path):
    output = tmp_path / "my run"
    (first, second), _ = told("nothing", output, "--epochs", "3")
    assert [word for word in first if word not in second] == ["--rdzv-conf=is_host=1"]
    assert {"--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"} <= set(first)
    assert not any("restarts" in word for word in first)
    start = first.index("train.py")
    assert first[start:] == [
        "train.py", "--config", "b4", "--data_dir", "/data/with a blank", "--output_dir", str(output),
        "--resume", "auto", "--checkpoint_every_minutes", "15", "--epochs", "3",
    ]  # fmt: skip


def test_what_got_somewhere_is_queued_again_until_it_is_complete(told, tmp_path):
    output = tmp_path / "run"
    assert not told("nothing", output)[1]  # a mistyped folder
    assert told("save", output)[1]
    assert told("save", output)[1]
    assert not told("nothing", output)[1]  # it ends before it saves, each time
    assert not told("end", output)[1]


@pytest.mark.slow  # two starts of two launchers with a process each
def test_a_job_that_is_warned_saves_is_queued_again_and_ends_as_one_that_was_not(tmp_path):
    data, usual, output = write_squares(tmp_path / "data", per_class=32), tmp_path / "usual", tmp_path / "run"
    recipe = small_recipe(data, usual, quiet=False)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    debug_launcher(train, args=(recipe,), num_processes=2)
    cluster = Cluster(tmp_path, LAUNCHES, OMP_NUM_THREADS="1")
    job = cluster.start(tmp_path / "recipe.yaml", data, output)
    end = time.monotonic() + 600
    while not (output / "metrics.jsonl").is_file() or len(read_rows(output, "train")) < 3:
        assert time.monotonic() < end and job.poll() is None, cluster.log.read_text()
        time.sleep(0.01)
    cluster.warn(job)
    assert cluster.wait(job), cluster.log.read_text()
    assert "SIGUSR1: saved; go on with --resume auto" in cluster.log.read_text()
    assert not (output / "summary.json").exists()
    assert not cluster.wait(cluster.start(tmp_path / "recipe.yaml", data, output)), cluster.log.read_text()
    assert len(read_rows(output, "run")) == 2
    assert fingerprint(output) == fingerprint(usual)
