"""What a resumed run needs besides weights and progress, in files that are data: nothing in them can run.

optimizer.safetensors     the optimizer's tensors, `PARAMETER/KEY`
average.safetensors       the moving average of the weights
random_{rank}.safetensors the random number generators of one process: Python's, numpy's, torch's and its device's
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import UserError, first_line, printable
from ..reading import wrong_numbers
from .ema import ModelEMA
from .progress import Progress


Tensors = dict[str, torch.Tensor]
_NEEDED = {"RMSprop": ("step", "square_avg"), "AdamW": ("step", "exp_avg", "exp_avg_sq")}  # torch's own keys
_WEIGHTS, _OPTIMIZER, _AVERAGE, _RANDOM = (
    "model.safetensors", "optimizer.safetensors", "average.safetensors", "random_{}.safetensors",
)  # fmt: skip
# What is opened of a checkpoint, and of the best model in it: a file of such a name is one of the run's, or none.
READ = re.compile(
    r"(best/)?((config|preprocessor_config|progress|.*\.index)\.json|recipe\.yaml|data\.parquet|pytorch_model\.bin"
    r"|(model|optimizer|average|random_\d+)\.safetensors)"
)


@dataclass
class TrainingState:
    """The living objects whose state a checkpoint holds."""

    accelerator: Accelerator
    model: torch.nn.Module  # without DDP
    optimizer: Any  # as `Accelerator.prepare` returns it
    ema: ModelEMA | None

    def write(self, folder: Path, processes: list[Tensors]) -> None:
        """Writes everything but the weights themselves. `processes` are the `random_state`s, in the order of ranks."""
        save_file(self._optimizer_tensors(), folder / _OPTIMIZER)
        if self.ema is not None:
            save_file(_packed(self.ema.model.state_dict()), folder / _AVERAGE)
        for rank, state in enumerate(processes):
            save_file(state, folder / _RANDOM.format(rank))

    def note(self, progress: Progress) -> None:
        """The loss scale of fp16, which is two numbers."""
        if self.accelerator.scaler is not None:
            scale = self.accelerator.scaler.state_dict()
            progress.loss_scale, progress.loss_scale_steps = scale["scale"], scale["_growth_tracker"]

    def read(self, folder: Path, progress: Progress) -> None:
        """Puts the state of a checkpoint into the living objects, after all of it was found to fit.

        Raises:
            UserError: a file is missing, or holds another run's state.
        """
        weights, optimizer = _load(folder, _WEIGHTS), self._optimizer_state(_load(folder, _OPTIMIZER), folder)
        if progress.total_updates and not optimizer and _NEEDED.get(type(_bare(self.optimizer)).__name__):
            raise UserError(f"{folder / _OPTIMIZER} is empty, after {progress.total_updates} steps.")
        average = _load(folder, _AVERAGE) if self.ema is not None else None
        same_launch = progress.num_processes == self.accelerator.num_processes
        rank = _RANDOM.format(self.accelerator.process_index)
        draws = _load(folder, rank) if same_launch else None
        # Strict loading changes what fits before it raises; these are looked at first.
        _require_same(folder / _WEIGHTS, weights, self.model.state_dict())
        if self.ema is not None and average is not None:
            _require_same(folder / _AVERAGE, average, self.ema.model.state_dict())
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(
            {"state": optimizer, "param_groups": self.optimizer.state_dict()["param_groups"]}  # this launch's settings
        )
        if self.ema is not None:
            self.ema.load_state_dict({"updates": progress.total_updates, "model": average})
        scaler = self.accelerator.scaler
        if scaler is not None and progress.loss_scale:  # 0: written in another precision, and the scale starts afresh
            own = {"scale": progress.loss_scale, "_growth_tracker": progress.loss_scale_steps}
            scaler.load_state_dict({**scaler.state_dict(), **own})
        if draws is not None:
            self.set_random_state(draws, folder / rank)

    def random_state(self) -> Tensors:
        """Of this process. Numbers are kept as int64, floats bit for bit in float64."""
        _, words, spare = random.getstate()
        _, keys, position, has_spare, numpy_spare = np.random.get_state()
        state = {
            "python": torch.tensor(words, dtype=torch.int64),
            "numpy": torch.from_numpy(np.append(np.asarray(keys, np.int64), [position, has_spare])),
            "spare": torch.tensor([spare is not None, spare or 0.0, numpy_spare], dtype=torch.float64),
            "torch": torch.get_rng_state(),
        }
        device = self.accelerator.device
        if device.type != "cpu":
            state["device"] = torch.get_device_module(device).get_rng_state(device).cpu()
        return state

    def set_random_state(self, state: Tensors, where: Path | str = "the state") -> None:
        """Puts back what `random_state` gave.

        Raises:
            UserError: it is something else; `where` says what it is called.
        """
        try:
            has_spare, spare, numpy_spare = state["spare"].tolist()
            words, (*keys, position, numpy_has_spare) = state["python"].tolist(), state["numpy"].tolist()
            if not 0 <= position <= len(keys) == 624:
                raise ValueError(f"numpy's position is {position} of {len(keys)}")
            random.setstate((3, tuple(words), spare if has_spare else None))
            np.random.set_state(("MT19937", np.array(keys, np.uint32), position, numpy_has_spare, numpy_spare))
            torch.set_rng_state(state["torch"])
            device = self.accelerator.device
            if device.type != "cpu":
                torch.get_device_module(device).set_rng_state(state["device"], device)
        except (KeyError, ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise UserError(f"{where} holds no states of random number generators: {first_line(error)}") from None

    def _names(self) -> dict[int, str]:
        """The name of every parameter, by its number in the optimizer."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        groups = self.optimizer.param_groups
        return dict(enumerate(names[id(parameter)] for group in groups for parameter in group["params"]))

    def _optimizer_tensors(self) -> Tensors:
        state, names = self.optimizer.state_dict()["state"], self._names()
        return _packed({f"{names[i]}/{key}": value for i, entries in state.items() for key, value in entries.items()})

    def _optimizer_state(self, tensors: Tensors, folder: Path) -> dict[int, Tensors]:
        """The tensors by the optimizer's numbers, laid out in memory as the parameters are: mixed layouts are slow."""
        parameters = dict(self.model.named_parameters())
        numbers = {name: number for number, name in self._names().items()}
        state: dict[int, Tensors] = {}
        for entry, tensor in tensors.items():
            name, _, key = entry.rpartition("/")
            parameter = parameters.get(name)
            shape = () if key == "step" else getattr(parameter, "shape", None)
            if name not in numbers or parameter is None or (tensor.shape, tensor.dtype) != (shape, parameter.dtype):
                raise UserError(
                    f"{folder / _OPTIMIZER} is of another network: {printable(entry)} does not fit; resume with"
                    " the run's own recipe, its --model included."
                )
            if fault := wrong_numbers(key, tensor):
                raise UserError(f"{folder / _OPTIMIZER} is damaged: {entry} {fault}.")
            if key != "step":
                tensor = torch.empty_like(parameter, dtype=tensor.dtype, device="cpu").copy_(tensor)
            state.setdefault(numbers[name], {})[key] = tensor
        for group in self.optimizer.param_groups:
            for parameter in group["params"] if group.get("momentum") else []:
                # A momentum that this launch switched on begins at rest.
                entries = state.get(numbers[next(n for n, p in parameters.items() if p is parameter)])
                if entries is not None:
                    entries.setdefault("momentum_buffer", torch.zeros_like(parameter, device="cpu"))
        needed = _NEEDED.get(type(_bare(self.optimizer)).__name__, ())
        frozen = {name for name, parameter in parameters.items() if not parameter.requires_grad}
        for name, number in numbers.items() if state else ():
            if name in frozen and number not in state:  # it has not been trained yet
                continue
            if not all(key in state.get(number, ()) for key in needed):
                raise UserError(f"{folder / _OPTIMIZER} lacks some of {', '.join(needed)} for {name}.")
        return state


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """Without Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _packed(tensors: dict[str, Any]) -> Tensors:
    """Contiguous copies where the layout is another; what an optimizer has not yet made is left out."""
    return {name: tensor.contiguous() for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}


def _load(folder: Path, name: str) -> Tensors:
    try:
        return load_file(folder / name)
    except FileNotFoundError:
        raise UserError(f"{folder} has no {name}.") from None
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder / name} cannot be read: {first_line(error)}") from None


def _require_same(where: Path, found: Tensors, own: Tensors) -> None:
    theirs, ours = ({name: _kind(tensor) for name, tensor in each.items()} for each in (found, own))
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            kinds = f"{theirs.get(name, 'absent')} there, {ours.get(name, 'absent')} here"
            raise UserError(f"{where} is of another network: {printable(name)} is {kinds}.")
        if fault := wrong_numbers(name, found[name]):
            raise UserError(f"{where} is damaged: {name} {fault}.")


def _kind(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
