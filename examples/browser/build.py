"""One HTML file that classifies images in the browser: network, class names and ONNX Runtime are inside, nothing is
sent anywhere, and it opens from a disk, a USB stick, a mail or any static server.

    npm ci --ignore-scripts --prefix examples/browser            ONNX Runtime for browsers, once
    effnet-hf export --model runs/b0 --output_dir runs/b0-image --with_preprocessing
    python examples/browser/build.py --model runs/b0-image --output b0.html
"""

import argparse
import base64
import gzip
import html
import json
from pathlib import Path

from effnet_hf.cli import ArgumentParser, path, run
from effnet_hf.errors import UserError
from effnet_hf.export import ONNXEfficientNet
from effnet_hf.files import atomic_write
from effnet_hf.multi_label import is_multi_label, thresholds_of


HERE = Path(__file__).parent
RUNTIME = HERE / "node_modules/onnxruntime-web/dist"


def build(model: str, title: str | None = None, runtime: Path = RUNTIME) -> str:
    """The page.

    Args:
        model: a folder that `effnet-hf export --with_preprocessing` wrote.
        runtime: the folder `dist` of the npm package onnxruntime-web.

    Raises:
        UserError: the folder's graph does not take images, or the runtime is not there.
    """
    opened = ONNXEfficientNet.from_pretrained(model)  # refuses what is not whole
    if opened.input_name != "image":
        raise UserError(f"--model {model}: its graph takes prepared pixels; export it with --with_preprocessing.")
    if opened.processor.bit_depth is not None:
        raise UserError(f"--model {model} is for images of more than 8 bits, of which a browser keeps 8.")
    files = [runtime / name for name in ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")]
    if missing := next((file for file in files if not file.is_file()), None):
        raise UserError(f"{missing} is not there; run: npm ci --ignore-scripts --prefix examples/browser")
    facts = {
        "labels": [opened.config.id2label[i] for i in range(opened.config.num_labels)],
        "thresholds": thresholds_of(opened.config).tolist() if is_multi_label(opened.config) else None,
    }
    parts = {
        "title": html.escape(title or Path(model).resolve().name),
        "facts": json.dumps(facts).replace("<", "\\u003c"),
        "ort": _packed(files[0].read_bytes()),
        "wasm": _packed(files[1].read_bytes()),
        "model": _packed((Path(model) / "model.onnx").read_bytes()),
    }
    head, *rest = (HERE / "page.html").read_text("utf-8").split("{{")
    return head + "".join(parts[name] + text for name, text in (piece.split("}}", 1) for piece in rest))


def _packed(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=path, required=True, metavar="DIR", help="exported with --with_preprocessing")
    parser.add_argument("--output", type=path, required=True, metavar="FILE.html", help="page to write")
    parser.add_argument("--title", metavar="TEXT", help="default: the name of the folder")
    parser.add_argument("--runtime", type=path, default=RUNTIME, metavar="DIR", help="onnxruntime-web's folder dist")
    args = parser.parse_args(argv)
    page = build(args.model, args.title, Path(args.runtime))
    with atomic_write(args.output) as file:
        file.write(page)
    print(f"wrote {args.output}   {len(page) / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
