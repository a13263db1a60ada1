"""One iteration: the rollout's returns and advantages, the warm-up, the updates, the schedules."""

import math
from dataclasses import replace

import pytest
import torch
from ppo.runs import (
    BATCH,
    EASY,
    inputs_of,
    logged,
    not_ascii,
    prefix_of,
    root_of,
    rows_of,
    same,
    varied,
)
from tiny import HARD_PROMPT
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from transformers import AutoModelForCausalLM, TrainerCallback

from h2s import PrefixTuningPolicyModel
from h2s.ppo import trainer as ppo_trainer
from h2s.ppo.value_head import VALUE_HEAD_FILE
from h2s.prefix.adapter import HARD, SOFT, soft_prefix
from h2s.prefix.generation import Completions, completion_logps, decode


def adam_steps(trainer):
    """Adam's own count of the updates of the prefix."""
    return int(trainer.optimizer.optimizer.state[soft_prefix(trainer.policy.model)]["step"])


def roll_out(trainer, **given):
    return trainer._roll_out(trainer.model, inputs_of(trainer, **given))


# The rollout


@torch.no_grad()
def summed_kl(trainer, gemma_folder, prompt, completion):
    """sum ln p_soft - ln p_hard of one completion, unpadded, the hard prompt as tokens through a fresh base model."""

    def logps(logits):
        at = torch.tensor(completion)[:, None]
        return logits[-len(completion) - 1 : -1].double().log_softmax(-1).gather(-1, at).sum().item()

    base = AutoModelForCausalLM.from_pretrained(gemma_folder, dtype=torch.float32).eval()
    hard = base(torch.tensor([trainer.policy.prefix.token_ids + prompt + completion])).logits[0]
    soft = trainer.policy.model(torch.tensor([prompt + completion])).logits[0]
    return logps(soft) - logps(hard)


def test_returns_are_score_minus_kl_minus_penalty(build, gemma_folder):
    """With a prefix that has moved, by another path: PEFT's own forward and the hard prompt as text, row by row."""
    scores = [5.0, -7.0, 0.5, 0.25, -0.125, 1.0]
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.append((prompts, completions))
        return scores

    trainer = build(
        reward,
        move=1.5,
        kl_coef=0.3,
        missing_eos_penalty=2.0,
        reward_clip=1.5,
        num_mini_batches=2,
        whiten_advantages=False,
    )
    trainer.value_head.out.bias.data.fill_(0.75)
    trainer.policy.stop_ids = list(range(0, 320, 4))  # a quarter of the vocabulary ends a reply: some end, some do not
    torch.manual_seed(4)
    inputs = inputs_of(trainer)
    rollout = roll_out(trainer)
    clipped = [1.5, -1.5, 0.5, 0.25, -0.125, 1.0]
    unfinished, replies, largest_kl = [], [], 0.0
    for i, (ids, mask, _) in enumerate(rows_of(rollout)):
        completion = ids[mask].tolist()
        prompt = ids[: int(mask.int().argmax())].tolist()
        assert prompt == inputs["prompt_ids"][i]
        kl = summed_kl(trainer, gemma_folder, prompt, completion)
        largest_kl = max(largest_kl, abs(kl))
        unfinished.append(completion[-1] % 4 != 0)
        expected = clipped[i] - 0.3 * kl - 2.0 * unfinished[-1]
        assert rollout.returns[i].item() == pytest.approx(expected, abs=1e-3)
        assert rollout.advantages[i].item() == pytest.approx(expected - 0.75, abs=1e-3)
        replies.append(decode(trainer.processing_class, completion, trainer.policy.stop_ids))
    assert largest_kl > 0.5 and 0 < sum(unfinished) < BATCH
    ((prompts, completions),) = seen
    assert prompts == inputs["prompt"]
    assert completions == [[{"role": "assistant", "content": reply}] for reply in replies]
    assert rollout.mean_length == pytest.approx(sum(mask.sum().item() for _, mask, _ in rows_of(rollout)) / BATCH)
    assert trainer.iterations.metrics["completions/clipped_ratio"] == [pytest.approx(sum(unfinished) / BATCH)]
    assert trainer.iterations.metrics["reward"] == [pytest.approx(sum(scores) / BATCH)]


def test_kl_is_zero_at_the_start(build):
    trainer = build(max_steps=1, value_warmup_batches=0, num_ppo_epochs=1)
    trainer.train()
    assert logged(trainer, "kl") == pytest.approx([0], abs=1e-3)


def test_several_replies_to_a_context_are_compared_with_each_other(build):
    """The value head has no say in it; a reply that is left out has no advantage, and none without another."""
    scores = [3.0, 5.0, 10.0, None, 0.5, 0.5]
    trainer = build(
        lambda **kwargs: scores, num_generations=2, kl_coef=0.0, missing_eos_penalty=0.0, whiten_advantages=False
    )
    trainer.value_head.out.bias.data.fill_(0.75)
    torch.manual_seed(4)
    inputs = inputs_of(trainer, rows=range(3))
    rollout = roll_out(trainer, rows=range(3))
    assert rollout.advantages.tolist() == [-2.0, 2.0, 0.0, 0.0, 0.0, 0.0]
    prompts = [ids[: int(mask.int().argmax())].tolist() for ids, mask, _ in rows_of(rollout)]
    assert prompts == [prompt for prompt in inputs["prompt_ids"] for _ in range(2)]
    assert len({str(ids[mask].tolist()) for ids, mask, _ in rows_of(rollout)}) == 6  # each reply is drawn
    assert [row["prompt"] for row in trainer.iterations.completions[::2]] == inputs["prompt"]


@pytest.mark.parametrize("scores", [None, [100.0, 200.0, 300.0, 700.0, 0.0, 0.0]])
def test_advantages_are_whitened(build, scores):
    trainer = build(varied if scores is None else lambda **kwargs: scores, missing_eos_penalty=0.0)
    rollout = roll_out(trainer)
    expected = (rollout.returns - rollout.returns.mean()) / rollout.returns.std()
    torch.testing.assert_close(rollout.advantages, expected)
    assert rollout.advantages.std().item() == pytest.approx(1, abs=1e-4)


def test_scoring_uses_the_temperature_of_sampling(build):
    trainer = build(temperature=0.5)
    assert trainer.sampling.temperature == 0.5
    (part,) = roll_out(trainer).parts
    with torch.no_grad():
        expected, other = (completion_logps(trainer.policy.model, part.batch, t)[0] for t in (0.5, 1.0))
    torch.testing.assert_close(part.old_logps, expected, rtol=0, atol=1e-4)
    assert (expected - other).abs().max() > 0.1


def test_one_context_has_many_replies(build):
    """They are sampled."""
    trainer = build()
    torch.manual_seed(0)
    prompts = [trainer.train_dataset["prompt_ids"][0]] * 30
    assert len({tuple(c) for c in trainer.policy.complete(prompts, trainer.sampling)}) > 10


def test_what_is_scored_is_what_was_sampled(build):
    """Token ids that do not survive decoding stay."""
    trainer = build()
    tokenizer = trainer.processing_class
    broken = [200, 130, 3, 5]  # lone bytes, a special token, the end of a turn
    assert tokenizer(decode(tokenizer, broken, [5]), add_special_tokens=False).input_ids != broken[:-1]
    trainer.policy.draw = lambda prompts, *rest: Completions([broken for _ in prompts], torch.zeros(len(prompts), 32))
    for ids, mask, _ in rows_of(roll_out(trainer)):
        assert ids[mask].tolist() == broken


def test_padding_is_not_scored(build):
    trainer = build(max_completion_length=8)
    trainer.policy.stop_ids = list(range(0, 320, 3))
    (part,) = roll_out(trainer).parts
    padding = part.batch.attention_mask == 0
    assert padding.any() and not part.old_logps[padding].any() and not part.mask[padding].any()


def test_the_reward_is_asked_for_the_whole_batch_at_once(build):
    asked = []
    trainer = build(lambda completions, **kwargs: asked.append(len(completions)) or [0.5] * len(completions))
    roll_out(trainer)
    assert asked == [BATCH]


def test_each_epoch_draws_its_batches_anew(build):
    asked = []

    def reward(prompts, completions, **kwargs):
        asked.append(frozenset(p[0]["content"] for p in prompts))
        return varied(completions)

    build(reward, max_steps=8, num_ppo_epochs=1, max_completion_length=3, value_warmup_batches=0).train()
    epochs = [frozenset(asked[i : i + 2]) for i in range(0, 8, 2)]
    assert all(len(frozenset.union(*e)) == 12 for e in epochs)  # every context once an epoch
    assert len(set(epochs)) > 1


# The warm-up


def test_the_warm_up_is_the_hard_prompts_and_costs_no_step(build):
    """With a prefix that has moved: replies are drawn by the reference, and the head is fitted before any update."""
    active, seen = [], []
    trainer = build(max_steps=1, value_warmup_batches=2, move=1.0)
    draw, update, start = trainer.policy.draw, trainer._update, prefix_of(trainer)
    trainer.policy.draw = lambda *args: active.append(trainer.policy.model.active_adapter) or draw(*args)

    def watch(model, rollout):
        state = trainer.optimizer.optimizer.state
        seen.append((torch.equal(prefix_of(trainer), start), trainer.value_head.out.weight.any().item(), len(state)))
        return update(model, rollout)

    trainer._update = watch
    trainer.train()
    assert active == [HARD, HARD, SOFT] and seen == [(True, True, 0)]
    assert not torch.equal(prefix_of(trainer), start)


def test_the_warm_up_fits_the_returns(build):
    """Rewards of 3 everywhere: the head goes from 0 to 3."""
    trainer = build(same(3.0), max_steps=1, value_warmup_batches=2, missing_eos_penalty=0.0, learning_rate=0.0)
    trainer.train()
    values = trainer.value_head(roll_out(trainer).last_prompt)
    torch.testing.assert_close(values, torch.full((BATCH,), 3.0), rtol=0, atol=0.1)


@pytest.mark.parametrize("generations", [1, 2])
def test_what_several_replies_to_a_context_would_be_worth_is_said(build, caplog, generations):
    """Contexts are worth 0, 2, …, 10, their second reply 1 more: mean squares 28 between, 0.5 within, rho 55/57."""
    calls = []

    def reward(number, **kwargs):
        calls.append(number)
        return [2.0 * n + (len(calls) == 2) for n in number]

    trainer = build(reward, contexts=range(6), max_steps=1, num_generations=generations)
    with caplog.at_level("INFO", "h2s"):
        trainer.train()
    assert logged(trainer, "value/rho") == [pytest.approx(55 / 57)]
    said = [line for line in caplog.messages if "num_generations 4" in line]
    # 1 - 4/3 * 2/57
    assert len(said) == (generations == 1) and all("is 0.96 [" in line and "comes to 0.95" in line for line in said)


def test_rewards_are_counted_in_spreads_of_the_hard_prompts_replies(build):
    """A reward in another unit makes the same run; the log's own rewards stay as they are."""
    ends, returns, rewards = [], [], []
    for folder, (factor, shift) in {"one": (1.0, 0.0), "other": (256.0, 1024.0)}.items():
        trainer = build(
            lambda factor=factor, shift=shift, **given: [factor * v + shift for v in varied(**given)],
            folder=folder,
            scale_rewards=True,
            value_warmup_batches=3,
            kl_coef=0.5,
        )
        trainer.train()
        ends.append(prefix_of(trainer))
        returns.append(logged(trainer, "returns"))
        rewards.append(logged(trainer, "reward"))
    torch.testing.assert_close(*ends, rtol=0, atol=1e-3)
    assert returns[0] == pytest.approx(returns[1], abs=1e-3)
    assert [256 * r + 1024 for r in rewards[0]] == pytest.approx(rewards[1], rel=1e-3)
    # Beside the prefix that has not moved yet, by hand.
    trainer = build(varied, scale_rewards=True, value_warmup_batches=3, max_steps=1, missing_eos_penalty=0.0)
    warm_up, drawn = trainer._fit_value_head, []
    trainer._fit_value_head = lambda hidden, values: drawn.append(values) or warm_up(hidden, values)
    trainer.train()
    assert len(drawn[0]) == 3 * BATCH
    assert drawn[0].mean().item() == pytest.approx(0, abs=1e-5) and drawn[0].std().item() == pytest.approx(1, abs=1e-5)


# The updates


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("settings", [{}, {"num_mini_batches": 3, "temperature": 1.5}, {"ratio_norm": "mean"}])
def test_the_first_update_has_ratio_one(build, gemma_folder, settings, dtype):
    """On ragged padded batches of long replies, the prefix having moved: in bfloat16 to the last bit."""
    policy = PrefixTuningPolicyModel.from_hard_prompt(str(gemma_folder), HARD_PROMPT, dtype=dtype)
    trainer = build(model=policy, max_steps=3, learning_rate=3e-2, max_completion_length=128, **settings)
    trainer.policy.stop_ids = list(range(0, 320, 40))  # some end, some do not
    first, widths = [], set()
    check, plain = trainer._check_first_update, trainer._roll_out
    trainer._check_first_update = lambda ratio, *rest: first.append(ratio) or check(ratio, *rest)

    def watch(*args):
        rollout = plain(*args)
        widths.add(tuple(mask.sum().item() for _, mask, _ in rows_of(rollout)))
        return rollout

    trainer._roll_out = watch
    before = prefix_of(trainer)
    trainer.train()
    assert len(first) == 3 and all(len(set(lengths)) > 1 for lengths in widths) and max(map(max, widths)) > 64
    off = (torch.cat([*first, torch.tensor(logged(trainer, "policy/ratio"))]) - 1).abs().max()
    assert off == 0 if dtype == "bfloat16" else off < 1e-4
    assert (prefix_of(trainer) - before).abs().max() > 0.02
    # So the comparison can fail: after the moves the policy is another one.
    part = plain(trainer.model, inputs_of(trainer)).parts[0]
    with torch.no_grad():
        soft_prefix(trainer.policy.model).copy_(before)
        logps = trainer.model(*part.batch, trainer.args.temperature)[0]
    assert (logps - part.old_logps).sum(1).exp().sub(1).abs().max() > 1e-2


def test_a_single_update_makes_one_pass(build):
    """Its gradient is that of a second pass, which is not made."""
    prefixes, passes = [], []
    for folder, again in (("kept", False), ("again", True)):
        trainer = build(folder=folder, max_steps=2, num_ppo_epochs=1, learning_rate=3e-2)
        update = trainer._update

        def second_pass(model, rollout, trainer=trainer, update=update):
            (part,) = rollout.parts
            logps, entropy = model(*part.batch, 1.0)
            return update(model, replace(rollout, parts=[replace(part, logps=logps, entropy=entropy)]))

        trainer._update = second_pass if again else update
        count = []
        trainer.policy.module.register_forward_hook(lambda *_, count=count: count.append(torch.is_grad_enabled()))
        trainer.train()
        prefixes.append(prefix_of(trainer))
        passes.append(count)
    # Soft and hard of each iteration.
    assert passes[0] == [True, False] * 2 and len(passes[1]) == len(passes[0]) + 2
    assert torch.equal(*prefixes)


def test_a_first_update_that_is_not_one_is_said(build, caplog):
    """A hint at a scoring that is not what was sampled."""
    trainer = build()
    trainer._check_first_update(torch.tensor([1.0, 1.0005]), 1.0, True)
    assert caplog.messages == []
    trainer._check_first_update(torch.tensor([1.0, 0.9]), 1.0, True)
    assert caplog.messages == ["the first update's ratio is 0.1 away from 1, more than 0.001"]


def test_the_prefix_moves_and_nothing_else_of_the_model(build):
    trainer = build(max_steps=2, learning_rate=1e-2)
    model, head = trainer.model, trainer.value_head.dense.weight.detach().clone()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n in before if n.endswith("prompt_encoder.default.embedding.weight")} and len(trained) == 1
    trainer.train()
    wrong = [n for n, p in model.named_parameters() if torch.equal(p, before[n]) == (n in trained)]
    assert wrong == [] and not torch.equal(trainer.value_head.dense.weight, head)
    assert any(HARD in n for n in before if n not in trained)
    assert all(p.grad is None for p in model.parameters())


class WatchOuterStep(TrainerCallback):
    """What the loop's own `optimizer.step()` and schedule do."""

    def __init__(self):
        self.rates, self.moved, self.grads = [], [], []

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        self.grads += [n for n, p in model.named_parameters() if p.grad is not None]

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        after = dict(model.named_parameters())
        self.moved += [n for n, p in self.before.items() if not torch.equal(p, after[n])]


def test_one_trainer_step_is_one_iteration(build):
    watch = WatchOuterStep()
    trainer = build(
        callbacks=[watch],
        max_steps=4,
        num_ppo_epochs=3,
        num_mini_batches=2,
        value_warmup_batches=2,
        learning_rate=8e-3,
        lr_scheduler_type="linear",
    )
    trainer.train()
    assert adam_steps(trainer) == 4 * 3 * 2
    assert watch.moved == [] and watch.grads == []
    # Linear to 0 over the 4 iterations, not over the updates or the contexts.
    assert watch.rates == [pytest.approx([8e-3 * k / 4]) for k in (4, 3, 2, 1)]
    assert trainer.lr_scheduler.last_epoch == 4 == trainer.state.global_step
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(0)
    assert logged(trainer, "learning_rate") == pytest.approx([8e-3, 6e-3, 4e-3, 2e-3])


def test_one_cycle_schedule_is_torchs(build):
    watch = WatchOuterStep()
    build(callbacks=[watch], max_steps=6, one_cycle_pct_start=0.5, num_ppo_epochs=1, learning_rate=1e-2).train()
    dummy = AdamW([torch.zeros(1, requires_grad=True)])
    schedule = OneCycleLR(dummy, 1e-2, total_steps=7, pct_start=0.5, cycle_momentum=False)
    assert len(watch.rates) == 6
    for rates in watch.rates:
        assert rates == pytest.approx([group["lr"] for group in dummy.param_groups])
        dummy.step()
        schedule.step()
    # By hand: rising from a 25th by a cosine over 2.5 iterations, falling to almost nothing over the rest.
    rise = [1e-2 / 25 + (1e-2 - 1e-2 / 25) * (1 - math.cos(math.pi * k / 2.5)) / 2 for k in range(3)]
    low = 1e-2 / 25 / 1e4
    fall = [low + (1e-2 - low) * (1 + math.cos(math.pi * (k - 2.5) / 3.5)) / 2 for k in range(3, 6)]
    assert [rate for (rate,) in watch.rates] == pytest.approx(rise + fall)


@pytest.mark.parametrize("mini_batches", [4, 5, 6])
def test_every_pass_has_the_mini_batches_that_were_asked_for(build, mini_batches):
    """Also where they cannot be of equal size."""
    trainer = build(max_steps=1, num_ppo_epochs=1, num_mini_batches=mini_batches, value_warmup_batches=0)
    trainer.train()
    assert adam_steps(trainer) == mini_batches


def test_every_response_is_used_once_a_pass(build):
    """In mini-batches that are drawn anew each iteration."""
    trainer = build(num_ppo_epochs=3, num_mini_batches=4)
    draws = [[part.rows.tolist() for part in roll_out(trainer).parts] for _ in range(3)]
    assert all(sorted(row for part in rows for row in part) == list(range(BATCH)) and len(rows) == 4 for rows in draws)
    assert len({str(rows) for rows in draws}) == 3


@pytest.mark.parametrize(
    ("target_kl", "mini_batches", "updates", "stopped"),
    # The first update is always made: before it nothing has moved.
    [(1e-7, 1, 2, [1.0, 1.0]), (0.0, 2, 2, [1.0, 1.0]), (1e9, 1, 8, [0.0, 0.0]), (None, 1, 8, [])],
)
def test_updates_end_when_the_policy_has_moved_too_far(build, target_kl, mini_batches, updates, stopped):
    settings = {"num_ppo_epochs": 4, "learning_rate": 3e-2, "value_warmup_batches": 0}
    trainer = build(target_kl=target_kl, num_mini_batches=mini_batches, **settings)
    trainer.train()
    assert adam_steps(trainer) == updates
    assert logged(trainer, "policy/early_stop") == stopped
    assert max(logged(trainer, "policy/approxkl")) > 1e-7


def test_early_stop_is_the_share_of_iterations_that_ended_early(build, monkeypatch):
    drifts = iter([0.0, 0.5, 0.0, 2.0])
    monkeypatch.setattr(ppo_trainer, "approx_kl_per_token", lambda *_: torch.full((BATCH,), next(drifts)))
    trainer = build(logging_steps=2, target_kl=1.0, num_ppo_epochs=2, num_mini_batches=1)
    trainer.train()
    assert logged(trainer, "policy/early_stop") == [0.5]


def test_a_reward_that_is_everywhere_the_same_does_not_end_the_run(build):
    """A sparse reward may well be 0 for a whole first batch: no gradient, and none expected."""
    trainer = build(same(0.0), value_warmup_batches=0, kl_coef=0.0, missing_eos_penalty=0.0)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_prefix_that_gets_no_gradient_ends_the_run(build):
    trainer = build()
    plain = trainer.model.forward

    def forward(*args, **kwargs):
        logps, entropy = plain(*args, **kwargs)
        return logps.detach().requires_grad_(), entropy

    trainer.model.forward = forward
    with pytest.raises(RuntimeError, match="the prefix has no gradient"):
        trainer.train()


# Learning


@pytest.mark.parametrize("ratio_norm", ["none", "mean"])
def test_a_simple_reward_rises(build, ratio_norm):
    trainer = build(not_ascii, contexts=[1] * 16, max_steps=25, ratio_norm=ratio_norm, **EASY)
    trainer.train()
    scores = logged(trainer, "reward")
    assert len(scores) == 25
    assert sum(scores[:3]) / 3 < 0.65 and sum(scores[-5:]) / 5 > 0.8, scores


def test_a_large_kl_coefficient_holds_the_prefix_back(build):
    """The KL is not only computed: it is in what is optimised."""
    drift = {}
    for kl_coef in (0.0, 3.0):
        settings = EASY | {"kl_coef": kl_coef}
        trainer = build(not_ascii, folder=f"kl-{kl_coef}", contexts=[1] * 16, max_steps=12, **settings)
        trainer.train()
        drift[kl_coef] = sum(logged(trainer, "kl")[-5:]) / 5
    assert drift[0.0] > 1 and drift[3.0] < drift[0.0] / 3, drift


def test_same_seed_gives_the_same_bytes(build):
    prefixes, heads = [], []
    for folder, seed in (("a", 42), ("b", 42), ("c", 43)):
        trainer = build(folder=folder, max_steps=2, seed=seed, num_mini_batches=2)
        trainer.train()
        prefixes.append((root_of(trainer) / "adapter_model.safetensors").read_bytes())
        heads.append((root_of(trainer) / VALUE_HEAD_FILE).read_bytes())
    assert prefixes[0] == prefixes[1] != prefixes[2]
    assert heads[0] == heads[1] != heads[2]


def test_a_gradient_norm_of_0_clips_nothing(build):
    """As Trainer has it: the run is that of a norm no gradient reaches."""
    prefixes = []
    for norm in (0.0, 1e9):
        trainer = build(folder=str(norm), max_grad_norm=norm, max_steps=1)
        before = prefix_of(trainer)
        trainer.train()
        prefixes.append(prefix_of(trainer))
    assert torch.equal(*prefixes) and not torch.equal(prefixes[0], before)
