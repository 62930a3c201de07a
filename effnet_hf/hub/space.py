"""A Space: a folder that huggingface.co/spaces, or `python app.py`, runs as a web page that classifies images.

Its app opens the checkpoint with transformers and the code that lies beside the weights, so that it needs neither this
package nor an export, and answers what `classify` does.
"""

import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, SpaceCardData
from PIL import Image

from ..checkpoint import PROCESSOR, Checkpoint, open_checkpoint
from ..data import BadPicture, Picture, Reading, list_images, read_file
from ..errors import UserError, printable
from ..files import atomic_folder, refuse_foreign, refuse_to_remove, require_place
from ..quiet import no_progress_bars
from ..run_folder import RunFolder
from .card import HUB_ID
from .transfer import download


GRADIO, PYTHON = "6.31.0", "3.12"  # what a new Space gets; tests/interop opens its page with this gradio
# Gradio 6 wants huggingface_hub 1, which transformers 4 cannot work with.
REQUIREMENTS = """\
# gradio itself comes with the Space, in the version that README.md names.
# torch without CUDA, which a free Space has no use for; remove the line where the Space has a GPU.
--extra-index-url https://download.pytorch.org/whl/cpu
torch>=2.6
transformers>=5,<6
pillow>=11
"""
MOST, LARGEST = 24, 10_000_000  # examples, and bytes of one: the page shows them all whenever it is opened
_SHOWN = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")  # by every browser
_GPS = 0x8825
_TITLE, _SUMMARY = 100, 60  # letters; the Hub refuses a longer summary
_CODE = "modeling_efficientnet_nv.py"


@dataclass(frozen=True)
class _Card:
    """What a checkpoint's README.md says: its licence, its title, and all of it but pictures and metadata."""

    license: str | None = None
    title: str | None = None
    text: str = ""


def write_space(
    model: str,
    output_dir: str | os.PathLike,
    *,
    examples: Sequence[str | os.PathLike] = (),
    model_id: str | None = None,
    title: str | None = None,
    top_k: int = 5,
    overwrite: bool = False,
    shown: bool = False,
) -> list[str]:
    """Writes `README.md`, `app.py` and `requirements.txt`, with `model/` and `examples/` where there are such.

    Args:
        model: a folder, which is copied into the Space, or a Hub id, from which the Space loads its model.
        examples: images, and folders of images, for the page to offer.
        model_id: load the model from this repository on the Hub, and copy no weights.
        title: of the page; the model card's by default.
        top_k: classes that the page shows.
        overwrite: replace a folder that was written here, and nobody has edited.
        shown: it will be uploaded next: an example that says where it was taken is refused.

    Returns:
        Sentences about what was chosen, and about what its author should know.

    Raises:
        UserError: `model` is no float classifier of ours, an example is no image for a browser, or the folder may not
            be written.
    """
    local = os.path.isdir(os.path.expanduser(model))
    if model_id is not None and not HUB_ID.fullmatch(model_id):
        raise UserError(f"--hub_model_id {printable(model_id)} is no repository of the Hub; give one as ME/X.")
    if title is not None and not title.strip():
        raise UserError("--title is empty; leave it out for the model card's.")
    require_place(output_dir, overwrite)
    refuse_foreign(Path(output_dir), edited=True)
    refuse_to_remove(output_dir, {"--model": model, **{f"--examples {each}": each for each in examples}})
    checkpoint = open_checkpoint(model, "MODEL")
    _require_float_classifier(checkpoint)
    pictures = _examples(examples, Reading.of(Reading(), checkpoint.processor))
    placed = ", ".join(printable(name) for name, content in pictures.items() if _has_place(content))
    if placed and shown:
        raise UserError(
            f"--push_to_hub: {placed} says in its EXIF or XMP where it was taken, and a Space shows it to everybody;"
            ' remove that (`exiftool "-gps*=" FILE`), or leave the picture out.'
        )
    source = model_id or (None if local else model)
    card, notes = _card(checkpoint, local), []
    config, processor = checkpoint.config, checkpoint.processor
    height, width = processor.crop_size["height"], processor.crop_size["width"]
    heading = _one_line(title or card.title or f"EfficientNet {config.variant or ''}")[:_TITLE]
    facts = {
        "title": heading,
        "source": source,
        "variant": config.variant or "custom",
        "num_labels": config.num_labels,
        "size": f"{width} x {height}",
        "top_k": min(top_k, config.num_labels),
        "gradio": GRADIO,
        "examples": bool(pictures),
    }
    metadata = SpaceCardData(
        title=heading,
        emoji="🖼️",
        colorFrom="green",
        colorTo="gray",
        sdk="gradio",
        sdk_version=GRADIO,
        python_version=PYTHON,
        app_file="app.py",
        pinned=False,
        license=card.license,
        models=[source] if source else None,
        short_description=f"Says which of {config.num_labels:,} classes an image shows"[:_SUMMARY],
        tags=["image-classification", "efficientnet"],
    )
    with atomic_folder(output_dir, overwrite=overwrite) as place:
        for name, content in pictures.items():
            (place / "examples").mkdir(exist_ok=True)
            (place / "examples" / name).write_bytes(content)
        if source is None:
            with no_progress_bars():
                checkpoint.load().save_pretrained(place / "model")
            processor.save_pretrained(place / "model")
        if card.text:
            (place / "model_card.md").write_text(card.text, "utf-8")
        (place / "app.py").write_text(_render("space_app.py.jinja", facts), "utf-8")
        readme = _render("space_readme.md.jinja", facts)
        (place / "README.md").write_text(f"---\n{metadata.to_yaml().strip()}\n---\n\n{readme}", "utf-8")
        (place / "requirements.txt").write_text(REQUIREMENTS, "utf-8")
    if source is None:
        notes.append(f"model    copied from {model}")
    elif local:
        notes.append(f"model    loaded from {source}, which must hold what is in {model} when the Space starts")
    else:
        notes.append(f"model    loaded from {source} when the Space starts")
    notes.append(f"license  {card.license or 'none: the model card states none; write one into README.md'}")
    notes.append(f"examples {len(pictures) or 'none: name some with --examples'}")
    if placed:
        notes.append(
            f"WARNING: the EXIF or XMP of {placed} says where it was taken; it must not go into a public Space"
        )
    return notes


def _require_float_classifier(checkpoint: Checkpoint) -> None:
    where = f"MODEL {checkpoint.name}"
    if checkpoint.quantized:
        raise UserError(
            f"{where} is quantized: a Space would compute its int8 as float, slowly; name the float checkpoint that it"
            " was made from."
        )
    if not checkpoint.config.num_labels:
        raise UserError(f"{where} has no classifier, so it tells no classes, which is what a Space shows.")
    if not checkpoint.has_processor:
        raise UserError(f"{where} holds no {PROCESSOR}, so it does not say how to prepare images.")


def _examples(named: Sequence[str | os.PathLike], reading: Reading) -> dict[str, bytes]:
    """The content of every example by the name that it gets; each was read, as the app will."""
    paths: list[Path] = []
    for each in named:
        if os.path.isdir(each):
            found = list_images(each)[0]
            if not found:
                raise UserError(f"--examples {printable(each)} holds no images.")
            paths += map(Path, found)
        elif os.path.isfile(each):
            paths.append(Path(each))
        else:
            raise UserError(f"--examples {printable(each)}: there is no such image.")
    if len(paths) > MOST:
        raise UserError(f"--examples names {len(paths):,} images; a page has room for {MOST}, so choose some.")
    content: dict[str, bytes] = {}
    for path in paths:
        where, name = f"--examples {printable(path)}", path.name
        if path.suffix.lower() not in _SHOWN:
            raise UserError(f"{where}: browsers do not show such a file; give one of {', '.join(_SHOWN)}.")
        if path.stat().st_size > LARGEST:
            raise UserError(f"{where} has more than {LARGEST // 1_000_000} MB; make it smaller.")
        if name in content:
            raise UserError(f"{where}: another example has this name; rename one of them.")
        try:
            Picture(content.setdefault(name, read_file(path)), reading).rgb()
        except BadPicture as error:
            raise UserError(f"{where} {error}.") from None
    return content


def _has_place(content: bytes) -> bool:
    if b"GPSLatitude" in content:  # XMP
        return True
    try:
        return bool(Image.open(io.BytesIO(content)).getexif().get_ifd(_GPS))
    except Exception:  # EXIF is damaged in many ways, and says nothing then
        return False


def _card(checkpoint: Checkpoint, local: bool) -> _Card:
    """Of a repository on the Hub also whether a Space can open it."""
    folder = Path(checkpoint.name)
    if not local:
        folder = download(checkpoint.name, patterns=["README.md", "*.py"])
        if not (folder / _CODE).is_file():
            raise UserError(
                f"MODEL {checkpoint.name} holds no {_CODE}, without which transformers cannot open it in a Space; push"
                " a folder that was saved here."
            )
    file = RunFolder(folder).card
    if not file.is_file():
        return _Card()
    try:
        card = ModelCard(file.read_text("utf-8"), ignore_metadata_errors=True)
    except (UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file} is no model card: {' '.join(str(error).split())}; mend it or move it away.") from None
    heading = re.search(r"^# +(\S.*)$", card.text, re.MULTILINE)
    # The card's pictures are not in the Space.
    text = re.sub(r"^!\[[^\]]*\]\([^)]*\)\n*", "", card.text, flags=re.MULTILINE).strip()
    stated = getattr(card.data, "license", None)
    return _Card(stated if isinstance(stated, str) else None, heading and heading[1].replace("\\", ""), text + "\n")


def _one_line(text: str) -> str:
    return " ".join(printable(text).split())


def _render(template: str, facts: dict) -> str:
    from jinja2 import Environment

    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["literal"] = repr  # of Python, which JSON is not: its surrogates stand for no letters there
    return environment.from_string(Path(__file__).with_name(template).read_text("utf-8")).render(facts)
