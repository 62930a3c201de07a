"""What goes over a recipe's file: the preset of a machine, and the options that a flag makes meaningless."""

from pathlib import Path

import yaml

from ..errors import UserError


# An option that is given, whether this value of it counts, and the options of the file that then go back to their
# defaults: they were about what is now another thing, or answered the same question.
_GIVES_WAY = (
    ("freeze", lambda value: value == "none", ("freeze_epochs",)),
    ("augmentation", lambda value: value != "randaugment", ("randaugment_operations", "randaugment_magnitude")),
    ("optimizer", lambda value: value != "sgd", ("nesterov",)),
    ("momentum", lambda value: value == 0, ("nesterov",)),
    ("folds", lambda value: value == 0, ("fold",)),
    ("folds", bool, ("val_fraction", "val_split", "accept_changed_data")),
    ("val_fraction", bool, ("folds", "fold", "val_split")),
    ("val_split", bool, ("folds", "fold", "val_fraction")),
    ("dataset_name", bool, ("data_dir", "labels")),
    ("data_dir", bool, ("dataset_name", "dataset_config", "streaming")),
    ("labels", bool, ("dataset_name", "dataset_config", "streaming")),
)


def give_way(values: dict, given: dict) -> dict:
    """A recipe file's `values` without those that what was `given` replaces by more than their own name."""
    gone = {name for flag, counts, names in _GIVES_WAY if flag in given and counts(given[flag]) for name in names}
    if given.get("sampler") == "balanced" and values.get("class_weights") == "balanced":
        gone.add("class_weights")
    if given.get("class_weights") == "balanced":
        gone.add("sampler")
    return {name: value for name, value in values.items() if name not in gone}


def hardware_preset(values: dict) -> dict:
    """Per-device batch, precision and workers of a machine, from `hardware.yaml`."""
    table = yaml.safe_load((Path(__file__).parent / "hardware.yaml").read_text(encoding="utf-8"))
    name = str(values["hardware"]).lower()
    if name not in table:
        raise UserError(f"--hardware {values['hardware']!r} is unknown; known: {', '.join(table)}.")
    machine = table[name]
    precision = values.get("precision") or machine["precision"]
    if precision not in machine["per_device_batch_size"]:
        known = ", ".join(machine["per_device_batch_size"])
        raise UserError(f"--hardware {name} has no preset for --precision {precision}; it has {known}.")
    size = str(values.get("variant", "b0")).removeprefix("widese-")
    batches = machine["per_device_batch_size"][precision]
    preset = {"precision": precision, "num_workers": machine["num_workers"]}
    if size in batches:
        preset["per_device_batch_size"] = batches[size]
    return preset
