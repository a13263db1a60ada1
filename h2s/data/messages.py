"""One cell to checked messages, and which conversation they belong to.

A *context* is a conversation that waits for the assistant's reply: alternating user and assistant messages, the last
one the user's. A *conversation id* is the same for all contexts that begin with the same message, so that turns of one
conversation never stand on both sides of a split.
"""

import ast
import hashlib
import json
import re
import unicodedata
import warnings
from itertools import pairwise
from typing import Any

from h2s.errors import InputError

Messages = list[dict[str, str]]


SURROGATE = re.compile("[\ud800-\udfff]")


def parse_messages(cell: Any) -> Messages:
    """Read one context.

    Args:
        cell: a list of `{"role", "content"}` (content a string or a list of `{"type": "text", "text"}` parts), the
            same as a JSON or Python-literal string, or plain text (one user message). Text that begins with `[` or
            `{` must parse.

    Returns:
        Messages with string contents, alternating user and assistant, the last one the user's.

    Raises:
        InputError: the cell is none of these.
    """
    if isinstance(cell, str):
        text = cell.strip()
        if text[:2] in ('"[', "'[") and text[:1] == text[-1:]:  # encoded twice
            text = _parse_literal(text)
        cell = _parse_literal(text) if text[:1] in ("[", "{") else [{"role": "user", "content": text}]
    if not isinstance(cell, list) or not cell:
        raise InputError(f"expected a non-empty list of messages or plain text, got {_short(cell)}")
    messages = [_message(m) for m in cell]
    for before, after in pairwise(messages):
        if before["role"] == after["role"]:
            raise InputError(f"messages must alternate between user and assistant, got two {after['role']!r} in a row")
    if messages[-1]["role"] != "user":
        raise InputError("the last message must be the user's, since the response answers it")
    return messages


def _parse_literal(text: str) -> Any:
    try:
        # A real line break within a string is what it looks like.
        return json.loads(text, strict=False, object_pairs_hook=each_key_once)
    except InputError:
        raise
    except RecursionError:
        place = len(text)
    except ValueError as error:
        place = getattr(error, "pos", 0)
    try:
        with warnings.catch_warnings(action="ignore"):  # Python's own remarks on such escapes as '\%'
            return ast.literal_eval(text)
    except SyntaxError as error:
        if "'" in text.partition('"')[0]:  # its first quote is Python's
            lines = text.split("\n")[: (error.lineno or 1) - 1]
            place = sum(len(line) + 1 for line in lines) + (error.offset or 1) - 1
    except (ValueError, TypeError, MemoryError, RecursionError):
        pass
    raise InputError(f"begins like a list but is neither JSON nor a Python literal: {_what_is_wrong(text, place)}")


def each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`, which would keep the last of two.

    Raises:
        InputError: a key stands there twice.
    """
    item = dict(pairs)
    if len(item) < len(pairs):
        name = next(key for n, (key, _) in enumerate(pairs) if key in dict(pairs[:n]))
        raise InputError(f"an object has the key {name!r} twice: keep one of the two")
    return item


def _what_is_wrong(text: str, place: int) -> str:
    """The likeliest cause, and where a parser stopped."""
    causes = {
        r"\}\s*\{": "no comma between two messages (NumPy prints lists so: write them with json.dumps)",
        "[“”„‟]\\s*(?:role|content|text|type|user|assistant)": "curly quotes (“ ”) in place of straight ones",
        r"&(?:quot|#34|#39|apos);": "quotes spelt for HTML (&quot;)",
    }
    found = ((re.search(pattern, text), cause) for pattern, cause in causes.items())
    if text[-1:] not in ("]", "}", '"', "'"):
        return f"it does not end as a list, was it cut off?: {_short(text[-40:])}"
    unknown = (None, "is a quote not escaped, a bracket not closed, or is it a text (a list of one message then)?")
    match, cause = next((f for f in found if f[0]), unknown)
    place = match.start() if match else place
    return f"{cause}, at character {place + 1}: {_short(text[max(0, place - 20) : place + 20])}"


def _message(message: Any) -> dict[str, str]:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise InputError(f'expected a message {{"role": …, "content": …}}, got {_short(message)}')
    role, content = message["role"], message["content"]
    if role not in ("user", "assistant"):
        raise InputError(f"a message's role must be 'user' or 'assistant', got {_short(role)}")
    if isinstance(content, list):
        if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content):
            raise InputError(f'content parts must be {{"type": "text", "text": …}}, got {_short(content)}')
        content = "".join(p["text"] for p in content)
    if not isinstance(content, str) or not content.strip():
        raise InputError(f"a message's content must be non-empty text, got {_short(content)}")
    check_unicode(content)
    return {"role": role, "content": content}


def as_messages(conversation: str | Messages) -> Messages:
    """A conversation of the Python API: a list of messages, or text that is one user message, whatever it begins with.

    Raises:
        InputError: it is neither, or does not wait for the assistant's reply.
    """
    return parse_messages(
        [{"role": "user", "content": conversation}] if isinstance(conversation, str) else conversation
    )


def check_unicode(text: str) -> None:
    """Refuse half a surrogate pair (JSON can spell one, as \\ud83d): no tokenizer or file takes it.

    Raises:
        InputError: there is one.
    """
    found = SURROGATE.search(text)
    if found:
        around = text[max(0, found.start() - 20) : found.end() + 20]
        raise InputError(f"half a character (a lone surrogate, {found[0]!r}) in {around!r}: write the text anew there")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def conversation_id(messages: Messages) -> str:
    """A short id of the conversation that `messages` belong to: a hash of its beginning.

    That is all up to the user's first message: an assistant may open every conversation with the same greeting. White
    space and composed characters count alike: a workbook and a JSON file may hold one text in two spellings.
    """
    end = next((i for i, m in enumerate(messages) if m["role"] == "user"), 0) + 1
    texts = (" ".join(unicodedata.normalize("NFC", m["content"]).split()) for m in messages[:end])
    beginning = "\n".join(f"{m['role']}\n{text}" for m, text in zip(messages, texts, strict=False))
    return hashlib.sha256(beginning.encode("utf-8", "replace")).hexdigest()[:16]
