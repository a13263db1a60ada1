"""The encoders beside BERT: ELECTRA, RoBERTa and XLM-R by their own encoding of a pair; all others by name."""

from collections import Counter

import pytest
import torch
from elsewhere import elsewhere
from peft import PrefixTuningConfig, TaskType, get_peft_model
from tiny import ENCODERS, build_reward_model, sample_context, save_loud_encoder
from transformers import AutoConfig, AutoModelForSequenceClassification

from h2s import InputError, RewardModel, RewardModelConfig, RewardModelTrainer, load_preferences
from h2s.models import load_config, load_tokenizer
from h2s.prefix.adapter import soft_prefix
from h2s.reward.encoder import COUNTED_FROM_PADDING, FAMILIES, NO_PAST, check_encoder, open_encoder
from h2s.reward.pairs import context_text, encode_pair

VIRTUAL = 4
POSITIONS = {"electra": 128, "roberta": 126, "xlm-roberta": 126}  # of 128; RoBERTa's begin at 2
WORD = {"electra": "walk", "roberta": "Ġwalk", "xlm-roberta": "▁walk"}
CONTEXTS = [sample_context(i) for i in range(6)]
RESPONSES = ["how was the walk?", "i like tea.", "a", "song " * 12, "I ran.", "cat film"]
# The example of each card, with other texts.
CARD = """
from pathlib import Path

folders, pairs = given
found = []
for folder in folders:
    *lines, call = Path(folder, "README.md").read_text().split("```python\\n")[1].split("```")[0].strip().splitlines()
    names = {}
    exec("\\n".join(lines), names)
    call = call.replace('"the context", "the response"', "*pair")
    found.append([eval(call, {**names, "pair": pair}).item() for pair in pairs])
"""


@pytest.fixture(scope="module", params=ENCODERS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return save_loud_encoder(tmp_path_factory.mktemp("models") / family, family)


@pytest.fixture
def encoder_tokenizer(folder):
    return load_tokenizer(str(folder))


@pytest.fixture
def reward(folder, family):
    return build_reward_model(folder, VIRTUAL, POSITIONS[family] - VIRTUAL)


def pieces(tokenizer, encoded):
    return tokenizer.convert_ids_to_tokens(encoded["input_ids"])


# What it reads


def test_layout_is_the_tokenizers_own(family, encoder_tokenizer):
    word = WORD[family]
    first, between, last = (
        (["[CLS]"], ["[SEP]"], ["[SEP]"]) if family == "electra" else (["<s>"], ["</s>", "</s>"], ["</s>"])
    )
    encoded = encode_pair(encoder_tokenizer, " walk walk", " walk", 50)
    assert pieces(encoder_tokenizer, encoded) == [*first, word, word, *between, word, *last]
    for context, response in zip(map(context_text, CONTEXTS), RESPONSES, strict=True):
        assert dict(encode_pair(encoder_tokenizer, context, response, 500)) == dict(
            encoder_tokenizer(context, response)
        )
    assert ("token_type_ids" in encoded) == (family == "electra")


def test_what_is_cut_keeps_the_layout(family, encoder_tokenizer):
    """The context from its beginning, and only then the response from its end."""
    context, response = " walk" * 3 + " tea", " rain walk walk"
    whole = pieces(encoder_tokenizer, encode_pair(encoder_tokenizer, context, response, 500))
    separators = [i for i, piece in enumerate(whole) if piece in ("[SEP]", "</s>")]
    first, last = separators[0], separators[-2]  # before the response there are one or two
    of_context, of_response = whole[1:first], whole[last + 1 : -1]
    assert len(of_context) >= 4 and len(of_response) >= 3
    for over in range(1, len(of_context) + len(of_response) - 1):
        counted: Counter = Counter()
        encoded = encode_pair(encoder_tokenizer, context, response, len(whole) - over, counted)
        left = max(len(of_response) - max(over - len(of_context), 0), 0)
        expected = [whole[0], *of_context[over:], *whole[first : last + 1], *of_response[:left], whole[-1]]
        assert pieces(encoder_tokenizer, encoded) == expected
        assert {len(row) for row in encoded.values()} == {len(whole) - over}
        assert counted == {"context": 1, "response": left < len(of_response)}


def test_special_tokens_in_a_text_are_never_real_ones(encoder_tokenizer):
    """XLM-R's Unigram vocabulary holds them as words."""
    tokenizer = encoder_tokenizer
    text = f"{tokenizer.sep_token} walk {tokenizer.cls_token} {tokenizer.pad_token} {tokenizer.mask_token}"
    ids = encode_pair(tokenizer, text, text, 500)["input_ids"]
    plain = encode_pair(tokenizer, "walk", "walk", 500)["input_ids"]
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert [i for i in ids if i in special] == [i for i in plain if i in special] and len(ids) > len(plain) + 8


# How much it reads


def test_room_is_exact(family, folder, reward, encoder_tokenizer):
    """As many tokens as `open_encoder` says run, beside padding too; one more has no position."""
    _, _, room = open_encoder(str(folder), VIRTUAL)
    assert room == POSITIONS[family] - VIRTUAL
    ids = encode_pair(encoder_tokenizer, "walk " * 300, "tea", room)["input_ids"]
    assert len(ids) == room and reward.score(["walk " * 300, "walk"], ["tea", "tea"]).isfinite().all()
    mask = torch.ones(1, room + 1, dtype=torch.long)
    assert reward.model(input_ids=torch.tensor([ids]), attention_mask=mask[:, 1:]).logits.isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        reward.model(input_ids=torch.tensor([[*ids, ids[-1]]]), attention_mask=mask)
    with pytest.raises(InputError, match=rf"between \d and {room} \({POSITIONS[family]} positions minus 4 virtual"):
        open_encoder(str(folder), VIRTUAL, room + 1)


# What it makes of it


@torch.no_grad()
def test_padded_scores_equal_unpadded_ones(reward):
    expected = [
        reward.model(**reward.tokenizer(context_text(c), r, return_tensors="pt")).logits.item()
        for c, r in zip(CONTEXTS, RESPONSES, strict=True)
    ]
    assert max(expected) - min(expected) > 0.05 and len({round(e, 4) for e in expected}) == len(expected)
    assert reward.score(CONTEXTS, RESPONSES).tolist() == pytest.approx(expected, abs=1e-5)
    soft_prefix(reward.model).neg_()
    assert (reward.score(CONTEXTS, RESPONSES) - torch.tensor(expected)).abs().min() > 1e-4  # the prefix is read


def test_the_prefixs_gradient_passes_padding(reward):
    """Of a padded batch it is the sum of the texts' own."""
    rows = [dict(reward.tokenizer(context_text(c), r)) for c, r in zip(CONTEXTS, RESPONSES, strict=True)]
    prefix = soft_prefix(reward.model)

    def gradient(batches):
        prefix.grad = None
        for batch in batches:
            reward.model(**reward.tokenizer.pad(batch, return_tensors="pt")).logits.sum().backward()
        return prefix.grad.clone()

    padded, alone = gradient([rows]), gradient([[row] for row in rows])
    assert alone.abs().max() > 1e-3
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def learnt(sheet_file, tmp_path_factory):
    """For each family a trained reward model, how far its prefix moved, and its evaluations before and after."""
    judged = load_preferences(str(sheet_file))
    train, held_out = judged.select(range(40)), judged.select(range(40, 80))
    found = {}
    for family in ENCODERS:
        folder = tmp_path_factory.mktemp("learnt")
        args = RewardModelConfig(
            output_dir=str(folder / "run"), max_steps=100, per_device_train_batch_size=8, save_strategy="no",
            report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = RewardModelTrainer(str(save_loud_encoder(folder / family, family)), args, train)
        prefix = soft_prefix(trainer.model)
        start, before = prefix.detach().clone(), trainer.evaluate(held_out)
        trainer.train()
        found[family] = trainer.reward_model, (prefix - start).abs().max(), before, trainer.evaluate(held_out)
    return found


@pytest.mark.parametrize("family", ENCODERS)
def test_a_rule_is_learnt(learnt, family):
    """The reply that asks is better: of conversations that it never saw."""
    _, moved, before, after = learnt[family]
    assert after["eval_accuracy"] > 0.9 and after["eval_loss"] < 0.5 * before["eval_loss"], (before, after)
    assert moved > 1e-2


def test_the_cards_example_scores_the_same(learnt, tmp_path):
    """In a process without h2s, and with h2s after it is loaded again."""
    contexts, replies = CONTEXTS[:2] * 2, ["how was the tea?", "how was the cat?", "i like the tea.", "i like the cat."]
    expected = []
    for family, (reward, *_) in learnt.items():
        reward.save_pretrained(tmp_path / family)
        expected.append(reward.score(contexts, replies).tolist())
        assert min(expected[-1][0] - expected[-1][2], expected[-1][1] - expected[-1][3]) > 0.5
        loaded = RewardModel.from_pretrained(tmp_path / family)
        assert loaded.score(contexts, replies).tolist() == pytest.approx(expected[-1], abs=1e-5)
    pairs = [(context_text(c), r) for c, r in zip(contexts, replies, strict=True)]
    for scores, ours in zip(elsewhere(CARD, [list(learnt), pairs], tmp_path), expected, strict=True):
        assert scores == pytest.approx(ours, abs=1e-5)


# What is refused


def tiny_config(kind):
    names = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    if kind == "distilbert":
        names = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
    return AutoConfig.for_model(kind, **names, vocab_size=99, max_position_embeddings=64, pad_token_id=1, num_labels=1)


@pytest.mark.parametrize("kind", NO_PAST)
def test_what_takes_no_prefix_is_refused_by_name(kind, bert_tokenizer):
    """Rightly: PEFT itself cannot, not even told all the sizes."""
    config = tiny_config(kind)
    with pytest.raises(InputError, match=rf"it is a {kind} model, which takes no past key values .*{FAMILIES}$"):
        check_encoder(config, bert_tokenizer, "it")
    sizes = {"num_virtual_tokens": 4, "token_dim": 32, "num_layers": 2, "num_attention_heads": 4}
    model = get_peft_model(
        AutoModelForSequenceClassification.from_config(config), PrefixTuningConfig(TaskType.SEQ_CLS, **sizes)
    )
    with pytest.raises(ValueError, match="Model does not support past key values"):
        model(input_ids=torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 3, dtype=torch.long))


@pytest.mark.parametrize("kind", ["camembert", "xlm-roberta-xl", "gpt2", "t5"])
def test_what_was_not_shown_is_refused_by_name(kind, bert_tokenizer):
    with pytest.raises(InputError, match=f"^it is a {kind} model: the reward model must be a {FAMILIES}$"):
        check_encoder(AutoConfig.for_model(kind), bert_tokenizer, "it")


def test_a_tokenizer_that_does_not_belong_is_refused(family, folder, gemma_folder, bert_tokenizer):
    config = load_config(str(folder))
    with pytest.raises(InputError, match="the tokenizer of it lacks a cls_token or a sep_token"):
        check_encoder(config, load_tokenizer(str(gemma_folder)), "it")
    if family in COUNTED_FROM_PADDING:
        with pytest.raises(InputError, match="the padding of it is 0 to its tokenizer and 1 to its configuration"):
            check_encoder(config, bert_tokenizer, "it")
