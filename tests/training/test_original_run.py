"""A checkpoint of NVIDIA's scripts, converted, trains on as if the run had been ours from the start."""

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from effnet_hf import EfficientNetNVConfig, EfficientNetNVForImageClassification
from effnet_hf.conversion import TRAINER_FILE, load_foreign, to_foreign, write_folder
from effnet_hf.conversion.nvidia import NVIDIA
from effnet_hf.errors import UserError
from effnet_hf.recipes import Recipe
from effnet_hf.training import build_optimizer, train
from effnet_hf.training.original_run import OriginalRun
from effnet_hf.training.progress import Progress
from effnet_hf.training.state import TrainingState

from .test_resume import PLAIN
from .workbench import read_rows, small_recipe, write_squares


SETTINGS = {**PLAIN, "ema_decay": 0.9}


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("squares"))


def newest(folder):
    return sorted((folder / "checkpoints").glob("update-*"))[-1]


def as_the_original_writes_it(checkpoint, recipe: Recipe) -> dict:
    """One of our checkpoints with the names, shapes and parameter numbers of `main.py`."""
    model = EfficientNetNVForImageClassification.from_pretrained(checkpoint)
    average = EfficientNetNVForImageClassification(model.config)
    average.load_state_dict(load_file(checkpoint / "average.safetensors"))
    optimizer = build_optimizer(model, recipe)
    TrainingState(Accelerator(cpu=True), model, optimizer, None).read(checkpoint, Progress(num_processes=2))

    weights, their_name = to_foreign(model, "nvidia"), NVIDIA.key_names(model.config)
    state = {their_name[name]: optimizer.state[parameter] for name, parameter in model.named_parameters()}
    groups = [[key for key in weights if key in state and ("bn" in key) == bn] for bn in (True, False)]
    order = groups[0] + groups[1]
    return {
        "epoch": 1,
        "arch": "efficientnet-b0",
        "state_dict": {f"module.{key}": tensor for key, tensor in weights.items()},
        "state_dict_ema": to_foreign(average, "nvidia"),
        "best_prec1": 50.0,
        "optimizer": {
            "state": {
                i: {name: v.reshape(weights[key].shape) if v.dim() else v for name, v in state[key].items()}
                for i, key in enumerate(order)
            },
            "param_groups": [{"lr": 0.1, "params": [order.index(key) for key in group]} for group in groups],
        },
    }


@pytest.fixture(scope="module")
def first_epoch(squares, tmp_path_factory):
    """Our own run's folder after one of its two epochs, and that of the same state converted from the original."""
    base = tmp_path_factory.mktemp("runs")
    recipe = small_recipe(squares, base / "ours", run_epochs=1, **SETTINGS)
    assert train(recipe) == 0
    torch.save(as_the_original_writes_it(newest(base / "ours"), recipe), base / "checkpoint.pth.tar")
    write_folder(load_foreign(base / "checkpoint.pth.tar"), base / "converted")
    return base / "ours", base / "converted"


def test_goes_on_exactly_as_our_own_checkpoint_does(squares, first_epoch, tmp_path, capsys):
    own, converted = first_epoch
    for name, start in (("own", newest(own)), ("theirs", converted)):
        assert train(small_recipe(squares, tmp_path / name, resume=str(start), quiet=False, **SETTINGS)) == 0
    assert f"resume   {converted}: epoch 2, a run of the original; random states" in capsys.readouterr().out
    assert [newest(tmp_path / name).name for name in ("own", "theirs")] == ["update-00000008"] * 2
    for file in ("model", "average", "optimizer"):
        ours, theirs = (load_file(newest(tmp_path / name) / f"{file}.safetensors") for name in ("own", "theirs"))
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0)
    losses = [[row["train.loss"] for row in read_rows(tmp_path / name, "train")][-4:] for name in ("own", "theirs")]
    assert losses[0] == losses[1] and len(read_rows(tmp_path / "theirs", "train")) == 4


def test_later_launches_resume_it_as_any_run(squares, first_epoch, tmp_path):
    recipe = small_recipe(
        squares, tmp_path / "run", resume=str(first_epoch[1]), run_epochs=1, **{**SETTINGS, "epochs": 3}
    )
    assert train(recipe) == 0
    with pytest.raises(UserError, match="already holds a run; continue it with --resume auto"):
        train(recipe)
    assert train(recipe.replace(resume="auto")) == 0
    assert [row["epoch"] for row in read_rows(tmp_path / "run", "epoch")] == [1, 2]


def test_averaged_weights_alone_are_no_run_to_resume(squares, first_epoch, tmp_path):
    found = load_foreign(first_epoch[1].parent / "checkpoint.pth.tar", ema=True)
    assert found.trainer_state is None
    assert "left out arch, best_prec1, epoch, optimizer, the plain weights' own" in found.notes[0]
    write_folder(found, tmp_path / "averaged")
    with pytest.raises(UserError, match="no checkpoint there"):
        train(small_recipe(squares, tmp_path / "run", resume=str(tmp_path / "averaged"), **SETTINGS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adamw"}, r"another optimizer's state \(momentum_buffer, square_avg\) than adamw's"),
        ({"optimizer": "sgd"}, "than sgd's"),
        ({"epochs": 1}, "has finished 1 epochs; --epochs 1 adds none"),
        ({"batch_norm_eps": 1e-5}, "batch_norm_eps is 0.001 there, 1e-05 here; start from its weights with --model"),
        ({"variant": "b1"}, "another network than the recipe's: classifier.weight is"),
        ({"placement": "nvidia"}, "qat resumes its own checkpoints"),
        ({"resume": "checkpoint.pth.tar"}, "is a file; .*convert .*checkpoint.pth.tar --output_dir DIR with --resume"),
        ({"resume": "damaged"}, "trainer_state.safetensors is neither a PyTorch file nor a safetensors file"),
    ],
)  # fmt: skip
def test_what_cannot_go_on_says_why_and_writes_nothing(changes, message, squares, first_epoch, tmp_path):
    base = first_epoch[1].parent
    (base / "damaged").mkdir(exist_ok=True)
    (base / "damaged" / TRAINER_FILE).write_bytes(b"no pickle")
    changes = {"resume": str(base / changes.pop("resume", "converted")), **changes}
    with pytest.raises(UserError, match=message):
        train(small_recipe(squares, tmp_path / "run", **{**SETTINGS, **changes}))
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "run" / "recipe.yaml").exists()


def test_its_classes_are_the_datas_in_this_order(tmp_path):
    def check(known, data):
        config = EfficientNetNVConfig(id2label=dict(enumerate(known)))
        OriginalRun(tmp_path, config, state=None, weights={})._check_classes(data)

    for known in (["cat", "dog"], ["LABEL_0", "LABEL_1"], ["x", "y"]):  # the last: words of what wnids name
        check(known, ["cat", "dog"])
    with pytest.raises(UserError, match="was trained on these classes in another order; start from its weights with"):
        check(["dog", "cat"], ["cat", "dog"])
    with pytest.raises(UserError, match="was trained on other classes; start from its weights with --model .*: dog;"):
        check(["cat", "elk"], ["cat", "dog"])
