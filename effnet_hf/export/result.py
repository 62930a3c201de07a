"""What an export hands back."""

from dataclasses import dataclass
from pathlib import Path

from . import int8_report
from .options import ExportOptions
from .verify import LEAST_SNR, Comparison


@dataclass(frozen=True)
class Exported:
    """What was written, and how it was checked.

    Attributes:
        folder, file: where it is; `file` lies in `folder`.
        size: of the file (and its weights beside it), bytes.
        runtime: what ran it.
        pictures: how many of what, for a sentence.
        comparison: against PyTorch.
        top1: of the file and of the checkpoint in PyTorch, percent; None without labelled pictures.
        rows: an INT8 file beside float, see [`int8_report`].
    """

    folder: Path
    file: Path
    size: int
    options: ExportOptions
    runtime: str
    pictures: str
    comparison: Comparison
    top1: tuple[float, float] | None = None
    rows: tuple[int8_report.Row, ...] = ()

    def summary(self) -> str:
        """What `export.py` prints."""
        options, checked = self.options, self.comparison
        graph = f"opset {options.opset}, " if options.format == "onnx" else ""
        lines = [
            f"wrote    {self.file}   {self.size / 1e6:.1f} MB, {graph}{options.int8 or options.dtype}",
            f"graph    {options.input_name} -> {options.output_name}",
            f"checked  {self.runtime} against PyTorch on {self.pictures}:"
            f" largest difference {checked.difference:.2g}, top-1 agreement {checked.agreement:.2f} %",
        ]
        if options.int8:
            wanted = LEAST_SNR[options.int8]
            lines.append(
                f"         signal to noise {checked.snr:.1f} dB, {wanted:g} wanted: int8 differs by its rounding"
            )
        if self.top1:
            lines.append(f"top1     {self.top1[0]:.2f} % on these, the checkpoint in PyTorch {self.top1[1]:.2f} %")
        if self.rows:
            lines += ["", int8_report.as_text(self.rows)]
            lines += [f"warning: {sentence}" for sentence in int8_report.warnings(self.rows)]
        return "\n".join(lines)
