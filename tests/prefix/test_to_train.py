"""A policy as trainers take it."""

from dataclasses import replace

import pytest
import torch
from tiny import HARD_PROMPT

from h2s import InputError
from h2s.models import load_tokenizer
from h2s.prefix.to_train import began_as, policy_to_train

CPU = torch.device("cpu")


def test_a_policy_or_its_adapter(policy, policy_adapter):
    assert policy_to_train(policy, policy.tokenizer, None, CPU) is policy
    assert policy_to_train(policy_adapter, None, None, CPU).prefix.hard_prompt == HARD_PROMPT


def test_what_is_none_is_refused(policy, gemma_folder):
    for given, words in (
        (
            (policy.model, None, None),
            "model must be a PrefixTuningPolicyModel or an adapter, got a PeftModel",
        ),
        ((policy, load_tokenizer(str(gemma_folder)), None), "processing_class is not the policy's tokenizer"),
        ((policy, None, "any"), "peft_config is not taken: a new prefix would be random"),
    ):
        with pytest.raises(InputError, match=words):
            policy_to_train(*given, CPU)


def test_what_a_resumed_run_must_find_again(policy):
    began = began_as(policy)
    assert began["model"] == policy.model.peft_config["default"].base_model_name_or_path.split("/")[-1]
    assert began["hard_prompt"] == [HARD_PROMPT]
    policy.prefix = replace(policy.prefix, seen=["0123456789abcdef"])
    other = began_as(policy)
    assert [name for name in began if began[name] != other[name]] == ["list of seen conversations"]
