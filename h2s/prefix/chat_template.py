"""Which part of a chat rendering is the prefix, and the chat template that prints the rest.

A conversation is rendered as `[system: hard prompt] (+ [user: opening]) + conversation`. All such renderings begin
with the same tokens; these become the soft prefix, and the adapter's tokenizer carries a *wrapped* chat template that
prints everything after them. So a stock `tokenizer.apply_chat_template(conversation)` yields what must still be fed to
a model that already holds the prefix.
"""

import inspect
import json
import logging
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from h2s.data.messages import Messages, check_unicode
from h2s.data.splits import UNKNOWN
from h2s.errors import InputError

logger = logging.getLogger(__name__)

H2S_FILE = "h2s.json"
# What it means where an adapter from before these keys does not say it.
MADE_BEFORE: dict[str, Any] = {
    "chat_template_kwargs": {},
    "start": None,
    "seen": [UNKNOWN],
    "question_prefix": "",
    "quantization": None,
}

# Conversations that begin in unlike ways: what all their renderings share is the prefix.
PROBES = ("Hello there", "你好", "7 days", "(well)", "'s", "élan", "zebra", "🙂")
# What a template's own expressions raise, beside Jinja's errors and the sandbox's.
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
# No settings of a template: what `render` and transformers take themselves, and what the wrapper sets.
TAKEN_NAMES = {"tokenizer", "messages", "rendered", "question", "asked"} | inspect.signature(
    PreTrainedTokenizerBase.apply_chat_template
).parameters.keys()


@dataclass(frozen=True)
class ChatPrefix:
    """The beginning that all renderings share.

    Attributes:
        hard_prompt: the system message.
        opening_messages: what stands in front of every conversation: the system message and, for conversations that
            begin with the assistant, a user message.
        text: the shared text, N characters, special tokens spelled out.
        token_ids: its P tokens as they stand in a whole rendering, one virtual token each. (Tokenised alone, the text
            may come out otherwise: some tokenizers join the newlines at its end.)
        chat_template_kwargs: settings of the model's own template, such as Qwen 3's `enable_thinking`.
        start: the fingerprint of the soft prefix when it was converted (`h2s.prefix.adapter.fingerprint`).
        seen: ids of the conversations that trained or selected the adapter, its rewards and its judges.
        question_prefix: words in front of the question that the assistant begins with (`h2s.prefix.question_prefix`).
        quantization: how its base is quantised as it loads, the arguments of `BitsAndBytesConfig`; None: it is not.
    """

    hard_prompt: str
    opening_messages: Messages
    text: str
    token_ids: list[int]
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    start: str | None = None
    seen: list[str] = field(default_factory=list)
    question_prefix: str = ""
    quantization: dict[str, Any] | None = None

    @property
    def first_role(self) -> str:
        """The role that a conversation must begin with."""
        return "user" if self.opening_messages[-1]["role"] == "system" else "assistant"

    def having_seen(self, conversations: Iterable[str]) -> "ChatPrefix":
        """The same with these ids beside those of the rounds before."""
        return replace(self, seen=sorted({*self.seen, *conversations}))

    def save(self, folder: str | Path) -> None:
        """Write `h2s.json`."""
        text = json.dumps(asdict(self), ensure_ascii=False)
        (Path(folder) / H2S_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "ChatPrefix":
        """Read `h2s.json`.

        Raises:
            InputError: the folder holds none, or one of another stage.
        """
        file = Path(folder) / H2S_FILE
        if not file.is_file():
            raise InputError(f"{folder} is not a policy adapter made by h2s: it holds no {H2S_FILE}")
        try:
            fields = MADE_BEFORE | json.loads(file.read_text(encoding="utf-8"))
            prefix = cls(**{name: fields[name] for name in cls.__dataclass_fields__})
            texts = [prefix.hard_prompt, prefix.text, prefix.first_role, prefix.question_prefix]
            if not all(isinstance(t, str) for t in texts) or not all(isinstance(i, int) for i in prefix.token_ids):
                raise TypeError
            if not isinstance(prefix.chat_template_kwargs, dict) or not isinstance(prefix.seen, list):
                raise TypeError
            if not all(isinstance(conversation, str) for conversation in prefix.seen):
                raise TypeError
            if not isinstance(prefix.quantization, dict | None):
                raise TypeError
            return prefix
        except (ValueError, LookupError, TypeError, RecursionError):
            raise InputError(f"{file} does not describe a policy adapter (no hard prompt in it)") from None


def chat_prefix(
    tokenizer: PreTrainedTokenizerBase,
    hard_prompt: str,
    opening_user_message: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> ChatPrefix:
    """Find the prefix: the longest run of tokens that the renderings of unlike conversations share.

    Args:
        tokenizer: the model's, with its own chat template; of several named ones the default counts.
        hard_prompt: the system message.
        opening_user_message: stands before conversations that begin with the assistant.
        chat_template_kwargs: settings of the template.

    Raises:
        InputError: the prompt is empty or spells out a special token, or the tokenizer has no chat template, one
            without a system message, or one that prints the day.
    """
    if not hard_prompt.strip():
        raise InputError("the hard prompt is empty")
    if opening_user_message is not None and not opening_user_message.strip():
        raise InputError("opening_user_message is empty: leave it out, or give the message")
    name, settings = tokenizer.name_or_path, chat_template_kwargs or {}
    default_template(tokenizer)
    special = special_tokens(tokenizer)
    check_plain_text("the hard prompt", hard_prompt, special)
    check_plain_text("opening_user_message", opening_user_message or "", special)
    _as_jinja(settings)  # what cannot be baked in is refused here
    opening = [{"role": "system", "content": hard_prompt}]
    if opening_user_message is not None:
        opening.append({"role": "user", "content": opening_user_message})
    first_role = "assistant" if opening_user_message is not None else "user"
    renderings = [render(tokenizer, [*opening, {"role": first_role, "content": p}], **settings) for p in PROBES]
    today = [
        _rendered_on(day, tokenizer, [*opening, {"role": first_role, "content": PROBES[0]}], settings) for day in "12"
    ]
    if today[0] != today[1]:
        raise InputError(
            f"the chat template of {name} prints the date, and the prefix would keep that of today: fix it by the "
            "template's own setting in chat_template_kwargs (date_string, say), or write the date into the template"
        )
    encodings = [tokenizer(r, add_special_tokens=False, return_offsets_mapping=True) for r in renderings]
    shared = 0
    for tokens in zip(*(e.input_ids for e in encodings), strict=False):
        if len(set(tokens)) > 1:
            break
        shared += 1
    if shared == 0:
        raise InputError(f"the chat template of {name} renders nothing in front of a conversation")
    text = renderings[0][: encodings[0].offset_mapping[shared - 1][1]]
    before_probe = renderings[0].rpartition(PROBES[0])[0]
    if hard_prompt.strip() not in before_probe:
        raise InputError(f"the chat template of {name} does not print the system message as it is")
    if hard_prompt.strip() not in text or any(not r.startswith(text) for r in renderings):
        raise InputError("the hard prompt's last tokens merge with what follows them: end it with a full stop")
    prefix = ChatPrefix(hard_prompt, opening, text, encodings[0].input_ids[:shared], settings)
    if not _longer_conversation(tokenizer, prefix).startswith(text):
        logger.warning(
            "the chat template of %s prints the system message elsewhere in a longer conversation: with this adapter "
            "only conversations of one turn can be answered, others are refused",
            name,
        )
    return prefix


def default_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Of several named chat templates keep the one that is used where none is named, in place.

    Raises:
        InputError: there is no chat template, or none of them is the default.
    """
    if isinstance(tokenizer.chat_template, dict):
        named = tokenizer.chat_template
        if "default" not in named:
            raise InputError(
                f"the tokenizer of {tokenizer.name_or_path} has the chat templates {', '.join(named)}, and none of "
                "them is the default: keep one of them as chat_template.jinja"
            )
        tokenizer.chat_template = named["default"]
    if tokenizer.chat_template is None:
        raise InputError(f"the tokenizer of {tokenizer.name_or_path} has no chat template: use an instruct model")


def _rendered_on(day: str, tokenizer: PreTrainedTokenizerBase, messages: Messages, settings: dict[str, Any]) -> str:
    """A rendering in which the template's clock shows `day`: a macro goes before transformers' function of its name."""
    clock = f"{{%- macro strftime_now(format) -%}}{day}{{%- endmacro -%}}"
    return render(tokenizer, messages, chat_template=clock + tokenizer.chat_template, **settings)


def _longer_conversation(tokenizer: PreTrainedTokenizerBase, prefix: ChatPrefix) -> str:
    """A rendering of three turns after the opening messages."""
    roles = ("user", "assistant") if prefix.first_role == "user" else ("assistant", "user")
    turns = [{"role": roles[n % 2], "content": PROBES[n]} for n in range(3)]
    return render(tokenizer, [*prefix.opening_messages, *turns], **prefix.chat_template_kwargs)


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, add_generation_prompt: bool = False, **settings: Any
) -> str:
    """A conversation as text by the tokenizer's chat template, `settings` being the template's own.

    transformers runs the template in a sandbox.

    Raises:
        InputError: the template refuses the messages, or fails.
    """
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **settings
        )
    except TEMPLATE_ERRORS as error:
        raise InputError(f"the chat template of {tokenizer.name_or_path} refuses the messages: {error}") from error


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens with a meaning of their own, as text spells them out (`<start_of_turn>`)."""
    return sorted(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)


def check_plain_text(what: str, text: str, special: Iterable[str]) -> None:
    """Check that a text is text alone: a tokenizer would take a special token spelled out in it for the token itself.

    So a message could end its turn and open the assistant's. A stock `apply_chat_template` cannot tell the two apart,
    hence refused and not escaped.

    Raises:
        InputError: it holds one of the tokens, or half a character.
    """
    check_unicode(text)
    found = [token for token in special if token in text]
    if found:
        raise InputError(
            f"{what} spells out {found[0]!r}, which the model would not read as text but as its special token: write "
            "it in another way, with a space in it say"
        )


def wrap_chat_template(tokenizer: PreTrainedTokenizerBase, prefix: ChatPrefix) -> None:
    """Make the tokenizer print conversations without their prefix, in place.

    What the template would cut off is the prefix itself, or it raises: a conversation that begins otherwise, or that
    the model's own template renders otherwise, would be fed garbled without a word.
    """
    default_template(tokenizer)
    # White space at the original's ends stays as transformers renders it: Jinja drops one last newline, `%}` and a
    # newline make a line's beginning, and `{%+` keeps the spaces before it.
    original = tokenizer.chat_template.removesuffix("\n")
    settings = "".join(
        f"{{%- set {name} = {value} -%}}" for name, value in _as_jinja(prefix.chat_template_kwargs).items()
    )
    wrong_beginnings = {"'system', 'developer'": "this adapter holds the system prompt: leave the system message out"}
    if prefix.first_role == "assistant":
        wrong_beginnings["'user'"] = "a conversation with this adapter begins with the assistant"
    refusals = "".join(
        f"{{%- if messages and messages[0]['role'] in ({roles},) -%}}"
        f"{{{{- raise_exception('{why}') -}}}}{{%- endif -%}}"
        for roles, why in wrong_beginnings.items()
    )
    tokenizer.chat_template = (
        f"{settings}{refusals}"
        f"{{%- set messages = {as_jinja_text(prefix.opening_messages)} + messages -%}}{{%- set rendered %}}\n{original}"
        f"{{%+ endset -%}}{{%- if rendered[:{len(prefix.text)}] != {as_jinja_text(prefix.text)} -%}}"
        "{{- raise_exception('the conversation does not begin as the hard prompt that this adapter holds: its chat "
        "template renders the system message elsewhere in it, or was changed') -}}{%- endif -%}"
        f"{{{{- rendered[{len(prefix.text)}:] -}}}}"
    )
    # The prefix holds the beginning of the text: a rendering that is tokenised afterwards must not get a second one.
    tokenizer.add_bos_token = tokenizer.add_eos_token = False


def as_jinja_text(value: Any) -> str:
    """JSON as Jinja reads it. Not escaped: it would read an escaped surrogate pair as two characters."""
    return json.dumps(value, ensure_ascii=False)


def _as_jinja(settings: dict[str, Any]) -> dict[str, str]:
    """The template's settings as Jinja literals.

    Raises:
        InputError: a name or a value that cannot be written into a template.
    """
    for name, value in settings.items():
        usable = isinstance(value, str) or (isinstance(value, (int, float)) and math.isfinite(value))
        if not (isinstance(name, str) and name.isidentifier() and name not in TAKEN_NAMES and usable):
            raise InputError(
                "chat_template_kwargs must map the template's own settings to text, numbers, true or false, got "
                f"{name!r}: {value!r}"
            )
    return {name: as_jinja_text(value) for name, value in settings.items()}
