"""What we set out to reach, and which rows fall short of it."""

from .contenders import OURS


# On a CPU, times as fast as timm's and torchvision's eager model.
CPU = {"eager": 1.0, "compile": 1.25, "torch": 1.0, "folded": 1.0}
# On one H100 or H200, B0 and B4 in bf16 or fp16.
TRAINING = {"same_mode": 1.15, "speed_up": 1.35}  # times as fast as timm in the same mode, and as timm's eager model
INFERENCE = 1.1  # times as fast as timm in the same mode
LATENCY_MS = {"b0": 0.6, "b4": 1.3}  # one picture, replayed as a graph
LOOP = 1.03  # times as long as a bare step


def misses(results: list[dict]) -> list[str]:
    """A sentence for each goal that a result was measured for and does not reach; and for memory above timm's."""
    on_cuda = any(figures.get("hardware", {}).get("device") == "cuda" for figures in results)
    return [*(_gpu(results) if on_cuda else _cpu(results)), *_memory(results)]


def _rows(results: list[dict], kind: str) -> list[dict]:
    return [row for figures in results if figures["kind"] == kind for row in figures["rows"] if row["by"] == OURS]


def _cpu(results: list[dict]) -> list[str]:
    sentences = []
    for kind in ("train", "inference"):
        for row in _rows(results, kind):
            how = row.get("mode") or row["runtime"]
            for peer in ("timm", "torchvision") if how in CPU else ():
                ratio = row["speed_up"].get(peer)
                value = ratio and ratio.get("cpu", ratio["wall"])
                if value and round(value, 2) < CPU[how]:
                    what = f"{kind} of {row['variant']}, batch {row['batch']}, {how}"
                    sentences.append(f"{what}: {value:.2f} x {peer}, the goal is {CPU[how]}.")
    return sentences


def gpu_goals(results: list[dict]) -> list[dict]:
    """Each goal of a GPU that `results` have a figure for: `what`, `goal` and `measured` in words, `reached` or not."""
    found: list[dict] = []

    def judge(what: str, measured: float, goal: float, at_least: bool, unit: str) -> None:
        shown = round(measured, 2 if at_least else 3)
        reached = shown >= goal if at_least else shown <= goal
        texts = {"goal": f"{'>=' if at_least else '<='} {goal} {unit}", "measured": f"{shown} {unit}"}
        found.append({"what": what, **texts, "reached": reached})

    training = [row for row in _rows(results, "train") if _half(row)]
    inference = [row for row in _rows(results, "inference") if _half(row)]
    for variant in LATENCY_MS:
        own = [row for row in training if row["variant"] == variant]
        ratios = [(row["speed_up"]["timm"]["wall"], row["mode"]) for row in own if "timm" in row["speed_up"]]
        if ratios:
            best, mode = max(ratios)
            judge(f"training {variant}, {mode}", best, TRAINING["speed_up"], True, "x timm eager")
        for row in own:
            if "timm" in row.get("same_mode", {}):
                what = f"training {variant}, {row['mode']}, {row['precision']}, {row['layout']}"
                judge(what, row["same_mode"]["timm"]["wall"], TRAINING["same_mode"], True, "x timm in the same mode")
        own = [row for row in inference if row["variant"] == variant]
        for row in own:
            if "timm" in row.get("same_mode", {}):
                what = f"inference {variant}, batch {row['batch']}, {row['runtime']}, {row['precision']}"
                judge(what, row["same_mode"]["timm"]["wall"], INFERENCE, True, "x timm in the same mode")
        single = [row["p50_ms"] for row in own if row["batch"] == 1 and "graphs" in row["runtime"]]
        if single:
            judge(f"one picture through {variant} by graph", min(single), LATENCY_MS[variant], False, "ms")
    for figures in results:
        for row in figures.get("overhead", []):
            if row["step"] == "our loop":
                judge(f"our loop, {row['network']}", float(row["wall"]), LOOP, False, "x a bare step")
    return found


def _gpu(results: list[dict]) -> list[str]:
    return [
        f"{goal['what']}: {goal['measured']}, the goal is {goal['goal']}."
        for goal in gpu_goals(results)
        if not goal["reached"]
    ]


def _half(row: dict) -> bool:
    return row["precision"] in ("fp16", "bf16")


def _memory(results: list[dict]) -> list[str]:
    sentences = []
    for figures in results:
        if figures["kind"] != "memory":
            continue
        theirs = {(r["variant"], r["precision"], r["batch"]): r for r in figures["rows"] if r["by"] == "timm"}
        for row in figures["rows"]:
            peer = theirs.get((row["variant"], row["precision"], row["batch"]))
            for kind in ("training_mb", "inference_mb"):
                if row["by"] == OURS and peer and row[kind] > 1.005 * peer[kind]:
                    sentences.append(f"{kind} of {row['variant']}: {row[kind]:.1f}, timm {peer[kind]:.1f}.")
    return sentences
