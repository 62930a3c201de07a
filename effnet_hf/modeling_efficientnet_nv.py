"""NVIDIA's EfficientNet as transformers models.

One MBConv block, on a map of C channels (B0, stage 2, first block: C=16, hidden=96, out=24, 112 -> 56 pixels):

    x                       (N,  16, 112, 112)
    expand     1x1, BN, act (N,  96, 112, 112)   absent when the expansion ratio is 1
    depthwise  kxk, BN, act (N,  96,  56,  56)   carries the stride
    se         gate * x     (N,  96,  56,  56)   gate (N, 96, 1, 1) = sigmoid(W2 act(W1 mean(x)))
    project    1x1, BN      (N,  24,  56,  56)   no activation
    + x                                          only when stride is 1 and input and output widths agree

WideSE differs in one number: W1 squeezes to a quarter of the *hidden* channels (96 / 4 = 24) where the plain
network squeezes to a quarter of the block's *input* channels (16 / 4 = 4). That is +0.3 to +0.7 points of ImageNet
top-1 for 60 to 80 % more parameters and no measurable time, by NVIDIA's tables.

Two products of a block are modules of their own (`ScaleByGate`, `ResidualAdd`): they are the places where
quantization-aware training puts quantizers that no layer owns.

This file travels inside every saved checkpoint: it imports only torch, transformers and its flat siblings.
"""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import accumulate
from operator import mul

import torch
from torch import nn
from torch.nn.modules import module as _hooks
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.modeling_utils import PreTrainedModel

from .configuration import EfficientNetNVConfig, StageSpec
from .eager_efficientnet_nv import activation, gate_past_modules, layer_past_modules
from .quantization_efficientnet_nv import (
    GlobalAvgPool2d,
    ResidualAdd,
    SamePad2d,
    ScaleByGate,
    StochasticDepth,
    insert_quantizers,
    may_be_tuple,
    uncalibrated,
)


try:  # transformers >= 5
    from transformers.backbone_utils import BackboneMixin
except ImportError:  # transformers 4.57
    from transformers.utils.backbone_utils import BackboneMixin


class ConvNormAct(nn.Module):
    """Convolution without bias, batch norm, and (unless `activate` is False) the activation."""

    def __init__(
        self, config: EfficientNetNVConfig, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1,
        groups: int = 1, activate: bool = True,
    ):  # fmt: skip
        super().__init__()
        same = config.padding == "same" and kernel_size > 1
        self.pad = SamePad2d(kernel_size, stride) if same else None
        padding = 0 if same else (kernel_size - 1) // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        self.eps = config.batch_norm_eps
        self.bn = nn.BatchNorm2d(out_channels, eps=self.eps, momentum=config.batch_norm_momentum)
        self.act = activation(config) if activate else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pad is not None:
            x = self.pad(x)
        if (quick := layer_past_modules(self, x)) is not None:
            return quick
        x, norm = self.conv(x), self.bn
        if not isinstance(norm, nn.modules.batchnorm._NormBase) and _is_frozen(norm):
            norm = _by_our_epsilon(norm, self.eps)
        return norm(x) if self.act is None else self.act(norm(x))


def _is_frozen(norm: nn.Module) -> bool:
    """Whether a tool, a detector for one, has put its own batch norm there, all of whose tensors are constants."""
    return all([name in norm._buffers for name in ("weight", "bias", "running_mean", "running_var")])


def _normalize(norm: nn.Module, eps: float, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=eps)


def _by_our_epsilon(norm: nn.Module, eps: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a frozen norm does, by our epsilon (that of transformers' detectors is a fixed 1e-5): the norm itself where
    anything has hooks on it, with our arithmetic within them."""
    own, ours = norm.__dict__, partial(_normalize, norm, eps)  # not a lambda: models are copied and pickled
    hooks = norm._forward_pre_hooks or norm._forward_hooks or norm._backward_pre_hooks or norm._backward_hooks
    if not (hooks or _hooks._global_forward_pre_hooks or _hooks._global_forward_hooks or "forward" in own):
        return ours
    place = "_old_forward" if "_old_forward" in own else "forward"  # which accelerate's calls, offloading for one
    if place not in own or getattr(own[place], "__func__", None) is type(norm).forward:
        setattr(norm, place, ours)
    return norm


class SqueezeExcite(nn.Module):
    """Gates every channel by a function of all channels' means.

    The two layers are linear, not the equivalent 1x1 convolutions on a 1x1 map (NVIDIA ships both forms, its newest
    training code uses this one): one matrix product with its bias each, instead of a convolution plus its set-up.
    """

    def __init__(self, config: EfficientNetNVConfig, channels: int, squeeze_channels: int):
        super().__init__()
        self.pool = GlobalAvgPool2d()
        self.reduce = nn.Linear(channels, squeeze_channels)
        self.act = activation(config)
        self.expand = nn.Linear(squeeze_channels, channels)
        self.scale = ScaleByGate()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (quick := gate_past_modules(self, x)) is not None:
            return quick
        gate = self.expand(self.act(self.reduce(self.pool(x).flatten(1)))).sigmoid()
        return self.scale(gate[:, :, None, None], x)


class MBConv(GradientCheckpointingLayer):
    """Inverted bottleneck with squeeze-excite; the drawing at the top of this file gives the shapes."""

    def __init__(
        self, config: EfficientNetNVConfig, in_channels: int, out_channels: int, kernel_size: int, stride: int,
        expand_ratio: int, survival_prob: float,
    ):  # fmt: skip
        super().__init__()
        hidden = in_channels * expand_ratio
        squeeze = config.squeeze_width(in_channels, hidden)
        residual = stride == 1 and in_channels == out_channels
        self.expand = ConvNormAct(config, in_channels, hidden, 1) if expand_ratio != 1 else None
        self.depthwise = ConvNormAct(config, hidden, hidden, kernel_size, stride, groups=hidden)
        self.se = SqueezeExcite(config, hidden, squeeze) if squeeze else None
        self.project = ConvNormAct(config, hidden, out_channels, 1, activate=False)
        drop = residual and survival_prob < 1
        self.stochastic_depth = StochasticDepth(survival_prob, config.stochastic_depth_mode) if drop else None
        self.add = ResidualAdd() if residual else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = x if self.expand is None else self.expand(x)
        branch = self.depthwise(branch)
        if self.se is not None:
            branch = self.se(branch)
        branch = self.project(branch)
        if self.stochastic_depth is not None:
            branch = self.stochastic_depth(branch)
        return branch if self.add is None else self.add(branch, x)


class EfficientNetNVStage(nn.Module):
    """The blocks of one row of the table; the first one changes width and resolution."""

    def __init__(self, config: EfficientNetNVConfig, spec: StageSpec):
        super().__init__()
        self.blocks = nn.ModuleList(
            MBConv(
                config,
                in_channels=spec.out_channels if i else spec.in_channels,
                out_channels=spec.out_channels,
                kernel_size=spec.kernel_size,
                stride=1 if i else spec.stride,
                expand_ratio=spec.expand_ratio,
                survival_prob=survival_prob,
            )
            for i, survival_prob in enumerate(spec.survival_probs)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class EfficientNetNVEncoder(nn.Module):
    """Stem and stages: images (N, 3, S, S) to the list of feature maps [stem, stage1, …, stage7]."""

    def __init__(self, config: EfficientNetNVConfig):
        super().__init__()
        self.stem = ConvNormAct(config, config.num_channels, config.stem_width, kernel_size=3, stride=2)
        self.stages = nn.ModuleList(EfficientNetNVStage(config, spec) for spec in config.stages)

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        maps = [self.stem(pixel_values)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps


class EfficientNetNVPreTrainedModel(PreTrainedModel):
    config_class = EfficientNetNVConfig
    config: EfficientNetNVConfig
    base_model_prefix = "efficientnet"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["MBConv"]

    def __init__(self, config: EfficientNetNVConfig, *args, **kwargs):
        config.check()  # fields may have been set since the configuration was made
        super().__init__(config, *args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.encoder.stem

    def post_init(self):
        quantizers = insert_quantizers(self, self.config.quantization)
        super().post_init()
        # Ranges keep their precision whatever dtype the weights are loaded in. (Not as a class attribute: transformers
        # then looks for the modules among the parameters only.)
        if quantizers:
            self._keep_in_fp32_modules_strict = set(quantizers)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Kaiming normal for convolutions, PyTorch's own defaults for linear layers, 1 and 0 for batch norm."""
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=self.config.conv_init, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            module.reset_parameters()
        elif isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                nn.init.ones_(tensor)  # type: ignore[arg-type]  # every batch norm here has all five
            for tensor in (module.bias, module.running_mean, module.num_batches_tracked):
                nn.init.zeros_(tensor)  # type: ignore[arg-type]
        elif hasattr(module, "_amax"):
            nn.init.constant_(module._amax, float("nan"))

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers, but a quantized model without the ranges of its quantizers is refused."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        missing = uncalibrated(model) if model.config.quantization else []
        if missing:
            raise ValueError(f"{len(missing)} quantizers of this checkpoint have no range, e.g. {missing[0]}.")
        return loaded

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, **kwargs):
        """Recomputes a block without updating batch norm's running statistics a second time."""
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)
        for block in self.modules():
            if isinstance(block, MBConv):
                # not a lambda: models are copied and pickled
                block._gradient_checkpointing_func = partial(_checkpointed, gradient_checkpointing_func, block)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers, but config.json names every class of this file, not only the saved one: the folder opens
        as classifier, feature model and backbone alike, also where this package is not installed."""
        classes = (EfficientNetNVModel, EfficientNetNVForImageClassification, EfficientNetNVBackbone)
        auto_map = {model._auto_class: f"modeling_efficientnet_nv.{model.__name__}" for model in classes}
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **auto_map}
        super().save_pretrained(save_directory, *args, **kwargs)


def _checkpointed(func, block: MBConv, *args):
    if torch.compiler.is_compiling():  # a compiled block updates the statistics in its forward graph only
        return func(*args, use_reentrant=False)
    return func(*args, use_reentrant=False, context_fn=lambda: (nullcontext(), _frozen_statistics(block)))


@contextmanager
def _frozen_statistics(block: MBConv):
    # By momentum 0, not by track_running_stats: the recomputation has to save the same tensors as the forward pass.
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    settings = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, setting in zip(norms, settings):
            norm.momentum, norm.num_batches_tracked = setting


class EfficientNetNVModel(EfficientNetNVPreTrainedModel):
    """Features, no classifier: `last_hidden_state` (N, hidden_dim, S/32, S/32), `pooler_output` (N, hidden_dim)."""

    _auto_class = "AutoModel"

    def __init__(self, config: EfficientNetNVConfig):
        super().__init__(config)
        self.encoder = EfficientNetNVEncoder(config)
        self.head = ConvNormAct(config, config.hidden_sizes[-1], config.hidden_dim, kernel_size=1)
        self.pooler = nn.AdaptiveAvgPool2d(1)
        self.post_init()

    @may_be_tuple
    def forward(
        self, pixel_values: torch.FloatTensor | None = None, output_hidden_states: bool | None = None, **kwargs
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """
        Args:
            pixel_values: normalised images, (N, num_channels, height, width).
            output_hidden_states: also return `hidden_states`: the stem's and every stage's feature map.
        """
        _check_pixels(pixel_values, self.config)
        maps = self.encoder(pixel_values)
        features = self.head(maps[-1])
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=features,
            pooler_output=self.pooler(features).flatten(1),
            hidden_states=tuple(maps) if _wanted(output_hidden_states, self.config) else None,
        )


class EfficientNetNVForImageClassification(EfficientNetNVPreTrainedModel):
    """EfficientNet with dropout and a linear classifier on the pooled features."""

    _auto_class = "AutoModelForImageClassification"
    accepts_loss_kwargs = False

    def __init__(self, config: EfficientNetNVConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.efficientnet = EfficientNetNVModel(config)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.classifier = nn.Linear(config.hidden_dim, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    @may_be_tuple
    def forward(
        self, pixel_values: torch.FloatTensor | None = None, labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None, **kwargs,
    ) -> ImageClassifierOutputWithNoAttention:  # fmt: skip
        """
        Args:
            pixel_values: normalised images, (N, num_channels, height, width).
            labels: class indices (N,) for one label per image, floats (N, num_labels) for several, floats (N,) for
                regression; `config.problem_type` decides, or their type does.

        In evaluation mode the logits are divided by `config.softmax_temperature`, where there is one.
        """
        outputs = self.efficientnet(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
        logits = self.classifier(self.dropout(outputs.pooler_output))
        if not self.training and self.config.softmax_temperature is not None:
            logits = logits / self.config.softmax_temperature
        loss = None if labels is None else self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class EfficientNetNVBackbone(BackboneMixin, EfficientNetNVPreTrainedModel):
    """Feature maps for detectors and segmenters: `stem`, `stage1`…`stage7` at strides 2, 2, 4, 8, 16, 16, 32, 32.

    The original's `extract_features` calls stage n `layer{n}`.
    """

    _auto_class = "AutoBackbone"
    has_attentions = False
    _keys_to_ignore_on_load_unexpected = [r"^(efficientnet\.)?head\.", r"^classifier\."]

    def __init__(self, config: EfficientNetNVConfig):
        super().__init__(config)
        if hasattr(self, "_init_backbone"):  # transformers 4.57; later versions do it in BackboneMixin.__init__
            self._init_backbone(config)
        self.num_features = config.hidden_sizes
        self.encoder = EfficientNetNVEncoder(config)
        self.post_init()

    @classmethod
    def for_detection(cls, name: str, out_features: list[str] | None = None, **kwargs) -> "EfficientNetNVBackbone":
        """The pretrained backbone of a folder or Hub id with the maps that detectors take, in evaluation mode.

        Args:
            out_features: the stages; by default the last one at each of the strides 8, 16 and 32.
            kwargs: as for `from_pretrained`. Of a `config` the stages are not asked.

        Raises:
            ValueError: weights are missing, or it has no stage of one of these strides, or it is quantized.
        """
        with_report = kwargs.pop("output_loading_info", False)
        backbone, report = cls.from_pretrained(name, output_loading_info=True, **kwargs)
        if missing := sorted(key for key in report["missing_keys"] if "num_batches_tracked" not in key):
            raise ValueError(f"{name} lacks {len(missing)} weights of the backbone, e.g. {missing[0]}.")
        if backbone.config.quantization:
            raise ValueError(f"{name} is quantized, and detectors have no quantizers; name the float one.")
        if not out_features and kwargs.get("out_indices") is None:
            last = {stride: stage for stage, stride in backbone.strides.items()}
            if not {8, 16, 32} <= last.keys():
                raise ValueError(f"{name} has strides {backbone.strides}, not 8, 16 and 32; say out_features=[…].")
            out_features = [last[stride] for stride in (8, 16, 32)]
        if out_features:
            backbone.out_features = backbone.config.out_features = list(out_features)
        return (backbone, report) if with_report else backbone  # type: ignore[return-value]  # only who asks has two

    @property
    def strides(self) -> dict[str, int]:
        """Pixels of the input per step of each stage's map."""
        return dict(zip(self.stage_names, accumulate(self.config.strides, mul, initial=2)))

    @may_be_tuple
    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool | None = None, **kwargs) -> BackboneOutput:
        """Returns the maps of `config.out_features`, in order; see [`EfficientNetNVModel`] for the arguments."""
        _check_pixels(pixel_values, self.config)
        maps = self.encoder(pixel_values)
        chosen = tuple(map_ for name, map_ in zip(self.stage_names, maps) if name in self.out_features)
        hidden_states = tuple(maps) if _wanted(output_hidden_states, self.config) else None
        return BackboneOutput(feature_maps=chosen, hidden_states=hidden_states)


def _wanted(output_hidden_states: bool | None, config: EfficientNetNVConfig) -> bool:
    return config.output_hidden_states if output_hidden_states is None else output_hidden_states


def _check_pixels(pixel_values: torch.Tensor | None, config: EfficientNetNVConfig) -> None:
    if isinstance(pixel_values, torch.fx.Proxy):  # which stands for pixels and has no shape
        return
    shape = None if pixel_values is None else tuple(pixel_values.shape)
    if shape is None or len(shape) != 4 or shape[1] != config.num_channels:
        raise ValueError(f"pixel_values must have shape (N, {config.num_channels}, height, width), got {shape}.")


__all__ = [
    "EfficientNetNVBackbone",
    "EfficientNetNVForImageClassification",
    "EfficientNetNVModel",
    "EfficientNetNVPreTrainedModel",
]
