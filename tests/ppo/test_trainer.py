"""The call: what `SingleStepPPOTrainer` takes, what it refuses, and what it leaves behind."""

import copy
import dataclasses
import re

import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from ppo.runs import (
    BATCH,
    EVERY_STEP,
    KEEP_ALL,
    contexts_of,
    logged,
    prefix_of,
    root_of,
    saved_prefix,
    texts,
    varied,
)
from safetensors.torch import load_file
from tiny import HARD_PROMPT, ROOT, sample_context
from transformers import AutoTokenizer, TrainerCallback

import h2s
from h2s import InputError, PrefixTuningPolicyModel, SingleStepPPOConfig, SingleStepPPOTrainer, load_contexts
from h2s.models import load_tokenizer
from h2s.ppo.value_head import VALUE_HEAD_FILE
from h2s.prefix.adapter import soft_prefix

CONVERSATION = [{"role": "user", "content": "I went hiking today."}]


def asks_back(completions, **kwargs):
    return [float(completion[0]["content"].endswith("?")) for completion in completions]


def test_the_least_that_a_user_writes(gemma_folder, contexts_file, tmp_path, monkeypatch):
    """Two settings, all others by default; plain PEFT answers as the policy does."""
    monkeypatch.chdir(tmp_path)
    policy = PrefixTuningPolicyModel.from_hard_prompt(str(gemma_folder), HARD_PROMPT)
    start = soft_prefix(policy.model).detach().clone()
    trainer = SingleStepPPOTrainer(
        model=policy,
        reward_funcs=asks_back,
        args=SingleStepPPOConfig(max_steps=2, max_completion_length=8),
        train_dataset=load_contexts(str(contexts_file)),
    )
    output = trainer.train()
    assert output.global_step == 2 and trainer.policy is policy
    policy.save_pretrained("kind")
    moved = saved_prefix("kind")
    assert torch.equal(moved, soft_prefix(policy.model)) and not torch.equal(moved, start)
    (reply,) = policy.generate([CONVERSATION], max_completion_length=8, temperature=0)
    model, tokenizer = AutoPeftModelForCausalLM.from_pretrained("kind"), AutoTokenizer.from_pretrained("kind")
    ids = tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True, return_tensors="pt").input_ids
    answer = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, top_k=None, top_p=None)
    assert tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True) == reply


def test_the_example_in_its_docstring_runs(gemma_folder, tmp_path, monkeypatch):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", SingleStepPPOTrainer.__doc__, re.DOTALL)
    assert example.count('"embedded:gemma-3-270m"') == 1
    names = {name: getattr(h2s, name) for name in h2s.__all__}
    code = re.sub("^    ", "", example.replace("embedded:gemma-3-270m", str(gemma_folder)), flags=re.MULTILINE)
    assert exec(code, names) is None
    assert names["trainer"].state.global_step == 4
    assert (tmp_path / "outputs" / "ppo" / "adapter_model.safetensors").is_file()


# What it takes


def test_a_policy_may_be_given_by_its_folder(build, policy_adapter):
    """The same run, to the last bit of prefix and value head, as with the policy itself, whatever was done with it."""
    ends = []
    used = PrefixTuningPolicyModel.from_pretrained(policy_adapter)
    with used.hard_prompt_active():
        used.reply("hi", max_completion_length=2)
    models = {"string": str(policy_adapter), "path": policy_adapter, "used": used}
    models["object"] = PrefixTuningPolicyModel.from_pretrained(policy_adapter)
    for folder, model in models.items():
        trainer = build(folder=folder, model=model)
        trainer.train()
        ends.append([(root_of(trainer) / name).read_bytes() for name in ("adapter_model.safetensors", VALUE_HEAD_FILE)])
    assert all(end == ends[0] for end in ends)


def test_a_reward_may_be_given_by_its_folder(build, reward_adapter):
    """An adapter among functions, named after its folder; the judge an adapter too."""
    trainer = build([str(reward_adapter), varied], judge=reward_adapter, max_steps=1, **EVERY_STEP)
    trainer.train()
    assert trainer.rewards.names == ["reward", "varied"] and logged(trainer, "rewards/reward/std")[0] > 0
    table = trainer.compare(contexts_of(range(3)))
    given = [[{"role": "assistant", "content": text}] for text in table["soft"]]
    assert table["soft_reward"].tolist() == pytest.approx(
        [judged + other for judged, other in zip(table["soft_judge"], varied(given), strict=True)], abs=1e-5
    )


def test_prompts_may_be_text(build):
    """One user message, whatever it begins with."""
    words = ["hello", "[walk", *[f"tea {i}" for i in range(4)]]
    trainer = build(train_dataset=Dataset.from_dict({"prompt": words}), eval_dataset=None)
    assert trainer.train_dataset["prompt"][:] == [[{"role": "user", "content": text}] for text in words]
    same = build(
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in words]}),
    )
    assert trainer.train_dataset["prompt_ids"][:] == same.train_dataset["prompt_ids"][:]
    trainer.train()
    assert trainer.state.global_step == 2


def test_processing_class_may_be_the_policys_own(build, policy, gemma_folder):
    assert build(model=policy, processing_class=policy.tokenizer).processing_class is policy.tokenizer
    with pytest.raises(InputError, match="processing_class is not the policy's tokenizer: its chat template would"):
        build(processing_class=load_tokenizer(str(gemma_folder)))


def test_the_callers_settings_stay_as_they_are(build, tmp_path):
    args = SingleStepPPOConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=1,
        per_device_train_batch_size=BATCH,
        max_completion_length=4,
        report_to="none",
        save_total_limit=1,
        push_to_hub=True,
        **EVERY_STEP,
    )
    fields = [f.name for f in dataclasses.fields(args)]
    before = copy.deepcopy({name: getattr(args, name) for name in fields})
    trainer = build(args=args, judge=varied)
    trainer.pushes_at_end = False
    trainer.train()
    assert {name: getattr(args, name) for name in fields} == before
    assert trainer.args is not args and trainer.args.metric_for_best_model == "judge_difference"


def test_the_callers_data_stays_as_it_is(build):
    data = contexts_of(range(12))
    trainer = build(train_dataset=data, max_steps=1)
    trainer.train()
    assert data.column_names == ["prompt", "number"] and data["prompt"][:] == [sample_context(i) for i in range(12)]


# What it refuses


UNANSWERABLE = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
LONG = [{"role": "user", "content": "walk " * 2000}]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"train_dataset": None}, "train_dataset must be a datasets.Dataset with a column prompt, got NoneType"),
        ({"train_dataset": [{"prompt": "hi"}] * 9}, "train_dataset must be a datasets.Dataset .* got list"),
        ({"train_dataset": Dataset.from_dict({"text": ["hi"] * 9})}, r"with a column prompt, got \['text'\]"),
        ({"eval_dataset": Dataset.from_dict({"text": ["hi"] * 9})}, r"eval_dataset must be .* got \['text'\]"),
        ({"eval_dataset": ["hi"]}, "eval_dataset must be a datasets.Dataset with a column prompt, got list"),
        *(
            (
                {"train_dataset": Dataset.from_dict({"prompt": ["hi"] * 9, taken: ["x"] * 9})},
                f"train_dataset has a column {taken}, a name that rewards are handed something else by: rename it",
            )
            for taken in ("prompts", "completions", "trainer_state", "log_extra", "log_metric")
        ),
        (
            {"train_dataset": Dataset.from_dict({"prompt": [CONVERSATION] * 6 + [UNANSWERABLE]})},
            "train_dataset, context 7: the last message must be the user's",
        ),
        (
            {"eval_dataset": Dataset.from_dict({"prompt": [CONVERSATION, LONG]})},
            "context 2",
        ),
        ({"contexts": range(5)}, "5 contexts train, fewer than the 6 of one iteration"),
        ({"eval_dataset": None, "eval_strategy": "steps"}, "eval_strategy is steps, but there is no eval_dataset"),
        ({"peft_config": LoraConfig()}, "peft_config is not taken: a new prefix would be random, with no prompt"),
        ({"model": torch.nn.Linear(1, 1)}, "model must be a PrefixTuningPolicyModel or an adapter, got a Linear"),
        ({"model": "nowhere"}, "no such adapter folder: nowhere"),
        ({"reward_funcs": []}, "expected at least one reward, got an empty list"),
        ({"reward_funcs": torch.nn.Linear(1, 1)}, "a reward must be a function, a RewardModel or an adapter, got a L"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights must hold one weight a reward, got 2 for 1"),
    ],
)
def test_what_cannot_be_used_is_refused(build, given, words):
    with pytest.raises(InputError, match=words) as refusal:
        build(**given)
    assert isinstance(refusal.value, ValueError) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "judge"), [("reward_diference", None), ("judge_diference", varied), ("judge_win", None), ("loss", varied)]
)
def test_what_no_evaluation_measures_cannot_select(build, name, judge):
    with pytest.raises(InputError) as refusal:
        build(eval_strategy="steps", metric_for_best_model=name, judge=judge)
    line = str(refusal.value)
    assert line.startswith("metric_for_best_model must be one of ") and f", got {name}" in line and "\n" not in line
    assert " reward_difference, " in line and " kl, " in line
    assert (" judge_difference, " in line) == (judge is not None) == ("judge_adapter" not in line)


def test_a_run_without_evaluations_may_name_anything(build):
    trainer = build(metric_for_best_model="loss", max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


# What it leaves behind


def test_what_a_run_leaves_behind(build):
    trainer = build(**EVERY_STEP, **KEEP_ALL)
    trainer.train()
    root = root_of(trainer)
    adapter = {"adapter_config.json", "adapter_model.safetensors", "h2s.json", "README.md", VALUE_HEAD_FILE}
    adapter |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {f.name for f in root.iterdir()} == adapter | {"completions", "checkpoint-1", "checkpoint-2"}
    # Adapter and value head are safetensors; only Trainer's own checkpoint internals are torch files.
    internals = {"trainer_state.json", "began_with.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert {f.name for f in (root / "checkpoint-2").iterdir()} == adapter | internals
    # The frozen hard prompt is not saved, and the base is not.
    assert list(load_file(root / "adapter_model.safetensors")) == ["prompt_embeddings"]


def test_completions_are_readable(build):
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.append((prompts, completions, varied(completions)))
        return varied(completions)

    trainer = build(reward, value_warmup_batches=0)
    trainer.train()
    files = sorted((root_of(trainer) / "completions").iterdir())
    assert [f.name for f in files] == ["step-000001.parquet", "step-000002.parquet"]
    for file, (prompts, completions, scores) in zip(files, seen, strict=True):
        table = pd.read_parquet(file)
        assert list(table.columns) == ["prompt", "completion", "score", "kl", "advantage", "rewards/reward"]
        assert table["completion"].tolist() == texts(completions)
        assert table["score"].tolist() == pytest.approx(scores) == table["rewards/reward"].tolist()
        assert [[m["content"] for m in p] for p in table["prompt"]] == [[m["content"] for m in p] for p in prompts]


def test_a_callback_of_the_users_is_called(build):
    class Watch(TrainerCallback):
        def __init__(self):
            self.logs = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.logs.append(logs)

    watch = Watch()
    trainer = build(callbacks=[watch])
    trainer.train()
    assert [line["reward"] for line in watch.logs if "reward" in line] == logged(trainer, "reward")


def test_the_policy_may_be_trained_again(build):
    """By another trainer: its reference is still the hard prompt, its start what the first one kept."""
    first = build(folder="first")
    first.train()
    second = build(folder="second", model=first.policy, max_steps=1)
    start = prefix_of(second)
    assert torch.equal(start, prefix_of(first))
    second.train()
    assert not torch.equal(prefix_of(second), start) and abs(logged(second, "kl")[0]) > 1e-4
