import importlib.util
import logging
import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny import HARD_PROMPT, ROOT, sample_context
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from transformers import AutoModelForCausalLM, TrainerCallback, set_seed

from h2s.data.messages import conversation_id
from h2s.errors import InputError
from h2s.models import load_base_model, load_tokenizer
from h2s.ppo import trainer as ppo_trainer
from h2s.ppo.config import SingleStepPPOConfig
from h2s.ppo.policy import VALUE_HEAD_FILE, PolicyWithValueHead
from h2s.ppo.trainer import VALUE_WARMUP_UPDATES, SingleStepPPOTrainer, measured_by
from h2s.prefix.adapter import HARD, add_hard_prompt, hard_prompt_active, prefix_from_hard_prompt, soft_prefix
from h2s.prefix.chat_template import chat_prefix, encode_prompts, wrap_chat_template
from h2s.prefix.generation import decode
from h2s.report.soft_vs_hard import HARD_PROMPT_EVALUATION, over_optimised
from h2s.reward.model import RewardModel, build_reward_model

BATCH, HELD_OUT = 6, 5


def texts(completions):
    """As TRL's reward functions are given them: a completion is a list of one message."""
    return [message["content"] for (message,) in completions]


def not_ascii(prompts, completions):
    """A reward that is easy to raise: the share of characters beyond ASCII."""
    return [sum(not c.isascii() for c in text) / max(1, len(text)) for text in texts(completions)]


def varied(prompts, completions):
    """A reward with neither ties nor a trend: a hash of the reply's letters."""
    return [math.sin(sum(map(ord, c)) + len(c)) for c in texts(completions)]


def dataset(tokenizer, prefix, indices):
    contexts = [sample_context(i) for i in indices]
    rows = zip(contexts, encode_prompts(tokenizer, prefix, contexts), strict=True)
    return Dataset.from_list(
        [
            {"prompt": c, "prompt_ids": ids, "conversation": conversation_id(c), "row": i}
            for i, (c, ids) in enumerate(rows)
        ]
    )


@pytest.fixture
def build(gemma_folder, tmp_path):
    """A trainer on a fresh tiny policy; settings override what is small and quiet here."""

    def make(reward=varied, callbacks=None, folder="run", contexts=range(12), move=0.0, judge=None, **settings):
        tokenizer = load_tokenizer(str(gemma_folder))
        prefix = chat_prefix(tokenizer, HARD_PROMPT)
        wrap_chat_template(tokenizer, prefix)
        settings = {
            "max_steps": 2,
            "per_device_train_batch_size": BATCH,
            "max_completion_length": 6,
            "eval_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "target_kl": None,
            "num_ppo_epochs": 2,
            "num_mini_batches": 1,
        } | settings
        args = SingleStepPPOConfig(output_dir=str(tmp_path / folder), **settings)
        set_seed(args.seed)
        model = prefix_from_hard_prompt(load_base_model(str(gemma_folder), dtype="float32"), prefix.token_ids)
        add_hard_prompt(model, prefix.token_ids)
        if move:
            with torch.no_grad():
                soft_prefix(model).add_(move * torch.randn(soft_prefix(model).shape))
        return SingleStepPPOTrainer(
            model=PolicyWithValueHead(model, args.temperature),
            args=args,
            train_dataset=dataset(tokenizer, prefix, contexts),
            eval_dataset=dataset(tokenizer, prefix, range(100, 100 + HELD_OUT)),
            processing_class=tokenizer,
            prefix=prefix,
            reward=reward,
            judge=judge,
            callbacks=callbacks,
        )

    return make


def prefix_of(trainer):
    return soft_prefix(trainer.policy.model).detach().clone()


def adam_steps(trainer):
    """Adam's own count of the updates of the prefix and of the value head."""
    state = trainer.optimizer.optimizer.state
    return tuple(
        int(state[p]["step"]) for p in (soft_prefix(trainer.policy.model), trainer.policy.value_head.out.weight)
    )


def logged(trainer, name):
    return [line[name] for line in trainer.state.log_history if name in line]


def inputs_of(trainer, rows):
    chosen = trainer.train_dataset[list(rows)]
    return {"prompt": chosen["prompt"], "prompt_ids": chosen["prompt_ids"]}


# The updates


@pytest.mark.parametrize("settings", [{}, {"num_mini_batches": 3, "temperature": 1.5}, {"ratio_norm": "mean"}])
def test_first_pass_has_ratio_one(build, settings):
    """On ragged padded batches, the prefix having moved, in mini-batches trimmed otherwise than the rollout's."""
    trainer = build(max_steps=3, learning_rate=3e-2, max_completion_length=12, **settings)
    first, later, widths = [], [], set()
    check, apply = trainer._check_first_pass, trainer._apply
    trainer._check_first_pass = lambda ratio, *rest: first.append(ratio) or check(ratio, *rest)
    roll_out = trainer._roll_out

    def watch(inputs, **kwargs):
        rollout = roll_out(inputs, **kwargs)
        widths.add(tuple(rollout.batch.attention_mask.sum(1).tolist()))
        return rollout

    trainer._roll_out = watch
    trainer._apply = lambda loss: later.append(loss) or apply(loss)
    before = prefix_of(trainer)
    trainer.train()
    assert len(first) == 3 and all(len(set(lengths)) > 1 for lengths in widths)
    assert torch.cat(first).sub(1).abs().max() < 1e-4
    assert logged(trainer, "val/ratio") == pytest.approx([1, 1, 1], abs=1e-4)
    assert (prefix_of(trainer) - before).abs().max() > 0.02
    # So the comparison can fail: after the moves the policy is another one.
    with torch.no_grad():
        rollout = roll_out(inputs_of(trainer, range(BATCH)), record=False)
        soft_prefix(trainer.policy.model).copy_(before)
        b = rollout.batch
        logps = trainer.policy(b.input_ids, b.attention_mask, b.completion_mask)[0]
    assert (logps - rollout.old_logps).sum(1).exp().sub(1).abs().max() > 1e-2


def test_prefix_and_value_head_move_and_nothing_else(build):
    trainer = build(max_steps=2, learning_rate=1e-2)
    policy = trainer.policy
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    trained = {n for n, p in policy.named_parameters() if p.requires_grad}
    soft = {n for n in before if n.endswith("prompt_encoder.default.embedding.weight")}
    head = {n for n in before if n.startswith("value_head.")}
    assert trained == soft | head and len(soft) == 1 and len(head) == 4
    trainer.train()
    wrong = []
    for name, parameter in policy.named_parameters():
        if name in trained and torch.equal(parameter, before[name]):
            wrong.append(f"{name} did not move")
        if name not in trained and not torch.equal(parameter, before[name]):
            wrong.append(f"{name} moved")
    assert wrong == []
    assert any(HARD in n for n in before if n not in trained)
    assert all(p.grad is None for p in policy.parameters())


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
    # Linear to 0 over the 4 iterations, not over the updates.
    assert watch.rates == [pytest.approx([8e-3 * k / 4, 4e-3 * k / 4]) for k in (4, 3, 2, 1)]
    assert trainer.lr_scheduler.last_epoch == 4 == trainer.state.global_step
    assert logged(trainer, "learning_rate") == pytest.approx([8e-3, 6e-3, 4e-3, 2e-3])


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


def test_value_warm_up_moves_the_head_alone(build):
    trainer = build(max_steps=1, value_warmup_batches=2)
    start = prefix_of(trainer)
    seen = []
    update = trainer._update

    def watch(model, rollout):
        seen.append((prefix_of(trainer), trainer.policy.value_head.out.bias.item(), adam_warm()))
        return update(model, rollout)

    def adam_warm():
        state = trainer.optimizer.optimizer.state
        return soft_prefix(trainer.policy.model) in state, int(state[trainer.policy.value_head.out.bias]["step"])

    trainer._update = watch
    trainer.train()
    ((prefix, bias, adam),) = seen
    assert torch.equal(prefix, start)
    assert bias != 0 and adam == (False, 2 * VALUE_WARMUP_UPDATES)
    assert not torch.equal(prefix_of(trainer), start)


def test_value_warm_up_fits_the_returns(build):
    """Rewards of 3 everywhere, no KL at the start: the head goes from 0 to near 3."""
    trainer = build(
        lambda prompts, completions: [3.0] * len(completions),
        max_steps=1,
        value_warmup_batches=6,
        value_learning_rate=2e-2,
        missing_eos_penalty=0.0,
        learning_rate=0.0,
    )
    trainer.train()
    rollout = trainer._roll_out(inputs_of(trainer, range(BATCH)), record=False)
    b = rollout.batch
    with torch.no_grad():
        values = trainer.policy(b.input_ids, b.attention_mask, b.completion_mask)[2]
    torch.testing.assert_close(values, torch.full((BATCH,), 3.0), rtol=0, atol=0.3)


def test_updates_end_when_the_policy_has_moved_too_far(build):
    settings = {
        "max_steps": 2,
        "num_ppo_epochs": 4,
        "num_mini_batches": 1,
        "learning_rate": 3e-2,
        "value_warmup_batches": 0,
    }
    stopped = build(folder="stopped", target_kl=1e-7, **settings)
    stopped.train()
    # The first pass is always made: at it nothing has moved yet.
    assert adam_steps(stopped) == (2, 2)
    assert logged(stopped, "policy/early_stop") == [1.0, 1.0]
    free = build(folder="free", target_kl=1e9, **settings)
    free.train()
    assert adam_steps(free) == (8, 8)
    assert logged(free, "policy/early_stop") == [0.0, 0.0]
    assert max(logged(free, "policy/approxkl")) > 1e-7


def test_early_stop_is_the_share_of_iterations_that_ended_early(build, monkeypatch):
    """One of two; without a limit there is no share."""
    for folder, target_kl, expected in (("limit", 1.0, [0.5]), ("none", None, [])):
        drifts = iter([0.0, 0.5, 0.0, 2.0])
        monkeypatch.setattr(ppo_trainer, "approx_kl_per_token", lambda *_, d=drifts: torch.full((BATCH,), next(d)))
        trainer = build(folder=folder, logging_steps=2, target_kl=target_kl, num_ppo_epochs=2, num_mini_batches=1)
        trainer.train()
        assert logged(trainer, "policy/early_stop") == expected


def test_target_kl_of_zero_still_makes_the_first_pass(build):
    trainer = build(max_steps=1, target_kl=0.0, num_ppo_epochs=3, num_mini_batches=2, value_warmup_batches=0)
    trainer.train()
    assert adam_steps(trainer) == (1, 1)


def test_a_reward_that_is_everywhere_the_same_does_not_end_the_run(build):
    """A sparse reward may well be 0 for a whole first batch: no gradient, and none expected."""
    trainer = build(
        lambda prompts, completions: [0.0] * len(completions),
        max_steps=2,
        value_warmup_batches=0,
        kl_coef=0.0,
        missing_eos_penalty=0.0,
    )
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_prefix_that_gets_no_gradient_ends_the_run(build):
    trainer = build()
    plain = trainer.policy.forward

    def forward(*args, **kwargs):
        logps, entropy, values = plain(*args, **kwargs)
        return logps.detach(), entropy.detach(), values

    trainer.policy.forward = forward
    with pytest.raises(RuntimeError, match="the prefix has no gradient"):
        trainer.train()


def test_each_group_is_clipped_by_itself(build):
    """A huge value loss does not shrink the prefix's step."""
    norms = []
    for folder, coefficient in (("small", 1e-3), ("huge", 1e5)):
        trainer = build(folder=folder, max_steps=1, vf_coef=coefficient, num_ppo_epochs=1, max_grad_norm=1e-3)
        step = []
        optimizer_step = AdamW.step

        def spy(self, *args, _step=step, _plain=optimizer_step, **kwargs):
            norms = [
                torch.stack([p.grad.norm() for p in g["params"] if p.grad is not None]).norm().item()
                for g in self.param_groups
                if any(p.grad is not None for p in g["params"])
            ]
            if len(norms) == 2:
                _step.append(norms)
            return _plain(self, *args, **kwargs)

        AdamW.step = spy
        try:
            trainer.train()
        finally:
            AdamW.step = optimizer_step
        norms += step
    (small_prefix, _), (huge_prefix, huge_head) = norms
    assert small_prefix == pytest.approx(1e-3, rel=1e-2) == huge_prefix
    assert huge_head == pytest.approx(1e-3, rel=1e-2)


# What is rewarded


@torch.no_grad()
def summed_kl(trainer, gemma_folder, prompt, completion):
    """sum ln p_soft - ln p_hard of one completion, unpadded, the hard prompt as tokens through a fresh base model."""

    def logps(logits):
        at = torch.tensor(completion)[:, None]
        return logits[-len(completion) - 1 : -1].double().log_softmax(-1).gather(-1, at).sum().item()

    base = AutoModelForCausalLM.from_pretrained(gemma_folder, dtype=torch.float32).eval()
    hard = base(torch.tensor([trainer.prefix.token_ids + prompt + completion])).logits[0]
    soft = trainer.policy.model(torch.tensor([prompt + completion])).logits[0]
    return logps(soft) - logps(hard)


def test_returns_are_score_minus_kl_minus_penalty(build, gemma_folder):
    """With a prefix that has moved, by another path: PEFT's own forward and the hard prompt as text, row by row."""
    scores = [5.0, -7.0, 0.5, 0.25, -0.125, 1.0]
    seen = []

    def reward(prompts, completions):
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
    trainer.policy.value_head.out.bias.data.fill_(0.75)
    trainer.stop_ids = list(range(0, 320, 4))  # a quarter of the vocabulary ends a reply: some end, some do not
    torch.manual_seed(3)
    inputs = inputs_of(trainer, range(BATCH))
    rollout = trainer._roll_out(inputs)
    clipped = [1.5, -1.5, 0.5, 0.25, -0.125, 1.0]
    unfinished, largest_kl = [], 0.0
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
    assert largest_kl > 0.5 and 0 < sum(unfinished) < BATCH
    ((prompts, completions),) = seen
    assert prompts == inputs["prompt"]
    replies = [rollout.batch.input_ids[i][rollout.batch.completion_mask[i]].tolist() for i in range(BATCH)]
    replies = [decode(trainer.processing_class, reply, trainer.stop_ids) for reply in replies]
    assert completions == [[{"role": "assistant", "content": reply}] for reply in replies]
    assert rollout.mean_length == pytest.approx(rollout.batch.completion_mask.sum().item() / BATCH)
    assert trainer._metrics["completions/clipped_ratio"] == [pytest.approx(sum(unfinished) / BATCH)]
    assert trainer._metrics["objective/scores"] == [pytest.approx(sum(scores) / BATCH)]


def test_kl_is_zero_at_the_start(build):
    trainer = build(max_steps=1, value_warmup_batches=0, num_ppo_epochs=1)
    trainer.train()
    assert logged(trainer, "objective/kl") == pytest.approx([0], abs=1e-3)


def test_advantages_are_whitened(build):
    trainer = build(varied, missing_eos_penalty=0.0)
    rollout = trainer._roll_out(inputs_of(trainer, range(BATCH)))
    expected = (rollout.returns - rollout.returns.mean()) / rollout.returns.std()
    torch.testing.assert_close(rollout.advantages, expected)


def test_a_large_kl_coefficient_holds_the_prefix_back(build):
    """The KL is not only computed: it is in what is optimised."""
    drift = {}
    for kl_coef in (0.0, 3.0):
        trainer = build(
            not_ascii,
            folder=f"kl-{kl_coef}",
            max_steps=12,
            per_device_train_batch_size=16,
            contexts=[1] * 16,
            max_completion_length=4,
            learning_rate=1e-1,
            kl_coef=kl_coef,
            missing_eos_penalty=0.0,
        )
        trainer.train()
        drift[kl_coef] = sum(logged(trainer, "objective/kl")[-5:]) / 5
    assert drift[0.0] > 2 and drift[3.0] < drift[0.0] / 3, drift


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_ends_the_run(build, value):
    trainer = build(lambda prompts, completions: [0.0] * (len(completions) - 1) + [value])
    with pytest.raises(RuntimeError, match="reward of a reply is not finite"):
        trainer.train()


# Learning


@pytest.mark.parametrize("ratio_norm", ["none", "mean"])
def test_a_simple_reward_rises(build, ratio_norm):
    trainer = build(
        not_ascii,
        max_steps=25,
        per_device_train_batch_size=16,
        contexts=[1] * 16,
        max_completion_length=4,
        learning_rate=1e-1,
        kl_coef=0.0,
        missing_eos_penalty=0.0,
        ratio_norm=ratio_norm,
    )
    trainer.train()
    scores = logged(trainer, "objective/scores")
    assert len(scores) == 25
    assert scores[0] < 0.5 and sum(scores[-5:]) / 5 > 0.8, scores


def test_same_seed_gives_the_same_bytes(build):
    prefixes, heads = [], []
    for folder, seed in (("a", 42), ("b", 42), ("c", 43)):
        trainer = build(folder=folder, max_steps=2, seed=seed, num_mini_batches=2)
        trainer.train()
        trainer.save_model(trainer.args.output_dir)
        prefixes.append((Path(trainer.args.output_dir) / "adapter_model.safetensors").read_bytes())
        heads.append((Path(trainer.args.output_dir) / VALUE_HEAD_FILE).read_bytes())
    assert prefixes[0] == prefixes[1] != prefixes[2]
    assert heads[0] == heads[1] != heads[2]


class RecordRates(TrainerCallback):
    def __init__(self):
        self.rates = []

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def test_one_cycle_schedule_is_torchs(build):
    record = RecordRates()
    settings = {"learning_rate": 1e-2, "value_learning_rate": 4e-3}
    trainer = build(callbacks=[record], max_steps=6, one_cycle_pct_start=0.5, num_ppo_epochs=1, **settings)
    trainer.train()
    dummy = AdamW([{"params": [torch.zeros(1, requires_grad=True)]}, {"params": [torch.zeros(1, requires_grad=True)]}])
    schedule = OneCycleLR(dummy, [1e-2, 4e-3], total_steps=7, pct_start=0.5, cycle_momentum=False)
    for rates in record.rates:
        assert rates == pytest.approx([group["lr"] for group in dummy.param_groups])
        dummy.step()
        schedule.step()
    # By hand: rising from a 25th by a cosine over 2.5 iterations, falling to almost nothing over the rest.
    rise = [1e-2 / 25 + (1e-2 - 1e-2 / 25) * (1 - math.cos(math.pi * k / 2.5)) / 2 for k in range(3)]
    low = 1e-2 / 25 / 1e4
    fall = [low + (1e-2 - low) * (1 + math.cos(math.pi * (k - 2.5) / 3.5)) / 2 for k in range(3, 6)]
    assert [prefix for prefix, _ in record.rates] == pytest.approx(rise + fall)


# Evaluations and files


class Course:
    """A reward that says how each evaluation of the held-out contexts ends: soft minus hard."""

    def __init__(self, differences):
        self.differences, self.calls = differences, 0

    def __call__(self, prompts, completions):
        if len(prompts) != HELD_OUT:
            return varied(prompts, completions)
        evaluation, hard = divmod(self.calls, 2)
        self.calls += 1
        return [0.0 if hard else self.differences[evaluation]] * HELD_OUT


def saved_prefix(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")["prompt_embeddings"]


def test_best_adapter_is_at_the_root_and_never_the_starting_one(build):
    """Every iteration is worse than the hard prompt; the least bad one is kept."""
    trainer = build(
        Course([-5.0, -1.0, -3.0, -2.0]),
        max_steps=4,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=None,
    )
    root = Path(trainer.args.output_dir)
    start = prefix_of(trainer)
    trainer.train()
    saved = {n: saved_prefix(root / f"checkpoint-{n}") for n in range(1, 5)}
    assert logged(trainer, "eval_reward_difference") == [-5, -1, -3, -2]
    assert [n for n, p in saved.items() if torch.equal(p, saved_prefix(root))] == [2]
    assert not any(torch.equal(p, start) for p in saved.values())
    heads = {n: load_file(root / f"checkpoint-{n}" / VALUE_HEAD_FILE) for n in (2, 4)}
    assert torch.equal(load_file(root / VALUE_HEAD_FILE)["dense.weight"], heads[2]["dense.weight"])
    assert not torch.equal(heads[2]["dense.weight"], heads[4]["dense.weight"])
    assert torch.equal(saved[4], prefix_of(trainer))


def test_an_evaluation_before_training_is_no_candidate(build):
    """The starting prefix is as good as the hard prompt, and all that follows is worse."""
    rooted = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            rooted.append((Path(args.output_dir) / "adapter_model.safetensors").exists())

    settings = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    trainer = build(Course([0.0, -4.0]), [Watch()], **settings)
    start = prefix_of(trainer)
    trainer.train()
    assert logged(trainer, "eval_reward_difference") == [0, -4] and rooted == [False]
    assert torch.equal(saved_prefix(trainer.args.output_dir), prefix_of(trainer))
    assert not torch.equal(prefix_of(trainer), start)


def test_last_step_is_evaluated(build):
    trainer = build(max_steps=5, eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert [line["step"] for line in trainer.state.log_history if "eval_reward_difference" in line] == [2, 4, 5]


def test_recipe_without_evaluations_keeps_the_last_adapter(gemma_folder, bert_folder, contexts_file, tmp_path):
    reward = RewardModel(build_reward_model(str(bert_folder), 4), load_tokenizer(str(bert_folder)), 64)
    reward.save(tmp_path / "reward")
    spec = importlib.util.spec_from_file_location("train_policy", ROOT / "recipes" / "train_policy.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    arguments = {
        "model_name_or_path": gemma_folder,
        "hard_prompt": HARD_PROMPT,
        "reward_adapter": tmp_path / "reward",
        "path": contexts_file,
        "output_dir": tmp_path,
        "run_name": "run",
        "max_steps": 2,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 4,
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": "true",
    }
    recipe.main([text for name, value in arguments.items() for text in (f"--{name}", str(value))])
    root = tmp_path / "run"
    assert torch.equal(saved_prefix(root), saved_prefix(root / "checkpoint-2"))
    assert (root / VALUE_HEAD_FILE).is_file() and (root / "README.md").is_file()
    assert not list(root.rglob("training_args.bin"))


def test_evaluation_does_not_touch_what_is_sampled_next(build):
    """A run that evaluates ends in the same bytes as one that does not."""
    prefixes = []
    for folder, settings in (("with", {"eval_strategy": "steps", "eval_steps": 1}), ("without", {})):
        trainer = build(folder=folder, max_steps=3, **settings)
        trainer.train()
        prefixes.append(prefix_of(trainer))
    assert torch.equal(*prefixes)


def test_best_model_is_loaded_at_the_end_when_asked_for(build):
    trainer = build(
        Course([-1.0, -3.0]),
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    root = Path(trainer.args.output_dir)
    assert torch.equal(prefix_of(trainer), saved_prefix(root))
    assert torch.equal(prefix_of(trainer), saved_prefix(root / "checkpoint-1"))


def test_what_a_run_leaves_behind(build):
    trainer = build(max_steps=2, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    root = Path(trainer.args.output_dir)
    names = {f.name for f in root.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "h2s.json", VALUE_HEAD_FILE, "completions"} <= names
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]
    assert not list(root.rglob("training_args.bin"))
    # The frozen hard prompt is not saved, and the base is not.
    assert list(load_file(root / "adapter_model.safetensors")) == ["prompt_embeddings"]
    assert not list(root.rglob("hard_prompt")) and not list(root.rglob("model.safetensors"))


def test_completions_are_readable(build):
    seen = []

    def reward(prompts, completions):
        if len(prompts) == BATCH:
            seen.append((prompts, completions, varied(prompts, completions)))
        return varied(prompts, completions)

    trainer = build(reward, max_steps=2, value_warmup_batches=0)
    trainer.train()
    files = sorted((Path(trainer.args.output_dir) / "completions").iterdir())
    assert [f.name for f in files] == ["step-000001.parquet", "step-000002.parquet"]
    for file, (prompts, completions, scores) in zip(files, seen, strict=True):
        table = pd.read_parquet(file)
        assert list(table.columns) == ["prompt", "completion", "score", "kl", "advantage"]
        assert table["completion"].tolist() == texts(completions)
        assert table["score"].tolist() == pytest.approx(scores)
        assert [[m["content"] for m in p] for p in table["prompt"]] == [[m["content"] for m in p] for p in prompts]


def test_loading_a_checkpoint_restores_prefix_and_value_head(build):
    trained = build(folder="trained", max_steps=2, learning_rate=1e-2, save_strategy="steps", save_steps=2)
    trained.train()
    fresh = build(folder="fresh")
    assert not torch.equal(prefix_of(fresh), prefix_of(trained))
    fresh._load_from_checkpoint(str(Path(trained.args.output_dir) / "checkpoint-2"))
    assert torch.equal(prefix_of(fresh), prefix_of(trained))
    for name, value in trained.policy.value_head.state_dict().items():
        assert torch.equal(fresh.policy.value_head.state_dict()[name], value), name
    assert soft_prefix(fresh.policy.model).requires_grad
    # The reference stays the hard prompt.
    with hard_prompt_active(fresh.policy.model):
        assert fresh.policy.model.active_adapter == HARD
    hard = fresh.policy.model.prompt_encoder[HARD].embedding.weight
    assert torch.equal(hard, trained.policy.model.prompt_encoder[HARD].embedding.weight)
    assert not torch.equal(hard, prefix_of(fresh))


def test_a_resumed_run_ends_in_the_same_bytes(build):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "num_mini_batches": 2, "contexts": range(20)}
    whole = build(folder="whole", **settings)
    whole.train()
    again = build(folder="again", **settings)
    again.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-2"))
    assert again.state.global_step == 4
    assert torch.equal(prefix_of(again), prefix_of(whole))
    for name, value in whole.policy.value_head.state_dict().items():
        assert torch.equal(again.policy.value_head.state_dict()[name], value), name


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
    ],
)
def test_over_optimisation_by_hand(rewards, judges, expected):
    lines = [
        {"step": 10 * i, "eval_reward_difference": r, "eval_judge_difference": j}
        for i, (r, j) in enumerate(zip(rewards, judges, strict=True))
    ]
    found = over_optimised(lines)
    assert found == (expected and tuple(HARD_PROMPT_EVALUATION if i == "hard" else lines[i] for i in expected))
    # Between the evaluations lie the lines of the training, and at its end a summary.
    history = [line for e in lines for line in ({"loss": 9.0, "step": e["step"]}, e)] + [{"train_loss": 1.0}]
    assert over_optimised(history) == found


def test_no_judge_no_over_optimisation():
    assert over_optimised([{"step": s, "eval_reward_difference": float(s)} for s in range(3)]) is None


@pytest.fixture
def warnings_of():
    """What is logged from h2s as a warning, wherever a run has turned the logger's propagation."""
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("h2s").addHandler(handler)
    yield lines
    logging.getLogger("h2s").removeHandler(handler)


def train_and_watch(trainer):
    """The metrics that each evaluation returns."""
    evaluate, returned = trainer.evaluate, []
    trainer.evaluate = lambda *args, **kwargs: returned.append(evaluate(*args, **kwargs)) or returned[-1]
    trainer.train()
    return returned


EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "learning_rate": 1e-2}
KEPT_ALL = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}


def test_over_optimisation_is_said_and_the_judges_favourite_kept(build, warnings_of):
    judge = Course([0.5, 2.0, 1.0, -1.0])
    trainer = build(Course([1.0, 2.0, 3.0, 4.0]), judge=judge, max_steps=4, **EVERY_STEP, **KEPT_ALL)
    returned = train_and_watch(trainer)
    assert [m["eval_over_optimised"] for m in returned] == [0, 0, 1, 1]
    start = "over-optimisation: since step 2 the reward rose from +2.000 to "
    assert warnings_of == [
        start + "+3.000 and the judge fell from +2.000 [+2.000, +2.000] to +1.000 [+1.000, +1.000];"
        " the adapter of step 2 is kept",
        start + "+4.000 and the judge fell from +2.000 [+2.000, +2.000] to -1.000 [-1.000, -1.000];"
        " the adapter of step 2 is kept",
    ]
    root = Path(trainer.args.output_dir)
    saved = {n: saved_prefix(root / f"checkpoint-{n}") for n in range(1, 5)}
    assert [n for n, p in saved.items() if torch.equal(p, saved_prefix(root))] == [2]


def test_over_optimisation_happens(build, warnings_of):
    """Nothing stubbed: PPO raises what the judge dislikes."""
    trainer = build(
        not_ascii,
        judge=lambda prompts, completions: [-score for score in not_ascii(prompts, completions)],
        max_steps=16,
        per_device_train_batch_size=16,
        contexts=[1] * 16,
        max_completion_length=4,
        learning_rate=1e-1,
        kl_coef=0.0,
        missing_eos_penalty=0.0,
        eval_strategy="steps",
        eval_steps=4,
        **KEPT_ALL | {"save_steps": 4},
    )
    trainer.eval_dataset = trainer.train_dataset  # what is learnt on one context does not carry over to others here
    returned = train_and_watch(trainer)
    rewards = logged(trainer, "eval_reward_difference")
    assert logged(trainer, "eval_judge_difference") == pytest.approx([-r for r in rewards])
    assert rewards[-1] > min(rewards) + 0.05, rewards
    assert returned[-1]["eval_over_optimised"] == 1
    best = 4 * (1 + rewards.index(min(rewards)))
    assert warnings_of and f"the adapter of step {best} is kept" in warnings_of[-1]
    root = Path(trainer.args.output_dir)
    assert torch.equal(saved_prefix(root), saved_prefix(root / f"checkpoint-{best}"))
    assert not torch.equal(saved_prefix(root), saved_prefix(root / "checkpoint-16"))


@pytest.mark.parametrize("judge", [None, [0.5, 1.0, 2.0]])
def test_a_run_that_goes_well_says_nothing(build, warnings_of, judge):
    trainer = build(Course([1.0, 2.0, 3.0]), judge=judge and Course(judge), max_steps=3, **EVERY_STEP)
    returned = train_and_watch(trainer)
    assert warnings_of == []
    assert [m.get("eval_over_optimised") for m in returned] == [None if judge is None else 0] * 3


def test_over_optimisation_is_in_the_history(build):
    """TensorBoard and trainer_state.json show what is logged, nothing else."""
    trainer = build(Course([1.0, 2.0]), judge=Course([2.0, 1.0]), max_steps=2, **EVERY_STEP)
    trainer.train()
    assert logged(trainer, "eval_over_optimised") == [0, 1]


def test_the_adapter_that_is_said_to_be_kept_is(build, warnings_of):
    """The judge liked the starting prefix best; it is no candidate."""
    settings = {"max_steps": 2, "eval_on_start": True, **EVERY_STEP, **KEPT_ALL}
    trainer = build(Course([0.0, 1.0, 2.0]), judge=Course([0.0, -1.0, -2.0]), **settings)
    trainer.train()
    root = Path(trainer.args.output_dir)
    assert torch.equal(saved_prefix(root), saved_prefix(root / "checkpoint-1"))
    assert "the adapter of step 1 is kept" in warnings_of[-1]


def test_the_adapter_that_is_said_to_be_kept_is_the_best_by_what_was_asked_for(build, warnings_of):
    settings = {"max_steps": 2, "metric_for_best_model": "kl", **EVERY_STEP, **KEPT_ALL}
    trainer = build(Course([1.0, 2.0]), judge=Course([-1.0, -2.0]), **settings)
    trainer.train()
    root = Path(trainer.args.output_dir)
    kls = logged(trainer, "eval_kl")
    best = 1 + kls.index(max(kls))
    assert torch.equal(saved_prefix(root), saved_prefix(root / f"checkpoint-{best}"))
    assert f"the adapter of step {best} is kept" in warnings_of[-1] and len(warnings_of) == 2


# Settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gradient_checkpointing": True}, "gradient_checkpointing"),
        ({"fp16": True}, "fp16"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
        ({"ratio_norm": "sum"}, "ratio_norm must be none or mean"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"cliprange": 0}, "cliprange must be between 0 and 1"),
        ({"num_ppo_epochs": 0}, "num_ppo_epochs must be at least 1"),
        ({"num_mini_batches": BATCH + 1}, "more than the 6 contexts"),
    ],
)
def test_settings_that_are_refused(build, settings, words):
    with pytest.raises(InputError, match=words):
        build(**settings)


def test_fewer_contexts_than_an_iteration_takes(build):
    with pytest.raises(InputError, match="5 contexts train, fewer than the 6 of one iteration"):
        build(contexts=range(5))


@pytest.mark.parametrize(
    ("name", "judge"),
    [("reward_diference", None), ("judge_diference", varied), ("judge_win", None), ("loss", varied), (None, None)],
)
def test_what_no_evaluation_measures_cannot_select(build, name, judge):
    with pytest.raises(InputError) as refusal:
        build(eval_strategy="steps", metric_for_best_model=name, judge=judge)
    line = str(refusal.value)
    assert line.startswith("metric_for_best_model must be one of ") and f", got {name}" in line and "\n" not in line
    assert " reward_difference, " in line and " kl, " in line
    assert (" judge_difference, " in line) == (judge is not None) == ("judge_adapter" not in line)


@pytest.mark.parametrize("judge", [None, varied])
def test_what_can_select_is_what_an_evaluation_measures(build, judge):
    """With and without `eval_`; what is said besides, whether it is over-optimised, selects nothing."""
    trainer = build(judge=judge)
    metrics = {name.removeprefix("eval_") for name in trainer.evaluate()} - {"over_optimised"}
    assert set(measured_by(trainer.judges)) == metrics
    for name in ("soft_tokens", "eval_reward_win", "judge_win" if judge else "reward_tie"):
        build(eval_strategy="steps", metric_for_best_model=name, judge=judge)


def test_a_run_without_evaluations_may_name_anything(build):
    trainer = build(metric_for_best_model="loss", max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


def test_value_head_learns_which_contexts_are_hard(build):
    """All rewards lie far from 0, and the context alone decides how far: within 12 iterations the head has found it."""
    trainer = build(
        reward=lambda prompts, completions: [-30.0 + 2 * (len(p[-1]["content"]) % 2) for p in prompts],
        learning_rate=0.0,
        max_steps=12,
        value_learning_rate=1e-2,
        missing_eos_penalty=0.0,
    )
    trainer.train()
    found = [line["val/explained_variance"] for line in trainer.state.log_history if "val/explained_variance" in line]
    assert sum(found[-4:]) / 4 > 0.5, found
