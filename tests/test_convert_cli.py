"""convert.py as it is typed: what it writes, prints and refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from effnet_hf import EfficientNetNVConfig, EfficientNetNVForImageClassification, EfficientNetNVImageProcessor
from effnet_hf.cli import run
from effnet_hf.commands.convert import main
from effnet_hf.conversion import read_trainer_state
from effnet_hf.conversion.dialect import expected_shapes
from effnet_hf.conversion.nvidia import NVIDIA


ROOT = Path(__file__).parents[1]


@pytest.fixture
def convert(capsys, monkeypatch, tmp_path):
    """Runs the script with a command line; returns exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def call(line: str):
        monkeypatch.setattr(sys, "argv", [str(ROOT / "convert.py"), *line.split()])
        with pytest.raises(SystemExit) as stop:
            run(main)
        return (stop.value.code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def ours():
    config = EfficientNetNVConfig.from_variant("b0")
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.tensor(3) if key.endswith("tracked") else torch.rand(shape, generator=generator) * 0.1 + 0.01
        for key, shape in expected_shapes(config).items()
    }


@pytest.fixture
def checkpoint(ours, tmp_path):
    """`checkpoint.pth.tar` of the original's training, in the working folder."""
    state = NVIDIA.write(ours, EfficientNetNVConfig.from_variant("b0"))
    content = {"epoch": 4, "best_prec1": 70.5, "state_dict": {f"module.{k}": v for k, v in state.items()}}
    torch.save(content, tmp_path / "checkpoint.pth.tar")


def test_from_auto_to_folder(convert, checkpoint, ours, tmp_path):
    code, out, error = convert("--from auto checkpoint.pth.tar --output_dir made/folder --hub_token hf_secret")
    assert (code, error) == (0, "")
    assert out.splitlines()[0] == (
        "checkpoint.pth.tar: nvidia names, b0, 1000 classes, 224 x 224 px, the same function"
    )
    assert out.endswith(
        "open   import effnet_hf, transformers; transformers.AutoModelForImageClassification"
        '.from_pretrained("made/folder")\n'
        "resume python train.py --config b0 --data_dir DIR --resume made/folder\n"
    )
    exec(out.split("open   ")[1].splitlines()[0], {})  # as it would be pasted
    folder = tmp_path / "made" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "configuration.py",
        "eager_efficientnet_nv.py",
        "image_processing_efficientnet_nv.py",
        "manifest.json",
        "model.safetensors",
        "modeling_efficientnet_nv.py",
        "preprocessor_config.json",
        "quantization_efficientnet_nv.py",
        "trainer_state.safetensors",
    ]
    model, info = EfficientNetNVForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(tensor, ours[key]) for key, tensor in model.state_dict().items())
    assert model.config.id2label[0] == "tench, Tinca tinca" and model.config.architectures == [type(model).__name__]
    assert EfficientNetNVImageProcessor.from_pretrained(folder).size == {"shortest_edge": 256}
    trainer = read_trainer_state(folder)
    assert (trainer.epoch, trainer.best_top1, trainer.optimizer_state) == (4, 70.5, {})

    card = (folder / "README.md").read_text()
    for words in (
        "Converted from NVIDIA's names; the same function as the original.",
        "weights from checkpoint.pth.tar (sha256 ",
        "python convert.py --from auto checkpoint.pth.tar --output_dir made/folder\n",
        "No accuracy was measured on these weights",
    ):
        assert words in card, words
    assert "hf_secret" not in card
    assert ModelCard(card).data.license is None and "converted" in ModelCard(card).data.tags


def test_there_and_back(convert, checkpoint, ours, tmp_path):
    assert convert("checkpoint.pth.tar --output_dir ours")[0] == 0
    code, out, _ = convert("ours --to nvidia --output_dir back.pth")
    assert code == 0 and "open   python main.py --arch efficientnet-b0 --pretrained-from-file back.pth\n" in out
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    there = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)["state_dict"]
    assert {f"module.{key}" for key in back} == set(there)
    assert all(torch.equal(tensor, there[f"module.{key}"]) for key, tensor in back.items())
    code, out, _ = convert("ours --to timm --output_dir timm_folder")
    assert code == 0 and 'timm.create_model("local-dir:timm_folder", pretrained=True)' in out
    assert json.loads((tmp_path / "timm_folder" / "config.json").read_text())["model_args"] == {"bn_eps": 0.001}


def test_what_is_another_function_is_refused_and_forced(convert, checkpoint, tmp_path):
    convert("checkpoint.pth.tar --output_dir ours")
    code, _, error = convert("ours --to transformers --output_dir stock")
    assert code == 2 and error == (
        "convert.py: error: ours refused: differs by padding (symmetric here, TensorFlow's SAME there). --force writes "
        "it all the same.\n"
    )
    assert not (tmp_path / "stock").exists()
    code, out, _ = convert("ours --to transformers --output_dir stock --force")
    assert (
        code == 0 and "no transformers model is this function" in out and (tmp_path / "stock" / "config.json").exists()
    )
    assert "depthwise_padding" in (tmp_path / "stock" / "config.json").read_text()


def test_stock_model_that_pads_otherwise_is_refused_and_its_card_says_so(convert, tmp_path):
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    config = EfficientNetConfig(
        width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280, image_size=224, depthwise_padding=[1, 3, 5, 11]
    )
    EfficientNetForImageClassification(config).save_pretrained(tmp_path / "stock")
    code, _, error = convert("stock --output_dir ours")
    words = "differs by padding of blocks 1, 3, 5, 11 at 224 pixels"
    assert code == 2 and f"stock refused: {words}. --force" in error and not (tmp_path / "ours").exists()
    code, out, _ = convert("stock --output_dir ours --force")
    assert code == 0 and f"NOT the same function: {words}" in out
    assert f"NOT the same function: {words}." in (tmp_path / "ours" / "README.md").read_text()


def test_nothing_is_overwritten_unasked(convert, checkpoint, tmp_path):
    convert("checkpoint.pth.tar --output_dir ours")
    for line, written in (
        ("checkpoint.pth.tar --output_dir ours", "ours"),
        ("ours --to timm --output_dir x.pth", "x.pth"),
    ):
        convert(f"{line} --overwrite")
        code, _, error = convert(line)
        assert code == 2 and f"{written} already exists" in error
        assert convert(f"{line} --overwrite")[0] == 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "line, words",
    [
        ("x.pth", "--output_dir PATH says where to write"),
        ("--output_dir y", "the following arguments are required: SRC"),
        ("x.pth --to timm", "--output_dir PATH says where to write"),
        ("x.pth --to tim --output_dir z", "Did you mean 'timm'?"),
        ("x.pth --too y", "did you mean --to?"),
        ("x.pth --output_dir y --batch_norm_epsilon 1", "did you mean --batch_norm_eps?"),
        ("x.pth --output_dir y --from keras", "invalid choice: 'keras'"),
        ("x.pth --output_dir y --push_to_hub", "--push_to_hub needs --hub_model_id ME/X"),
        ("x.pth --to timm --output_dir z --push_to_hub --hub_model_id a/b", "--push_to_hub needs a folder of ours"),
        ("x.pth --output_dir y --hub_model_id a/b", "does nothing without --push_to_hub"),
        ("x.pth --output_dir y --hub_private", "--hub_private does nothing without --push_to_hub"),
        ("x.pth --output_dir y --hub_revision v1", "--hub_revision does nothing without --push_to_hub"),
        ("x.pth --output_dir y --warm_start b0", "--warm_start needs --images DIR"),
        ("x.pth --output_dir y --images .", "--images does nothing without --warm_start"),
        ("checkpoint.pth.tar --to nvidia --output_dir z", "end its name in .pth or .safetensors"),
        # what is wrong with the place is said before the source is opened
        ("no.pth --output_dir .", "is not empty; name another folder, or add --overwrite (in Python overwrite=True)."),
        ("no.pth --to timm --output_dir .", "is not empty; name another folder"),
        ("no.pth --output_dir checkpoint.pth.tar", "checkpoint.pth.tar is a file; name a folder to write to."),
        ("no.pth --to timm --output_dir checkpoint.pth.tar", "exists; name another file, or add --overwrite (in"),
        ("no.pth --to nvidia --output_dir z", "end its name in .pth or .safetensors"),
        ("lite --output_dir y", "an NGC path nvidia/model:version. Did you mean 'lite0'?"),
        ("Lite-0 --output_dir y", "Did you mean 'lite0'?"),
        ("some/where --output_dir y", "There is no local some/where. Cannot fetch some/where from the Hub: "),
    ],
)
def test_one_line_for_what_was_mistyped(convert, checkpoint, tmp_path, line, words):
    before = sorted(tmp_path.rglob("*"))
    code, out, error = convert(line)
    assert code == 2 and words in error and error.count("\n") == 1, error
    assert sorted(tmp_path.rglob("*")) == before


def test_flags_as_they_were_once_called_still_work_with_a_line(convert, checkpoint):
    code, out, error = convert("checkpoint.pth.tar --to ours")
    assert code == 0 and "wrote  ours" in out and error == "convert.py: --to DIR is now called --output_dir DIR\n"
    code, out, error = convert("ours --to timm --output x.pth")
    assert code == 0 and "wrote  x.pth" in out and error == "convert.py: --output is now called --output_dir\n"


def test_failed_upload_keeps_the_folder(convert, checkpoint, tmp_path):
    code, out, error = convert("checkpoint.pth.tar --output_dir ours --push_to_hub --hub_model_id me/x --hub_private")
    assert code == 2 and "wrote  ours" in out
    assert error.startswith(
        "convert.py: error: Upload to me/x failed: HF_HUB_OFFLINE is set. The result is safe in ours;"
    )
    assert error.count("\n") == 1 and (tmp_path / "ours" / "model.safetensors").is_file()


def test_as_a_process(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    done = subprocess.run(
        [sys.executable, str(ROOT / "convert.py"), "x.pth", "--output_dir", "y"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "convert.py: error: x.pth is empty (0 bytes), not a file of weights.\n"


@pytest.mark.parametrize("target", ["made", "link", "."])
def test_overwriting_never_removes_what_is_read(convert, checkpoint, tmp_path, target):
    EfficientNetNVForImageClassification(EfficientNetNVConfig.from_variant("b0")).save_pretrained(tmp_path / "made")
    (tmp_path / "link").symlink_to("made")
    before = (tmp_path / "made/model.safetensors").read_bytes()
    own_file = "made/model.safetensors" if target == "." else f"{target}/model.safetensors"
    for words in (target, f"{target} --to timm --force", f"{own_file} --to nvidia --force"):
        code, _, error = convert(f"made --overwrite --output_dir {words}")
        assert code == 2 and "holds the source" in error and "which overwriting would remove" in error, error
    code, _, error = convert(f"lite0 --warm_start b0 --images made --output_dir {target} --overwrite")
    assert code == 2 and "holds --images made, which overwriting would remove" in error
    assert (tmp_path / "made/model.safetensors").read_bytes() == before
