"""What each command reads in each kind of folder: `readings.md` is the specification, and this holds it to the code.

A row is a folder of digits and the flags that go with it. A cell is what a command makes of it: how many images of how
many classes, "right" for the probe's own top-1 on just these images (any other pixel, label or image gives another
figure), a phrase in quotes that stands in what it says; or the sentence with which it refuses.
"""

import json
import re
import shutil
from pathlib import Path

import pytest

from effnet_hf.commands import classify, export, validate
from effnet_hf.data.opening import open_data
from effnet_hf.errors import UserError
from effnet_hf.recipes import GROUPS, parse_recipe
from effnet_hf.training import setup
from effnet_hf.training import validate as measure
from effnet_hf.training.precision import start_accelerator

from ..conftest import forget_accelerator
from . import probe
from .digit_folders import FOLDERS


PAGE = Path(__file__).with_name("readings.md")
UNTRIED = "–"


def rows() -> list[dict[str, str]]:
    """Of every table of the page."""
    found, header = [], []
    for line in PAGE.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| the data"):
            header = cells
        elif line.startswith("| ") and header:
            found.append(dict(zip(header, cells)))
        elif not line.startswith("|"):
            header = []
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return probe.write_probe(tmp_path_factory.mktemp("probe") / "model")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Writes each folder once."""
    made: dict[str, Path] = {}

    def write(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("data") / "DIR"
            made[name].mkdir()
            FOLDERS[name](made[name])
        return made[name]

    return write


def numbers_in(split) -> list[int]:
    """The digits that a split holds, by the numbers in their files' names; an image that is null has none."""
    names = (split.name(index) for index in range(len(split)))
    return [int(found[1]) for name in names if (found := re.search(r"(\d+)(\.\w+)?$", name)) and "row" not in name]


def verdict(top1: float, numbers: list[int]) -> str:
    return "right" if top1 == pytest.approx(probe.right_share(numbers), abs=1e-6) else f"{top1:.2f} %"


def recipe_of(flags: list[str], checkpoint: Path, scratch: Path, config: str = "b0", **more):
    own = {"model": checkpoint, "output_dir": scratch / "run", "num_workers": 0, "epochs": 1, "warmup_epochs": 0}
    own |= {"global_batch_size": 6, "per_device_batch_size": 3, "config": config, **more}
    words = [word for name, value in own.items() for word in (f"--{name}", str(value))]
    return parse_recipe([*flags, *words], groups=GROUPS, config=config)[0]


# Each makes a cell of what a command does, and prints what the command says.


def by_train(flags, checkpoint, scratch, printed):
    recipe, accelerator, _ = start_accelerator(recipe_of(flags, checkpoint, scratch))
    run = setup.build_run(recipe, accelerator)
    try:
        setup.restore_run(run)
        setup.introduce(run)
        counted = f"{run.train_loader.num_samples} + {run.loaders.val.num_samples} of {len(run.loaders.class_names)}"
        if "a new classifier" in printed():
            return f"{counted}, a new classifier"
        top1 = measure(run.bare_model, run.loaders.val, accelerator)["top1"]
        return f"{counted}, {verdict(top1, numbers_in(open_data(recipe).val))}"
    finally:
        run.loaders.close()
        run.report.close()


def by_validate(flags, checkpoint, scratch, printed):
    validate.main(["--model", str(checkpoint), *flags, "--json", "--num_workers", "0"])
    (found,) = (json.loads(line) for line in printed().splitlines() if line.startswith("{"))
    own = open_data(recipe_of(flags, checkpoint, scratch), train=False)
    return f"{found['n']} of {found['classes']}, {verdict(found['top1'], numbers_in(own.val))}"


def by_qat(flags, checkpoint, scratch, printed):
    quantization = pytest.importorskip("effnet_hf.quantization")
    recipe = recipe_of(flags, checkpoint, scratch, "quant-b0", calibration_batches=1)
    recipe, accelerator, _ = start_accelerator(recipe)
    quantizing = quantization.Quantization(recipe)
    run = setup.build_run(recipe, accelerator, quantizing)
    run.loaders.close()
    return verdict(quantizing.figures["float"]["top1"], numbers_in(open_data(recipe).val))


def by_export(flags, checkpoint, scratch, printed):
    export.main(["--model", str(checkpoint), "--output_dir", str(scratch / "onnx"), "--num_images", "60", *flags])
    own = open_data(recipe_of(flags, checkpoint, scratch), train=False)
    found = re.search(r"top1 +([0-9.]+) %", printed())
    if found is None:
        return "no figure"
    return "right" if float(found[1]) == round(probe.right_share(numbers_in(own.val)), 2) else f"{found[1]} %"


def by_classify(flags, checkpoint, scratch, printed):
    folder, own = flags[flags.index("--data_dir") + 1] + "/val", [*flags]
    del own[own.index("--data_dir") :][:2]
    classify.main(["--model", str(checkpoint), "--json", "--top_k", "1", folder, *own[2:]])
    found = [json.loads(line) for line in printed().splitlines() if line.startswith("{")]
    numbers = [int(Path(each["path"]).stem) for each in found]
    hits = sum(
        each["predictions"][0]["label"] == probe.WORDS[probe.digits()[1][number]]
        for each, number in zip(found, numbers)
    )
    return verdict(100 * hits / len(found), numbers)


COMMANDS = {"train": by_train, "validate": by_validate, "qat": by_qat, "export": by_export, "classify": by_classify}


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row['the data']} {row['flags']}"[:90])
def test_what_is_read(row, written, checkpoint, tmp_path, capsys):
    flags = row["flags"].replace("DIR", str(written(row["the data"]))).split()
    heard: list[str] = []

    def printed() -> str:
        heard.extend(capsys.readouterr())
        return "".join(heard)

    for command, act in COMMANDS.items():
        wanted = row.get(command, UNTRIED)
        if wanted == UNTRIED:
            continue
        heard.clear()
        forget_accelerator()
        scratch = tmp_path / command
        try:
            found = act(flags, checkpoint, scratch, printed)
        except UserError as error:
            found = "no:"
            heard.append(str(error))
        shutil.rmtree(scratch, ignore_errors=True)
        said, (cell, *phrases) = printed(), re.split(r' ?"([^"]*)"', wanted)
        assert found == cell.strip(), f"{command}: {said}"
        for phrase in phrases[::2]:
            assert phrase in said, command


def test_every_folder_is_in_the_table():
    assert {row["the data"] for row in rows()} == set(FOLDERS)
