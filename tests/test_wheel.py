"""What `pip install effnet_hf` brings: built, installed where this folder is not, and worked with from there."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from .training.workbench import write_squares


pytestmark = pytest.mark.slow  # builds twice, trains, quantizes, exports in processes of their own: minutes

ROOT = Path(__file__).parents[1]
BUILD = "import sys, setuptools.build_meta as build; print(getattr(build, sys.argv[1])(sys.argv[2]))"
SMALL = "--image_size 64 --resize_margin 0 --warmup_epochs 0 --global_batch_size 8 --per_device_batch_size 8"
SMALL = f"{SMALL} --num_workers 0 --batch_norm_momentum 0.1".split()
# What only a clone has.
OF_A_CLONE = re.compile(r"python (train|validate|classify|convert|qat|export)\.py|(?<![\w/])(train|qat|export)\.py\b")


def files_of_the_tree(*folders: str) -> set[str]:
    """What git tracks, or would with the next `git add`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *folders]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    return {name for name in map(os.fsdecode, listed) if name and (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(sdist, wheel), made from the repository's files alone, the wheel from the unpacked sdist as pip would."""
    folder = tmp_path_factory.mktemp("dist")
    tree = folder / "tree"
    for name in files_of_the_tree():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes())

    def build(kind: str, source: Path) -> Path:
        made = subprocess.run(
            [sys.executable, "-c", BUILD, kind, str(folder)], cwd=source, capture_output=True, text=True, check=True
        )
        return folder / made.stdout.splitlines()[-1]

    sdist = build("build_sdist", tree)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return sdist, build("build_wheel", unpacked)


@pytest.fixture(scope="module")
def programs(built, tmp_path_factory):
    """The bin folder of an environment with the wheel, which sees our dependencies but not the editable install."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    dependencies = tmp_path_factory.mktemp("dependencies")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "effnet" not in path.name or path.name.startswith("efficientnet"):
            (dependencies / path.name).symlink_to(path)
    (site / "dependencies.pth").write_text(f"{dependencies}\n")
    pip = [folder / "bin/python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--disable-pip-version-check", built[1]], check=True)
    return folder / "bin"


class Desk:
    """An empty folder outside of any clone, with images in `data`, and the console script."""

    def __init__(self, folder: Path, programs: Path):
        self.folder, self.programs = folder, programs
        write_squares(folder / "data", per_class=16, size=72)
        self.environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self.environment |= {"OMP_NUM_THREADS": "1", "PATH": f"{programs}:{os.environ['PATH']}"}

    def start(self, *words) -> subprocess.CompletedProcess:
        command = [str(self.programs / words[0]), *map(str, words[1:])]
        return subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)

    def __call__(self, *words) -> str:
        """What `effnet-hf …` prints; it must succeed, and must not speak of what only a clone has."""
        done = self.start("effnet-hf", *words)
        assert done.returncode == 0, done.stderr
        assert not OF_A_CLONE.search(done.stdout + done.stderr)
        return done.stdout


@pytest.fixture(scope="module")
def desk(programs, tmp_path_factory):
    return Desk(tmp_path_factory.mktemp("desk"), programs)


@pytest.fixture(scope="module")
def trained(desk):
    """A run of four epochs, interrupted after the second and resumed by the same command; its folder's name."""
    command = ["train", "--config", "b0", "--data_dir", "data", "--output_dir", "runs/b0", *SMALL]
    command += ["--learning_rate", "0.001", "--epochs", "4", "--resume", "auto"]
    desk(*command, "--run_epochs", "2")
    (desk.folder / "first.jsonl").write_bytes((desk.folder / "runs/b0/metrics.jsonl").read_bytes())
    desk(*command)
    return "runs/b0"


@pytest.fixture(scope="module")
def quantized(desk, trained):
    command = ["qat", "--config", "quant-b0", "--model", trained, "--data_dir", "data", "--output_dir", "runs/int8"]
    command += ["--learning_rate", "0.0001", "--gradient_clip", "1", "--epochs", "1", "--calibration_batches", "2"]
    desk(*command, *SMALL)
    return "runs/int8"


def test_wheel_holds_the_package_and_nothing_else(built):
    names = {name for name in zipfile.ZipFile(built[1]).namelist() if ".dist-info/" not in name}
    assert names == files_of_the_tree("effnet_hf", "optimum")
    assert {name.split("/")[1] for name in names if name.startswith("optimum/")} == {"commands"}
    assert {"effnet_hf/py.typed", "effnet_hf/hub/model_card.md.jinja", "effnet_hf/recipes/b0.yaml"} <= names
    laboratory = ("tests/", "benchmarks/", "effnet_hf/benchmark/", "examples/", "benchmark.py")
    assert not [name for name in names if name.startswith(laboratory)]
    assert {Path(name).suffix for name in names} == {".py", ".yaml", ".jinja", ".typed"}


def test_sdist_holds_what_the_readme_speaks_of(built):
    with tarfile.open(built[0]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"README.md", "LICENSE", "setup.cfg", "effnet_hf/recipes/b0.yaml"} <= names


def test_installed_package_imports_reads_recipes_and_opens_models(desk):
    script = """
import effnet_hf, sys
from transformers import AutoImageProcessor, AutoModelForImageClassification
assert "site-packages" in effnet_hf.__file__, effnet_hf.__file__
from effnet_hf import EfficientNetNVConfig, EfficientNetNVForImageClassification, EfficientNetNVImageProcessor
from effnet_hf.hub import CardFacts, render_card
from effnet_hf.recipes import available_recipes, load_recipe
assert {"b0", "b4", "widese-b0", "widese-b4", "digits"} <= set(available_recipes())
load_recipe("b4", hardware="a100")
EfficientNetNVForImageClassification(EfficientNetNVConfig.from_variant("b0", num_labels=3)).save_pretrained("model")
EfficientNetNVImageProcessor().save_pretrained("model")
assert AutoModelForImageClassification.from_pretrained("model").config.num_labels == 3
AutoImageProcessor.from_pretrained("model")
facts = dict(variant="b0", num_labels=3, image_size=224, preprocessing="resize", versions={})
print(len(render_card(CardFacts(name="x", model_id=None, **facts))))
"""
    done = desk.start("python", "-c", script)
    assert done.returncode == 0 and int(done.stdout.split()[-1]) > 500, done.stderr


def test_the_command_names_its_commands(desk):
    told = desk("--help")
    for name in ("train", "validate", "classify", "convert", "qat", "export", "benchmark", "scan", "plots"):
        assert re.search(rf"^ +{name} ", told, re.M)


def test_trains_and_resumes(desk, trained):
    first, both = ((desk.folder / name).read_text() for name in ("first.jsonl", f"{trained}/metrics.jsonl"))
    rows = [json.loads(line) for line in both.splitlines()]
    assert [row["epoch"] for row in rows if row["type"] == "epoch"] == [0, 1, 2, 3]
    assert [row["type"] for row in rows].count("run") == 2  # gone on with, not begun again
    again = [number for number, row in enumerate(rows) if row["type"] == "run"][1]
    assert again > 6 and rows[:again] == [json.loads(line) for line in first.splitlines()][:again]


def test_validates(desk, trained):
    figures = json.loads(desk("validate", "--model", trained, "--data_dir", "data", "--num_workers", 0, "--json"))
    assert figures["n"] == 12 and 0 <= figures["top1"] <= 100


def test_classifies(desk, trained):
    told = json.loads(desk("classify", "--model", trained, "--json", "data/val/red/0.png"))
    assert {one["label"] for one in told["predictions"]} == {"blue", "green", "red"}


def test_converts_out_and_in(desk, trained):
    desk("convert", trained, "--to", "timm", "--output_dir", "b0.safetensors")
    desk("convert", "b0.safetensors", "--arch", "efficientnet_b0", "--image_size", 64, "--output_dir", "again")
    assert json.loads((desk.folder / "again/config.json").read_text())["model_type"] == "efficientnet_nv"


def test_quantizes(desk, quantized):
    assert json.loads((desk.folder / quantized / "config.json").read_text())["quantization"]
    assert (
        json.loads(desk("validate", "--model", quantized, "--data_dir", "data", "--num_workers", 0, "--json"))["n"]
        == 12
    )


def test_exports_float_and_int8(desk, trained, quantized):
    desk("export", "--model", trained, "--output_dir", "onnx", "--data_dir", "data")
    desk("export", "--model", quantized, "--output_dir", "ort", "--int8", "ort-cpu", "--data_dir", "data")
    for folder in ("onnx", "ort"):
        assert list((desk.folder / folder).glob("*.onnx"))


def test_looks_over_images_and_draws_curves(desk, trained):
    assert "48" in desk("scan", "data")
    assert "curves.png" in desk("plots", trained)


def test_nothing_that_was_written_speaks_of_a_clone(desk, trained, quantized):
    """Cards, logs and recipes name the command that this user has."""
    texts = [*desk.folder.rglob("*.md"), *desk.folder.rglob("*.json"), *desk.folder.rglob("*.yaml")]
    assert any("effnet-hf train" in path.read_text("utf-8") for path in texts)
    assert [path for path in texts if OF_A_CLONE.search(path.read_text("utf-8"))] == []


def test_accelerate_launches_the_installed_command(desk):
    launch = ["python", "-m", "accelerate.commands.launch", "--cpu", "--num_processes", 1, "--num_machines", 1]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "effnet_hf.commands.train"]
    done = desk.start(*launch, "--config", "b4", "--print_config")
    assert done.returncode == 0 and 'variant: "b4"' in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("train --config b0", "effnet-hf train: error: no data"),
        ("train --epoch 3", "effnet-hf train: error: unknown flag --epoch; did you mean --epochs?"),
        ("train --config quant-b0", "run effnet-hf qat instead"),
        ("validate --model nowhere/at-all --data_dir data", "effnet-hf validate: error: "),
        ("trian", "effnet-hf: error: there is no command trian"),
    ],
)
def test_errors_are_one_line_that_names_the_installed_command(desk, words, sentence):
    done = desk.start("effnet-hf", *words.split())
    assert done.returncode == 2 and sentence in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not OF_A_CLONE.search(done.stderr)
