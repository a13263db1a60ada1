"""One iteration: the rollout's returns and advantages, the warm-up, the updates, the schedules."""

import math

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
    same,
    varied,
)
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from transformers import AutoModelForCausalLM, TrainerCallback

from h2s.ppo import trainer as ppo_trainer
from h2s.ppo.policy import VALUE_HEAD_FILE
from h2s.ppo.trainer import VALUE_WARMUP_UPDATES
from h2s.prefix.adapter import HARD, soft_prefix
from h2s.prefix.generation import completion_logps, decode


def adam_steps(trainer):
    """Adam's own count of the updates of the prefix and of the value head."""
    state = trainer.optimizer.optimizer.state
    return tuple(
        int(state[p]["step"]) for p in (soft_prefix(trainer.policy.model), trainer.model.value_head.out.weight)
    )


def batch_of(rollout):
    b = rollout.batch
    return b.input_ids, b.attention_mask, b.completion_mask


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
    trainer.model.value_head.out.bias.data.fill_(0.75)
    trainer.policy.stop_ids = list(range(0, 320, 4))  # a quarter of the vocabulary ends a reply: some end, some do not
    torch.manual_seed(3)
    inputs = inputs_of(trainer)
    rollout = trainer._roll_out(inputs)
    clipped = [1.5, -1.5, 0.5, 0.25, -0.125, 1.0]
    unfinished, replies, largest_kl = [], [], 0.0
    for i in range(BATCH):
        ids, mask = rollout.batch.input_ids[i], rollout.batch.completion_mask[i]
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
    assert rollout.mean_length == pytest.approx(rollout.batch.completion_mask.sum().item() / BATCH)
    assert trainer.iterations.metrics["completions/clipped_ratio"] == [pytest.approx(sum(unfinished) / BATCH)]
    assert trainer.iterations.metrics["reward"] == [pytest.approx(sum(scores) / BATCH)]


def test_kl_is_zero_at_the_start(build):
    trainer = build(max_steps=1, value_warmup_batches=0, num_ppo_epochs=1)
    trainer.train()
    assert logged(trainer, "objective/kl") == pytest.approx([0], abs=1e-3)


@pytest.mark.parametrize("scores", [None, [100.0, 200.0, 300.0, 700.0, 0.0, 0.0]])
def test_advantages_are_whitened(build, scores):
    trainer = build(varied if scores is None else lambda **kwargs: scores, missing_eos_penalty=0.0)
    rollout = trainer._roll_out(inputs_of(trainer))
    expected = (rollout.returns - rollout.returns.mean()) / rollout.returns.std()
    torch.testing.assert_close(rollout.advantages, expected)
    assert rollout.advantages.std().item() == pytest.approx(1, abs=1e-4)


def test_scoring_uses_the_temperature_of_sampling(build):
    trainer = build(temperature=0.5)
    assert trainer.sampling.temperature == 0.5
    rollout = trainer._roll_out(inputs_of(trainer))
    with torch.no_grad():
        expected, other = (completion_logps(trainer.policy.model, rollout.batch, t)[0] for t in (0.5, 1.0))
    torch.testing.assert_close(rollout.old_logps, expected, rtol=0, atol=1e-4)
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
    trainer.policy.complete = lambda prompts, *rest: [broken for _ in prompts]
    rollout = trainer._roll_out(inputs_of(trainer))
    for ids, mask in zip(rollout.batch.input_ids, rollout.batch.completion_mask, strict=True):
        assert ids[mask].tolist() == broken


def test_padding_is_not_scored(build):
    trainer = build(max_completion_length=8)
    trainer.policy.stop_ids = list(range(0, 320, 3))
    rollout = trainer._roll_out(inputs_of(trainer))
    padding = rollout.batch.attention_mask == 0
    assert padding.any() and not rollout.old_logps[padding].any()
    assert not rollout.batch.completion_mask[padding].any()


def test_the_reward_is_asked_for_the_whole_batch_at_once(build):
    asked = []
    trainer = build(lambda completions, **kwargs: asked.append(len(completions)) or [0.5] * len(completions))
    trainer._roll_out(inputs_of(trainer))
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


# The value head


def test_value_warm_up_moves_the_head_alone(build):
    trainer = build(max_steps=1, value_warmup_batches=2)
    start = prefix_of(trainer)
    seen = []
    update = trainer._update

    def watch(model, rollout):
        state, bias = trainer.optimizer.optimizer.state, trainer.model.value_head.out.bias
        updates = int(state[bias]["step"])
        seen.append((prefix_of(trainer), bias.item(), soft_prefix(trainer.policy.model) in state, updates))
        return update(model, rollout)

    trainer._update = watch
    trainer.train()
    ((prefix, bias, adam_knows_prefix, head_updates),) = seen
    assert torch.equal(prefix, start)
    assert bias != 0 and not adam_knows_prefix and head_updates == 2 * VALUE_WARMUP_UPDATES
    assert not torch.equal(prefix_of(trainer), start)


def test_value_warm_up_fits_the_returns(build):
    """Rewards of 3 everywhere, no KL at the start: the head goes from 0 to near 3."""
    trainer = build(
        same(3.0),
        max_steps=1,
        value_warmup_batches=6,
        value_learning_rate=2e-2,
        missing_eos_penalty=0.0,
        learning_rate=0.0,
    )
    trainer.train()
    rollout = trainer._roll_out(inputs_of(trainer), record=False)
    with torch.no_grad():
        values = trainer.model(*batch_of(rollout))[2]
    torch.testing.assert_close(values, torch.full((BATCH,), 3.0), rtol=0, atol=0.3)


def test_value_head_learns_which_contexts_are_hard(build):
    """All rewards lie far from 0, and the context alone decides how far: within 12 iterations the head has found it."""
    trainer = build(
        lambda prompts, **kwargs: [-30.0 + 2 * (len(p[-1]["content"]) % 2) for p in prompts],
        learning_rate=0.0,
        max_steps=12,
        value_learning_rate=1e-2,
        missing_eos_penalty=0.0,
    )
    trainer.train()
    found = logged(trainer, "val/explained_variance")
    assert sum(found[-4:]) / 4 > 0.5, found


# The updates


@pytest.mark.parametrize("settings", [{}, {"num_mini_batches": 3, "temperature": 1.5}, {"ratio_norm": "mean"}])
def test_first_pass_has_ratio_one(build, settings):
    """On ragged padded batches, the prefix having moved, in mini-batches trimmed otherwise than the rollout's."""
    trainer = build(max_steps=3, learning_rate=3e-2, max_completion_length=12, **settings)
    first, widths = [], set()
    check, roll_out = trainer._check_first_pass, trainer._roll_out
    trainer._check_first_pass = lambda ratio, *rest: first.append(ratio) or check(ratio, *rest)

    def watch(inputs, **kwargs):
        rollout = roll_out(inputs, **kwargs)
        widths.add(tuple(rollout.batch.attention_mask.sum(1).tolist()))
        return rollout

    trainer._roll_out = watch
    before = prefix_of(trainer)
    trainer.train()
    assert len(first) == 3 and all(len(set(lengths)) > 1 for lengths in widths)
    assert torch.cat(first).sub(1).abs().max() < 1e-4
    assert logged(trainer, "val/ratio") == pytest.approx([1, 1, 1], abs=1e-4)
    assert (prefix_of(trainer) - before).abs().max() > 0.02
    # So the comparison can fail: after the moves the policy is another one.
    with torch.no_grad():
        rollout = roll_out(inputs_of(trainer), record=False)
        soft_prefix(trainer.policy.model).copy_(before)
        logps = trainer.model(*batch_of(rollout))[0]
    assert (logps - rollout.old_logps).sum(1).exp().sub(1).abs().max() > 1e-2


def test_a_first_pass_that_is_not_one_is_said(build, caplog):
    """A hint at a scoring that is not what was sampled; float32's rounding is none."""
    trainer = build()
    trainer._check_first_pass(torch.tensor([1.0, 1.0005]), 1.0, True)
    assert caplog.messages == []
    trainer._check_first_pass(torch.tensor([1.0, 0.9]), 1.0, True)
    assert caplog.messages == ["the first pass's ratio is 0.1 away from 1, more than 0.001"]


def test_prefix_and_value_head_move_and_nothing_else(build):
    trainer = build(max_steps=2, learning_rate=1e-2)
    model = trainer.model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    soft = {n for n in before if n.endswith("prompt_encoder.default.embedding.weight")}
    head = {n for n in before if n.startswith("value_head.")}
    assert trained == soft | head and len(soft) == 1 and len(head) == 4
    trainer.train()
    wrong = [n for n, p in model.named_parameters() if torch.equal(p, before[n]) == (n in trained)]
    assert wrong == []
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
        value_learning_rate=4e-3,
        lr_scheduler_type="linear",
    )
    trainer.train()
    assert adam_steps(trainer) == (4 * 3 * 2, 4 * 3 * 2 + 2 * VALUE_WARMUP_UPDATES)
    assert watch.moved == [] and watch.grads == []
    # Linear to 0 over the 4 iterations, not over the updates or the contexts.
    assert watch.rates == [pytest.approx([8e-3 * k / 4, 4e-3 * k / 4]) for k in (4, 3, 2, 1)]
    assert trainer.lr_scheduler.last_epoch == 4 == trainer.state.global_step
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(0)
    assert logged(trainer, "learning_rate") == pytest.approx([8e-3, 6e-3, 4e-3, 2e-3])


def test_one_cycle_schedule_is_torchs(build):
    watch = WatchOuterStep()
    settings = {"learning_rate": 1e-2, "value_learning_rate": 4e-3}
    build(callbacks=[watch], max_steps=6, one_cycle_pct_start=0.5, num_ppo_epochs=1, **settings).train()
    dummy = AdamW([{"params": [torch.zeros(1, requires_grad=True)]}, {"params": [torch.zeros(1, requires_grad=True)]}])
    schedule = OneCycleLR(dummy, [1e-2, 4e-3], total_steps=7, pct_start=0.5, cycle_momentum=False)
    assert len(watch.rates) == 6
    for rates in watch.rates:
        assert rates == pytest.approx([group["lr"] for group in dummy.param_groups])
        dummy.step()
        schedule.step()
    # By hand: rising from a 25th by a cosine over 2.5 iterations, falling to almost nothing over the rest.
    rise = [1e-2 / 25 + (1e-2 - 1e-2 / 25) * (1 - math.cos(math.pi * k / 2.5)) / 2 for k in range(3)]
    low = 1e-2 / 25 / 1e4
    fall = [low + (1e-2 - low) * (1 + math.cos(math.pi * (k - 2.5) / 3.5)) / 2 for k in range(3, 6)]
    assert [prefix for prefix, _ in watch.rates] == pytest.approx(rise + fall)


@pytest.mark.parametrize("mini_batches", [4, 5, 6])
def test_every_pass_has_the_mini_batches_that_were_asked_for(build, mini_batches):
    """Also where they cannot be of equal size."""
    trainer = build(max_steps=1, num_ppo_epochs=1, num_mini_batches=mini_batches, value_warmup_batches=0)
    trainer.train()
    assert adam_steps(trainer)[0] == mini_batches


def test_every_response_is_used_once_a_pass(build):
    trainer = build(num_ppo_epochs=3, num_mini_batches=4)
    batches = list(trainer._mini_batches(BATCH))
    assert [first for _, first in batches] == [True] + [False] * (len(batches) - 1)
    rows = torch.cat([index for index, _ in batches]).tolist()
    passes = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    assert [sorted(p) for p in passes] == [list(range(BATCH))] * 3
    assert len({tuple(p) for p in passes}) > 1


@pytest.mark.parametrize(
    ("target_kl", "mini_batches", "updates", "stopped"),
    # The first pass is always made: at it nothing has moved yet.
    [(1e-7, 1, 2, [1.0, 1.0]), (0.0, 2, 2, [1.0, 1.0]), (1e9, 1, 8, [0.0, 0.0]), (None, 1, 8, [])],
)
def test_updates_end_when_the_policy_has_moved_too_far(build, target_kl, mini_batches, updates, stopped):
    settings = {"num_ppo_epochs": 4, "learning_rate": 3e-2, "value_warmup_batches": 0}
    trainer = build(target_kl=target_kl, num_mini_batches=mini_batches, **settings)
    trainer.train()
    assert adam_steps(trainer) == (updates, updates)
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
        logps, entropy, values = plain(*args, **kwargs)
        return logps.detach(), entropy.detach(), values

    trainer.model.forward = forward
    with pytest.raises(RuntimeError, match="the prefix has no gradient"):
        trainer.train()


def test_each_group_is_clipped_by_itself(build, monkeypatch):
    """A huge value loss does not shrink the prefix's step."""
    norms, step = [], AdamW.step

    def spy(self, *args, **kwargs):
        groups = [[p.grad.norm() for p in g["params"] if p.grad is not None] for g in self.param_groups]
        if all(groups):  # not the warm-up's
            norms.append([torch.stack(group).norm().item() for group in groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(AdamW, "step", spy)
    for coefficient in (1e-3, 1e5):
        build(folder=str(coefficient), max_steps=1, vf_coef=coefficient, num_ppo_epochs=1, max_grad_norm=1e-3).train()
    (small_prefix, _), (huge_prefix, huge_head) = norms
    assert small_prefix == pytest.approx(1e-3, rel=1e-2) == huge_prefix
    assert huge_head == pytest.approx(1e-3, rel=1e-2)


# Learning


@pytest.mark.parametrize("ratio_norm", ["none", "mean"])
def test_a_simple_reward_rises(build, ratio_norm):
    trainer = build(not_ascii, contexts=[1] * 16, max_steps=25, ratio_norm=ratio_norm, **EASY)
    trainer.train()
    scores = logged(trainer, "reward")
    assert len(scores) == 25
    assert scores[0] < 0.5 and sum(scores[-5:]) / 5 > 0.8, scores


def test_a_large_kl_coefficient_holds_the_prefix_back(build):
    """The KL is not only computed: it is in what is optimised."""
    drift = {}
    for kl_coef in (0.0, 3.0):
        settings = EASY | {"kl_coef": kl_coef}
        trainer = build(not_ascii, folder=f"kl-{kl_coef}", contexts=[1] * 16, max_steps=12, **settings)
        trainer.train()
        drift[kl_coef] = sum(logged(trainer, "objective/kl")[-5:]) / 5
    assert drift[0.0] > 2 and drift[3.0] < drift[0.0] / 3, drift


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
