"""What quantization costs: calibration beside a plain forward pass and a training step, a QAT step beside a float one.

    python benchmarks/quantization_cost.py --variant b0 --image_size 224 --batch_size 8 --repeats 5

Same weights and batch; the variants take turns, so a noisy machine hits them alike. CPU time of this process on a CPU,
wall time with the device synchronised on a GPU; the fastest of the repeats, and ratios.
"""

import copy

import torch
from lib.contenders import images, placed
from lib.environment import environment
from lib.report import write_figures
from lib.timing import take_turns

from effnet_hf import EfficientNetNVConfig, EfficientNetNVForImageClassification
from effnet_hf.cli import ArgumentParser, at_least, path, run
from effnet_hf.quantization import calibrate, quantize
from effnet_hf.training import keep_freed_memory


PUBLISHED = 14.7 / 2645  # NVIDIA's B0: images/s calibrated to images/s trained with quantizers


def main() -> None:
    parser = ArgumentParser(description="Calibration and quantization-aware steps beside float ones.")
    parser.add_argument("--variant", default="b0")
    parser.add_argument("--image_size", type=at_least(1), default=None, help="the variant's by default")
    parser.add_argument("--batch_size", type=at_least(1), default=8, help="images per step")
    parser.add_argument("--repeats", type=at_least(1), default=5, help="of which the fastest counts")
    parser.add_argument("--calibration_batches", type=at_least(1), default=4, help="batches of one calibration")
    parser.add_argument("--output", type=path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory()
    torch.manual_seed(0)
    size = {"image_size": arguments.image_size} if arguments.image_size else {}
    config = EfficientNetNVConfig.from_variant(arguments.variant, num_labels=10, **size)
    batches = [
        images(arguments.batch_size, config.image_size, device, channels_last=True)
        for _ in range(arguments.calibration_batches)
    ]
    plain = placed(EfficientNetNVForImageClassification(config), batches[0])
    quantized = copy.deepcopy(plain)
    quantize(quantized)
    calibrate(quantized, batches[:1])

    def forward():
        with torch.no_grad():
            for batch in batches:
                plain.eval()(batch)

    def step(model):
        for batch in batches:
            model.train()(batch).logits.logsumexp(1).mean().backward()

    variants = {
        "forward": forward,
        "calibration": lambda: calibrate(quantized, batches),
        "float step": lambda: step(plain),
        "QAT step": lambda: step(quantized),
    }
    samples = take_turns(variants, device, arguments.repeats, warmup=1)
    best = {name: min(own.cpu if device.type == "cpu" else own.wall) for name, own in samples.items()}
    count = arguments.batch_size * len(batches)
    for name, value in best.items():
        print(f"{name:<12} {count / value:8.1f} images/s   {value / best['forward']:5.2f} x a forward pass")
    ratios = {
        "qat_step_to_float_step": best["QAT step"] / best["float step"],
        "calibration_ips_to_qat_ips": best["QAT step"] / best["calibration"],
    }
    ratios["times_the_originals_calibration_ratio"] = ratios["calibration_ips_to_qat_ips"] / PUBLISHED
    print(f"a QAT step costs {ratios['qat_step_to_float_step']:.2f} x a float step")
    print(
        f"calibration runs at {ratios['calibration_ips_to_qat_ips']:.2f} x the images/s of QAT;"
        f" the original's ratio was {PUBLISHED:.4f}"
    )
    if arguments.output:
        settings = {"variant": arguments.variant, "image_size": config.image_size, "batch_size": arguments.batch_size}
        settings |= {"repeats": arguments.repeats, "calibration_batches": arguments.calibration_batches}
        figures = {"kind": "quantization cost", **environment(device), "settings": settings, "images": count}
        write_figures({**figures, "seconds": best, **ratios}, arguments.output)


if __name__ == "__main__":
    run(main)
