"""What all drawings have in common: the mark by which they are known again, and the font of those made with Pillow."""

import os
from pathlib import Path

from PIL import Image, ImageFont, PngImagePlugin


SOFTWARE = "effnet_hf"  # the PNG's field of that name


def png_info() -> PngImagePlugin.PngInfo:
    """What Pillow's `save` takes as `pnginfo`; matplotlib's takes `metadata={"Software": SOFTWARE}`."""
    facts = PngImagePlugin.PngInfo()
    facts.add_text("Software", SOFTWARE)
    return facts


def is_ours(file: str | os.PathLike) -> bool:
    """Whether it is a drawing of ours."""
    if not os.path.isfile(file):  # a pipe would be waited for
        return False
    try:
        with Image.open(file) as image:
            return image.info.get("Software") == SOFTWARE
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # whatever it is
        return False


def pillow_font(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's, which has the letters of most alphabets, in pixels."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)
