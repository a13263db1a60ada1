import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import sample_context
from transformers import TrainerState

from h2s import InputError
from h2s.data.messages import conversation_id
from h2s.errors import RunError
from h2s.prefix.adapter import soft_prefix
from h2s.prefix.generation import Sampling
from h2s.report import soft_vs_hard as module
from h2s.report.soft_vs_hard import gather_rows, shared_batches, soft_vs_hard
from h2s.reward.functions import RewardFunctions

SAMPLED = Sampling(8)


def compare(policy, contexts, sampling=SAMPLED, batch_size=4, seed=7, **scorers):
    scorers = {name: RewardFunctions(reward) for name, reward in scorers.items()}
    return soft_vs_hard(policy, contexts, scorers, sampling, batch_size, seed, progress=False)


def level_and_length(prompts, completions, level, **given):
    """Of all that a reward is handed something."""
    rows = zip(prompts, completions, level, strict=True)
    return [1000.0 * len(p) + n + len(c[0]["content"]) for p, c, n in rows]


# Replies


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_at_the_start_soft_is_hard(policy, contexts, temperature):
    table = compare(policy, contexts, Sampling(8, temperature))
    assert table["soft"].tolist() == table["hard"].tolist()
    assert table["soft_tokens"].tolist() == table["hard_tokens"].tolist()
    assert table["kl"].isna().all() if temperature == 0 else table["kl"].abs().max() < 1e-4
    assert table["prompt"].tolist() == contexts["prompt"][:]
    assert table["conversation"].tolist() == [conversation_id(p) for p in contexts["prompt"]]
    assert table.index.tolist() == list(range(6))
    if temperature:
        assert table["soft"].nunique() > 3


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_replies_are_those_of_the_policy_itself(moved, contexts, temperature):
    """A batch from its own seed, the same for both sides."""
    sampling = Sampling(8, temperature)
    table = compare(moved, contexts, sampling)
    assert table["soft"].tolist() != table["hard"].tolist()
    for rows in (range(4), range(4, 6)):
        arguments = {"max_completion_length": 8, "temperature": temperature, "seed": 7 + rows.start}
        prompts = contexts.select(rows)["prompt"][:]
        assert moved.generate(prompts, **arguments) == table["soft"][list(rows)].tolist()
        with moved.hard_prompt_active():
            assert moved.generate(prompts, **arguments) == table["hard"][list(rows)].tolist()


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_kl_tokens_and_ends_by_another_path(moved, contexts, temperature):
    """Row by row, unpadded: PEFT's own forward against the base model with the hard prompt as text, in float64."""
    seen = {"soft": [], "hard": []}
    complete = moved.complete

    def watched(*arguments):
        completions = complete(*arguments)
        seen["soft" if moved.model.active_adapter == "default" else "hard"] += completions
        return completions

    moved.complete = watched
    table = compare(moved, contexts, Sampling(8, temperature))
    base, prompts = moved.model.get_base_model(), moved.encode(contexts["prompt"], 8)

    @torch.no_grad()
    def logps(model, prompt, completion):
        logits = model(torch.tensor([prompt + completion])).logits[0].double() / temperature
        predicted = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        return predicted.gather(-1, torch.tensor(completion)[:, None]).sum().item()

    for i, prompt in enumerate(prompts):
        for side, completions in seen.items():
            completion = completions[i]
            ended = completion[-1] in (1, 5)
            assert table[f"{side}_tokens"][i] == len(completion) and table[f"{side}_finished"][i] == ended
            body = completion[:-1] if ended else completion
            assert table[side][i] == moved.tokenizer.decode(body, skip_special_tokens=True).strip()
        soft = seen["soft"][i]
        kl = logps(moved.model, prompt, soft) - logps(base, moved.prefix.token_ids + prompt, soft)
        assert table["kl"][i] == pytest.approx(kl, abs=1e-3)
    assert table["kl"].abs().max() > 1 and len(seen["soft"]) == len(seen["hard"]) == 6


@pytest.mark.parametrize("sampling", [Sampling(8, 0.0), Sampling(8, 1.0, 5), Sampling(8, 1.0, 0, 0.9)])
def test_kl_of_what_is_not_drawn_from_is_not_shown(moved, contexts, sampling):
    """The log-probabilities are those of all tokens: cut off, the replies come from another distribution."""
    assert compare(moved, contexts, sampling)["kl"].isna().all()


def test_same_seed_gives_the_same_hard_completions(policy, contexts):
    """However far the soft prefix has moved meanwhile."""
    before = compare(policy, contexts)
    with torch.no_grad():
        soft_prefix(policy.model).mul_(-1)
    after = compare(policy, contexts)
    assert after["hard"].tolist() == before["hard"].tolist()
    assert after["soft"].tolist() != before["soft"].tolist()
    assert compare(policy, contexts, seed=8)["hard"].tolist() != before["hard"].tolist()


def test_policy_and_random_state_are_left_alone(moved, contexts):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    compare(moved, contexts)
    assert torch.equal(torch.get_rng_state(), before)
    assert moved.model.active_adapter == "default"
    assert soft_prefix(moved.model).requires_grad and soft_prefix(moved.model).grad is None


def test_context_that_cannot_be_answered_is_the_users(policy, contexts):
    """Before anything is sampled: here the longest one does not fit."""
    lengths = [len(ids) for ids in policy.encode(contexts["prompt"], 8)]
    room = 1024 - len(policy.prefix.token_ids) - (max(lengths) - 1)  # of the tiny model's positions
    policy.complete = None
    with pytest.raises(InputError, match=f"context {1 + lengths.index(max(lengths))} is {max(lengths)} tokens long"):
        compare(policy, contexts, Sampling(room))


# Scores


def test_scores_by_hand(moved, contexts):
    """Each side of each reward from its own replies, with the context's own column; a table without any is one too."""
    seen = []

    def both(completions, completion_ids, trainer_state, **given):
        seen.append((trainer_state.global_step, [len(ids) for ids in completion_ids]))
        return [0.5] * len(completions)

    scorers = {"reward": RewardFunctions([level_and_length, both], [2.0, 4.0]), "judge": RewardFunctions(both)}
    state = TrainerState(global_step=3)
    table = soft_vs_hard(moved, contexts, scorers, SAMPLED, 4, 7, state, progress=False)
    for side in ("soft", "hard"):
        expected = [
            2 * (1000 * len(sample_context(i)) + 10 * i + len(reply)) + 2 for i, reply in enumerate(table[side])
        ]
        assert table[f"{side}_reward"].tolist() == expected
        assert (table[f"{side}_judge"] == 0.5).all()
    assert seen == [(3, table[f"{side}_tokens"].tolist()) for side in ("soft", "hard")] * 2
    unscored = compare(moved, contexts)
    pd.testing.assert_frame_equal(table[unscored.columns], unscored)
    assert set(table.columns) - set(unscored.columns) == {
        f"{side}_{name}" for side in ("soft", "hard") for name in scorers
    }
    assert not any(name.endswith("ids") for name in table.columns)


def test_what_a_reward_leaves_out_is_nan(moved, contexts):
    """That side of that row alone."""

    def sometimes(completions, level, **given):
        return [None if n == 20 else 1.0 for n in level]

    table = compare(moved, contexts, reward=sometimes, judge=lambda completions, **given: [None] * len(completions))
    for side in ("soft", "hard"):
        assert table[f"{side}_reward"].isna().tolist() == [i == 2 for i in range(6)]
        assert table[f"{side}_judge"].isna().all()


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("call", [1, 2])
def test_a_score_that_is_no_number_ends_the_run(policy, contexts, broken, call):
    """It would pass for a loss, a tie, or a reply that was left out."""
    calls = []

    def judge(completions, **given):
        calls.append(None)
        return [broken if len(calls) == call and i == 1 else 1.0 for i in range(len(completions))]

    with pytest.raises(RunError, match="the judge of a reply is not finite"):
        compare(policy, contexts, reward=level_and_length, judge=judge)


# Shared between processes


def process_of(monkeypatch, index, count):
    state = SimpleNamespace(process_index=index, num_processes=count, is_main_process=index == 0)
    monkeypatch.setattr(module, "PartialState", lambda: state)


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [1, 3, 4, 100])
@pytest.mark.parametrize("count", [1, 3, 4, 7, 12])
def test_batches_are_shared_out(monkeypatch, count, size, processes):
    """As many for each (a sharded model needs it), the same as one process would have, and every row at least once."""
    process_of(monkeypatch, 0, 1)
    alone = list(shared_batches(count, size, "", progress=False))
    assert [i for rows in alone for i in rows] == list(range(count))
    assert all(len(rows) == size for rows in alone[:-1]) and len(alone[-1]) <= size
    shares = []
    for index in range(processes):
        process_of(monkeypatch, index, processes)
        shares.append(list(shared_batches(count, size, "", progress=False)))
    assert {len(share) for share in shares} == {math.ceil(len(alone) / processes)}
    assert {rows for share in shares for rows in share} == set(alone)


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_table_of_several_processes_is_that_of_one(monkeypatch, moved, contexts, processes):
    """Each process's own part in turn, with batches that come twice."""
    whole = compare(moved, contexts, batch_size=2, reward=level_and_length)
    parts = []
    monkeypatch.setattr(module, "gather_object", lambda records: parts.append(records) or records)
    for index in range(processes):
        process_of(monkeypatch, index, processes)
        compare(moved, contexts, batch_size=2, reward=level_and_length)
    monkeypatch.setattr(module, "gather_object", lambda records: [r for part in parts for r in part])
    assert len({len(part) for part in parts}) == 1 and sum(map(len, parts)) >= len(contexts)
    table = gather_rows([]).drop(columns=["soft_ids", "hard_ids"])
    pd.testing.assert_frame_equal(table, whole)
    assert np.isfinite(table["kl"]).all()
