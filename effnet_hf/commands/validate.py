"""Measure a checkpoint on a folder of images: top-1, top-5, loss.

effnet-hf validate --model runs/b0 --data_dir DIR             DIR/val/<class>/… or DIR/<class>/…
effnet-hf validate --model runs/b0 --dataset_name user/name
effnet-hf validate --model runs/b0 --data_dir DIR --report reports/b0 --calibrate
"""

import json

from ..cli import ArgumentParser, path, run, say
from ..errors import printable
from ..recipes import add_data_flags, data_options
from .runtime import add_runtime_flag


_NAMED = 8  # classes on one line


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description="Measure a checkpoint on a folder of labelled images.")
    parser.old_spellings = {"--topk": "--top_k"}
    parser.add_argument("--model", type=path, required=True, help="checkpoint folder or Hub id")
    add_data_flags(parser)
    parser.add_argument(
        "--precision", choices=["fp32", "tf32", "fp16", "bf16"], default=None, help="arithmetic; fp32 if not given"
    )
    add_runtime_flag(parser)
    parser.add_argument("--per_device_batch_size", type=int, default=64, help="images at once")
    parser.add_argument("--num_workers", type=int, default=None, help="loader processes; from the machine by default")
    parser.add_argument(
        "--loader", choices=["imagefolder", "dali-cpu", "dali-gpu"], default="imagefolder", help="input pipeline"
    )
    parser.add_argument("--top_k", type=int, default=5, help="k of the second accuracy")
    parser.add_argument(
        "--max_bad_files", type=float, default=0.01, help="stop when more than this share of the images is unreadable"
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first unreadable image")
    parser.add_argument(
        "--restrict_classes",
        action="store_true",
        help="where the data has a part of the checkpoint's classes: answer with one of these only",
    )
    parser.add_argument(
        "--report",
        type=path,
        metavar="DIR",
        help="write figures per class, mistakes, likely label errors and calibration there: report.html, CSV and JSON",
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="store the temperature in --model that makes its probabilities truest on these images",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="--report may replace another folder, if all of it was written here"
    )
    parser.add_argument(
        "--test_time_flip",
        action="store_true",
        help="measure the mean of the probabilities of each image and its mirror image; twice the work",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    from ..training import validate_checkpoint

    figures = validate_checkpoint(
        arguments.model,
        precision=arguments.precision,
        runtime=arguments.runtime,
        per_device_batch_size=arguments.per_device_batch_size,
        num_workers=arguments.num_workers,
        loader=arguments.loader,
        top_k=arguments.top_k,
        max_bad_files=arguments.max_bad_files,
        strict=arguments.strict,
        restrict_classes=arguments.restrict_classes,
        test_time_flip=arguments.test_time_flip,
        report=arguments.report,
        calibrate=arguments.calibrate,
        overwrite=arguments.overwrite,
        tell=say if arguments.json else _print,
        **data_options(arguments),
    )
    show(figures, arguments.top_k, arguments.json)


def _print(note: str) -> None:
    print(printable(note))


def show(figures: dict | None, top_k: int, as_json: bool = False) -> None:
    """Prints what a validation found; nothing on all processes but the first."""
    if figures is None:
        return
    if as_json:
        print(json.dumps(figures))
        return
    if "map" in figures:  # several labels per image
        text = f"mAP {figures['map']:.2f} %   F1 {figures['f1']:.2f} % at the checkpoint's thresholds"
    else:
        text = f"top1 {figures['top1']:.2f} %"
        if figures["classes"] > top_k:  # else always 100 %
            text += f"   top{top_k} {figures[f'top{top_k}']:.2f} %"
    print(f"{text}   loss {figures['loss']:.4f}")
    if "macro_recall" in figures:
        print(
            f"over classes: recall {figures['macro_recall']:.2f} %   F1 {figures['macro_f1']:.2f} %"
            f"   calibration error {figures['ece']:.4f}"
        )
        if never := figures["never_found"]:
            from ..data import in_words

            print(f"never found: {_listed(in_words(never))}")
    known, present = figures["classes_of_the_checkpoint"], figures["classes_of_the_data"]
    if figures["classes"] < known:
        print(f"restricted to the {present:,} classes of the data; the checkpoint knows {known:,}")
    elif present < known:
        print(f"over all {known:,} classes of the checkpoint; the data has {present:,}")
    left_out = f", {bad:,} unreadable left out" if (bad := figures.get("bad_files")) else ""
    print(f"on {figures['n']:,} images{left_out}, {figures['total_ips']:.1f} images/s")
    if found := figures.get("calibration"):
        held_out = "" if found["ece_held_out"] is None else f"; half on half, {found['ece_held_out']:.4f}"
        print(
            f"temperature {found['temperature_before']:g} -> {found['temperature']:g}, stored in config.json of the"
            f" checkpoint{', whose copy of the code is this version now' if len(found['written']) > 1 else ''}\n"
            f"on these images, which it was fitted on: calibration error {found['ece_before']:.4f} ->"
            f" {found['ece']:.4f}{held_out}; loss {found['nll_before']:.4f} -> {found['nll']:.4f}"
        )
        if held_out and found["ece_held_out"] >= found["ece_before"]:
            print(
                f"warning: on the half that it was not fitted on that is no better than before: {figures['n']:,} images"
                " are too few, or need no temperature"
            )
    if "report" in figures:
        print(f"report {printable(figures['report'])}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    between = "; " if any("," in name for name in names) else ", "
    return between.join(map(printable, names[:_NAMED])) + more


if __name__ == "__main__":
    run(main)
