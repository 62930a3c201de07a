"""Writes a folder of every way an image file can be odd or broken: `python tests/data/torture.py DIR`.

Everything is generated; no picture is stored in the repository.
"""

import io
import os
import socket
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def photo(seed: int, width: int = 96, height: int = 72) -> Image.Image:
    """A smooth coloured image that differs from seed to seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize((width, height), Image.BICUBIC)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, data: bytes | None, depth: int = 8, colour: int = 2) -> bytes:
    parts = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))]
    if data is not None:
        parts.append(chunk(b"IDAT", data))
    return b"".join([*parts, chunk(b"IEND", b"")])


def without_segment(jpeg: bytes, marker: int) -> bytes:
    """A JPEG without its segments of one kind (0xC4: Huffman tables, 0xDB: quantisation tables)."""
    result, position = jpeg[:2], 2
    while jpeg[position + 1] != 0xDA:
        length = 2 + int.from_bytes(jpeg[position + 2 : position + 4], "big")
        if jpeg[position + 1] != marker:
            result += jpeg[position : position + length]
        position += length
    return result + jpeg[position:]


def exif_jpeg(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(photo(3), "JPEG", exif=exif)


def bad_files() -> dict[str, bytes]:
    """Files that give no image, by name."""
    jpeg, png_file = encode(photo(1), "JPEG"), encode(photo(1), "PNG")
    gif, webp = encode(photo(1), "GIF"), encode(photo(1), "WEBP")
    bmp, tif = encode(photo(1), "BMP"), encode(photo(1), "TIFF")
    sof = jpeg.index(b"\xff\xc0")
    flipped = bytearray(png_file)
    flipped[20] ^= 0xFF  # inside IHDR: its checksum is wrong now
    pixels = png_file.index(b"IDAT") + 4
    return {
        "empty.jpg": b"",
        "empty.png": b"",
        "one_byte.jpg": b"\xff",
        "text.jpg": b"This is not a picture.\n",
        "web_page.jpg": b"<!DOCTYPE html><html><head><title>404 Not Found</title></head></html>",
        "lfs_pointer.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "json.png": b'{"error": "rate limited"}',
        "random.jpg": np.random.default_rng(0).bytes(4096),
        "zeros.jpg": bytes(4096),
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n{} loop\n",
        "pdf.jpg": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
        "zip.jpg": b"PK\x03\x04" + bytes(200),
        "numpy.png": b"\x93NUMPY\x01\x00" + bytes(120),
        "vector.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "video.jpg": b"\x00\x00\x00\x18ftypmp42" + bytes(200),
        "only_start.jpg": b"\xff\xd8",
        "start_and_end.jpg": b"\xff\xd8\xff\xd9",
        "half.jpg": jpeg[: len(jpeg) // 2],
        "header_only.jpg": jpeg[: sof + 4],
        "three_quarters.jpg": jpeg[: len(jpeg) * 3 // 4],
        "no_end_marker.jpg": jpeg[:-2],
        "no_quantisation.jpg": without_segment(jpeg, 0xDB),
        "height_zero.jpg": jpeg[: sof + 5] + b"\0\0" + jpeg[sof + 7 :],
        "width_zero.jpg": jpeg[: sof + 7] + b"\0\0" + jpeg[sof + 9 :],
        "nonsense_segment.jpg": jpeg[:2] + b"\xff\xe0\xff\xff" + jpeg[4:60],
        "half.png": png_file[: len(png_file) // 2],
        "signature_only.png": png_file[:8],
        "wrong_checksum.png": bytes(flipped),
        "no_pixels.png": png(8, 8, None),
        "corrupt_pixels.png": png_file[: pixels + 30] + b"\xaa" * 400 + png_file[pixels + 430 :],
        "bomb.png": png(20_000, 20_000, zlib.compress(bytes(10_000)), depth=1, colour=0),
        "bigger_bomb.png": png(60_000, 60_000, zlib.compress(bytes(10_000)), depth=1, colour=0),
        "half.gif": gif[: len(gif) // 2],
        "no_frame.gif": gif[:13],
        "half.webp": webp[: len(webp) // 2],
        "header_only.webp": webp[:20],
        "half.bmp": bmp[: len(bmp) // 2],
        "header_only.bmp": bmp[:30],
        "half.tif": tif[: len(tif) // 2],
        "no_directory.tif": b"II*\x00\xff\xff\xff\x7f",
        "half.ppm": b"P6 64 64 255\n" + bytes(100),
        "nonsense.ppm": b"P6 banana 64 255\n" + bytes(100),
        "size_zero.pgm": b"P5 0 64 255\n",
    }


def odd_files() -> dict[str, bytes]:
    """Files that are unusual and must load."""
    jpeg = encode(photo(2), "JPEG")
    grey16 = Image.fromarray((np.arange(72 * 96, dtype=np.uint32).reshape(72, 96) * 9).astype(np.uint16))
    frames = [photo(seed) for seed in range(3)]
    palette = photo(4).convert("P")
    corrupt = bytearray(jpeg)
    middle = len(corrupt) * 2 // 3
    corrupt[middle : middle + 4] = b"\x12\x34\x56\x78"
    exif = exif_jpeg(6)
    return {
        "grey.jpg": encode(photo(2).convert("L"), "JPEG"),
        "cmyk.jpg": encode(photo(2).convert("CMYK"), "JPEG"),
        "progressive.jpg": encode(photo(2), "JPEG", progressive=True),
        "restart_markers.jpg": encode(photo(2), "JPEG", restart_marker_blocks=4),
        "no_subsampling.jpg": encode(photo(2), "JPEG", subsampling=0),
        "rotated.jpg": exif,
        "mirrored.jpg": exif_jpeg(5),
        "broken_exif.jpg": exif.replace(b"Exif\0\0MM", b"Exif\0\0XX").replace(b"Exif\0\0II", b"Exif\0\0XX"),
        "no_huffman_tables.jpg": without_segment(jpeg, 0xC4),  # the standard tables are assumed
        "not_converted_to_ycc.jpg": encode(photo(2), "JPEG", keep_rgb=True),
        "bytes_after_the_end.jpg": jpeg + bytes(1000),
        "corrupt_in_the_middle.jpg": bytes(corrupt),
        "camera_multi_picture.jpg": encode(photo(2), "MPO", save_all=True, append_images=[photo(5)]),
        "PNG_called.jpg": encode(photo(2), "PNG"),
        "jpeg_called.png": jpeg,
        "too_few_rows.png": png(64, 64, zlib.compress(bytes((1 + 64 * 3) * 5))),
        "gif_called.jpeg": encode(photo(2), "GIF"),
        "UPPER.JPEG": jpeg,
        "alpha.png": encode(photo(2).convert("RGBA"), "PNG"),
        "grey_alpha.png": encode(photo(2).convert("LA"), "PNG"),
        "palette.png": encode(palette, "PNG"),
        "palette_transparent.png": encode(palette, "PNG", transparency=b"\x00\x80\xff"),
        "one_bit.png": encode(photo(2).convert("1"), "PNG"),
        "sixteen_bit.png": encode(grey16, "PNG"),
        "sixteen_bit.tif": encode(grey16, "TIFF"),
        "float.tif": encode(
            Image.fromarray(np.linspace(0, 255, 72 * 96, dtype=np.float32).reshape(72, 96)),
            "TIFF",
            tiffinfo={340: 0.0, 341: 255.0},  # SMinSampleValue, SMaxSampleValue
        ),
        "lab.tif": encode(photo(2).convert("LAB"), "TIFF"),
        "pages.tif": encode(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
        "animated.gif": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated.webp": encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "animated.png": encode(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "lossless.webp": encode(photo(2), "WEBP", lossless=True),
        "one_pixel.png": encode(photo(2, 1, 1), "PNG"),
        "one_pixel_wide.png": encode(photo(2, 1, 500), "PNG"),
        "panorama.jpg": encode(photo(2, 6000, 9), "JPEG"),
        "plain.pgm": b"P2 4 4 255\n" + b" 9" * 16,
        "name with spaces, ümläuts and 文字.jpg": jpeg,
        "tab\tand\nnewline.jpg": jpeg,
    }


def write(folder: str | os.PathLike, good: int = 24) -> dict[str, str]:
    """Writes `train/` with the classes `odd` and `plain`, and a small `val/`.

    Returns:
        For each special file, relative to `folder`: "bad" (counted and named), "fine" (loads) or "ignored" (not seen).
    """
    root = Path(folder)
    fate = {}
    for split, count in (("train", good), ("val", 4)):
        for label, name in enumerate(("odd", "plain")):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                (root / split / name / f"good_{i:03}.jpg").write_bytes(encode(photo(1000 * label + i), "JPEG"))
    odd = root / "train" / "odd"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about the encoders' options
        groups = (("bad", bad_files()), ("fine", odd_files()))
    for kind, files in groups:
        for name, data in files.items():
            (odd / name).write_bytes(data)
            fate[f"train/odd/{name}"] = kind
    fate.update(_special_files(odd))
    return fate


def _special_files(odd: Path) -> dict[str, str]:
    fate = {}
    for name, data in ((".DS_Store", b"\0"), ("Thumbs.db", b"\0"), ("labels.txt", b"a b"), (".hidden.jpg", b"")):
        (odd / name).write_bytes(data)
        fate[f"train/odd/{name}"] = "ignored"
    (odd / "folder.jpg").mkdir(exist_ok=True)
    fate["train/odd/folder.jpg"] = "ignored"
    (odd / "nested" / "deeper").mkdir(parents=True, exist_ok=True)
    (odd / "nested" / "deeper" / "inside.jpg").write_bytes(encode(photo(7), "JPEG"))
    fate["train/odd/nested/deeper/inside.jpg"] = "fine"
    if hasattr(os, "symlink"):
        _replace(odd / "link.jpg", lambda path: path.symlink_to("good_000.jpg"))
        _replace(odd / "dangling_link.jpg", lambda path: path.symlink_to("nowhere.jpg"))
        _replace(odd / "link_to_itself.jpg", lambda path: path.symlink_to("link_to_itself.jpg"))
        fate |= {
            "train/odd/link.jpg": "fine",
            "train/odd/dangling_link.jpg": "bad",
            "train/odd/link_to_itself.jpg": "bad",
        }
    if hasattr(os, "mkfifo"):
        _replace(odd / "pipe.jpg", os.mkfifo)
        fate["train/odd/pipe.jpg"] = "bad"
    if hasattr(socket, "AF_UNIX"):
        with socket.socket(socket.AF_UNIX) as end:
            try:
                _replace(odd / "socket.jpg", lambda path: end.bind(str(path)))
                fate["train/odd/socket.jpg"] = "bad"
            except OSError:  # the path is too long for a socket
                pass
    if os.name == "posix" and os.geteuid() != 0:  # root reads everything
        (odd / "locked.jpg").write_bytes(encode(photo(8), "JPEG"))
        (odd / "locked.jpg").chmod(0)
        fate["train/odd/locked.jpg"] = "bad"
    return fate


def _replace(path: Path, make) -> None:
    path.unlink(missing_ok=True)
    make(path)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for file, kind in write(sys.argv[1]).items():
        print(f"{kind:8} {file!r}")
