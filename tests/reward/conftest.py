"""A BERT's tokenizer, and a reward model whose scores differ."""

import pytest
from tiny import build_reward_model

from h2s.models import load_tokenizer

VIRTUAL = 4


@pytest.fixture
def bert_tokenizer(bert_folder):
    return load_tokenizer(str(bert_folder))


@pytest.fixture
def loud(loud_bert):
    """A reward model of large weights, those of its head drawn with a seed."""
    reward = build_reward_model(loud_bert, VIRTUAL, 128 - VIRTUAL)
    for name, parameter in reward.model.named_parameters():
        if "modules_to_save" in name and name.endswith("weight"):
            parameter.data.normal_()
    return reward
