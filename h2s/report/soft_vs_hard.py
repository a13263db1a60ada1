"""Soft against hard: the same contexts and seeds, both prompts, paired scores with intervals, and best-of-n.

A *comparison table* has a row a context: `conversation`, `prompt` (messages), and for `soft` and `hard` the reply `…`,
its tokens `…_tokens`, whether it ended by itself `…_finished`, its scores `…_{name}`; `kl` is the soft reply's summed
log-ratio to the hard prompt, in nats.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from h2s.data.messages import Messages
from h2s.errors import RunError
from h2s.prefix.adapter import hard_prefix, hard_prompt_active, soft_prefix
from h2s.prefix.generation import Batch, Sampling, completion_logps, decode, generate, stop_token_ids
from h2s.report.intervals import adjusted_interval, difference_text, mean_interval, sign_test_text
from h2s.reward.functions import RewardFunction, score_replies

DIFFERENCES_PICTURE = "differences.png"


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
        The comparison table, without scores.
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
            with hard_prompt_active(model):
                torch.manual_seed(seed + start)
                hard = generate(model, chunk["prompt_ids"], sampling, stops, pad)
            kls = [math.nan] * len(soft)
            if sampling.whole:
                batch = Batch.from_rows(chunk["prompt_ids"], soft, pad, model.device)
                logps = completion_logps(model, batch, sampling.temperature)[0]
                with hard_prompt_active(model):
                    ref_logps = completion_logps(model, batch, sampling.temperature)[0]
                kls = (logps - ref_logps).sum(1).tolist()
            for i, kl in enumerate(kls):
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
        table[f"{side}_{name}"] = score_replies(reward, table["prompt"].tolist(), table[side].tolist())


def summarise(table: pd.DataFrame, name: str = "reward") -> dict[str, float]:
    """The paired comparison in numbers, the difference being soft minus hard of one reward."""
    soft, hard, conversations = table[f"soft_{name}"], table[f"hard_{name}"], table["conversation"]
    difference, low, high = mean_interval(soft - hard, conversations)
    same_length, same_length_low, same_length_high, _ = adjusted_interval(soft - hard, _longer(table), conversations)
    return {
        f"soft_{name}": float(soft.mean()),
        f"hard_{name}": float(hard.mean()),
        f"{name}_difference": difference,
        f"{name}_difference_low": low,
        f"{name}_difference_high": high,
        f"{name}_same_length": same_length,
        f"{name}_same_length_low": same_length_low,
        f"{name}_same_length_high": same_length_high,
        f"{name}_win": float((soft > hard).mean()),
        f"{name}_tie": float((soft == hard).mean()),
        "kl": float(table["kl"].mean()),
        "soft_tokens": float(table["soft_tokens"].mean()),
        "hard_tokens": float(table["hard_tokens"].mean()),
        "soft_unfinished": float(1 - table["soft_finished"].mean()),
        "hard_unfinished": float(1 - table["hard_finished"].mean()),
        "contexts": float(len(table)),
    }


def _longer(table: pd.DataFrame) -> pd.Series:
    return table["soft_tokens"] - table["hard_tokens"]


def report(table: pd.DataFrame, names: Sequence[str]) -> str:
    """The paired comparison as Markdown, for people; a gain that is length is called so.

    Raises:
        RunError: a score is not finite; it would count as neither won nor lost.
    """
    lines = ["| | soft | hard | soft minus hard (95% interval) |", "|---|---|---|---|"]
    conversations = table["conversation"]
    count = conversations.nunique()
    notes = []
    for name in names:
        soft, hard = table[f"soft_{name}"], table[f"hard_{name}"]
        if not np.isfinite([soft, hard]).all():
            raise RunError(f"the {name} of a reply is not finite: soft {soft.tolist()}, hard {hard.tolist()}")
        lines.append(_row(name, soft, hard, conversations))
        left, low, high, slope = adjusted_interval(soft - hard, _longer(table), conversations)
        interval = f"[{low:+.3f}, {high:+.3f}]" if count > 2 else "(no interval)"
        lines.append(f"| {name}, at equal length | | | {left:+.3f} {interval}, {slope:+.3f} a token |")
        wins, losses = int((soft > hard).sum()), int((soft < hard).sum())
        test = f"{len(table) - wins - losses} ties; {sign_test_text(soft - hard, conversations)}"
        lines.append(f"| {name}: wins of {len(table)} | {wins} | {losses} | {test} |")
        if mean_interval(soft - hard, conversations)[1] > 0 >= low:
            notes.append(f"At equal length no gain in {name} is shown: the gain may be length.")
    for label, column, scale in (("tokens", "tokens", 1), ("unfinished", "finished", -1)):
        soft, hard = table[f"soft_{column}"].astype(float), table[f"hard_{column}"].astype(float)
        if scale < 0:
            soft, hard = 1 - soft, 1 - hard
        lines.append(_row(label, soft, hard, conversations))
    kl = "-"
    if table["kl"].notna().all():
        kl = "{:.3f} [{:.3f}, {:.3f}]".format(*mean_interval(table["kl"], conversations))
    lines.append(f"| KL to the hard prompt, nats a reply | {kl} | 0 | |")
    if count < 30:
        notes.append(
            f"Fewer than 30 conversations ({count}): intervals are too narrow where scores are skewed or conversations "
            "differ in size (simulated with 10 and 16 conversations of one context, they covered 94 to 95% for normal "
            "and 90 to 91% for exponential scores)."
        )
    lines += [f"\nn = {len(table)} contexts of {count} conversations.", *notes]
    return "\n".join(lines)


def _row(label: str, soft: pd.Series, hard: pd.Series, conversations: pd.Series) -> str:
    return f"| {label} | {soft.mean():.3f} | {hard.mean():.3f} | {difference_text(soft - hard, conversations)} |"


def draw_hard(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    sampling: Sampling,
    draws: int,
    batch_size: int,
    seed: int,
) -> pd.DataFrame:
    """Draw several replies a context with the hard prompt: what it could do if it might choose.

    Returns:
        A row a reply: `conversation`, `context` (its number), `prompt`, `reply`.
    """
    stops, pad = stop_token_ids(model, tokenizer), tokenizer.pad_token_id
    cuda = [model.device] if model.device.type == "cuda" else []
    numbers = [i for i in range(len(rows)) for _ in range(draws)]
    records: list[dict] = []
    with torch.random.fork_rng(devices=cuda), hard_prompt_active(model):
        torch.manual_seed(seed)
        for start in tqdm(range(0, len(numbers), batch_size), desc="best of n", leave=False):
            chunk = numbers[start : start + batch_size]
            replies = generate(model, [rows[i]["prompt_ids"] for i in chunk], sampling, stops, pad)
            for i, reply in zip(chunk, replies, strict=True):
                row = {"conversation": rows[i]["conversation"], "context": i, "prompt": rows[i]["prompt"]}
                records.append(row | {"reply": decode(tokenizer, reply, stops)})
    return pd.DataFrame.from_records(records)


def best_of_n(draws: pd.DataFrame, names: Sequence[str], n: int) -> pd.DataFrame:
    """What the best of n replies by `names[0]` scores, less what one reply scores: expected over all n of the N drawn.

    The reply of rank j among N (1 the worst) is the best of n drawn without replacement with probability
    C(j - 1, n - 1) / C(N, n).

    Args:
        draws: replies as from `draw_hard`, with a column a score.
        names: of the scores; the first one chooses.
        n: how many it chooses from, at most N.

    Returns:
        A row a context: `conversation` and each score's gain.
    """
    rows = []
    for _, group in draws.sort_values(names[0], kind="stable").groupby("context", sort=True):
        total = len(group)
        weights = np.array([math.comb(j, n - 1) / math.comb(total, n) for j in range(total)])
        gains = {name: float(weights @ group[name] - group[name].mean()) for name in names}
        rows.append({"conversation": group["conversation"].iloc[0], **gains})
    return pd.DataFrame(rows)


def best_of_n_report(table: pd.DataFrame, draws: pd.DataFrame, names: Sequence[str]) -> str:
    """The yardstick as Markdown: what choosing by the first reward gains, beside the soft prefix, each at its KL.

    The KL of best-of-n to the hard prompt is at most ln n - (n - 1) / n (Beirami et al., arXiv 2401.01879).
    """
    columns = " | ".join(f"{name} gained (95% interval)" for name in names)
    lines = [f"| chosen by {names[0]} | KL, nats a reply | {columns} |", "|---|---|" + "---|" * len(names)]
    drawn = int(draws.groupby("context").size().min())
    for n in (n for n in (2, 4, 8) if n <= drawn):
        gained = best_of_n(draws, names, n)
        cells = " | ".join(difference_text(gained[name], gained["conversation"]) for name in names)
        lines.append(f"| hard prompt, best of {n} | at most {math.log(n) - (n - 1) / n:.2f} | {cells} |")
    gains = (difference_text(table[f"soft_{name}"] - table[f"hard_{name}"], table["conversation"]) for name in names)
    kl = table["kl"].mean()
    lines.append(f"| soft prefix, one reply | {'-' if math.isnan(kl) else f'{kl:.2f}'} | {' | '.join(gains)} |")
    return "\n".join(lines)


def picture(table: pd.DataFrame, names: Sequence[str], path: Path) -> None:
    """Soft minus hard of each context, sorted, a panel a score; the line and band are the mean and its interval."""
    figure = Figure(figsize=(6 * len(names), 4), layout="constrained")
    for axis, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        differences = table[f"soft_{name}"] - table[f"hard_{name}"]
        ordered = np.sort(differences.to_numpy())
        colours = ["tab:blue" if d > 0 else "tab:red" for d in ordered]
        axis.bar(range(len(ordered)), ordered, color=colours)
        mean, low, high = mean_interval(differences, table["conversation"])
        axis.axhline(mean, color="black", linewidth=1)
        axis.axhspan(low, high, color="black", alpha=0.15)
        axis.axhline(0, color="grey", linewidth=0.8)
        title = f"{name}: {difference_text(differences, table['conversation'])}, n={len(table)}"
        axis.set(title=title, xlabel="contexts, sorted", ylabel="soft minus hard")
    figure.savefig(path, dpi=120)


WHAT_CHANGED = "what_changed.md"


EXAMPLES = 12


def layer_movement(model: PeftModel) -> pd.DataFrame:
    """How far keys and values of each layer moved from the hard prompt's.

    Returns:
        A row a layer: `keys` and `values`, the norm of the difference over the norm at the start (0 is unmoved).
    """
    start, now = (_keys_and_values(model, weight) for weight in (hard_prefix(model), soft_prefix(model)))
    moved = (now - start).norm(dim=(0, 3)) / start.norm(dim=(0, 3)).clamp(min=1e-12)  # (layers, 2)
    return pd.DataFrame(moved.tolist(), columns=["keys", "values"])


def _keys_and_values(model: PeftModel, weight: torch.Tensor) -> torch.Tensor:
    """PEFT's rows hold key then value, layer by layer: (P, layers * 2 * H) -> (P, layers, 2, H), float32."""
    layers = model.active_peft_config.num_layers
    return weight.detach().float().reshape(weight.shape[0], layers, 2, -1)


def what_changed(table: pd.DataFrame, model: PeftModel, scores: Sequence[str]) -> str:
    """The report as Markdown: replies side by side (the first contexts of the table), then the layers."""
    lines = ["# What changed", "", "The same contexts and random states; nothing here was trained on or chosen by.", ""]
    for row in table.head(EXAMPLES).to_dict("records"):
        lines += [_quoted(row["prompt"]), ""]
        for side in ("hard", "soft"):
            scored = ", ".join(f"{name} {row[f'{side}_{name}']:+.2f}" for name in scores)
            ended = "" if row[f"{side}_finished"] else ", not finished"
            lines.append(f"- {side} ({scored}{ended}): {_in_one_line(row[side])}")
        lines.append("")
    lines += ["How far the prefix moved, relative to its own size:", "", "| layer | keys | values |", "|---|---|---|"]
    lines += [f"| {m.Index} | {m.keys:.4f} | {m.values:.4f} |" for m in layer_movement(model).itertuples()]
    return "\n".join(lines) + "\n"


def _quoted(prompt: Messages) -> str:
    return "\n>\n".join(f"> {m['role']}: {_in_one_line(m['content'])}" for m in prompt)


def _in_one_line(text: str) -> str:
    return " ".join(text.split()) or "(no text)"


# What the hard prompt has over itself: a run that only ever loses against it has no better evaluation to fall from.
HARD_PROMPT_EVALUATION = {
    "step": 0,
    "eval_reward_difference": 0.0,
    "eval_judge_difference": 0.0,
    "eval_judge_difference_low": 0.0,
    "eval_judge_difference_high": 0.0,
}


def over_optimised(log_history: list[dict]) -> tuple[dict, dict] | None:
    """Whether the last evaluation has more of the reward and less of the judge than the one the judge liked best.

    That is over-optimisation: the policy has found what the reward mistakes for good (Gao et al., arXiv 2210.10760).
    The hard prompt counts as an evaluation at step 0.

    Returns:
        The log lines of the judge's favourite and of the last evaluation; None if there is nothing to say.
    """
    evaluations = [line for line in log_history if "eval_judge_difference" in line]
    if not evaluations:
        return None
    last = evaluations[-1]
    best = max([*evaluations[:-1], HARD_PROMPT_EVALUATION], key=lambda line: line["eval_judge_difference"])
    rises = last["eval_reward_difference"] > best["eval_reward_difference"]
    return (best, last) if rises and last["eval_judge_difference"] < best["eval_judge_difference"] else None
