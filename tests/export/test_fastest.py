"""`load_for_inference`: the fastest runtime is chosen, proved, remembered, and answers as the checkpoint does."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from effnet_hf import EfficientNetNVForImageClassification, UserError, load_for_inference
from effnet_hf.commands import runtime as flag
from effnet_hf.export import engines, fastest
from effnet_hf.flips import use_test_time_flip

from .test_int8 import make_quantized


pytest.importorskip("modelopt", reason="needs the quant extra")
PIXELS = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
ON_A_CPU = ("torch", "folded", "onnxruntime", "openvino")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    file = tmp_path / "home" / "runtimes.json"
    monkeypatch.setattr(fastest, "_cache_file", lambda: file)
    return file


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, photos):
    return make_quantized(tmp_path_factory, photos, "nvidia")


@pytest.fixture
def plain(checkpoint):
    return EfficientNetNVForImageClassification.from_pretrained(checkpoint).eval()


def of_the_same_values(found, expected):
    np.testing.assert_allclose(found.detach().numpy(), expected.detach().numpy(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("runtime", ON_A_CPU)
def test_every_runtime_gives_the_logits_of_the_checkpoint(runtime, checkpoint, plain):
    if runtime == "openvino":
        pytest.importorskip("openvino")
    model = load_for_inference(checkpoint, runtime, batch_size=2)
    with torch.no_grad():
        for batch in (PIXELS, PIXELS[:2], PIXELS[:1], torch.cat([PIXELS] * 4)):
            of_the_same_values(model(batch).logits, plain(batch).logits)
    assert model.choice.runtime == runtime and model.choice.comparison.difference < 1e-4
    assert isinstance(model, EfficientNetNVForImageClassification)


def test_the_fastest_is_chosen_and_remembered(checkpoint, cache, monkeypatch):
    times = {"torch": 9.0, "folded": 5.0, "onnxruntime": 2.0, "openvino": 3.0}
    measured = []

    def measure(candidates, batch):
        measured.append((set(candidates), tuple(batch.shape)))
        return {name: times[name] for name in candidates}

    monkeypatch.setattr(fastest, "measure", measure)
    first = load_for_inference(checkpoint, batch_size=2)
    again = load_for_inference(checkpoint, batch_size=2)
    assert first.choice.runtime == again.choice.runtime == "onnxruntime"
    assert not first.choice.remembered and again.choice.remembered and "measured earlier" in str(again.choice)
    assert len(measured) == 1 and measured[0][0] <= set(ON_A_CPU) and measured[0][1] == (2, 3, 64, 64)
    load_for_inference(checkpoint, batch_size=3)  # another shape
    load_for_inference(checkpoint, batch_size=2, remember=False)
    assert [shape[0] for _, shape in measured] == [2, 3, 2]
    assert "ONNX Runtime" in str(first.choice) and "2.0 ms for 2 images of 64 x 64 pixels" in str(first.choice)
    assert first.choice.left_out == {"compile": "takes minutes to start", "graphs": "needs a CUDA device"}


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", '{"KEY": 1}', '{"KEY": {"runtime": "evil", "milliseconds": {"evil": 1}}}', b"\xff\xfe",
        "[" * 100_000,
        '{"KEY": {"runtime": ["torch"], "milliseconds": {"torch": 1.0}}}',
        *(f'{{"KEY": {{"runtime": "torch", "milliseconds": {{"torch": {ms}}}}}}}' for ms in ("NaN", "-1.0", "1" * 400)),
    ],
)  # fmt: skip
def test_a_damaged_memory_is_no_memory(text, checkpoint, cache, monkeypatch):
    monkeypatch.setattr(fastest, "measure", lambda candidates, batch: dict.fromkeys(candidates, 1.0))
    load_for_inference(checkpoint)
    key = next(iter(json.loads(cache.read_text())))
    cache.write_bytes(text if isinstance(text, bytes) else text.replace("KEY", key).encode())
    found = load_for_inference(checkpoint).choice
    assert not found.remembered and load_for_inference(checkpoint).choice.remembered


def test_a_remembered_runtime_that_is_wrong_for_these_weights_is_left_out(checkpoint, monkeypatch):
    monkeypatch.setattr(fastest, "measure", lambda candidates, batch: {name: float(len(name)) for name in candidates})
    assert load_for_inference(checkpoint).choice.runtime == "torch"
    monkeypatch.setitem(engines._MAKERS, "torch", lambda network, place: lambda pixels: torch.zeros(len(pixels), 3))
    found = load_for_inference(checkpoint).choice
    assert found.runtime == "folded" and not found.remembered and "does not compute" in found.left_out["torch"]


def test_the_program_of_a_large_usual_batch_is_proved(checkpoint, monkeypatch):
    make, sizes = engines._MAKERS["folded"], []

    def watched(network, place):
        engine = make(network, place)
        return lambda pixels: sizes.append(len(pixels)) or engine(pixels)

    monkeypatch.setitem(engines._MAKERS, "folded", watched)
    load_for_inference(checkpoint, "folded", batch_size=20)
    assert sizes == [20]


@pytest.mark.parametrize("runtime", ON_A_CPU)
def test_threads_get_their_own_answers(runtime, checkpoint):
    if runtime == "openvino":
        pytest.importorskip("openvino")
    model = load_for_inference(checkpoint, runtime)
    images = PIXELS.split(1)
    expected = [model(image).logits for image in images]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda index: model(images[index % 3]).logits, range(120)))
    for index, logits in enumerate(found):
        of_the_same_values(logits, expected[index % 3])


def test_a_home_that_cannot_be_written_to_is_no_error(checkpoint, cache, monkeypatch):
    monkeypatch.setattr(fastest, "measure", lambda candidates, batch: dict.fromkeys(candidates, 1.0))
    cache.parent.write_text("a file where the folder should be")
    assert not load_for_inference(checkpoint).choice.remembered


def test_measuring_takes_turns_and_gives_milliseconds():
    calls = []

    def engine(name):
        return lambda batch: calls.append(name)

    found = fastest.measure({"one": engine("one"), "other": engine("other")}, torch.zeros(1))
    assert found.keys() == {"one", "other"} and all(0 <= ms < 1000 for ms in found.values())
    assert calls == (["one"] * 6 + ["other"] * 6) * 3


def test_measuring_slow_engines_ends_after_one_call_of_each_that_counts(monkeypatch):
    monkeypatch.setattr(fastest, "SECONDS", 0.0)
    calls = []
    found = fastest.measure({name: lambda batch, name=name: calls.append(name) for name in "ab"}, torch.zeros(1))
    assert calls == ["a", "a", "b", "b"] and found.keys() == {"a", "b"}


def test_a_runtime_that_computes_something_else_is_refused(checkpoint, monkeypatch):
    monkeypatch.setitem(engines._MAKERS, "folded", lambda network, place: lambda pixels: torch.zeros(len(pixels), 3))
    with pytest.raises(UserError, match="--runtime folded does not compute what the checkpoint does: it differs by"):
        load_for_inference(checkpoint, "folded")
    monkeypatch.setattr(fastest, "measure", lambda candidates, batch: {name: -len(name) for name in candidates})
    found = load_for_inference(checkpoint, remember=False).choice  # and "auto" goes on without it
    assert found.runtime != "folded" and "does not compute" in found.left_out["folded"]


def test_a_runtime_that_fails_is_named(checkpoint, monkeypatch):
    def broken(network, place):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setitem(engines._MAKERS, "onnxruntime", broken)
    with pytest.raises(UserError, match="--runtime onnxruntime does not run this network: no kernel"):
        load_for_inference(checkpoint, "onnxruntime")


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"runtime": "tensorrt"}, "--runtime tensorrt: there are auto, torch"),
        ({"runtime": "graphs"}, "--runtime graphs needs a CUDA device"),
        ({"runtime": "folded", "precision": "fp16"}, "has no fp16 on a CPU"),
        ({"runtime": "onnxruntime", "precision": "bf16"}, "has no bfloat16 convolution on a CPU"),
        ({"precision": "int8"}, "is a float checkpoint; quantize it"),
        ({"precision": "int4"}, "there are fp32, fp16, bf16, int8"),
        ({"device": "gpu"}, "--device gpu is no device"),
        ({"device": "xla"}, "this machine has no XLA device"),
        ({"batch_size": 0}, "at least one image"),
        ({"precision": "fp16"}, "no runtime has it on cpu"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(settings, reason, checkpoint):
    with pytest.raises(UserError, match=reason) as caught:
        load_for_inference(checkpoint, **settings)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(checkpoint, monkeypatch):
    monkeypatch.setattr(engines, "installed", lambda package: package != "openvino")
    with pytest.raises(UserError, match="--runtime openvino needs openvino: pip install openvino"):
        load_for_inference(checkpoint, "openvino")


def test_compile_is_measured_where_no_file_runtime_is_installed(checkpoint, monkeypatch):
    monkeypatch.setattr(engines, "installed", lambda package: False)
    asked = []
    monkeypatch.setitem(engines._MAKERS, "compile", lambda network, place: asked.append(1) or (lambda x: x))
    choice = load_for_inference(checkpoint, remember=False).choice
    assert (
        asked and set(choice.milliseconds) == {"torch", "folded"} and "compile" in choice.left_out
    )  # a wrong one here


def test_bf16_is_as_exact_as_its_digits(checkpoint, plain):
    model = load_for_inference(checkpoint, "folded", precision="bf16")
    with torch.no_grad():
        found, expected = model(PIXELS).logits, plain(PIXELS).logits
    assert found.dtype == torch.float32 and 0 < (found - expected).abs().max() < 0.01 * expected.abs().max()


def test_pipeline_loss_and_tuples(checkpoint, plain, tmp_path):
    model = load_for_inference(checkpoint, "onnxruntime")
    image = Image.effect_noise((90, 80), 64).convert("RGB")
    answers = [
        pipeline("image-classification", model=each, image_processor=model.processor, device="cpu")(image)
        for each in (model, plain)
    ]
    assert [each["label"] for each in answers[0]] == [each["label"] for each in answers[1]]
    np.testing.assert_allclose(*([each["score"] for each in one] for one in answers), atol=1e-5)
    labels = torch.tensor([0, 1, 2])
    of_the_same_values(model(PIXELS, labels=labels).loss, plain(PIXELS, labels=labels).loss)
    of_the_same_values(model(PIXELS, return_dict=False)[0], plain(PIXELS).logits)


def test_what_an_engine_does_not_compute_pytorch_does(checkpoint, plain):
    model = load_for_inference(checkpoint, "onnxruntime")
    model.engine = None  # it is not asked
    larger = torch.randn(1, 3, 96, 80)
    with torch.no_grad():
        of_the_same_values(model(larger).logits, plain(larger).logits)
        maps, expected = (each(PIXELS, output_hidden_states=True).hidden_states for each in (model, plain))
        assert len(maps) == len(expected) > 3 and all(a.shape == b.shape for a, b in zip(maps, expected))
    program = torch.export.export(model, (PIXELS,)).module()
    of_the_same_values(program(PIXELS).logits, plain(PIXELS).logits)
    with pytest.raises(ValueError, match=r"must have shape \(N, 3, height, width\)"):
        model(torch.zeros(1, 4, 64, 64))


def test_it_is_neither_trained_nor_saved(checkpoint, tmp_path):
    model = load_for_inference(checkpoint, "folded")
    with pytest.raises(ValueError, match="to train it, load it by from_pretrained"):
        model.train()
    with pytest.raises(ValueError, match="to save it, load it by from_pretrained"):
        model.save_pretrained(tmp_path / "copy")
    assert not model.eval().training and not (tmp_path / "copy").exists()


def test_copies_and_flips_go_through_the_engine(checkpoint, plain):
    model, asked = load_for_inference(checkpoint, "onnxruntime"), []
    engine = model.engine
    model.engine = lambda pixels: asked.append(len(pixels)) or engine(pixels)
    flipped, expected = use_test_time_flip(copy.deepcopy(model)), use_test_time_flip(copy.deepcopy(plain))
    with torch.no_grad():
        of_the_same_values(flipped(PIXELS).logits, expected(PIXELS).logits)
    assert asked == [3, 3]


def test_temperature_and_several_labels(plain, tmp_path):
    for name, fields in {"warm": {"softmax_temperature": 2.5}, "several": {"problem_type": SEVERAL}}.items():
        model = copy.deepcopy(plain)
        for field, value in fields.items():
            setattr(model.config, field, value)
        model.save_pretrained(tmp_path / name)
        fastest.EfficientNetNVImageProcessor.for_image_size(64).save_pretrained(tmp_path / name)
        found = load_for_inference(tmp_path / name, "onnxruntime")
        with torch.no_grad():
            of_the_same_values(found(PIXELS).logits, model(PIXELS).logits)


SEVERAL = "multi_label_classification"


def test_quantized_checkpoints_run_in_int8(quantized, monkeypatch):
    pytest.importorskip("openvino")
    own = EfficientNetNVForImageClassification.from_pretrained(quantized).eval()
    for runtime in ("onnxruntime", "openvino", "torch"):
        model = load_for_inference(quantized, runtime)
        assert model.choice.place.precision == "int8" and "signal to noise" in str(model.choice)
        with torch.no_grad():
            found, expected = model(PIXELS).logits, own(PIXELS).logits
        assert (found - expected).abs().max() < 0.5 * expected.abs().max()
    with monkeypatch.context() as patched, pytest.raises(UserError, match="signal to noise ratio of .* dB; 7 wanted"):
        patched.setitem(engines._MAKERS, "openvino", lambda network, place: lambda pixels: 0.6 * own(pixels).logits)
        load_for_inference(quantized, "openvino")
    with pytest.raises(UserError, match="--runtime folded runs no quantized network"):
        load_for_inference(quantized, "folded")
    with pytest.raises(UserError, match="is quantized, and computes in int8"):
        load_for_inference(quantized, precision="bf16")


def test_classify_and_validate(checkpoint, photos, command):
    image, found = next((photos / "val").rglob("*.png")), {}
    for runtime in ("torch", "onnxruntime"):
        code, out, err = command("classify", "--model", checkpoint, "--runtime", runtime, "--json", image)
        assert code == 0 and ("runtime: ONNX Runtime" in err) == (runtime == "onnxruntime")
        flags = ("--model", checkpoint, "--data_dir", photos, "--num_workers", 0, "--runtime", runtime, "--json")
        answers = [each["label"] for each in json.loads(out)["predictions"]]
        code, out, err = command("validate", *flags)
        assert code == 0, err
        found[runtime] = answers, json.loads(out)["top1"]
    assert found["torch"] == found["onnxruntime"]
    flags = ("--model", checkpoint, "--data_dir", photos, "--runtime", "auto", "--calibrate")
    code, _, err = command("validate", *flags)
    assert code == 2 and "leave it out with --report, --calibrate and --restrict_classes" in err


def test_a_file_of_predictions_is_the_same(checkpoint, photos, tmp_path, command):
    images, found = sorted((photos / "val").rglob("*.png")), {}
    for runtime in ("torch", "onnxruntime"):
        file = tmp_path / f"{runtime}.jsonl"
        flags = ("--model", checkpoint, "--output", file, "--num_workers", 0, "--runtime", runtime)
        assert command("classify", *flags, *images)[0] == 0
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        found[runtime] = [(row["path"], row["label"], round(row["score"], 4)) for row in rows]
    assert found["torch"] == found["onnxruntime"] and len(found["torch"]) == len(images)


def test_the_flag_offers_what_there_is():
    assert set(flag.RUNTIMES) == {"auto", *engines.RUNTIMES}
    assert Path(flag.__file__).read_text().count("import torch") == 0
