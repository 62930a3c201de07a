"""`classify` on whatever a folder may hold: every good image is answered, every other has its line, nothing hangs."""

import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import features
from safetensors.torch import load_file, save_file

from effnet_hf import (
    EfficientNetNVConfig,
    EfficientNetNVForImageClassification,
    EfficientNetNVImageProcessor,
)
from effnet_hf.commands.classify import find_images
from effnet_hf.data.pictures import USUAL
from effnet_hf.errors import UserError
from effnet_hf.inference import classifier
from effnet_hf.run_folder import MARK

from .data.torture import bad_files, encode, photo
from .test_scripts import call


GOOD = encode(photo(1), "JPEG")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = EfficientNetNVConfig(
        image_size=16, kernel_sizes=[3], strides=[2], num_block_repeats=[1], expand_ratios=[2], out_channels=[16],
        stem_channels=16, head_channels=32, id2label={0: "cat", 1: "a\x1b[2Jb\nc"},
    )  # fmt: skip
    EfficientNetNVForImageClassification(config).save_pretrained(folder)
    EfficientNetNVImageProcessor.for_image_size(16, margin=0).save_pretrained(folder)
    return folder


@pytest.fixture
def classify(model, monkeypatch, capsys):
    def run(*words, stdin=""):
        words = ["classify", "--model", model, "--device", "cpu", "--top_k", "1", *words]
        return call(*words, stdin=stdin, monkeypatch=monkeypatch, capsys=capsys)

    return run


def test_bad_images_take_no_good_ones_with_them(classify, tmp_path):
    (tmp_path / "a.jpg").write_bytes(GOOD)
    (tmp_path / "z.jpg").write_bytes(GOOD)
    bad = dict(bad_files())
    if features.check("avif"):
        bad["broken.avif"] = encode(photo(1), "AVIF")[:500]
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    with open(tmp_path / "sparse.jpg", "wb") as file:
        file.truncate(60 << 30)
    code, out, err = classify("--json", tmp_path)
    lines = err.splitlines()
    assert code == 2 and [os.path.basename(json.loads(line)["path"]) for line in out.splitlines()] == ["a.jpg", "z.jpg"]
    assert len(lines) == len(bad) + 1 and all(": error: " in line for line in lines)
    assert any("sparse.jpg is too large for an image" in line for line in lines)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_is_no_file_is_not_waited_for(classify, tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "a.jpg").write_bytes(GOOD)
    names = [tmp_path / "pipe.jpg", "/dev/zero", tmp_path / "a.jpg"]
    code, out, err = classify(*names, "-", stdin=f"{tmp_path}\n{tmp_path}/nothing.jpg\n")
    assert code == 2 and out.count("%") == 1
    assert err.count("is not a file but a pipe, device or folder") == 3 and "nothing.jpg has vanished" in err


def test_patterns_enter_each_folder_once(tmp_path, monkeypatch):
    for name in ("a/1.png", "a/b/2.png", "a/.hidden/3.png", "4.png", "other/5.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("x", "y"):
        (tmp_path / "a" / name).symlink_to(tmp_path)  # two links back: as many ways as there are atoms
    (tmp_path / "z").symlink_to(tmp_path / "other")
    wanted = ["4.png", "a/1.png", "a/b/2.png"]
    assert find_images([f"{tmp_path}/**/*.png"]) == [tmp_path / name for name in wanted]
    monkeypatch.chdir(tmp_path)
    assert find_images(["**/*.png"]) == list(map(Path, wanted))
    assert find_images(["a/**"]) == [Path("a", name) for name in ("1.png", "b/2.png", "x/4.png", "x/other/5.jpg")]
    assert find_images(["**/b/**/*.png", "z*/?.jpg"]) == [Path("a/b/2.png"), Path("z/5.jpg")]
    assert find_images(["**/**/*.png"]) == find_images(["**/*.png"])


def test_patterns_and_folders_pass_over_what_systems_leave_behind(tmp_path, monkeypatch):
    for name in ("1.jpg", "Thumbs.db", "._1.jpg", "desktop.ini", "@eaDir/1.jpg", "a/2.jfif", "a/@eaDir/2.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    wanted = [Path("1.jpg"), Path("a/2.jfif")]
    assert find_images(["*.*"]) == wanted[:1] and find_images(["**/*.j*"]) == wanted and find_images(["**"]) == wanted
    assert find_images([str(tmp_path)]) == [tmp_path / path for path in wanted]
    assert find_images(["Thumbs.db"]) == [Path("Thumbs.db")]  # whoever names it means it


def test_large_images_are_not_held_together(classify, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "PIXELS_AT_ONCE", 15_000)
    for i, side in enumerate((96, 16, 96, 200, 16, 16, 16, 16, 96)):
        (tmp_path / f"{i}.png").write_bytes(encode(photo(1, side, side), "PNG"))
    paths = sorted(tmp_path.iterdir())
    batches = classifier._batches(paths, 4, USUAL)
    sizes = [[len(batch), sum(image.width**2 for _, image, _ in batch)] for batch in batches]
    assert sizes == [[2, 96**2 + 16**2], [1, 96**2], [1, 200**2], [4, 4 * 16**2], [1, 96**2]]
    code, out, _ = classify("--json", tmp_path)
    assert code == 0 and [Path(json.loads(line)["path"]) for line in out.splitlines()] == paths


def test_a_plot_takes_the_place_of_no_image(classify, tmp_path):
    (tmp_path / "cat.png").write_bytes(GOOD)
    (tmp_path / "same.png").symlink_to(tmp_path / "cat.png")
    for plot in ("cat.png", "same.png"):
        code, out, err = classify(tmp_path / "cat.png", "--save_plot", tmp_path / plot)
        assert code == 2 and not out and f"{plot} is one of the images; name another file" in err
    assert (tmp_path / "cat.png").read_bytes() == GOOD


def test_an_eps_called_jpg_starts_no_ghostscript(classify, tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was called"))
    (tmp_path / "a.jpg").write_bytes(bad_files()["postscript.jpg"])
    code, _, err = classify(tmp_path / "a.jpg")
    assert code == 2 and "a.jpg is not an image that is read here" in err


def test_control_characters_reach_no_terminal(classify, tmp_path):
    """Of names and of labels, and names that are not UTF-8 are shown."""
    names = [b"\x1b[31mred\r.jpg", b"line\nbreak.jpg", b"\xff\xfe.jpg"]
    for name in names:
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(GOOD)
    (tmp_path / "bad\x07.jpg").write_bytes(b"")
    code, out, err = classify("--top_k", "2", tmp_path)
    assert code == 2 and out.count("%") == 6 and (out + err).replace("\n", "").isprintable()
    assert r"\x1b[31mred\r.jpg" in out and r"line\nbreak.jpg" in out and r"\udcff\udcfe.jpg" in out
    assert r"a\x1b[2Jb\nc" in out and r"bad\x07.jpg is empty" in err
    code, out, _ = classify("--json", tmp_path)
    found = [json.loads(line) for line in out.splitlines()]
    assert len(found) == 3 and out.replace("\n", "").isprintable()
    assert {os.path.basename(os.fsencode(answer["path"])) for answer in found} == set(names)


def test_a_list_may_hold_any_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    listed = io.TextIOWrapper(io.BytesIO(b"a/ \xff.jpg \r\n\n~/at home.jpg\nx\x0cy.jpg"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", listed)
    names = [os.fsencode(path) for path in find_images(["-"])]
    assert names == [b"a/ \xff.jpg ", os.fsencode(tmp_path) + b"/at home.jpg", b"x\x0cy.jpg"]
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="no image was named"):
        find_images(["-"])


def test_a_folder_is_listed_without_hidden_files_and_runs(classify, tmp_path):
    for name in ("a.jpg", ".hidden.jpg", ".cache/b.jpg", "run/plots/curves.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(GOOD)
    (tmp_path / "run" / MARK).write_text("{}")
    code, out, err = classify(tmp_path)
    assert code == 0 and out.count("%") == 1
    assert err == f"note: passed over, a training run's: {tmp_path}/run.\n"
    code, _, err = classify(tmp_path / ".cache")
    assert code == 0


@pytest.mark.parametrize(
    "word, words",
    [("", "is empty; name a file"), ("x" * 300 + ".jpg", "no such image"), ("~nobody/x.jpg", "no such image")],
)
def test_names_of_nothing_are_one_line(classify, word, words):
    code, _, err = classify(word)
    assert code == 2 and words in err and err.count("\n") == 1


def changed(model, folder, config, weights=lambda tensors: tensors):
    shutil.copytree(model, folder)
    (folder / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **config}))
    save_file(weights(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("words", [[], ["--json"]])
@pytest.mark.parametrize("classes", [1, 2])
def test_an_answer_that_is_no_number_is_refused(classes, words, classify, model, tmp_path):
    def huge(tensors):
        tensors["classifier.weight"][:classes] = 3e38  # infinity for one class would be 100 %, for both NaN
        return tensors

    (tmp_path / "a.jpg").write_bytes(GOOD)
    code, out, err = classify("--model", changed(model, tmp_path / "m", {}, huge), *words, tmp_path / "a.jpg")
    assert (code, out) == (2, "") and "answers with NaN or infinity" in err and err.count("\n") == 1


def test_a_network_without_classes_is_refused(classify, model, tmp_path):
    (tmp_path / "a.jpg").write_bytes(GOOD)
    folder = changed(model, tmp_path / "m", {"id2label": {}, "label2id": {}})
    code, out, err = classify("--model", folder, tmp_path / "a.jpg")
    assert (code, out) == (2, "") and "has no classes" in err and err.count("\n") == 1


def test_a_plot_of_names_that_look_like_formulas(classify, tmp_path):
    for name in ("$x^$.jpg", "\x1b[1m.jpg"):
        (tmp_path / name).write_bytes(GOOD)
    code, _, err = classify("--save_plot", tmp_path / "plot.png", tmp_path)
    assert code == 0 and (tmp_path / "plot.png").stat().st_size > 1000, err


def test_validate_passes_one_bad_image_over_and_has_the_flags_it_names(model, monkeypatch, capsys, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.jpg").write_bytes(GOOD)
    (tmp_path / "cat/1.jpg").write_bytes(b"")

    def validate(*words):
        words = ["validate", "--model", model, "--data_dir", tmp_path, "--num_workers", "0", *words]
        return call(*words, monkeypatch=monkeypatch, capsys=capsys)

    config = json.loads((model / "config.json").read_text())
    config |= {"id2label": {"0": "cat", "1": "dog"}, "label2id": {"cat": 0, "dog": 1}}
    renamed = tmp_path / ".model"
    renamed.mkdir()
    for path in model.iterdir():
        (renamed / path.name).write_bytes(path.read_bytes())
    (renamed / "config.json").write_text(json.dumps(config))
    (renamed / "manifest.json").unlink(missing_ok=True)
    model = renamed
    code, out, _ = validate()
    assert code == 0 and "on 5 images, 1 unreadable left out, " in out
    code, out, _ = validate("--json")
    assert json.loads(out)["bad_files"] == 1
    code, _, err = validate("--strict")
    assert code == 2 and "cat/1.jpg is empty (0 bytes); mend or remove it, or run without --strict." in err
    (tmp_path / "dog/2.jpg").write_bytes(b"")
    code, _, err = validate()
    assert code == 2 and "2 of 6 images are unreadable, more than --max_bad_files 0.01 allows" in err
    code, out, _ = validate("--max_bad_files", "0.5")
    assert code == 0 and "on 4 images, 2 unreadable left out, " in out
    for path in tmp_path.glob("*/?.jpg"):
        path.write_bytes(b"")
    code, _, err = validate("--max_bad_files", "1")
    assert code == 2 and "no validation image can be read; `effnet-hf scan` names what is wrong with them." in err


@pytest.fixture(scope="module")
def tags(tmp_path_factory):
    """A network whose answers do not depend on the image: 0.9, 0.3 and 0.6, at thresholds 0.95, 0.2 and 0.5."""
    folder = tmp_path_factory.mktemp("tags")
    config = EfficientNetNVConfig(
        image_size=16, kernel_sizes=[3], strides=[2], num_block_repeats=[1], expand_ratios=[2], out_channels=[16],
        stem_channels=16, head_channels=32, id2label={0: "cat", 1: "dog", 2: "bird"},
        problem_type="multi_label_classification", thresholds=[0.95, 0.2, 0.5],
    )  # fmt: skip
    network = EfficientNetNVForImageClassification(config)
    network.classifier.weight.data.zero_()
    network.classifier.bias.data = torch.tensor([0.9, 0.3, 0.6]).logit()
    network.save_pretrained(folder)
    EfficientNetNVImageProcessor.for_image_size(16, margin=0).save_pretrained(folder)
    return folder


def test_of_several_labels_those_are_printed_that_pass_their_thresholds(tags, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.jpg").write_bytes(GOOD)

    def classified(*words):
        done = call("classify", "--model", tags, "--device", "cpu", tmp_path / "a.jpg", *words,
                    monkeypatch=monkeypatch, capsys=capsys)  # fmt: skip
        assert done[0] == 0
        return done[1]

    assert classified().splitlines()[1:] == ["   60.0 %  bird (from 50.0 %)", "   30.0 %  dog (from 20.0 %)"]
    assert classified("--top_k", "1").splitlines()[1:] == ["   60.0 %  bird (from 50.0 %)"]
    told = json.loads(classified("--json"))["predictions"]
    assert [(each["label"], round(each["score"], 4), each["passed"]) for each in told] == [
        ("bird", 0.6, True), ("dog", 0.3, True), ("cat", 0.9, False)
    ]  # fmt: skip
    classified("--save_plot", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").is_file()


def test_an_image_without_a_label_is_said_to_have_none(tags, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(tags, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"thresholds": [0.95, 0.95, 0.95]}))
    (tmp_path / "a.jpg").write_bytes(GOOD)
    done = call(
        "classify", "--model", folder, "--device", "cpu", tmp_path / "a.jpg", monkeypatch=monkeypatch, capsys=capsys
    )
    assert done[1].splitlines()[1:] == [
        "  no label: none passes its threshold; the most likely is cat, 90.0 % (from 95.0 %)"
    ]
