"""The encoder of a reward model: which one, how much room, what is trained."""

import copy

import pytest
import torch
from peft import PrefixTuningConfig, TaskType
from tiny import build_reward_model

from h2s.errors import InputError
from h2s.models import load_config, load_tokenizer
from h2s.prefix.adapter import soft_prefix
from h2s.reward.encoder import add_reward_prefix, check_encoder, load_encoder, max_text_tokens, open_encoder

VIRTUAL = 4
LIMIT = 64


def test_room_beside_the_prefix(bert_folder, bert_tokenizer):
    config = load_config(str(bert_folder))  # 128 positions
    for limit in (None, 108):
        assert max_text_tokens(config, bert_tokenizer, 20, limit) == 108
        source, tokenizer, room = open_encoder(str(bert_folder), 20, limit)
        assert (source, tokenizer.get_vocab(), room) == (str(bert_folder), bert_tokenizer.get_vocab(), 108)
    for limit in (109, 4, 0):
        for call in (
            lambda limit=limit: max_text_tokens(config, bert_tokenizer, 20, limit),
            lambda limit=limit: open_encoder(str(bert_folder), 20, limit),
        ):
            with pytest.raises(InputError, match=rf"max_tokens must lie between 5 and 108 .*got {limit}$"):
                call()


def test_full_length_text_runs(loud):
    """The positions of prefix and text together are just enough."""
    score = loud.score(["walk " * 300], ["tea " * 20])
    assert score.isfinite().all() and loud.cuts == {"context": 1, "response": 0}


def test_reward_model_must_be_a_bert(gemma_folder, bert_folder):
    check_encoder(load_config(str(bert_folder)), load_tokenizer(str(bert_folder)), "it")
    with pytest.raises(InputError, match="it is a gemma3_text model: the reward model must be a BERT"):
        check_encoder(load_config(str(gemma_folder)), load_tokenizer(str(gemma_folder)), "it")
    with pytest.raises(InputError, match="tiny-gemma is a gemma3_text model"):
        open_encoder(str(gemma_folder), 4)
    with pytest.raises(InputError, match="no sequence classification model can be loaded from no/such"):
        load_encoder("no/such")


def test_the_prefix_begins_small(bert_folder):
    """PEFT draws it from N(0, 1); a tenth of that leaves the encoder nearly as it was."""
    prefix = soft_prefix(build_reward_model(bert_folder, 100).model)
    assert prefix.std().item() == pytest.approx(0.1, rel=0.05)


def test_the_callers_configuration_is_left_as_it_was(bert_folder):
    """It makes several models: the judge's, each fold's."""
    config = PrefixTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=3)
    before = copy.deepcopy(config.to_dict())
    for _ in range(2):
        model = add_reward_prefix(load_encoder(str(bert_folder)), config)
        assert soft_prefix(model).shape[0] == 3
    assert config.to_dict() == before


@torch.no_grad()
def test_the_last_layer_begins_by_looking_at_all_tokens_alike(bert_folder, bert_tokenizer):
    """[CLS] of the last layer against the mean of its values over prefix and text, computed from the layer's input."""
    model = build_reward_model(bert_folder, VIRTUAL).model
    attention = model.get_base_model().bert.encoder.layer[-1].attention.self
    seen = {}
    attention.value.register_forward_hook(lambda module, inputs, output: seen.update(values=output))
    attention.register_forward_hook(lambda module, inputs, output: seen.update(mixed=output[0]))
    model(**bert_tokenizer("walk tea", "rain work", return_tensors="pt"))
    prefix = soft_prefix(model).view(VIRTUAL, -1, 2, attention.all_head_size)[:, -1, 1]  # the last layer's values
    expected = torch.cat([prefix, seen["values"][0]]).mean(0)
    torch.testing.assert_close(seen["mixed"][0, 0], expected)
