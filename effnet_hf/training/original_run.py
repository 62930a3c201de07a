"""Going on with a run of NVIDIA's scripts, from the folder that `convert` made of its checkpoint.

Weights, their moving average, the optimizer's state and the epoch go on. The checkpoint holds neither random states nor
a position within an epoch, so the next epoch starts at its first step with this run's own sample order.
"""

import dataclasses
from pathlib import Path

import torch

from ..checkpoint import read_config, read_weights
from ..configuration import EfficientNetNVConfig
from ..conversion import TRAINER_FILE, TrainerState, read_trainer_state
from ..data.classes import match_classes
from ..errors import UserError
from ..manifest import MANIFEST, problem
from ..modeling_efficientnet_nv import EfficientNetNVForImageClassification
from ..recipes import Recipe
from .progress import Progress


# What names and shapes do not show and yet makes another function of the same weights.
_FUNCTION = ("padding", "batch_norm_eps", "hidden_act")
_OPTIMIZER_STATES = {
    "rmsprop": {"square_avg", "momentum_buffer"},
    "sgd": {"momentum_buffer"},
    "adamw": {"exp_avg", "exp_avg_sq"},
}


@dataclasses.dataclass(frozen=True)
class OriginalRun:
    """What `convert` kept of a training checkpoint of the original."""

    folder: Path
    config: EfficientNetNVConfig
    state: TrainerState
    weights: dict[str, torch.Tensor]

    @classmethod
    def open(cls, recipe: Recipe) -> "OriginalRun | None":
        """The run in the folder that `--resume` names; None where that is not what it names.

        Raises:
            UserError: the folder is damaged, knows no epoch, holds another optimizer's state than the recipe's, or the
                recipe quantizes.
        """
        resume = recipe.resume
        if resume is None or not Path(resume, TRAINER_FILE).is_file():
            return None
        folder = Path(resume)
        if recipe.placement != "none":
            raise UserError(f"--resume {resume}: qat resumes its own checkpoints; start from this with --model.")
        where = f"--resume {resume}"
        if (folder / MANIFEST).is_file() and (damage := problem(folder, only=(TRAINER_FILE,))):
            raise UserError(f"{where} is damaged: {damage}; convert its source again.")
        state, weights, config = read_trainer_state(folder), read_weights(resume, where), read_config(resume, where)
        if state.epoch is None:
            raise UserError(f"--resume {resume} does not know its epoch; start from its weights with --model {resume}.")
        if state.epoch >= recipe.epochs:
            raise UserError(f"--resume {resume} has finished {state.epoch} epochs; --epochs {recipe.epochs} adds none.")
        kept = {key for entries in state.optimizer_state.values() for key in entries} - {"step"}
        if kept and kept != _OPTIMIZER_STATES[recipe.optimizer]:
            raise UserError(
                f"--resume {resume} holds another optimizer's state ({', '.join(sorted(kept))}) than"
                f" {recipe.optimizer}'s; name its --optimizer, or start from its weights with --model {resume}."
            )
        return cls(folder, config, state, weights)

    def load_weights(self, model: EfficientNetNVForImageClassification) -> None:
        """Puts the weights into the recipe's model.

        Raises:
            UserError: they are another network's.
        """
        own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        theirs = {name: tuple(tensor.shape) for name, tensor in self.weights.items()}
        if any(name.endswith("_amax") for name in theirs):
            raise UserError(f"--resume {self.folder} is quantized; start from it with qat --model {self.folder}.")
        if own != theirs:
            name = min(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
            raise UserError(
                f"--resume {self.folder} is another network than the recipe's: {name} is {theirs.get(name, 'absent')}"
                f" there, {own.get(name, 'absent')} here; see --variant and the number of classes in the data."
            )
        for field in _FUNCTION:
            here, there = getattr(model.config, field), getattr(self.config, field)
            if here != there:
                raise UserError(
                    f"--resume {self.folder} is another network than the recipe's: {field} is {there} there, {here}"
                    f" here; start from its weights with --model {self.folder}."
                )
        model.load_state_dict(self.weights, strict=True)

    def _check_classes(self, class_names: list[str]) -> None:
        """Raises `UserError` where the data has its classes in another order: a run goes on with what it has."""
        known = [self.config.id2label[i] for i in sorted(self.config.id2label)]
        if len(known) != len(class_names):
            return  # shapes differ, which is said with their numbers
        where, mend = f"--resume {self.folder}", f"start from its weights with --model {self.folder}"
        try:
            # It was trained on sorted folders, whatever it calls them now.
            match = match_classes(class_names, known, "the data", by_position=True)
        except UserError as reason:
            raise UserError(f"{where} was trained on other classes; {mend}: {reason}") from None
        if match.numbers.tolist() != list(range(len(known))):
            raise UserError(f"{where} was trained on these classes in another order; {mend}.")

    def restore(self, run) -> Progress:
        """Puts weights, optimizer state and moving average into the run's; returns the first step of the next epoch.

        The best figure starts anew: its weights are not in the checkpoint.
        """
        assert self.state.epoch is not None  # see open
        model, optimizer, train = run.bare_model, run.optimizer, run.train_loader
        self._check_classes(run.loaders.class_names)
        self.load_weights(model)
        updates = self.state.epoch * train.updates_per_epoch
        if self.state.optimizer_state:
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
            state = {i: self.state.optimizer_state[name] for i, name in enumerate(order)}
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        if run.ema is not None:
            run.ema.load_state_dict({"updates": updates, "model": self.state.averaged or self.weights})
        return Progress(epoch=self.state.epoch, total_updates=updates, num_samples=train.num_samples)

    def __str__(self) -> str:
        lacking = [] if self.state.optimizer_state else ["optimizer state"]
        lacking += [] if self.state.averaged else ["averaged weights"]
        without = f", without {' and '.join(lacking)}" if lacking else ""
        return f"a run of the original{without}; random states and sample order are new"
