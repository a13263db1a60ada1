"""What DPO is given to learn, and its implicit reward beside plain transformers and plain PEFT."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from tiny import HARD_PROMPT, sample_context
from transformers import AutoModelForCausalLM, AutoTokenizer

from h2s import InputError, PrefixDPOConfig
from h2s.dpo.pairs import ImplicitReward, as_trl_has_it, check_run
from h2s.prefix.adapter import soft_prefix


def logp(model, tokenizer, messages, reply) -> float:
    """Of one reply, alone, unpadded, in float64: the sum over its tokens, what ends its turn included."""
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True).input_ids
    whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": reply}]).input_ids
    assert whole[: len(prompt)] == prompt
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0, -len(whole) :]
    said = logits.double().log_softmax(-1)[range(len(whole) - 1), whole[1:]]
    return said[len(prompt) - 1 :].sum().item()


def test_the_implicit_reward_is_that_of_the_prompt_as_text_and_of_plain_peft(policy, gemma_folder, tmp_path):
    with torch.no_grad():
        soft_prefix(policy.model).add_(0.3 * torch.randn_like(soft_prefix(policy.model)))
    policy.save_pretrained(tmp_path)
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(gemma_folder, dtype=torch.float32).eval()
    tokenizer, stock = (AutoTokenizer.from_pretrained(f) for f in (tmp_path, gemma_folder))
    contexts = [sample_context(i) for i in range(5)]
    replies = ["yes.", "how was the walk?", "i like the tea. and you?", "no", "x" * 30]
    system = {"role": "system", "content": HARD_PROMPT}
    expected = [
        0.25 * (logp(plain, tokenizer, context, reply) - logp(base, stock, [system, *context], reply))
        for context, reply in zip(contexts, replies, strict=True)
    ]
    scores = ImplicitReward(policy, beta=0.25, batch_size=2).score(contexts, replies)
    assert scores.tolist() == pytest.approx(expected, abs=1e-4)
    assert max(map(abs, expected)) > 0.1
    as_messages = [[{"role": "assistant", "content": reply}] for reply in replies]
    assert torch.equal(ImplicitReward(policy, 0.25, 2).score(contexts, as_messages), scores)


def test_the_hard_prompt_prefers_neither(policy):
    scores = ImplicitReward(policy, 0.1).score([sample_context(i) for i in range(3)], ["a", "b?", "some more words."])
    assert scores.abs().max() < 1e-5


def rows(*replies, prompt=None):
    """Judgements by their chosen and rejected replies."""
    pairs = [[[{"role": "assistant", "content": text}] for text in pair] for pair in replies]
    chosen, rejected = zip(*pairs, strict=True) if pairs else ((), ())
    prompts = [prompt or sample_context(i) for i in range(len(pairs))]
    return Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected})


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (None, "train_dataset must be a datasets.Dataset with the columns prompt, chosen and rejected, got NoneType"),
        (Dataset.from_dict({"prompt": ["hi"]}), "train_dataset must be a datasets.Dataset with .*, got .'prompt'"),
        (rows(("a", "b")).select([]), "train_dataset holds no judgement of two unlike replies"),
        (rows(("a", "a")), "train_dataset holds no judgement of two unlike replies"),
        (rows(("a", "b"), ("c", "d <end_of_turn>")), "context 2: the rejected reply spells out '<end_of_turn>'"),
        (rows(("a" * 2000, "b")), r"context 1 and its chosen reply are \d+ tokens long, but the model takes"),
        (rows(("a", "b"), prompt=[{"role": "assistant", "content": "hi"}, {"role": "user", "content": "ho"}]),
         "context 1 begins with the assistant"),
    ],
)  # fmt: skip
def test_what_cannot_be_learnt_is_refused(policy, pairs, words):
    with pytest.raises(InputError, match=words):
        check_run(PrefixDPOConfig(), policy, pairs)


def test_a_base_in_4_bits_is_refused(policy):
    """One that is quantised as it loads, and one that is saved so."""
    saved = SimpleNamespace(prefix=policy.prefix, config=SimpleNamespace(quantization_config={"load_in_4bit": True}))
    policy.prefix = replace(policy.prefix, quantization={"load_in_4bit": True})
    for in_4_bits in (policy, saved):
        with pytest.raises(InputError, match="DPO was not run on a base in 4 bits, whose prefix TRL rounds: take one"):
            check_run(PrefixDPOConfig(), in_4_bits, rows(("a", "b")))


def test_one_process_on_several_cards_is_refused(policy, monkeypatch):
    monkeypatch.setattr(PrefixDPOConfig, "n_gpu", 2)
    with pytest.raises(InputError, match="one process sees 2 CUDA devices"):
        check_run(PrefixDPOConfig(), policy, rows(("a", "b")))


def test_text_is_a_message_and_identical_replies_are_left_out(caplog):
    caplog.set_level("INFO", "h2s")
    text = Dataset.from_dict({"prompt": ["hi", "ho", "hu"], "chosen": ["a", "b", "c"], "rejected": ["b", "b", "a"],
                              "tools": ["x", "y", "z"]})  # fmt: skip
    made = as_trl_has_it(text)
    assert made.column_names == ["prompt", "chosen", "rejected"]
    assert made["prompt"][:] == [[{"role": "user", "content": text}] for text in ("hi", "hu")]
    assert made["rejected"][:] == [[{"role": "assistant", "content": text}] for text in ("b", "a")]
    assert caplog.messages == ["1 pairs of two identical replies are left out"]
    assert as_trl_has_it(None) is None


def test_a_template_that_answers_otherwise_than_it_asks_is_refused(policy, monkeypatch):
    """As those do that leave an earlier turn's thoughts out."""
    monkeypatch.setattr(policy.tokenizer, "chat_template", f"{policy.tokenizer.chat_template}{{{{ '' }}}}")
    check_run(PrefixDPOConfig(), policy, rows(("a", "b")))
    once = "{% if messages[-1]['role'] == 'assistant' %}{{ 'answered ' }}{% endif %}"
    monkeypatch.setattr(policy.tokenizer, "chat_template", once + policy.tokenizer.chat_template)
    with pytest.raises(InputError, match="context 1: with its reply the context has other tokens than when it waits"):
        check_run(PrefixDPOConfig(), policy, rows(("a", "b")))
