import ctypes
import gc
import statistics
from pathlib import Path

import psutil
import pytest

from effnet_hf import EfficientNetNVImageProcessor
from effnet_hf.data import BatchPlan, build_loaders
from effnet_hf.data.regions import library

from .torture import encode, photo


LIBC = ctypes.CDLL(None)


def write_pictures(root: Path) -> str:
    for split, count in (("train", 80), ("val", 20)):
        for label, name in enumerate(("a", "b", "c")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                data = encode(photo(100 * label + i, 400 + i, 300), "JPEG")
                (root / split / name / f"{i:03}.jpg").write_bytes(data if i % 20 else data[:500])
    return str(root)


def measure() -> tuple[float, int, int]:
    """Resident MB of this process and its workers, their open handles, and their mappings of shared memory.

    Resident is what they hold themselves, anonymous and shared memory. Left out are pages of libraries, which come and
    go with other programs, and what this process has freed and glibc keeps.
    """
    gc.collect()
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    memory = sum(_kilobytes(process.pid) for process in processes) / 1e3
    handles = sum(process.num_fds() for process in processes)
    maps = [Path(f"/proc/{process.pid}/maps").read_text() for process in processes]
    return memory, handles, sum(text.count("/dev/shm/") for text in maps)


def _kilobytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in status if line.startswith(("RssAnon:", "RssShmem:")))


@pytest.mark.slow  # two minutes
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("loader", ["imagefolder", "dali-cpu"])
def test_memory_and_handles_stay_flat_over_twenty_epochs(tmp_path, recipe, loader):
    if loader == "dali-cpu" and library() is None:
        pytest.skip("NVIDIA DALI is not installed")
    options = recipe(
        data_dir=write_pictures(tmp_path / "data"), loader=loader, num_workers=2, augmentation="autoaugment", mixup=0.2,
        max_bad_files=1.0,
    )  # fmt: skip
    figures, (_, handles_before, shared_before) = [], measure()
    processor = EfficientNetNVImageProcessor.for_image_size(160)
    with build_loaders(options, processor, BatchPlan(16)) as ours:
        for epoch in range(20):
            for batch in ours.train.epoch(epoch, start_update=epoch % 3):
                assert batch["pixel_values"].shape[1:] == (3, 160, 160)
            for batch in ours.val.epoch():
                del batch
            figures.append(measure())
    memory, handles, shared = zip(*figures[2:])  # two epochs to warm up in
    print(f"\n{loader}, MB by epoch: {' '.join(f'{row[0]:.0f}' for row in figures)}")
    print(f"{loader}: {min(memory):.0f} to {max(memory):.0f} MB, {min(handles)} to {max(handles)} handles,", end=" ")
    print(f"{min(shared)} to {max(shared)} shared mappings in epochs 3 to 20")
    # The middle of the first and of the last six epochs: a leak adds up, one epoch's batches in flight do not.
    first, last = (statistics.median(part) for part in (memory[:6], memory[-6:]))
    assert 0.98 * first <= last <= 1.02 * first and max(memory) <= 1.02 * first
    assert max(handles[-6:]) <= max(handles[:6]) + 2 and max(shared[-6:]) <= max(shared[:6]) + 2
    _, handles_left, shared_left = measure()
    assert psutil.Process().children(recursive=True) == [], "the workers outlive their loaders"
    assert handles_left <= handles_before + 2 and shared_left == shared_before
