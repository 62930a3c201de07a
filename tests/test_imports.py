"""Who may know whom, read from the source: imports point down, and sideways only at what an `__init__` offers."""

import ast
import sys
from pathlib import Path

import pytest

import effnet_hf


PACKAGE = Path(effnet_hf.__file__).parent
MODEL_FILES = {path.stem for path in PACKAGE.glob("*_efficientnet_nv.py")} | {"configuration"}
SHARED = {
    "errors",
    "files",
    "cli",
    "drawn",
    "quiet",
    "run_folder",
    "tables",
    "lock",
    "manifest",
    "reading",
    "stand_ins",
    "__about__",
}  # of no room; they know nobody above them
FLOORS = [
    {"commands", "__main__"},
    {"analysis", "conversion", "export", "hub", "inference", "quantization", "training"},
    {"data", "recipes"},
    {"checkpoint", "detection", "flips", "fused", "multi_label", "tuning"},
    MODEL_FILES,
    SHARED,
]
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
# Knows a foreign model's keys, or a checkpoint folder's files; nobody else may.
FOREIGN_KEYS = ("conv_stem", "_conv_stem", "encoder.top_conv", "features.0.0")
CHECKPOINT_FILES = ("optimizer.safetensors", "average.safetensors", "random_{")
RUN_FILES = (
    "metrics.jsonl",
    "summary.json",
    "recipe.yaml",
    "bad_files.txt",
    "quantization.json",
    "sensitivity.",
    "benchmark.json",
    "progress.json",
)


def room(module: str) -> str:
    """`effnet_hf.data.folder` -> `data`."""
    return module.split(".")[1] if "." in module else ""


def floor(name: str) -> int:
    return next(number for number, names in enumerate(FLOORS) if name in names)


def imports(path: Path) -> list[str]:
    """Absolute names of the modules that a file imports, anywhere in it but under TYPE_CHECKING."""
    package = ["effnet_hf", *path.relative_to(PACKAGE).parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found += [name] if node.module else [f"{name}.{alias.name}" for alias in node.names]
    return found


def name_of(path: Path) -> str:
    return ".".join(["effnet_hf", *path.relative_to(PACKAGE).with_suffix("").parts])


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_imports_downwards(path):
    own = room(name_of(path))
    for module in imports(path):
        if module.split(".")[0] != "effnet_hf" or room(module) in ("", own):
            continue
        other = room(module)
        assert floor(own) <= floor(other), f"{module} is on a floor above {own}"
        if floor(own) == floor(other) < 4:
            assert module.count(".") == 1, f"{module} is a matter of {other}; import what effnet_hf.{other} offers"


@pytest.mark.parametrize("name", sorted(MODEL_FILES))
def test_model_file_travels_light(name):
    allowed = {"torch", "numpy", "PIL", "transformers", "modelopt", *sys.stdlib_module_names}
    for module in imports(PACKAGE / f"{name}.py"):
        assert module.split(".")[0] in allowed or room(module) in MODEL_FILES, module


@pytest.mark.parametrize(
    "words, room_",
    [(FOREIGN_KEYS, "conversion"), (CHECKPOINT_FILES, "training/state.py"), (RUN_FILES, "run_folder.py")],
)
def test_only_one_room_knows_these_names(words, room_):
    for path in MODULES:
        place = str(path.relative_to(PACKAGE))
        if not place.startswith(room_):
            assert [word for word in words if f'"{word}' in path.read_text("utf-8")] == [], place


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_file_is_one_room_large(path):
    assert len(path.read_text("utf-8").splitlines()) <= 430, "two rooms: divide it"
