"""Contexts with their tokens, and the checks that need no weights."""

import pytest
from datasets import Dataset
from ppo.runs import contexts_of, varied
from tiny import HARD_PROMPT, sample_context
from transformers import AutoTokenizer

from h2s import InputError, PrefixTuningPolicyModel, SingleStepPPOConfig
from h2s.ppo.contexts import as_columns, check_run, encode_contexts, selection_metric
from h2s.reward.functions import RewardFunctions


@pytest.fixture
def args(tmp_path):
    return SingleStepPPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=6, eval_strategy="steps")


def test_tokens_are_what_follows_the_hard_prompt(policy, gemma_folder):
    """Of the rendering with it as system message, by the model's own tokenizer."""
    encoded = encode_contexts(contexts_of(range(4)), "train_dataset", policy, 8)
    assert encoded.column_names == ["number", "prompt", "prompt_ids"]
    assert encoded["prompt"][:] == [sample_context(i) for i in range(4)] and encoded["number"][:] == [0, 1, 2, 3]
    plain = AutoTokenizer.from_pretrained(gemma_folder)
    for context, ids in zip(encoded["prompt"], encoded["prompt_ids"], strict=True):
        whole = [{"role": "system", "content": HARD_PROMPT}, *context]
        text = plain.apply_chat_template(whole, add_generation_prompt=True, tokenize=False)
        assert policy.prefix.token_ids + ids == plain(text, add_special_tokens=False).input_ids


def test_the_question_prefix_is_for_the_model_alone(gemma_folder):
    """It is in the tokens; rewards are handed the messages, as the file has them."""
    context = [{"role": "assistant", "content": "how?"}, {"role": "user", "content": "good"}]
    rows, tokenizer = Dataset.from_dict({"prompt": [context]}), AutoTokenizer.from_pretrained(gemma_folder)
    policy = PrefixTuningPolicyModel.from_hard_prompt(str(gemma_folder), HARD_PROMPT, "start", question_prefix="Q: ")
    encoded = encode_contexts(rows, "train_dataset", policy, 8)
    assert encoded["prompt"][:] == [context]
    assert tokenizer.decode(encoded["prompt_ids"][0]).startswith("Q: how?<end_of_turn>")


def test_tokens_that_are_there_already_are_made_anew(policy):
    once = encode_contexts(contexts_of(range(3)), "train_dataset", policy, 8)
    stale = once.remove_columns("prompt_ids").add_column("prompt_ids", [[1], [2], [3]])
    assert encode_contexts(stale, "train_dataset", policy, 8)["prompt_ids"][:] == once["prompt_ids"][:]


def test_a_context_leaves_room_for_the_completion(policy):
    """1024 positions hold prefix, context and completion, and not one token more."""
    context = Dataset.from_dict({"prompt": ["walk"]})
    used = len(policy.prefix.token_ids) + len(encode_contexts(context, "train_dataset", policy, 1)["prompt_ids"][0])
    encode_contexts(context, "train_dataset", policy, 1024 - used)
    with pytest.raises(InputError, match="context 1"):
        encode_contexts(context, "train_dataset", policy, 1024 - used + 1)


def test_a_batch_is_its_columns():
    rows = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]
    assert as_columns(rows) == {"prompt": ["a", "b"], "n": [1, 2]}


@pytest.mark.parametrize(
    ("processes", "words"),
    [(1, None), (2, None), (3, "16 contexts train, fewer than the 18 of one iteration: lower per_device_train_batch")],
)
def test_contexts_fill_an_iteration_of_all_processes(args, monkeypatch, processes, words):
    monkeypatch.setattr(SingleStepPPOConfig, "world_size", processes)
    scorers = {"reward": RewardFunctions(varied)}
    if words is None:
        return check_run(args, contexts_of(range(16)), contexts_of(range(3)), scorers)
    with pytest.raises(InputError, match=words):
        check_run(args, contexts_of(range(16)), contexts_of(range(3)), scorers)


def test_one_process_sees_one_card(args, monkeypatch):
    """Trainer would split a batch over them by DataParallel."""
    monkeypatch.setattr(SingleStepPPOConfig, "n_gpu", 2)
    with pytest.raises(InputError, match="one process sees 2 CUDA devices: start it with accelerate launch, or show"):
        check_run(args, contexts_of(range(16)), contexts_of(range(3)), {"reward": RewardFunctions(varied)})


@pytest.mark.parametrize(
    ("asked", "scorers", "metric"),
    [
        (None, ["reward"], "reward_difference"),
        (None, ["reward", "judge"], "judge_difference"),
        ("kl", ["reward", "judge"], "kl"),
    ],
)
def test_what_selects(args, asked, scorers, metric):
    args.metric_for_best_model = asked
    assert selection_metric(args, scorers) == metric
