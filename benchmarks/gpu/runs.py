"""The scripts as typed, on digits: training in every precision and mode, resuming, quantization."""

import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from .rows import (
    AT_ONCE,
    Book,
    Failed,
    Skip,
    call,
    expect,
)


DIGITS = ("--config", "digits", "--num_workers", "2", "--quiet", "true")
SHORT, WHOLE = "4", "12"  # epochs of digits
FLOOR = 90.0  # percent of the held-out digits that any way to train reaches in four epochs


def precisions(book: Book) -> None:
    """The demo's whole recipe in fp32, bf16 and fp16."""
    half = "bf16" if book.rehearse else "fp16"  # a CPU has no fp16
    top1: dict[str, float] = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        jobs: list[Future] = [pool.submit(trained_digits, book)]
        for name, precision in (("bf16", "bf16"), ("fp16", half)):
            jobs.append(pool.submit(run, book, name, ["--precision", precision], epochs=WHOLE, top1=top1))
        for job in jobs:
            job.result()
    compare_precisions(book, top1, ("bf16", "fp16"))


def training(book: Book) -> None:
    """`train.py` as typed, in every way that needs no compiler."""
    half = "bf16" if book.rehearse else "fp16"
    digits = str(book.work / "digits")
    rendezvous = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", "train.py"]
    config = "cpu" if book.rehearse else "1gpu_tf32"
    launch = ["-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{config}.yaml", "train.py"]
    everything = f"--precision {half} --ema_decay 0.99 --per_device_batch_size 8 --gradient_clip 1 --mixup 0.1"
    everything += " --gradient_checkpointing true"
    small = "--image_size 32 --per_device_batch_size 8 --global_batch_size 16".split()
    ways: list[tuple] = [
        ("one rank under torchrun", "--precision bf16", rendezvous),
        (f"accelerate launch {config}.yaml", "", launch),
        ("no precision flag", "", None),
        ("one rank under torchrun, SyncBN", "--precision bf16 --sync_batch_norm true", rendezvous),
        (f"{half}, EMA, accumulation, clipping, mixup, gradient checkpointing", everything, None),
        ("tf32", "--precision tf32", None),
        ("a datasets source", f"--precision bf16 --dataset_name {digits}", None),
        ("dali-cpu", "--precision bf16 --loader dali-cpu", None),
        ("dali-gpu", "--precision bf16 --loader dali-gpu", None),
    ]
    with ThreadPoolExecutor(AT_ONCE if not book.rehearse else 2) as pool:
        jobs = [pool.submit(run, book, name, words.split(), launcher) for name, words, launcher in ways]
        for job in [*jobs, pool.submit(synthetic, book, small)]:
            job.result()


def compiled(book: Book) -> None:
    """`train.py --compile`, which takes a minute of one core to compile before it trains for seconds."""
    with ThreadPoolExecutor(AT_ONCE if not book.rehearse else 2) as pool:
        for mode in ("graphs", "full", "blocks"):
            words = ["--precision", "bf16", "--compile", "full" if book.rehearse else mode]
            pool.submit(run, book, f"compile {mode}, bf16", words)


def using(book: Book) -> None:
    """What classifies and validates with a trained checkpoint."""
    with ThreadPoolExecutor(AT_ONCE if not book.rehearse else 2) as pool:
        jobs = [pool.submit(classify, book, precision) for precision in ("fp16", "bf16", "fp32")]
        jobs += [pool.submit(validate, book, precision) for precision in ("fp32", "bf16")]
        for job in [*jobs, pool.submit(through_pipeline, book)]:
            job.result()


def run(
    book: Book,
    name: str,
    words: list[str],
    launcher: list[str] | None = None,
    epochs: str = SHORT,
    top1: dict[str, float] | None = None,
) -> None:
    """One training run and its row; its top-1 also goes into `top1`."""
    with book.row(f"train.py on digits: {name}") as row:
        if book.rehearse and ("tf32" in words or "--sync_batch_norm" in words):
            raise Skip("needs a GPU")
        folder = name.replace(" ", "-").replace(",", "")
        figures, loss, device = train_digits(book, folder, "1" if book.rehearse else epochs, words, launcher)
        if top1 is not None:
            top1[name] = figures["top1"]
        row.evidence = (
            f"top-1 {figures['top1']:.2f} % after {figures['epochs']} epochs, last training loss {loss:.4f},"
            f" {figures['seconds']:.0f} s; {device}"
        )
        expect(book.rehearse or figures["top1"] >= FLOOR, f"below {FLOOR:g} %: {row.evidence}")


def train_digits(book: Book, name: str, epochs: str, words: list[str], launcher: list[str] | None = None
                 ) -> tuple[dict, float, str]:  # fmt: skip
    """A run of its own: the summary, the last training loss, and the line that names device and precision.

    Raises:
        Skip: it needs a package that is not installed.
        Failed: it did not end well.
    """
    folder = book.work / "runs" / book.section / name
    shutil.rmtree(folder, ignore_errors=True)
    data = [] if "--dataset_name" in words else ["--data_dir", str(book.work / "digits")]
    command = [*(launcher or ["train.py"]), *DIGITS, *data, "--output_dir", str(folder), "--epochs", epochs, *words]
    try:
        printed = call(command, book.left())
    except Failed as failure:
        last = failure.output[-1] if failure.output else ""
        if (
            book.rehearse
            and "GPU" in last
            or "is not installed" in last
            or "needs nvidia-dali" in last
            or "pip install" in last
        ):
            raise Skip(last) from None
        raise
    summary = json.loads((folder / "summary.json").read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [value for line in metrics if (value := find(line, "train.loss")) is not None]
    device = next((line for line in printed.splitlines() if line.startswith("device")), "no line about the device")
    return summary, losses[-1], " ".join(device.split())


def find(line: dict, name: str):
    return line.get(name, line.get("values", {}).get(name) if isinstance(line.get("values"), dict) else None)


def trained_digits(book: Book) -> Path:
    """The fp32 model on digits, trained by whoever asks first; the others wait for it."""
    folder = book.work / "runs" / "model"
    with only_one(book.work / "model.lock"):
        if (folder / "summary.json").exists():
            return folder
        with book.row("train.py on digits: fp32") as row:
            whole = "1" if book.rehearse else WHOLE
            figures, loss, device = train_digits(book, "fp32", whole, ["--precision", "fp32"])
            shutil.copytree(book.work / "runs" / book.section / "fp32", folder)
            row.evidence = (
                f"top-1 {figures['top1']:.2f} % after {figures['epochs']} epochs, last training loss {loss:.4f},"
                f" {figures['seconds']:.0f} s; {device}"
            )
            expect(book.rehearse or figures["top1"] >= 90, f"below 90 %: {row.evidence}")
    if not (folder / "summary.json").exists():
        raise Skip("there is no digits model, see its row")
    return folder


@contextmanager
def only_one(path: Path):
    """A lock between processes and threads that the system lets go of when its holder dies."""
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compare_precisions(book: Book, top1: dict[str, float], names: tuple[str, ...]) -> None:
    with book.row("bf16 and fp16 reach fp32's accuracy on digits within a point") as row:
        right = json.loads((trained_digits(book) / "summary.json").read_text())["top1"]
        lacking = [name for name in names if name not in top1]
        if lacking:
            raise Skip(f"no run of {', '.join(lacking)} ended")
        row.evidence = f"fp32 {right:.2f}, " + ", ".join(f"{name} {top1[name]:.2f}" for name in names) + " % top-1"
        expect(book.rehearse or all(abs(top1[name] - right) <= 1 for name in names), row.evidence)


def synthetic(book: Book, words: list[str]) -> None:
    with book.row("train.py --benchmark train --loader synthetic") as row:
        folder = book.work / "runs" / "synthetic"
        printed = call(["train.py", "--benchmark", "train", "--loader", "synthetic", "--steps", "10", "--output_dir",
                        str(folder), "--precision", "bf16", *words], book.left())  # fmt: skip
        figures = json.loads((folder / "benchmark.json").read_text())
        row.evidence = next(line for line in printed.splitlines() if "images/s" in line)
        expect(figures["compute_ips"] > 0 and figures["latency_p50"] <= figures["latency_p99"], row.evidence)


def classify(book: Book, precision: str) -> None:
    with book.row(f"classify.py --precision {precision}") as row:
        if book.rehearse and precision == "fp16":
            raise Skip("needs a GPU")
        model, folder = trained_digits(book), book.work / "digits" / "val"
        printed = call(["classify.py", "--model", str(model), "--json", "--top_k", "1", "--precision", precision,
                        *(["--device", "cpu"] if book.rehearse else []), str(folder)], book.left())  # fmt: skip
        found = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
        right = sum(Path(entry["path"]).parent.name == entry["predictions"][0]["label"] for entry in found)
        row.evidence = f"{right} of {len(found)} held-out images right"
        count = len(list(folder.glob("*/*.png")))
        expect(len(found) == count and (book.rehearse or right >= 0.9 * count), row.evidence)


def validate(book: Book, precision: str) -> None:
    with book.row(f"validate.py --precision {precision}") as row:
        model = trained_digits(book)
        printed = call(["validate.py", "--model", str(model), "--data_dir", str(book.work / "digits"), "--json",
                        "--precision", precision, "--num_workers", "2"], book.left())  # fmt: skip
        figures = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
        best = json.loads((model / "summary.json").read_text())["top1"]
        row.evidence = f"top-1 {figures['top1']:.2f} %, in training {best:.2f} %, {figures['n']} images"
        expect(abs(figures["top1"] - best) <= (0.01 if precision == "fp32" else 1) or book.rehearse, row.evidence)


def through_pipeline(book: Book) -> None:
    with book.row("transformers.pipeline on the device, without our package's Auto classes") as row:
        model = trained_digits(book)
        picture = sorted((book.work / "digits" / "val" / "three").iterdir())[0]
        code = (
            "import sys, json; from transformers import pipeline;"
            "p = pipeline('image-classification', model=sys.argv[1], trust_remote_code=True, device=sys.argv[3]);"
            "print(json.dumps([str(p.model.device), type(p.model).__module__.split('.')[0], p(sys.argv[2])[0]]))"
        )
        printed = call(["-c", code, str(model), str(picture), book.device], book.left(),
                       HF_MODULES_CACHE=str(book.work / "modules"))  # fmt: skip
        device, package, best = json.loads(printed.strip().splitlines()[-1])
        row.evidence = f"{best['label']} ({best['score']:.2f}) for a three, on {device}, code from {package}"
        expect(device.startswith(book.device) and (book.rehearse or best["label"] == "three"), row.evidence)


def qat(book: Book) -> None:
    """Ranges found on the device beside the CPU's, a short fine-tuning, and the folder opened again."""
    with book.row("calibrated ranges beside the CPU's") as row:
        try:
            import modelopt.torch.quantization
        except ImportError as error:
            raise Skip(f"modelopt is not installed ({error})") from None
        import torch

        from effnet_hf.checkpoint import open_checkpoint
        from effnet_hf.quantization import calibrate, quantize
        from effnet_hf.quantization_efficientnet_nv import quantizers
        from effnet_hf.training.precision import allow_tf32

        allow_tf32(False)
        folder, ranges = trained_digits(book), {}
        generator = torch.Generator().manual_seed(0)
        batches = [torch.randn(32, 3, 32, 32, generator=generator) for _ in range(2 if book.rehearse else 6)]
        for device in ("cpu", book.device) if not book.rehearse else ("cpu", "again"):
            place = "cpu" if device == "again" else device
            network: torch.nn.Module = open_checkpoint(str(folder)).load()
            network.to(place)
            quantize(network)
            calibrate(network, [batch.to(place) for batch in batches])
            ranges[device] = {name: q._amax.float().cpu().flatten() for name, q in quantizers(network).items()}
        first, second = ranges.values()
        apart = {name: ((second[name] - right).abs() / right.abs().clamp_min(1e-9)).max().item()
                 for name, right in first.items()}  # fmt: skip
        worst = max(apart, key=lambda name: apart[name])
        weights = max(value for name, value in apart.items() if name.endswith(".weight"))
        row.evidence = (
            f"{len(apart)} ranges, {sum(value == 0 for value in apart.values())} equal to the bit, largest relative"
            f" difference {apart[worst]:.1e} ({worst}), of weights {weights:.1e}"
        )
        expect(weights == 0 and apart[worst] <= 0.01, row.evidence)
    with book.row("qat.py on digits, int8 within two points of float, the folder opens again") as row:
        try:
            import modelopt.torch.quantization  # noqa: F401
        except ImportError as error:
            raise Skip(f"modelopt is not installed ({error})") from None
        model, folder = trained_digits(book), book.work / "runs" / "int8"
        shutil.rmtree(folder, ignore_errors=True)
        data = ["--model", str(model), "--data_dir", str(book.work / "digits"), "--output_dir", str(folder)]
        digits = "--config imagenette-qat --crop_scale 0.6 --horizontal_flip 0 --resize_margin 0 --epochs 1"
        digits += " --global_batch_size 32 --per_device_batch_size 32 --num_workers 2 --quiet true"
        count = "1" if book.rehearse else "10"
        call(["qat.py", *data, *digits.split(), "--calibration_batches", count], book.left())
        figures = json.loads((folder / "quantization.json").read_text())
        shown = {name: entry["top1"] for name, entry in figures.items() if isinstance(entry, dict) and "top1" in entry}
        printed = call(["validate.py", "--model", str(folder), "--data_dir", str(book.work / "digits"), "--json",
                        "--num_workers", "2"], book.left())  # fmt: skip
        again = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))["top1"]
        row.evidence = (
            ", ".join(f"{name} {value:.2f}" for name, value in shown.items()) + f", reopened {again:.2f} % top-1"
        )
        best = max(shown.get("qat", 0), shown.get("ptq", 0))
        expect(book.rehearse or (best >= shown["float"] - 2 and abs(again - best) <= 1), row.evidence)
