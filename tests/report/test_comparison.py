import math

import pandas as pd
import pytest

from h2s.errors import RunError
from h2s.report.comparison import (
    HARD_PROMPT_EVALUATION,
    metric_names,
    of_hard_prompt,
    over_optimisation_line,
    over_optimised,
    picture,
    report,
    summarise,
    unfair_match,
    write_comparison,
)

T = 12.7062  # Student's with 1 degree of freedom, at 97.5%

# In numbers


def test_summarise_by_hand(compared):
    expected = {
        "soft_reward": 2.0,
        "hard_reward": 1.0,
        "reward_difference": 1.0,
        "reward_difference_low": 1 - T / 2,
        "reward_difference_high": 1 + T / 2,
        "reward_same_length": 0.0,
        "reward_same_length_low": 0.0,
        "reward_same_length_high": 0.0,
        "reward_win": 0.5,
        "reward_tie": 0.25,
        "kl": 1.0,
        "soft_tokens": 7.0,
        "hard_tokens": 3.0,
        "soft_unfinished": 0.25,
        "hard_unfinished": 0.5,
        "contexts": 4.0,
    }
    assert summarise(compared) == pytest.approx(expected, abs=1e-4)
    assert list(summarise(compared)) == list(expected) == metric_names(["reward"])
    renamed = compared.rename(columns={"soft_reward": "soft_judge", "hard_reward": "hard_judge"})
    of_judge = {name.replace("reward", "judge"): value for name, value in expected.items()}
    assert summarise(renamed, "judge") == pytest.approx(of_judge, abs=1e-4)


def test_metric_names_are_what_summarise_says(compared):
    """So a run can be refused before its first evaluation for a metric that it would not have."""
    compared["soft_judge"], compared["hard_judge"] = 1.5, 2.0
    both = summarise(compared) | summarise(compared, "judge")
    assert sorted(metric_names(["reward", "judge"])) == sorted(both)
    assert all(type(value) is float for value in both.values())


def test_what_a_reward_left_out_is_left_out_of_its_numbers_alone(compared):
    """The second and the fourth context: those of the judge are not; nor are tokens, ends and KL."""
    compared.loc[1, "soft_reward"] = compared.loc[3, "hard_reward"] = math.nan
    compared["soft_judge"], compared["hard_judge"] = [1.0, 2.0, 3.0, 4.0], 0.0
    numbers = summarise(compared)
    # Differences 2 and 0, one a conversation: their mean's standard error is 1.
    expected = {"soft_reward": 2.0, "hard_reward": 1.0, "reward_difference": 1.0, "reward_win": 0.5, "reward_tie": 0.5}
    expected |= {"reward_difference_low": 1 - T, "reward_difference_high": 1 + T}
    expected |= {"contexts": 4.0, "kl": 1.0, "soft_tokens": 7.0, "soft_unfinished": 0.25}
    assert {name: numbers[name] for name in expected} == pytest.approx(expected, abs=1e-3)
    assert summarise(compared, "judge")["soft_judge"] == 2.5
    lines = report(compared, ["reward", "judge"]).splitlines()
    assert "| reward | 2.000 | 1.000 | +1.000 [-11.706, +13.706] |" in lines
    assert any(line.startswith("| reward: wins of 2 | 1 | 0 | 1 ties; exact sign test p = 1") for line in lines)
    assert any(line.startswith("| judge: wins of 4 | 4 | 0 | 0 ties; ") for line in lines)
    assert "n = 4 contexts of 2 conversations." in lines
    assert [line for line in lines if "left" in line] == ["The reward left 2 contexts out (it returned None)."]


@pytest.mark.parametrize("side", ["soft", "hard"])
def test_a_reward_that_left_out_everything_ends_the_run(compared, side, tmp_path):
    compared[f"{side}_reward"] = math.nan
    for call in (summarise, lambda t: report(t, ["reward"]), lambda t: write_comparison(t, ["reward"], tmp_path)):
        with pytest.raises(RunError, match="the reward returned None for every pair of replies"):
            call(compared)


# In words


def test_report_by_hand(compared):
    lines = report(compared, ["reward"]).splitlines()
    assert lines == [
        "Not shown, by the reward: soft minus hard +1.000 [-5.353, +7.353] (95% interval), 4 contexts (2 "
        "conversations). No judge was given, and the reward that a prompt was trained on shows movement, not what "
        "people like.",
        # The spread between two conversations is 0.5 times sqrt(2), so the effect is sqrt(2).
        "If the difference is as large as it looks here, it would take about 7 conversations (13 contexts) to show it "
        "(80% power).",
        "Every soft reply is longer than the hard one, by 2 tokens or more: equal length lies outside the data, and "
        "what stands there for the reward is extrapolated.",
        "No fair match: the cap of 4 tokens cut 50% of the hard prompt's replies. Raise max_completion_length (in "
        "train_policy.py eval_max_completion_length is enough), so that they can end.",
        "Fewer than 30 conversations (2): intervals over so few are themselves uncertain, and too narrow where scores "
        "are skewed (simulated with 10 to 25 conversations, they held the truth in 94 to 95% of normal and in 90 to "
        "93% of exponential samples).",
        "",
        "| | soft | hard | soft minus hard (95% interval) |",
        "|---|---|---|---|",
        "| reward | 2.000 | 1.000 | +1.000 [-5.353, +7.353] |",
        "| reward, at equal length | | | +0.000 (no interval), +0.250 a token |",
        "| reward, both replies finished | 3.000 | 1.000 | +2.000 (no interval), 1 of 4 |",
        "| reward: wins of 4 | 2 | 1 | 1 ties; exact sign test over conversations p = 0.5 |",
        "| tokens | 7.000 | 3.000 | +4.000 [-8.706, +16.706] |",
        "| unfinished | 0.250 | 0.500 | -0.250 [-3.427, +2.927] |",
        "| KL to the hard prompt, nats a reply | 1.000 [1.000, 1.000] | 0 | |",
        "",
        "n = 4 contexts of 2 conversations.",
    ]


@pytest.mark.parametrize(
    ("names", "differences", "begins"),
    [
        (["reward"], [2.0, 3.0, 2.0, 3.0], "Gained, by the reward: soft minus hard +2.500 [+"),
        (["reward", "judge"], [-2.0, -3.0, -2.0, -3.0], "Lost, by the judge: soft minus hard -2.500 [-"),
        (["judge", "reward"], [2.0, -3.0, 2.0, -3.0], "Not shown, by the judge: soft minus hard -0.500 [-"),
    ],
)
def test_first_line_is_the_judges_verdict_else_the_rewards(compared, names, differences, begins):
    compared["conversation"] = list("abcd")
    compared["soft_reward"], compared["hard_reward"] = 9.0, 0.0
    compared[f"soft_{'judge' if 'judge' in names else 'reward'}"] = differences
    compared["hard_judge"] = 0.0
    first = report(compared, names).splitlines()[0]
    assert first.startswith(begins) and "4 contexts (4 conversations)." in first
    assert ("No judge was given" in first) == ("judge" not in names)


def test_the_kept_step_follows_the_verdict(compared, tmp_path):
    compared["conversation"] = list("abcd")
    compared["soft_reward"] = [2.0, 3.0, 2.0, 3.0]
    first, second, *_ = write_comparison(compared, ["reward"], tmp_path, "Step 2 of 4 is kept.").splitlines()
    assert first.startswith("Gained, by the reward") and second == "Step 2 of 4 is kept."


def test_both_replies_finished_by_hand(compared):
    """Differences 2 and 3 of two conversations, the others' replies cut: 2.5, and a standard error of 0.5."""
    compared["soft_finished"], compared["hard_finished"] = [True, True, False, True], [True, False, True, True]
    row = next(line for line in report(compared, ["reward"]).splitlines() if "both replies finished" in line)
    assert row == f"| reward, both replies finished | 3.500 | 1.000 | +2.500 [{2.5 - T / 2:.3f}, +8.853], 2 of 4 |"
    compared["soft_finished"] = False
    assert "| reward, both replies finished | | | none of 4 |" in report(compared, ["reward"]).splitlines()


@pytest.mark.parametrize(
    ("cut", "expected"), [(0, None), (15, None), (16, "the cap of 9 tokens cut 40% of the hard"), (40, "cut 100% of")]
)
def test_a_cap_that_cuts_too_many_hard_replies_is_no_fair_match(compared, cut, expected):
    """Whatever becomes of the soft ones; the cap is what a reply that did not end holds."""
    many = pd.concat([compared] * 10, ignore_index=True)
    many["soft_finished"], many["hard_finished"] = False, [i >= cut for i in range(40)]
    many["hard_tokens"] = [9 if i < cut else 3 for i in range(40)]
    line = unfair_match(many)
    assert line is None if expected is None else expected in line
    assert ("No fair match" in report(many, ["reward"])) == (expected is not None)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("reward_difference", 0),
        ("reward_difference_low", 0),
        ("reward_same_length", 0),
        ("kl", 0),
        ("reward_win", 0.25),  # it wins one of four, loses two, and one is a tie
        ("soft_reward", 1.0),
        ("soft_tokens", 3.0),
        ("soft_unfinished", 0.5),
        ("hard_reward", 1.0),
        ("contexts", 4.0),
    ],
)
def test_what_the_hard_prompt_has_on_a_metric(compared, metric, expected):
    assert of_hard_prompt(metric, summarise(compared)) == expected


@pytest.mark.parametrize(
    ("longer", "says"),
    [
        ([1, 2, 3, 4], "Every soft reply is longer than the hard one, by 1 token or more"),
        ([-5, -3, -4, -3], "Every soft reply is shorter than the hard one, by 3 tokens or more"),
        ([2, 2, 2, 2], "Every soft reply is longer than the hard one, by 2 tokens or more"),
        ([0, 1, 2, 3], None),
        ([-1, 1, 2, 3], None),
    ],
)
def test_report_says_where_equal_length_lies_outside_the_data(compared, longer, says):
    """Of the contexts that the score did not leave out."""
    more = pd.concat([compared, compared[:1].assign(soft_reward=math.nan)], ignore_index=True)
    more["hard_tokens"] = 9
    more["soft_tokens"] = [9 + n for n in (*longer, 0)]
    text = report(more, ["reward"])
    assert (says or "") in text and ("outside the data" in text) == (says is not None)


@pytest.mark.parametrize(("conversations", "warned"), [(1, True), (29, True), (30, False)])
def test_report_of_few_conversations_warns(compared, conversations, warned):
    many = pd.concat([compared] * 10, ignore_index=True)
    many["conversation"] = [str(i % conversations) for i in range(40)]
    text = report(many, ["reward"])
    assert (f"Fewer than 30 conversations ({conversations})" in text) == warned
    assert ("at equal length | | | +0.000 (no interval)" in text) == (conversations == 1)


@pytest.mark.parametrize(
    ("gain", "longer", "noted"),
    [
        (lambda i: 0.5 * i, lambda i: i, True),  # nothing but length
        (lambda i: 1.0 + 0.1 * i, lambda i: i, False),  # longer, and better beyond it
        (lambda i: 1.0 + i % 3, lambda i: 0, False),  # better at the same length
        (lambda i: -0.5 * i, lambda i: i, False),  # no gain to explain
        (lambda i: (-1.0) ** i, lambda i: i % 5, False),  # neither
    ],
)
def test_report_says_where_a_gain_may_be_length(compared, gain, longer, noted):
    """Also beside a reward of which it is not so."""
    many = pd.concat([compared] * 10, ignore_index=True)
    many["conversation"] = [str(i) for i in range(40)]
    many["soft_reward"] = many["hard_reward"] + [gain(i) for i in range(1, 41)]
    many["soft_tokens"] = many["hard_tokens"] + [longer(i) for i in range(1, 41)]
    many["soft_judge"], many["hard_judge"] = 1.0, 0.0
    notes = [line for line in report(many, ["reward", "judge"]).splitlines() if "may be length" in line]
    assert notes == ["At equal length no gain in reward is shown: the gain may be length."] * noted


def test_report_without_a_kl(compared):
    """What was drawn from a part of the distribution has none."""
    compared["kl"] = math.nan
    assert "| KL to the hard prompt, nats a reply | - | 0 | |" in report(compared, ["reward"]).splitlines()


def test_report_without_a_reward(compared, tmp_path):
    lines = write_comparison(compared.drop(columns=["soft_reward", "hard_reward"]), [], tmp_path).splitlines()
    assert lines[0] == "Not scored: neither a reward nor a judge was given."
    assert not any("reward" in line for line in lines[1:]) and lines[6].startswith("| tokens |")
    assert list(tmp_path.iterdir()) == []  # there is nothing to draw


# As a picture


@pytest.mark.parametrize("names", [["reward"], ["reward", "judge"]])
def test_picture_is_a_png_with_a_panel_a_score(compared, names, tmp_path):
    """Also where a reply was left out."""
    compared["soft_judge"], compared["hard_judge"] = [1.0, 2.0, math.nan, 0.0], 2.0
    picture(compared, names, tmp_path / "differences.png")
    content = (tmp_path / "differences.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (720 * len(names), 480)
    (tmp_path / "both").mkdir()
    assert write_comparison(compared, names, tmp_path / "both") == report(compared, names)
    assert (tmp_path / "both" / "differences.png").read_bytes() == content


# A reward that rises while the judge falls


@pytest.mark.parametrize(
    ("rewards", "judges", "expected"),
    [
        ([], [], None),
        ([1], [1], None),
        ([0, 1], [0, -1], (0, 1)),
        # Below the hard prompt from the first on: that has 0 and 0.
        ([1], [-1], ("hard", 0)),
        ([2, 3], [-1, -0.5], ("hard", 1)),
        ([-1], [-1], None),
        ([0, 1], [0, 1], None),
        ([1, 0], [1, 0], None),
        ([0, 1], [2, 2], None),
        ([1, 1], [2, 1], None),
        ([1, 2, 3], [1, 3, 2], (1, 2)),
        # The judge has come back to more than ever, or not quite.
        ([1, 2, 3], [1, 0, 2], None),
        ([1, 2, 3], [2, 0, 1], (0, 2)),
        # It was so one evaluation ago; now both are low.
        ([1, 2, 0], [2, 1, 0], None),
        # Of two favourites the first is kept.
        ([0, 3, 1], [2, 2, 1], (0, 2)),
        ([3, 0, 1], [2, 2, 1], None),
        # No judge, nothing to say.
        ([0, 1, 2], None, None),
    ],
)
def test_over_optimisation_by_hand(rewards, judges, expected):
    lines = [{"step": 10 * i, "eval_reward_difference": r} for i, r in enumerate(rewards)]
    for line, judged in zip(lines, judges or [], strict=False):
        line["eval_judge_difference"] = judged
    found = over_optimised(lines)
    assert found == (expected and tuple(HARD_PROMPT_EVALUATION if i == "hard" else lines[i] for i in expected))
    # Between the evaluations lie the lines of the training, and at its end a summary.
    history = [line for e in lines for line in ({"loss": 9.0, "step": e["step"]}, e)] + [{"train_loss": 1.0}]
    assert over_optimised(history) == found


def test_the_hard_prompt_has_nothing_over_itself(compared):
    """By `summarise` of a table whose sides are equal, in the names of Trainer's log."""
    compared["soft_reward"] = compared["soft_judge"] = compared["hard_judge"] = 1.0
    numbers = summarise(compared) | summarise(compared, "judge")
    logged = {"step": 0} | {f"eval_{name}": value for name, value in numbers.items()}
    assert {name: logged[name] for name in HARD_PROMPT_EVALUATION} == HARD_PROMPT_EVALUATION


def test_over_optimisation_in_words():
    best, last = (
        {
            "step": step,
            "eval_reward_difference": reward,
            "eval_judge_difference": judge,
            "eval_judge_difference_low": judge - 0.5,
            "eval_judge_difference_high": judge + 0.25,
        }
        for step, reward, judge in ((20, 0.5, 0.75), (60, 2, -0.25))
    )
    assert over_optimisation_line(best, last) == (
        "over-optimisation: since step 20 the reward rose from +0.500 to +2.000 and the judge fell from "
        "+0.750 [+0.250, +1.000] to -0.250 [-0.750, +0.000]"
    )
    assert over_optimisation_line(HARD_PROMPT_EVALUATION, last).startswith(
        "over-optimisation: since step 0 the reward rose from +0.000 to +2.000 and the judge fell from "
        "+0.000 [+0.000, +0.000] to "
    )
