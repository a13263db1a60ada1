"""A yardstick: what the hard prompt gains by choosing the best of several replies."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from datasets import Dataset

from h2s.data.messages import conversation_id
from h2s.errors import RunError
from h2s.prefix.generation import Sampling, seeded
from h2s.prefix.policy_model import PrefixTuningPolicyModel
from h2s.report.intervals import difference_text
from h2s.report.soft_vs_hard import gather_rows, score_replies, shared_batches
from h2s.reward.functions import RewardFunctions


def draw_hard(
    policy: PrefixTuningPolicyModel,
    contexts: Dataset,
    scorers: Mapping[str, RewardFunctions],
    sampling: Sampling,
    draws: int,
    batch_size: int = 16,
    seed: int = 42,
) -> pd.DataFrame:
    """Draw several replies a context with the hard prompt: what it could do if it might choose.

    Several processes share the batches out; each of them gets the whole table.

    Returns:
        A row a reply: `conversation`, `context` (its place), `prompt`, `reply`, and a column a scorer.
    """
    prompt_ids = policy.encode(contexts["prompt"], sampling.max_completion_length)
    prompts = contexts["prompt"][:]
    records: list[dict] = []
    for rows in shared_batches(len(contexts) * draws, batch_size, "best of n", progress=True):
        where = [row // draws for row in rows]
        with seeded(policy.model.device, seed + rows.start), policy.hard_prompt_active():
            completions = policy.complete([prompt_ids[i] for i in where], sampling)
        for row, i, ids in zip(rows, where, completions, strict=True):
            record = {"row": row, "conversation": conversation_id(prompts[i]), "context": i, "prompt": prompts[i]}
            records.append(record | {"reply": policy.decode(ids), "reply_ids": ids})
    of_records = contexts.select([record["context"] for record in records])
    for name, scorer in scorers.items():
        score_replies(scorer, of_records, records, "reply", name)
    return gather_rows(records).drop(columns="reply_ids")


def yardstick(
    table: pd.DataFrame,
    policy: PrefixTuningPolicyModel,
    contexts: Dataset,
    scorers: Mapping[str, RewardFunctions],
    sampling: Sampling,
    draws: int,
    batch_size: int,
    seed: int,
) -> str:
    """Draw from the hard prompt and report what choosing gains beside the soft prefix; `table` is the comparison."""
    drawn = draw_hard(policy, contexts, scorers, sampling, draws, batch_size, seed)
    return best_of_n_report(table, drawn, list(scorers))


def best_of_n(draws: pd.DataFrame, names: Sequence[str], n: int) -> pd.DataFrame:
    """What the best of n replies by `names[0]` scores, less what one reply scores: expected over all n of the N drawn.

    The reply of rank j among N (1 the worst) is the best of n drawn without replacement with probability
    C(j - 1, n - 1) / C(N, n). Replies that a score left out (NaN) are not among the N, nor is a context that has fewer
    than n others.

    Args:
        draws: replies as from `draw_hard`, with a column a score.
        names: of the scores; the first one chooses.
        n: how many it chooses from, at most N.

    Returns:
        A row a context: `conversation` and each score's gain.

    Raises:
        RunError: there is no such context.
    """
    rows = []
    scored = draws.dropna(subset=list(names))
    for _, group in scored.sort_values(names[0], kind="stable").groupby("context", sort=True):
        total = len(group)
        if total < n:
            continue
        weights = np.array([math.comb(j, n - 1) / math.comb(total, n) for j in range(total)])
        gains = {name: float(weights @ group[name] - group[name].mean()) for name in names}
        rows.append({"conversation": group["conversation"].iloc[0], **gains})
    if not rows:
        raise RunError(f"no context has {n} replies that {', '.join(names)} scored: there is nothing to choose from")
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
    scored = [(name, table.dropna(subset=[f"soft_{name}", f"hard_{name}"])) for name in names]
    gains = [
        difference_text(both[f"soft_{name}"] - both[f"hard_{name}"], both["conversation"]) for name, both in scored
    ]
    kl = table["kl"].mean()
    lines.append(f"| soft prefix, one reply | {'-' if math.isnan(kl) else f'{kl:.2f}'} | {' | '.join(gains)} |")
    return "\n".join(lines)
