"""What a training step takes of a device's memory: so much an image, and so much for the weights.

`recipes/memory.yaml` holds the first figure for every named architecture; `benchmarks/activation_memory.py` counts it
with what is here, and any other architecture is counted when a run starts.
"""

import dataclasses
import importlib.resources
import weakref
from collections.abc import Callable
from functools import cache

import accelerate
import torch
import yaml
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..configuration import EfficientNetNVConfig
from ..modeling_efficientnet_nv import EfficientNetNVForImageClassification
from ..recipes import Recipe
from .optim import training_loss


MIB = 2**20
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}  # fp32 and tf32 keep the same bytes
# Weights and gradients are two copies of 4 bytes a parameter; a third is for autocast's casts and DDP's first buckets.
COPIES = 3
OPTIMIZER_COPIES = {"rmsprop": 2, "sgd": 1, "adamw": 2}
# The loader's stage mixes the next batch meanwhile: four float images and one of bytes (data/mixup.py).
STAGED = 4.25
# A forward pass without gradients holds at most three of its largest maps: an operation's input, output and residual.
MAPS_WITHOUT_GRADIENT = 3
# Fake quantization keeps every layer's input as it was and as it is rounded.
QUANTIZED = 2
_SHAPING = """num_channels width_coefficient depth_coefficient depth_divisor kernel_sizes strides num_block_repeats
    expand_ratios out_channels stem_channels head_channels scale_stem_and_head se_ratio se_base hidden_act
    padding""".split()  # the fields of a configuration that memory depends on, its image_size aside


@dataclasses.dataclass(frozen=True)
class Need:
    """What training takes: `fixed` bytes, and `per_image` more for every image at once.

    `largest_map` counts elements of one image's largest tensor; `what` is trained, for sentences.
    """

    fixed: float
    per_image: float
    largest_map: int
    what: str
    precision: str


def usable_memory(accelerator: accelerate.Accelerator) -> int | None:
    """Bytes that a run may plan with on each device, the same on every process; None without a CUDA device.

    That is 85 % of the memory, so that equal cards plan equal batches whatever happened to be free, or 95 % of what is
    free if another program holds a part. The rest is for cuDNN's workspaces and the allocator's gaps. A collective
    call.
    """
    device = accelerator.device
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # cached here, in use by nobody
    return min(accelerate.utils.gather_object([int(min(0.85 * total, 0.95 * free))]))


def training_need(
    recipe: Recipe,
    config: EfficientNetNVConfig,
    image_size: int,
    precision: str,
    teacher: EfficientNetNVConfig | None = None,
) -> Need:
    """What training takes of a device's memory.

    Args:
        recipe: its optimizer, average, checkpointing and quantization count.
        config: of the network to train; `teacher`: of the one to distil from.
        image_size: side of the square image, pixels.
        precision: fp32, tf32, fp16 or bf16.
    """
    parameters, at_own_size, name = _row(config, precision, recipe.gradient_checkpointing)
    per_image = MIB * at_own_size * (image_size / config.image_size) ** 2  # maps are rounded up: up to 8 % more
    if config.quantization is not None or recipe.placement != "none":
        per_image *= QUANTIZED
    copies = COPIES + OPTIMIZER_COPIES[recipe.optimizer] + (recipe.ema_decay > 0)
    fixed = 4.0 * parameters * copies
    if teacher is not None:
        map_bytes = largest_map(teacher, image_size) * (2 if precision in DTYPES else 4)
        per_image += MAPS_WITHOUT_GRADIENT * map_bytes
        fixed += 4 * parameter_count(teacher) * 1.5  # autocast's casts are the half
    return Need(fixed, per_image, largest_map(config, image_size), f"{name} at {image_size} px", precision)


def largest_map(config: EfficientNetNVConfig, image_size: int) -> int:
    """Elements of the largest tensor that one image makes on its way through the network."""
    most = 0

    def look(module, inputs, output):
        nonlocal most
        if isinstance(output, torch.Tensor):
            most = max(most, output.numel())

    with torch.device("meta"), torch.nn.modules.module.register_module_forward_hook(look):
        network = EfficientNetNVForImageClassification(_without_quantizers(config)).eval()
        network(torch.empty(1, config.num_channels, image_size, image_size))
    return most


@cache
def memory_table() -> dict[str, dict]:
    """`recipes/memory.yaml`: by variant its `image_size`, `parameters` and MiB an image, see [`column`]."""
    return yaml.safe_load(importlib.resources.files("effnet_hf.recipes").joinpath("memory.yaml").read_text("utf-8"))


def column(precision: str, gradient_checkpointing: bool) -> str:
    """The table's name for a way to train."""
    return ("half" if precision in DTYPES else "single") + ("_checkpointed" if gradient_checkpointing else "")


def _row(config: EfficientNetNVConfig, precision: str, gradient_checkpointing: bool) -> tuple[int, float, str]:
    """Parameters and MiB an image at the configuration's own size, from the table or counted; and where from."""
    variant = _variant(config)
    if variant is None:
        counted = count_step(config, precision, gradient_checkpointing)
        return parameter_count(config), counted, "this architecture, counted just now,"
    row = memory_table()[variant]
    own_size = row[column(precision, gradient_checkpointing)] * (config.image_size / row["image_size"]) ** 2
    return row["parameters"], own_size, variant


def _variant(config: EfficientNetNVConfig) -> str | None:
    """The row of the table that has this architecture, by its shape and not by its label."""
    for variant in memory_table():
        known = EfficientNetNVConfig.from_variant(variant)
        if all(getattr(known, field) == getattr(config, field) for field in _SHAPING):
            return variant
    return None


def parameter_count(config: EfficientNetNVConfig) -> int:
    """Weights of the classifier that a configuration describes."""
    with torch.device("meta"):
        model = EfficientNetNVForImageClassification(_without_quantizers(config))
    return sum(parameter.numel() for parameter in model.parameters())


def _without_quantizers(config: EfficientNetNVConfig) -> EfficientNetNVConfig:
    """The configuration without its quantizers, which need modelopt and a device."""
    return type(config).from_dict(config.to_dict() | {"quantization": None})


def take_step(
    config: EfficientNetNVConfig,
    precision: str,
    gradient_checkpointing: bool,
    images: int,
    device: torch.device,
    begin: Callable[[], None],
) -> None:
    """Forward, loss and backward of a fresh network with gradients in place; `begin` is called before its input."""
    with device:
        model = EfficientNetNVForImageClassification(_without_quantizers(config)).train()
        if gradient_checkpointing:
            model._set_gradient_checkpointing(True)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        begin()
        shape = (images, config.num_channels, config.image_size, config.image_size)
        pixels = torch.zeros(shape).contiguous(memory_format=torch.channels_last)
        labels = torch.zeros(images, dtype=torch.int64)
    with torch.autocast(device.type, DTYPES.get(precision), enabled=precision in DTYPES):
        logits = model(pixel_values=pixels).logits
    training_loss(logits, labels, 0.1).backward()


def count_step(config: EfficientNetNVConfig, precision: str, gradient_checkpointing: bool = False) -> float:
    """MiB that each image adds to the peak of a training step at the configuration's own size, in seconds.

    Counted on tensors without storage: pixels, what forward keeps, autocast's casts of the weights (a 64th of them),
    the gradients in flight, and what the loader holds of the next batch. The tensors pose as the CPU's, because torch
    runs no backward pass of a pretended GPU; the model's operations keep the same there.
    """
    images = 64
    with FakeTensorMode(), LiveBytes() as live:
        take_step(config, precision, gradient_checkpointing, images, torch.device("cpu"), live.begin)
    staged = STAGED * 4 * config.num_channels * config.image_size**2
    return ((live.peak - live.began) / images + staged) / MIB


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that are alive (`now`) and the most there were since `begin` (`peak`), by storage.

    Own code, because torch's `MemTracker` is private and needs `torch.distributed`.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.began = 0
        self._alive: dict[int, weakref.ref] = {}

    def begin(self) -> None:
        self.began = self.peak = self.now

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._meet(tensor.untyped_storage())
        return result

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def leave(_):
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, leave)
        self.now += size
        self.peak = max(self.peak, self.now)
