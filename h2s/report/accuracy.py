"""How far a reward model can be trusted: its accuracy on pairs that it never saw, beside baselines on the same pairs.

A *pair table* has a row a judged pair: `conversation`, `row` (of the sheet), `label` (0 the policy's response is
better, 1 the reference's), `margin` (the model's chosen minus rejected) and `length_difference` (characters, chosen
minus rejected).
"""

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from datasets import Dataset
from matplotlib.figure import Figure
from scipy.special import expit

from h2s.data.datasets import LABELS, POLICY_BETTER, REFERENCE_BETTER, Judgements
from h2s.data.messages import Messages
from h2s.data.splits import Part, conversations_of
from h2s.report.agreement import agreement_text
from h2s.report.intervals import difference_text, few_conversations, share_interval, share_text
from h2s.report.verdict import accuracy_verdict, calibration_verdict
from h2s.reward.model import RewardModel
from h2s.reward.pairs import reply_text

logger = logging.getLogger(__name__)

ACCURACY_REPORT, ACCURACY_PICTURE, PAIRS = "accuracy.md", "accuracy.png", "pairs.parquet"
# Confidence is at least one half: the model always prefers one of the two.
CONFIDENCE_BINS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class Scores(Protocol):
    """What says how good a reply is: a `RewardModel`, or DPO's implicit reward."""

    def score(
        self, contexts: Sequence[str | Messages], responses: Sequence[str | Messages], progress: str | None = None
    ) -> torch.Tensor:
        """A number a reply, shape (N,)."""


# On the picture: what the bar is called, and the column of the pair table.
BASELINES = {"longer wins": "length_difference"}


def sheet_report(judgements: Judgements) -> str:
    """What is odd about sheets, in lines: judgements given twice, contradictions, a preferred side, agreement."""
    seen: dict[tuple[str, frozenset[str]], list[str]] = {}
    for row in judgements.dataset:
        chosen, rejected = reply_text(row["chosen"]), reply_text(row["rejected"])
        seen.setdefault((repr(row["prompt"]), frozenset((chosen, rejected))), []).append(chosen)
    repeated = {pair: votes for pair, votes in seen.items() if len(votes) > 1}
    contradictory = sum(len(set(votes)) > 1 for votes in repeated.values())
    identical = sum(len(responses) == 1 for _, responses in seen)
    labels, conversations = judgements.dataset["label"], conversations_of(judgements.dataset)
    sides = [float(label == POLICY_BETTER) for label in labels]
    _, low, high = share_interval(sides, conversations)
    bias = "" if low <= 0.5 <= high else "; one side is preferred: were they shuffled?"
    lines = [
        f"pairs judged more than once {len(repeated)}, of them contradictory {contradictory}; "
        f"pairs of two identical responses {identical}",
        f"the policy's side is the better one in {share_text(sides, conversations)}{bias}",
    ]
    if len(judgements.unjudged) > 1:
        lines.append(agreement_text(votes.values() for votes in _votes(judgements).values()))
    return "\n".join(lines)


def _votes(judgements: Judgements) -> dict[Any, dict[str, int]]:
    """Of each pair, whichever side its replies stood on, the label that each file gave it first."""
    votes: dict[Any, dict[str, int]] = {}
    exchanged = {POLICY_BETTER: REFERENCE_BETTER, REFERENCE_BETTER: POLICY_BETTER}
    for row in judgements.rows:
        replies = (row.policy_response, row.reference_response)
        label = row.label if replies[0] <= replies[1] else exchanged.get(row.label, row.label)
        votes.setdefault((repr(row.prompt), *sorted(replies)), {}).setdefault(row.file, label)
    return votes


def pair_table(reward: Scores, test: Dataset) -> pd.DataFrame:
    """Score pairs that `reward` has not seen."""
    chosen = reward.score(test["prompt"], test["chosen"], "scoring")
    rejected = reward.score(test["prompt"], test["rejected"], "scoring")
    lengths = [len(reply_text(c)) - len(reply_text(r)) for c, r in zip(test["chosen"], test["rejected"], strict=True)]
    return pd.DataFrame(
        {
            "conversation": conversations_of(test),
            "row": test["row"],
            "label": test["label"],
            "margin": (chosen - rejected).double().numpy(),
            "length_difference": lengths,
        }
    )


def right(margins: Sequence[float]) -> pd.Series:
    """1 where the chosen response is ahead, one half where both are even, else 0."""
    return pd.Series((np.sign(np.asarray(margins, dtype=float)) + 1) / 2)


def calibration(table: pd.DataFrame) -> pd.DataFrame:
    """Reliability: how often the model is right where it says so with a probability p = sigmoid(|margin|).

    Returns:
        A row a bin that holds pairs: `low`, `high`, `pairs`, `confidence` (mean), `accuracy`, `accuracy_low`,
        `accuracy_high`.
    """
    confidence = expit(table["margin"].abs())
    # The last bin holds its upper end: a sigmoid rounds to 1.
    bins = np.minimum(np.digitize(confidence, CONFIDENCE_BINS) - 1, len(CONFIDENCE_BINS) - 2)
    rows = []
    for i, (low, high) in enumerate(pairwise(CONFIDENCE_BINS)):
        chosen = bins == i
        if chosen.any():
            share = share_interval(right(table["margin"])[chosen].tolist(), table["conversation"][chosen].tolist())
            rows.append((low, high, int(chosen.sum()), float(confidence[chosen].mean()), *share))
    names = ["low", "high", "pairs", "confidence", "accuracy", "accuracy_low", "accuracy_high"]
    return pd.DataFrame(rows, columns=names)


def expected_calibration_error(bins: pd.DataFrame) -> float:
    """Mean |confidence - accuracy| over the pairs (Naeini et al. 2015)."""
    return float(((bins["confidence"] - bins["accuracy"]).abs() * bins["pairs"]).sum() / bins["pairs"].sum())


def log_loss(table: pd.DataFrame) -> float:
    """The pairwise logistic loss in nats; ln 2 = 0.693 is that of a coin."""
    return float(np.logaddexp(0, -table["margin"]).mean())


def accuracy_line(table: pd.DataFrame) -> str:
    """The model's accuracy with its interval."""
    return share_text(right(table["margin"]).tolist(), table["conversation"].tolist())


def length_groups(table: pd.DataFrame) -> pd.Series:
    """Quartiles of how much the two responses differ in length, as labels like `12 to 40 characters`."""
    size = table["length_difference"].abs()
    quartile = pd.qcut(size, 4, labels=False, duplicates="drop").fillna(0)
    spans = {q: f"{size[quartile == q].min()} to {size[quartile == q].max()}" for q in quartile.unique()}
    return quartile.map(spans)


def accuracy_report(table: pd.DataFrame, what: str) -> str:
    """The pair table as Markdown, for people: two sentences, then the tables. `what` says which pairs these are."""
    conversations = table["conversation"].tolist()
    model, longer = right(table["margin"]), right(table["length_difference"])
    bins = calibration(table)
    lines = [
        accuracy_verdict((model - longer).tolist(), conversations),
        calibration_verdict(table["margin"].tolist(), model.tolist(), conversations),
        *filter(None, [few_conversations(len(set(conversations)))]),
        "",
        f"| {what} | accuracy, 95% interval |",
        "|---|---|",
        f"| this model | {share_text(model.tolist(), conversations)} |",
        f"| the longer response wins | {share_text(longer.tolist(), conversations)} |",
        "| chance | 0.500 |",
        f"| this model minus the longer response | {difference_text((model - longer).tolist(), conversations)} |",
        "",
        "| it says so with a probability of | pairs | mean probability | right, 95% interval |",
        "|---|---|---|---|",
    ]
    for b in bins.itertuples():
        interval = f"{b.accuracy:.3f} [{b.accuracy_low:.3f}, {b.accuracy_high:.3f}]"
        lines.append(f"| {b.low:.1f} to {b.high:.1f} | {b.pairs} | {b.confidence:.3f} | {interval} |")
    lines += [
        "",
        f"Expected calibration error {expected_calibration_error(bins):.3f}; log loss {log_loss(table):.3f} nats "
        f"(a coin: 0.693).{_agreement(table)}",
        "",
        "| pairs | this model | the longer response wins |",
        "|---|---|---|",
    ]
    groups = {f"labelled {n} ({LABELS[n]})": table["label"] == n for n in sorted(table["label"].unique())}
    spans = length_groups(table)
    for span in sorted(spans.unique(), key=lambda s: int(s.split()[0])):
        groups[f"lengths differ by {span} characters"] = spans == span
    for name, chosen in groups.items():
        chosen, where = chosen.to_numpy(), table["conversation"][chosen.to_numpy()].tolist()
        lines.append(f"| {name} | {share_text(model[chosen].tolist(), where)} | {longer[chosen].mean():.3f} |")
    return "\n".join(lines)


def _agreement(table: pd.DataFrame) -> str:
    """How often the model prefers the longer response, where the lengths differ."""
    differ = table["length_difference"] != 0
    if not differ.any():
        return ""
    agrees = (np.sign(table["margin"]) == np.sign(table["length_difference"]))[differ].mean()
    return f" It sides with the longer response in {agrees:.0%} of the pairs."


def accuracy_picture(table: pd.DataFrame, path: Path) -> None:
    """Three panels: accuracy beside the baselines, reliability, accuracy by difference in length."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    bars, reliability, lengths = figure.subplots(1, 3)
    sides = {"this model": "margin"} | BASELINES
    conversations = table["conversation"].tolist()
    _bars(bars, {name: (right(table[column]).tolist(), conversations) for name, column in sides.items()})
    bars.set_title(f"accuracy, n={len(table)} ({len(set(conversations))} conversations)")
    bins = calibration(table)
    reliability.plot([0.5, 1], [0.5, 1], color="grey", linestyle="--", linewidth=1)
    errors = [bins["accuracy"] - bins["accuracy_low"], bins["accuracy_high"] - bins["accuracy"]]
    reliability.errorbar(bins["confidence"], bins["accuracy"], yerr=errors, fmt="o", capsize=3)
    for b in bins.itertuples():
        reliability.annotate(f"n={b.pairs}", (b.confidence, b.accuracy), xytext=(4, 4), textcoords="offset points")
    reliability.set(xlabel="probability it gives", ylabel="how often it is right", title="reliability", ylim=(0, 1.02))
    spans = length_groups(table)
    model = right(table["margin"])
    groups = {}
    for span in sorted(spans.unique(), key=lambda s: int(s.split()[0])):
        chosen = (spans == span).to_numpy()
        groups[span] = (model[chosen].tolist(), table["conversation"][chosen].tolist())
    _bars(lengths, groups)
    lengths.set(title="by difference in length, characters")
    figure.savefig(path, dpi=120)


def _bars(axis, groups: dict[str, tuple[list[float], list[str]]]) -> None:
    """Shares with their intervals, and chance as a line."""
    for i, (name, (values, conversations)) in enumerate(groups.items()):
        share, low, high = share_interval(values, conversations)
        axis.bar(i, share, color="lightsteelblue" if name in BASELINES else "tab:blue")
        axis.errorbar(i, share, yerr=[[share - low], [high - share]], color="black", capsize=4)
    axis.axhline(0.5, color="grey", linestyle="--", linewidth=1)
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set(ylim=(0, 1.02), ylabel="accuracy, 95% interval")


def cross_validate(
    train: Callable[[dict[Part, Dataset], Path], RewardModel],
    folds: Sequence[dict[Part, Dataset]],
    folder: Path,
    is_main_process: bool,
) -> pd.DataFrame:
    """The pair table of a whole sheet, each pair scored by a model that never saw its conversation.

    Args:
        train: makes a model of a fold's parts in a folder of its own.
        folds: as `folds_by_conversation` gives them.
        folder: the run's; finished folds are kept in it, and a run that resumes does not train them again.
        is_main_process: whether this process writes.
    """
    tables: list[pd.DataFrame] = []
    started = time.time()
    for number, parts in enumerate(folds, start=1):
        where = folder / "folds" / str(number)
        if not (where / PAIRS).is_file():
            table = pair_table(train(parts, where), parts["test"])
            if is_main_process:
                shutil.rmtree(where, ignore_errors=True)  # its checkpoints
                where.mkdir(parents=True)
                table.to_parquet(where / f"unfinished-{PAIRS}")
                (where / f"unfinished-{PAIRS}").rename(where / PAIRS)  # a kill leaves it whole or not there
            PartialState().wait_for_everyone()
        tables.append(pd.read_parquet(where / PAIRS))
        left = (time.time() - started) / number * (len(folds) - number) / 60
        accuracy = accuracy_line(tables[-1])
        logger.info("fold %d of %d: accuracy %s; %.0f minutes left", number, len(folds), accuracy, left)
    return pd.concat(tables, ignore_index=True)


def write_accuracy(
    reward: Scores,
    test: Dataset,
    judgements: Judgements,
    folder: Path,
    cross_validated: pd.DataFrame | None = None,
    folds: int = 0,
) -> str:
    """Write `accuracy.md`, `accuracy.png` and `pairs.parquet` into a model's folder; returns the report.

    Args:
        reward: the model.
        test: pairs that it never saw.
        judgements: the whole sheet.
        folder: where to.
        cross_validated: the pair table of all of the sheet; what the files hold if it is there.
        folds: how many models made it.
    """
    table, what, more = pair_table(reward, test), "on conversations that it never saw", ""
    if cross_validated is not None:
        more = "\n\n" + accuracy_report(table, "on conversations that this model never saw")
        table, what = cross_validated, f"on all conversations, each by a model that never saw it ({folds} folds)"
    text = accuracy_report(table, what)
    page = f"# Accuracy\n\n{text}\n\n![]({ACCURACY_PICTURE})\n\n{judgements.summary()}\n\n{sheet_report(judgements)}\n"
    (folder / ACCURACY_REPORT).write_text(page, encoding="utf-8")
    accuracy_picture(table, folder / ACCURACY_PICTURE)
    table.to_parquet(folder / PAIRS)
    return text + more
