import math

import pytest

from h2s.report.verdict import accuracy_verdict, calibration_verdict, needed, verdict

NO_JUDGE = " No judge was given, and the reward that a prompt was trained on shows movement, not what people like."


# Four conversations of one context: a standard error of sqrt(sum of squares / 12), times Student's 3.182.
@pytest.mark.parametrize(
    ("differences", "line"),
    [
        # 1 +- 3.182 / sqrt(3) * 0.5
        ([0.5, 1.5, 0.5, 1.5], "Gained, by the judge: soft minus hard +1.000 [+0.081, +1.919]"),
        ([-0.5, -1.5, -0.5, -1.5], "Lost, by the judge: soft minus hard -1.000 [-1.919, -0.081]"),
        ([0.0, 2.0, 0.0, 2.0], "Not shown, by the judge: soft minus hard +1.000 [-0.837, +2.837]"),
        ([0.0, 0.0, 0.0, 0.0], "Not shown, by the judge: soft minus hard +0.000 [+0.000, +0.000]"),
        ([2.0, 2.0, 2.0, 2.0], "Gained, by the judge: soft minus hard +2.000 [+2.000, +2.000]"),
    ],
)
def test_gained_lost_or_not_shown_by_hand(differences, line):
    first, *more = verdict("judge", differences, list("abcd")).splitlines()
    assert first == f"{line} (95% interval), 4 contexts (4 conversations)."
    assert more == [needed(differences, list("abcd"), "context")] * line.startswith("Not shown")
    assert verdict("reward", differences, list("abcd")).splitlines()[0] == first.replace("judge", "reward") + NO_JUDGE


def test_a_single_conversation_shows_nothing():
    """However far its contexts are from nothing: they may all depend on one another."""
    assert verdict("judge", [1.0, 1.5, 2.0], ["a", "a", "a"]) == (
        "Not shown, by the judge: soft minus hard +1.500 (no interval), 3 contexts (1 conversation).\n"
        "One conversation alone shows nothing: bring more."
    )
    assert ", 1 context (1 conversation)." in verdict("judge", [1.0], ["a"])


@pytest.mark.parametrize(
    ("differences", "line"),
    [
        ([0.0, 1.0, 0.5, 1.0, 1.0, 1.0], "shown, +0.750 [+0.311, +1.189] (95% interval), 6 pairs (6 conversations)."),
        (
            [0.0, -1.0, -0.5, -1.0, -1.0, -1.0],
            "no, it is worse, -0.750 [-1.189, -0.311] (95% interval), 6 pairs (6 conversations).",
        ),
        (
            [1.0, -1.0, 1.0, -1.0, 1.0, 0.0],
            "not shown, +0.167 [-0.865, +1.198] (95% interval), 6 pairs (6 conversations).",
        ),
    ],
)
def test_better_than_the_longer_wins_by_hand(differences, line):
    """Six conversations: Student's 2.571 times sqrt(sum of squares / 30), the squares being 0.875 and 4.833."""
    first, *more = accuracy_verdict(differences, list("abcdef")).splitlines()
    assert first == f"Better than 'the longer wins': {line}"
    assert more == [needed(differences, list("abcdef"), "judgement")] * ("not shown" in line)


@pytest.mark.parametrize(
    ("given", "right", "line"),
    [
        (
            0.9,
            [1, 0, 1, 0, 0, 0],
            "90% and is right in 33%: too sure of itself, so take its probabilities with a grain",
        ),
        (0.55, [1, 1, 1, 1, 1, 0.5], "55% and is right in 92%: not sure enough of itself, it is right more often than"),
        (0.8, [1, 1, 1, 1, 1, 0], "80% and is right in 83%: these pairs do not show it too sure of itself, nor too"),
    ],
)
def test_calibration_in_a_sentence(given, right, line):
    """Right in a third is 0.567 +- 2.571 * sqrt(1.333 / 30) too sure; either sign of a margin is as sure."""
    margins = [math.log(given / (1 - given)) * (-1) ** i for i in range(6)]
    said = calibration_verdict(margins, right, list("abcdef"))
    assert said.startswith(f"On average it gives the reply that it prefers {line}")
    assert "nor too little" in calibration_verdict(margins, right, ["a"] * 6)  # a single conversation shows neither


def test_how_many_would_be_needed():
    """An effect of 1 over a spread of sqrt(4 / 3), in as many contexts a conversation as here."""
    line = "If the difference is as large as it looks here, it would take about {} (80% power)."
    assert needed([0, 2, 0, 2], list("abcd"), "context") == line.format("13 conversations (13 contexts) to show it")
    twice = needed([0, 2, 0, 2] * 2, list("abcd") * 2, "judgement")
    assert twice == line.format("13 conversations (26 judgements) to show it")


@pytest.mark.parametrize("differences", [[0, 0, 0], [1, -1, 0], [1, -1, 0.01]])
def test_next_to_nothing_to_be_shown(differences):
    assert needed(differences, list("abc"), "context") == (
        "Next to nothing is there to be shown: it would take more than 10,000 conversations."
    )
