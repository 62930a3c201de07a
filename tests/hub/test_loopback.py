"""Uploads and downloads against a Hub on 127.0.0.1; each session is a process, as a user's would be."""

import hashlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from loopback_hub import LoopbackHub
from PIL import Image

from effnet_hf import EfficientNetNVForImageClassification, EfficientNetNVImageProcessor
from effnet_hf.hub import CardFacts, render_card
from effnet_hf.hub.transfer import _OF_A_RUN, _each
from tests.child_path import child_path
from tests.conftest import tiny_config


HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


def write_run(folder: Path, seed: int = 0) -> Path:
    """A run's output folder, with things in it that are nobody's business."""
    torch.manual_seed(seed)
    config = tiny_config.__wrapped__()(id2label={i: f"class {i}" for i in range(5)})
    EfficientNetNVForImageClassification(config).save_pretrained(folder)
    EfficientNetNVImageProcessor.for_image_size(32).save_pretrained(folder)
    facts = CardFacts(name="Tiny", variant="custom", num_labels=5, image_size=32, preprocessing="Resize.")
    (folder / "README.md").write_text(render_card(facts))
    (folder / "model.onnx").write_bytes(f"onnx {seed}".encode() * 1000)
    (folder / "plots").mkdir()
    (folder / "plots" / "curves.png").write_bytes(b"png")
    (folder / "plots" / "first_batch.png").write_bytes(b"photographs")
    (folder / "report").mkdir()
    (folder / "report" / "report.html").write_text("photographs")
    (folder / "checkpoints" / "update-1").mkdir(parents=True)
    (folder / "checkpoints" / "update-1" / "optimizer.bin").write_bytes(b"secret")
    (folder / "checkpoints" / "README.md").write_text("no metadata")
    (folder / ".hidden").write_text("hidden")
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run")


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def session(hub, what: str, argument: Path, home: Path, with_package: bool = True, python: str | None = None) -> dict:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment.update(
        PYTHONPATH=os.pathsep.join([*([str(ROOT)] if with_package else []), child_path(with_package)]),
        HF_ENDPOINT=hub.url,
        HF_HOME=str(home),
        HF_HUB_DISABLE_XET="1",  # the protocol of the real Hub's own storage, which no loopback server speaks
        NO_PROXY="127.0.0.1",
    )
    if what == "open_remote":
        environment["HF_TOKEN"] = "hf_reader"
    if python:
        del environment["PYTHONPATH"]
    command = [python or sys.executable, str(HERE / "hub_session.py"), what, str(argument)]
    done = subprocess.run(command, env=environment, cwd=home.parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def pushes(tmp_path_factory):
    """A session that pushes two folders, the second time over a connection that breaks: the hub, what each push was
    told, and the folders and what was in them before."""
    base = tmp_path_factory.mktemp("pushes")
    folders = {name: write_run(base / name, seed) for seed, name in enumerate(("push", "push_twice"))}
    before = {name: content(folder) for name, folder in folders.items()}
    with LoopbackHub() as hub:
        hub.add("me/public", {})
        hub.fail = r"/me/flaky/commit/"
        yield hub, session(hub, "push_all", base, base / "home"), folders, before


def test_push_and_download(pushes):
    hub, told, folders, _ = pushes
    answers, folder = told["push"], folders["push"]
    assert answers["pushed"] == f"{hub.url}/me/x"
    pushed = hub.repos["me/x"]
    assert pushed["private"] and set(pushed["branches"]) == {"main", "v1"}
    expected = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
        and not {"checkpoints", "report"} & {*path.parts}
        and path.name not in (".hidden", "first_batch.png")
    }
    assert pushed["branches"]["main"] == pushed["branches"]["v1"] == expected
    assert "configuration.py" in expected and "plots/curves.png" in expected
    assert answers["branch"] == answers["pushed"] and answers["short name"] == f"{hub.url}/me/y"
    assert answers["fetched"] == ["config.json", "model.safetensors", "preprocessor_config.json"]

    for key, words in {
        "no token": "Upload to me/z failed: it does not exist, or is private, or the token is not valid; `hf auth",
        "reader": "Upload to me/z failed: the token does not allow it",
        "bad name": "Upload to me/a/b failed: Repo id must be",
        "public": "Upload to me/public failed: it exists and is public",
        "no card": "Upload to me/bad-card failed: Invalid metadata in README.md",
        "missing": "Cannot fetch me/none from the Hub: it does not exist, or is private",
        "private": "Cannot fetch me/x from the Hub: it does not exist, or is private",
        "no revision": "Cannot fetch me/x from the Hub: it has no revision 'v9'",
    }.items():
        assert answers[key].startswith(f"UserError: {words}"), answers[key]
        assert "\n" not in answers[key] and "Traceback" not in answers[key]
    again = f"to upload it again: hf upload me/z {folder} . {shlex.join(_each('--exclude', _OF_A_RUN))}"
    assert answers["no token"].endswith(f"The result is safe in {folder}; {again} --private")
    assert answers["reader"].endswith(f"{again} --revision v1")
    assert hub.repos["me/public"]["branches"]["main"] == {}


def test_interrupted_upload_is_continued_and_loses_nothing(pushes):
    hub, told, folders, contents = pushes
    answers, folder, before = told["push_twice"], folders["push_twice"], contents["push_twice"]
    assert answers["first"].startswith("UserError: Upload to me/flaky failed: ") and "\n" not in answers["first"]
    assert answers["first"].endswith("--revision v1 --private")
    assert answers["second"] == f"{hub.url}/me/flaky"
    large = {hashlib.sha256(before[folder / name]).hexdigest() for name in ("model.safetensors", "model.onnx")}
    sent = [path.split("/")[-1] for method, path in hub.requests if method == "PUT"]
    assert sorted(sent) == sorted(hub.objects) and large < set(sent)  # the second time the weights were there already
    branches = hub.repos["me/flaky"]["branches"]
    assert branches["v1"]["model.safetensors"] == before[folder / "model.safetensors"] and branches["main"] == {}
    assert content(folder) == before


def open_by_name(hub, folder, tmp_path, **options) -> None:
    """The pushed folder gives a process without our package what it gives us."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    hub.add("me/x", files, private=True)
    noise = np.random.default_rng(0).integers(0, 255, (50, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "picture.png")
    answers = session(hub, "open_remote", tmp_path, tmp_path / "home", with_package=False, **options)

    model = EfficientNetNVForImageClassification.from_pretrained(folder).eval()
    pixels = EfficientNetNVImageProcessor.from_pretrained(folder)(Image.fromarray(noise), return_tensors="pt")
    logits = model(**pixels).logits[0]
    assert answers["logits"] == pytest.approx(logits.tolist(), abs=1e-6)
    assert answers["pooled"] == [1, 64] and answers["maps"] == [[1, 16, 16, 16], [1, 40, 4, 4]]
    scores = {row["label"]: row["score"] for row in answers["pipeline"]}
    expected = {f"class {i}": value for i, value in enumerate(logits.softmax(0).tolist())}
    assert scores == pytest.approx(expected, abs=1e-6)


def test_pushed_folder_opens_by_its_name_without_our_package(hub, folder, tmp_path):
    open_by_name(hub, folder, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("transformers", ["transformers==4.57.6", "transformers>=5,<6"])
def test_pushed_folder_opens_in_a_fresh_environment(hub, folder, tmp_path, transformers):
    """A virtual environment with torch, torchvision, transformers and pillow, made here: minutes, and 6 GB of disk.

    EFFNET_HF_CLEAN_VENV names a folder to make it in and to find it in again.
    """
    environment = Path(os.environ.get("EFFNET_HF_CLEAN_VENV") or tmp_path / "venv")
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    # -I: an inherited PYTHONPATH must not count as installed
    install = [str(python), "-I", "-m", "pip", "install", "-q", "torch", "torchvision", "pillow", transformers]
    subprocess.run(install, check=True, cwd=tmp_path)
    listed = subprocess.run([str(python), "-I", "-m", "pip", "list"], check=True, capture_output=True, text=True).stdout
    assert "transformers" in listed and not {"timm", "accelerate", "datasets", "effnet-hf"} & set(listed.split())
    open_by_name(hub, folder, tmp_path, python=str(python))
