"""What limits a run, the loader or the device, in one sentence, from measured times."""

FREE = 0.05  # a device that waits less than this share of its time is kept busy


def limit_sentence(
    data_wait: float,
    compute: float,
    *,
    loader: str = "imagefolder",
    num_workers: int = 0,
    free_cores: float = 0,
    device_type: str = "cpu",
    dali_installed: bool = False,
) -> str:
    """Says whether loading or computing limits a run, and what to change.

    Args:
        data_wait: seconds spent waiting for batches.
        compute: seconds spent on everything else of the same steps.
        loader: `--loader`.
        num_workers: loader processes of this training process.
        free_cores: cores that this process could still give to loading.
        device_type: "cuda" or "cpu".
        dali_installed: whether DALI could be used.
    """
    total = data_wait + compute
    share = data_wait / total if total > 0 else 0.0
    if share < FREE:
        return f"The device is the limit: it waits for data {share:.1%} of the time; faster loading would not help."
    gain = f", and could go up to {total / compute:.1f}x as fast" if compute * 100 > total else ""
    if loader == "synthetic":
        advice = "synthetic batches are made once, in the first step; measure a later one"
    elif free_cores >= 1:
        advice = f"raise --num_workers from {num_workers} to {num_workers + int(free_cores)}, there are idle cores"
    elif device_type == "cuda" and loader != "dali-gpu":
        advice = "all cores are busy, so let the GPU decode: --loader dali-gpu" + _install(dali_installed)
    elif loader == "imagefolder":
        advice = "all cores are busy; --loader dali-cpu decodes only what a crop needs" + _install(dali_installed)
    else:
        advice = "all cores are busy; store the pictures smaller, short side about 1.5 times the crop, or augment less"
    return f"The loader is the limit: the device waits for data {share:.0%} of the time{gain}; {advice}."


def _install(installed: bool) -> str:
    return "" if installed else " (pip install nvidia-dali-cuda130)"
