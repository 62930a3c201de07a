import gc
import importlib.util
from pathlib import Path

import psutil
import pytest

from effnet_hf.data import build_loaders

from .torture import encode, photo


def write_pictures(root: Path) -> str:
    for split, count in (("train", 80), ("val", 20)):
        for label, name in enumerate(("a", "b", "c")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                data = encode(photo(100 * label + i, 400 + i, 300), "JPEG")
                (root / split / name / f"{i:03}.jpg").write_bytes(data if i % 20 else data[:500])
    return str(root)


def measure() -> tuple[float, int, int]:
    """Resident MB of this process and its workers (shared pages once), open handles, blocks of shared memory."""
    gc.collect()
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    memory = sum(process.memory_full_info().pss for process in processes) / 1e6
    handles = sum(process.num_fds() for process in processes)
    shared = sum(1 for path in Path("/dev/shm").glob("torch_*")) if Path("/dev/shm").exists() else 0
    return memory, handles, shared


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["imagefolder", "dali-cpu"])
def test_memory_and_handles_stay_flat_over_twenty_epochs(tmp_path, recipe, loader):
    if loader == "dali-cpu" and importlib.util.find_spec("nvidia") is None:
        pytest.skip("NVIDIA DALI is not installed")
    options = recipe(
        data_dir=write_pictures(tmp_path / "data"), loader=loader, num_workers=2, augmentation="autoaugment", mixup=0.2,
        max_bad_files=1.0,
    )  # fmt: skip
    figures = []
    with build_loaders(options, image_size=160, per_device_batch_size=16) as ours:
        for epoch in range(20):
            for batch in ours.train.epoch(epoch, start_update=epoch % 3):
                assert batch["pixel_values"].shape[1:] == (3, 160, 160)
            for batch in ours.val.epoch():
                del batch
            figures.append(measure())
    memory, handles, shared = zip(*figures[2:])  # two epochs to warm up in
    print(f"{loader}: {min(memory):.0f} to {max(memory):.0f} MB, {min(handles)} to {max(handles)} handles")
    assert max(memory) <= 1.05 * memory[0]
    assert max(handles) <= handles[0] + 2 and max(shared) <= shared[0] + 2
    before = len(psutil.Process().children(recursive=True))
    assert before == 0, "the workers outlive their loaders"
