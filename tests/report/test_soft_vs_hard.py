import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from tiny import sample_context

from h2s.data.messages import conversation_id
from h2s.errors import RunError
from h2s.prefix.adapter import hard_prompt_active, soft_prefix
from h2s.prefix.generation import Sampling, generate
from h2s.report.soft_vs_hard import (
    add_scores,
    answer_both,
    best_of_n,
    best_of_n_report,
    draw_hard,
    picture,
    report,
    summarise,
)

T = 12.7062  # Student's with 1 degree of freedom, at 97.5%


# The comparison in numbers


@pytest.fixture
def table():
    """Four contexts of two conversations. Differences 2, -1, 0, 3: mean 1; a's add up to 1 below it, b's to 1 above.

    So the mean's standard error is sqrt(2 * (1 + 1)) / 4 = 0.5, times T. Over the tokens' differences 2, 4, 4, 6: slope
    2 / 8, intercept 0.
    """
    return pd.DataFrame(
        {
            "conversation": ["a", "a", "b", "b"],
            "prompt": [sample_context(i) for i in range(4)],
            "soft": ["s0", "s1", "s2", "s3"],
            "hard": ["h0", "h1", "h2", "h3"],
            "soft_reward": [3.0, 0.0, 1.0, 4.0],
            "hard_reward": [1.0, 1.0, 1.0, 1.0],
            "soft_tokens": [4, 6, 8, 10],
            "hard_tokens": [2, 2, 4, 4],
            "soft_finished": [True, True, True, False],
            "hard_finished": [True, False, False, True],
            "kl": [0.5, 1.5, 2.0, 0.0],
        }
    )


def test_summarise_by_hand(table):
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
    assert summarise(table) == pytest.approx(expected, abs=1e-4)


def test_report_by_hand(table):
    lines = report(table, ["reward"]).splitlines()
    assert lines == [
        "| | soft | hard | soft minus hard (95% interval) |",
        "|---|---|---|---|",
        "| reward | 2.000 | 1.000 | +1.000 [-5.353, +7.353] |",
        "| reward, at equal length | | | +0.000 (no interval), +0.250 a token |",
        "| reward: wins of 4 | 2 | 1 | 1 ties; exact sign test over conversations p = 0.5 |",
        "| tokens | 7.000 | 3.000 | +4.000 [-8.706, +16.706] |",
        "| unfinished | 0.250 | 0.500 | -0.250 [-3.427, +2.927] |",
        "| KL to the hard prompt, nats a reply | 1.000 [1.000, 1.000] | 0 | |",
        "",
        "n = 4 contexts of 2 conversations.",
        "Fewer than 30 conversations (2): intervals are too narrow where scores are skewed or conversations differ in "
        "size (simulated with 10 and 16 conversations of one context, they covered 94 to 95% for normal and 90 to 91% "
        "for exponential scores).",
    ]


@pytest.mark.parametrize(("conversations", "warned"), [(1, True), (29, True), (30, False)])
def test_report_of_few_conversations_warns(table, conversations, warned):
    many = pd.concat([table] * 10, ignore_index=True)
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
def test_report_says_where_a_gain_may_be_length(table, gain, longer, noted):
    """Also beside a reward of which it is not so."""
    many = pd.concat([table] * 10, ignore_index=True)
    many["conversation"] = [str(i) for i in range(40)]
    many["soft_reward"] = many["hard_reward"] + [gain(i) for i in range(1, 41)]
    many["soft_tokens"] = many["hard_tokens"] + [longer(i) for i in range(1, 41)]
    many["soft_judge"], many["hard_judge"] = 1.0, 0.0
    notes = [line for line in report(many, ["reward", "judge"]).splitlines() if "may be length" in line]
    assert notes == ["At equal length no gain in reward is shown: the gain may be length."] * noted


def test_report_without_a_reward(table):
    lines = report(table.drop(columns=["soft_reward", "hard_reward"]), []).splitlines()
    assert not any("reward" in line for line in lines) and lines[2].startswith("| tokens |")


def test_add_scores(table):
    """Asked TRL's way: by name, a completion being a list of one message."""
    asked = []

    def reward(*, prompts, completions):
        asked.append((prompts, [c[0]["content"] for c in completions]))
        assert all(len(c) == 1 and c[0]["role"] == "assistant" for c in completions)
        return [10 * len(p) + int(c[0]["content"][1]) for p, c in zip(prompts, completions, strict=True)]

    add_scores(table, "judge", reward)
    prompts = [sample_context(i) for i in range(4)]
    assert asked == [(prompts, ["s0", "s1", "s2", "s3"]), (prompts, ["h0", "h1", "h2", "h3"])]
    assert table["soft_judge"].tolist() == [30, 11, 12, 33] == table["hard_judge"].tolist()


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_score_that_is_no_number_ends_the_run(table, broken):
    """It would pass for a loss or a tie."""
    add_scores(table, "judge", lambda prompts, completions: [1.0, broken, 2.0, 3.0])
    with pytest.raises(RunError, match="the judge of a reply is not finite"):
        report(table, ["reward", "judge"])


@pytest.mark.parametrize("names", [["reward"], ["reward", "judge"]])
def test_picture_is_a_png_with_a_panel_a_score(table, names, tmp_path):
    table["soft_judge"], table["hard_judge"] = 1.0, 2.0
    picture(table, names, tmp_path / "differences.png")
    content = (tmp_path / "differences.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (720 * len(names), 480)


# Replies


@pytest.fixture
def rows(prompts):
    contexts = [sample_context(i) for i in range(6)]
    ids = [conversation_id(c) for c in contexts]
    return Dataset.from_dict({"prompt": contexts, "prompt_ids": prompts, "conversation": ids})


def answer(policy_parts, rows, temperature=1.0, batch_size=4, seed=7):
    model, tokenizer, _ = policy_parts
    return answer_both(model, tokenizer, rows, Sampling(8, temperature), batch_size, seed, progress=False)


def move(model):
    with torch.no_grad():
        noise = torch.randn(soft_prefix(model).shape, generator=torch.Generator().manual_seed(0))
        soft_prefix(model).add_(2 * noise)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_at_the_start_soft_is_hard(policy_parts, rows, temperature):
    table = answer(policy_parts, rows, temperature)
    assert table["soft"].tolist() == table["hard"].tolist()
    assert table["soft_tokens"].tolist() == table["hard_tokens"].tolist()
    assert table["kl"].isna().all() if temperature == 0 else table["kl"].abs().max() < 1e-4
    assert table["prompt"].tolist() == rows["prompt"] and table["conversation"].tolist() == rows["conversation"]
    if temperature:
        assert table["soft"].nunique() > 3


@pytest.mark.parametrize("sampling", [Sampling(8, 0.0), Sampling(8, 1.0, 5), Sampling(8, 1.0, 0, 0.9)])
def test_kl_of_what_is_not_drawn_from_is_not_shown(policy_parts, rows, sampling):
    """The log-probabilities are those of all tokens: cut off, the replies come from another distribution."""
    move(policy_parts[0])
    table = answer_both(*policy_parts[:2], rows, sampling, 4, 7, progress=False)
    assert table["kl"].isna().all()
    table["soft_reward"], table["hard_reward"] = 1.0, 0.0
    assert "| KL to the hard prompt, nats a reply | - | 0 | |" in report(table, ["reward"])
    draws = pd.DataFrame({"context": [0, 0], "conversation": "a", "reward": [1.0, 2.0]})
    assert "| soft prefix, one reply | - | +1.000" in best_of_n_report(table, draws, ["reward"])


def test_same_seed_gives_the_same_hard_completions(policy_parts, rows):
    """However far the soft prefix has moved meanwhile."""
    before = answer(policy_parts, rows)
    move(policy_parts[0])
    after = answer(policy_parts, rows)
    assert after["hard"].tolist() == before["hard"].tolist()
    assert after["soft"].tolist() != before["soft"].tolist()
    assert after["kl"].mean() > 0.1
    assert answer(policy_parts, rows, seed=8)["hard"].tolist() != before["hard"].tolist()


def test_replies_and_kl_are_those_of_the_two_prompts(policy_parts, rows, prompts):
    """By another path: `generate` at the same seed, and PEFT's own forward, row by row."""
    model, tokenizer, _ = policy_parts
    move(model)
    table = answer(policy_parts, rows, batch_size=6)
    torch.manual_seed(7)
    soft = generate(model, prompts, Sampling(8), [1, 5], 0)

    def logps(prompt, completion):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
        return logits[len(prompt) - 1 : -1].gather(-1, torch.tensor(completion)[:, None]).sum().item()

    for i, (prompt, completion) in enumerate(zip(prompts, soft, strict=True)):
        ended = completion[-1] in (1, 5)
        assert table["soft_tokens"][i] == len(completion) and table["soft_finished"][i] == ended
        body = completion[:-1] if ended else completion
        assert table["soft"][i] == tokenizer.decode(body, skip_special_tokens=True).strip()
        under_soft = logps(prompt, completion)
        with hard_prompt_active(model):
            kl = under_soft - logps(prompt, completion)
        assert table["kl"][i] == pytest.approx(kl, abs=1e-3)


def test_random_state_outside_is_left_alone(policy_parts, rows):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    answer(policy_parts, rows)
    assert torch.equal(torch.get_rng_state(), before)
    assert policy_parts[0].active_adapter == "default"
    assert soft_prefix(policy_parts[0]).requires_grad


# Best of n


@pytest.fixture
def draws():
    """Two contexts of five replies in mixed order, with ties."""
    random = np.random.default_rng(0)
    frame = pd.DataFrame({"context": [0, 1] * 5, "conversation": ["a", "b"] * 5})
    frame["reward"] = random.integers(0, 4, 10).astype(float)
    frame["judge"] = random.normal(size=10)
    assert frame.groupby("context")["reward"].nunique().max() < 5
    return frame


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_equals_all_subsets(draws, n):
    """Every n of the five, the best of each by reward; of equal ones the later, for both scores."""
    gained = best_of_n(draws, ["reward", "judge"], n)
    assert gained["conversation"].tolist() == ["a", "b"]
    for context in (0, 1):
        group = draws[draws["context"] == context].to_dict("records")
        best = [max(reversed(subset), key=lambda r: r["reward"]) for subset in itertools.combinations(group, n)]
        for name in ("reward", "judge"):
            gain = np.mean([r[name] for r in best]) - np.mean([r[name] for r in group])
            assert gained[name][context] == pytest.approx(gain)
    if n == 1:
        assert gained[["reward", "judge"]].abs().to_numpy().max() < 1e-12


def test_best_of_n_report_by_hand(table):
    """Of 1 2 3 4 the best of two is 20 / 6 on average and the best of four 4, less 2.5; the judge thinks the reverse.

    Four of one context, eight of the other: a best of eight there is not. KL: ln 2 - 1 / 2, ln 4 - 3 / 4. The gains of
    the second context are 0, so the standard error of their mean is that mean.
    """
    table["soft_judge"], table["hard_judge"] = 1.5, 2.0
    draws = pd.DataFrame(
        {"context": [0] * 4 + [1] * 8, "conversation": list("aaaabbbbbbbb"), "reward": [3.0, 1, 4, 2] + [0] * 8}
    )
    draws["judge"] = -draws["reward"]
    assert best_of_n_report(table, draws, ["reward", "judge"]).splitlines() == [
        "| chosen by reward | KL, nats a reply | reward gained (95% interval) | judge gained (95% interval) |",
        "|---|---|---|---|",
        "| hard prompt, best of 2 | at most 0.19 | +0.417 [-4.878, +5.711] | -0.417 [-5.711, +4.878] |",
        "| hard prompt, best of 4 | at most 0.64 | +0.750 [-8.780, +10.280] | -0.750 [-10.280, +8.780] |",
        "| soft prefix, one reply | 1.00 | +1.000 [-5.353, +7.353] | -0.500 [-0.500, -0.500] |",
    ]


def draw(policy_parts, rows, temperature=1.0, draws=3, batch_size=4, seed=7):
    model, tokenizer, _ = policy_parts
    return draw_hard(model, tokenizer, rows, Sampling(8, temperature), draws, batch_size, seed)


def test_drawn_replies_are_the_hard_prompts(policy_parts, rows):
    """Greedily they are the hard ones of the comparison, in the order of the contexts, wherever the soft prefix is."""
    move(policy_parts[0])
    table, drawn = answer(policy_parts, rows, 0.0), draw(policy_parts, rows, 0.0)
    assert drawn["context"].tolist() == np.repeat(range(6), 3).tolist()
    for column, source in (("conversation", "conversation"), ("prompt", "prompt"), ("reply", "hard")):
        assert drawn[column].tolist() == [table[source][i] for i in drawn["context"]]
    assert table["soft"].tolist() != table["hard"].tolist()


def test_draws_differ_and_depend_on_the_seed_alone(policy_parts, rows):
    drawn = draw(policy_parts, rows)
    assert drawn.groupby("context")["reply"].nunique().max() > 1
    torch.manual_seed(123)
    before = torch.get_rng_state()
    move(policy_parts[0])
    assert draw(policy_parts, rows)["reply"].tolist() == drawn["reply"].tolist()
    assert torch.equal(torch.get_rng_state(), before)
    assert policy_parts[0].active_adapter == "default"
    assert draw(policy_parts, rows, seed=8)["reply"].tolist() != drawn["reply"].tolist()
