"""The numbers in our pages and the result files they come from; `python benchmarks/check_numbers.py` compares them.

A row of `CLAIMS` is a page, a line (or part of one) of it with {names} in place of the numbers, and where each number
comes from. The line, filled in from the files, must stand in the page to the letter. `tests/docs/test_numbers.py` runs
the same and refuses a table row of the README's results that is neither here nor in `UNTRACED`.
"""

import json
import statistics
from pathlib import Path
from typing import NamedTuple

from compare_runs import wilson

from effnet_hf.benchmark.report import markdown_table
from effnet_hf.cli import ArgumentParser, run


ROOT = Path(__file__).parents[1]


class Claim(NamedTuple):
    page: str
    line: str
    values: dict


def series(file: str, metric: str) -> list[float]:
    """Every value of a metric in a metrics.jsonl, in order."""
    rows = [json.loads(line) for line in (ROOT / "benchmarks" / file).read_text().splitlines()]
    return [row[metric] for row in rows if row["type"] == _row_type(metric) and metric in row]


def last(file: str, metric: str) -> float:
    return series(file, metric)[-1]


def figure(file: str, *keys):
    """One value of a JSON file, by the keys (or positions) that lead to it."""
    value = json.loads((ROOT / "benchmarks" / file).read_text())
    for key in keys:
        value = value[key]
    return value


def median(file: str, *keys) -> float:
    return statistics.median(figure(file, *keys))


def interval(file: str, metric: str, n: int = 1000) -> str:
    """`47.2 (44.1 to 50.3)`: the last value in percent of n pictures, with its 95 % interval."""
    return wilson(last(file, metric), n)


def bold(text: str) -> str:
    """The number before the interval in bold: `**47.2** (44.1 to 50.3)`."""
    number, rest = text.split(" ", 1)
    return f"**{number}** {rest}"


def _row_type(metric: str) -> str:
    kind = metric.split(".")[0]
    return "epoch" if metric == "train.loss" else kind


IMAGENETTE = "2026-11-24-imagenette-cpu"
FINETUNED = "2026-11-25-imagenette-finetune-cpu"
QUANTIZED = "2026-11-25-qat-cpu"
DATA = "2026-11-25-data-cpu"
SPEED = "2026-11-25-cpu"
OTHER_CPU = "2026-11-26-cpu"
EXPORT = "2026-11-25-export-cpu"


def _imagenette() -> list[Claim]:
    claims = []
    for label, file, marked in (
        ("B0, ours", "b0.jsonl", bold),
        ("WideSE-B0, ours", "widese-b0.jsonl", bold),
        ("B0, timm's model and loop (baseline)", "timm.jsonl", str),
    ):
        path = f"{IMAGENETTE}/{file}"
        top1, ema = interval(path, "val.top1"), interval(path, "val_ema.top1")
        short = label.replace(" (baseline)", " on the same recipe (baseline)")
        values: dict = {"top1": marked(top1), "ema": ema, "loss": f"{last(path, 'train.loss'):.3f}"}
        values["epochs"] = len(series(path, "val.top1"))
        claims.append(Claim("README.md", f"| {short} | {{top1}} |", values))
        page = f"benchmarks/{IMAGENETTE}.md"
        claims.append(Claim(page, f"| {label} | {{epochs}} | {{top1}} | {{ema}} | {{loss}} |", values))
    rows = figure(f"{IMAGENETTE}/overhead.json", "rows")
    for line in markdown_table(rows).splitlines():
        claims.append(Claim(f"benchmarks/{IMAGENETTE}.md", "{line}", {"line": line}))
    for row in rows[1:]:
        claims.append(Claim("README.md", "| {step} | {cpu} |", {"step": row["step"], "cpu": row["CPU"]}))
    return claims


def _finetuned() -> list[Claim]:
    claims = []
    for label, file in (("B0, warm-started", "b0.jsonl"), ("WideSE-B0, warm-started", "widese-b0.jsonl")):
        path = f"{FINETUNED}/{file}"
        values: dict = {"top1": bold(interval(path, "val.top1")), "top5": f"{last(path, 'val.top5'):.1f}"}
        values["loss"] = f"{last(path, 'val.loss'):.4f}"
        claims.append(Claim(f"benchmarks/{FINETUNED}.md", f"| {label} | {{top1}} | {{top5}} | {{loss}} |", values))
    return claims


def _quantized() -> list[Claim]:
    claims = []
    page = f"benchmarks/{QUANTIZED}.md"
    for model, file in (("B0", "b0.json"), ("WideSE-B0", "widese-b0.json")):
        for stage, label, marked in (("float", "float (baseline)", str), ("ptq", "PTQ", str), ("qat", "QAT", bold)):
            found = figure(f"{QUANTIZED}/{file}", stage)
            values = {"top1": marked(wilson(found["top1"], found["n"])), "top5": f"{found['top5']:.1f}"}
            values |= {"loss": f"{found['loss']:.4f}", "mb": f"{found['bytes'] / 1e6:.1f}"}
            for where in (page, "README.md"):
                claims.append(Claim(where, f"| {model}, {label} | {{top1}} | {{top5}} | {{loss}} | {{mb}} |", values))
    for model, file in (("B0", "second-start-b0.json"), ("WideSE-B0", "second-start-widese-b0.json")):
        cells = [f"{figure(f'{QUANTIZED}/{file}', stage, 'top1'):.1f}" for stage in ("float", "ptq", "qat")]
        claims.append(Claim(page, f"| {model} | {{cells}} |", {"cells": " | ".join(cells)}))
    seconds = figure(f"{QUANTIZED}/cost.json", "seconds")
    for label, name in (("calibration", "calibration"), ("training step, float", "float step")):
        values = {"ips": f"{16 / seconds[name]:.1f}", "ratio": f"{seconds[name] / seconds['forward']:.2f}"}
        claims.append(Claim(page, f"| {label} | {{ips}} | {{ratio}} |", values))
    step = {"ratio": f"{figure(f'{QUANTIZED}/cost.json', 'qat_step_to_float_step'):.2f}"}
    claims.append(Claim(page, "A QAT step costs **{ratio}** times a float step", step))
    return claims


def _data() -> list[Claim]:
    """Whole tables as benchmark.py and dali_difference.py print them, and docs/data.md's digest of one."""
    claims = []
    for file, table in (
        ("throughput.json", "throughput"),
        ("throughput.json", "decoders"),
        ("opening.json", "opening"),
        ("dali.json", "evaluation"),
        ("dali.json", "operations"),
    ):
        for row in markdown_table(figure(f"{DATA}/{file}", table)).splitlines():
            claims.append(Claim(f"benchmarks/{DATA}.md", "{row}", {"row": row}))
    rows = figure(f"{DATA}/throughput.json", "throughput")
    for loader in ("imagefolder", "dali-cpu"):
        ratios = [row["ratio_best"] for row in rows if row["name"] == f"effnet_hf {loader}"]
        values = {"loader": loader, "none": f"{ratios[0]:.2f}", "policy": f"{ratios[1]:.2f}"}
        for page in ("docs/data.md", "README.md"):
            claims.append(Claim(page, "| `{loader}` | **{none}** | **{policy}** |", values))
    return claims


def _speed() -> list[Claim]:
    """The README's digest of the page that `benchmark.py page` renders."""
    claims = []
    steps, runtimes = ("eager", "compile"), ("torch", "compile", "onnxruntime")
    other = f"B0, inference, batch 1, another processor ([page](benchmarks/{OTHER_CPU}.md))"
    for label, file, key, modes in (
        ("B0, training step, 224 px, batch 8", f"{SPEED}/train-b0-small.json", "mode", steps),
        ("B4, training step, 192 px, batch 8", f"{SPEED}/train-b4.json", "mode", steps),
        ("B0, inference, batch 1", f"{SPEED}/inference-b0.json", "runtime", runtimes),
        ("B4, inference, batch 1", f"{SPEED}/inference-b4.json", "runtime", runtimes),
        (other, f"{OTHER_CPU}/inference-b0.json", "runtime", runtimes),
    ):
        ours = [row for row in figure(file, "rows") if row["by"] == "effnet_hf"]
        found = {row[key]: row["speed_up"]["timm"]["cpu"] for row in reversed(ours)}  # the smallest batch stands first
        cells = [f"{found[mode]:.2f}" for mode in modes] + ["–"] * (3 - len(modes))
        claims.append(Claim("README.md", f"| {label} | {{cells}} |", {"cells": " | ".join(cells)}))
    return claims


def _export() -> list[Claim]:
    claims = []
    for row in figure(f"{EXPORT}/parity.json", "parity"):
        name, count = row["model"].split(",")[0], row["pictures"].split()[0]
        figures = [row[key] for key in ("largest difference", "largest logit", "top-1 agreement, %", "MB")]
        cells = " | ".join([f"`{name}`", str(row["pixels"]), count, *figures])
        claims.append(Claim(f"benchmarks/{EXPORT}.md", "| {cells} |", {"cells": cells}))
    return claims


CLAIMS = [*_imagenette(), *_finetuned(), *_quantized(), *_speed(), *_data(), *_export()]

# Rows of the README's result tables that no file of ours backs, and why.
UNTRACED = {
    "| timm (baseline) | 1 | | |": "the unit",
    "| best of timm and torchvision (baseline) | 1 | 1 |": "the unit",
    "| bare forward, backward, optimizer step (baseline) | 1 |": "the unit",
    "| B0 | 77.16 ± .07 | 77.42 ± .11 | 19 / 11 |": "published by NVIDIA",
    "| WideSE-B0 | 77.84 ± .08 | 77.84 ± .02 | 19 / 10 |": "published by NVIDIA",
    "| B4 | 82.82 ± .04 | 82.85 ± .09 | 126 / 66 |": "published by NVIDIA",
    "| WideSE-B4 | 83.13 ± .11 | 83.10 ± .09 | 126 / 66 |": "published by NVIDIA",
}


def drifted(claim: Claim) -> str | None:
    """What the page should say and does not."""
    line = claim.line.format(**claim.values)
    return None if line in (ROOT / claim.page).read_text(encoding="utf-8") else f"{claim.page} should say: {line}"


def main() -> int:
    ArgumentParser(description="Compare the numbers in our pages with the files they come from.").parse_args()
    wrong = list(filter(None, map(drifted, CLAIMS)))
    print("\n".join(wrong or [f"{len(CLAIMS)} lines say what their files say"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    run(main)
