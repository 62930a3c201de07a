"""The 20 costliest kernels of a training step, ours and timm's, as text: python benchmark.py profile --variants b0"""

from torch.profiler import ProfilerActivity
from torch.profiler import profile as trace_of

from ..cli import at_least
from ..quiet import quiet_profiler
from ..training import keep_freed_memory
from .contenders import OURS, build, has, pictures, set_precision, training_step
from .environment import environment, resolve_device, write_figures
from .flags import common_parser, image_size_for, settings
from .timing import wait_for


STEPS = 3


def main(argv: list[str] | None = None) -> int:
    parser = common_parser("profile", __doc__, "peers", "precisions")
    parser.add_argument("--batch_size", type=at_least(1), default=16, help="pictures per step")
    arguments = parser.parse_args(argv)
    device = resolve_device(arguments.device, arguments.num_threads)
    keep_freed_memory()
    texts = []
    for variant in arguments.variants:
        size = image_size_for(arguments, variant)
        for name in (OURS, *(peer for peer in arguments.peers if has(peer, variant))):
            for precision in arguments.precisions:
                set_precision(precision, device)
                pixels = pictures(arguments.batch_size, size, device, channels_last=True)
                step = training_step(name, build(name, variant, size), pixels, precision)
                heading = (
                    f"{name}, {variant}, {precision}, {size} px, batch {arguments.batch_size}, eager, channels_last"
                )
                texts.append(f"{heading}\n{top_kernels(step, device)}")
    figures = {"kind": "profile", **environment(device), "settings": settings(arguments), "rows": []}
    figures["text"] = "\n\n".join(texts)
    print(figures["text"])
    if arguments.output:
        write_figures(figures, arguments.output)
    return 0


def top_kernels(step, device, count: int = 20) -> str:
    """Milliseconds a step, calls a step and name of the costliest kernels (operators on a CPU), and their sum."""
    quiet_profiler()
    on_cuda = device.type == "cuda"
    for _ in range(3):
        step()
    with trace_of(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda) as trace:
        for _ in range(STEPS):
            step()
        wait_for(device)
    spent = {}
    for event in trace.key_averages():
        time = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        is_kernel = not on_cuda or event.device_type.name == "CUDA"
        if time and is_kernel:
            spent[event.key] = (time / 1e3 / STEPS, event.count / STEPS)
    lines = [f"{sum(time for time, _ in spent.values()):10.2f} ms        all"]
    for name, (time, calls) in sorted(spent.items(), key=lambda item: -item[1][0])[:count]:
        lines.append(f"{time:10.2f} ms {calls:5.0f}  {name[:100]}")
    return "\n".join(lines)
