import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch

from h2s.data.messages import conversation_id
from h2s.errors import RunError
from h2s.prefix.generation import Sampling
from h2s.report.best_of_n import best_of_n, best_of_n_report, draw_hard, yardstick
from h2s.report.soft_vs_hard import soft_vs_hard
from h2s.reward.functions import RewardFunctions


@pytest.fixture
def draws():
    """Two contexts of five replies in mixed order, with ties."""
    random = np.random.default_rng(0)
    frame = pd.DataFrame({"context": [0, 1] * 5, "conversation": ["a", "b"] * 5})
    frame["reward"] = random.integers(0, 4, 10).astype(float)
    frame["judge"] = random.normal(size=10)
    assert frame.groupby("context")["reward"].nunique().max() < 5
    return frame


# What choosing gains


@pytest.mark.parametrize("left_out", [0, 2])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_equals_all_subsets(draws, n, left_out):
    """Every n of the five, the best of each by reward; of equal ones the later, for both scores.

    Two that a score left out are not there, and of the three others there is no best of five.
    """
    draws.loc[[0, 2][:left_out], ["judge", "reward"][:left_out]] = math.nan
    scored = draws.dropna()
    sizes = scored.groupby("context").size()
    expected = [context for context in (0, 1) if sizes[context] >= n]
    gained = best_of_n(draws, ["reward", "judge"], n)
    assert gained["conversation"].tolist() == ["ab"[context] for context in expected]
    for row, context in enumerate(expected):
        group = scored[scored["context"] == context].to_dict("records")
        best = [max(reversed(subset), key=lambda r: r["reward"]) for subset in itertools.combinations(group, n)]
        for name in ("reward", "judge"):
            gain = np.mean([r[name] for r in best]) - np.mean([r[name] for r in group])
            assert gained[name][row] == pytest.approx(gain)
    if n == 1:
        assert gained[["reward", "judge"]].abs().to_numpy().max() < 1e-12


def test_nothing_to_choose_from(draws):
    draws["judge"] = math.nan
    with pytest.raises(RunError, match="no context has 2 replies that reward, judge scored"):
        best_of_n(draws, ["reward", "judge"], 2)


def test_best_of_n_report_by_hand(compared):
    """Of 1 2 3 4 the best of two is 20 / 6 on average and the best of four 4, less 2.5; the judge thinks the reverse.

    Four of one context, eight of the other: a best of eight there is not. KL: ln 2 - 1 / 2, ln 4 - 3 / 4. The gains of
    the second context are 0, so the standard error of their mean is that mean.
    """
    compared["soft_judge"], compared["hard_judge"] = 1.5, 2.0
    draws = pd.DataFrame(
        {"context": [0] * 4 + [1] * 8, "conversation": list("aaaabbbbbbbb"), "reward": [3.0, 1, 4, 2] + [0] * 8}
    )
    draws["judge"] = -draws["reward"]
    expected = [
        "| chosen by reward | KL, nats a reply | reward gained (95% interval) | judge gained (95% interval) |",
        "|---|---|---|---|",
        "| hard prompt, best of 2 | at most 0.19 | +0.417 [-4.878, +5.711] | -0.417 [-5.711, +4.878] |",
        "| hard prompt, best of 4 | at most 0.64 | +0.750 [-8.780, +10.280] | -0.750 [-10.280, +8.780] |",
        "| soft prefix, one reply | 1.00 | +1.000 [-5.353, +7.353] | -0.500 [-0.500, -0.500] |",
    ]
    assert best_of_n_report(compared, draws, ["reward", "judge"]).splitlines() == expected
    # What was left out of the comparison is left out here: differences 2 and 0, one a conversation.
    compared.loc[1, "soft_reward"] = compared.loc[3, "hard_reward"] = math.nan
    compared["kl"] = math.nan
    last = best_of_n_report(compared, draws, ["reward", "judge"]).splitlines()[-1]
    assert last == "| soft prefix, one reply | - | +1.000 [-11.706, +13.706] | -0.500 [-0.500, -0.500] |"


# What it chooses from


def level_and_length(completions, level, **given):
    return [1000.0 * n + len(c[0]["content"]) for c, n in zip(completions, level, strict=True)]


SCORERS = {
    "reward": RewardFunctions(level_and_length),
    "judge": RewardFunctions(lambda completions, **given: [-len(c[0]["content"]) for c in completions], [0.5]),
}


def draw(policy, contexts, temperature=1.0, batch_size=4, seed=7, scorers=SCORERS):
    return draw_hard(policy, contexts, scorers, Sampling(8, temperature), 3, batch_size, seed)


def test_drawn_replies_are_the_hard_prompts(moved, contexts):
    """Greedily they are the hard ones of the comparison, in the order of the contexts, wherever the soft prefix is."""
    table = soft_vs_hard(moved, contexts, SCORERS, Sampling(8, 0.0), 4, 7, progress=False)
    drawn = draw(moved, contexts, 0.0)
    assert drawn["context"].tolist() == np.repeat(range(6), 3).tolist()
    names = {"conversation": "conversation", "prompt": "prompt", "reply": "hard"}
    names |= {name: f"hard_{name}" for name in SCORERS}
    assert set(drawn.columns) == {"context", *names}
    for column, source in names.items():
        assert drawn[column].tolist() == [table[source][i] for i in drawn["context"]]
    assert table["soft"].tolist() != table["hard"].tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_draws_are_replies_of_the_policy_itself(moved, contexts, temperature):
    """A batch of draws from its own seed; each scored by its own context's column."""
    drawn = draw(moved, contexts, temperature, batch_size=6)
    for rows in (range(6), range(6, 12), range(12, 18)):
        prompts = [contexts["prompt"][row // 3] for row in rows]
        with moved.hard_prompt_active():
            replies = moved.generate(prompts, 8, temperature, seed=7 + rows.start)
        assert drawn["reply"][list(rows)].tolist() == replies
        assert drawn["conversation"][list(rows)].tolist() == [conversation_id(p) for p in prompts]
    assert drawn["reward"].tolist() == [1e4 * (row // 3) + len(reply) for row, reply in enumerate(drawn["reply"])]
    assert drawn["judge"].tolist() == [-len(reply) / 2 for reply in drawn["reply"]]


def test_draws_differ_and_depend_on_the_seed_alone(moved, contexts):
    drawn = draw(moved, contexts)
    assert drawn.groupby("context")["reply"].nunique().max() > 1
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = draw(moved, contexts, scorers={})
    assert again["reply"].tolist() == drawn["reply"].tolist() and "reward" not in again
    assert torch.equal(torch.get_rng_state(), before)
    assert moved.model.active_adapter == "default"
    assert draw(moved, contexts, seed=8)["reply"].tolist() != drawn["reply"].tolist()


def test_yardstick_is_the_report_of_its_own_draws(moved, contexts):
    """The first scorer chooses: here by length, so the judge's loss is half of what the reward gains."""
    sampling = Sampling(8)
    table = soft_vs_hard(moved, contexts, SCORERS, sampling, 4, 7, progress=False)
    drawn = draw_hard(moved, contexts, SCORERS, sampling, 4, 5, 11)
    text = yardstick(table, moved, contexts, SCORERS, sampling, 4, 5, 11)
    assert text == best_of_n_report(table, drawn, ["reward", "judge"])
    lengths = drawn["reply"].str.len().groupby(drawn["context"])
    gain = (lengths.max() - lengths.mean()).mean()
    (line,) = [line for line in text.splitlines() if "best of 4" in line]
    _, _, of_reward, of_judge = line.strip("| ").split(" | ")
    assert of_reward.startswith(f"{gain:+.3f} [") and of_judge.startswith(f"{-gain / 2:+.3f} [") and gain > 1
    assert "best of 8" not in text
