"""What `qat` puts in front of the training loop: measure in float, insert quantizers, calibrate, measure again.

train(recipe, quantization=Quantization(recipe))
"""

from itertools import islice

import torch

from ..errors import UserError
from ..multi_label import figure_names, shown
from ..recipes import Recipe
from ..run_folder import RunFolder
from ..tables import text_table
from ..training import validate
from .calibrate import calibrate
from .insert import check_settings, quantize, set_quantizers
from .report import figures_of, load_figures, model_bytes, rows, save_figures
from .sensitivity import sensitivity, short_name, take, write_report


class Quantization:
    """Prepares a model for quantization-aware training as a recipe says, and reports at the end.

    Raises:
        UserError: the recipe has no placement or no model to start from, or its options contradict each other.
    """

    def __init__(self, recipe: Recipe):
        if recipe.placement == "none":
            raise UserError(
                f"the recipe {recipe.name} quantizes nothing; add --placement nvidia, or start from quant-b0."
            )
        if recipe.model is None:
            raise UserError("quantization starts from a trained model; give --model FOLDER.")
        if recipe.sync_batch_norm and (recipe.placement == "cpu" or recipe.qat_batch_norm != "train"):
            raise UserError("--sync_batch_norm goes with --placement nvidia and --qat_batch_norm train only.")
        self.recipe = recipe
        self.figures: dict[str, dict] = {}

    def prepare(self, model, loaders, accelerator, report, resuming: bool):
        """Inserts and calibrates, in place. A run that resumes gets its ranges from its checkpoint."""
        recipe = self.recipe
        if resuming:
            if model.config.quantization is None:
                quantize(model, **self.settings())
            return model
        self.check(model)
        already = model.config.quantization is not None
        if already:
            set_quantizers(model, False)
        results = validate(model, loaders.val, accelerator, recipe.top_k, choose_thresholds=True)
        self.figures["float"] = figures_of(results, model_bytes(model, quantized=False))
        self.names = figure_names(model.config, recipe.top_k)
        report.line(f"float    {shown(self.names[0])} {results[self.names[0]]:.2f} %, loss {results['loss']:.4f}")
        if already:
            set_quantizers(model, True)
        else:
            quantize(model, **self.settings())
        if not recipe.skip_calibration:
            self.calibrate(model, loaders.train, accelerator, report)
        results = validate(model, loaders.val, accelerator, recipe.top_k, choose_thresholds=True)
        self.figures["ptq"] = figures_of(results, model_bytes(model))
        title = "as is  " if recipe.skip_calibration else "PTQ    "
        report.line(f"{title}  {shown(self.names[0])} {results[self.names[0]]:.2f} %, loss {results['loss']:.4f}")
        if accelerator.is_main_process:
            save_figures(RunFolder(recipe.output_dir), self.figures)
        if recipe.sensitivity != "none":
            self.report_sensitivity(model, loaders.val, accelerator, report)
        return model

    def check(self, model) -> None:
        """Raises `UserError` for what cannot be done to this model; before anything is written."""
        recipe, section = self.recipe, model.config.quantization
        if section is not None:
            self.check_same(section)
        elif recipe.skip_calibration:
            raise UserError(
                f"--skip_calibration: --model {recipe.model} is not quantized, so it has no ranges to keep."
            )
        else:
            check_settings(model, self.settings())

    def settings(self) -> dict:
        """The recipe's options under their names in `config.quantization`."""
        recipe = self.recipe
        return {
            "placement": recipe.placement,
            "narrow_range": recipe.narrow_range,
            "calibration_method": recipe.calibration_method,
            "calibration_percentile": recipe.calibration_percentile,
            "batch_norm": recipe.qat_batch_norm,
            "float_layers": recipe.float_layers,
        }

    def check_same(self, section: dict) -> None:
        """A model that is quantized keeps its quantizers; only how they are calibrated may change."""
        for name in ("placement", "batch_norm", "narrow_range", "float_layers"):
            if section[name] != self.settings()[name]:
                flag = "qat_batch_norm" if name == "batch_norm" else name
                raise UserError(
                    f"--model {self.recipe.model} is quantized with {flag} {section[name]!r}, not"
                    f" {self.settings()[name]!r}; give its value, or start from the float model."
                )
        for name in ("calibration_method", "calibration_percentile"):
            section[name] = self.settings()[name]

    def calibrate(self, model, loader, accelerator, report) -> None:
        batches = (batch["pixel_values"] for batch in islice(loader.epoch(0), self.recipe.calibration_batches))
        done = calibrate(model, batches)
        report.line(
            f"ranges   of {done.images:,} training images, {self.recipe.calibration_method},"
            f" {done.images_per_second:.0f} images/s"
        )
        if done.silent:
            report.line(f"         {len(done.silent)} quantizers saw only zeros, e.g. {done.silent[0]}")

    def report_sensitivity(self, model, loader, accelerator, report) -> None:
        measure = self.recipe.sensitivity
        batches = take(loader, self.recipe.sensitivity_batches)

        def reduce(sums: torch.Tensor) -> torch.Tensor:
            return accelerator.reduce(sums.to(accelerator.device), reduction="sum")

        found = sensitivity(model, batches, measure, reduce)
        if not accelerator.is_main_process:
            return
        paths = write_report(found, measure, RunFolder(self.recipe.output_dir))
        unit = "dB" if measure == "sqnr" else "% of labels" if self.names[0] == "map" else "% top-1"
        report.line(f"cost     of one layer's quantizers alone, on {found[0]['n']:,} images, the worst first:")
        for row in found[:10]:
            report.line(f"         {row[measure]:7.2f} {unit}  {short_name(row['layer'])}")
        report.line(f"         all: {paths[0]}, {paths[1]}")

    def describe(self, summary: dict, report) -> list:
        """Prints the table of float, PTQ and QAT, keeps its figures beside the model, and returns it for the card."""
        top_k, folder = self.recipe.top_k, RunFolder(self.recipe.output_dir)
        self.figures = self.figures or load_figures(folder, top_k)  # an earlier launch measured them
        if summary["n"]:
            size = self.figures.get("ptq", {}).get("bytes", 0)
            self.figures["qat"] = figures_of(summary, size)
            save_figures(folder, self.figures)
        if not self.figures:
            return []
        header, lines = rows(self.figures, top_k)
        report.line()
        report.line(text_table(header, lines))
        report.line(
            f"         MB: int8 weights with a float scale per channel, fp32 rest; figures: {folder.quantization.name}"
        )
        return [("Quantization", header, lines)]
