"""The parts of a report that show images of the data: sheets, likely label errors, heat maps."""

import base64
import io
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from ..data import BadPicture, Picture, Reading, Split
from ..errors import printable
from . import drawings
from .answers import Answers
from .attention import attention
from .figures import Case, Figures


_CARDS, _LOOKS, _SUSPECTS = 24, 8, 100  # on a page
_PICTURES_OF_SUSPECTS = 60
_SMALL = 64  # pixels; a smaller picture is shown with its pixels, and kept without loss
_HOW = {
    "mistakes": "Wrong answers that the network was surest of: look for wrong labels, classes that overlap, and what"
    " these images have in common.",
    "hits": "Right answers that it was least sure of: what is still missing from the training images.",
}


@dataclass(frozen=True)
class Source:
    """The images behind the answers, and how to read them."""

    answers: Answers
    images: Split | None
    reading: Reading

    def name(self, position: int) -> str:
        number = int(self.answers.index[position])
        return f"image {number}" if self.images is None else self.images.name(number)

    def shown(self, position: int) -> str:
        """The name as it stands in its folder."""
        name, folder = self.name(position), None if self.images is None else self.images.folder
        return printable(os.path.relpath(name, folder) if folder and os.path.isabs(name) else name)

    def link(self, position: int) -> str | None:
        name = os.path.abspath(self.name(position))
        return Path(name).as_uri() if self.images is not None and os.path.isfile(name) else None

    def picture(self, position: int) -> Image.Image | None:
        """Upright RGB; None where there is none, or it can no longer be read."""
        if self.images is None:
            return None
        try:
            return Picture(self.images.read(int(self.answers.index[position])), self.reading).rgb()
        except BadPicture:
            return None


def sheets(figures: Figures, source: Source, pictures: dict[str, bytes]) -> dict:
    found = []
    for anchor, title, cases in (
        ("mistakes", "Most confident mistakes", figures.mistakes),
        ("hits", "Least confident hits", figures.hits),
    ):
        shown = [(case, source.picture(case.position)) for case in cases[:_CARDS]]
        if all(picture is None for _, picture in shown):
            continue
        cards, drawn = [], []
        for case, picture in shown:
            thumb = None if picture is None else drawings.thumbnail(picture)
            card = _words(figures, case) | {
                "file": source.shown(case.position), "link": source.link(case.position), "picture": embedded(thumb),
            }  # fmt: skip
            cards.append(card)
            if thumb is not None:
                lines = [f"label {drawings.short(card['label'])}"]
                lines += [f"{drawings.short(guess['name'])} {guess['text']}" for guess in card["guesses"]]
                drawn.append((thumb, "\n".join([*lines, drawings.short(os.path.basename(card["file"]), 26)])))
        pictures[f"{anchor}.png"] = drawings.sheet(drawn)
        small = all(max(thumb.size) < _SMALL for thumb, _ in drawn)
        found.append({"anchor": anchor, "title": title, "how": _HOW[anchor], "cards": cards, "small": small})
    return {"sheets": found}


def _words(figures: Figures, case: Case) -> dict:
    """What a card says: the label, and the likeliest answers."""
    names, columns = figures.class_names, figures.per_image
    if columns is None:  # about one class of several
        name = names[max(case.label, case.answer)]
        said, answer = (name if each >= 0 else f"not {name}" for each in (case.label, case.answer))
        guesses = [(answer, case.probability, case.label == case.answer)]
    else:
        said, at = names[case.label], case.position
        both = {int(columns.prediction[at]): columns.probability[at]}
        both.setdefault(int(columns.second[at]), columns.second_probability[at])
        guesses = [(names[number], float(share), number == case.label) for number, share in both.items()]
    return {
        "label": printable(said),
        "guesses": [
            {"name": printable(name), "text": f"{100 * share:.1f} %", "share": round(100 * share), "right": right}
            for name, share, right in guesses
        ],
    }


def suspects(figures: Figures, source: Source) -> dict:
    rows = []
    for place, case in enumerate(figures.suspects[:_SUSPECTS]):
        words = _words(figures, case)
        name = figures.class_names[max(case.label, case.answer)]
        picture = source.picture(case.position) if place < _PICTURES_OF_SUSPECTS else None
        rows.append(
            {
                "picture": embedded(None if picture is None else drawings.thumbnail(picture, 112)),
                "file": source.shown(case.position),
                "link": source.link(case.position),
                "label": words["label"],
                "answer": printable(figures.class_names[case.answer] if case.answer >= 0 else f"not {name}"),
                "own": case.label_probability,
                "other": case.probability,
            }
        )
    return {"suspects": rows}


def looks(figures: Figures, source: Source, network, processor, pictures: dict[str, bytes]) -> dict:
    """Heat maps on the most confident mistakes, for the answer and for the label."""
    if network is None or processor is None:
        return {"looks": None}
    found = [(case, source.picture(case.position)) for case in figures.mistakes[:_LOOKS]]
    found = [(case, picture) for case, picture in found if picture is not None]
    if not found:
        return {"looks": None}
    views = [processor.resize_and_crop(picture) for _, picture in found]
    pixels = processor([picture for _, picture in found], return_tensors="pt")["pixel_values"]
    # Of several labels a case is about one class: both maps would be the same.
    classes = [[case.answer, case.label] if figures.per_image is not None else [max(case.answer, case.label)]
               for case, _ in found]  # fmt: skip
    maps = attention(network, pixels.to(network.device, network.dtype), torch.tensor(classes)).numpy()
    rows: list[dict] = []
    drawn: list[tuple[Image.Image, str]] = []
    for (case, _), view, own, wanted in zip(found, views, maps, classes):
        sides = [
            {"kind": "right" if number == case.label else "wrong", "text": printable(figures.class_names[number])}
            for number in wanted
        ]
        row = [
            drawings.thumbnail(_enlarged(view)),
            *(drawings.thumbnail(drawings.heat(_enlarged(view), map_)) for map_ in own),
        ]
        file = source.shown(case.position)
        drawn += zip(row, [drawings.short(os.path.basename(file), 26), *(drawings.short(s["text"]) for s in sides)])
        found_at = {"file": file, "link": source.link(case.position)}
        rows.append(found_at | {"sides": sides, "pictures": [embedded(each) for each in row]})
    pictures["attention.png"] = drawings.sheet(drawn, columns=1 + len(classes[0]))
    return {"looks": rows}


def _enlarged(view: Image.Image) -> Image.Image:
    """A small image, so large that a heat map on it is smooth."""
    times = max(1, drawings.THUMBNAIL // max(view.size))
    return view.resize((view.width * times, view.height * times), Image.Resampling.NEAREST)


def embedded(picture: Image.Image | None) -> str | None:
    """A small picture as the address of itself."""
    if picture is None:
        return None
    file, kind = io.BytesIO(), "PNG" if max(picture.size) < _SMALL else "JPEG"
    picture.convert("RGB").save(file, kind, quality=82)
    return uri(file.getvalue(), kind.lower())


def uri(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
