"""Draws a set for detection in COCO's format: pictures of known classes, pasted at random sizes and places on clutter.

    python examples/detection/draw_set.py IMAGES OUT

IMAGES holds `train/<class>/…` and `val/<class>/…`; or only `<class>/…`; or only pictures, each a class of its own. In
the last two both sets are drawn from the same pictures, at other sizes, places and crops. OUT gets `train/` and `val/`,
each with `annotations.json`. The same IMAGES, flags and seed draw the same set.
"""

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

from effnet_hf.cli import ArgumentParser, at_least, path, run
from effnet_hf.errors import UserError
from effnet_hf.files import atomic_folder, refuse_to_remove, require_place


def main() -> None:
    parser = ArgumentParser(description="Draw a set for detection in COCO's format from pictures of known classes.")
    parser.add_argument("images", type=path, help="folder of pictures, see above")
    parser.add_argument("output", type=path, help="folder to write")
    parser.add_argument("--classes", nargs="+", help="only these; else all")
    parser.add_argument("--train", type=at_least(1), default=3000, help="images to train on (%(default)s)")
    parser.add_argument("--val", type=at_least(1), default=300, help="images to validate on (%(default)s)")
    parser.add_argument("--image_size", type=at_least(64), default=160, help="pixels a side (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace what this has written there before")
    args = parser.parse_args()
    root = Path(args.images)
    refuse_to_remove(args.output, {"IMAGES": args.images})
    require_place(args.output, args.overwrite)
    apart = (root / "train").is_dir() and (root / "val").is_dir()
    pictures = {split: by_class(root / split if apart else root) for split in ("train", "val")}
    if args.classes:
        if unknown := set(args.classes) - set(pictures["train"]):
            raise UserError(f"{root} has no classes {' '.join(sorted(unknown))}; see --classes.")
        for split, known in pictures.items():
            pictures[split] = {name: known[name] for name in known if name in args.classes}
    if missing := set(pictures["val"]) - set(pictures["train"]):
        raise UserError(f"{root}/val has classes that train does not have: {', '.join(sorted(missing))}.")
    names = sorted(pictures["train"])
    with atomic_folder(args.output, args.overwrite) as folder:
        for split in pictures:
            (folder / split).mkdir()
            random.seed(f"{args.seed} {split}")
            draw_split(folder / split, pictures[split], names, getattr(args, split), args.image_size)
    source = "pictures of their own" if apart else "the same pictures"
    print(f"{args.output}: {args.train} images to train on, {args.val} to validate on, drawn from {source}; "
          f"{len(names)} classes: {', '.join(names)}")  # fmt: skip


def by_class(folder: Path) -> dict[str, list[Path]]:
    endings = {".jpg", ".jpeg", ".png", ".webp"}
    found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in endings)
    if not found:
        raise UserError(f"{folder} has no pictures ({' '.join(sorted(endings))}); name a folder that has.")
    classes: dict[str, list[Path]] = {}
    for file in found:
        parts = file.relative_to(folder).parts
        classes.setdefault(parts[0] if len(parts) > 1 else file.stem, []).append(file)
    return classes


def draw_split(folder: Path, pictures: dict[str, list[Path]], names: list[str], count: int, size: int) -> None:
    images: list[dict] = []
    annotations: list[dict] = []
    for index in range(count):
        canvas = clutter(size)
        boxes: list[tuple[int, int, int, int]] = []
        for _ in range(random.randint(1, 2)):
            name = random.choice(sorted(pictures))
            piece = cut(random.choice(pictures[name]), random.uniform(0.45, 0.7) * size, random.uniform(0.7, 1.4))
            for _ in range(20):  # tries to find it a free place
                left, top = random.randint(0, size - piece.width), random.randint(0, size - piece.height)
                box = (left, top, left + piece.width, top + piece.height)
                if not any(overlap(box, other) for other in boxes):
                    break
            else:
                continue
            canvas.paste(piece, box)
            boxes.append(box)
            annotations.append({
                "id": len(annotations) + 1, "image_id": index, "category_id": names.index(name) + 1, "iscrowd": 0,
                "bbox": [left, top, piece.width, piece.height], "area": piece.width * piece.height,
            })  # fmt: skip
        images.append({"id": index, "file_name": f"{index:05d}.jpg", "width": size, "height": size})
        canvas.save(folder / images[-1]["file_name"], quality=90)
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    written = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(written), "utf-8")


def cut(file: Path, side: float, aspect: float) -> Image.Image:
    """Nine tenths of a picture's width and height, from a random place, at about `side` pixels, perhaps mirrored."""
    try:
        with Image.open(file) as opened:
            opened.draft("RGB", (round(3 * side), round(3 * side)))  # a large JPEG is decoded at a fraction of its size
            image = opened.convert("RGB")
    except OSError as error:
        raise UserError(f"{file} cannot be read as a picture: {error}") from error
    width, height = 0.9 * image.width, 0.9 * image.height
    left, top = random.uniform(0, image.width - width), random.uniform(0, image.height - height)
    target = round(side * aspect**0.5), round(side / aspect**0.5)
    piece = image.resize(target, Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
    return piece.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else piece


def clutter(size: int) -> Image.Image:
    """Blurred colours under rectangles and ellipses of the objects' sizes: an outline alone says nothing."""
    colours = Image.frombytes("RGB", (6, 6), random.randbytes(6 * 6 * 3))
    canvas = colours.resize((size, size), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(canvas)
    for _ in range(20):
        left, top = random.uniform(-0.2, 1) * size, random.uniform(-0.2, 1) * size
        box = (left, top, left + random.uniform(0.05, 0.5) * size, top + random.uniform(0.05, 0.5) * size)
        random.choice((draw.rectangle, draw.ellipse))(box, fill=tuple(random.choices(range(256), k=3)))
    return canvas


def overlap(one: tuple, other: tuple) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


if __name__ == "__main__":
    run(main)
