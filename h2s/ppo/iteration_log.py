"""What is kept of each iteration: numbers for Trainer's log, by TRL's names where it has them, and the completions."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object


class IterationLog:
    """Collects what all processes measure between two log lines.

    Args:
        accelerator: gathers.
        reward_names: those of the columns of rewards.

    Attributes:
        metrics: numbers by name, the same on every process.
    """

    def __init__(self, accelerator: Accelerator, reward_names: Sequence[str]):
        self.accelerator = accelerator
        self.reward_names = reward_names
        self.metrics: dict[str, list[float]] = defaultdict(list)
        self._extra_metrics: dict[str, list[float]] = defaultdict(list)
        self._extra_columns: dict[str, list] = {}

    def log_extra(self, column: str, values: list) -> None:
        """A reward's own column of the completions: one value a completion (TRL's argument of that name)."""
        self._extra_columns[column] = values

    def log_metric(self, name: str, value: float) -> None:
        """A reward's own number for the log (TRL's argument of that name)."""
        self._extra_metrics[name].append(value)

    def forget_extras(self) -> None:
        """Drop what rewards logged themselves, once it is written or where it is not."""
        self._extra_columns.clear()
        self._extra_metrics.clear()

    def add(self, name: str, values: torch.Tensor) -> None:
        """The mean over all processes, without NaN."""
        self.metrics[name].append(self.accelerator.gather(values.float()).nanmean().item())

    def add_rewards(self, values: torch.Tensor, scores: torch.Tensor) -> None:
        """Rewards over the replies that they did not leave out, and what rewards logged themselves.

        Args:
            values: this process's, (B, F).
            scores: all processes' weighted sums, (B * world_size,).
        """
        for name, column in zip(self.reward_names, self.accelerator.gather(values).T, strict=True):
            self.metrics[f"rewards/{name}/mean"].append(column.nanmean().item())
            self.metrics[f"rewards/{name}/std"].append(_std(column))
        self.metrics["reward"].append(scores.nanmean().item())
        self.metrics["reward_std"].append(_std(scores))
        # In one order on all processes, whose rewards may have logged other names.
        for name in sorted(set(gather_object(list(self._extra_metrics)))):
            mine = self._extra_metrics.get(name, [])
            both = torch.tensor([[sum(mine), len(mine)]], dtype=torch.float32, device=self.accelerator.device)
            total, count = self.accelerator.gather(both).sum(0).tolist()
            self.metrics[name].append(total / count)

    def write_completions(self, folder: Path, step: int, columns: dict[str, list], values: torch.Tensor) -> None:
        """Write `completions/step-N.parquet`: a row a reply of all processes.

        Args:
            folder: the run's.
            step: the iteration, from 1.
            columns: B values each.
            values: of the rewards, (B, F).
        """
        rewards = {f"rewards/{name}": column for name, column in zip(self.reward_names, values.T.tolist(), strict=True)}
        columns = columns | rewards | self._extra_columns
        records = gather_object([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])
        if self.accelerator.is_main_process:
            where = folder / "completions"
            where.mkdir(parents=True, exist_ok=True)
            pd.DataFrame.from_records(records).to_parquet(where / f"step-{step:06d}.parquet")

    def means(self) -> dict[str, float]:
        """The mean of each number since the last call."""
        means = {name: sum(values) / len(values) for name, values in self.metrics.items()}
        self.metrics.clear()
        return means


def _std(values: torch.Tensor) -> float:
    """The spread of what is not NaN; NaN of fewer than two."""
    given = values[~values.isnan()]
    return given.std().item() if len(given) > 1 else math.nan
