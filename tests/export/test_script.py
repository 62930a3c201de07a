"""`export.py` as a user types it: what it prints, what it uploads, and how it refuses."""

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from transformers import ResNetConfig

from effnet_hf.export import options as export_options


def test_command_prints_what_it_proved(command, checkpoint, photos, tmp_path):
    flags = ["--data_dir", photos, "--num_images", "6", "--opset", "17"]
    code, out, err = command("export", "--model", checkpoint, "--output_dir", tmp_path / "out", *flags)
    assert code == 0 and err == ""
    assert "opset 17, fp32" in out and "6 images" in out and "top-1 agreement 100.00 %" in out
    assert f"wrote    {tmp_path}/out/model.onnx" in out and "top1     " in out and "temperature" not in out
    card = (tmp_path / "out/README.md").read_text()
    assert "--opset 17" in card and "library_name: onnx" in card and "InferenceSession" in card


def test_command_and_card_say_which_temperature_the_file_has(command, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((checkpoint / "config.json").read_text()) | {"softmax_temperature": 2.5}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    flags = ["--output_dir", tmp_path / "out", "--opset", "17", "--num_images", "2"]
    code, out, _ = command("export", "--model", tmp_path / "model", *flags)
    said = "logits are divided by the checkpoint's temperature, 2.5"
    assert code == 0 and f"\n         its {said}\n" in out
    assert f"In the graph {said}; do not divide them again." in (tmp_path / "out/README.md").read_text()


def test_upload_goes_through_the_hub_room(command, checkpoint, tmp_path, monkeypatch):
    pushed = []

    def push_folder(folder, repo_id, **settings):
        pushed.append((Path(folder).name, repo_id, settings["token"]))
        return "https://hub/me/x"

    monkeypatch.setattr("effnet_hf.hub.push_folder", push_folder)
    flags = ["--push_to_hub", "--hub_model_id", "me/x", "--hub_token", "hf_secret"]
    code, out, _ = command("export", "--model", checkpoint, "--output_dir", tmp_path / "out", *flags)
    assert code == 0 and pushed == [("out", "me/x", "hf_secret")] and "pushed   https://hub/me/x" in out
    card = (tmp_path / "out/README.md").read_text()
    assert "hf_secret" not in card and '"me/x"' in card


@pytest.fixture
def places(checkpoint, tmp_path):
    ResNetConfig().save_pretrained(tmp_path / "resnet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious.txt").write_text("keep")
    (tmp_path / "file").write_text("")
    (tmp_path / "torn").mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / "torn" / name).write_bytes((checkpoint / name).read_bytes())
    (tmp_path / "torn/model.safetensors").write_bytes(b"torn")
    return {"model": checkpoint, "tmp": tmp_path}


WRONG = [  # (arguments, what the line names)
    ("--model no/such/folder --output_dir {tmp}/out", "no/such/folder"),
    ("--model {tmp}/empty --output_dir {tmp}/out", "no config.json"),
    ("--model {tmp}/file --output_dir {tmp}/out", "is a file"),
    ("--model {tmp}/resnet --output_dir {tmp}/out", "'resnet' model, not one of ours"),
    ("--model {tmp}/torn --output_dir {tmp}/out", "cannot be loaded"),
    ("--model {model} --output_dir {tmp}/full", "not empty"),
    ("--model {model} --output_dir {tmp}/file", "is a file"),
    ("--model {model} --output_dir {tmp}/file/out", "is a file"),
    ("--model {model} --output_dir /proc/none/out", "cannot write /proc/none/out"),
    ("--model {model} --output_dir {tmp}/out --opset 16", "--opset 16"),
    ("--model {model} --output_dir {tmp}/out --opset 17 --exporter dynamo", "18 to 23"),
    ("--model {model} --output_dir {tmp}/out --opset 99", "--opset 99"),
    ("--model {model} --output_dir {tmp}/out --opset 17 --with_preprocessing", "--opset 18"),
    ("--model {model} --output_dir {tmp}/out --dtype bf16 --opset 18", "--opset 22"),
    ("--model {model} --output_dir {tmp}/out --dtype fp8", "fp32, fp16, bf16"),
    ("--model {model} --output_dir {tmp}/out --format tflite", "onnx, openvino, pt2"),
    ("--model {model} --output_dir {tmp}/out --exporter magic", "torchscript, dynamo"),
    ("--model {model} --output_dir {tmp}/out --int8 cuda", "tensorrt, ort-cpu"),
    ("--model {model} --output_dir {tmp}/out --int8 tensorrt", "quantize it first"),
    ("--model {model} --output_dir {tmp}/out --int8 tensorrt --dtype fp16", "--dtype fp32"),
    ("--model {model} --output_dir {tmp}/out --with_preprocessing --dynamic_image_size", "--dynamic_image_size"),
    ("--model {model} --output_dir {tmp}/out --format pt2 --with_preprocessing", "--format onnx"),
    ("--model {model} --output_dir {tmp}/out --data_dir no/images", "no/images"),
    ("--model {model} --output_dir {tmp}/out --num_images 1", "at least two"),
    ("--model {model} --output_dir {tmp}/out --push_to_hub", "--hub_model_id"),
    ("--model {model} --output_dir {tmp}/out --formt onnx", "did you mean --format?"),
    ("--model {model}", "--output_dir"),
]


@pytest.mark.parametrize("line, named", WRONG, ids=[line for line, _ in WRONG])
def test_mistake_is_one_line_exit_code_2_and_leaves_nothing(command, places, line, named):
    before = sorted(places["tmp"].rglob("*"))
    code, out, err = command("export", *line.format(**places).split())
    assert code == 2 and named in err and len(err.splitlines()) == 1 and out == "", err
    assert sorted(places["tmp"].rglob("*")) == before


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "openvino"])
def test_missing_package_is_named(command, checkpoint, tmp_path, monkeypatch, package):
    monkeypatch.setattr(export_options, "installed", lambda name: name != package)
    code, _, err = command("export", "--model", checkpoint, "--output_dir", tmp_path / "out", "--format", "openvino")
    assert code == 2 and f"pip install {package}" in err and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_no_write_permission_is_one_line(command, checkpoint, tmp_path, monkeypatch):
    def refuse(path, *arguments):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr("effnet_hf.files.os.mkdir", refuse)
    code, _, err = command("export", "--model", checkpoint, "--output_dir", tmp_path / "out")
    assert code == 2 and "Permission denied" in err and len(err.splitlines()) == 1


def test_full_disk_is_one_line_and_leaves_nothing(command, checkpoint, tmp_path, monkeypatch):
    """A real file system of 64 kB where root may mount one; else a writer that says what a full disk says."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], stderr=subprocess.DEVNULL
        ).returncode
    )
    try:
        if not mounted:

            def full(path, data):
                raise OSError(errno.ENOSPC, "No space left on device", str(path))

            monkeypatch.setattr(Path, "write_bytes", full)
        code, _, err = command("export", "--model", checkpoint, "--output_dir", disk / "new/out")
        assert code == 2 and "No space left on device" in err and len(err.splitlines()) == 1, err
        assert list(disk.iterdir()) == []
    finally:
        if mounted:
            subprocess.run(["umount", disk], check=True)


def test_images_of_other_classes_are_still_good_for_the_proof(command, checkpoint, photos, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    assert set(config["id2label"].values()) == {"bird", "cat", "dog"}
    for split in ("train", "val"):
        for number, folder in enumerate(sorted((photos / split).iterdir())[:2]):
            target = tmp_path / "other" / split / f"other{number}"
            target.mkdir(parents=True)
            for image in folder.iterdir():
                (target / image.name).write_bytes(image.read_bytes())
    flags = ["--data_dir", tmp_path / "other", "--num_images", "4"]
    code, out, _ = command("export", "--model", checkpoint, "--output_dir", tmp_path / "out", *flags)
    assert code == 0 and "4 images of other" in out and "top1 " not in out


def test_overwriting_never_removes_what_is_read(command, checkpoint, photos, tmp_path):
    model, data = shutil.copytree(checkpoint, tmp_path / "model"), shutil.copytree(photos, tmp_path / "data")
    (tmp_path / "link").symlink_to(model)
    for target, flag in (
        (model, "--model"),
        (tmp_path / "link", "--model"),
        (tmp_path, "--model"),
        (data, "--data_dir"),
    ):
        words = ["--model", model, "--data_dir", data, "--output_dir", target, "--overwrite"]
        code, _, error = command("export", *words)
        assert code == 2 and f"holds {flag} " in error and "which overwriting would remove" in error, error
    assert (model / "model.safetensors").is_file() and any(data.rglob("*.*"))
