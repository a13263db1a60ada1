"""How far to go: soft against hard along the dial, from the hard prompt (0) past where training ended (1)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset
from matplotlib.figure import Figure

from h2s.prefix.generation import Sampling
from h2s.prefix.policy_model import PrefixTuningPolicyModel
from h2s.report.intervals import difference_text, mean_interval
from h2s.report.soft_vs_hard import soft_vs_hard
from h2s.reward.functions import RewardFunctions

STRENGTHS_PICTURE = "strengths.png"


def along(
    policy: PrefixTuningPolicyModel,
    contexts: Dataset,
    scorers: Mapping[str, RewardFunctions],
    sampling: Sampling,
    strengths: Sequence[float] | None = None,
    batch_size: int = 16,
    seed: int = 42,
) -> dict[float, pd.DataFrame]:
    """Soft against hard at strength 1, and at further ones: the tables of `soft_vs_hard`, by strength in order.

    All are of the same contexts and random states, so the hard side is drawn and scored once. Where there are further
    ones 0 is among them, which is the hard prompt itself. The policy is left at strength 1.
    """
    policy.set_strength(1)
    table = soft_vs_hard(policy, contexts, scorers, sampling, batch_size, seed)
    tables = {1.0: table}
    if strengths:
        hard = table.filter(regex="^hard")
        tables[0.0] = table.assign(kl=0.0, **{f"soft{name.removeprefix('hard')}": hard[name] for name in hard})
    try:
        for strength in sorted(set(strengths or ()) - tables.keys()):
            policy.set_strength(strength)
            label = f"strength {strength:g}"
            tables[strength] = soft_vs_hard(
                policy, contexts, scorers, sampling, batch_size, seed, hard=table, label=label
            )
    finally:
        policy.set_strength(1)
    return dict(sorted(tables.items()))


def write_strengths(tables: Mapping[float, pd.DataFrame], names: Sequence[str], folder: Path) -> str:
    """Write `strengths.parquet` (all tables, by `strength`) and `strengths.png`; returns the Markdown report."""
    together = pd.concat(tables, names=["strength"]).reset_index(level="strength")
    together.to_parquet(folder / "strengths.parquet")
    picture(tables, names, folder / STRENGTHS_PICTURE)
    return report(tables, names)


def report(tables: Mapping[float, pd.DataFrame], names: Sequence[str]) -> str:
    """The table as Markdown, and which strength is highest, by the judge or else the first score."""
    columns = "".join(f" {name}, soft minus hard (95% interval) |" for name in names)
    lines = [f"| strength |{columns} KL, nats a reply | tokens | unfinished |", "|---|" + "---|" * (len(names) + 3)]
    for strength, table in tables.items():
        cells = [f"{strength:g}"]
        for name in names:
            differences = _differences(table, name)
            left_out = f", {len(differences)} of {len(table)}" if len(differences) < len(table) else ""
            cells.append(difference_text(differences, table["conversation"][differences.index]) + left_out)
        kl, low, high = (
            mean_interval(table["kl"], table["conversation"]) if table["kl"].notna().all() else [math.nan] * 3
        )
        cells.append("-" if math.isnan(kl) else f"{kl:.3f} [{low:.3f}, {high:.3f}]")
        cells += [f"{table['soft_tokens'].mean():.1f}", f"{1 - table['soft_finished'].mean():.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    some = tables[1.0]
    lines += [
        "",
        f"Strength 0 is the hard prompt, 1 the trained prefix; all answer the same {len(some)} contexts of "
        f"{some['conversation'].nunique()} conversations from the same random states.",
    ]
    if names:
        lines.append(_highest(tables, "judge" if "judge" in names else names[0]))
    return "\n".join(lines)


def _highest(tables: Mapping[float, pd.DataFrame], name: str) -> str:
    """Which strength is highest, and by how much more than the trained prefix itself, paired by context."""
    best = max(tables, key=lambda strength: (_differences(tables[strength], name).mean(), strength == 1))
    if best == 1:
        return f"By the {name} none is higher than 1, where training ended."
    more = (tables[best][f"soft_{name}"] - tables[1.0][f"soft_{name}"]).dropna()
    gain = difference_text(more, tables[1.0]["conversation"][more.index])
    return (
        f"By the {name} strength {best:g} is highest, {gain} above strength 1. It was picked on these very contexts, "
        "which flatters it: look at it again on others."
    )


def _differences(table: pd.DataFrame, name: str) -> pd.Series:
    """Soft minus hard, of the contexts where the score left neither out."""
    return (table[f"soft_{name}"] - table[f"hard_{name}"]).dropna()


def picture(tables: Mapping[float, pd.DataFrame], names: Sequence[str], path: Path) -> None:
    """Over strength: soft minus hard of each score, and the KL where it is known, with their intervals."""
    panels = {f"{name}, soft minus hard": {at: _differences(t, name) for at, t in tables.items()} for name in names}
    if tables[1.0]["kl"].notna().all():
        panels["KL to the hard prompt, nats a reply"] = {at: table["kl"] for at, table in tables.items()}
    if not panels:
        return
    figure = Figure(figsize=(4.5 * len(panels), 3.5), layout="constrained")
    for axis, (title, values) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        conversations = tables[1.0]["conversation"]
        points = [(at, *mean_interval(v, conversations[v.index])) for at, v in values.items() if len(v)]
        at, mean, low, high = np.array(points).T
        axis.fill_between(at, low, high, alpha=0.2)
        axis.plot(at, mean, marker="o")
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.axvline(1, color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=title, xlabel="strength: 0 hard prompt, 1 trained", xticks=list(at))
    figure.savefig(path, dpi=120)
