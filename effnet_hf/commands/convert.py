"""Converts EfficientNet checkpoints: any in, ours out; ours in, any out; B0 from Lite0.

    effnet-hf convert SRC --output_dir DIR                                  to what from_pretrained and pipeline open
    effnet-hf convert SRC --to timm --output_dir PATH                       to timm, torchvision, nvidia, …
    effnet-hf convert lite0 --warm_start b0 --images DIR --output_dir DIR   a B0 to fine-tune

SRC is a file (.pth, .pth.tar, .safetensors), a folder, a Hub id such as timm/efficientnet_b0.ra_in1k, an NGC path such
as nvidia/efficientnet_b0_pyt_amp:20.12.0, or lite0. docs/conversion.md has the whole story.
"""

import argparse
from pathlib import Path

from ..cli import (
    ArgumentParser,
    command_line,
    invocation,
    path,
    run,
    say_new_spelling,
)
from ..conversion import (
    DIALECTS,
    FOREIGN,
    check_output,
    has_class_names,
    load_foreign,
    warm_start,
    write_folder,
    write_foreign,
)
from ..errors import UserError, did_you_mean, printable
from ..files import refuse_to_remove
from ..recipes import available_recipes
from .upload import add_upload_flags, check_upload_flags, upload


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.old_spellings = {"--output": "--output_dir"}
    parser.add_argument("source", metavar="SRC", type=path, help="file, folder, Hub id, NGC path, or lite0")
    parser.add_argument(
        "--to", metavar="DIALECT", help=f"write another project's format: {', '.join(FOREIGN)}; default: ours"
    )
    parser.add_argument(
        "--output_dir", type=path, metavar="PATH", help="folder to write; with --to also a .pth or .safetensors file"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument(
        "--force", action="store_true", help="also write what is not the same function; the card says so"
    )

    reading = parser.add_argument_group("what names and shapes do not tell")
    reading.add_argument("--from", dest="dialect", default="auto", choices=["auto", *DIALECTS], help="default: auto")
    reading.add_argument("--ema", action="store_true", help="the averaged weights of a training checkpoint")
    reading.add_argument(
        "--prefix", help="of a file with several networks, take the one whose names begin so, e.g. student."
    )
    reading.add_argument("--arch", help="e.g. tf_efficientnet_b0.ap_in1k, where timm's names fit two architectures")
    reading.add_argument(
        "--image_size", type=int, metavar="PIXELS", help="instead of the checkpoint's or the variant's"
    )
    reading.add_argument("--batch_norm_eps", type=float, metavar="EPS", help="instead of the dialect's")
    reading.add_argument(
        "--image_mean", type=float, nargs="+", metavar="MEAN", help="pixels are normalised by, of 0 to 1: one, or three"
    )
    reading.add_argument("--image_std", type=float, nargs="+", metavar="STD", help="and divided by")
    reading.add_argument("--revision", help="of SRC on the Hub")

    warm = parser.add_argument_group("warm start")
    warm.add_argument("--warm_start", metavar="VARIANT", help="make this variant (b0, widese-b0) from a Lite SRC")
    warm.add_argument("--images", type=path, metavar="DIR", help="images to measure batch norm statistics on")
    warm.add_argument("--padding", default="symmetric", choices=["symmetric", "same"], help="default: symmetric")
    warm.add_argument("--num_images", type=int, metavar="N", help="how many of them; default: 200, or all if fewer")

    add_upload_flags(parser)
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Flags that need each other; before anything is read."""
    if args.to is not None and args.to not in FOREIGN:
        if args.output_dir is not None or not args.to:
            raise UserError(f"--to {args.to}: there are {', '.join(FOREIGN)}.{did_you_mean(args.to, FOREIGN)}")
        say_new_spelling("--to DIR", "--output_dir DIR")
        args.to, args.output_dir = None, path(args.to)
    if args.output_dir is None:
        raise UserError("--output_dir PATH says where to write.")
    foreign = args.to is not None
    if args.push_to_hub and foreign:
        raise UserError("--push_to_hub needs a folder of ours (without --to).")
    check_upload_flags(args)
    if args.warm_start and not args.images:
        raise UserError("--warm_start needs --images DIR, images to measure batch norm statistics on.")
    if args.images and not args.warm_start:
        raise UserError("--images does nothing without --warm_start.")
    if args.overwrite:
        refuse_to_remove(args.output_dir, {"the source": args.source, "--images": args.images})
    check_output(args.to, args.output_dir, args.overwrite)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    converted = load_foreign(
        args.source,
        args.dialect,
        ema=args.ema,
        prefix=args.prefix,
        arch=args.arch,
        image_size=args.image_size,
        batch_norm_eps=args.batch_norm_eps,
        image_mean=args.image_mean,
        image_std=args.image_std,
        revision=args.revision,
        token=args.hub_token,
    )
    if args.warm_start:
        converted = warm_start(
            converted, args.warm_start, args.images, num_images=args.num_images, padding=args.padding
        )
    config, written = converted.config, printable(args.output_dir)
    classes = f"{config.num_labels} classes" if config.num_labels else "no classifier"
    print(
        f"{printable(converted.path.name)}: {converted.dialect} names, {config.variant or 'custom shape'}, "
        f"{classes}, {config.image_size} x {config.image_size} px, {printable(converted.verdict)}"
    )
    for note in converted.notes:
        print(f"  {printable(note)}")
    if args.to is not None:
        if config.softmax_temperature is not None:
            print(f"  its temperature {config.softmax_temperature:g} is divided into the classifier's weights and bias")
        how = write_foreign(converted, args.to, args.output_dir, force=args.force, overwrite=args.overwrite)
        print(f"wrote  {written}\nopen   {printable(how)}")
        if has_class_names(config) and Path(args.output_dir).is_file():
            print("note   a file of weights names no classes; keep the source's config.json, which does (id2label)")
        return
    write_folder(
        converted,
        args.output_dir,
        force=args.force,
        overwrite=args.overwrite,
        command=command_line(),
        model_id=args.hub_model_id,
    )
    # transformers 5 opens no local backbone by AutoBackbone
    kind, auto = converted.kind.__name__, converted.kind._auto_class
    opener = (
        f"effnet_hf; effnet_hf.{kind}" if auto == "AutoBackbone" else f"effnet_hf, transformers; transformers.{auto}"
    )
    print(f'wrote  {written}\nopen   import {opener}.from_pretrained("{written}")')
    if converted.can_be_resumed and config.variant in available_recipes():
        print(f"resume {invocation('train')} --config {config.variant} --data_dir DIR --resume {written}")
    if args.push_to_hub:
        print(f"pushed {upload(args, args.output_dir)}")


if __name__ == "__main__":
    run(main)
