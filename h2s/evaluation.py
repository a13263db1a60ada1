"""Soft against hard: the same contexts and seeds, both prompts, paired scores, intervals, and the blinded sheet."""

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from openpyxl import Workbook
from openpyxl.styles import Alignment, Font
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from h2s.contexts import Messages
from h2s.preferences import COLUMNS
from h2s.prefix import hard_prompt_active
from h2s.rollout import Batch, Sampling, completion_logps, decode, generate, stop_token_ids

# TRL's reward-function signature: (prompts, completions) -> one number each.
RewardFunction = Callable[[Sequence[Messages], Sequence[str]], Sequence[float]]
SHEET, KEY = "blinded.xlsx", "blinded.key.json"
# What XML cannot hold; openpyxl's own list lacks the last two, and a file that holds them cannot be opened.
ILLEGAL_CHARACTERS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")


@torch.no_grad()
def answer_both(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    sampling: Sampling,
    batch_size: int,
    seed: int,
    progress: bool = True,
) -> pd.DataFrame:
    """Answer each context with the soft and with the hard prompt, from the same random state.

    Args:
        model: a prefix model that holds both prefixes; its random state outside is left as it was.
        tokenizer: the adapter's.
        rows: contexts with columns `prompt`, `prompt_ids`, `conversation`.
        sampling: how completions are drawn, the same for both.
        batch_size: contexts at a time.
        seed: of the sampling; the same seed gives the same hard completions.
        progress: whether to show a bar.

    Returns:
        A row a context: `conversation`, `prompt`, and for `soft` and `hard` the reply `…`, its tokens `…_tokens`,
        whether it ended by itself `…_finished`; `kl`, the soft reply's summed log-ratio to the hard prompt, in nats.
    """
    stops = stop_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id
    cuda = [model.device] if model.device.type == "cuda" else []
    records: list[dict] = []
    with torch.random.fork_rng(devices=cuda):
        starts = range(0, len(rows), batch_size)
        for start in tqdm(starts, desc="soft against hard", disable=not progress, leave=False):
            chunk = rows[start : start + batch_size]
            torch.manual_seed(seed + start)
            soft = generate(model, chunk["prompt_ids"], sampling, stops, pad)
            batch = Batch.from_rows(chunk["prompt_ids"], soft, pad, model.device)
            logps = completion_logps(model, batch, sampling.temperature or 1.0)[0]
            with hard_prompt_active(model):
                torch.manual_seed(seed + start)
                hard = generate(model, chunk["prompt_ids"], sampling, stops, pad)
                ref_logps = completion_logps(model, batch, sampling.temperature or 1.0)[0]
            for i, kl in enumerate((logps - ref_logps).sum(1).tolist()):
                record = {"conversation": chunk["conversation"][i], "prompt": chunk["prompt"][i], "kl": kl}
                for name, completion in (("soft", soft[i]), ("hard", hard[i])):
                    record[name] = decode(tokenizer, completion, stops)
                    record[f"{name}_tokens"] = len(completion)
                    record[f"{name}_finished"] = completion[-1] in stops
                records.append(record)
    return pd.DataFrame.from_records(records)


def add_scores(table: pd.DataFrame, name: str, reward: RewardFunction) -> None:
    """Add `soft_{name}` and `hard_{name}`, the reward of both replies, in place."""
    for side in ("soft", "hard"):
        table[f"{side}_{name}"] = list(reward(table["prompt"].tolist(), table[side].tolist()))


def mean_interval(
    values: Sequence[float], clusters: Sequence[str], resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """A mean with its 95% percentile-bootstrap interval, resampled by conversation.

    Rows of one conversation are not independent, so whole conversations are drawn (Field and Welsh 2007).

    Returns:
        mean, lower and upper end. With a single conversation the interval is the mean itself: it says nothing.
    """
    frame = pd.DataFrame({"value": np.asarray(values, dtype=float), "cluster": list(clusters)})
    grouped = frame.groupby("cluster")["value"].agg(["sum", "count"])
    sums, counts = grouped["sum"].to_numpy(), grouped["count"].to_numpy()
    draws = np.random.default_rng(seed).integers(0, len(sums), size=(resamples, len(sums)))
    low, high = np.percentile(sums[draws].sum(1) / counts[draws].sum(1), [2.5, 97.5])
    return float(frame["value"].mean()), float(low), float(high)


def interval_text(values: Sequence[float], clusters: Sequence[str]) -> str:
    """`mean [low, high], n=rows (conversations)` for a log or a table."""
    mean, low, high = mean_interval(values, clusters)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}], n={len(values)} ({len(set(clusters))} conversations)"


def summarise(table: pd.DataFrame, name: str = "reward") -> dict[str, float]:
    """The paired comparison in numbers, the difference being soft minus hard of one reward."""
    soft, hard = table[f"soft_{name}"], table[f"hard_{name}"]
    difference, low, high = mean_interval(soft - hard, table["conversation"])
    return {
        f"soft_{name}": float(soft.mean()),
        f"hard_{name}": float(hard.mean()),
        f"{name}_difference": difference,
        f"{name}_difference_low": low,
        f"{name}_difference_high": high,
        f"{name}_win": float((soft > hard).mean()),
        f"{name}_tie": float((soft == hard).mean()),
        "kl": float(table["kl"].mean()),
        "soft_tokens": float(table["soft_tokens"].mean()),
        "hard_tokens": float(table["hard_tokens"].mean()),
        "soft_unfinished": float(1 - table["soft_finished"].mean()),
        "hard_unfinished": float(1 - table["hard_finished"].mean()),
        "contexts": float(len(table)),
    }


def report(table: pd.DataFrame, names: Sequence[str]) -> str:
    """The paired comparison as a Markdown table, for people."""
    lines = ["| | soft | hard | soft minus hard (95% interval) |", "|---|---|---|---|"]
    conversations = table["conversation"]
    for name in names:
        soft, hard = table[f"soft_{name}"], table[f"hard_{name}"]
        lines.append(_line(name, soft, hard, conversations))
        wins, ties = int((soft > hard).sum()), int((soft == hard).sum())
        lines.append(f"| {name}: wins of {len(table)} | {wins} | {len(table) - wins - ties} | {ties} ties |")
    for label, column, scale in (("tokens", "tokens", 1), ("unfinished", "finished", -1)):
        soft, hard = table[f"soft_{column}"].astype(float), table[f"hard_{column}"].astype(float)
        if scale < 0:
            soft, hard = 1 - soft, 1 - hard
        lines.append(_line(label, soft, hard, conversations))
    lines.append(f"| KL to the hard prompt, nats a reply | {interval_text(table['kl'], conversations)} | 0 | |")
    lines.append(f"\nn = {len(table)} contexts of {conversations.nunique()} conversations.")
    return "\n".join(lines)


def _line(label: str, soft: pd.Series, hard: pd.Series, conversations: pd.Series) -> str:
    difference, low, high = mean_interval(soft - hard, conversations)
    return f"| {label} | {soft.mean():.3f} | {hard.mean():.3f} | {difference:+.3f} [{low:+.3f}, {high:+.3f}] |"


def write_blinded_sheet(table: pd.DataFrame, folder: str | Path, seed: int) -> None:
    """Write soft and hard side by side for people to judge, and the key beside it.

    The sheet has the judgement sheet's own columns, so `train_reward.py` reads it once `human_eval` is filled in;
    which side is the soft prompt's was drawn with `seed` and stands only in the key:
    `{"seed", "soft_side": ["policy_response" or "reference_response" a row]}`.
    """
    sides = random.Random(seed)
    book = Workbook()
    sheet = book.active
    sheet.title = "judgements"
    sheet.append(list(COLUMNS))
    key = []
    for row, (prompt, soft, hard) in enumerate(
        zip(table["prompt"], table["soft"], table["hard"], strict=True), start=2
    ):
        soft_first = sides.random() < 0.5
        key.append("policy_response" if soft_first else "reference_response")
        first, second = (soft, hard) if soft_first else (hard, soft)
        for column, text in enumerate((json.dumps(prompt, ensure_ascii=False), first, second), start=1):
            cell = sheet.cell(row, column, ILLEGAL_CHARACTERS.sub("", text) or "(no text)")
            # A reply that begins with "=" is text, not a formula.
            cell.data_type = "s"
            cell.alignment = Alignment(wrap_text=True, vertical="top")
    for letter, width in zip("ABCD", (60, 50, 50, 14), strict=True):
        sheet.column_dimensions[letter].width = width
        sheet[f"{letter}1"].font = Font(bold=True)
    sheet.freeze_panes = "A2"
    book.save(Path(folder) / SHEET)
    text = json.dumps({"seed": seed, "soft_side": key}, indent=1)
    (Path(folder) / KEY).write_text(text + "\n", encoding="utf-8")
