"""The prototype's defects, and what fails if one comes back: the tests of this file, and those that the table names."""

import ast
import importlib.util
import inspect

import pytest
from tiny import ROOT, build_reward_model, sample_context

from h2s.prefix.generation import Sampling, generate

DEFECTS = {
    # Sampling
    "greedy argmax instead of sampling": [
        "prefix/test_generation.py::test_sampling_draws_from_the_whole_distribution",
        "ppo/test_updates.py::test_one_context_has_many_replies",
    ],
    "a temperature that only scoring used": [
        "prefix/test_generation.py::test_sampling_draws_from_the_whole_distribution",
        "ppo/test_updates.py::test_scoring_uses_the_temperature_of_sampling",
    ],
    "no KV cache": ["test_prototype_defects.py::test_one_token_at_a_time_is_fed"],
    "an end at any token without a letter": [
        "prefix/test_generation.py::test_stop_tokens",
        "prefix/test_generation.py::test_completions_end_at_the_first_stop_token",
    ],
    # Log-probabilities
    "logits gathered one position late": [
        "prefix/test_generation.py::test_logps_equal_those_of_the_hard_prompt_as_text",
        "prefix/test_policy_module.py::test_forward_is_the_plain_models_own",
    ],
    "padding between prompt and response": [
        "prefix/test_generation.py::test_from_rows_by_hand",
        "prefix/test_generation.py::test_logps_equal_those_of_the_hard_prompt_as_text",
    ],
    "responses decoded and tokenised again": ["ppo/test_updates.py::test_what_is_scored_is_what_was_sampled"],
    "special tokens dropped from what is scored": [
        "prefix/test_policy_module.py::test_forward_is_the_plain_models_own"
    ],
    "padding scored": [
        "ppo/test_updates.py::test_padding_is_not_scored",
        "ppo/test_loss.py::test_whole_response_is_one_action",
    ],
    "the value read at a pad position": ["ppo/test_rollout.py::test_each_row_is_scored_as_alone"],
    # The objective
    "a KL computed and never added": [
        "ppo/test_updates.py::test_returns_are_score_minus_kl_minus_penalty",
        "ppo/test_updates.py::test_a_large_kl_coefficient_holds_the_prefix_back",
    ],
    "advantages never whitened": ["ppo/test_updates.py::test_advantages_are_whitened"],
    "a schedule in samples, stepped per batch": ["ppo/test_updates.py::test_one_trainer_step_is_one_iteration"],
    # The reward model
    "BERT's embeddings applied twice": [
        "reward/test_model.py::test_batched_scores_equal_unpadded_ones_in_order",
        "reward/test_model.py::test_plain_peft_scores_the_same",
    ],
    "no [CLS] and [SEP]": [
        "reward/test_pairs.py::test_layout_of_a_pair",
        "reward/test_pairs.py::test_layout_is_berts_own",
    ],
    "rewards scored one text at a time": [
        "test_prototype_defects.py::test_texts_are_scored_together",
        "ppo/test_updates.py::test_the_reward_is_asked_for_the_whole_batch_at_once",
    ],
    # The loop
    "batches fixed once": ["ppo/test_updates.py::test_each_epoch_draws_its_batches_anew"],
    "pickled checkpoints": ["ppo/test_trainer.py::test_what_a_run_leaves_behind"],
    "no optimiser state and no resume": ["ppo/test_resume.py::test_a_resumed_run_ends_in_the_same_bytes"],
    "eval on log lines": ["test_prototype_defects.py::test_no_text_is_evaluated"],
    # What is reported
    "one reward model as signal and judge": [
        "reward/test_functions.py::test_scorers_by_name",
        "ppo/test_evaluation.py::test_what_selects_does_select",
    ],
    "rows of one conversation on both sides of a split": [
        "data/test_splits.py::test_split_is_deterministic_whole_and_disjoint_by_conversation",
        "data/test_splits.py::test_sheet_and_contexts_hold_out_the_same_conversations",
    ],
    "five validation conversations, and no word of it": ["report/test_intervals.py::test_intervals_cover_the_truth"],
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_defect_has_its_test(defect):
    """A function of that name that pytest runs by default."""
    for node in DEFECTS[defect]:
        file, name = node.split("::")
        spec = importlib.util.spec_from_file_location("named", ROOT / "tests" / file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        test = getattr(module, name)
        assert name.startswith("test_") and inspect.isfunction(test) and test.__module__ == "named", node
        marks = [*getattr(test, "pytestmark", []), *getattr(module, "pytestmark", [])]
        assert not {m.name for m in marks} - {"parametrize"}, f"{node} may be left out"


def test_one_token_at_a_time_is_fed(policy, prompts):
    """While generating, after the prompt."""
    widths = []
    hook = (
        policy.model.get_base_model()
        .get_decoder()
        .register_forward_pre_hook(
            lambda module, args, kwargs: widths.append((kwargs.get("input_ids", args[0] if args else None)).shape[1]),
            with_kwargs=True,
        )
    )
    try:
        generate(policy.model, policy.tokenizer, prompts[:1], Sampling(5, temperature=0), [])
    finally:
        hook.remove()
    assert widths == [len(prompts[0]), 1, 1, 1, 1, 1]


def test_texts_are_scored_together(bert_folder):
    """And BERT is fed token ids, never embeddings of its own making."""
    reward, fed = build_reward_model(bert_folder), []
    hook = reward.model.get_base_model().bert.embeddings.register_forward_hook(
        lambda module, args, kwargs, out: fed.append((out.shape[0], kwargs)), with_kwargs=True
    )
    try:
        reward.score([sample_context(i) for i in range(10)], ["tea"] * 10)
    finally:
        hook.remove()
    ((rows, given),) = fed
    assert rows == 10 and given.get("inputs_embeds") is None and given["input_ids"] is not None


def test_no_text_is_evaluated():
    """No line of the package or the recipes does."""
    for file in [*(ROOT / "h2s").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None
            assert called not in ("eval", "exec"), f"{file.name}, line {node.lineno}"
