from dataclasses import replace

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from tiny import HARD_PROMPT, WINDOW
from transformers import AutoTokenizer, GenerationConfig

from h2s import PrefixTuningPolicyModel
from h2s.prefix.adapter import soft_prefix
from h2s.prefix.card import describe


def test_what_it_is_and_how_to_use_it(policy):
    """The whole prompt is quoted, an empty line too; the conversation begins as the adapter's do."""
    prefix = replace(policy.prefix, hard_prompt="Be kind.\n\nAsk.", token_ids=[1, 2, 3], question_prefix="Q: ")
    about, use = describe(prefix, "'here'", policy.model.generation_config)
    assert about.startswith(
        "A soft prefix of 3 virtual tokens. It began as this hard prompt:\n\n> Be kind.\n> \n> Ask.\n\n"
        "Its chat template puts 'Q: ' in front of the question that the assistant begins with.\n\nGive `generate` the "
    )
    assert "`past_key_values=model.get_prompt(1)`" in about and "with 3 ids of any token in" in about
    assert use.count("from_pretrained('here')") == 2 and 'chat([{"role": "user"' in use


def test_what_its_base_generates_with_and_peft_cannot(policy):
    config = GenerationConfig(cache_implementation="static", use_cache=False, repetition_penalty=1.5)
    about, use = describe(policy.prefix, "'here'", config)
    assert "Its base generates with use_cache and cache_implementation set, which PEFT cannot" in about
    set_ = "model.generation_config.use_cache = True\nmodel.generation_config.cache_implementation = None\ntokenizer ="
    assert set_ in use and "repetition" not in use
    assert "generation_config" not in describe(policy.prefix, "'here'", GenerationConfig())[1]


@pytest.mark.parametrize("sentences", [1, 6], ids=["short", "beyond the window"])
def test_a_cache_over_turns_as_the_card_says(gemma_folder, tmp_path, sentences):
    """By plain PEFT: each turn's logits and tokens as without the last turn's cache, with a prefix that has moved."""
    policy = PrefixTuningPolicyModel.from_hard_prompt(str(gemma_folder), HARD_PROMPT * sentences, dtype="float32")
    torch.manual_seed(0)
    with torch.no_grad():
        soft_prefix(policy.model).add_(0.1 * torch.randn(soft_prefix(policy.model).shape))
    policy.save_pretrained(tmp_path)
    model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    length = model.active_peft_config.num_virtual_tokens
    assert (length > WINDOW) == (sentences > 1)
    settings = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}

    def answered(by, ids, **more):
        return by.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings, **more)

    cache, so_far = model.get_prompt(1), torch.zeros(1, 0, dtype=torch.long)
    for turn in ("hi", "a longer turn, " * 6, "ok"):
        text = f"{turn}<end_of_turn>\n<start_of_turn>model\n"
        ids = torch.cat([so_far, tokenizer(text, return_tensors="pt").input_ids], dim=1)
        whole = answered(model, ids)
        kept = answered(
            model.get_base_model(), torch.cat([torch.zeros(1, length).long(), ids], 1), past_key_values=cache
        )
        difference = (kept.logits[0] - whole.logits[0]).abs().max() / whole.logits[0].abs().max()
        assert difference < 1e-5 and torch.equal(kept.sequences[:, length:], whole.sequences)
        cache, so_far = kept.past_key_values, whole.sequences
