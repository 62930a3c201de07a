"""Statistics of activations, gathered on the device and over all processes. Imported only where modelopt is there."""

import warnings
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from modelopt.torch.quantization.calib import HistogramCalibrator
from scipy.special import rel_entr


def count_exactly(x: torch.Tensor, bins: int, end: float) -> torch.Tensor:
    """`torch.histc(x, bins, 0, end)` of x >= 0 in whole numbers, for a GPU: there histc adds floats in any order, and
    torch refuses it where the same bits are asked for."""
    if not 0 < end * bins < torch.finfo(torch.float32).max:  # nothing but zeros, or products that overflow
        return torch.histc(x.cpu(), bins=bins, min=0, max=end).to(x.device)
    x = x.flatten()
    x = x[x <= end]  # what histc leaves out, and NaN
    return torch.bincount((x * bins / end).long().clamp_(max=bins - 1), minlength=bins).float()


class Histogram(HistogramCalibrator):
    """modelopt's histogram of |x| (2,048 bins over the first batch, more of the same width where later ones need
    them), whose bins have the same width on every process, so that histograms can be added.

    In one process it is modelopt's to the bit; it only looks at the tensor once less.
    """

    _calib_hist: Any  # modelopt's own
    _calib_bin_edges: Any
    _num_bins: Any

    @torch.no_grad()
    def collect(self, x: torch.Tensor) -> None:
        x = x.detach().float().abs()
        highest = x.max()
        if self._calib_hist is None:
            if _several_processes():
                dist.all_reduce(highest, op=dist.ReduceOp.MAX)
            self._calib_hist = torch.zeros(self._num_bins, device=x.device)
            self._calib_bin_edges = torch.linspace(0, highest, self._num_bins + 1)
            self._end = highest.item()
        elif highest > self._end:
            width = self._calib_bin_edges[1] - self._calib_bin_edges[0]
            highest = highest.cpu()
            self._num_bins = int((highest / width).ceil().item())
            self._calib_bin_edges = torch.arange(0, highest + width, width)
            self._end = self._calib_bin_edges[-1].item()
        if x.is_cuda and torch.are_deterministic_algorithms_enabled():
            counts = count_exactly(x, self._num_bins, self._end)
        else:
            counts = torch.histc(x, bins=self._num_bins, min=0, max=self._end)
        counts[: self._calib_hist.numel()] += self._calib_hist
        self._calib_hist = counts

    def merge(self, others: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Replaces the histogram by the sum of (counts, edges) of all processes."""
        longest = max(others, key=lambda entry: entry[0].numel())
        total = torch.zeros_like(longest[0])
        for counts, _ in others:
            total[: counts.numel()] += counts
        self._calib_hist, self._calib_bin_edges = total, longest[1]

    def contents(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._calib_hist.cpu(), self._calib_bin_edges

    def amax(self, method: str, percentile: float) -> torch.Tensor:
        """The range that a method takes from the histogram: `"percentile"` or `"entropy"`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that processes are not synchronised; ours are
            if method == "percentile":
                return self.compute_amax("percentile", percentile=percentile)
        counts, edges = self._calib_hist.int().cpu().numpy(), self._calib_bin_edges.numpy()
        return torch.tensor(edges[least_divergence(counts, 2 ** (self._num_bits - 1))].item())


def least_divergence(counts: np.ndarray, levels: int, start: int = 128) -> int:
    """The number of bins to keep so that the histogram, cut there and merged into `levels` groups, diverges least from
    the whole: modelopt's entropy method without its loop over bins in Python, which takes minutes for a B0.
    """
    counts = counts.copy()
    counts[0] = counts[1]
    divergences = []
    for kept in range(start, len(counts) + 1):
        group = np.digitize(np.arange(kept), np.linspace(0, kept, levels + 1)) - 1
        filled = counts[:kept] != 0
        group, inside = group[filled], counts[:kept][filled]
        means = np.bincount(group, inside, levels) / np.maximum(np.bincount(group, minlength=levels), 1)
        merged = np.zeros(kept)
        merged[filled] = means[group]
        reference = counts[:kept].copy()
        reference[-1] += counts[kept:].sum()
        total = merged.sum()  # 0: nothing is left below the cut; modelopt compares with 0 / 0 then, and takes that cut
        divergences.append(rel_entr(reference / reference.sum(), merged / total).sum() if total else np.inf)
    return start + len(divergences) - 1 - int(np.argmin(divergences[::-1]))  # of equals, the most bins


class Maximum:
    """The largest magnitude seen."""

    def __init__(self):
        self.highest = None

    @torch.no_grad()
    def collect(self, x: torch.Tensor) -> None:
        highest = x.detach().float().abs().max()
        self.highest = highest if self.highest is None else torch.maximum(self.highest, highest)

    def merge(self, others: list[torch.Tensor]) -> None:
        self.highest = torch.stack(others).max()

    def contents(self) -> torch.Tensor:
        return self.highest.cpu()

    def amax(self, method: str, percentile: float) -> torch.Tensor:
        return self.highest


def merge_over_processes(statistics: list) -> None:
    """Makes every process hold the statistics of all; a collective call."""
    if not _several_processes():
        return
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [entry.contents() for entry in statistics])
    for entry, others in zip(statistics, zip(*everyone)):
        entry.merge(list(others))


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
