"""How many loader processes this machine can feed: what the scheduler and the container really leave us."""

import contextlib
import os
from pathlib import Path

import psutil


_MOST = 32  # per device; more only fight over memory bandwidth


def usable_cores(
    cgroup_root: str | os.PathLike = "/sys/fs/cgroup", membership: str | os.PathLike = "/proc/self/cgroup"
) -> float:
    """Cores this process may use: its affinity mask, or the CPU quota of its container or job if that is less."""
    return min(len(_own_mask()), _quota(cgroup_root, membership))


def own_cores(
    cgroup_root: str | os.PathLike = "/sys/fs/cgroup", membership: str | os.PathLike = "/proc/self/cgroup"
) -> float:
    """This process's share of [`usable_cores`] among the training processes of this machine.

    A core is divided by the processes whose affinity mask holds it, a quota by all. Masks may follow the GPU
    (`enable_cpu_affinity`), so each process has its own. They are read from the kernel: training processes are the
    children of one launcher. Where those cannot be found, all are taken to share every core.
    """
    processes, mask = local_processes(), _own_mask()
    masks = _masks_of_all() if processes > 1 else [mask]
    if len(masks) != processes:
        masks = [mask] * processes
    share = sum(1 / max(1, sum(core in each for each in masks)) for core in mask)
    return min(share, _quota(cgroup_root, membership) / processes)


def local_processes() -> int:
    """Training processes on this machine, as torchrun and `accelerate launch` announce them."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def choose_workers(device_type: str, cores: float | None = None) -> int:
    """Loader processes for one training process, itself taking one of its `cores` ([`own_cores`] by default).

    On a CPU the model needs the cores more than the loader does: at most one of them loads.
    """
    spare = int(own_cores() if cores is None else cores) - 1
    most = _MOST if device_type != "cpu" else 1
    return max(0, min(spare, most))


def _own_mask() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _masks_of_all() -> list[set[int]]:
    """Affinity masks of the training processes with this one's parent, its own included."""
    masks = []
    with contextlib.suppress(psutil.Error):
        launcher = psutil.Process().parent()
        for process in launcher.children() if launcher is not None else []:
            with contextlib.suppress(psutil.Error, AttributeError):  # gone, another user's, or no Linux
                if "LOCAL_RANK" in process.environ():
                    masks.append(set(process.cpu_affinity()))
    return masks


def _quota(root: str | os.PathLike, membership: str | os.PathLike) -> float:
    quotas = map(_cgroup_quota, _cgroup_folders(Path(root), Path(membership)))
    return min(filter(None, quotas), default=float("inf"))


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
