"""Rewards inside the trainer: what they are handed, what they log, and what happens where they say None."""

import math
import statistics

import pandas as pd
import pytest
import torch
from ppo.runs import (
    BATCH,
    EVERY_STEP,
    KEEP_ALL,
    given_completions,
    inputs_of,
    logged,
    prefix_of,
    root_of,
    rows_of,
    same,
    saved_prefix,
    texts,
    varied,
)
from safetensors.torch import load_file
from trl.rewards import get_soft_overlong_punishment, think_format_reward

from h2s.errors import RunError
from h2s.ppo.value_head import VALUE_HEAD_FILE
from h2s.prefix.adapter import soft_prefix

# The score alone is what is learnt from.
BARE = {"kl_coef": 0.0, "missing_eos_penalty": 0.0, "value_warmup_batches": 0}


def completions_of(trainer, step=1):
    return pd.read_parquet(root_of(trainer) / "completions" / f"step-{step:06d}.parquet")


# What they are handed


def test_a_reward_is_handed_what_trl_hands_it(build):
    calls = []

    def reward(**given):
        calls.append(given | {"step": given["trainer_state"].global_step})
        return varied(**given)

    trainer = build(reward, **BARE)
    rollouts, roll_out = [], trainer._roll_out
    trainer._roll_out = lambda *given: rollouts.append((given[1], roll_out(*given))) or rollouts[-1][1]
    trainer.train()
    assert [call["step"] for call in calls] == [0, 1]
    for call, (inputs, rollout) in zip(calls, rollouts, strict=True):
        handed = {"prompts", "completions", "completion_ids", "number", "trainer_state", "log_extra", "log_metric"}
        assert call.keys() == handed | {"step"}
        assert call["prompts"] == inputs["prompt"] and call["number"] == inputs["number"]
        assert call["completion_ids"] == [ids[mask].tolist() for ids, mask, _ in rows_of(rollout)]
        decoded = [trainer.policy.decode(ids) for ids in call["completion_ids"]]
        assert call["completions"] == [[{"role": "assistant", "content": text}] for text in decoded]
    assert calls[0]["number"] != calls[1]["number"]
    # An evaluation hands on the held-out contexts' column, and the tokens of both sides.
    trainer.evaluate()
    for call in calls[2:]:
        assert call["number"] == [100, 101, 102, 103, 104] and call["step"] == 2
        assert [trainer.policy.decode(ids) for ids in call["completion_ids"]] == texts(call["completions"])
    assert len(calls) == 4


def test_what_a_reward_logs_is_kept(build):
    """A column in the completions, and a number whose mean over the iterations is in the log; not of the warm-up."""

    def reward(completions, log_extra, log_metric, trainer_state, **kwargs):
        log_extra("letters", [len(text) for text in texts(completions)])
        for value in (1.0, 2.0) if trainer_state.global_step == 0 else (6.0,):
            log_metric("my/number", value)
        return varied(completions)

    trainer = build(reward, value_warmup_batches=3, logging_steps=2, **EVERY_STEP)
    trainer.train()
    assert logged(trainer, "my/number") == [(1.5 + 6) / 2]
    for step in (1, 2):
        table = completions_of(trainer, step)
        assert table["letters"].tolist() == [len(text) for text in table["completion"]]


def test_a_reward_that_edits_what_it_is_handed_changes_nothing(build):
    seen = []

    def edits(prompts, completions, completion_ids, number, **kwargs):
        for prompt, completion, ids in zip(prompts, completions, completion_ids, strict=True):
            prompt[0]["content"] = "edited"
            prompt.append({"role": "user", "content": "more"})
            completion[0]["content"] = ""
            ids.clear()
        number.clear()
        return [1.0] * len(prompts)

    def looks(prompts, completions, completion_ids, number, **kwargs):
        seen.append((prompts, texts(completions), completion_ids, number))
        return varied(completions)

    trainer = build([edits, looks], **BARE)
    given_completions(trainer)
    inputs = inputs_of(trainer)
    rollout = trainer._roll_out(trainer.model, inputs)
    expected = inputs_of(trainer)
    ids = trainer.policy.complete(expected["prompt_ids"], None)
    assert seen == [(expected["prompt"], [trainer.policy.decode(i) for i in ids], ids, expected["number"])]
    assert inputs == expected
    assert [row[mask].tolist() for row, mask, _ in rows_of(rollout)] == ids
    assert completions_of(trainer)["completion"].tolist() == [trainer.policy.decode(i) for i in ids]


# What becomes of them


def number_mod_3(number, **kwargs):
    """0, 1, 2, and None for every fifth context."""
    return [None if n % 5 == 4 else float(n % 3) for n in number]


class Halves:
    """A callable: the half of each context's number."""

    def __call__(self, number, **kwargs):
        return [n / 2 for n in number]


async def later(number, **kwargs):
    return [-float(n) for n in number]


def test_several_rewards_by_hand(build):
    """Contexts 0 to 5; a function, a callable and a coroutine, weighted; one of them leaves context 4 out."""
    trainer = build([number_mod_3, Halves(), later], reward_weights=[2.0, 1.0, 0.25], **BARE)
    rollout = trainer._roll_out(trainer.model, inputs_of(trainer))
    # 2 (0, 1, 2, 0, -, 2) + (0, 0.5, 1, 1.5, 2, 2.5) - 0.25 (0, 1, 2, 3, 4, 5)
    total = [0.0, 2.25, 4.5, 0.75, 1.0, 5.25]
    assert rollout.returns.tolist() == pytest.approx(total)
    found = {name: values[0] for name, values in trainer.iterations.metrics.items() if name.startswith("reward")}
    assert found == pytest.approx(
        {
            # Of 0, 1, 2, 0, 2: squares of 1, 0, 1, 1, 1 over 4.
            "rewards/number_mod_3/mean": 1.0,
            "rewards/number_mod_3/std": 1.0,
            # Of 0 to 5: 2 (6.25 + 2.25 + 0.25) / 5 = 3.5.
            "rewards/Halves/mean": 1.25,
            "rewards/Halves/std": math.sqrt(3.5) / 2,
            "rewards/later/mean": -2.5,
            "rewards/later/std": math.sqrt(3.5),
            "reward": statistics.mean(total),
            "reward_std": statistics.stdev(total),
        }
    )
    table = completions_of(trainer)
    assert table["score"].tolist() == pytest.approx(total)
    assert table["rewards/number_mod_3"].isna().tolist() == [False] * 4 + [True, False]
    assert table["rewards/Halves"].tolist() == pytest.approx([0, 0.5, 1, 1.5, 2, 2.5])
    # Contexts 100 to 104: 2 (1, 2, 0, 1, -) + (50, 50.5, 51, 51.5, 52) - 0.25 (100, …, 104)
    metrics = trainer.evaluate()
    expected = statistics.mean([27.0, 29.25, 25.5, 27.75, 26.0])
    assert metrics["eval_soft_reward"] == pytest.approx(expected) == metrics["eval_hard_reward"]


def test_the_weights_decide_what_is_learnt(build):
    """Two rewards of which one is weighted with 0 train as the other alone."""
    prefixes = []
    for folder, rewards, weights in (
        ("both", [varied, later], [1.0, 0.0]),
        ("one", varied, None),
        ("other", [varied, later], [0.0, 1.0]),
    ):
        trainer = build(rewards, folder=folder, reward_weights=weights)
        trainer.train()
        prefixes.append(prefix_of(trainer))
    assert torch.equal(prefixes[0], prefixes[1]) and not torch.equal(prefixes[0], prefixes[2])


def test_rewards_of_trl_as_they_are(build):
    """Completions of 2 to 5 tokens, punished beyond 3 of at most 5: 0, 0, -1/2, -1."""
    trainer = build([think_format_reward, get_soft_overlong_punishment(5, 2)], **BARE)
    given_completions(trainer)
    trainer.train()
    table = completions_of(trainer)
    lengths = [
        len(c) for c in trainer.policy.complete(trainer.policy.encode(list(map(list, table["prompt"])), 6), None)
    ]
    assert len(set(lengths)) > 2
    punished = [min(0.0, (3 - length) / 2) for length in lengths]
    assert table["rewards/soft_overlong_punishment_reward"].tolist() == pytest.approx(punished)
    assert table["score"].tolist() == pytest.approx(punished)
    assert logged(trainer, "rewards/think_format_reward/mean") == [0, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("also", [[], [same(1.0)]])
def test_a_reward_that_is_no_number_ends_the_run(build, value, also):
    trainer = build([lambda completions, **kwargs: [0.0] * (len(completions) - 1) + [value], *also])
    before = prefix_of(trainer)
    with pytest.raises(RunError, match="reward of a reply is not finite"):
        trainer.train()
    assert torch.equal(prefix_of(trainer), before)


def test_a_reward_that_returns_too_few_scores(build):
    with pytest.raises(ValueError, match="few returned 1 scores for 6 completions"):

        def few(**kwargs):
            return [1.0]

        build(few).train()


# None: a reply that is left out

SCORES = [1.0, None, 3.0, 2.0, None, 5.0]
KNOWN = [0, 2, 3, 5]


def of_the_context(number, **kwargs):
    return [SCORES[n % BATCH] for n in number]


def test_a_reply_that_is_left_out_has_no_advantage(build):
    """It enters neither the whitening nor the log's numbers nor the explained variance."""
    trainer = build(of_the_context, **BARE)
    trainer.value_head.out.bias.data.fill_(0.75)
    torch.nn.init.normal_(trainer.value_head.out.weight, generator=torch.Generator().manual_seed(0))
    rollout = trainer._roll_out(trainer.model, inputs_of(trainer))
    with torch.no_grad():
        values = trainer.value_head(rollout.last_prompt).double().tolist()
    advantages = [SCORES[i] - values[i] for i in KNOWN]
    mean, std = statistics.mean(advantages), statistics.stdev(advantages)
    whitened = [0.0 if s is None else (s - v - mean) / std for s, v in zip(SCORES, values, strict=True)]
    assert rollout.advantages.tolist() == pytest.approx(whitened, abs=1e-4)
    assert rollout.returns.isnan().tolist() == [s is None for s in SCORES]
    metrics = {name: value for name, (value,) in trainer.iterations.metrics.items()}
    # Of 1, 3, 2, 5: mean 2.75; squares 1.75² + 0.25² + 0.75² + 2.25² = 8.75, over 3.
    assert metrics["reward"] == metrics["rewards/of_the_context/mean"] == metrics["returns"] == 2.75
    assert metrics["reward_std"] == metrics["rewards/of_the_context/std"] == pytest.approx(math.sqrt(8.75 / 3))
    explained = 1 - statistics.variance(advantages) / (8.75 / 3)
    assert metrics["value/explained_variance"] == pytest.approx(explained, abs=1e-4)
    table = completions_of(trainer)
    assert table["score"].isna().tolist() == [s is None for s in SCORES]
    assert table["advantage"].tolist() == pytest.approx(whitened, abs=1e-4)


def test_a_reply_that_is_left_out_moves_nothing(build):
    """Losses and gradients are those of a run without its context, but that they are means over 6 instead of over 4."""
    gradients, losses = {}, {}
    for folder, rows in (("all", range(BATCH)), ("known", KNOWN)):
        trainer = build(
            of_the_context,
            folder=folder,
            contexts=rows,
            per_device_train_batch_size=len(rows),
            max_steps=1,
            num_ppo_epochs=1,
            max_grad_norm=1e9,
            entropy_coef=0.1,
            **BARE | {"value_warmup_batches": 1},
        )
        given_completions(trainer)
        prefix, apply = soft_prefix(trainer.policy.model), trainer._apply

        def watch(loss, folder=folder, prefix=prefix, apply=apply):
            (gradients[folder],) = torch.autograd.grad(loss, [prefix], retain_graph=True)
            return apply(loss)

        trainer._apply = watch
        trainer.train()
        (losses[folder],) = logged(trainer, "loss/policy")
    assert gradients["known"].abs().max() > 1e-4
    mean_of_6, mean_of_4 = (gradients[folder] for folder in ("all", "known"))
    torch.testing.assert_close(mean_of_6 * BATCH / len(KNOWN), mean_of_4, rtol=1e-3, atol=1e-5)
    assert losses["all"] == pytest.approx(losses["known"] * len(KNOWN) / BATCH, abs=1e-5)


@pytest.mark.parametrize("given", [0, 1])
def test_nothing_moves_where_all_are_left_out(build, given):
    """Neither in the first iterations, the warm-up among them, nor after others, by Adam's momentum or weight decay."""

    def reward(completions, trainer_state, **kwargs):
        return varied(completions) if trainer_state.global_step < given else [None] * len(completions)

    trainer = build(reward, max_steps=3, value_warmup_batches=2, weight_decay=0.1, entropy_coef=0.1, **KEEP_ALL)
    start, head = prefix_of(trainer), trainer.value_head.dense.weight.detach().clone()
    trainer.train()
    root = root_of(trainer)
    saved = [saved_prefix(root / f"checkpoint-{n}") for n in (1, 2, 3)]
    heads = [load_file(root / f"checkpoint-{n}" / VALUE_HEAD_FILE)["dense.weight"] for n in (1, 2, 3)]
    assert torch.equal(saved[0], start) == torch.equal(heads[0], head) == (given == 0)
    assert all(torch.equal(s, saved[0]) for s in saved) and all(torch.equal(h, heads[0]) for h in heads)
    assert math.isnan(logged(trainer, "reward")[-1]) and math.isnan(logged(trainer, "value/explained_variance")[-1])
    assert completions_of(trainer, 3)["score"].isna().all() and not completions_of(trainer, 3)["advantage"].any()


def test_an_evaluation_needs_a_score(build):
    trainer = build(lambda completions, **kwargs: [None] * len(completions), **EVERY_STEP)
    with pytest.raises(RunError, match="the reward returned None for every pair of replies"):
        trainer.train()
