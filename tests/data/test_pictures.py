import functools
import io
import os
import signal
import stat
import struct
import threading
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features

from effnet_hf.data import pictures
from effnet_hf.data.pictures import FORMATS, BadPicture, Box, Picture, read_file
from effnet_hf.image_processing_efficientnet_nv import to_rgb

from .torture import bad_files, chunk, encode, exif_jpeg, odd_files, photo, png


@pytest.mark.parametrize("name", sorted(bad_files()))
def test_bad_files_are_bad_whichever_way_they_are_decoded(name, monkeypatch):
    data = bad_files()[name]
    for decoder in (pictures.simplejpeg, None):
        monkeypatch.setattr(pictures, "simplejpeg", decoder)
        with pytest.raises(BadPicture, match=r"^(is|cannot)"):
            Picture(data).rgb().load()
        for box, reduced in ((Box(0, 0, 1, 1), 1), (Box(0, 0, 16, 16), 2), (Box(0, 0, 16, 16), 8)):
            with pytest.raises(BadPicture):
                Picture(data).crop(box, reduced)


@pytest.mark.parametrize("reduced", [2, 4, 8])
@pytest.mark.parametrize("size", [(64, 48), (61, 47), (15, 9), (8, 8)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_reduced_crops_are_the_same_with_and_without_the_fast_decoder(monkeypatch, reduced, size, mode):
    picture = Picture(encode(photo(3, *size).convert(mode), "JPEG", quality=90))
    for box in (Box(0, 0, *size), Box(size[0] // 8, size[1] // 8, size[0] // 2, size[1] // 2)):
        fast = picture.crop(box, reduced)
        with monkeypatch.context() as patch:
            patch.setattr(pictures, "simplejpeg", None)
            assert torch.equal(fast, picture.crop(box, reduced))
        for side, start, length in zip(fast.shape[1:], (box.top, box.left), (box.height, box.width)):
            assert side == round((start + length) / reduced) - round(start / reduced)


def test_a_reduced_crop_shows_what_the_whole_shows():
    picture, box = Picture(encode(photo(3, 200, 160), "JPEG", quality=95)), Box(24, 16, 128, 96)
    for reduced in (2, 4, 8):
        small = picture.crop(box, reduced).permute(1, 2, 0).numpy()
        whole = Image.fromarray(picture.crop(box).permute(1, 2, 0).numpy())
        expected = np.asarray(whole.resize((128 // reduced, 96 // reduced), Image.BOX)).astype(int)
        assert small.shape == expected.shape and np.abs(small - expected).mean() < 2


@pytest.mark.parametrize("orientation", [1, 6])
def test_what_is_no_plain_jpeg_is_never_reduced(orientation):
    for data in (exif_jpeg(orientation), encode(photo(1), "PNG")):
        picture = Picture(data)
        reduced = picture.crop(Box(0, 0, 32, 32), 4).shape
        assert reduced == ((3, 8, 8) if picture.plain_jpeg else (3, 32, 32))


@pytest.mark.parametrize("name", sorted(odd_files()))
def test_crops_are_the_same_with_and_without_the_fast_decoder(name, monkeypatch):
    picture = Picture(odd_files()[name])
    whole = Box(0, 0, picture.width, picture.height)
    fast = picture.crop(whole).permute(1, 2, 0).numpy()
    assert np.array_equal(fast, np.asarray(picture.rgb()))
    monkeypatch.setattr(pictures, "simplejpeg", None)
    assert np.array_equal(fast, Picture(odd_files()[name]).crop(whole).permute(1, 2, 0).numpy())


def test_crop_is_the_rectangle_asked_for():
    picture = Picture(encode(photo(1), "PNG"))
    box = Box(5, 7, 20, 30)
    assert np.array_equal(picture.crop(box).permute(1, 2, 0).numpy(), np.asarray(photo(1))[7:37, 5:25])


def test_sizes_are_upright():
    assert (Picture(exif_jpeg(6)).width, Picture(exif_jpeg(6)).height) == (72, 96)
    assert (Picture(exif_jpeg(1)).width, Picture(exif_jpeg(1)).height) == (96, 72)
    assert Picture(exif_jpeg(1)).plain_jpeg and not Picture(exif_jpeg(6)).plain_jpeg


def test_reading_says_what_is_wrong(tmp_path):
    with pytest.raises(BadPicture, match="has vanished"):
        read_file(str(tmp_path / "nothing.jpg"))
    with pytest.raises(BadPicture, match="is not a file but a pipe, device or folder"):
        read_file(str(tmp_path))
    with pytest.raises(BadPicture, match="is not a file but a pipe, device or folder"):
        read_file(os.devnull)
    with pytest.raises(BadPicture, match="cannot be read: File name too long"):
        read_file(str(tmp_path / ("x" * 300)))
    with pytest.raises(BadPicture, match="has a name that no file can have"):
        read_file("a\0b.jpg")
    if os.geteuid() != 0:
        (tmp_path / "locked.jpg").touch(mode=0)
        with pytest.raises(BadPicture, match="permission denied"):
            read_file(str(tmp_path / "locked.jpg"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    result = []

    def read():
        with pytest.raises(BadPicture, match="is not a file but a pipe"):
            read_file(str(tmp_path / "pipe.jpg"))
        result.append("done")

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(5)
    assert result == ["done"]


def test_reading_has_a_bound(tmp_path, monkeypatch):
    with open(tmp_path / "sparse.jpg", "wb") as file:
        file.truncate(60 << 30)
    with pytest.raises(BadPicture, match=r"is too large for an image \(64,424,509,440 bytes; 1,073,741,824 at most\)"):
        read_file(tmp_path / "sparse.jpg")
    (tmp_path / "growing.jpg").write_bytes(b"1234")
    size = os.stat_result((stat.S_IFREG, 0, 0, 1, 0, 0, 3, 0, 0, 0))
    monkeypatch.setattr(os, "fstat", lambda _: size)
    with pytest.raises(BadPicture, match="grows while it is read"):
        read_file(tmp_path / "growing.jpg")


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in Linux's /proc")
def test_no_file_is_left_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for name in (".", "nothing.jpg"):
        with pytest.raises(BadPicture):
            read_file(tmp_path / name)
    assert len(os.listdir("/proc/self/fd")) == before


def test_only_named_formats_are_opened(monkeypatch):
    """EPS would start Ghostscript, whatever its name ends in."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was called"))
    assert "EPS" not in FORMATS
    with pytest.raises(BadPicture, match="is not an image that is read here"):
        Picture(bad_files()["postscript.jpg"])
    for kind in ("TGA", "PCX", "ICO", "SGI", "JPEG2000"):  # each would be opened by its first bytes, or by anything
        with pytest.raises(BadPicture, match="is not an image that is read here"):
            Picture(encode(photo(1), kind))


@pytest.mark.parametrize("kind", FORMATS)
def test_each_named_format_is_opened(kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    assert Picture(encode(photo(1), kind)).rgb().size == (96, 72)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PNG", "TIFF"])
def test_a_file_that_begins_like_one_is_not_said_to_be_no_image(kind):
    data = encode(photo(1), kind)[:12]
    if kind == "JPEG":  # of 12 bits
        data = encode(photo(1), kind).replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c")
    with pytest.raises(BadPicture, match=f"^is damaged, or a kind of {kind} that Pillow does not read$"):
        Picture(data)


@functools.cache
def hostile() -> dict[str, bytes]:
    """What makes a decoder work, recurse or ask for memory."""
    text = zlib.compress(bytes(80 << 20), 9)
    start, end = png(8, 8, None)[:33], png(8, 8, None)[-12:]
    pixels = chunk(b"IDAT", zlib.compress(bytes(8 * 25)))
    avif = encode(photo(1), "AVIF") if features.check("avif") else b"\0\0\0\x20ftypavif" + bytes(64)
    tiff = encode(photo(1), "TIFF")
    directory = struct.unpack("<I", tiff[4:8])[0]
    return {
        "text bomb": start + chunk(b"zTXt", b"a\0\0" + text) + pixels + end,
        "profile bomb": start + chunk(b"iCCP", b"a\0\0" + text[: len(text) // 2]) + end,
        "broken AVIF": avif[: len(avif) * 2 // 3],
        "AVIF of noise": avif[:64] + bytes(range(256)) * 4,
        "TIFF with huge tags": tiff[: directory + 2] + struct.pack("<HHII", 273, 4, 0xFFFFFFF0, 8) * 40,
        "TIFF that is its own next page": tiff[:directory] + struct.pack("<H", 0) + struct.pack("<I", directory),
        "JPEG of the largest size": struct.pack(">2s2sHBHHB", b"\xff\xd8", b"\xff\xc0", 11, 8, 65500, 65500, 1)
        + bytes(20),
    }


@pytest.mark.parametrize("name", sorted(hostile()))
def test_hostile_files_are_bad_and_nothing_else(name):
    with pytest.raises(BadPicture, match=r"^(is|cannot)"):
        Picture(hostile()[name]).rgb().load()


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("maximum recursion depth exceeded"), KeyError("x")])
def test_whatever_a_decoder_raises_is_one_line(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(BadPicture, match=f"cannot be decoded: {type(error).__name__}") as raised:
        Picture(b"x")
    assert str(raised.value).isprintable()


def test_a_signals_exception_is_no_bad_picture(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image, "open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Picture(b"x")


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B", "I;16L", "I;16N"])
def test_deep_grey_of_every_order_of_bytes(mode):
    values = np.random.default_rng(0).integers(0, 65536, (31, 37))
    dtype = {"I": "<i4", "I;16B": ">u2"}.get(mode, "<u2")
    image = Image.frombytes(mode, (37, 31), values.astype(dtype).tobytes())
    assert np.array_equal(np.asarray(to_rgb(image, bit_depth=16))[..., 0], values >> 8)


def test_deep_grey_takes_no_wide_copies():
    """Of 1 million pixels: what is asked of the image, and one byte each, in bytes that Python and numpy take."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (1000, 1000), dtype=np.uint16))
    tracemalloc.start()
    try:
        to_rgb(image)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6e6, f"{peak:,} bytes"  # 20 million with 64 bits


def test_an_upright_image_is_not_copied():
    image = photo(1)
    assert to_rgb(image) is image
    turned = to_rgb(Image.open(io.BytesIO(exif_jpeg(6))))
    assert turned.size == (72, 96) and to_rgb(turned) is turned


def test_a_jpeg_of_endless_scans_is_refused_and_a_film_behind_one_is_not():
    progressive = encode(photo(1), "JPEG", progressive=True)
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    for decoder in ("crop", "rgb"):
        with pytest.raises(BadPicture, match="has more than 100 scans"):
            getattr(Picture(progressive[:-2] + scan * 100 + b"\xff\xd9"), decoder)()
    assert Picture(progressive + b"\xff\xda" * 1000).rgb().size == (96, 72)  # telephones put one there
    assert Picture(progressive[:2] + b"\xff\xe5\x07\xd2" + b"\xff\xda" * 1000 + progressive[2:]).rgb().size == (96, 72)


def test_pairs_of_bytes_are_counted_across_strips(monkeypatch):
    data = bytes(np.random.default_rng(0).choice([0xFF, 0xDA, 0], 1000).astype(np.uint8))
    for strip in (1, 7, 999, 1000, 1 << 20):
        monkeypatch.setattr(pictures, "_STRIP", strip)
        assert pictures._count(data, 0xFF, 0xDA) == data.count(b"\xff\xda") > 50
    assert pictures._count(b"", 0xFF, 0xDA) == pictures._count(b"\xff", 0xFF, 0xDA) == 0


def test_a_decoder_that_takes_too_long_is_ended(monkeypatch):
    """Pillow reads the comments of a PPM in Python: a megabyte of them takes half a minute."""
    monkeypatch.setattr(pictures, "LONGEST", 0.05)
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(BadPicture, match="takes more than 0 s to open"):
        Picture(b"P3\n64 64\n255\n" + b"#\n" * 500_000)
    assert signal.getsignal(signal.SIGVTALRM) == before and signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert Picture(encode(photo(1), "PNG")).rgb().size == (96, 72)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_pictures_lie_as_pillow_turns_them(kind, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encode(photo(1), kind, exif=exif)
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    turned = to_rgb(Image.open(io.BytesIO(data)))
    assert np.array_equal(np.asarray(turned), wanted)
    assert np.array_equal(np.asarray(to_rgb(turned)), wanted), "an upright image was turned again"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("turn", [1, 6])
def test_damaged_exif_costs_no_pixels(kind, turn):
    """Every byte of it set to others: the image is whole, and lies as stored or as the tag says."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A] = turn, "a description", 72.0
    data = encode(photo(1), kind, exif=exif)
    at = data.index(b"MM\0*" if b"MM\0*" in data else b"II*\0")
    for place in range(at, at + len(exif.tobytes()) - 6):
        for byte in (0x00, 0x04, 0xFF):
            damaged = bytearray(data)
            damaged[place] = byte
            if kind == "PNG":  # whose checksum would tell
                start = data.index(b"eXIf")
                length = int.from_bytes(data[start - 4 : start], "big")
                checksum = zlib.crc32(damaged[start : start + 4 + length])
                damaged[start + 4 + length : start + 8 + length] = struct.pack(">I", checksum)
            assert Picture(bytes(damaged)).rgb().size in ((96, 72), (72, 96)), (place, byte)
