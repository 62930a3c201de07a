"""The same function, faster: what may be done to a network once it is known where and how it will run.

    model = fold_batchnorm(model)              # inference anywhere: 49 of B0's 98 large layers are gone
    model = compile_for_inference(model)       # folded and compiled as one graph
    run = CudaGraph(model, example)            # inference of one shape on a GPU, one launch a batch
    tune_for_cpu_training(model, image_size)   # what training does on a CPU by itself

These are functions of the package, not methods of the model: the model file travels in every checkpoint and holds what
the network *is*.
"""

import copy
from collections.abc import Callable
from types import MethodType

import torch
from torch import nn

from .modeling_efficientnet_nv import ConvNormAct, _is_frozen
from .quantization_efficientnet_nv import fold_into_convolution


@torch.no_grad()
def fold_batchnorm(model: nn.Module) -> nn.Module:
    """A copy for inference in which every convolution has taken over the scale and shift of its batch norm.

    Folded by [`fold_into_convolution`] in float64, so logits differ by rounding only. Call it without gradients:
    activations then work in place. Our backbone in a detector is folded, too, with the frozen batch norm it has there.
    Layers of other classes (quantized ones) are left as they are. Fold before casting to fp16 or bf16.

    The copy is in evaluation mode and has no gradients. Where anything was folded it refuses `train()` and
    `save_pretrained`: its parameters are no longer those that `config.json` describes.
    """
    folded = copy.deepcopy(model).eval().requires_grad_(False)
    for layer in folded.modules():
        if not isinstance(layer, ConvNormAct) or type(layer.conv) is not nn.Conv2d:
            continue
        if _is_frozen(layer.bn):
            layer.bn.eps = layer.eps  # which it is computed with; transformers' has none
        elif type(layer.bn) is not nn.BatchNorm2d:
            continue
        fold_into_convolution(layer)
        folded.train = MethodType(_stay_in_evaluation, folded)
        folded.save_pretrained = MethodType(_refuse_saving, folded)
    return folded


def _is_channels_last(weight: torch.Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def _stay_in_evaluation(self, mode: bool = True):
    if mode:
        raise ValueError("this network's batch norm is folded away, so it cannot be trained; train the original.")
    return self


def _refuse_saving(self, *args, **kwargs):
    raise ValueError("this network's batch norm is folded away; save the original, and fold after loading.")


def tune_for_cpu_training(model: nn.Module, image_size: int) -> nn.Module:
    """In place: [`use_onednn`] and [`split_depthwise_gradients`]. Weights, configuration and mathematics stay."""
    return split_depthwise_gradients(use_onednn(model, image_size))


def use_onednn(model: nn.Module, image_size: int) -> nn.Module:
    """In place, for a CPU: sends the 1x1 convolutions of fp32 batches of 2 to 15 images to oneDNN.

    On one thread and below 16 images torch gives them to its own im2col and the BLAS (`ConvParams::use_mkldnn` in
    aten/src/ATen/native/Convolution.cpp), unless they are dilated. A 1x1 kernel has no neighbours to move apart, so a
    dilation of 2 changes nothing but that choice: 1.2 to 1.3x in a training step of 8 images.
    Images below 96 pixels are left alone, because their maps are too small to pay for oneDNN's set-up.
    """
    for module in model.modules() if image_size >= 96 else ():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1:
            module.dilation = (2, 2)
    return model


def split_depthwise_gradients(model: nn.Module) -> nn.Module:
    """In place, for fp32 training on a CPU: 5x5 depthwise convolutions get their weight gradient in two halves.

    oneDNN takes four to eight forward passes for the gradient of a depthwise kernel five pixels wide, and about one for
    three. Columns 0 to 2 and 2 to 4 of the kernel are therefore asked for separately, over the image shifted by two:
    the same sums, 1.4 to 1.8 times as fast with the forward pass counted, 4 to 6 % of a step of 8 images
    (benchmarks/2026-11-25-cpu.md). Layers of other classes are left alone.
    """
    for conv in model.modules():
        if type(conv) is nn.Conv2d and conv.kernel_size == (5, 5) and conv.groups == conv.in_channels:
            if conv.padding == (2, 2) and conv.bias is None:
                conv.__dict__["_conv_forward"] = MethodType(_conv_forward, conv)
    return model


def _conv_forward(self, pixels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    usual = bias is not None or pixels.dtype != torch.float32 or pixels.device.type != "cpu"
    if usual or not torch.is_grad_enabled():
        return nn.Conv2d._conv_forward(self, pixels, weight, bias)
    return _SplitDepthwise.apply(pixels, weight, self.stride[0])


class _SplitDepthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pixels, weight, stride):
        ctx.save_for_backward(pixels, weight)
        ctx.stride = stride
        return torch.conv2d(pixels, weight, None, stride, 2, 1, len(weight))

    @staticmethod
    def backward(ctx, gradient):
        pixels, weight = ctx.saved_tensors
        stride, channels, width = ctx.stride, len(weight), gradient.shape[-1]
        memory_format = torch.channels_last if _is_channels_last(pixels) else torch.contiguous_format
        gradient = gradient.contiguous(memory_format=memory_format)

        def backward(pixels, weight, padding, wanted):
            return torch.ops.aten.convolution_backward(
                gradient, pixels, weight, None, [stride, stride], padding, [1, 1], False, [0, 0], channels, wanted
            )

        of_pixels = backward(pixels, weight, [2, 2], [True, False, False])[0] if ctx.needs_input_grad[0] else None
        padded = nn.functional.pad(pixels, (2, 2, 0, 0))
        left, right = (
            backward(
                padded[..., start : start + stride * (width - 1) + 3].contiguous(memory_format=memory_format),
                weight[..., start : start + 3], [2, 0], [False, True, False],
            )[1]
            for start in (0, 2)
        )  # fmt: skip
        return of_pixels, torch.cat([left, right[..., 1:]], dim=-1), None


def compile_for_inference(model: nn.Module, **settings) -> Callable:
    """`torch.compile` of the folded network as one graph; the first call of every shape compiles, for a minute or two.

    On a CPU the weights are frozen into the graph in the layout that oneDNN wants, convolution and activation in one
    call: 1.5 to 1.9 times as fast as eager. Freezing needs `torch.no_grad()` or `torch.inference_mode()` around every
    call, and later changes of the weights are not seen.

    Args:
        settings: of `torch.compile`, for example `mode="reduce-overhead"` for CUDA graphs.
    """
    compiled = torch.compile(fold_batchnorm(model), fullgraph=True, dynamic=False, **settings)
    if next(model.parameters()).device.type != "cpu":
        return compiled
    from torch._inductor import config  # a second of import that nobody else needs

    def frozen(*args, **kwargs):
        # Not `options={"freezing": True}`: dynamo looks at the global switch before inductor sees its options.
        with config.patch(freezing=True):
            return compiled(*args, **kwargs)

    return frozen


class CudaGraph:
    """A forward pass of one shape recorded once and replayed with a single launch: `logits = graph(pixels)`.

    Without it a batch of one spends its time launching some 240 kernels. The weights may change in place afterwards;
    shape, dtype and memory format of the images may not. The logits are overwritten by the next call.

    Args:
        model: on a CUDA device, in evaluation mode; folded and in the precision it is to run in.
        example: images (N, 3, H, W) on the same device.

    Raises:
        ValueError: no CUDA device, or, when called, images of another shape.
    """

    def __init__(self, model: nn.Module, example: torch.Tensor):
        if example.device.type != "cuda":
            raise ValueError("CUDA graphs need a model and images on a CUDA device.")
        self.pixels = example.clone()
        stream = torch.cuda.Stream(example.device)
        stream.wait_stream(torch.cuda.current_stream(example.device))
        with torch.inference_mode(), torch.cuda.stream(stream):
            for _ in range(3):  # cuDNN chooses its kernels, and the allocator grows, outside the recording
                model(self.pixels)
        torch.cuda.current_stream(example.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(self.graph):
            self.logits = model(self.pixels).logits

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.shape != self.pixels.shape:
            raise ValueError(f"recorded for images {tuple(self.pixels.shape)}, got {tuple(pixels.shape)}.")
        self.pixels.copy_(pixels)
        self.graph.replay()
        return self.logits
