"""Judgements as an encoder's tokens: its own encoding of a pair, and what it cannot read or tell apart.

BERT's is `[CLS] context [SEP] response [SEP]`, RoBERTa's and XLM-R's `<s> context </s></s> response </s>`. The
context is its messages' contents joined by newlines.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import BatchEncoding, PreTrainedTokenizerBase

from h2s.data.messages import Messages, as_messages, conversation_id
from h2s.errors import InputError

logger = logging.getLogger(__name__)

# Of what an encoder cannot read or tell apart: with more than this share nothing is learnt.
NEARLY_ALL = 0.9
# The columns of a pair's two sides: TRL's for the tokens, ours for the types, where the tokenizer gives some.
COLUMNS = {"input_ids": "ids", "token_type_ids": "type_ids"}


def context_text(context: str | Messages) -> str:
    """A context as the reward model reads it: its messages' contents joined by newlines."""
    return context if isinstance(context, str) else "\n".join(m["content"] for m in context)


def reply_text(reply: str | Messages) -> str:
    """A reply as text; TRL's is a list of one message."""
    return reply if isinstance(reply, str) else reply[-1]["content"]


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, context: str, response: str, max_tokens: int, cuts: Counter | None = None
) -> BatchEncoding:
    """The tokenizer's own encoding of a pair, as `[CLS] context [SEP] response [SEP]`, in at most `max_tokens` tokens.

    When too long the context is cut from its beginning, and only then the response from its end; `cuts` counts both
    under "context" and "response". Special tokens spelled out in a text stay text, or are unknown where the vocabulary
    has no other word for them.

    Returns:
        What the tokenizer returns, lists of one length: `input_ids`, `attention_mask`, and of a BERT or ELECTRA
        `token_type_ids` (0 up to the first [SEP], 1 after it).
    """
    # Not cut by the tokenizer: it would keep the side and the length, and save them as its own.
    whole = tokenizer(context, response, split_special_tokens=True, verbose=False)
    sides = whole.sequence_ids()  # 0, 1, or None of a special token
    # A Unigram vocabulary (XLM-R's) finds its special tokens in a text too, whatever it is told.
    special, unknown = set(tokenizer.all_special_ids), tokenizer.unk_token_id
    whole["input_ids"] = [
        unknown if side is not None and i in special else i for i, side in zip(whole["input_ids"], sides, strict=True)
    ]
    of_context, of_response = ([i for i, s in enumerate(sides) if s == side] for side in (0, 1))
    over = max(len(sides) - max_tokens, 0)
    over_response = max(over - len(of_context), 0)
    cut = {*of_context[:over], *of_response[len(of_response) - over_response :]}
    if cuts is not None:
        cuts["context"] += bool(of_context) and over > 0
        cuts["response"] += over_response > 0
    return BatchEncoding({name: [v for i, v in enumerate(row) if i not in cut] for name, row in whole.items()})


def tokenize_preferences(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_tokens: int, cuts: Counter
) -> Dataset:
    """`chosen_ids`, `rejected_ids`, their `…_type_ids`, `conversation` and TRL's `margin`, where pairs have one.

    `cuts` counts as in [`encode_pair`], but a pair's context once.
    """
    rows = []
    for row in dataset:
        text = context_text(row["prompt"])
        encoded: dict[str, Any] = {"conversation": conversation_id(as_messages(row["prompt"]))}
        if "margin" in row:
            encoded["margin"] = row["margin"]
        cut: Counter[str] = Counter()
        for side in ("chosen", "rejected"):
            pair = encode_pair(tokenizer, text, reply_text(row[side]), max_tokens, cut)
            encoded |= {f"{side}_{column}": pair[name] for name, column in COLUMNS.items() if name in pair}
        cuts["context"] += cut["context"] > 0
        cuts["response"] += cut["response"]
        rows.append(encoded)
    return Dataset.from_list(rows)


def readable_pairs(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Dataset:
    """The pairs whose two responses the encoder tells apart; what it cannot is counted and logged.

    Raises:
        InputError: it is nearly all: the vocabulary lacks the language, or `max_tokens` cuts what differs.
    """
    unknown = tokens = 0
    apart = []
    for number, row in enumerate(dataset):
        text = context_text(row["prompt"])
        sides = [
            encode_pair(tokenizer, text, reply_text(row[s]), max_tokens)["input_ids"] for s in ("chosen", "rejected")
        ]
        for ids in sides:
            unknown += ids.count(tokenizer.unk_token_id)
            tokens += len(ids) - tokenizer.num_special_tokens_to_add(pair=True)
        if sides[0] != sides[1]:
            apart.append(number)
    share = unknown / max(tokens, 1)
    if share > NEARLY_ALL:
        raise InputError(
            f"the encoder reads {share:.0%} of the texts' tokens as {tokenizer.unk_token} (unknown): its vocabulary "
            "lacks this language; choose another reward_model_name_or_path (google-bert/bert-base-chinese, say)"
        )
    alike = len(dataset) - len(apart)
    if alike > NEARLY_ALL * len(dataset):
        raise InputError(
            f"{alike} of {len(dataset)} pairs read alike to the encoder: their responses are the same, or differ only "
            f"beyond max_tokens {max_tokens} or in what its vocabulary lacks; raise max_tokens or take another encoder"
        )
    if share >= 0.001:
        logger.info("the encoder reads %.1f%% of the tokens as %s (unknown)", 100 * share, tokenizer.unk_token)
    if alike:
        what = "%d of %d pairs read alike to the encoder (the same responses, or cut to %d tokens): set aside"
        logger.warning(what, alike, len(dataset), max_tokens)
    return dataset.select(apart) if alike else dataset


@dataclass
class PreferenceCollator:
    """Pads the distinct texts of some pairs; judgements of one conversation share many of them."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, rows: Sequence[dict[str, Any]]) -> BatchEncoding:
        """M padded texts from N pairs; `pairs`, (N, 2), which of them are a pair's chosen and rejected; `margin`."""
        names = [name for name, column in COLUMNS.items() if f"chosen_{column}" in rows[0]]
        pairs = [
            [tuple(tuple(row[f"{side}_{COLUMNS[name]}"]) for name in names) for side in ("chosen", "rejected")]
            for row in rows
        ]
        places = {text: place for place, text in enumerate(dict.fromkeys(text for pair in pairs for text in pair))}
        features = [{name: list(values) for name, values in zip(names, text, strict=True)} for text in places]
        # First, since Trainer takes the batch's size from what comes first: it shall count pairs.
        indices = {"pairs": torch.tensor([[places[text] for text in pair] for pair in pairs])}
        if "margin" in rows[0]:
            indices["margin"] = torch.tensor([row["margin"] for row in rows], dtype=torch.float32)
        return BatchEncoding(indices | self.tokenizer.pad(features, return_tensors="pt").data)
