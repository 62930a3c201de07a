"""Everything that can be wrong, laid out in one folder, and a way to type a command in the middle of it."""

import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import datasets
import pytest
from transformers import ResNetConfig

from effnet_hf import EfficientNetNVConfig, EfficientNetNVForImageClassification, EfficientNetNVImageProcessor

from ..training.workbench import small_recipe, write_squares


ROOT = Path(__file__).parents[2]
CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """Name -> path of a file or folder; a name says what is wrong with it, or nothing is."""
    root = tmp_path_factory.mktemp("places")
    _data(root)
    _models(root)
    _files(root)
    return {path.name: str(path) for path in root.iterdir()} | {"root": str(root)}


def _data(root: Path) -> None:
    data = write_squares(root / "data", per_class=4, size=16)
    picture = (data / "val/red/0.png").read_bytes()
    for name, files in {
        "empty-folder": [],
        "train-alone": ["train/a/1.png", "train/b/1.png"],
        "single-class": ["train/a/1.png", "val/a/1.png"],
        "strange-val-class": ["train/a/1.png", "train/b/1.png", "val/a/1.png", "val/x/1.png"],
        "no-class-folders": ["train/1.png", "val/1.png"],
        "small-val": [*(f"train/{c}/{i}.png" for c in "ab" for i in "123"), "val/a/1.png"],
        "two-classes": ["train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png"],
        "empty-class": ["train/a/1.png", "train/b/.hidden", "val/a/1.png"],
        "same-but-for-case": ["train/cat/1.png", "train/Cat/1.png", "val/cat/1.png"],
        "one-folder-too-high": ["imagenette/train/a/1.png", "imagenette/val/a/1.png"],
        "no-pictures": ["train/a/notes.txt", "train/b/notes.txt"],
    }.items():
        (root / name).mkdir()
        for file in files:
            (root / name / file).parent.mkdir(parents=True, exist_ok=True)
            (root / name / file).write_bytes(picture)
    shutil.copytree(data, root / "broken-pictures")
    for path in (root / "broken-pictures").rglob("*.png"):
        path.write_bytes(b"no picture")
    (root / "picture.png").write_bytes(picture)


def _models(root: Path) -> None:
    config = EfficientNetNVConfig(
        image_size=16,
        kernel_sizes=[3],
        strides=[2],
        num_block_repeats=[1],
        expand_ratios=[2],
        out_channels=[16],
        stem_channels=16,
        head_channels=32,
        id2label=dict(enumerate(CLASSES)),
    )
    model = root / "model"
    EfficientNetNVForImageClassification(config).save_pretrained(model)
    EfficientNetNVImageProcessor.for_image_size(16, margin=0).save_pretrained(model)
    ResNetConfig(num_labels=3).save_pretrained(root / "resnet")

    def spoilt(name: str, file: str, content: bytes | None) -> None:
        folder = root / f"model-{name}"
        shutil.copytree(model, folder)
        if content is None:
            (folder / file).unlink()
        else:
            (folder / file).write_bytes(content)

    weights, described = (model / "model.safetensors").read_bytes(), json.loads((model / "config.json").read_text())
    spoilt("without-config", "config.json", None)
    spoilt("with-broken-config", "config.json", b'{"model_type": ')
    spoilt("with-a-list-for-config", "config.json", b"[1, 2]")
    spoilt("with-nonsense-in-config", "config.json", json.dumps({**described, "se_ratio": "many"}).encode())
    spoilt("without-weights", "model.safetensors", None)
    spoilt("cut-short", "model.safetensors", weights[:-100])
    spoilt("of-other-shapes", "config.json", json.dumps({**described, "out_channels": [24]}).encode())
    spoilt("of-noise", "model.safetensors", bytes(range(256)))
    spoilt("without-processor", "preprocessor_config.json", None)
    narrow = json.loads((model / "preprocessor_config.json").read_text()) | {"size": {"shortest_edge": 8}}
    spoilt("with-negative-margin", "preprocessor_config.json", json.dumps(narrow).encode())
    spoilt("with-broken-processor", "preprocessor_config.json", b"{")


def _files(root: Path) -> None:
    (root / "file").write_text("a file\n")
    (root / "small.yaml").write_text(small_recipe(root / "data", root / "never", quiet=False).to_yaml())
    quant = small_recipe(
        root / "data", root / "never", placement="nvidia", mixup=0.0, ema_decay=0.0, epochs=0, warmup_epochs=0
    )
    (root / "small-quant.yaml").write_text(quant.to_yaml())
    for name, text in {
        "unknown-key": "learning_rat: 0.1",
        "no-yaml": "a: [",
        "a-list": "- a\n- b",
        "nan": "learning_rate: .nan",
        "nested": "data:\n  epochs: 3",
    }.items():
        (root / f"{name}.yaml").write_text(text + "\n")
    (root / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (root / "folder.yaml").mkdir()
    row = {"type": "epoch", "epoch": 0, "train.loss": 1.0}
    for name, text in {
        "run": json.dumps(row),
        "run-with-damaged-metrics": json.dumps(row) + '\n{"type": ',
        "run-with-a-number": "3",
        "run-without-metrics": None,
    }.items():
        (root / name).mkdir()
        if text is not None:
            (root / name / "metrics.jsonl").write_text(text + "\n")
    checkpoint = root / "run-with-damaged-checkpoint/checkpoints/update-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "progress.json").write_text("{")


@pytest.fixture
def worlds(monkeypatch):
    """Name -> what makes this machine, for one test, another one."""

    def without_dali():
        monkeypatch.setattr("effnet_hf.data.dali.dali_is_installed", lambda: False)
        monkeypatch.setattr("effnet_hf.data.regions.library", lambda: None)

    def without_a_compiler():
        monkeypatch.setenv("CXX", "no-such-compiler")

    def without_modelopt():
        monkeypatch.setitem(sys.modules, "modelopt", None)
        for name in [name for name in sys.modules if name.startswith("modelopt.")]:
            monkeypatch.setitem(sys.modules, name, None)

    def full_disk():
        def no_room(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", no_room)

    def little_memory():
        def too_much(*_, **__):
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB.\nMore words.")

        monkeypatch.setattr("torch.nn.Conv2d.forward", too_much)

    return {
        "without DALI": without_dali,
        "without modelopt": without_modelopt,
        "without a compiler": without_a_compiler,
        "with a full disk": full_disk,
        "with little memory": little_memory,
    }


@pytest.fixture
def typed(monkeypatch, capfd, tmp_path):
    """Runs a program in an empty folder as a shell would: `train.py` or a module; exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path.parent / f"{tmp_path.name}-cache")
    monkeypatch.syspath_prepend(str(ROOT))

    def run(program: str, words: list[str]) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [program, *words])
        with pytest.raises(SystemExit) as ended:
            if program.endswith(".py"):
                runpy.run_path(str(ROOT / program), run_name="__main__")
            else:
                monkeypatch.delitem(sys.modules, program, raising=False)  # as it is in a fresh process
                runpy.run_module(program, run_name="__main__", alter_sys=True)
        return (ended.value.code, *capfd.readouterr())

    return run


def snapshot(*folders) -> dict[str, object]:
    """Every file and folder below, with size and modification time: equal snapshots, nothing was written."""
    found: dict[str, object] = {}
    for folder in folders:
        for path in sorted(Path(folder).rglob("*")):
            status = path.stat()
            # Of a folder its names: a lock that came and went changes its time.
            found[str(path)] = (status.st_size, status.st_mtime_ns) if path.is_file() else sorted(os.listdir(path))
    return found
