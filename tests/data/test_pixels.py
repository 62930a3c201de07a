"""Which bytes an image of any kind gives: the specification, one line per kind of file or of Pillow image.

The picture is one row of six values of grey, 0 to 255. It is right where it comes back as it was, and refused where
its file does not say what white is.
"""

import io
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from effnet_hf import EfficientNetNVImageProcessor
from effnet_hf.data.pictures import BadPicture, Picture, Reading
from effnet_hf.image_processing_efficientnet_nv import UnclearPixels, to_rgb

from .torture import chunk


GREY = np.array([[0, 1, 100, 128, 200, 255]])
FULL, TWELVE = GREY * 257, GREY * 16
HIGHEST = 341  # TIFF tag SMaxSampleValue; 340 is SMinSampleValue
UNSTATED = "does not say which of them is white; give --bit_depth"
DARK = "is dark or uses fewer bits"
DARK_COLOURS = "white is 65,535; save it with 8 bits, or, if it is dark, give 16 as --bit_depth"
UPPER = GREY * 256 + 7  # of 16 bits that are others in the other order of bytes
PLANES = "is a TIFF of separate planes, of a kind that Pillow misreads"


def png(values: np.ndarray, colour: int = 0, *chunks: bytes) -> bytes:
    """Of 16 bits; `colour` is PNG's colour type."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + body


def channels(values: np.ndarray, count: int) -> np.ndarray:
    return np.repeat(values[..., None], count, -1)


def pnm(most: int, values: np.ndarray = GREY, colours: int = 1) -> bytes:
    scaled = values if most == 65535 else (values * most / 255).round()
    pixels = np.repeat(scaled, colours).astype(">u2" if most > 255 else "u1").tobytes()
    return b"P%d\n6 1\n%d\n" % (5 if colours == 1 else 6, most) + pixels


def tiff(
    values: np.ndarray, dtype: str, order: str = "<", bits: int | None = None, deflate: bool = False, **tags: float
) -> bytes:
    """As the TIFF 6.0 specification says; `tags` are tN=value, t284=2 are separate planes."""
    array = values.astype(np.dtype(dtype).newbyteorder(order))
    height, width = array.shape[:2]
    count = 1 if array.ndim == 2 else array.shape[2]
    strips = [plane.tobytes() for plane in (np.moveaxis(array, 2, 0) if count > 1 and "t284" in tags else [array])]
    if bits == 12:
        strips = [int("".join(f"{value:012b}" for value in values.flat), 2).to_bytes(values.size * 3 // 2, "big")]
    strips = [zlib.compress(strip) for strip in strips] if deflate else strips
    starts = [512 + sum(map(len, strips[:number])) for number in range(len(strips))]
    kind = {"u": 1, "i": 2, "f": 3}[array.dtype.kind]
    entries = {
        256: (4, width), 257: (4, height), 258: (3, [bits or 8 * array.dtype.itemsize] * count),
        259: (3, 8 if deflate else 1), 262: (3, 1 if count < 3 else 2), 273: (4, starts), 277: (3, count),
        278: (4, height), 279: (4, [len(strip) for strip in strips]), 339: (3, kind),
    }  # fmt: skip
    for name, value in tags.items():
        entries[int(name[1:])] = (11 if isinstance(value, float) else 3, value)
    packed = long = b""
    for number, (type_, value) in sorted(entries.items()):
        value = value if isinstance(value, list) else [value]
        field = struct.pack(order + {3: "H", 4: "I", 11: "f"}[type_] * len(value), *value)
        if len(field) > 4:
            field, long = struct.pack(order + "I", 400 + len(long)), long + field
        packed += struct.pack(order + "HHI", number, type_, len(value)) + field.ljust(4, b"\0")
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(entries))
    head = (start + packed + bytes(4)).ljust(400, b"\0") + long
    return head.ljust(512, b"\0") + b"".join(strips)


def saved(mode: str, kind: str, **options) -> bytes:
    """The grey picture in another mode, as Pillow saves it."""
    buffer = io.BytesIO()
    image = Image.fromarray(GREY.astype(np.uint8))
    image.convert("RGB").convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def adjusted(mode: str, *bands: int | None) -> Image.Image:
    """A Pillow image of the grey picture in the bands that are None, and constants in the others."""
    planes = [GREY if band is None else np.full_like(GREY, band) for band in bands]
    return Image.frombytes(mode, (6, 1), np.stack(planes, -1).astype(np.uint8).tobytes())


# What is opened, --bit_depth, and the grey that is right, or the words of the refusal.
RIGHT = GREY[0].tolist()
QUARTER = [value // 4 for value in RIGHT]
STATED = "has 16-bit colours, black 0 and white 4,095; save it with 8 bits"
CASES = {
    # 8 bits
    "JPEG of grey": (saved("L", "JPEG", quality=100), None, RIGHT),
    "JPEG of CMYK": (saved("CMYK", "JPEG", quality=100), None, RIGHT),
    "PNG of grey": (saved("L", "PNG"), None, RIGHT),
    "PNG of grey and alpha": (saved("LA", "PNG"), None, RIGHT),
    "PNG with a palette": (saved("P", "PNG"), None, "nearest"),
    "PNG of one bit": (saved("1", "PNG"), None, "black and white"),
    "TIFF of CMYK": (saved("CMYK", "TIFF"), None, RIGHT),
    "TIFF of YCbCr": (saved("YCbCr", "TIFF"), None, RIGHT),
    "TIFF of YCbCr and bytes after it": (saved("YCbCr", "TIFF") + bytes(64), None, RIGHT),
    "TIFF of YCbCr, deflated": (saved("YCbCr", "TIFF", compression="tiff_adobe_deflate"), None, RIGHT),
    "TIFF, white is zero": (tiff(255 - GREY, "u1", t262=0), None, RIGHT),
    "TIFF of signed bytes": (tiff(GREY // 2, "i1"), None, "holds signed numbers of 8 bits"),
    "--bit_depth is for deep images": (saved("L", "PNG"), 12, RIGHT),
    # whole numbers of 16 bits
    "PNG of 16 bits": (png(FULL), None, RIGHT),
    "PNG of 16 bits, said": (png(FULL), 16, RIGHT),
    "PNG of 16 bits, all black": (png(GREY * 0), None, [0] * 6),
    "PNG of 12 bits in 16": (png(TWELVE), None, DARK),
    "PNG of 12 bits in 16, said": (png(TWELVE), 12, RIGHT),
    "PNG of 12 bits in 16, sBIT": (png(TWELVE, 0, chunk(b"sBIT", b"\x0c")), None, DARK),  # which is about precision
    "PNG of 14 bits in 16": (png(GREY * 64), None, DARK),
    "PNG of 14 bits in 16, said": (png(GREY * 64), 14, RIGHT),
    "PNG of 8 bits in 16": (png(GREY), None, DARK),
    "PNG of 8 bits in 16, said": (png(GREY), 8, RIGHT),
    "PNG of 4 bits in 16, said": (png(GREY // 16), 4, [value // 16 * 17 for value in RIGHT]),
    "PNG of 16 bits, dark": (png(FULL // 4), None, DARK),
    "PNG of 16 bits, dark, said": (png(FULL // 4), 16, [value // 4 for value in RIGHT]),
    "PNG of 16 bits, 12 said": (png(FULL), 12, "holds values from 0 to 65,535, and by --bit_depth 12 black is 0 and"),
    "TIFF of 16 bits": (tiff(FULL, "u2"), None, RIGHT),
    "TIFF of 16 bits, big-endian": (tiff(FULL, "u2", ">"), None, RIGHT),
    "TIFF of 16 bits, white is zero": (tiff(65535 - FULL, "u2", t262=0), None, RIGHT),
    "TIFF of 12 bits in 16": (tiff(TWELVE, "u2"), None, DARK),
    "TIFF of 12 bits in 16, said": (tiff(TWELVE, "u2", ">"), 12, RIGHT),
    "TIFF of 12 bits in 16, SMax": (tiff(TWELVE, "u2", t341=4095), None, RIGHT),
    "TIFF of 12 bits in 16, SMin, SMax": (tiff(TWELVE + 7, "u2", t340=7, t341=4087), None, RIGHT),
    "TIFF with an SMax below its values": (tiff(FULL, "u2", t341=4095), None, "by its file black is 0 and white 4,095"),
    "TIFF with an SMax below its SMin": (tiff(FULL, "u2", t340=9, t341=8), None, "says that its values lie between 9"),
    "TIFF packed to 12 bits": (tiff(TWELVE, "u2", bits=12), None, RIGHT),
    "TIFF packed to 12 bits, 16 said": (tiff(TWELVE, "u2", bits=12), 16, RIGHT),  # the file says it
    # more bits, signs, floats
    "TIFF of signed 16 bits": (tiff(GREY * 128, "i2"), None, UNSTATED),
    "TIFF of signed 16 bits, 15 said": (tiff(GREY * 128, "i2", ">"), 15, RIGHT),
    "TIFF below zero": (tiff(GREY * 128 - 1, "i2"), 15, "holds values from -1 to"),
    "TIFF of 32 bits": (tiff(FULL, "i4"), None, UNSTATED),
    "TIFF of 32 bits, 16 said": (tiff(FULL, "i4", ">"), 16, RIGHT),
    "TIFF of unsigned 32 bits, said": (tiff(GREY * 0x01010101, "u4"), 32, RIGHT),
    "TIFF of floats to 1": (tiff(GREY / 255, "f4"), None, UNSTATED),
    "TIFF of floats to 1, said": (tiff(GREY / 255, "f4", ">"), 1, RIGHT),
    "TIFF of floats to 1, 16 said": (tiff(GREY / 255, "f4"), 16, DARK),
    "TIFF of floats to 1, SMin, SMax": (tiff(GREY / 255, "f4", t340=0.0, t341=1.0), None, RIGHT),
    "TIFF of floats from -1 to 1": (tiff(GREY / 127.5 - 1, "f4", t340=-1.0, t341=1.0), None, RIGHT),
    "TIFF of floats, white is zero": (tiff(1 - GREY / 255, "f4", t262=0), 1, RIGHT),
    "TIFF of floats to 255, said": (tiff(GREY, "f4"), 8, RIGHT),
    "TIFF of floats to 65535": (tiff(FULL, "f4"), None, UNSTATED),
    "TIFF of floats to 65535, said": (tiff(FULL, "f4"), 16, RIGHT),
    "big-endian deflated TIFF of floats": (tiff(GREY / 255, "f4", ">", deflate=True), 1, RIGHT),
    "the same, white is zero": (tiff(1 - GREY / 255, "f4", ">", deflate=True, t262=0), 1, RIGHT),
    "the same, unstated": (tiff(GREY / 255, "f4", ">", deflate=True), None, UNSTATED),
    "big-endian deflated TIFF of signed 16 bits": (tiff(GREY * 128, "i2", ">", deflate=True), 15, RIGHT),
    "big-endian deflated TIFF of signed 32 bits": (tiff(FULL, "i4", ">", deflate=True), 16, RIGHT),
    "big-endian deflated TIFF of 16 bits": (tiff(UPPER, "u2", ">", deflate=True), None, RIGHT),
    "deflated TIFF of floats": (tiff(GREY / 255, "f4", deflate=True), 1, RIGHT),
    "deflated TIFF of signed 16 bits": (tiff(GREY * 128, "i2", deflate=True), 15, RIGHT),
    "TIFF of NaN": (tiff(GREY * np.nan, "f4"), 1, "holds values from nan to nan"),
    "TIFF of infinity": (tiff(np.where(GREY > 99, np.inf, 0), "f4"), 1, "from 0 to inf"),
    # PGM and PPM: Pillow scales by the largest value that they state
    "PGM to 1": (pnm(1), None, [0, 0, 0, 255, 255, 255]),
    "PGM to 100": (pnm(100), None, [0, 0, 99, 128, 199, 255]),
    "PGM to 4095": (pnm(4095), None, RIGHT),
    "PPM to 4095": (pnm(4095, colours=3), None, RIGHT),
    "dark PGM to 4095": (pnm(4095, GREY // 4), None, [value // 4 for value in RIGHT]),
    "PGM to 65535": (pnm(65535, FULL), None, RIGHT),
    "PPM to 65535": (pnm(65535, FULL, 3), None, RIGHT),
    "PGM to 65535 of 12 bits": (pnm(65535, TWELVE), None, DARK),
    "PGM to 65535 of 12 bits, said": (pnm(65535, TWELVE), 12, RIGHT),
    "PPM to 65535 of 12 bits": (pnm(65535, TWELVE, 3), None, DARK),
    "PFM": (b"Pf\n6 1\n-1.0\n" + (GREY / 255).astype("<f4").tobytes(), None, UNSTATED),
    "PFM, said": (b"Pf\n6 1\n-1.0\n" + (GREY / 255).astype("<f4").tobytes(), 1, RIGHT),
    # colours of 16 bits, of which Pillow keeps the upper 8
    "PNG of 16-bit colours": (png(channels(FULL, 3), 2), None, RIGHT),
    "PNG of 16-bit colours and alpha": (png(channels(FULL, 4), 6), None, RIGHT),
    "PNG of 16-bit grey and alpha": (png(channels(FULL, 2), 4), None, RIGHT),
    "PNG of 12-bit colours in 16": (png(channels(TWELVE, 3), 2), None, DARK_COLOURS),
    "PNG of 12-bit colours, opaque": (png(np.stack([*[TWELVE] * 3, FULL * 0 + 65535], -1), 6), None, DARK_COLOURS),
    "PNG of 12-bit grey, opaque": (png(np.stack([TWELVE, FULL * 0 + 65535], -1), 4), None, DARK_COLOURS),
    "PNG of 12-bit colours in 16, said": (png(channels(TWELVE, 3), 2), 12, "says 12; save it with 8 bits"),
    "PNG of dark 16-bit colours, said": (png(channels(FULL // 4, 3), 2), 16, [value // 4 for value in RIGHT]),
    "TIFF of 16-bit colours": (tiff(channels(FULL, 3), "u2"), None, RIGHT),
    "TIFF of 12-bit colours in 16": (tiff(channels(TWELVE, 3), "u2", ">"), None, DARK_COLOURS),
    **{
        f"TIFF of 12-bit colours in 16, SMax, {said} said": (tiff(channels(TWELVE, 3), "u2", **tags), said, STATED)
        for said, tags in ((None, {"t341": 4095}), (12, {"t341": 4095, "t274": 6}), (16, {"t341": 4095, "t274": 6}))
    },
    "TIFF of dark 16-bit colours, SMax": (tiff(channels(FULL // 4, 3), "u2", t341=65535), 12, QUARTER),
    "TIFF of 16-bit colours from SMin": (tiff(channels(FULL, 3), "u2", t340=999, t341=65535), None, "black 999 and"),
    "TIFF of 16-bit colours in planes": (tiff(channels(UPPER, 3), "u2", t284=2), None, RIGHT),
    "TIFF of 16-bit colours in planes, big-endian": (tiff(channels(UPPER, 3), "u2", ">", t284=2), None, RIGHT),
    "TIFF of 16-bit colours in planes, deflated": (tiff(channels(UPPER, 3), "u2", deflate=True, t284=2), None, RIGHT),
    "TIFF of 16-bit colours and alpha in planes": (tiff(channels(UPPER, 4), "u2", t284=2, t338=2), None, RIGHT),
    "TIFF of 12-bit colours in planes": (tiff(channels(TWELVE, 3), "u2", t284=2), None, DARK_COLOURS),
    "TIFF of dark 16-bit colours in planes": (tiff(channels(FULL // 4, 3), "u2", t284=2), 16, QUARTER),
    # separate planes, which Pillow reads as if each had 8 bits
    "TIFF in planes": (tiff(channels(GREY, 3), "u1", t284=2), None, RIGHT),
    "TIFF in planes, bits reversed": (tiff(channels(GREY, 3), "u1", t284=2, t266=2), None, PLANES),
    "TIFF of 16-bit CMYK in planes": (tiff(channels(FULL, 4), "u2", t284=2, t262=5), None, PLANES),
    "TIFF of LAB in planes": (tiff(channels(GREY, 3), "u1", t284=2, t262=8), None, PLANES),
    "deflated TIFF of LAB in planes": (tiff(channels(GREY, 3), "u1", deflate=True, t284=2, t262=8), None, PLANES),
    "TIFF of one plane": (tiff(GREY, "u1", t284=2), None, RIGHT),
    "TIFF of one plane, white is zero": (tiff(255 - GREY, "u1", t284=2, t262=0), None, PLANES),
    "TIFF of one plane of 4 bits": (tiff(GREY, "u1", bits=4, t284=2), None, PLANES),
    "TIFF of one plane of 16 bits": (tiff(FULL, "u2", t284=2), None, PLANES),
    "TIFF of one plane of floats": (tiff(GREY / 255, "f4", ">", t284=2), 1, PLANES),
    # Pillow images that never were files
    "RGBA": (adjusted("RGBA", None, None, None, 9), None, RIGHT),
    "RGBa": (adjusted("RGBa", None, None, None, 255), None, RIGHT),
    "La": (adjusted("La", None, 255), None, RIGHT),
    "LA": (adjusted("LA", None, 0), None, RIGHT),
    "PA": (saved("P", "PNG"), None, "nearest"),
    "HSV": (adjusted("HSV", 0, 0, None), None, RIGHT),
    "YCbCr": (adjusted("YCbCr", None, 128, 128), None, RIGHT),
    "LAB": (adjusted("LAB", None, 0, 0), None, [0, 2, 93, 119, 194, 255]),  # of lightness
    "I;16": (Image.frombytes("I;16", (6, 1), FULL.astype("<u2").tobytes()), None, RIGHT),
    "I;16B": (Image.frombytes("I;16B", (6, 1), FULL.astype(">u2").tobytes()), None, RIGHT),
    "I;16 of 12 bits": (Image.fromarray(TWELVE.astype(np.uint16)), None, DARK),
    "I;16 of 12 bits, said": (Image.fromarray(TWELVE.astype(np.uint16)), 12, RIGHT),
    "I": (Image.fromarray(FULL.astype(np.int32)), None, UNSTATED),
    "I, said": (Image.fromarray(FULL.astype(np.int32)), 16, RIGHT),
    "F": (Image.fromarray((GREY / 255).astype(np.float32)), None, UNSTATED),
    "F, said": (Image.fromarray((GREY / 255).astype(np.float32)), 1, RIGHT),
}
# Kinds of file that hold no more than nearly the picture.
APPROXIMATE = {"nearest": 30, "black and white": 140}


@pytest.mark.parametrize("name", CASES)
def test_bytes_or_a_refusal(name):
    """The loaders' way and the image processor's give the same bytes."""
    source, bit_depth, wanted = CASES[name]
    processor = EfficientNetNVImageProcessor(
        do_resize=False, crop_size={"height": 1, "width": 6}, do_rescale=False, do_normalize=False, bit_depth=bit_depth
    )
    image = Image.open(io.BytesIO(source)) if isinstance(source, bytes) else source
    reading = Reading(bit_depth)
    if isinstance(wanted, str) and wanted not in APPROXIMATE:
        if isinstance(source, bytes):
            with pytest.raises(BadPicture, match=re.escape(wanted)) as raised:
                Picture(source, reading)
            assert str(raised.value).isprintable() and "Error" not in str(raised.value)
        with pytest.raises(UnclearPixels, match=re.escape(wanted)):
            processor(image)
        return
    tolerance = 2 if "JPEG" in name else APPROXIMATE.get(str(wanted), 1 if name == "LAB" else 0)
    pixels = processor(image)["pixel_values"][0]
    for channel in pixels:
        np.testing.assert_allclose(channel[0], RIGHT if isinstance(wanted, str) else wanted, atol=tolerance)
    if isinstance(source, bytes):
        assert np.array_equal(np.asarray(Picture(source, reading).rgb()).transpose(2, 0, 1), pixels)


UNREAD = {
    "big-endian 16 bits, white is zero": tiff(FULL, "u2", ">", t262=0),
    "big-endian BigTIFF": b"MM\0+" + struct.pack(">HHQQ", 8, 0, 16, 0),
    "16 bits and alpha": tiff(channels(FULL, 2), "u2", t338=2),
    "palette of 16 bits": tiff(FULL, "u2", t262=3),
    "floats of 64 bits": tiff(GREY / 255, "f8"),
    "floats of 16 bits": tiff(GREY / 255, "f2", ">"),
    "big-endian unsigned 32 bits": tiff(FULL, "u4", ">"),
    "colours of floats": tiff(channels(GREY / 255, 3), "f4"),
    "YCbCr in planes": tiff(channels(GREY, 3), "u1", t284=2, t262=6),
    "grey and alpha in planes": tiff(channels(GREY, 2), "u1", t284=2, t338=2),
}


@pytest.mark.parametrize("name", UNREAD)
def test_a_tiff_that_pillow_does_not_read_is_said_to_be_one(name):
    with pytest.raises(BadPicture, match=r"^is (damaged, or )?a kind of TIFF that Pillow does not read$"):
        Picture(UNREAD[name], Reading(16))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", [2, 3, 4])
def test_a_tiff_that_pillow_misreads_is_read_rightly_whoever_asks(order, kind):
    """Bands in their order, of an image that is opened once and asked for twice."""
    if kind == 2:
        data, bit_depth = tiff(UPPER / 65535, "f4", order, deflate=True), 1
        wanted = channels(np.rint(UPPER / 257), 3)
    else:
        values = np.random.default_rng(0).integers(0, 65536, (5, 7, kind))
        data, bit_depth = tiff(values, "u2", order, t284=2, **({"t338": 2} if kind == 4 else {})), 16
        wanted = values[..., :3] >> 8
    image = Image.open(io.BytesIO(data))
    for _ in range(2):
        assert np.array_equal(np.asarray(to_rgb(image, bit_depth)), wanted)
    decoded = Image.open(io.BytesIO(data))
    decoded.load()
    if kind == 2 and order == "<":
        return
    with pytest.raises(UnclearPixels, match="that Pillow misreads, and it was decoded before it came here"):
        to_rgb(decoded, bit_depth)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_arrays_of_wide_numbers_are_read_like_images(dtype):
    def bytes_of(values, bit_depth=None):
        processor = EfficientNetNVImageProcessor(
            do_resize=False, crop_size={"height": 1, "width": 6}, do_rescale=False, do_normalize=False
        )
        return processor(values.astype(dtype), bit_depth=bit_depth)["pixel_values"][0][0, 0].tolist()

    assert bytes_of(TWELVE, 12) == bytes_of(FULL, 16) == RIGHT
    with pytest.raises(ValueError, match="by --bit_depth 12 black is 0 and white 4,095"):
        bytes_of(FULL, 12)
    if dtype == np.uint16:
        assert bytes_of(FULL) == RIGHT
        with pytest.raises(ValueError, match=DARK):
            bytes_of(TWELVE)
    else:
        assert bytes_of(GREY) == RIGHT
        with pytest.raises(ValueError, match="Pixels must lie in 0 to 255 or 0 to 1"):
            bytes_of(FULL)


@pytest.mark.parametrize("value", [0, 33, 1.5, True, "8"])
def test_a_processor_with_no_such_depth_is_refused(value):
    with pytest.raises(ValueError, match="bit_depth must be a whole number from 1 to 32, or null"):
        EfficientNetNVImageProcessor(bit_depth=value)


def test_the_depth_is_saved_and_read(tmp_path):
    EfficientNetNVImageProcessor(bit_depth=12).save_pretrained(tmp_path)
    processor = EfficientNetNVImageProcessor.from_pretrained(tmp_path)
    assert processor.bit_depth == 12
    options = type("options", (), {"bit_depth": None, "max_pixels": 1000})
    assert Reading.of(options, processor) == Reading(12, 1000)
    options.bit_depth = 10
    assert Reading.of(options, processor) == Reading(10, 1000)


def test_deep_images_of_several_strips_are_whole(monkeypatch):
    """Of one row each, white in the last only; turned by EXIF, which is read after the range."""
    monkeypatch.setattr("effnet_hf.image_processing_efficientnet_nv._STRIP", 5)
    values = np.random.default_rng(0).integers(0, 65536, (31, 37), dtype=np.uint16)
    values[:-1] >>= 2
    values[-1, -1] = 65535
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF", tiffinfo={HIGHEST: 65535, 0x0112: 6})
    turned = np.asarray(Picture(buffer.getvalue()).rgb())
    assert np.array_equal(turned, channels(np.rot90(values >> 8, -1), 3))


def test_to_rgb_leaves_pillows_limit_of_pixels_alone(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)
    assert Picture(png(FULL), Reading(max_pixels=6)).rgb().size == (6, 1)
    assert Image.MAX_IMAGE_PIXELS == 2
    with pytest.raises(BadPicture, match="has 6 pixels, and --max_pixels is 5"):
        Picture(png(FULL), Reading(max_pixels=5))
    assert to_rgb(Image.fromarray(GREY.astype(np.uint8))).size == (6, 1)
