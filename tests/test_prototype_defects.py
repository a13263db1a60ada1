"""One test a defect of the prototype, named after it: each fails if the defect comes back."""

import ast
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import HARD_PROMPT, ROOT, sample_context
from transformers import set_seed

from h2s.data.messages import conversation_id
from h2s.data.splits import split_by_conversation
from h2s.models import load_base_model, load_tokenizer
from h2s.ppo.config import SingleStepPPOConfig
from h2s.ppo.policy import PolicyWithValueHead
from h2s.ppo.trainer import SingleStepPPOTrainer
from h2s.prefix.adapter import add_hard_prompt, prefix_from_hard_prompt, soft_prefix
from h2s.prefix.chat_template import chat_prefix, encode_prompts, wrap_chat_template
from h2s.prefix.generation import Batch, Sampling, completion_logps, decode, generate, stop_token_ids
from h2s.report.intervals import mean_interval
from h2s.reward.model import RewardModel, build_reward_model, encode_pair
from h2s.run.arguments import CompareModelArguments, PolicyModelArguments

PAD, BATCH = 0, 4


def spelled(prompts, completions):
    return [sum(map(ord, message["content"])) % 7 for (message,) in completions]


@pytest.fixture
def build(gemma_folder, tmp_path):
    """A trainer on a tiny policy and eight contexts, all that is optional switched off."""

    def make(reward=spelled, folder="run", callbacks=None, **settings):
        tokenizer = load_tokenizer(str(gemma_folder))
        prefix = chat_prefix(tokenizer, HARD_PROMPT)
        wrap_chat_template(tokenizer, prefix)
        args = SingleStepPPOConfig(
            output_dir=str(tmp_path / folder),
            **{
                "max_steps": 2,
                "per_device_train_batch_size": BATCH,
                "max_completion_length": 4,
                "eval_strategy": "no",
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "value_warmup_batches": 0,
            }
            | settings,
        )
        set_seed(args.seed)
        model = prefix_from_hard_prompt(load_base_model(str(gemma_folder), dtype="float32"), prefix.token_ids)
        add_hard_prompt(model, prefix.token_ids)
        contexts = [sample_context(i) for i in range(8)]
        rows = zip(contexts, encode_prompts(tokenizer, prefix, contexts), strict=True)
        data = Dataset.from_list(
            [{"prompt": c, "prompt_ids": ids, "conversation": conversation_id(c)} for c, ids in rows]
        )
        return SingleStepPPOTrainer(
            model=PolicyWithValueHead(model, args.temperature),
            args=args,
            train_dataset=data,
            eval_dataset=data.select(range(3)),
            processing_class=tokenizer,
            prefix=prefix,
            reward=reward,
            callbacks=callbacks,
        )

    return make


def roll_out(trainer, rows=range(BATCH)):
    chosen = trainer.train_dataset[list(rows)]
    return trainer._roll_out({"prompt": chosen["prompt"], "prompt_ids": chosen["prompt_ids"]})


def make_batch(prompts, completions):
    return Batch.from_rows(prompts, completions, PAD, torch.device("cpu"))


# Sampling


def test_greedy_argmax_instead_of_sampling(build):
    """One context, many draws: many replies."""
    trainer = build()
    torch.manual_seed(0)
    prompts = [trainer.train_dataset["prompt_ids"][0]] * 30
    assert len({tuple(c) for c in trainer._sample(prompts)}) > 10


def test_temperature_that_only_scoring_used(policy_parts, prompts):
    """A low temperature makes replies alike, and scoring uses the same."""
    model, _, _ = policy_parts
    spread = {}
    for temperature in (0.05, 1.0):
        torch.manual_seed(0)
        completions = generate(model, prompts[:1] * 30, Sampling(2, temperature), [1, 5], PAD)
        spread[temperature] = len({tuple(c) for c in completions})
    assert spread[0.05] <= 3 < 10 < spread[1.0]


def test_scoring_uses_the_temperature_of_sampling(build):
    trainer = build(temperature=0.5)
    assert trainer.sampling.temperature == 0.5
    rollout_ = roll_out(trainer)
    with torch.no_grad():
        expected = completion_logps(trainer.policy.model, rollout_.batch, 0.5)[0]
        other = completion_logps(trainer.policy.model, rollout_.batch, 1.0)[0]
    torch.testing.assert_close(rollout_.old_logps, expected, rtol=0, atol=1e-4)
    assert (expected - other).abs().max() > 0.1


def test_no_kv_cache(policy_parts, prompts):
    """While generating, the model is fed one token at a time after the prompt."""
    model, _, _ = policy_parts
    widths = []
    hook = (
        model.get_base_model()
        .get_decoder()
        .register_forward_pre_hook(
            lambda module, args, kwargs: widths.append((kwargs.get("input_ids", args[0] if args else None)).shape[1]),
            with_kwargs=True,
        )
    )
    try:
        generate(model, prompts[:1], Sampling(5, temperature=0), [], PAD)
    finally:
        hook.remove()
    assert widths == [len(prompts[0]), 1, 1, 1, 1]


# Log-probabilities


def test_logits_gathered_one_position_late(policy_parts, prompts):
    """A token's log-probability does not depend on the token itself being read."""
    model, _, _ = policy_parts
    with torch.no_grad():
        first = completion_logps(model, make_batch(prompts[:1], [[50, 60]]))[0]
        logits = model(torch.tensor([prompts[0]])).logits[0, -1]
    assert first[0, len(prompts[0])].item() == pytest.approx(logits.log_softmax(-1)[50].item(), abs=1e-4)


def test_padding_between_prompt_and_response(policy_parts, prompts):
    """A short prompt beside a long one: the same log-probabilities, and no column of padding in the middle."""
    model, _, _ = policy_parts
    short, long = sorted(prompts, key=len)[0], sorted(prompts, key=len)[-1] * 2
    batch = make_batch([short, long], [[50, 60, 70], [50]])
    with torch.no_grad():
        together = completion_logps(model, batch)[0][0, len(short) : len(short) + 3]
        alone = completion_logps(model, make_batch([short], [[50, 60, 70]]))[0][0, len(short) :]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    assert batch.input_ids[0, : len(short) + 3].tolist() == [*short, 50, 60, 70]


def test_responses_decoded_and_tokenised_again(build, monkeypatch):
    """What is scored is what was sampled: token ids that do not survive decoding stay."""
    trainer = build()
    tokenizer = trainer.processing_class
    broken = [200, 130, 3, 5]  # lone bytes, a special token, the end of a turn
    assert tokenizer(decode(tokenizer, broken, [5]), add_special_tokens=False).input_ids != broken[:-1]
    monkeypatch.setattr("h2s.ppo.trainer.generate", lambda model, prompts, *rest: [broken for _ in prompts])
    rollout_ = roll_out(trainer)
    for ids, mask in zip(rollout_.batch.input_ids, rollout_.batch.completion_mask, strict=True):
        assert ids[mask].tolist() == broken


def test_special_tokens_dropped(policy_parts, prompts):
    """The stop token is part of the action and is scored."""
    model, _, _ = policy_parts
    stops = list(range(320))
    (completion,) = generate(model, prompts[:1], Sampling(4), stops, PAD)
    assert len(completion) == 1
    batch = make_batch(prompts[:1], [completion])
    with torch.no_grad():
        assert completion_logps(model, batch)[0][batch.completion_mask].abs().sum() > 0


def test_padding_scored(build):
    trainer = build(max_completion_length=8)
    trainer.stop_ids = list(range(0, 320, 3))
    rollout_ = roll_out(trainer)
    padding = rollout_.batch.attention_mask == 0
    assert padding.any() and not rollout_.old_logps[padding].any()
    assert not rollout_.batch.completion_mask[padding].any()


def test_value_read_at_a_pad_position(build):
    """Beside a much longer prompt, a short prompt has the value that it has alone."""
    trainer = build()
    torch.nn.init.normal_(trainer.policy.value_head.out.weight)
    prompts = sorted(trainer.train_dataset["prompt_ids"], key=len)
    short, long = prompts[0], prompts[-1] * 2

    def values(*rows):
        b = make_batch(rows, [[50]] * len(rows))
        with torch.no_grad():
            return trainer.policy(b.input_ids, b.attention_mask, b.completion_mask)[2]

    assert values(short, long)[0].item() == pytest.approx(values(short)[0].item(), abs=1e-4)
    assert abs(values(short, long)[0] - values(short, long)[1]) > 1e-2


# The objective


def test_kl_computed_and_never_added(build):
    returns = {}
    for kl_coef in (0.0, 0.5):
        trainer = build(lambda prompts, completions: [1.0] * len(completions), folder=str(kl_coef), kl_coef=kl_coef)
        with torch.no_grad():
            soft_prefix(trainer.policy.model).add_(1.0)
        torch.manual_seed(0)
        returns[kl_coef] = roll_out(trainer).returns
    assert (returns[0.0] - returns[0.5]).abs().min() > 1e-3


def test_advantages_never_whitened(build):
    advantages = roll_out(build(lambda prompts, completions: [100.0, 200.0, 300.0, 700.0])).advantages
    assert advantages.mean().item() == pytest.approx(0, abs=1e-5)
    assert advantages.std().item() == pytest.approx(1, abs=1e-4)


def test_schedule_sized_in_samples_but_stepped_per_batch(build):
    """It reaches its end with the last iteration, however many updates and contexts an iteration has."""
    trainer = build(max_steps=3, lr_scheduler_type="linear", num_ppo_epochs=3, num_mini_batches=2, learning_rate=1e-3)
    trainer.train()
    rates = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    assert rates == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(0)


# The reward model


@pytest.fixture
def reward_model(bert_folder):
    torch.manual_seed(0)
    return RewardModel(build_reward_model(str(bert_folder), 4), load_tokenizer(str(bert_folder)), 64)


def test_bert_embeddings_applied_twice(reward_model):
    """BERT is fed token ids, never embeddings of its own making."""
    seen = []
    bert = reward_model.model.get_base_model().bert
    hook = bert.embeddings.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(kwargs), with_kwargs=True
    )
    try:
        reward_model.score([sample_context(0)], ["tea"])
    finally:
        hook.remove()
    assert len(seen) == 1
    assert seen[0].get("inputs_embeds") is None and seen[0]["input_ids"] is not None


def test_no_cls_and_sep(reward_model):
    tokenizer = reward_model.tokenizer
    ids = encode_pair(tokenizer, "walk", "tea", 20)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "walk", "[SEP]", "tea", "[SEP]"]


def test_rewards_scored_one_text_at_a_time(reward_model):
    sizes = []
    hook = reward_model.model.get_base_model().bert.embeddings.register_forward_hook(
        lambda module, args, kwargs, out: sizes.append(out.shape[0]), with_kwargs=True
    )
    try:
        reward_model.score([sample_context(i) for i in range(10)], ["tea"] * 10)
    finally:
        hook.remove()
    assert sizes == [10]


def test_trainer_asks_for_all_rewards_at_once(build):
    asked = []
    trainer = build(lambda prompts, completions: asked.append(len(completions)) or [0.5] * len(completions))
    roll_out(trainer)
    assert asked == [BATCH]


# The loop


def test_stops_at_any_token_without_a_letter(policy_parts, prompts):
    """Digits, full stops and spaces go on: only stop tokens end a reply."""
    model, tokenizer, _ = policy_parts
    stops = stop_token_ids(model, tokenizer)
    assert stops == [1, 5]
    torch.manual_seed(0)
    completions = generate(model, prompts * 5, Sampling(8), stops, PAD)
    inner = [tokenizer.decode([token]) for c in completions for token in c[:-1]]
    assert sum(not any(map(str.isalpha, text)) for text in inner) > 10


def test_batches_fixed_once(build):
    """Each epoch draws its batches anew."""
    asked = []

    def reward(prompts, completions):
        asked.append(frozenset(p[0]["content"] for p in prompts))
        return spelled(prompts, completions)

    build(reward, max_steps=8, num_ppo_epochs=1).train()
    epochs = [frozenset(asked[i : i + 2]) for i in range(0, 8, 2)]
    assert all(len(frozenset.union(*e)) == 8 for e in epochs)  # every context once an epoch
    assert len(set(epochs)) > 1


def test_pickled_checkpoints(build):
    """Adapter and value head are safetensors; only Trainer's own checkpoint internals are torch files."""
    trainer = build(save_strategy="steps", save_steps=1)
    trainer.train()
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-2"
    names = {p.name for p in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "value_head.safetensors"} <= names
    pickles = {n for n in names if n.endswith((".bin", ".pt", ".pth", ".pkl"))}
    assert pickles <= {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


def test_no_optimiser_state_and_no_resume(build):
    whole = build(folder="whole", max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=None)
    whole.train()
    again = build(folder="again", max_steps=3)
    again.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-1"))
    assert torch.equal(soft_prefix(again.policy.model), soft_prefix(whole.policy.model))


def test_eval_on_log_lines():
    """No line of the package or the recipes evaluates text."""
    for file in [*(ROOT / "h2s").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None
            assert called not in ("eval", "exec"), f"{file.name}, line {node.lineno}"


# What is reported


def test_same_reward_model_as_signal_and_judge():
    assert "judge_adapter" in PolicyModelArguments.__dataclass_fields__
    assert "judge_adapter" in CompareModelArguments.__dataclass_fields__


def test_one_random_split():
    """What is held out is decided by the conversation alone, and the same in both stages."""
    contexts = [sample_context(i) for i in range(60)]
    ids = [conversation_id(c) for c in contexts]
    first = Dataset.from_dict({"conversation": ids, "stage": ["reward"] * 60})
    second = Dataset.from_dict({"conversation": ids[::-1], "stage": ["policy"] * 60})
    parts = [split_by_conversation(d, 42, 0.2) for d in (first, second)]
    for part in ("train", "validation", "test"):
        assert set(parts[0][part]["conversation"]) == set(parts[1][part]["conversation"])
    assert not set(parts[0]["train"]["conversation"]) & set(parts[1]["test"]["conversation"])


def test_five_validation_conversations():
    """Few conversations are not hidden: the interval over five is wide, over five hundred narrow."""
    few = mean_interval([1, 1, 1, 1, -1], list("abcde"))
    many = mean_interval([1, 1, 1, 1, -1] * 100, [str(i) for i in range(500)])
    assert few[1] <= 0 < many[1]
