"""What we set out to reach, and which rows fall short of it."""

from .contenders import OURS


# On a CPU, times as fast as timm's and torchvision's eager model.
CPU = {"eager": 1.0, "compile": 1.25, "torch": 1.0, "folded": 1.0}
# On an H200: pictures per second of training in fp16 or bf16, of inference at the best batch; milliseconds at batch 1.
TRAINING_IPS = {"b0": 7500, "b4": 1050}
TRAINING_SPEED_UP = 1.35  # over timm's eager model in channels_last
INFERENCE_IPS = {"b0": 40_000, "b4": 5_000}
LATENCY_MS = {"b0": 0.6, "b4": 1.3}
WIDESE = 0.97  # of the plain network's speed


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


def _gpu(results: list[dict]) -> list[str]:
    sentences = []
    training = [row for row in _rows(results, "train") if row["precision"] in ("fp16", "bf16")]
    inference = [row for row in _rows(results, "inference") if row["precision"] in ("fp16", "bf16")]
    fastest = {variant: [row["ips"] for row in training if row["variant"] == variant] for variant in _names(training)}
    for variant, goal in TRAINING_IPS.items():
        if best := max(fastest.get(variant, [0])):
            sentences += [f"training {variant}: {best:,.0f} img/s, the goal is {goal:,}."] if best < goal else []
            ratios = [
                row["speed_up"]["timm"]["wall"] for row in training if _is(row, variant) and "timm" in row["speed_up"]
            ]
            if ratios and max(ratios) < TRAINING_SPEED_UP:
                sentences.append(f"training {variant}: {max(ratios):.2f} x timm, the goal is {TRAINING_SPEED_UP}.")
        plain, wide = (max(fastest.get(name, [0])) for name in (variant, f"widese-{variant}"))
        if plain and wide and wide < WIDESE * plain:
            sentences.append(f"training widese-{variant}: {wide / plain:.3f} of {variant}, the goal is {WIDESE}.")
    for variant, goal in INFERENCE_IPS.items():
        rows = [row for row in inference if _is(row, variant)]
        if rows and (best := max(row["ips"] for row in rows)) < goal:
            sentences.append(f"inference of {variant}: {best:,.0f} img/s, the goal is {goal:,}.")
        single = [row["p50_ms"] for row in rows if row["batch"] == 1]
        if single and min(single) > LATENCY_MS[variant]:
            sentences.append(f"one picture through {variant}: {min(single):.2f} ms, the goal is {LATENCY_MS[variant]}.")
    return sentences


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


def _names(rows: list[dict]) -> set[str]:
    return {row["variant"] for row in rows}


def _is(row: dict, variant: str) -> bool:
    return row["variant"] == variant
