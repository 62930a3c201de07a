"""Writes the result tables of our pages from the committed result files: python benchmarks/result_tables.py

A page holds `<!-- numbers: NAME -->` and `<!-- /numbers -->`; what stands between is replaced by what the function of
that name returns. `--check` writes nothing and says which pages are out of date, as `tests/docs/test_numbers.py` does.
A table of somebody else's figures has a line `<!-- quoted: WHOSE -->` above it instead.
"""

import json
import math
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev

from interop import render as render_interop
from interop import rows, summary
from lib.contenders import OURS
from lib.report import table, with_interval
from lib.versions import versions

from effnet_hf.cli import ArgumentParser, run
from effnet_hf.errors import UserError
from effnet_hf.files import atomic_write
from effnet_hf.tables import markdown_table


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks"
PAGES = ("README.md", "docs/**/*.md", "benchmarks/*.md")
MARKED = re.compile(r"(<!-- numbers: (\S+) -->)(\n?)(.*?)(<!-- /numbers -->)", re.DOTALL)

SCRATCH = "2026-11-24-imagenette-cpu"
FINETUNED = "2026-11-25-imagenette-finetune-cpu"
QUANTIZED = "2026-11-25-qat-cpu"
DATA = "2026-11-25-data-cpu"
LOADERS = "2026-11-27-data-cpu"
LIKE = "2026-11-27-like-for-like"
EXPORT = "2026-11-25-export-cpu"
H200 = "2026-11-26-h200"
SERVE = "2026-11-26-serve"
RELIABILITY = "2026-11-26-reliability"
PREDICT = "2026-11-27-predict-cpu"
TUNED = "2026-11-27-finetune-cpu"
TRAINER = "2026-11-27-trainer-cpu"
INTEROP = "2026-11-27-interop.json"
DETECTION = "2026-11-27-detection-cpu"
BROWSER = "2026-11-27-browser-cpu"
PROJECTS = {
    "effnet_hf": "ours, `--config finetune`",
    "transformers": "transformers' script",
    "timm": "timm's flags",
    "fastai": "fastai's `fine_tune`",
}
IMAGES = 1000  # that the Imagenette subset is validated on


def figure(file: str, *keys):
    """One value of a JSON file, by the keys (or positions) that lead to it."""
    value = json.loads((RESULTS / file).read_text("utf-8"))
    for key in keys:
        value = value[key]
    return value


def series(file: str, metric: str) -> list[float]:
    """Every value of a metric in a metrics.jsonl, in order; of `train.loss` the means of epochs."""
    kind = "epoch" if metric == "train.loss" else metric.split(".")[0]
    rows = map(json.loads, (RESULTS / file).read_text("utf-8").splitlines())
    return [row[metric] for row in rows if row["type"] == kind and metric in row]


def last(file: str, metric: str) -> float:
    return series(file, metric)[-1]


def bold(text: str) -> str:
    """The number before an interval in bold: `**47.2** (44.1 to 50.3)`."""
    number, _, rest = text.partition(" ")
    return f"**{number}** {rest}".rstrip()


def page(folder: str) -> str:
    """A link to a result page; `render` makes what starts with / relative to the page that it stands in."""
    return f"[page](/benchmarks/{folder}.md)"


def scratch() -> str:
    rows = []
    for label, file, marked in (
        ("B0, ours", "b0", bold),
        ("WideSE-B0, ours", "widese-b0", bold),
        (
            "B0, timm's model and loop on the same recipe (baseline); its own initialisation, AutoAugment levels and"
            " weight decay, whose share of the difference was not separated",
            "timm",
            str,
        ),
    ):
        rows.append([label, marked(with_interval(last(f"{SCRATCH}/{file}.jsonl", "val.top1"), IMAGES))])
    title = f"Imagenette subset from scratch, 128 px, 6 epochs, one CPU core ({page(SCRATCH)})"
    return markdown_table([title, "top-1, % (95 %, n = 1,000, one seed)"], rows)


def scratch_runs() -> str:
    rows = []
    for label, name, marked in (
        ("B0, ours", "b0", bold),
        ("WideSE-B0, ours", "widese-b0", bold),
        ("B0, timm's model and loop (baseline)", "timm", str),
    ):
        file = f"{SCRATCH}/{name}.jsonl"
        top1, ema = (with_interval(last(file, metric), IMAGES) for metric in ("val.top1", "val_ema.top1"))
        rows.append([label, str(len(series(file, "val.top1"))), marked(top1), ema, f"{last(file, 'train.loss'):.3f}"])
    header = ["run", "epochs", "last top-1, % (95 % interval, n = 1,000)", "moving average, last top-1, %"]
    return markdown_table([*header, "last train.loss"], rows)


def loop_overhead() -> str:
    first, *others = figure(f"{SCRATCH}/overhead.json", "rows")
    n = figure(f"{SCRATCH}/overhead.json", "settings", "repeats")
    title = f"training step, B0, 128 px, batch 32, one CPU thread, side by side ({page(SCRATCH)}), n = {n}"
    rows = [[first["step"], "1"], *([row["step"], row["CPU"]] for row in others)]
    return markdown_table([title, "CPU time, ± 0.01"], rows)


def finetuned() -> str:
    start = with_interval(last(f"{SCRATCH}/b0.jsonl", "val.top1"), IMAGES)
    rows = [[f"B0 from scratch, 128 px, 6 epochs ({page(SCRATCH)}, baseline)", start, "", ""]]
    for label, name in (("B0, warm-started", "b0"), ("WideSE-B0, warm-started", "widese-b0")):
        top1, top5, loss = (last(f"{FINETUNED}/{name}.jsonl", f"val.{metric}") for metric in ("top1", "top5", "loss"))
        rows.append([label, bold(with_interval(top1, IMAGES)), f"{top5:.1f}", f"{loss:.4f}"])
    return markdown_table(["model", "top-1, % (95 % interval, n = 1,000)", "top-5, %", "loss"], rows)


def tuned_runs() -> dict:
    """Of the fine-tuning comparison, in the order of its runs: `[folder][project]`, its rows by seed, of the folders
    that every project has been run on."""
    found: dict = {}
    for line in (RESULTS / TUNED / "runs.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["folder"], {}).setdefault(row["by"], {})[row["seed"]] = row
    return {folder: projects for folder, projects in found.items() if projects.keys() >= PROJECTS.keys()}


def spread(values: list[float]) -> float:
    """Half the 95 % interval of the mean of two or three values, by Student's t."""
    return {2: 12.706, 3: 4.303}[len(values)] * stdev(values) / math.sqrt(len(values))


def tuned() -> str:
    """Top-1 of every project, and how ours stands: the mean difference over seeds to each peer, with its interval."""
    rows = []
    for folder, projects in tuned_runs().items():
        row, verdict = [f"`{folder}`, {projects['effnet_hf'][0]['size']} px"], "best"
        if any(len(projects[name]) < 2 for name in PROJECTS):
            verdict = "not decided: one seed"
        for name in PROJECTS:
            top1 = [run["top1"] for run in projects[name].values()]
            half = f" ± {spread(top1):.1f}" if len(top1) > 1 else ""
            row.append(f"{mean(top1):.1f}{half} (n = {len(top1)})")
            ahead = [
                projects["effnet_hf"][seed]["top1"] - run["top1"]
                for seed, run in projects[name].items()
                if name != "effnet_hf" and seed in projects["effnet_hf"]
            ]
            if len(ahead) < 2:
                continue
            if abs(mean(ahead)) <= spread(ahead):
                verdict = "tied" if verdict == "best" else verdict
            elif mean(ahead) < 0:
                verdict = f"behind {name}"
        rows.append([*row, verdict])
    return markdown_table(["top-1, %, mean of n seeds ± 95 %", *PROJECTS.values(), "ours is"], rows)


def tuned_cost() -> str:
    """Epochs, optimizer steps and CPU seconds that each project got."""
    rows = []
    for folder, projects in tuned_runs().items():
        images = projects["timm"][0]["images"]
        cells = [
            f"{runs[0]['epochs']:g} / {runs[0]['steps']} / {mean(run['seconds'] for run in runs.values()):.0f}"
            for runs in (projects[name] for name in PROJECTS)
        ]
        rows.append([f"`{folder}`", f"{images[0]} / {images[1]}", *cells])
    return markdown_table(["epochs / steps / CPU seconds", "images", *PROJECTS.values()], rows)


def tuned_options() -> str:
    """What an option adds to the recipe: the mean difference over seeds, with its interval."""
    found: dict = {}
    for line in (RESULTS / TUNED / "options.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        found.setdefault((row["folder"], row["option"]), {})[row["seed"]] = row
    rows = []
    for (folder, option), runs in sorted(found.items(), key=lambda item: item[0][0]):  # otherwise as they were run
        top1, f1 = (mean(run[name] for run in runs.values()) for name in ("top1", "macro_f1"))
        cells = [f"`{folder}`", f"`{option}`" if option else "the recipe (baseline)", f"{top1:.1f}", f"{f1:.1f}"]
        if option:
            gained = [run["top1"] - found[folder, ""][seed]["top1"] for seed, run in runs.items()]
            cells.append(f"{mean(gained):+.1f} ± {spread(gained):.1f}")
        rows.append([*cells, *[""] * (not option)])
    header = ["folder", "option", f"top-1, %, mean of {len(runs)} seeds", "F1, %, mean of classes"]
    return markdown_table([*header, "top-1 gained, ± 95 %"], rows)


def trainer() -> str:
    """The same fine-tuning in five ways."""
    names = {
        "effnet_hf": "`effnet-hf train --config finetune` (baseline)",
        "trainer": "`examples/trainer/trainer.py`",
        "no_trainer": "`examples/trainer/no_trainer.py`",
        "script-margin": "transformers' script, the checkpoint as it is: at 110 px",
        "script-no_margin": "transformers' script, with a processor without a margin: at 96 px",
    }
    found: dict = {}
    for row in map(json.loads, (RESULTS / TRAINER / "runs.jsonl").read_text("utf-8").splitlines()):
        found.setdefault(row["by"], []).append(row)
    rows = []
    for by, name in names.items():
        if runs := found.get(by):
            top1 = [run["top1"] for run in runs]
            error = f" ± {spread(top1):.1f}" if len(top1) > 1 else ""
            own = f"{mean(run['own'] for run in runs):.1f}" if "own" in runs[0] else "the same preparation"
            seconds = f"{mean(run['seconds'] for run in runs):.0f}"
            rows.append([name, f"{mean(top1):.1f}{error} (n = {len(top1)})", own, seconds])
    header = ["way", "top-1, %, mean of n seeds ± 95 %", "by the script's own evaluation"]
    return markdown_table([*header, "CPU seconds of the process"], rows)


def tuning() -> str:
    """Top-1 on the folders that the recipe was chosen on."""
    found: dict = {}
    for line in (RESULTS / TUNED / "tuning.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["name"], {})[row["folder"]] = f"{row['top1']:.1f}"
    folders = ("tune-imagenette-20", "tune-imagenette-100", "tune-fashion-mnist")
    rows = [[name, *(top1.get(folder, "not run") for folder in folders)] for name, top1 in found.items()]
    return markdown_table(["top-1, % (n = 400, one seed)", *(f"`{folder}`" for folder in folders)], rows)


def quantized(*header: str) -> str:
    rows = []
    for model, name in (("B0", "b0"), ("WideSE-B0", "widese-b0")):
        for stage, label, marked in (("float", "float (baseline)", str), ("ptq", "PTQ", str), ("qat", "QAT", bold)):
            found = figure(f"{QUANTIZED}/{name}.json", stage)
            top1 = marked(with_interval(found["top1"], found["n"]))
            others = [f"{found['top5']:.1f}", f"{found['loss']:.4f}", f"{found['bytes'] / 1e6:.1f}"]
            rows.append([f"{model}, {label}", top1, *others])
    return markdown_table([*header, "top-5, %", "loss", "MB"], rows)


def second_start() -> str:
    rows = []
    for label, name in (("B0", "second-start-b0"), ("WideSE-B0", "second-start-widese-b0")):
        stages = figure(f"{QUANTIZED}/{name}.json")
        rows.append([label, *(f"{stages[stage]['top1']:.1f}" for stage in ("float", "ptq", "qat"))])
    return markdown_table(["top-1, % (n = 1,000)", "float", "PTQ", "QAT"], rows)


def quantization_cost() -> str:
    cost = figure(f"{QUANTIZED}/cost.json")
    seconds, images, rows = cost["seconds"], 2 * cost["batch_size"], []
    for label, name in (
        ("forward pass, evaluation (baseline)", "forward"),
        ("calibration", "calibration"),
        ("training step, float", "float step"),
        ("training step, QAT", "QAT step"),
    ):
        times = "1" if name == "forward" else f"{seconds[name] / seconds['forward']:.2f}"
        rows.append([label, f"{images / seconds[name]:.1f}", times])
    return markdown_table(["", "pictures/s", "times a forward pass"], rows)


def cpu_speed() -> str:
    """A digest of the page of like for like: timm in our mode, and our fastest way beside its fastest."""
    modes = {"eager": "torch", "folded": "folded", "compile": "compile", "ORT": "onnxruntime", "OpenVINO": "openvino"}
    rows = [["timm (baseline)", *["1"] * (len(modes) + 1), "1 in eager mode"]]
    for label, name, batch in (
        ("B0, training step, 224 px, batch 8", "train-b0-224", 8),
        ("B0, training step, 128 px, batch 32", "train-b0-128", 32),
        ("B0, inference, batch 1", "inference-b0", 1),
        ("B0, inference, batch 8", "inference-b0", 8),
        ("B4, inference, batch 1", "inference-b4", 1),
    ):
        found = figure(f"{LIKE}/{name}.json", "rows")
        ours = {row.get("mode") or row["runtime"]: row for row in found if (row["by"], row["batch"]) == (OURS, batch)}
        cells = [ours.get("eager" if way == "torch" else way, ours.get(way)) for way in modes.values()]
        same = ["–" if row is None else f"{row['same_mode']['timm']['cpu']:.2f}" for row in cells]
        best = min(ours.values(), key=lambda row: row["cpu_ms"])
        theirs = best["best"]["timm"]
        fastest = f"{theirs['cpu']:.2f} ({best.get('mode') or best['runtime']} / {theirs['mode']})"
        rows.append([label, *same, fastest, f"{best['speed_up']['timm']['cpu']:.2f}"])
    header = [f"times faster than timm in the same mode, one CPU thread, CPU time ({page(LIKE)})", *modes]
    return markdown_table([*header, "our fastest / timm's fastest", "our fastest / timm eager"], rows)


def cpu_loaders() -> str:
    ordinary, large = (figure(f"{LOADERS}/{name}.json", "rows") for name in ("throughput", "large"))
    rows = [["best of timm and torchvision (baseline)", "1", "1", "1"]]
    for name, label in (
        ("imagefolder", "`imagefolder`, and `dali-cpu`, with nvImageCodec"),
        ("imagefolder, --reducing_gap 2", "`imagefolder` with nvImageCodec, `--reducing_gap 2`"),
        ("imagefolder without nvImageCodec, --reducing_gap 2", "with simplejpeg alone, `--reducing_gap 2`"),
        ("imagefolder, Pillow only, --reducing_gap 2", "with neither, `--reducing_gap 2`"),
    ):
        times = [row["ratio_best"] for row in ordinary + large if row["name"] == f"effnet_hf {name}"]
        rows.append([label, *(f"**{value:.2f}**" for value in times)])
    title = f"one CPU core, JPEG to batch, times the best of timm and torchvision ({page(LOADERS)})"
    return markdown_table([title, "no policy", "AutoAugment", "12 megapixels, no policy"], rows)


def as_printed(file: str, key: str) -> str:
    """A whole table as the script that wrote the file prints it."""
    return table(figure(file, key))


def export_parity() -> str:
    rows = []
    for row in figure(f"{EXPORT}/parity.json", "parity"):
        name, count = row["model"].split(",")[0], row["pictures"].split()[0]
        others = [row[key] for key in ("largest difference", "largest logit", "top-1 agreement, %", "MB")]
        rows.append([f"`{name}`", str(row["pixels"]), count, *others])
    header = ["model", "pixels", "pictures", "largest difference of a logit", "largest logit", "top-1 agreement, %"]
    return markdown_table([*header, "MB"], rows)


def one_image(runtime: str) -> str:
    """Milliseconds of one image through B0 on the H200."""
    for row in figure(f"{H200}/inference.json", "rows"):
        if (row["by"], row["variant"], row["batch"], row["runtime"]) == ("effnet_hf", "b0", 1, runtime):
            return f"{row['p50_ms']:.2f} ms"
    raise KeyError(runtime)


def reliability() -> str:
    rows = []
    for path in sorted(
        (RESULTS / RELIABILITY).glob("*.json"), key=lambda path: figure(f"{RELIABILITY}/{path.name}", "order")
    ):
        row = json.loads(path.read_text("utf-8"))
        how = row["how"] + (f" ({row['skipped']} skipped there)" if row["skipped"] else "")
        rows.append([row["promise"], how, f"{row['tries']:,}", f"{row['survived']:,}"])
    return markdown_table(["promise", "how it is tested", "tries", "survived"], rows)


def kills() -> str:
    events, moments = (figure(f"{RELIABILITY}/{name}.json", "tries") for name in ("events", "moments"))
    return f"{events:,} kills at file-system events and {moments} at random moments"


def manifest_price() -> str:
    found = figure(f"{RELIABILITY}/price/b4.json")
    seconds = found["median_seconds"]
    return (
        f"B4, {found['megabytes']} MB with optimizer and best model: saving takes {seconds['with']:.1f} s instead of"
        f" {seconds['without']:.1f} s, and the check {seconds['check']:.1f} s ({found['device']}, median of"
        f" {found['n']})."
    )


TOP1 = "top-1, % (95 % interval, n = 1,000)"
TABLES: dict[str, Callable[[], str]] = {
    # digests, for the README and the guides
    "imagenette-scratch": scratch,
    "quantization": partial(
        quantized,
        f"to int8, Imagenette subset, from B0s fine-tuned to 97.0 % ({page(QUANTIZED)})",
        "top-1, % (95 %, n = 1,000)",
    ),
    "cpu-speed": cpu_speed,
    "cpu-loaders": cpu_loaders,
    "loop-overhead": loop_overhead,
    "h200-one-image-eager": partial(one_image, "torch"),
    "h200-one-image-graph": partial(one_image, "graphs"),
    "versions": versions,
    # whole tables, for the dated pages
    "scratch-runs": scratch_runs,
    "overhead-steps": partial(as_printed, f"{SCRATCH}/overhead.json", "rows"),
    "finetuned": finetuned,
    "tuned": tuned,
    "tuned-cost": tuned_cost,
    "tuned-options": tuned_options,
    "tuning": tuning,
    "trainer": trainer,
    "quantization-steps": partial(quantized, "model", TOP1),
    "quantization-second-start": second_start,
    "quantization-cost": quantization_cost,
    "quantization-step-ratio": lambda: f"**{figure(f'{QUANTIZED}/cost.json', 'qat_step_to_float_step'):.2f}**",
    "export-parity": export_parity,
    "predict-speed": partial(as_printed, f"{PREDICT}/speed.json", "rows"),
    "serve-load": partial(as_printed, f"{SERVE}/load.json", "load"),
    "serve-end": lambda: f"{figure(f'{SERVE}/load.json', 'end', 'seconds'):.1f} s",
    "reliability": reliability,
    "manifest-price": manifest_price,
    "kills": kills,
    "detection": partial(as_printed, f"{DETECTION}/results.json", "table"),
    "browser": partial(as_printed, f"{BROWSER}/answers.json", "table"),
    "interop": lambda: render_interop(figure(INTEROP)),
    "interop-summary": lambda: summary(rows(figure(INTEROP))),
    "loaders": partial(as_printed, f"{DATA}/throughput.json", "throughput"),
    "decoders": partial(as_printed, f"{DATA}/throughput.json", "decoders"),
    "loaders-regions": partial(as_printed, f"{LOADERS}/throughput.json", "rows"),
    "loaders-large": partial(as_printed, f"{LOADERS}/large.json", "rows"),
    "decoders-regions": partial(as_printed, f"{LOADERS}/throughput.json", "decoders"),
    "decoders-large": partial(as_printed, f"{LOADERS}/large.json", "decoders"),
    "reducing-pixels": partial(as_printed, f"{LOADERS}/reducing-pixels.json", "pixels"),
    "reducing-training": partial(as_printed, f"{LOADERS}/reducing-training.json", "training"),
    "reducing-answers": partial(as_printed, f"{LOADERS}/reducing-answers.json", "answers"),
    "opening": partial(as_printed, f"{DATA}/opening.json", "opening"),
    "dali-evaluation": partial(as_printed, f"{DATA}/dali.json", "evaluation"),
    "dali-operations": partial(as_printed, f"{DATA}/dali.json", "operations"),
}


def render(path: Path, text: str) -> str:
    """A page with everything between its markers written anew: on lines of its own where the marker ends its line.

    Raises:
        UserError: a marker names no table.
    """

    def relative(match: re.Match) -> str:
        return f"]({os.path.relpath(ROOT / match[1], path.parent)})"

    def fill(match: re.Match) -> str:
        opening, name, own_lines, _, closing = match.groups()
        if name not in TABLES:
            raise UserError(f"{path}: there are no numbers called {name}; there are {', '.join(TABLES)}.")
        content = re.sub(r"\]\(/([^)]+)\)", relative, TABLES[name]())
        around = "\n\n" if own_lines else ""
        return f"{opening}{around}{content}{around}{closing}"

    return MARKED.sub(fill, text)


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is out of date")
    check, stale = parser.parse_args(argv).check, 0
    for path in sorted(path for pattern in PAGES for path in ROOT.glob(pattern)):
        text = path.read_text("utf-8")
        new = render(path, text)
        if new != text:
            stale += 1
            print(f"{path.relative_to(ROOT)}: {'out of date' if check else 'written'}")
            if not check:
                with atomic_write(path) as file:
                    file.write(new)
    return int(check and stale > 0)


if __name__ == "__main__":
    run(main)
