"""How many loader processes this machine can feed: what the scheduler and the container really leave us."""

import contextlib
import os
from pathlib import Path


_MOST = 32  # per device; more only fight over memory bandwidth


def usable_cores(
    cgroup_root: str | os.PathLike = "/sys/fs/cgroup", membership: str | os.PathLike = "/proc/self/cgroup"
) -> float:
    """Cores this process may use: its affinity mask, or the CPU quota of its container or job if that is less."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    folders = _cgroup_folders(Path(cgroup_root), Path(membership))
    return min([affinity, *filter(None, map(_cgroup_quota, folders))])


def local_processes() -> int:
    """Training processes on this machine, as torchrun and `accelerate launch` announce them."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def choose_workers(device_type: str, cores: float | None = None, processes: int | None = None) -> int:
    """Loader processes for one training process, itself taking one core.

    On a CPU the model needs the cores more than the loader does: at most one of them loads.
    """
    cores = usable_cores() if cores is None else cores
    spare = int(cores / (processes or local_processes())) - 1
    most = _MOST if device_type != "cpu" else 1
    return max(0, min(spare, most))


def _cgroup_folders(root: Path, membership: Path) -> set[Path]:
    """This process's control groups of either version and all groups above them; each may set a quota."""
    folders = {root, root / "cpu"}  # all that a container sees of itself
    with contextlib.suppress(OSError, ValueError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "cpu" in controllers.split(","):
                own = (root / "cpu" if controllers else root) / path.strip("/")
                folders |= {own, *own.parents}
    return folders


def _cgroup_quota(folder: Path) -> float | None:
    try:  # version 2: "max 100000" or "150000 100000"
        share, per = (folder / "cpu.max").read_text().split()
        return None if share == "max" else int(share) / int(per)
    except (OSError, ValueError):
        pass
    try:  # version 1
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
        return quota / period if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
