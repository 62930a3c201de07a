"""The same global batch as one process, as accumulation, and as two processes: are the losses the same?

    python tests/training/compare_layouts.py FOLDER [--two_machines]

`--two_machines` adds two `torchrun --nnodes 2` on loopback, one process each. (`accelerate launch` starts several
processes without a GPU only through MPI.)
Every layout sees the same micro-batches of 4 (batch norm's statistics are per micro-batch in all of them), so nothing
needs to be switched off but what draws differently per process: dropout, stochastic depth, mixup.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path


try:
    from .workbench import small_recipe, write_squares
except ImportError:  # as a script
    sys.path.insert(0, str(Path(__file__).parent))
    sys.path.insert(0, str(Path(__file__).parents[2]))  # this checkout, not a package installed from elsewhere
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from workbench import small_recipe, write_squares  # type: ignore[no-redef]

from accelerate import debug_launcher

from effnet_hf.training import train, validate_checkpoint


QUIET = {"survival_prob": 1.0, "dropout_rate": 0.0, "mixup": 0.0, "ema_decay": 0.0}


def figures(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["train.loss"] for row in rows if row["type"] == "train"]


def launch_two_machines(recipe, output_dir: Path) -> None:
    """Two launchers that know each other only by address, as on two machines."""
    document = output_dir.with_suffix(".yaml")
    document.write_text(recipe.replace(output_dir=str(output_dir)).to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    command += ["--master_addr", "127.0.0.1", "--master_port", "29511"]
    script = [str(Path(__file__).parents[2] / "train.py"), "--config", str(document)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    machines = [subprocess.Popen([*command, "--node_rank", str(rank), *script], env=environment) for rank in range(2)]
    codes = [machine.wait() for machine in machines]
    if any(codes):
        raise SystemExit(f"the two machines failed with exit codes {codes}")


def validated_what_was_saved(recipe, scratch: Path) -> bool:
    """Batch norm's statistics differ between processes; validation must be of those that are saved."""
    data, output = write_squares(scratch / "more", validation=2), scratch / "saved"  # pictures for both processes
    recipe = recipe.replace(data_dir=str(data), output_dir=str(output), epochs=1, batch_norm_momentum=0.5)
    debug_launcher(train, args=(recipe,), num_processes=2)
    claimed = json.loads((output / "summary.json").read_text())
    saved = validate_checkpoint(str(output), str(data), num_workers=0)
    print(f"2 processes validated {claimed['n']} pictures: {claimed['loss']:.6f}, what they saved {saved['loss']:.6f}")
    return claimed["n"] == saved["n"] and abs(claimed["loss"] - saved["loss"]) < 1e-5 * saved["loss"]


def main(scratch: Path, two_machines: bool) -> int:
    data = write_squares(scratch / "data", validation=1)  # one batch, so that one of two processes has none
    recipe = small_recipe(data, scratch / "accumulated", **QUIET)
    debug_launcher(train, args=(recipe,), num_processes=1)
    debug_launcher(train, args=(recipe.replace(output_dir=str(scratch / "two")),), num_processes=2)
    layouts = {"1 process x 2 accumulated": "accumulated", "2 processes": "two"}
    if two_machines:
        launch_two_machines(recipe, scratch / "machines")
        layouts["2 machines x 1 process"] = "machines"
    if not validated_what_was_saved(recipe, scratch):
        return 1
    losses = {name: figures(scratch / folder) for name, folder in layouts.items()}
    reference = losses["1 process x 2 accumulated"]
    worst = 0.0
    for name, values in losses.items():
        print(f"{name:<26}", *(f"{loss:.6f}" for loss in values))
        worst = max([worst, *(abs(a - b) / abs(a) for a, b in zip(reference, values))])
    print(f"largest relative difference {worst:.2e}")
    return int(worst > 1e-5 or len({len(values) for values in losses.values()}) > 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--two_machines", action="store_true")
    arguments = parser.parse_args()
    sys.exit(main(arguments.folder, arguments.two_machines))
