"""What an encoder reads of judgements."""

import copy
import itertools
from collections import Counter

import pytest
from datasets import Dataset
from reward.texts import CONTEXTS, RESPONSES
from tiny import sample_context

from h2s.data.messages import conversation_id
from h2s.errors import InputError
from h2s.reward.pairs import (
    PreferenceCollator,
    context_text,
    encode_pair,
    readable_pairs,
    reply_text,
    tokenize_preferences,
)

VIRTUAL = 4
LIMIT = 64


def tokens(tokenizer, encoded):
    return tokenizer.convert_ids_to_tokens(encoded["input_ids"])


def test_texts_of_what_is_scored():
    """Text stays; of messages it is their contents; TRL's completion is a list of one."""
    assert context_text(sample_context(0)) == "walk number 0\nwhat did you do?\nI ran."
    assert context_text("walk\ntea") == "walk\ntea"
    assert reply_text("tea") == reply_text([{"role": "assistant", "content": "tea"}]) == "tea"


def test_layout_of_a_pair(bert_tokenizer):
    """Every word here is one token of the vocabulary."""
    encoded = encode_pair(bert_tokenizer, "walk tea", "book rain work", max_tokens=20)
    assert tokens(bert_tokenizer, encoded) == ["[CLS]", "walk", "tea", "[SEP]", "book", "rain", "work", "[SEP]"]
    assert encoded["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("room", [0, 1, 400])
def test_layout_is_berts_own(bert_tokenizer, room):
    """All that the tokenizer makes of a pair by itself, as long as nothing has to be cut."""
    for context, response in zip(["", *map(context_text, CONTEXTS)], ["tea", *RESPONSES], strict=True):
        own, counted = bert_tokenizer(context, response), Counter()
        encoded = encode_pair(bert_tokenizer, context, response, len(own.input_ids) + room, counted)
        assert dict(encoded) == dict(own) and not +counted


@pytest.mark.parametrize(
    ("max_tokens", "context", "response", "cuts"),
    [
        (8, "walk tea", "book rain work", {}),
        # One too long: the context loses its beginning.
        (7, "tea", "book rain work", {"context": 1}),
        # The context is gone, the response still whole.
        (6, "", "book rain work", {"context": 1}),
        # Only then the response loses its end.
        (5, "", "book rain", {"context": 1, "response": 1}),
    ],
)
def test_cut_rules(bert_tokenizer, max_tokens, context, response, cuts):
    counted = Counter()
    encoded = encode_pair(bert_tokenizer, "walk tea", "book rain work", max_tokens, counted)
    assert tokens(bert_tokenizer, encoded) == ["[CLS]", *context.split(), "[SEP]", *response.split(), "[SEP]"]
    assert len(encoded["input_ids"]) == len(encoded["token_type_ids"]) == max_tokens
    assert +counted == Counter(cuts)


@pytest.mark.parametrize("max_tokens", [5, 9, 17, 40])
def test_cut_pair_is_what_the_tokenizer_itself_cuts(bert_tokenizer, max_tokens):
    """By its own truncation: the context's beginning, or with nothing of the context the response's end."""
    room = max_tokens - 3
    for context, response in itertools.product(map(context_text, CONTEXTS), RESPONSES):
        tail = len(bert_tokenizer(response, add_special_tokens=False).input_ids)
        encoded = encode_pair(bert_tokenizer, context, response, max_tokens)
        own = copy.deepcopy(bert_tokenizer)
        own.truncation_side = "left" if tail < room else "right"
        pair, strategy = ((context, response), "only_first") if tail < room else (("", response), "only_second")
        assert dict(encoded) == dict(own(*pair, truncation=strategy, max_length=max_tokens))


def test_empty_context_is_not_counted_as_cut(bert_tokenizer):
    counted = Counter()
    encode_pair(bert_tokenizer, "", "book rain work", 5, counted)
    assert +counted == Counter({"response": 1})


def test_special_tokens_in_a_text_stay_text(bert_tokenizer):
    encoded = encode_pair(bert_tokenizer, "[SEP] walk", "[CLS] [SEP]", 50)
    special = {bert_tokenizer.sep_token_id, bert_tokenizer.cls_token_id}
    ids = encoded["input_ids"]
    assert [i for i, token in enumerate(ids) if token in special] == [
        0,
        encoded["token_type_ids"].index(1) - 1,
        len(ids) - 1,
    ]
    assert ids.count(bert_tokenizer.sep_token_id) == 2 and ids.count(bert_tokenizer.cls_token_id) == 1


PROMPT = [{"role": "user", "content": "walk"}]


def pairs_of(*replies):
    """Judgements of one context, as `load_preferences` gives them."""
    replies = [[[{"role": "assistant", "content": text}] for text in pair] for pair in replies]
    return Dataset.from_list([{"prompt": PROMPT, "chosen": c, "rejected": r, "label": 0} for c, r in replies])


def test_columns_of_the_tokenized_pairs(bert_tokenizer):
    cuts = Counter()
    (row,) = tokenize_preferences(pairs_of(("tea", "rain cat")), bert_tokenizer, 6, cuts)
    names = {k: bert_tokenizer.convert_ids_to_tokens(row.pop(k)) for k in ("chosen_ids", "rejected_ids")}
    assert names == {
        "chosen_ids": ["[CLS]", "walk", "[SEP]", "tea", "[SEP]"],
        "rejected_ids": ["[CLS]", "walk", "[SEP]", "rain", "cat", "[SEP]"],
    }
    assert row == {
        "chosen_type_ids": [0, 0, 0, 1, 1],
        "rejected_type_ids": [0, 0, 0, 1, 1, 1],
        "conversation": conversation_id(PROMPT),  # what a step is filled by
    }
    assert not +cuts


def test_judgements_may_be_texts(bert_tokenizer):
    """A data set of the user's own: a context that is text is one user message."""
    own = Dataset.from_list([{"prompt": "walk", "chosen": "tea", "rejected": "rain cat"}])
    rows = [tokenize_preferences(d, bert_tokenizer, 6, Counter())[0] for d in (own, pairs_of(("tea", "rain cat")))]
    assert rows[0] == rows[1]


def test_a_pairs_context_is_counted_as_cut_once(bert_tokenizer):
    """In 6 tokens: whole for both, cut for one, cut for both."""
    pairs = pairs_of(("tea", "cat"), ("tea", "rain cat tea"), ("rain cat tea", "rain tea tea book"))
    cuts = Counter()
    tokenize_preferences(pairs, bert_tokenizer, 6, cuts)
    assert cuts == {"context": 2, "response": 1}


def test_collator_encodes_each_text_once(bert_tokenizer):
    """Three pairs of three texts; one text has another's tokens and other types."""
    a = {"ids": [2, 5, 3], "type_ids": [0, 0, 1]}
    b = {"ids": [2, 6, 7, 3], "type_ids": [0, 0, 1, 1]}
    c = {"ids": [2, 5, 3], "type_ids": [0, 1, 1]}

    def pair(chosen, rejected):
        return {f"chosen_{k}": v for k, v in chosen.items()} | {f"rejected_{k}": v for k, v in rejected.items()}

    batch = PreferenceCollator(bert_tokenizer)([pair(a, b), pair(b, c), pair(a, c)])
    assert batch["input_ids"].tolist() == [[2, 5, 3, 0], [2, 6, 7, 3], [2, 5, 3, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1, 0], [0, 0, 1, 1], [0, 1, 1, 0]]
    assert batch["pairs"].tolist() == [[0, 1], [1, 2], [0, 2]]
    assert next(iter(batch)) == "pairs"  # what Trainer takes for the batch's size


def test_pairs_that_read_alike_are_set_aside(bert_tokenizer, caplog):
    """Beside [CLS], [SEP], [SEP] twelve tokens leave nine of a reply: the context goes first."""
    same = "tea cat rain tea cat rain tea cat rain"
    pairs = pairs_of((f"{same} walk", f"{same} tea"), ("tea", "rain"), ("tea", "TEA"), ("cat", "tea"))
    with caplog.at_level("INFO", "h2s"):
        left = readable_pairs(pairs, bert_tokenizer, 12)
    assert [row["chosen"][0]["content"] for row in left] == ["tea", "cat"]
    assert caplog.messages == [
        "2 of 4 pairs read alike to the encoder (the same responses, or cut to 12 tokens): set aside"
    ]
    assert len(readable_pairs(pairs, bert_tokenizer, 13)) == 3
    with pytest.raises(InputError, match=r"20 of 21 pairs read alike .* beyond max_tokens 12"):
        readable_pairs(pairs_of(*[(f"{same} walk", f"{same} tea")] * 20, ("tea", "cat")), bert_tokenizer, 12)


def test_unknown_tokens_are_counted(bert_tokenizer, caplog):
    assert bert_tokenizer.tokenize("walk 沒 空") == ["walk", "[UNK]", "[UNK]"]
    with caplog.at_level("INFO", "h2s"):
        readable_pairs(pairs_of(("沒", "tea"), ("tea", "沒 空 cat")), bert_tokenizer, 64)
    # Of a context and replies of one, one, one and three tokens each: 4 + 6.
    assert caplog.messages == ["the encoder reads 30.0% of the tokens as [UNK] (unknown)"]
    pairs = pairs_of(*[("沒 空 " * 6, "空 沒 " * 5)] * 5)
    with pytest.raises(InputError, match=r"reads 92% of the texts' tokens as \[UNK\].* choose another"):  # 22 of 24
        readable_pairs(pairs, bert_tokenizer, 64)
