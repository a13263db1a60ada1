"""Conversations as the tokens that follow a prefix (encoding itself: test_chat_template.py, by template)."""

import pytest
from datasets import Dataset

from h2s.errors import InputError

USER = [{"role": "user", "content": "hi"}]
ASSISTANT = [{"role": "assistant", "content": "hello"}, *USER]


def table(*prompts, file="a.csv", rows=None):
    rows = rows or range(2, len(prompts) + 2)
    return Dataset.from_dict({"prompt": list(prompts), "file": [file] * len(prompts), "row": list(rows)})


def test_contexts_that_begin_otherwise_are_named(policy):
    """The odd ones by the rows of their file, ten of them at most; by places where there is no file."""
    mixed = table(USER, ASSISTANT, USER, ASSISTANT)
    words = (
        "2 of 4 contexts begin with the assistant, the others with the user, as they must with this prompt: leave out "
        "or mend context "
    )
    with pytest.raises(InputError, match=f"{words}3, context 5"):
        policy.encode(mixed, 1)
    with pytest.raises(InputError, match=f"{words}2, context 4"):
        policy.encode(mixed["prompt"][:], 1)
    with pytest.raises(InputError, match=r"12 of 13 .* context 11 and 2 more"):
        policy.encode(table(*[ASSISTANT] * 12, USER), 1)
    with pytest.raises(InputError, match=r"context 2 begins with the assistant, but .* with an opening_user_message"):
        policy.encode(table(*[ASSISTANT] * 3), 1)


def test_a_context_is_called_by_its_row_everywhere(policy):
    long = [{"role": "user", "content": "walk " * 10_000}]
    with pytest.raises(InputError, match=r"^context 65 is \d+ tokens long"):
        policy.encode(table(USER, long, rows=[7, 65]), 1)
    special = [{"role": "user", "content": "<start_of_turn>"}]
    two = {"file": ["a.csv", "b.csv"], "row": [3, 3]}
    with pytest.raises(InputError, match=r"^context 3 of b\.csv: a message of the user"):
        policy.encode(Dataset.from_dict({"prompt": [USER, special], **two}), 1)
