"""Writing a converted checkpoint: as a folder of ours, or in a foreign dialect."""

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save as safetensors_bytes
from safetensors.torch import save_file

from ..configuration import EfficientNetNVConfig
from ..errors import UserError
from ..files import atomic_folder, atomic_write, refuse_to_remove, require_place
from ..hub import CardFacts, describe_preprocessing, render_card, software_versions
from ..modeling_efficientnet_nv import EfficientNetNVForImageClassification
from ..multi_label import is_multi_label
from ..quantization_efficientnet_nv import quantizers
from ..quiet import no_progress_bars
from .load import DIALECTS, Converted
from .nvidia import NVIDIA
from .source import HEADER_KEY
from .timm import TIMM
from .trainer_state import write_trainer_state
from .transformers import TRANSFORMERS


FOREIGN = tuple(name for name in DIALECTS if name != "effnet_hf")
_FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".pth.tar")


def to_foreign(model: EfficientNetNVForImageClassification, dialect: str) -> dict[str, torch.Tensor]:
    """The model's state dict under a dialect's names and in its shapes, bit for bit.

    Whether the foreign model computes the same is another question: `DIALECTS[dialect].difference(model.config)`. The
    ranges of quantizers go with it where there is a place for them (`"nvidia"`).
    """
    ranges = {name: quantizer._amax for name, quantizer in quantizers(model).items()}
    weights = {key: tensor for key, tensor in model.state_dict().items() if not key.endswith("._amax")}
    state = DIALECTS[dialect].write(weights, model.config)
    if ranges and dialect == NVIDIA.name:
        state.update(NVIDIA.write_quantizers(ranges, model.config))
    return {key: tensor.contiguous() for key, tensor in state.items()}


def write_folder(
    converted: Converted,
    folder: str | Path,
    *,
    force: bool = False,
    overwrite: bool = False,
    command: str | None = None,
    model_id: str | None = None,
) -> None:
    """Writes a checkpoint folder that `from_pretrained` opens: configuration, weights, image processor, model card,
    modelling code; and `trainer_state.safetensors` where the source was a training checkpoint.

    Args:
        force: also when the source's model is another function; the card then says so.
        overwrite: replace an existing folder.
        command, model_id: for the model card.

    Raises:
        UserError: the source's model is another function and `force` is False, or the folder cannot be written.
    """
    _refuse(converted.difference, converted.source, force)
    if overwrite:
        refuse_to_remove(folder, {"the source": converted.path})
    with atomic_folder(folder, overwrite) as temporary, no_progress_bars():
        model = converted.model()
        model.config.architectures = [type(model).__name__]
        model.save_pretrained(temporary)
        converted.processor.save_pretrained(temporary)
        if converted.trainer_state:
            write_trainer_state(converted.trainer_state, temporary)
        card = render_card(_facts(converted, command, model_id))
        (temporary / "README.md").write_text(card, encoding="utf-8")


def check_output(dialect: str | None, output: str | Path, overwrite: bool = False) -> None:
    """Looks at the place to write to, before what takes minutes.

    Args:
        dialect: of [`write_foreign`], or None for [`write_folder`].

    Raises:
        UserError: something is there and `overwrite` is False, or the dialect's weights are a file and this is none.
    """
    output = Path(output)
    if dialect is None or not output.name.endswith(_FILE_SUFFIXES):
        if dialect is not None and DIALECTS[dialect] not in (TIMM, TRANSFORMERS):
            raise UserError(
                f"--output_dir {output}: {dialect} weights are one file; end its name in .pth or .safetensors."
            )
        require_place(output, overwrite)
    elif output.exists() and not overwrite:
        raise UserError(f"{output} already exists; name another file, or add --overwrite (in Python overwrite=True).")


def write_foreign(
    converted: Converted, dialect: str, output: str | Path, *, force: bool = False, overwrite: bool = False
) -> str:
    """Writes the weights in a dialect, as a file (`.safetensors`, `.pth`) or, for timm and transformers, a folder that
    their own loaders open, and returns the line that opens it there.

    Args:
        force: also when no model of theirs is the same function.
        overwrite: replace what is there.

    Raises:
        UserError: no model of theirs is the same function and `force` is False, or it cannot be written.
    """
    spoken, config, output = DIALECTS[dialect], converted.config, Path(output)
    if not config.num_labels:
        raise UserError(f"{converted.source} has no classifier, and --to {dialect} writes classifiers only.")
    difference = converted.difference or spoken.difference(config)
    _refuse(difference, converted.source, force)
    if overwrite:
        refuse_to_remove(output, {"the source": converted.path})
    check_output(dialect, output, overwrite)
    if config.softmax_temperature is not None:
        converted = _without_temperature(converted)
        config = converted.config
    state = to_foreign(converted.model(), dialect)
    if output.name.endswith(_FILE_SUFFIXES):
        with atomic_write(output, "wb") as handle:
            if output.suffix == ".safetensors":
                handle.write(safetensors_bytes(state, metadata=_header(converted)))
            else:
                buffer = io.BytesIO()  # torch's own writer ends the process when a disk is full
                torch.save(state, buffer)
                handle.write(buffer.getbuffer())
    else:
        with atomic_folder(output, overwrite) as folder:
            if spoken is TIMM:
                described = TIMM.folder_config(config, converted.processor)
                (folder / "config.json").write_text(json.dumps(described, indent=2))
            else:
                TRANSFORMERS.folder_config(config).save_pretrained(folder)
                TRANSFORMERS.folder_processor(converted.processor).save_pretrained(folder)
            save_file(state, folder / "model.safetensors", metadata=_header(converted))
    return spoken.loading(config, str(output)) if difference is None else f"no {dialect} model is this function"


def _without_temperature(converted: Converted) -> Converted:
    """The same function where nobody divides logits: the classifier's weights and bias are divided beforehand."""
    config = EfficientNetNVConfig.from_dict(converted.config.to_dict())
    by, config.softmax_temperature = converted.config.softmax_temperature, None
    assert by is not None
    state, ranges = dict(converted.state_dict), dict(converted.quantizer_amax)
    for name in ("classifier.weight", "classifier.bias"):
        state[name] = state[name] / by
    if (name := "classifier.weight") in ranges:  # a grid of quantized weights shrinks along
        ranges[name] = ranges[name] / by
    return replace(converted, config=config, state_dict=state, quantizer_amax=ranges)


def _refuse(difference: str | None, source: str, force: bool) -> None:
    if difference is not None and not force:
        raise UserError(f"{source} refused: differs by {difference}. --force writes it all the same.")


def _header(converted: Converted) -> dict[str, str]:
    """Our configuration and preprocessing for the header of a safetensors file, so that it converts back exactly."""
    ours = {"config": _described(converted.config), "processor": converted.processor.to_dict()}
    return {"format": "pt", HEADER_KEY: json.dumps(ours)}


def _described(config: EfficientNetNVConfig) -> dict:
    return {key: value for key, value in config.to_diff_dict().items() if key not in ("auto_map", "architectures")}


def _facts(converted: Converted, command: str | None, model_id: str | None) -> CardFacts:
    config, dialect = converted.config, DIALECTS[converted.dialect]
    with open(converted.path, "rb") as handle:
        digest = (
            hashlib.file_digest(handle, "sha256") if hasattr(hashlib, "file_digest") else hashlib.sha256(handle.read())
        )
    verdict = f"Converted from {dialect.title} names; the same function as the original."
    if converted.warm_start_of is not None:
        verdict = f"Not a conversion: its weights are {converted.warm_start_of}'s, in another network."
    elif not converted.exact:
        verdict = f"Converted from {dialect.title} names, but NOT the same function: differs by {converted.difference}."
    notes = [verdict, *converted.notes]
    if converted.quantizer_amax:
        notes.append(f"Quantized to int8: {len(converted.quantizer_amax)} quantizers with their calibrated ranges.")
    return CardFacts(
        name=f"EfficientNet {config.variant or 'of a custom shape'}, converted from {converted.path.name}",
        model_id=model_id,
        variant=config.variant or "custom",
        num_labels=config.num_labels,
        multi_label=is_multi_label(config),
        bit_depth=converted.processor.bit_depth,
        image_size=config.image_size,
        preprocessing=describe_preprocessing(converted.processor),
        base_model=converted.origin or f"{converted.path.name} (sha256 {digest.hexdigest()})",
        license=converted.license,
        command=command,
        versions=software_versions("effnet-hf", "timm", "safetensors"),
        notes=notes,
        tags=["converted", "int8"] if converted.quantizer_amax else ["converted"],
    )
