"""What each of our tunings brings: python benchmark.py ablation --variants b0 --batch_size 8

Training steps of the same network with one tuning after the other switched on, and one step of each optimizer over B0's
weights in the forms that torch offers; everything takes turns.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch

from effnet_hf.cli import at_least
from effnet_hf.quantization_efficientnet_nv import GlobalAvgPool2d
from effnet_hf.training import keep_freed_memory
from effnet_hf.tuning import split_depthwise_gradients, use_onednn

from .contenders import OURS, build, images, training_step
from .environment import environment, resolve_device
from .flags import common_parser, image_size_for, settings
from .report import table, write_figures
from .timing import Samples, speed_up, take_turns


FORMS = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
OPTIMIZERS: dict[str, Callable] = {
    "RMSprop": partial(torch.optim.RMSprop, lr=1e-6, momentum=0.9, weight_decay=1e-5),
    "SGD": partial(torch.optim.SGD, lr=1e-6, momentum=0.9, weight_decay=1e-5),
    "AdamW": partial(torch.optim.AdamW, lr=1e-6),
}


def main(argv: list[str] | None = None) -> int:
    parser = common_parser("ablation", __doc__.splitlines()[0], "rounds")
    parser.add_argument("--batch_size", type=at_least(1), default=8, help="images per step")
    arguments = parser.parse_args(argv)
    device = resolve_device(arguments.device, arguments.num_threads)
    keep_freed_memory()
    rows = []
    for variant in arguments.variants:
        size = image_size_for(arguments, variant)
        rows += tunings(variant, size, arguments.batch_size, arguments.rounds, device)
        rows += gradient_view(variant, size, arguments.batch_size, arguments.rounds, device)
    for channels, side in ((240, 28), (672, 14), (1152, 7)):  # of B0 at 224 pixels
        rows += depthwise(channels, side, arguments.batch_size, arguments.rounds, device)
    rows += optimizers(arguments.rounds, device)
    print(table(rows))
    if arguments.output:
        figures = {"kind": "ablation", **environment(device), "settings": settings(arguments), "rows": rows}
        write_figures(figures, arguments.output)
    return 0


def tunings(variant: str, size: int, batch: int, rounds: int, device: torch.device) -> list[dict]:
    """Rows of training steps: nothing, oneDNN for 1x1 convolutions, split depthwise gradients, both."""
    changes = {
        "untuned": lambda model: model,
        "use_onednn": lambda model: use_onednn(model, size),
        "split_depthwise_gradients": split_depthwise_gradients,
        "both": lambda model: split_depthwise_gradients(use_onednn(model, size)),
    }
    pixels = images(batch, size, device, channels_last=True)
    steps = {
        name: training_step(OURS, change(build(OURS, variant, size)), pixels, tuned=False)
        for name, change in changes.items()
    }
    samples = take_turns(steps, device, rounds)
    return _rows(f"training step, {variant}, {size} px, batch {batch}", samples, "untuned", device)


def gradient_view(variant: str, size: int, batch: int, rounds: int, device: torch.device) -> list[dict]:
    """Rows of training steps: with torch's pooling in squeeze-excite, and with ours, whose gradient is a view."""
    pixels, steps = images(batch, size, device, channels_last=True), {}
    for name in ("torch's", "ours, the gradient a view"):
        model = build(OURS, variant, size)
        for module in model.modules():
            if type(module) is GlobalAvgPool2d and name == "torch's":
                module.__class__ = torch.nn.AdaptiveAvgPool2d
        steps[name] = training_step(OURS, model, pixels)
    what = f"squeeze-excite's pooling in a training step, {variant}, {size} px, batch {batch}"
    return _rows(what, take_turns(steps, device, rounds), "torch's", device)


def depthwise(channels: int, side: int, batch: int, rounds: int, device: torch.device) -> list[dict]:
    """Rows of one 5x5 depthwise convolution: forward alone, and with torch's backward pass and with ours."""
    plain = torch.nn.Conv2d(channels, channels, 5, padding=2, groups=channels, bias=False)
    plain = plain.to(device, memory_format=torch.channels_last)
    split = split_depthwise_gradients(copy.deepcopy(plain))
    maps = torch.randn(batch, channels, side, side, device=device)
    maps = maps.contiguous(memory_format=torch.channels_last).requires_grad_()

    def both_ways(conv):
        output = conv(maps)
        output.backward(output.detach())

    steps: dict[str, Callable] = {
        "torch": partial(both_ways, plain),
        "split_depthwise_gradients": partial(both_ways, split),
        "forward alone": lambda: plain(maps.detach()),
    }
    what = f"5x5 depthwise convolution, {channels} channels, {side} px, batch {batch}, forward and backward"
    return _rows(what, take_turns(steps, device, rounds), "torch", device)


def optimizers(rounds: int, device: torch.device) -> list[dict]:
    """Rows of one step over B0's weights, against the loop over tensors that is torch's default on a CPU."""
    rows = []
    for name, make in OPTIMIZERS.items():
        steps = {}
        for form, flags in FORMS.items():
            if (name, form) == ("RMSprop", "fused"):  # torch has none
                continue
            weights = list(build(OURS, "b0", 224).to(device).parameters())
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            steps[form] = make(weights, **flags).step
        rows += _rows(f"{name} over B0's weights", take_turns(steps, device, rounds), "loop", device)
    return rows


def _rows(what: str, samples: dict[str, Samples], baseline: str, device: torch.device) -> list[dict]:
    rows = []
    for name, own in samples.items():
        ratio = speed_up(own, samples[baseline], device.type == "cpu")
        milliseconds = own.summary(1)["cpu_ms" if device.type == "cpu" else "wall_ms"]
        row = {"what": what, "how": name, "ms": f"{milliseconds:.1f}"}
        rows.append(row | {"times as fast": f"{ratio.get('cpu', ratio['wall']):.2f}", "n": len(own.wall)})
    return rows
