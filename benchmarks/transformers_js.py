"""Answers of transformers.js in Node beside Python's, on photographs: its own image processor, and our layout's graph.

    npm ci --ignore-scripts --prefix tests/interop/js
    python convert.py lite0 --output_dir lite0
    python benchmarks/transformers_js.py lite0 IMAGES answers.json

IMAGES is a folder of pictures, in folders or not. The baseline is the same network, exported without the layout, with
the settings of the checkpoint for the library's own processor.
"""

import json
import subprocess
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from lib.environment import describe_cpu
from PIL import Image

from effnet_hf import EfficientNetNVForImageClassification, EfficientNetNVImageProcessor, export_model
from effnet_hf.cli import ArgumentParser, at_least, path, run
from effnet_hf.errors import UserError
from effnet_hf.files import atomic_write


JS = Path(__file__).resolve().parents[1] / "tests/interop/js"
LIBRARY = "@huggingface/transformers"
ROWS = {
    "their": "the library's image processor (baseline)",
    "fp32": "`--layout transformers.js`",
    "fp16": "`--layout transformers.js --dtype fp16`",
}


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("model", type=path, help="checkpoint")
    parser.add_argument("images", type=path, help="folder of pictures")
    parser.add_argument("output", type=path, help="file to write")
    parser.add_argument("--count", type=at_least(1), default=80, help="at most so many pictures (%(default)s)")
    args = parser.parse_args()
    files = [file for file in sorted(Path(args.images).rglob("*")) if file.suffix.lower() in (".jpg", ".jpeg", ".png")]
    if not files:
        raise UserError(f"{args.images} has no pictures (.jpg .jpeg .png).")
    if Path(args.output).is_dir():
        raise UserError(f"{args.output} is a folder; name a file to write.")
    files = files[: args.count]
    answers = {}
    with TemporaryDirectory() as work:
        for key in ROWS:
            folder = Path(work) / key
            if key == "their":
                with_their_processor(args.model, folder)
            else:
                export_model(args.model, folder, layout="transformers.js", dtype=key, num_images=2)
            answers[key] = node(folder, files)
    wanted, profiles = python_answers(args.model, files), [has_profile(file) for file in files]
    table = []
    for key, found in answers.items():
        differences, others = compare(found, wanted)
        plain, profiled = ([value for value, has in zip(differences, profiles) if has == one] for one in (False, True))
        table.append({
            "in front of the network": ROWS[key], "another best class": f"{sum(others)} of {len(files)}",
            "largest difference of a probability, median": f"{median(plain):.1g}", "at most": f"{max(plain):.1g}",
            "at most, with a colour profile": f"{max(profiled):.1g}" if profiled else "",
        })  # fmt: skip
    npm = json.loads((JS / "node_modules" / LIBRARY / "package.json").read_text())["version"]
    node_version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    libraries = {name: version(name) for name in ("torch", "transformers", "onnxruntime", "pillow")}
    facts: dict = {"processor": describe_cpu(), "versions": libraries | {LIBRARY: npm, "node": node_version}}
    facts |= {"pictures": len(files), "of these with a colour profile": sum(profiles), "table": table}
    with atomic_write(Path(args.output)) as file:
        file.write(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


def with_their_processor(model: str, folder: Path) -> None:
    """The same network as transformers.js expects one: it resizes, crops and normalises itself."""
    export_model(model, folder, num_images=2)
    (folder / "onnx").mkdir()
    (folder / "model.onnx").rename(folder / "onnx/model.onnx")
    said = {"config.json": {"model_type": "efficientnet", "transformers.js_config": {"dtype": "fp32"}},
            "preprocessor_config.json": {"image_processor_type": "CLIPImageProcessor"}}  # fmt: skip
    for name, fields in said.items():
        content = json.loads((folder / name).read_text("utf-8")) | fields
        (folder / name).write_text(json.dumps(content), "utf-8")


def python_answers(model: str, files: list[Path]) -> list[dict[str, float]]:
    network = EfficientNetNVForImageClassification.from_pretrained(model).eval()
    processor = EfficientNetNVImageProcessor.from_pretrained(model)
    answers = []
    for file in files:
        with Image.open(file) as image, torch.inference_mode():
            probabilities = network(**processor(image, return_tensors="pt")).logits.softmax(-1)[0].tolist()
        answers.append({network.config.id2label[label]: value for label, value in enumerate(probabilities)})
    return answers


def has_profile(file: Path) -> bool:
    with Image.open(file) as image:
        return "icc_profile" in image.info


def node(folder: Path, files: list[Path]) -> list[list[dict]]:
    command = ["node", JS / "classify.mjs", folder, "{}", *(file.resolve() for file in files)]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "Error" in line), done.stderr)
        raise UserError(f"node failed: {said.strip()}; see --help for what it needs.")
    return json.loads(done.stdout)


def compare(found: list[list[dict]], wanted: list[dict[str, float]]) -> tuple[list[float], list[bool]]:
    """By picture: the largest difference of a probability, and whether another class is the best."""
    differences, others = [], []
    for answer, right in zip(found, wanted, strict=True):
        scores = {each["label"]: each["score"] for each in answer}
        differences.append(max(abs(scores[label] - value) for label, value in right.items()))
        others.append(max(scores, key=scores.__getitem__) != max(right, key=right.__getitem__))
    return differences, others


if __name__ == "__main__":
    run(main)
