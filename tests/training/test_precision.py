"""Which precision a run gets, who decided, and what the console says of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from effnet_hf import EfficientNetNVConfig
from effnet_hf.errors import UserError
from effnet_hf.recipes import Recipe
from effnet_hf.training import launcher, make_accelerator, settle_precision
from effnet_hf.training.precision import fastest_precision, refuse_unwritten_gradients


ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu(monkeypatch):
    """A machine that seems to have GPUs of the given compute capabilities."""

    def pretend(*capabilities):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])

    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    return pretend


@pytest.mark.parametrize(
    "capabilities, expected",
    [
        ([(9, 0)], "bf16"),
        ([(8, 0), (9, 0)], "bf16"),
        ([(8, 6), (7, 5)], "fp16"),  # the oldest decides: all processes must compute alike
        ([(7, 0)], "fp16"),
        ([(6, 1)], "fp32"),
        ([], "fp32"),
    ],
)
def test_the_default_is_the_fastest_that_the_gpus_train_in(capabilities, expected, gpu):
    gpu(*capabilities)
    assert fastest_precision() == expected
    recipe, sentence = settle_precision(Recipe(variant="b0"))
    assert recipe.precision == expected
    assert (f"precision {expected}, the default on this GPU" in sentence) == bool(capabilities)


def test_a_typed_precision_wins_and_nothing_is_said(gpu):
    gpu((9, 0))
    assert settle_precision(Recipe(precision="fp32")) == (Recipe(precision="fp32"), "")


def test_a_recipe_that_contradicts_the_launcher_wins_and_says_so(gpu, monkeypatch):
    """`--hardware a100` means fp16, whatever the configuration file of `accelerate launch` is called."""
    gpu((9, 0))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert settle_precision(Recipe(precision="bf16")) == (Recipe(precision="bf16"), "")
    recipe, sentence = settle_precision(Recipe(precision="fp16"))
    assert recipe.precision == "fp16" and sentence.endswith("not bf16, as `accelerate launch` says")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")  # which a recipe without a precision is refused for
    assert settle_precision(Recipe(precision="fp16")) == (Recipe(precision="fp16"), "")


def test_quantization_aware_training_stays_exact_and_validation_too(gpu):
    gpu((9, 0))
    recipe, sentence = settle_precision(Recipe(placement="nvidia"))
    assert recipe.precision == "fp32" and "default for int8" in sentence
    assert settle_precision(Recipe(), default="fp32") == (Recipe(precision="fp32"), "")


@pytest.mark.parametrize("word, expected", [("bf16", "bf16"), ("fp16", "fp16"), ("no", "fp32")])
def test_what_the_environment_says_wins_over_the_default(word, expected, gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setattr(launcher, "_launcher", lambda: (None, Path()))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", word)
    recipe, sentence = settle_precision(Recipe())
    assert recipe.precision == expected and f"precision {expected}, as " in sentence


def test_fp8_is_refused(gpu, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match="fp8; here there are fp16, bf16 and no"):
        settle_precision(Recipe())


@pytest.mark.parametrize(
    "command, expected",
    [
        (["accelerate", "launch", "--mixed_precision", "no", "train.py"], "fp32"),
        (["python", "/x/bin/accelerate", "launch", "--mixed-precision=no", "train.py"], "fp32"),
        (["python", "-m", "accelerate.commands.launch", "train.py", "--mixed_precision", "no"], None),
        (["python", "-m", "accelerate.commands.accelerate_cli", "launch", "train.py"], None),
        (["accelerate-launch", "--num_processes", "8", "-m", "effnet_hf.train"], None),
        (["accelerate", "launch", "--config_file", "fp32.yaml", "train.py"], "fp32"),
        (["accelerate", "launch", "--config_file=tf32.yaml", "train.py"], "tf32"),
        (["accelerate", "launch", "--config_file", "silent.yaml", "train.py"], None),
    ],
)
def test_no_means_fp32_only_where_somebody_said_it(command, expected, tmp_path, monkeypatch):
    class Parent:
        cmdline, cwd = (lambda self: command), (lambda self: str(tmp_path))

    class Process:
        parents = lambda self: [Parent()]  # noqa: E731

    (tmp_path / "fp32.yaml").write_text("mixed_precision: 'no'\n")
    (tmp_path / "tf32.yaml").write_text("# effnet_hf precision: tf32\nmixed_precision: 'no'\n")
    (tmp_path / "silent.yaml").write_text("num_processes: 1\n")
    monkeypatch.setattr(launcher.psutil, "Process", Process)
    monkeypatch.setattr(launcher, "_default_file", lambda: None)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert launcher.launcher_precision()[0] == expected


# Each is two processes, of which one imports torch; fp32 is what a file without a word for it gives, too.
@pytest.mark.parametrize("name", ["1gpu_tf32", pytest.param("1gpu_fp32", marks=pytest.mark.slow), None])
def test_the_shipped_configurations_give_what_they_are_called_after(name, tmp_path):
    """Through the real launcher; `accelerate launch` without a word leaves the choice to us."""
    script = tmp_path / "say.py"
    script.write_text(  # without what the packages around it import
        "import sys, types\n"
        "for name in ('effnet_hf', 'effnet_hf.training'):\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        f"    sys.modules[name].__path__ = [{str(ROOT)!r} + '/' + name.replace('.', '/')]\n"
        "from effnet_hf.training.launcher import launcher_precision\n"
        "print('said', launcher_precision())\n"
    )
    flags = ["--config_file", f"accelerate_configs/{name}.yaml"] if name else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path)}
    environment.pop("ACCELERATE_MIXED_PRECISION", None)
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, str(script)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    said = next((line for line in result.stdout.splitlines() if line.startswith("said")), result.stderr)
    assert said.startswith(f"said ('{name[5:]}'" if name else "said (None"), said


def test_every_shipped_configuration_says_its_precision():
    """Those of TF32 by a comment, which Accelerate's own keys cannot say."""
    for path in (ROOT / "accelerate_configs").glob("*gpu_*.yaml"):
        marker = launcher.MARKER.search(path.read_text())
        assert (marker is not None) == ("tf32" in path.name), path.name
        if marker:
            assert marker[1] == "tf32"


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"\xef\xbb\xbf# effnet_hf precision: tf32\r\nmixed_precision: 'no'\r\n", "tf32"),  # as some editors save it
        (b"mixed_precision: null\n", None),
        (b"", None),
        (b"- mixed_precision\n", None),
        (b"5", None),
        (b"\xff\xfe\x00", "is no configuration file of Accelerate"),
        (b"a: [", "is no configuration file of Accelerate"),
    ],
)
def test_a_configuration_file_is_read_with_care(content, expected, tmp_path, monkeypatch):
    file = tmp_path / "default_config.yaml"
    file.write_bytes(content)
    monkeypatch.setattr(launcher, "_launcher", lambda: ([], tmp_path))
    monkeypatch.setattr(launcher, "_default_file", lambda: file)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    if expected is not None and "file" in expected:
        with pytest.raises(UserError, match=expected):
            launcher.launcher_precision()
    else:
        assert launcher.launcher_precision()[0] == expected


def test_accelerates_own_compilation_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(UserError, match="give --compile full, blocks or graphs instead"):
        make_accelerator(Recipe())


def test_deterministic_asks_torch_for_it_and_the_next_run_takes_it_back():
    try:
        make_accelerator(Recipe(deterministic=True))
        assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.benchmark and os.environ["CUBLAS_WORKSPACE_CONFIG"]
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        make_accelerator(Recipe())
    assert torch.backends.cudnn.benchmark and not torch.are_deterministic_algorithms_enabled()


def test_ddp_leaves_buffers_alone_without_a_warning_of_its_own():
    from effnet_hf.training.precision import _ddp_settings

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        network = torch.nn.parallel.DistributedDataParallel(torch.nn.BatchNorm2d(3), **_ddp_settings().to_kwargs())
        assert not network.will_sync_module_buffers() and network.gradient_as_bucket_view
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("variant, smallest", [("b0", 17), ("b7", 17), ("lite0", 17)])
def test_bf16_on_a_cpu_is_refused_where_gradients_would_be_unwritten_memory(variant, smallest):
    config = EfficientNetNVConfig.from_variant(variant)
    refuse_unwritten_gradients(config, smallest)
    with pytest.raises(UserError, match="use --precision fp32 or larger images"):
        refuse_unwritten_gradients(config, smallest - 1)
