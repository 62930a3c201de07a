"""Runs that stop: resumed, overflowing, and what they hold of the card's memory from epoch to epoch."""

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .rows import AT_ONCE, Book, call, expect, relative, tail
from .runs import DIGITS, train_digits, trained_digits


def resume(book: Book) -> None:
    """A run in two launches beside one in a single launch; overflow; memory over epochs."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        jobs = [pool.submit(in_two_launches, book, deterministic) for deterministic in (False, True)]
        jobs += [pool.submit(overflow, book)]
        reserved_memory(book)
        for job in jobs:
            job.result()


def in_two_launches(book: Book, deterministic: bool) -> None:
    import torch
    from safetensors.torch import load_file

    label = "deterministic" if deterministic else "default kernels"
    flags = ["--precision", "bf16"] + (["--deterministic", "true"] if deterministic else [])

    def last(name: str) -> Path:
        return sorted((book.work / "runs" / book.section / name / "checkpoints").glob("update-*"))[-1]

    with book.row(f"stopped after one epoch and resumed, {label}") as row:
        whole, parts = f"whole-{deterministic}", f"parts-{deterministic}"
        with ThreadPoolExecutor(2) as pool:
            other = pool.submit(train_digits, book, whole, "2", flags)
            folder = book.work / "runs" / book.section / parts
            shutil.rmtree(folder, ignore_errors=True)
            data = ["--data_dir", str(book.work / "digits"), "--output_dir", str(folder)]
            command = ["train.py", *DIGITS, *data, "--epochs", "2", *flags]
            call([*command, "--run_epochs", "1"], book.left())
            call([*command, "--resume", "auto"], book.left())
            summary, _, _ = other.result()
        resumed = json.loads((folder / "summary.json").read_text())
        files = [last(whole) / "model.safetensors", last(parts) / "model.safetensors"]
        one, two = (load_file(path) for path in files)
        equal = len({hashlib.sha256(path.read_bytes()).hexdigest() for path in files}) == 1
        weights = [torch.cat([tensor.double().flatten() for tensor in state.values()]) for state in (one, two)]
        row.evidence = (
            f"final weights {'equal to the bit' if equal else f'differ by {relative(weights[1], weights[0]):.1e}'},"
            f" validation loss {summary['loss']:.6f} and {resumed['loss']:.6f}"
        )
        if deterministic:
            expect(equal, row.evidence)
        close = abs(summary["loss"] - resumed["loss"]) <= 0.1 * abs(summary["loss"]) + 0.05
        expect(equal or close, row.evidence)


def overflow(book: Book) -> None:
    """A network whose activations leave fp16's range in the forward pass."""
    import torch
    from safetensors.torch import load_file, save_file

    precision = "bf16" if book.rehearse else "fp16"
    factor = float("inf") if book.rehearse else 1e6
    with book.row("an overflow in the forward pass stops in one line, and nothing is saved") as row:
        poisoned = book.work / "runs" / "poisoned"
        shutil.rmtree(poisoned, ignore_errors=True)
        shutil.copytree(trained_digits(book), poisoned, ignore=shutil.ignore_patterns("checkpoints"))
        state = load_file(poisoned / "model.safetensors")
        name = next(name for name, tensor in state.items() if "bn" in name and name.endswith("weight"))
        state[name] = torch.where(torch.arange(len(state[name])) == 0, factor, state[name])
        save_file(state, poisoned / "model.safetensors", metadata={"format": "pt"})
        folder = book.work / "runs" / "overflow"
        shutil.rmtree(folder, ignore_errors=True)
        words = ["--data_dir", str(book.work / "digits"), "--model", str(poisoned), "--output_dir", str(folder)]
        words += ["--epochs", "1", "--precision", precision]
        printed = call(["train.py", *DIGITS, *words], book.left(), code=2)
        errors = [line for line in printed.splitlines() if "error:" in line]
        saved = [path.name for path in folder.rglob("*.safetensors")]
        row.evidence = (
            f"{name} x {factor:g}: {errors[-1] if errors else 'no line'}; saved: {', '.join(saved) or 'nothing'}"
        )
        row.output = tail(printed)
        expect(len(errors) == 1 and "Traceback" not in printed and not saved, row.evidence)


def reserved_memory(book: Book) -> None:
    """In this process, through `effnet_hf.training`: what the allocator holds after each of five epochs."""
    import torch

    from effnet_hf.recipes import load_recipe
    from effnet_hf.training import loop

    with book.row("reserved memory stays over five epochs of imagefolder") as row:
        epochs, held, end_epoch = 2 if book.rehearse else 5, [], loop.end_epoch

        def look(run, last_epoch):
            done = end_epoch(run, last_epoch)
            if run.accelerator.device.type == "cuda":
                held.append(torch.cuda.memory_reserved() / 2**20)
            else:
                import psutil

                held.append(psutil.Process().memory_info().rss / 2**20)
            return done

        folder = book.work / "runs" / "memory"
        shutil.rmtree(folder, ignore_errors=True)
        recipe = load_recipe(
            "digits", data_dir=str(book.work / "digits"), output_dir=str(folder), epochs=epochs, warmup_epochs=0,
            image_size=32 if book.rehearse else 160, precision="bf16", num_workers=2, quiet=True,
        )  # fmt: skip
        loop.end_epoch = look
        try:
            loop.train(recipe)
        finally:
            loop.end_epoch = end_epoch
        row.evidence = "MiB after each epoch: " + ", ".join(f"{mib:,.0f}" for mib in held)
        expect(len(held) == epochs and (book.rehearse or held[-1] - held[1] <= 64), row.evidence)
