"""What a comparison of soft and hard says: numbers, a Markdown report, a picture, and the over-optimisation verdict.

The comparison table is that of `soft_vs_hard`.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from h2s.errors import RunError
from h2s.report.intervals import adjusted_interval, difference_text, few_conversations, mean_interval, sign_test_text
from h2s.report.verdict import NOT_SCORED, verdict

DIFFERENCES_PICTURE = "differences.png"
# What `summarise` says of a score, and of the replies.
SCORE_METRICS = (
    "soft_{name}",
    "hard_{name}",
    "{name}_difference",
    "{name}_difference_low",
    "{name}_difference_high",
    "{name}_same_length",
    "{name}_same_length_low",
    "{name}_same_length_high",
    "{name}_win",
    "{name}_tie",
)
REPLY_METRICS = ("kl", "soft_tokens", "hard_tokens", "soft_unfinished", "hard_unfinished", "contexts")
# A reply that is cut is scored as it stands, and a prompt that has learnt to end gains there by ending alone. From two
# cut replies in five on, the contexts where both end are so few that the rest can carry the mean.
UNFAIR_SHARE_CUT = 0.4


def metric_names(scores: Iterable[str]) -> list[str]:
    """All that `summarise` says of these scores."""
    return [*(metric.format(name=name) for name in scores for metric in SCORE_METRICS), *REPLY_METRICS]


def summarise(table: pd.DataFrame, name: str = "reward") -> dict[str, float]:
    """The paired comparison in numbers, the difference being soft minus hard of one reward."""
    scored = _scored(table, name)
    soft, hard, conversations = scored[f"soft_{name}"], scored[f"hard_{name}"], scored["conversation"]
    values = [soft.mean(), hard.mean(), *mean_interval(soft - hard, conversations)]
    values += [*adjusted_interval(soft - hard, _longer(scored), conversations)[:3]]
    values += [(soft > hard).mean(), (soft == hard).mean()]
    replies = [table["kl"].mean(), table["soft_tokens"].mean(), table["hard_tokens"].mean()]
    replies += [1 - table["soft_finished"].mean(), 1 - table["hard_finished"].mean(), len(table)]
    return {n: float(v) for n, v in zip(metric_names([name]), [*values, *replies], strict=True)}


def of_hard_prompt(metric: str, metrics: Mapping[str, float]) -> float:
    """What the hard prompt has on a metric of `summarise`: over itself, or beside the soft one in that comparison."""
    if metric == "kl" or "_difference" in metric or "_same_length" in metric:
        return 0.0
    if metric.endswith("_win"):
        return 1 - metrics[metric] - metrics[metric.removesuffix("_win") + "_tie"]
    return metrics[metric.replace("soft_", "hard_")]


def unfair_match(table: pd.DataFrame) -> str | None:
    """The line that says so where the cap on a reply's tokens cuts too many of the hard prompt's; else None."""
    cut = table.loc[~table["hard_finished"].astype(bool), "hard_tokens"]
    share = len(cut) / len(table)
    if share < UNFAIR_SHARE_CUT:
        return None
    return (
        f"No fair match: the cap of {cut.max()} tokens cut {share:.0%} of the hard prompt's replies. Raise "
        "max_completion_length (in train_policy.py eval_max_completion_length is enough), so that they can end."
    )


def _scored(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The contexts of which neither reply was left out by the reward.

    Raises:
        RunError: it left out all of them.
    """
    scored = table.dropna(subset=[f"soft_{name}", f"hard_{name}"])
    if scored.empty:
        raise RunError(f"the {name} returned None for every pair of replies: there is nothing to compare")
    return scored


def _longer(table: pd.DataFrame) -> pd.Series:
    return table["soft_tokens"] - table["hard_tokens"]


def _extrapolated(name: str, longer: pd.Series) -> str | None:
    """The line that says so where no context has replies of equal length, nor some of either sign; else None."""
    if longer.min() <= 0 <= longer.max():
        return None
    least, which = int(longer.abs().min()), "longer" if longer.min() > 0 else "shorter"
    return (
        f"Every soft reply is {which} than the hard one, by {least} token{'s' * (least != 1)} or more: equal length "
        f"lies outside the data, and what stands there for the {name} is extrapolated."
    )


def write_comparison(table: pd.DataFrame, names: Sequence[str], folder: Path, kept: str = "") -> str:
    """Draw `differences.png` into a folder, if there are scores; returns the Markdown `report`."""
    if names:
        picture(table, names, folder / DIFFERENCES_PICTURE)
    return report(table, names, kept)


def report(table: pd.DataFrame, names: Sequence[str], kept: str = "") -> str:
    """The paired comparison as Markdown, for people: what came out, what to beware of, the table.

    A gain that is length is called so. Where both replies finished is seen only once they are drawn: what the prompts
    say there is compared fairly, but these are the contexts that both answer briefly.

    Args:
        table: the comparison table.
        names: of its scores.
        kept: a line on which step it is of.
    """
    lines = ["| | soft | hard | soft minus hard (95% interval) |", "|---|---|---|---|"]
    conversations = table["conversation"]
    count = conversations.nunique()
    words, notes = NOT_SCORED, []
    for name in names:
        scored = _scored(table, name)
        soft, hard, groups = scored[f"soft_{name}"], scored[f"hard_{name}"], scored["conversation"]
        if name == ("judge" if "judge" in names else names[0]):
            words = verdict(name, (soft - hard).tolist(), groups.tolist())
        lines.append(_row(name, soft, hard, groups))
        left, low, high, slope = adjusted_interval(soft - hard, _longer(scored), groups)
        interval = f"[{low:+.3f}, {high:+.3f}]" if groups.nunique() > 2 else "(no interval)"
        lines.append(f"| {name}, at equal length | | | {left:+.3f} {interval}, {slope:+.3f} a token |")
        lines.append(_both_finished_row(name, scored))
        wins, losses = int((soft > hard).sum()), int((soft < hard).sum())
        test = f"{len(scored) - wins - losses} ties; {sign_test_text(soft - hard, groups)}"
        lines.append(f"| {name}: wins of {len(scored)} | {wins} | {losses} | {test} |")
        if len(scored) < len(table):
            notes.append(f"The {name} left {len(table) - len(scored)} contexts out (it returned None).")
        if mean_interval(soft - hard, groups)[1] > 0 >= low:
            notes.append(f"At equal length no gain in {name} is shown: the gain may be length.")
        if note := _extrapolated(name, _longer(scored)):
            notes.append(note)
    for label, column, scale in (("tokens", "tokens", 1), ("unfinished", "finished", -1)):
        soft, hard = table[f"soft_{column}"].astype(float), table[f"hard_{column}"].astype(float)
        if scale < 0:
            soft, hard = 1 - soft, 1 - hard
        lines.append(_row(label, soft, hard, conversations))
    kl = "-"
    if table["kl"].notna().all():
        kl = "{:.3f} [{:.3f}, {:.3f}]".format(*mean_interval(table["kl"], conversations))
    lines.append(f"| KL to the hard prompt, nats a reply | {kl} | 0 | |")
    if unfair := unfair_match(table):
        notes.append(unfair)
    if note := few_conversations(count):
        notes.append(note)
    return "\n".join(
        [words, *([kept] if kept else []), *notes, "", *lines, f"\nn = {len(table)} contexts of {count} conversations."]
    )


def _both_finished_row(name: str, scored: pd.DataFrame) -> str:
    """The same difference over the contexts where neither reply was cut."""
    ended = scored[scored["soft_finished"].astype(bool) & scored["hard_finished"].astype(bool)]
    label = f"{name}, both replies finished"
    if ended.empty:
        return f"| {label} | | | none of {len(scored)} |"
    soft, hard = ended[f"soft_{name}"], ended[f"hard_{name}"]
    difference = difference_text(soft - hard, ended["conversation"])
    return f"| {label} | {soft.mean():.3f} | {hard.mean():.3f} | {difference}, {len(ended)} of {len(scored)} |"


def _row(label: str, soft: pd.Series, hard: pd.Series, conversations: pd.Series) -> str:
    return f"| {label} | {soft.mean():.3f} | {hard.mean():.3f} | {difference_text(soft - hard, conversations)} |"


def picture(table: pd.DataFrame, names: Sequence[str], path: Path) -> None:
    """Soft minus hard of each context, sorted, a panel a score; the line and band are the mean and its interval."""
    figure = Figure(figsize=(6 * len(names), 4), layout="constrained")
    for axis, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        scored = _scored(table, name)
        differences, conversations = scored[f"soft_{name}"] - scored[f"hard_{name}"], scored["conversation"]
        ordered = np.sort(differences.to_numpy())
        colours = ["tab:blue" if d > 0 else "tab:red" for d in ordered]
        axis.bar(range(len(ordered)), ordered, color=colours)
        mean, low, high = mean_interval(differences, conversations)
        axis.axhline(mean, color="black", linewidth=1)
        axis.axhspan(low, high, color="black", alpha=0.15)
        axis.axhline(0, color="grey", linewidth=0.8)
        title = f"{name}: {difference_text(differences, conversations)}, n={len(scored)}"
        axis.set(title=title, xlabel="contexts, sorted", ylabel="soft minus hard")
    figure.savefig(path, dpi=120)


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


def over_optimisation_line(best: dict, last: dict) -> str:
    """The verdict in words, with the judge's intervals: a small fall may be chance."""
    judged = [
        f"{e['eval_judge_difference']:+.3f} [{e['eval_judge_difference_low']:+.3f}, "
        f"{e['eval_judge_difference_high']:+.3f}]"
        for e in (best, last)
    ]
    return (
        f"over-optimisation: since step {best['step']} the reward rose from {best['eval_reward_difference']:+.3f} to "
        f"{last['eval_reward_difference']:+.3f} and the judge fell from {judged[0]} to {judged[1]}"
    )
