"""The same function, faster: what may be done to a network once it is known where and how it will run.

    model = fold_batchnorm(model)              # inference anywhere: 49 of B0's 98 large layers are gone
    model = compile_for_inference(model)       # folded and compiled as one graph
    run = CudaGraph(model, example)            # inference of one shape on a GPU, one launch a batch
    use_onednn(model, image_size)              # training and inference of small batches on a CPU; `train.py` does it

These are functions of the package, not methods of the model: the model file travels in every checkpoint and holds what
the network *is*.
"""

import copy
from types import MethodType

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .modeling_efficientnet_nv import ConvNormAct


IN_PLACE = {"silu": nn.SiLU, "swish": nn.SiLU, "relu": nn.ReLU, "relu6": nn.ReLU6}


@torch.no_grad()
def fold_batchnorm(model: nn.Module) -> nn.Module:
    """A copy for inference in which every convolution has taken over the scale and shift of its batch norm.

    With k = gamma / sqrt(var + eps): weight * k, bias = beta - mean * k, computed in float64 and rounded once, so
    logits differ by rounding only. Activations then work in place, since nothing waits for a backward pass. Layers of
    other classes (quantized ones) are left as they are. Fold before casting to fp16 or bf16.

    The copy is in evaluation mode, has no gradients, and refuses `train()` and `save_pretrained`: its parameters are
    no longer those that `config.json` describes.
    """
    folded = copy.deepcopy(model).eval().requires_grad_(False)
    for layer in folded.modules():
        if not isinstance(layer, ConvNormAct):
            continue
        conv, bn = layer.conv, layer.bn
        if type(conv) is nn.Conv2d and type(bn) is nn.BatchNorm2d:
            dtype = conv.weight.dtype
            weight, bias = fuse_conv_bn_weights(
                conv.weight.double(), None if conv.bias is None else conv.bias.double(), bn.running_mean.double(),
                bn.running_var.double(), bn.eps, bn.weight.double(), bn.bias.double(),
            )  # fmt: skip
            memory_format = torch.channels_last if _is_channels_last(conv.weight) else torch.contiguous_format
            conv.weight = nn.Parameter(weight.to(dtype, memory_format=memory_format), requires_grad=False)
            conv.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
            layer.bn = nn.Identity()
        if layer.act is not None and model.config.hidden_act in IN_PLACE:
            layer.act = IN_PLACE[model.config.hidden_act](inplace=True)
    folded.train, folded.save_pretrained = MethodType(_stay_in_evaluation, folded), MethodType(_refuse_saving, folded)
    return folded


def _is_channels_last(weight: torch.Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def _stay_in_evaluation(self, mode: bool = True):
    if mode:
        raise ValueError("this network's batch norm is folded away, so it cannot be trained; train the original.")
    return self


def _refuse_saving(self, *args, **kwargs):
    raise ValueError("this network's batch norm is folded away; save the original, and fold after loading.")


def use_onednn(model: nn.Module, image_size: int) -> nn.Module:
    """In place, for a CPU: sends the 1x1 convolutions of fp32 batches of 2 to 15 pictures to oneDNN.

    On one thread and below 16 pictures torch gives them to its own im2col and the BLAS (`ConvParams::use_mkldnn` in
    aten/src/ATen/native/Convolution.cpp), unless they are dilated. A 1x1 kernel has no neighbours to move apart, so a
    dilation of 2 changes nothing but that choice: 1.2 to 1.3x in a training step of 8 pictures, 1.4x in inference.
    Pictures below 96 pixels are left alone, because their maps are too small to pay for oneDNN's set-up.
    """
    for module in model.modules() if image_size >= 96 else ():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1:
            module.dilation = (2, 2)
    return model


def compile_for_inference(model: nn.Module, **settings) -> nn.Module:
    """`torch.compile` of the folded network as one graph; the first call of every shape compiles, for a minute or two.

    On a CPU the weights are frozen into the graph in the layout that oneDNN wants, which needs `torch.no_grad()` or
    `torch.inference_mode()` around every call and gives most of the gain.

    Args:
        settings: of `torch.compile`, for example `mode="reduce-overhead"` for CUDA graphs.
    """
    parameter = next(model.parameters())
    if parameter.device.type == "cpu" and "mode" not in settings:
        settings.setdefault("options", {"freezing": True})
    return torch.compile(fold_batchnorm(model), fullgraph=True, dynamic=False, **settings)


class CudaGraph:
    """A forward pass of one shape recorded once and replayed with a single launch: `logits = graph(pixels)`.

    Without it a batch of one spends its time launching some 240 kernels. The weights may change in place afterwards;
    shape, dtype and memory format of the pictures may not. The logits are overwritten by the next call.

    Args:
        model: on a CUDA device, in evaluation mode; folded and in the precision it is to run in.
        example: pictures (N, 3, H, W) on the same device.

    Raises:
        ValueError: no CUDA device, or, when called, pictures of another shape.
    """

    def __init__(self, model: nn.Module, example: torch.Tensor):
        if example.device.type != "cuda":
            raise ValueError("CUDA graphs need a model and pictures on a CUDA device.")
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
            raise ValueError(f"recorded for pictures {tuple(self.pixels.shape)}, got {tuple(pixels.shape)}.")
        self.pixels.copy_(pixels)
        self.graph.replay()
        return self.logits
