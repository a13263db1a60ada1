"""What is kept of each iteration: numbers for Trainer's log, by TRL's names where it has them, and the completions."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.tensorboard import SummaryWriter
from transformers.integrations import TensorBoardCallback
from trl.trainer.utils import print_prompt_completions_sample

from h2s.run.terminal import above_bars

SAMPLES = 4  # completions a log line, as text in TensorBoard


class IterationLog:
    """Collects what all processes measure between two log lines.

    Args:
        accelerator: gathers.
        reward_names: those of the columns of rewards.

    Attributes:
        metrics: numbers by name, the same on every process.
        completions: the last iteration's rows of all processes, as they are written.
    """

    def __init__(self, accelerator: Accelerator, reward_names: Sequence[str]):
        self.accelerator = accelerator
        self.reward_names = reward_names
        self.metrics: dict[str, list[float]] = defaultdict(list)
        self.completions: list[dict[str, Any]] = []
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
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        self.completions = gather_object(rows)
        if self.accelerator.is_main_process:
            where = folder / "completions"
            where.mkdir(parents=True, exist_ok=True)
            pd.DataFrame.from_records(self.completions).to_parquet(where / f"step-{step:06d}.parquet")

    def print_completions(self, step: int, number: int | None) -> None:
        """Print some of the last iteration's completions, or all, as TRL's trainers do."""
        rows = self.completions
        given = {name: [row[f"rewards/{name}"] for row in rows] for name in self.reward_names}
        advantages = [row["advantage"] for row in rows]
        prompts, completions = [row["prompt"] for row in rows], [row["completion"] for row in rows]
        with above_bars():
            print_prompt_completions_sample(prompts, completions, given, advantages, step, number)

    def means(self) -> dict[str, float]:
        """The mean of each number since the last call."""
        means = {name: sum(values) / len(values) for name, values in self.metrics.items()}
        self.metrics.clear()
        return means


class Charts(TensorBoardCallback):
    """TensorBoard with sample completions as text, and without charts of where intervals end."""

    def __init__(self, iterations: IterationLog, tb_writer: SummaryWriter | None = None):
        super().__init__(tb_writer)
        self.iterations = iterations

    def on_log(self, args, state, control, logs=None, **kwargs):
        """One log line."""
        ends = {f"{name}{end}" for name in logs for end in ("_low", "_high")}
        charted = {name: value for name, value in logs.items() if name not in ends}
        super().on_log(args, state, control, charted, **kwargs)
        if "loss" in logs and self.tb_writer is not None:
            texts = [_as_markdown(row) for row in self.iterations.completions[:SAMPLES]]
            self.tb_writer.add_text("completions", "\n\n".join(texts), state.global_step)


def _as_markdown(row: dict[str, Any]) -> str:
    """A completion's score, and as code, which Markdown leaves as it is, its conversation."""
    messages = [*row["prompt"], {"role": "completion", "content": row["completion"]}]
    text = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    return f"score {row['score']:.4g}\n\n{indent(text, ' ' * 4)}"


def in_words(logs: dict[str, float]) -> str | None:
    """A log line as short as a terminal's, of an iteration or of an evaluation; None of others."""
    if "reward" in logs:
        return (
            f"reward {logs['reward']:+.3f}, KL {logs['kl']:.3f}, {logs['completions/mean_length']:.1f} tokens, "
            f"unfinished {logs['completions/clipped_ratio']:.0%}"
        )
    scores, contexts = [], 0.0
    for name in (name for name in logs if name.endswith("_difference")):
        prefix, _, scorer = name.removesuffix("_difference").rpartition("_")
        parts = f"{prefix}_soft_{scorer}", f"{prefix}_hard_{scorer}", name, f"{name}_low", f"{name}_high"
        if all(part in logs for part in parts):
            soft, hard, difference, low, high = (logs[part] for part in parts)
            scores.append(f"{scorer} {soft:.3f} and {hard:.3f}, {difference:+.3f} [{low:+.3f}, {high:+.3f}]")
            contexts = logs[f"{prefix}_contexts"]
    return f"soft and hard on {contexts:.0f} contexts: {'; '.join(scores)}" if scores else None


def _std(values: torch.Tensor) -> float:
    """The spread of what is not NaN; NaN of fewer than two."""
    given = values[~values.isnan()]
    return given.std().item() if len(given) > 1 else math.nan
