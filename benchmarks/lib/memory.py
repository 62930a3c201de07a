"""Peak memory of one training step and one forward pass: python benchmark.py memory --variants b0,b4

On a GPU: the allocator's own peak. On a CPU: the largest sum of living tensors during the step, from torch's profiler,
which unlike the process's size depends on no allocator and repeats to the byte. Both count weights, gradients,
optimizer state and activations. Training runs under autocast; inference has weights and images in the row's
precision.
"""

import torch
from torch.profiler import ProfilerActivity, profile

from effnet_hf.quiet import quiet_profiler

from .contenders import AUTOCAST, OURS, build, has, images, logits_of, placed, set_precision, training_step
from .environment import environment, resolve_device
from .flags import common_parser, image_size_for, numbers, settings
from .report import table, write_figures
from .timing import release


def main(argv: list[str] | None = None) -> int:
    parser = common_parser("memory", __doc__.splitlines()[0], "peers", "precisions")
    parser.add_argument("--batch_sizes", type=numbers, default=[16], help="comma-separated")
    arguments = parser.parse_args(argv)
    device = resolve_device(arguments.device, arguments.num_threads)
    rows, left_out = [], []
    for variant in arguments.variants:
        size = image_size_for(arguments, variant)
        for precision in arguments.precisions:
            set_precision(precision, device)
            for batch in arguments.batch_sizes:
                for name in (OURS, *(peer for peer in arguments.peers if has(peer, variant))):
                    for checkpointing in (False, True) if name == OURS else (False,):
                        where = {"variant": variant, "by": name, "precision": precision, "batch": batch}
                        where |= {"image_size": size, "gradient_checkpointing": checkpointing}
                        try:
                            rows.append(
                                {**where, **peaks(name, variant, size, batch, precision, checkpointing, device)}
                            )
                        except torch.OutOfMemoryError:
                            left_out.append(f"{variant} {name} {precision} batch {batch}: out of memory")
    figures = {"kind": "memory", **environment(device), "settings": settings(arguments), "rows": rows}
    figures["left_out"] = left_out
    print(table(rows))
    if arguments.output:
        write_figures(figures, arguments.output)
    return 0


def peaks(name, variant, size, batch, precision, checkpointing, device) -> dict[str, float]:
    """`training_mb` and `inference_mb`, in MiB."""
    pixels = images(batch, size, device, channels_last=True)
    model = build(name, variant, size)
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    step = training_step(name, model, pixels, precision)
    step()  # makes the optimizer's state
    training = peak(step, device)
    for parameter in model.parameters():
        parameter.grad = None
    del step
    pixels = pixels.to(AUTOCAST.get(precision, torch.float32))
    model = placed(model.eval(), pixels)  # weights and images in the row's precision, as `benchmark.py inference` runs
    release(device)

    def infer():
        with torch.inference_mode():
            return logits_of(model(pixels))

    inference = peak(infer, device, living=tensor_bytes([*model.parameters(), *model.buffers(), pixels]))
    return {"training_mb": training, "inference_mb": inference}


def peak(step, device: torch.device, living: int | None = None) -> float:
    """MiB at the highest point of `step()`.

    Args:
        living: bytes of the tensors that exist before; for a training step found by looking at all of them.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    if living is None:
        living = tensor_bytes(_living_tensors())
    quiet_profiler()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    changes = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    current = highest = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        current += event.nbytes()
        highest = max(highest, current)
    return (living + highest) / 2**20


def tensor_bytes(tensors) -> int:
    """Bytes of the storages behind `tensors`, each once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _living_tensors() -> list[torch.Tensor]:
    import gc

    gc.collect()
    found = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    return [tensor for tensor in found if tensor.layout == torch.strided]  # the others have no storage
