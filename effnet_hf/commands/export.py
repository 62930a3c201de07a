"""Writes a checkpoint as files that run elsewhere, and proves that they compute the same.

    effnet-hf export --model runs/b0 --output_dir runs/b0-onnx --data_dir DIR         ONNX, checked on DIR/val
    effnet-hf export --model runs/b0 --output_dir b0-any-image --with_preprocessing uint8 image in, probabilities out
    effnet-hf export --model runs/b0-int8 --output_dir b0-ov8 --int8 openvino --data_dir DIR    INT8 for x86 CPUs
    effnet-hf export --model runs/b0-int8 --output_dir b0-trt --int8 tensorrt --data_dir DIR
    effnet-hf export --model runs/b0-int8 --output_dir b0-cpu --int8 ort-cpu --data_dir DIR

docs/export.md says how to open them in ONNX Runtime, Optimum, OpenVINO and TensorRT.
"""

import argparse

from ..cli import ArgumentParser, command_line, path, run
from ..recipes import add_data_flags, data_options
from .upload import add_upload_flags, check_upload_flags, refuse_without_push, upload


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.old_spellings = {"--output": "--output_dir", "--num_pictures": "--num_images"}
    parser.add_argument("--model", type=path, required=True, metavar="CHECKPOINT", help="checkpoint folder or Hub id")
    parser.add_argument("--output_dir", type=path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is there")

    graph = parser.add_argument_group("the file")
    graph.add_argument(
        "--format",
        metavar="NAME",
        help="onnx, openvino or pt2 (torch.export); for devices executorch, coreml, litert or ncnn; default: the one of"
        " --int8, else onnx",
    )
    graph.add_argument(
        "--dtype", default="fp32", metavar="NAME", help="fp32, fp16 or bf16 inside the graph; default: fp32"
    )
    graph.add_argument(
        "--int8",
        metavar="TARGET",
        help="openvino (x86 CPUs; from a quantized or a float checkpoint), ort-cpu or tensorrt (from a quantized one);"
        " for devices xnnpack or weights (from a float one)",
    )
    graph.add_argument(
        "--reduce_range",
        action="store_true",
        help="coarser INT8 weights (openvino, ort-cpu), right on x86 CPUs without VNNI, too",
    )
    graph.add_argument("--with_preprocessing", action="store_true", help="uint8 image in, probabilities out")
    graph.add_argument(
        "--with_probabilities",
        "--with_softmax",
        dest="with_softmax",
        action="store_true",
        help="probabilities instead of logits: by softmax, or by sigmoid where an image may have several labels",
    )
    graph.add_argument("--dynamic_image_size", action="store_true", help="leave height and width free")
    graph.add_argument(
        "--layout", metavar="NAME", help="transformers.js: onnx/model.onnx and settings that this library knows"
    )
    graph.add_argument("--opset", type=int, metavar="N", help="ONNX operator set; default: 18, for bf16 22")
    graph.add_argument("--exporter", metavar="NAME", help="torchscript or dynamo; default: by the opset")

    proof = parser.add_argument_group("the proof", "images to check on, as train has them; else generated ones")
    add_data_flags(proof, but=("streaming",))
    proof.add_argument("--num_images", type=int, metavar="N", help="how many of them; default: 64, with --int8 all")
    add_upload_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    check_upload_flags(args)
    refuse_without_push(args, "hub_token")
    from ..export import ExportOptions, export_model

    options = {name: value for name, value in vars(args).items() if name in ExportOptions.__dataclass_fields__}
    exported = export_model(
        args.model,
        args.output_dir,
        num_images=args.num_images,
        overwrite=args.overwrite,
        command=command_line(),
        model_id=args.hub_model_id,
        **options,
        **data_options(args),
    )
    print(exported.summary())
    if args.push_to_hub:
        print(f"pushed   {upload(args, args.output_dir)}")


if __name__ == "__main__":
    run(main)
