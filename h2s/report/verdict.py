"""What came out, in sentences that need no table: gained, lost or not shown, and how many judgements would show it."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import expit

from h2s.report.intervals import conversations_needed, difference_text, mean_interval

# Beyond these a difference is as good as none.
MOST_CONVERSATIONS = 10_000
NOT_SCORED = "Not scored: neither a reward nor a judge was given."
NO_JUDGE = "No judge was given, and the reward that a prompt was trained on shows movement, not what people like."


def verdict(score: str, differences: Sequence[float], conversations: Sequence[str]) -> str:
    """Whether the soft prompt gained: one line, and a second one on what would show it where neither is shown.

    Args:
        score: `judge`, or where there is none the reward, which the line then says.
        differences: soft minus hard, one a context.
        conversations: of each context.
    """
    shown = _shown(differences, conversations)
    word = {1: "Gained", -1: "Lost", 0: "Not shown"}[shown]
    line = f"{word}, by the {score}: soft minus hard {_measured(differences, conversations, 'context')}."
    if score != "judge":
        line += f" {NO_JUDGE}"
    return line if shown else f"{line}\n{needed(differences, conversations, 'context')}"


def accuracy_verdict(differences: Sequence[float], conversations: Sequence[str]) -> str:
    """Whether a reward model is better than preferring the longer reply: one line, or two as `verdict`.

    Args:
        differences: the model right minus the longer reply right, one a pair.
        conversations: of each pair.
    """
    shown = _shown(differences, conversations)
    word = {1: "shown", -1: "no, it is worse", 0: "not shown"}[shown]
    line = f"Better than 'the longer wins': {word}, {_measured(differences, conversations, 'pair')}."
    return line if shown else f"{line}\n{needed(differences, conversations, 'judgement')}"


def calibration_verdict(margins: Sequence[float], right: Sequence[float], conversations: Sequence[str]) -> str:
    """Whether a reward model's probabilities can be taken at their word, in one line.

    Args:
        margins: chosen minus rejected, one a pair.
        right: 1 where the model prefers the chosen one, one half where it is even, else 0.
        conversations: of each pair.
    """
    given, hits = expit(np.abs(margins)), np.asarray(right)
    what = {
        1: "too sure of itself, so take its probabilities with a grain of salt",
        -1: "not sure enough of itself, it is right more often than it says",
        0: "these pairs do not show it too sure of itself, nor too little",
    }[_shown((given - hits).tolist(), conversations)]
    said = f"On average it gives the reply that it prefers {given.mean():.0%} and is right in {hits.mean():.0%}"
    return f"{said}: {what}."


def needed(differences: Sequence[float], conversations: Sequence[str], what: str) -> str:
    """How many conversations would show a difference of the observed size with 80% power, in one line."""
    count = len(set(conversations))
    if count < 2:
        return "One conversation alone shows nothing: bring more."
    more = conversations_needed(differences, conversations)
    if more > MOST_CONVERSATIONS:
        return f"Next to nothing is there to be shown: it would take more than {MOST_CONVERSATIONS:,} conversations."
    rows = math.ceil(more * len(differences) / count)
    return (
        f"If the difference is as large as it looks here, it would take about {math.ceil(more):,} conversations "
        f"({rows:,} {what}s) to show it (80% power)."
    )


def _shown(differences: Sequence[float], conversations: Sequence[str]) -> int:
    """1 where the 95% interval of the mean lies above 0, -1 where below, else 0; a single conversation has none."""
    if len(set(conversations)) < 2:
        return 0
    _, low, high = mean_interval(differences, conversations)
    return int(low > 0) - int(high < 0)


def _measured(differences: Sequence[float], conversations: Sequence[str], what: str) -> str:
    """The mean difference, its interval, and on how many of what."""
    rows, count = len(differences), len(set(conversations))
    interval = " (95% interval)" * (count > 1)
    on = f"{rows} {what}{'s' * (rows != 1)} ({count} conversation{'s' * (count != 1)})"
    return f"{difference_text(differences, conversations)}{interval}, {on}"
