"""Words in front of the question that the assistant begins with, such as "all right, the question is:".

A layer around the adapter's chat template puts them there, so training, evaluation, `generate_response` and a stock
pipeline feed the model the same. The messages stay as the file has them: conversation ids, and so splits and lists of
what was seen, are made of them, and rewards, judges and people read them without the words, as without the hard prompt.
"""

from copy import copy
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from h2s.errors import InputError
from h2s.prefix.chat_template import ChatPrefix, as_jinja_text, check_plain_text, special_tokens


def with_question_prefix(
    tokenizer: PreTrainedTokenizerBase, prefix: ChatPrefix, words: str
) -> tuple[PreTrainedTokenizerBase, ChatPrefix]:
    """The adapter's tokenizer and prefix with `words` in place of the question prefix that they have.

    A question that begins with the words already is left as it is. The tokenizer given is not changed.

    Raises:
        InputError: conversations with this adapter begin with the user, or the words spell out a special token.
    """
    if words and prefix.first_role == "user":
        raise InputError(
            "question_prefix stands in front of the question that the assistant begins with, and with this adapter a "
            "conversation begins with the user: set opening_user_message, or leave question_prefix out"
        )
    check_plain_text("question_prefix", words, special_tokens(tokenizer))
    changed = copy(tokenizer)
    changed.chat_template = _layer(words) + tokenizer.chat_template.removeprefix(_layer(prefix.question_prefix))
    return changed, replace(prefix, question_prefix=words)


def _layer(words: str) -> str:
    """What stands before the wrapped template: contents are text, or a list of parts that begins with a text."""
    if not words:
        return ""
    text = as_jinja_text(words)
    return (
        "{%- if messages and messages[0]['role'] == 'assistant' -%}{%- set question = messages[0]['content'] -%}"
        "{%- set asked = question if question is string else question[0]['text'] -%}"
        f"{{%- if not asked.startswith({text}) -%}}"
        f"{{%- set asked = {text} + asked -%}}"
        "{%- set question = asked if question is string else [{'type': 'text', 'text': asked}] + question[1:] -%}"
        "{%- set messages = [{'role': 'assistant', 'content': question}] + messages[1:] -%}"
        "{%- endif -%}{%- endif -%}"
    )
