"""timm's `efficientnet_*` (symmetric padding) and `tf_efficientnet_*` (TensorFlow's "SAME" padding), B and Lite.

Both families have the same names and the same shapes and are different functions: what tells them apart is the
architecture's name, which timm writes to `config.json` and not into the weights. WideSE has timm's names but no
architecture that `timm.create_model` can build.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

from PIL import Image

from ..configuration import EfficientNetNVConfig
from ..errors import UserError, printable
from ..image_processing_efficientnet_nv import EfficientNetNVImageProcessor
from ..reading import short
from .dialect import Dialect, has_class_names, named_variant, three
from .source import Source, check_fields


# prefix of the architecture: (our padding, batch norm epsilon), timm/models/efficientnet.py
_FAMILIES = {"efficientnet_": ("symmetric", 1e-5), "tf_efficientnet_": ("same", 1e-3)}
# model_args that the weights' shapes tell, or that change nothing in evaluation
_HARMLESS = ("num_classes", "in_chans", "global_pool", "drop_rate", "drop_path_rate")
# of a pretrained_cfg: how images are prepared
_EVALUATION = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
_FILTERS = {filter_.name.lower(): filter_ for filter_ in Image.Resampling}


class Timm(Dialect):
    name = "timm"
    title = "timm's"
    builder = "timm.create_model"
    families = ("b", "lite")
    paddings = ("symmetric", "same")
    layers = {
        "efficientnet.encoder.stem.conv": "conv_stem",
        "efficientnet.encoder.stem.bn": "bn1",
        "efficientnet.head.conv": "conv_head",
        "efficientnet.head.bn": "bn2",
        "classifier": "classifier",
    }
    block = "blocks.{stage}.{block}"
    expanded = {
        "expand.conv": "conv_pw",
        "expand.bn": "bn1",
        "depthwise.conv": "conv_dw",
        "depthwise.bn": "bn2",
        "se.reduce": "se.conv_reduce",
        "se.expand": "se.conv_expand",
        "project.conv": "conv_pwl",
        "project.bn": "bn3",
    }
    unexpanded = {
        "depthwise.conv": "conv_dw",
        "depthwise.bn": "bn1",
        "se.reduce": "se.conv_reduce",
        "se.expand": "se.conv_expand",
        "project.conv": "conv_pw",
        "project.bn": "bn2",
    }

    def as_trained(self, source: Source, arch: str | None) -> tuple[Source, str | None, list[str]]:
        """timm's train.py writes the architecture, and as `args` how it built it and evaluated images."""
        args = source.trainer.get("args", {})
        args = args if isinstance(args, Mapping) else {}
        trained = arch or source.trainer.get("arch")
        if source.config or not source.trainer or not (isinstance(trained, str) and trained.startswith((*_FAMILIES,))):
            return source, arch, []
        side, built = args.get("img_size"), args.get("model_kwargs")
        said = {name: args.get(name) for name in ("input_size", *_EVALUATION[1:])}
        said["input_size"] = said["input_size"] or (side and [3, side, side])
        said = {name: list(value) if isinstance(value, tuple) else value for name, value in said.items() if value}
        eps = args.get("bn_eps")
        eps = 1e-3 if eps is None and args.get("bn_tf") is True else eps  # of timm before 1.0
        check_fields({**said, "bn_eps": eps}, f"{source.name}: args")
        known = _known(trained, source)
        config = {
            "architecture": trained.split(".")[0],
            "pretrained_cfg": {name: known[name] for name in _EVALUATION if name in known} | said,
            "model_args": {
                **({"bn_eps": eps} if eps is not None else {}),
                **({"global_pool": args["gp"]} if args.get("gp") else {}),
                **(built if isinstance(built, Mapping) else {}),
            },
        }
        note = f"The architecture, {printable(trained)}, and the preprocessing are those that timm's trainer wrote."
        return replace(source, config=config), None, [note]

    def fields(self, variant: str, source: Source, arch: str | None) -> dict:
        arch, pretrained, arguments = _architecture(variant, source, arch)
        padding, eps = _FAMILIES["tf_efficientnet_" if arch.startswith("tf_") else "efficientnet_"]
        unknown = {name for name in arguments if name not in _HARMLESS} - {"bn_eps"}
        if unknown or arguments.get("global_pool", "avg") != "avg":
            names = ", ".join(sorted(map(printable, unknown or ["global_pool"])))
            raise UserError(f"{source.name} builds {arch} with {names}, which ours does not have.")
        check_fields(arguments, f"{source.name}: the arguments of its model")
        size = pretrained.get("input_size")
        return {
            "padding": padding,
            "batch_norm_eps": arguments.get("bn_eps") or eps,
            "batch_norm_momentum": 0.1,
            "stochastic_depth_mode": "row",
            **({"image_size": size[-1]} if size else {}),
        }

    def processor(self, config: EfficientNetNVConfig, source: Source, arch: str | None) -> EfficientNetNVImageProcessor:
        pretrained = _architecture(str(config.variant), source, arch)[1]
        return EfficientNetNVImageProcessor(
            size=math.floor(config.image_size / pretrained.get("crop_pct", 0.875)),
            crop_size=config.image_size,
            resample=_FILTERS.get(str(pretrained.get("interpolation")), Image.Resampling.BICUBIC),
            image_mean=three(pretrained.get("mean")),
            image_std=three(pretrained.get("std")),
        )

    def notes(self, config: EfficientNetNVConfig, source: Source) -> list[str]:
        pretrained, notes = _pretrained(source.config), []
        mode, size = pretrained.get("crop_mode", "center"), pretrained.get("input_size") or [3, 0, 0]
        if mode != "center":
            notes.append(f"timm evaluates these weights with crop mode {short(mode)}; this processor crops the centre.")
        if size[1] != size[2]:
            notes.append(
                f"timm evaluates these weights on images {size[1]} pixels high and {size[2]} wide; this processor makes"
                f" squares of {config.image_size} (--image_size says another side)."
            )
        return notes

    def arguments(self, config: EfficientNetNVConfig) -> dict:
        """What `timm.create_model` needs besides the architecture's name."""
        eps = _FAMILIES["tf_efficientnet_" if config.padding == "same" else "efficientnet_"][1]
        return {} if config.batch_norm_eps == eps else {"bn_eps": config.batch_norm_eps}

    def loading(self, config: EfficientNetNVConfig, path: str) -> str:
        if not path.endswith((".pth", ".pt", ".pth.tar", ".safetensors")):  # a folder says the rest itself
            return f'timm.create_model("local-dir:{path}", pretrained=True)'
        arguments = "".join(f", {name}={value:g}" for name, value in self.arguments(config).items())
        if config.num_labels != 1000:
            arguments += f", num_classes={config.num_labels}"
        return f'timm.create_model("{_arch(config)}"{arguments}, checkpoint_path="{path}")'

    def folder_config(self, config: EfficientNetNVConfig, processor: EfficientNetNVImageProcessor) -> dict:
        """The `config.json` of a timm folder, for `timm.create_model("local-dir:…")`, the Hub, and transformers."""
        names = [config.id2label[i] for i in range(config.num_labels)]
        return {
            "architecture": _arch(config),
            "num_classes": config.num_labels,
            **({"label_names": names} if has_class_names(config) else {}),
            # which transformers' wrapper of timm's models asks for
            **({"problem_type": config.problem_type} if config.problem_type else {}),
            "num_features": config.hidden_dim,
            "model_args": self.arguments(config),
            "pretrained_cfg": {
                "input_size": [3, config.image_size, config.image_size],
                "interpolation": Image.Resampling(processor.resample).name.lower(),
                # timm computes floor(size / crop_pct); a hair less than the ratio keeps our size.
                "crop_pct": config.image_size / (processor.size["shortest_edge"] + 0.5),
                "crop_mode": "center",
                "mean": processor.image_mean,
                "std": processor.image_std,
                "num_classes": config.num_labels,
                "pool_size": [config.image_size // 32] * 2,
                "first_conv": "conv_stem",
                "classifier": "classifier",
            },
        }


def _arch(config: EfficientNetNVConfig) -> str:
    prefix = "tf_efficientnet_" if config.padding == "same" else "efficientnet_"
    return prefix + (named_variant(config) or str(config.variant)).replace("-", "_")


def _architecture(variant: str, source: Source, arch: str | None) -> tuple[str, dict, dict]:
    """Name, pretrained_cfg and model_args of the timm architecture the weights belong to."""
    candidates = [prefix + variant.replace("-", "_") for prefix in _FAMILIES]
    arguments: dict
    if arch is not None:
        found, pretrained, arguments = arch.split(".")[0], _known(arch, source), {}
    elif "architecture" in source.config:
        found, pretrained = source.config["architecture"], _pretrained(source.config)
        arguments = source.config.get("model_args") or {}
    else:
        raise UserError(
            f"{source.name} has timm's names and no config.json, and they fit two different functions: "
            f'--arch {candidates[0]} (symmetric padding) or --arch {candidates[1]} (TensorFlow\'s "SAME" padding).'
        )
    if found not in candidates:
        raise UserError(
            f"{source.name}: {found} does not fit the weights, which have the shapes of {' or '.join(candidates)}."
        )
    return found, pretrained, arguments


def _pretrained(config: dict) -> dict:
    """timm's pretrained_cfg; folders of before timm 0.9 have its fields at the top of config.json."""
    return config.get("pretrained_cfg") or (config if "input_size" in config else {})


def _known(arch: str, source: Source) -> dict:
    """timm's own settings of `architecture` or `architecture.tag`."""
    try:
        import timm
    except ImportError as error:
        raise UserError(f"The preprocessing of {arch} is known to timm only: pip install timm") from error
    known = timm.get_pretrained_cfg(arch, allow_unregistered=True)
    if known is None:
        raise UserError(
            f"{source.name}: timm knows no architecture {arch}; timm.list_models('*efficientnet*') lists them."
        )
    return known.to_dict()


TIMM = Timm()
