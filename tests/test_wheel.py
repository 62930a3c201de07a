"""What `pip install effnet_hf` brings: built, installed into an environment without this folder, used from there."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest


pytestmark = pytest.mark.slow  # builds twice and starts fresh interpreters: a minute

ROOT = Path(__file__).parents[1]
BUILD = "import sys, setuptools.build_meta as build; print(getattr(build, sys.argv[1])(sys.argv[2]))"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(sdist, wheel), made from the tracked files alone, the wheel from the unpacked sdist as pip would."""
    folder = tmp_path_factory.mktemp("dist")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    tree = folder / "tree"
    for name in filter(None, map(os.fsdecode, files)):
        if (ROOT / name).is_file():
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
def python(built, tmp_path_factory):
    """The interpreter of an environment with the wheel, which sees our dependencies but not the editable install."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    dependencies = tmp_path_factory.mktemp("dependencies")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "effnet" not in path.name or path.name.startswith("efficientnet"):
            (dependencies / path.name).symlink_to(path)
    (site / "dependencies.pth").write_text(f"{dependencies}\n")
    with zipfile.ZipFile(built[1]) as wheel:  # what `pip install --no-deps` does with a pure wheel
        wheel.extractall(site)
    return folder / "bin/python"


def run(python, *words, cwd):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run([str(python), *words], cwd=cwd, env=environment, capture_output=True, text=True)


def test_wheel_holds_the_package_with_recipes_and_template_and_no_tests(built):
    names = zipfile.ZipFile(built[1]).namelist()
    tracked = subprocess.run(
        ["git", "ls-files", "effnet_hf", "optimum"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    assert {name for name in names if ".dist-info/" not in name} == set(tracked)
    assert any(name.endswith(".yaml") for name in names) and "effnet_hf/hub/model_card.md.jinja" in names


def test_sdist_holds_what_the_readme_speaks_of(built):
    with tarfile.open(built[0]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"README.md", "LICENSE", "setup.cfg", "effnet_hf/recipes/b0.yaml"} <= names


def test_installed_package_imports_reads_recipes_and_opens_models(python, tmp_path):
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
    done = run(python, "-c", script, cwd=tmp_path)
    assert done.returncode == 0 and int(done.stdout.split()[-1]) > 500, done.stderr


@pytest.mark.parametrize("module", ["effnet_hf.data.scan", "effnet_hf.training.plots"])
def test_modules_run_as_commands(python, tmp_path, module):
    done = run(python, "-m", module, "--help", cwd=tmp_path)
    assert done.returncode == 0 and f"usage: python -m {module}" in done.stdout, done.stderr
