"""The claims that a GPU is asked about. Each function is a section; it writes a row for everything it looks at."""

import importlib
import json
import os
import pkgutil
import platform
import shutil
import time
import xml.etree.ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import resuming, runs
from .rows import AT_ONCE, ROOT, Book, Failed, call, expect, relative


OPTIONAL = (
    "modelopt", "nvidia", "onnx", "onnxruntime", "onnxscript", "openvino", "optimum", "simplejpeg", "tensorrt",
    "triton", "ai_edge_litert", "ai_edge_quantizer", "coremltools", "executorch", "litert_torch", "ncnn", "pnnx",
    "torchao",
)  # fmt: skip


def gate(book: Book) -> None:
    """Nothing else starts unless all of this holds."""
    import torch

    with book.row("versions and device") as row:
        versions = [f"python {platform.python_version()}"]
        for name in ("torch", "torchvision", "transformers", "accelerate", "timm", "datasets", "evaluate", "modelopt",
                     "triton", "sklearn", "scipy", "torchmetrics", "onnx", "onnxruntime", "nvidia.dali"):  # fmt: skip
            try:
                versions.append(f"{name} {getattr(importlib.import_module(name), '__version__', 'there')}")
            except ImportError:
                versions.append(f"{name} missing")
        row.evidence = ", ".join(versions)
        for name in ("sklearn", "scipy", "torchmetrics"):  # what only the end of a validation or a training imports
            expect(f"{name} missing" not in versions, f"{name} is not installed, and validating needs it")
        if not book.rehearse:
            expect(torch.cuda.is_available(), f"torch {torch.__version__} sees no CUDA device; {row.evidence}")
            card, (free, total) = torch.cuda.get_device_properties(0), torch.cuda.mem_get_info()
            row.evidence = (
                f"{card.name}, sm{card.major}{card.minor}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, CUDA"
                f" {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, NCCL {torch.cuda.nccl.version()},"
                f" {len(os.sched_getaffinity(0))} cores; {row.evidence}"
            )
    with book.row("every module imports") as row:
        from lib.environment import environment

        import effnet_hf

        (book.work / "facts.json").write_text(json.dumps(environment(torch.device(book.device))))

        imported, missing = 0, {}
        for module in pkgutil.walk_packages(effnet_hf.__path__, "effnet_hf."):
            try:
                importlib.import_module(module.name)
                imported += 1
            except ImportError as error:
                if (error.name or "").partition(".")[0] not in OPTIONAL:
                    raise
                missing[module.name] = error.name
        row.evidence = f"{imported} modules" + "".join(f", {name} needs {what}" for name, what in missing.items())
    with book.row("convolution, product and their gradients on the device") as row:
        torch.manual_seed(0)
        torch.backends.cudnn.allow_tf32 = False
        worst = 0.0
        pixels, weight = torch.randn(4, 16, 32, 32), torch.randn(24, 16, 3, 3)
        for layout in (torch.contiguous_format, torch.channels_last):
            results = []
            for device in ("cpu", book.device):
                x = pixels.clone().to(device, memory_format=layout).requires_grad_()
                w = weight.clone().to(device, memory_format=layout).requires_grad_()
                torch.conv2d(x, w, padding=1).square().mean().backward()
                results.append([tensor.grad.cpu() for tensor in (x, w) if tensor.grad is not None])
            worst = max(worst, *(relative(mine, right) for mine, right in zip(results[1], results[0])))
        row.evidence = f"largest relative difference from the CPU {worst:.1e}"
        expect(worst < 1e-4, row.evidence)
    with book.row("digits for the runs that follow") as row:
        row.evidence = call(["examples/write_digits.py", str(book.work / "digits")], 60).strip().splitlines()[-1]
        if book.rehearse:
            for split, most in (("train", 4), ("val", 2)):
                for folder in (book.work / "digits" / split).iterdir():
                    for path in sorted(folder.iterdir())[most:]:
                        path.unlink()


def gpu_tests(book: Book) -> None:
    """`pytest -m gpu`, a process for each file, so that one that hangs or cannot be imported costs only itself."""
    marker = "mark." + "gpu"
    files = [path for path in sorted(ROOT.glob("tests/**/test_*.py")) if marker in path.read_text("utf-8")]
    if book.rehearse:  # those that can do without
        files = [path for path in files if "gpu_device" in path.read_text("utf-8")]

    def run(path: Path) -> None:
        name = str(path.relative_to(ROOT))
        with book.row(f"pytest -m gpu {name}") as row:
            report = book.work / f"junit-{path.stem}.xml"
            # A library's warning on a card is no wrong result, so warnings are not errors here.
            words = "-m pytest -m gpu -W default -rfE -v --tb=short".split()
            words += ["-o", f"cache_dir={book.work / 'pytest'}", f"--junitxml={report}", name]
            trouble: Failed | None = None
            try:
                call(words, book.left(), EFFNET_HF_REHEARSE="1" if book.rehearse else "")
            except Failed as failure:
                trouble = failure
            if not report.exists():
                raise trouble or Failed("pytest wrote no report")
            cases = xml.etree.ElementTree.parse(report).getroot().findall(".//testcase")
            bad = [
                case.get("name", "")
                for case in cases
                if case.find("failure") is not None or case.find("error") is not None
            ]
            skipped = [case.find("skipped") for case in cases if case.find("skipped") is not None]
            reasons = sorted({str(reason.get("message")) for reason in skipped if reason is not None})
            row.evidence = f"{len(cases) - len(bad) - len(skipped)} passed, {len(bad)} failed, {len(skipped)} skipped"
            row.evidence += f": {'; '.join(reasons)[:300]}" if reasons else ""
            if bad or trouble:
                raise Failed(f"{row.evidence}; failed: {', '.join(bad)}", trouble.output if trouble else [])

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(run, files))


def variants(book: Book) -> None:
    """Logits and gradients of every architecture beside the CPU's."""
    import torch

    from effnet_hf import EfficientNetNVConfig, EfficientNetNVForImageClassification
    from effnet_hf.training.precision import allow_tf32

    allow_tf32(False)
    torch.set_num_threads(2 if book.rehearse else 6)
    names = ["b0", "b4", "widese-b0", "widese-b4", "lite0", "b7", "lite4"]
    names += [f"{kind}{i}" for i in range(8) for kind in ("b", "widese-b", "lite") if kind != "lite" or i < 4]
    most = 96 if not book.rehearse else 64  # pixels; fewer leave batch norm too few values to be well conditioned

    def network(name: str, size: int):
        torch.manual_seed(0)
        config = EfficientNetNVConfig.from_variant(name, num_labels=100, survival_prob=1.0, dropout_rate=0.0)
        model = EfficientNetNVForImageClassification(config)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.no_grad():
            model.train()(torch.randn(8, 3, size, size))  # statistics as a trained network has them
        return model

    for name in dict.fromkeys(names if not book.rehearse else names[:1] + names[2:3] + names[4:5]):
        with book.row(f"{name}: logits of the device beside the CPU's") as row:
            size = min(most, EfficientNetNVConfig.from_variant(name).image_size)
            model, pixels = network(name, size).eval(), torch.randn(2, 3, size, size)
            worst = {}
            with torch.no_grad():
                right = model(pixels).logits
                for label, layout in (("nchw", torch.contiguous_format), ("channels_last", torch.channels_last)):
                    model.to(book.device, memory_format=layout)
                    given = pixels.to(book.device, memory_format=layout)
                    worst[f"fp32 {label}"] = (relative(model(given).logits.cpu(), right), 5e-5)
                    halves = {
                        "bf16": (torch.bfloat16, 0.5),
                        "fp16": (torch.float16, 0.07),
                    }  # on a CPU bf16 is 0.05 to 0.2
                    for precision, (dtype, bound) in halves.items():
                        if precision == "bf16" or not book.rehearse:
                            with torch.autocast(book.device, dtype=dtype):
                                logits = model(given).logits.float().cpu()
                            worst[f"{precision} {label}"] = (relative(logits, right), bound)
            row.evidence = f"{size} px: " + ", ".join(f"{what} {error:.1e}" for what, (error, _) in worst.items())
            over = [what for what, (error, bound) in worst.items() if not error <= bound]
            expect(not over, f"too far: {', '.join(over)}; {row.evidence}")
        if name not in ("b0", "b4", "widese-b0", "lite0"):
            continue
        with book.row(f"{name}: gradients of a training step beside the CPU's") as row:
            size = min(64, most)
            model, pixels, labels = network(name, size).train(), torch.randn(8, 3, size, size), torch.arange(8)
            results = []
            for device, layout in (("cpu", torch.contiguous_format), (book.device, torch.channels_last)):
                model.to(device, memory_format=layout)
                model.zero_grad()
                loss = model(pixels.to(device, memory_format=layout), labels=labels.to(device)).loss
                loss.backward()
                results.append((loss.item(), torch.cat([p.grad.flatten().cpu() for p in model.parameters()])))
            (loss, right), (other, mine) = results
            row.evidence = (
                f"loss {loss:.6f} and {other:.6f}, gradient's relative difference {relative(mine, right):.1e}"
            )
            bound = (
                0.1 if name.startswith("lite") else 5e-3
            )  # ReLU6 has corners, where rounding switches a gradient off
            expect(abs(loss - other) < 1e-4 * abs(loss) and relative(mine, right) < bound, row.evidence)


def photographs(book: Book) -> None:
    """Crops of scikit-learn's two photographs as JPEGs, for the measurement that loads real images."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    with book.row("photographs for the loaders' measurement") as row:
        target = book.work / "photographs"
        if not target.exists():
            originals = [Image.fromarray(image) for image in load_sample_images().images]
            rng, staged = np.random.default_rng(0), book.work / "photographs-unfinished"
            shutil.rmtree(staged, ignore_errors=True)

            def write(job: tuple[str, int, int, float]) -> None:
                split, label, number, share = job
                photograph = originals[number % 2]
                width, height = (int(share * side) for side in photograph.size)
                left, top = number * 37 % (photograph.width - width + 1), number * 53 % (photograph.height - height + 1)
                path = staged / split / f"class{label}" / f"{number:04d}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                crop = photograph.crop((left, top, left + width, top + height))
                crop.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=92)

            train, val = (16, 8) if book.rehearse else (2000, 100)
            jobs = [("train", i % 10, i, rng.uniform(0.5, 1)) for i in range(train)]
            jobs += [("val", i % 10, i, rng.uniform(0.5, 1)) for i in range(val)]
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(write, jobs))
            if not book.rehearse:  # an epoch of some steps; a real one does not start anew every second either
                for path in list(staged.glob("train/*/*.jpg")):
                    for copy in range(1, 6):
                        os.link(path, path.with_name(f"{path.stem}-{copy}.jpg"))
            staged.rename(target)
        found = list(target.glob("*/*/*.jpg"))
        size = sum(path.stat().st_size for path in found) / len(found) / 1e3
        distinct = len({path.stat().st_ino for path in found})
        row.evidence = f"{len(found)} JPEGs ({distinct} distinct) of 500 x 375 pixels, {size:.0f} kB each"


SECTIONS = {
    function.__name__: function
    for function in (
        gate,
        gpu_tests,
        variants,
        runs.precisions,
        runs.training,
        runs.compiled,
        runs.using,
        resuming.resume,
        runs.qat,
        photographs,
    )
}


def main(name: str, work: Path, rehearse: bool) -> int:
    """One section in this process; 1 if the gate has a row that failed."""
    deadline = float(os.environ.get("SECTION_DEADLINE", time.time() + 600))
    book = Book(name, work, rehearse, deadline)
    book.file.parent.mkdir(parents=True, exist_ok=True)
    SECTIONS[name](book)
    if name != "gate":
        return 0
    rows = [json.loads(line) for line in book.file.read_text().splitlines()]
    return int(any(row["status"] == "fail" for row in rows))
