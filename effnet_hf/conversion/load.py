"""From any checkpoint to our configuration and weights: which dialect, which variant, which function."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..checkpoint import read_config_fields, read_processor_fields, require_finite_pixels
from ..configuration import VARIANTS, EfficientNetNVConfig
from ..errors import UserError, first_line, printable
from ..image_processing_efficientnet_nv import EfficientNetNVImageProcessor
from ..modeling_efficientnet_nv import (
    EfficientNetNVBackbone,
    EfficientNetNVForImageClassification,
    EfficientNetNVModel,
    EfficientNetNVPreTrainedModel,
)
from ..multi_label import MULTI_LABEL
from .channels import GREY_NOTE, take_rgb
from .dialect import HEAD, STEM, Dialect, expected_shapes, weight_shapes
from .lukemelas import LUKEMELAS
from .network import find_network
from .nvidia import NVIDIA
from .ours import OURS
from .source import Source, open_source, plain_tensors, state_tensors
from .timm import TIMM
from .torchvision import TORCHVISION
from .trainer_state import TrainerState, trainer_state_of
from .transformers import TRANSFORMERS


DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect for dialect in (NVIDIA, TIMM, TORCHVISION, TRANSFORMERS, LUKEMELAS, OURS)
}
# A file whose best variant leaves more than this share of the layers unmatched is some other network.
_TOO_DIFFERENT = 0.3
_AMAX = "._amax"


@dataclass(frozen=True)
class Converted:
    """A checkpoint in our terms.

    Attributes:
        config, state_dict: of `EfficientNetNVForImageClassification`; the state dict without quantizers' ranges, and
            without a classifier (and last convolution) where the source has none: `config.num_labels` is 0 then.
        processor: the evaluation preprocessing that belongs to the weights.
        dialect: the name of the dialect it came in; `source`: what the user called it; `path`: the weight file.
        difference: how the foreign model differs from ours; `None` when both are the same function (see `exact`).
        notes: one sentence each, for the terminal and the model card.
        quantizer_amax: ranges of a quantized checkpoint's quantizers, by `module.argument`; `config.quantization` then
            says where they stand.
        trainer_state: epoch, best accuracy, optimizer and averaged weights of a training checkpoint.
        warm_start_of: what lent its weights, where this is no conversion but a start for fine-tuning.
        origin: Hub id, if it came from there; `license`: as the Hub or timm states it.
    """

    config: EfficientNetNVConfig
    state_dict: dict[str, torch.Tensor]
    processor: EfficientNetNVImageProcessor
    dialect: str
    source: str
    path: Path
    difference: str | None = None
    notes: tuple[str, ...] = ()
    quantizer_amax: dict[str, torch.Tensor] = field(default_factory=dict)
    trainer_state: TrainerState | None = None
    warm_start_of: str | None = None
    origin: str | None = None
    license: str | None = None

    @property
    def exact(self) -> bool:
        return self.difference is None

    @property
    def verdict(self) -> str:
        """In words, how it relates to what was read."""
        if self.warm_start_of is not None:
            return f"warm-started from {self.warm_start_of}"
        return "the same function" if self.exact else f"NOT the same function: differs by {self.difference}"

    @property
    def can_be_resumed(self) -> bool:
        """Whether `train --resume` can go on with the run that wrote it."""
        return self.trainer_state is not None and self.trainer_state.epoch is not None and not self.quantizer_amax

    @property
    def kind(self) -> type[EfficientNetNVPreTrainedModel]:
        """Of the model: a classifier; without one features, and without their last convolution a backbone."""
        if self.config.num_labels:
            return EfficientNetNVForImageClassification
        return EfficientNetNVModel if f"{HEAD}.weight" in self.state_dict else EfficientNetNVBackbone

    def model(self) -> EfficientNetNVPreTrainedModel:
        """The model with these weights, in evaluation mode.

        Raises:
            UserError: it is quantized and modelopt is not installed.
        """
        try:
            with torch.device("meta"):  # every tensor is replaced, so drawing initial values would be wasted
                model = self.kind(self.config)
        except ImportError as error:
            raise UserError(str(error)) from None
        ranges = {f"{name}_quantizer{_AMAX}": tensor for name, tensor in self.quantizer_amax.items()}
        state = {**self.state_dict, **ranges}
        if self.kind is not EfficientNetNVForImageClassification:
            state = {key.removeprefix("efficientnet."): tensor for key, tensor in state.items()}
        model.load_state_dict(state, strict=True, assign=True)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model.eval()


def find_dialect(tensors: Mapping[str, torch.Tensor]) -> Dialect:
    """The dialect whose names a state dict uses, whatever stands before them.

    Raises:
        UserError: none of them, or more than one; the message lists the candidates.
    """
    return find_network(tensors, DIALECTS.values()).dialect


def find_variant(tensors: Mapping[str, torch.Tensor], dialect: Dialect, where: str) -> str:
    """The named variant whose convolutions and linear layers have these names and shapes.

    Raises:
        UserError: the weights fit none, or several equally well.
    """
    channels = _dimension(tensors, dialect, STEM, 1, 3)
    classifier = f"{dialect.layers['classifier']}.weight"
    weights = sum(key.endswith(".weight") and tensor.dim() > 1 for key, tensor in tensors.items() if key != classifier)
    distances = {}
    for variant in VARIANTS:
        config = EfficientNetNVConfig.from_variant(variant, num_channels=channels)
        names = dialect.module_names(config)
        expected = {f"{names[module]}.weight": shape for module, shape in weight_shapes(config)}
        fitting = sum(key in tensors and tuple(tensors[key].shape[:2]) == shape for key, shape in expected.items())
        distances[variant] = max(len(expected), weights) - fitting
    best = min(distances.values())
    found = [variant for variant, distance in distances.items() if distance == best]
    if best > _TOO_DIFFERENT * weights:
        raise UserError(
            f"{where} has {dialect.title} names but not the shapes of an EfficientNet we know; nearest is {found[0]}, "
            f"where {best} layers differ. Known: {', '.join(VARIANTS)}."
        )
    if len(found) > 1:
        raise UserError(f"{where} fits {' and '.join(found)} equally badly ({best} layers differ).")
    return found[0]


def load_foreign(
    source: str | Path,
    dialect: str = "auto",
    *,
    ema: bool = False,
    prefix: str | None = None,
    arch: str | None = None,
    image_size: int | None = None,
    batch_norm_eps: float | None = None,
    image_mean: list[float] | None = None,
    image_std: list[float] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Converted:
    """Opens any EfficientNet checkpoint and brings it into our terms; see [`open_source`] for what `source` may be.

    Args:
        dialect: `"auto"` or a key of `DIALECTS`.
        ema: take the averaged weights of a training checkpoint.
        prefix: of a file with several networks, take the one whose names begin so.
        arch: settles what names and shapes leave open: a timm architecture, with its tag where the preprocessing
            depends on it (`"tf_efficientnet_b0.ap_in1k"`), or one of our variants.
        image_size: side of the image in pixels, instead of the checkpoint's own or the variant's.
        batch_norm_eps: instead of the dialect's; the weights do not tell it.
        image_mean, image_std: one number, or three, instead of the checkpoint's or the dialect's.
        revision, token: for the Hub.

    Raises:
        UserError: it cannot be opened, is ambiguous, or is not a whole EfficientNet. The `difference` of a checkpoint
            whose model is another function is reported, not raised.
    """
    opened = open_source(str(source), ema=ema, revision=revision, token=token)
    where = opened.path.name
    network = find_network(
        opened.tensors, DIALECTS.values() if dialect == "auto" else [DIALECTS[dialect]], where, prefix, ema
    )
    spoken = network.dialect
    opened, arch, trainer_notes = spoken.as_trained(opened, arch)
    tensors = {name: opened.tensors[key] for key, name in network.keys.items()}
    tensors = plain_tensors(tensors, where, trainer_notes)
    amax = {key: tensors.pop(key) for key in list(tensors) if key.endswith(_AMAX) and spoken in (NVIDIA, OURS)}
    try:
        config, processor = _described(opened, spoken, tensors, arch)
        config = _overridden(config, image_size=image_size, batch_norm_eps=batch_norm_eps)
        if processor is None:
            processor = spoken.processor(config, opened, arch)
        processor = _normalised(processor, image_mean=image_mean, image_std=image_std)
        require_finite_pixels(processor)
        difference = spoken.read_difference(config, opened)
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:  # of values nobody has met yet
        what = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{opened.name}: what lies beside its weights describes no EfficientNet: {what}") from error
    if config.quantization and config.quantization["batch_norm"] == "folded":
        raise UserError(f"{where}: its batch norm is folded into the convolutions, which no other EfficientNet has.")
    try:
        state = spoken.read(tensors, config, where)
    except UserError as error:  # a loss or a metric that was saved beside it
        beside = next((key for key in opened.tensors if not key.startswith(network.prefix)), None)
        if prefix is not None or beside is None:
            raise
        under = printable(network.prefix.rstrip("."))
        raise UserError(f"{error} If {printable(beside)} is no part of it: --prefix {under} leaves it out.") from None
    quantizer_amax = spoken.read_quantizers(amax, config, where)
    trainer_state = None
    if opened.extras and spoken not in (NVIDIA, OURS) or config.num_channels != 3:  # of runs that `train` cannot go on
        left = ", ".join(sorted(printable(key) for key in opened.extras))
        trainer_notes += [f"Left out of the training checkpoint: {left}."] * bool(left)
    else:
        keys = {theirs: ours for ours, theirs in spoken.key_names(config).items()}
        trainer_state, notes = trainer_state_of(opened.extras, list(tensors), keys, expected_shapes(config))
        trainer_notes += notes
    if trainer_state and opened.averaged and not amax:
        try:
            averaged = state_tensors(opened.averaged, where)
            names = find_network(averaged, [spoken], where).keys
            averaged = plain_tensors({name: averaged[key] for key, name in names.items()}, where, [])
            averaged = spoken.read(averaged, config, where)
            trainer_state = replace(trainer_state, averaged=averaged)
        except UserError as error:  # nobody has asked for them: the weights themselves are whole
            trainer_notes.append(f"The averaged weights do not fit and were left out: {error}")
    if config.num_channels == 1:
        trainer_notes.append(GREY_NOTE)
    if not config.num_labels:
        what = "a backbone of feature maps" if spoken.is_backbone(tensors) else "a network of features"
        trainer_notes.append(f"It has no classifier, and none was made up: {what}.")
    state = take_rgb(state, config, processor, where)
    return Converted(
        config=config,
        state_dict=state,
        processor=processor,
        dialect=spoken.name,
        source=opened.name,
        path=opened.path,
        difference=difference,
        notes=(*opened.notes, *network.notes, *spoken.notes(config, opened), *trainer_notes),
        quantizer_amax=quantizer_amax,
        trainer_state=trainer_state,
        origin=opened.origin,
        license=(opened.config.get("pretrained_cfg") or {}).get("license"),
    )


def _described(
    source: Source, dialect: Dialect, tensors: Mapping, arch: str | None
) -> tuple[EfficientNetNVConfig, EfficientNetNVImageProcessor | None]:
    """Our configuration (and processor, if we wrote one down) of the weights."""
    if source.header:
        config = _from_dict(source.header.get("config"), source)
        processor = read_processor_fields(source.header.get("processor") or {})
    elif source.config.get("model_type") == EfficientNetNVConfig.model_type:
        config, processor = _from_dict(source.config, source), None
    else:
        return _found(source, dialect, tensors, arch), None
    if not dialect.has_classifier(tensors):  # a feature model's configuration names classes, too
        config = EfficientNetNVConfig.from_dict(config.to_dict(), num_labels=0)
    return config, processor


def _found(source: Source, dialect: Dialect, tensors: Mapping, arch: str | None) -> EfficientNetNVConfig:
    """Our configuration of weights that do not bring one of ours."""
    variant = find_variant(tensors, dialect, source.path.name)
    if arch is not None and arch in VARIANTS and arch != variant:
        raise UserError(f"{source.name} is a {variant}, not a {arch}.")
    classes = _dimension(tensors, dialect, "classifier", 0, 1000)
    labels = _labels(source, classes) if dialect.has_classifier(tensors) else {"num_labels": 0}
    channels = _dimension(tensors, dialect, STEM, 1, 3)
    fields = {**dialect.fields(variant, source, arch), **labels, "num_channels": channels}
    if source.config.get("problem_type") == MULTI_LABEL:
        fields |= {"problem_type": MULTI_LABEL, "thresholds": source.config.get("thresholds")}
    try:
        return EfficientNetNVConfig.from_variant(variant, **fields)
    except (ValueError, TypeError) as error:
        raise UserError(f"{source.name}: config.json does not describe an EfficientNet: {error}") from error


def _from_dict(fields, source: Source) -> EfficientNetNVConfig:
    try:
        return read_config_fields(fields)
    except Exception as error:  # ours say what is wrong; transformers' are of many kinds
        raise UserError(f"{source.name}: its configuration is damaged: {first_line(error)}") from error


def _overridden(config: EfficientNetNVConfig, **fields) -> EfficientNetNVConfig:
    for name, value in fields.items():
        if value is not None:
            setattr(config, name, value)
    try:
        config.check()
    except ValueError as error:
        raise UserError(str(error)) from error
    return config


def _normalised(processor: EfficientNetNVImageProcessor, **values: list[float] | None) -> EfficientNetNVImageProcessor:
    """With another mean or standard deviation, where one is given: one number for all three channels, or three."""
    given = {name: each * 3 if len(each) == 1 else each for name, each in values.items() if each is not None}
    try:
        return EfficientNetNVImageProcessor.from_dict({**processor.to_dict(), **given}) if given else processor
    except ValueError as error:
        raise UserError(f"--image_mean, --image_std: {first_line(error)}") from None


def _labels(source: Source, num_labels: int) -> dict:
    """Class names: the source's own, or ImageNet's for 1000 classes."""
    names = source.config.get("id2label") or source.config.get("label_names")
    if isinstance(names, dict):
        names = [names[key] for key in sorted(names, key=int)]
    if names and source.config.get("label_descriptions"):
        names = [str(source.config["label_descriptions"].get(name, name)) for name in names]
    generic = not names or list(names) == [f"LABEL_{i}" for i in range(len(names))]
    if generic and num_labels == 1000:
        names, generic = imagenet_names(), False
    if not names or generic or len(names) != num_labels:
        return {"num_labels": num_labels}
    if len(set(names)) < len(names):  # ImageNet has two cranes, and some files call both that
        names = [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names)]
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def imagenet_names() -> list[str]:
    """ImageNet-1k's 1000 class names in the usual order, each once (there are two cranes).

    Raises:
        UserError: timm, which carries them, is not installed.
    """
    try:
        from timm.data import ImageNetInfo
    except ImportError as error:
        raise UserError("ImageNet's class names come with timm: pip install timm") from error
    info = ImageNetInfo("imagenet-1k")
    names = [info.index_to_description(i) for i in range(1000)]
    return [
        name if names.count(name) == 1 else info.index_to_description(i, detailed=True) for i, name in enumerate(names)
    ]


def _dimension(tensors: Mapping, dialect: Dialect, module: str, dimension: int, default: int) -> int:
    weight = tensors.get(f"{dialect.layers[module]}.weight")
    return default if weight is None or weight.dim() <= dimension else weight.shape[dimension]


__all__ = [
    "DIALECTS",
    "HEAD",
    "Converted",
    "find_dialect",
    "find_variant",
    "imagenet_names",
    "load_foreign",
]
