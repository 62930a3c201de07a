"""Where a run stands."""

from dataclasses import dataclass


@dataclass
class Progress:
    """`epoch` and `update` name the next optimizer step; a position is exact for any rank count."""

    epoch: int = 0
    update: int = 0
    total_updates: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    logged: tuple[float, int] = (0.0, 0)  # loss_sum and loss_count of the last line of metrics
    best_top1: float = -1.0
    best_topk: float = 0.0
    best_loss: float = 0.0
    best_epoch: int = -1
    best_is_ema: bool = False
    num_validated: int = 0
    epochs_since_best: int = 0
    seconds: float = 0.0
    metrics_bytes: int = 0
    num_samples: int = 0
    num_processes: int = 1
    per_device: int = 0  # images; 0 in checkpoints that do not say
    precision: str = ""

    def start_epoch(self, epoch: int) -> None:
        self.epoch, self.update = epoch, 0
        self.loss_sum, self.loss_count, self.logged = 0.0, 0, (0.0, 0)
