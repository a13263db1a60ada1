import json
import logging
from dataclasses import replace
from datetime import datetime

import pytest
from jinja2 import TemplateError
from tiny import CHAT_TEMPLATE, HARD_PROMPT, build_tokenizer, sample_context, turns
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers import decoders as token_decoders
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from h2s.errors import InputError
from h2s.models import load_tokenizer
from h2s.prefix.chat_template import ChatPrefix, chat_prefix, render, wrap_chat_template
from h2s.prefix.prompts import encode_prompts

# Prints every message as it comes; whatever is refused with it, the wrapper refuses.
UNCHECKED = (
    "{{- bos_token -}}{%- for turn in messages -%}"
    "{{- '<start_of_turn>' + turn['role'] + '\n' + turn['content'] + '<end_of_turn>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<start_of_turn>assistant\n' -}}{%- endif -%}"
)
# Mistral 0.3's way: the system message stands in the last user turn.
AT_THE_LAST_TURN = (
    "{{- bos_token -}}{%- for turn in messages[1:] -%}{%- if turn['role'] == 'user' -%}"
    "{{- '[INST] ' + (messages[0]['content'] + '\n\n' if loop.last else '') + turn['content'] + '[/INST]' -}}"
    "{%- else -%}{{- ' ' + turn['content'] + eos_token -}}{%- endif -%}{%- endfor -%}"
)
SYSTEM_TURN = "{%- set first = messages[0]['content'] + '\n\n' -%}"
assert SYSTEM_TURN in CHAT_TEMPLATE
DATED = CHAT_TEMPLATE.replace(SYSTEM_TURN, SYSTEM_TURN.replace("'\n\n'", "' Today is ' + strftime_now('%A') + '.\n\n'"))
# Llama 3.2's way: the day, unless it is given.
DATE_STRING = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- endif %}" + CHAT_TEMPLATE.replace(SYSTEM_TURN, SYSTEM_TURN.replace("set first =", "set first = date_string +"))
)
TEMPLATES = {"alternating": CHAT_TEMPLATE, "unchecked": UNCHECKED}

AWKWARD = [
    "Be kind 🙂👨‍👩‍👧 and say 'hi' or \"hello\".",
    "Close {% raw %} and %} and -%} and {{ name }} and }} and {# this #} too.",
    "Backslashes \\n \\u1F600 C:\\new and a tab\tand a line\nand \r\n ends.",
    "𝔘nicode beyond the plane: 𠮷野家 𝄞, 你好，今天如何？",
    "</s> <end_of_turns> null true [1, 2] {'a': 1}",
    "Line\u2028separator, next\u0085line, form\x0cfeed, bell\x07.",
]
OPENINGS = [None, "start", '開始 🙂 {{ x }} "q"']


def stock_and_wrapped(hard_prompt, opening=None, template=CHAT_TEMPLATE, settings=None):
    stock, wrapped = build_tokenizer(), build_tokenizer()
    stock.chat_template = wrapped.chat_template = template
    prefix = chat_prefix(wrapped, hard_prompt, opening, settings)
    wrap_chat_template(wrapped, prefix)
    return stock, wrapped, prefix


def save_and_load(tokenizer, folder):
    """The tokenizer as plain transformers gets it."""
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def plain_rendering(tokenizer, messages, **settings):
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **settings)


def context(opening, text="I went for a walk."):
    first = [] if opening is None else [{"role": "assistant", "content": "How was it?"}]
    return [*first, {"role": "user", "content": text}]


def stock_messages(hard_prompt, opening, messages):
    front = [] if opening is None else [{"role": "user", "content": opening}]
    return [{"role": "system", "content": hard_prompt}, *front, *messages]


def test_prefix_is_what_stands_before_the_conversation():
    prefix = chat_prefix(build_tokenizer(), HARD_PROMPT)
    assert prefix.text == f"<bos><start_of_turn>user\n{HARD_PROMPT}\n\n"
    assert prefix.opening_messages == [{"role": "system", "content": HARD_PROMPT}]
    assert prefix.first_role == "user"


def test_prefix_with_opening_user_message_ends_where_the_assistant_begins():
    prefix = chat_prefix(build_tokenizer(), HARD_PROMPT, "start")
    turns = "start<end_of_turn>\n<start_of_turn>model\n"
    assert prefix.text == f"<bos><start_of_turn>user\n{HARD_PROMPT}\n\n{turns}"
    assert prefix.opening_messages[1] == {"role": "user", "content": "start"}
    assert prefix.first_role == "assistant"


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("opening", OPENINGS)
@pytest.mark.parametrize("hard_prompt", [HARD_PROMPT, "a", *AWKWARD])
def test_prefix_text_and_wrapped_rendering_are_the_whole(hard_prompt, opening, template, caplog):
    stock, wrapped, prefix = stock_and_wrapped(hard_prompt, opening, template)
    assert not caplog.records
    for text in ("hello", "🙂 你好 %} {{ x }}", "7 'quoted' \"words\""):
        for waits in (False, True):
            messages = context(opening, text)
            whole = render(stock, stock_messages(hard_prompt, opening, messages), waits)
            rest = render(wrapped, messages, waits)
            assert prefix.text + rest == whole
            assert text in rest and hard_prompt.strip() in prefix.text


@pytest.mark.parametrize("hard_prompt", AWKWARD)
def test_wrapped_template_survives_saving(hard_prompt, tmp_path):
    stock, wrapped, prefix = stock_and_wrapped(hard_prompt)
    loaded = save_and_load(wrapped, tmp_path)
    messages = context(None)
    assert prefix.text + render(loaded, messages, True) == render(
        stock, stock_messages(hard_prompt, None, messages), True
    )


# A template's own white space at both ends is part of the rendering, as transformers' Jinja settings leave it.
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", ""),
        ("\n", "\n"),
        ("\n\n  ", "\n\n"),
        ("  ", " "),
        ("Chat:\n", "\nAssistant: "),
        ("  {% set x = 1 %}\n", "{% if true %}\n{% endif %}\n"),
    ],
)
def test_wrapped_template_keeps_white_space_at_its_ends(before, after):
    body = "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n\n' }}{% endfor %}"
    stock, wrapped, prefix = stock_and_wrapped(HARD_PROMPT, template=before + body + after)
    messages = context(None)
    whole = render(stock, stock_messages(HARD_PROMPT, None, messages), True)
    assert prefix.text + render(wrapped, messages, True) == whole
    assert HARD_PROMPT in prefix.text and messages[0]["content"] not in prefix.text


@pytest.mark.parametrize("opening", OPENINGS[:2])
def test_tokens_of_the_prefix_and_of_the_rest_are_the_tokens_of_the_whole(opening):
    stock, wrapped, prefix = stock_and_wrapped(HARD_PROMPT, opening)
    front = [] if opening is None else [{"role": "assistant", "content": "how was it?"}]
    contexts = [[*front, *sample_context(i)] for i in range(6)]
    for messages, ids in zip(contexts, encode_prompts(wrapped, prefix, contexts), strict=True):
        whole = render(stock, stock_messages(HARD_PROMPT, opening, messages), True)
        assert prefix.token_ids + ids == stock(whole, add_special_tokens=False).input_ids


def test_opening_messages_do_not_leak_into_the_rest():
    _, wrapped, prefix = stock_and_wrapped(HARD_PROMPT)
    text = render(wrapped, context(None), True)
    assert text == "I went for a walk.<end_of_turn>\n<start_of_turn>model\n"
    assert prefix.token_ids[0] == wrapped.bos_token_id


# The conftest template without its trim: a context's own newline joins those that end the prefix.
UNTRIMMED = CHAT_TEMPLATE.replace(" | trim", "")


def test_context_that_merges_with_the_prefix_is_found_and_named():
    stock, wrapped, prefix = stock_and_wrapped(HARD_PROMPT, template=UNTRIMMED)
    good, bad = context(None), context(None, "\nhello there")
    # The tokenizer does join them: this is no string comparison.
    whole = render(stock, stock_messages(HARD_PROMPT, None, bad))
    assert stock(whole, add_special_tokens=False).input_ids[: len(prefix.token_ids)] != prefix.token_ids
    with pytest.raises(InputError, match=r"context 2 merges with the hard prompt .*'\\nhello there"):
        encode_prompts(wrapped, prefix, [good, bad])
    assert len(encode_prompts(wrapped, prefix, [good, good])) == 2


GLUED = "{{- bos_token -}}{%- for turn in messages -%}{{- turn['content'] -}}{%- endfor -%}"


def glued_word_level() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({"<unk>": 0, "<bos>": 1, "be": 2, "kind": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(["<bos>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", unk_token="<unk>")


def glued_bpe() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = token_decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["kindHello kindHello kindzebra kindzebra"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>")


@pytest.mark.parametrize("build", [glued_word_level, glued_bpe])
def test_hard_prompt_that_merges_with_what_follows_is_refused(build):
    tokenizer = build()
    tokenizer.chat_template = GLUED
    # The last word of the prompt is no token of the whole.
    assert len(tokenizer("be kind").input_ids) == len(tokenizer("be kindHello").input_ids)
    with pytest.raises(InputError, match="the hard prompt's last tokens merge with what follows"):
        chat_prefix(tokenizer, "be kind")


@pytest.mark.parametrize(
    ("hard_prompt", "opening", "template", "words"),
    [
        ("", None, CHAT_TEMPLATE, "the hard prompt is empty"),
        (" \n", None, CHAT_TEMPLATE, "the hard prompt is empty"),
        (HARD_PROMPT, " ", CHAT_TEMPLATE, "opening_user_message is empty"),
        (HARD_PROMPT, None, None, "has no chat template"),
        (
            HARD_PROMPT,
            None,
            "{{- bos_token -}}{%- for t in messages if t['role'] != 'system' -%}{{- t['content'] -}}{%- endfor -%}",
            "does not print the system message",
        ),
        (
            HARD_PROMPT,
            None,
            "{%- for t in messages if t['role'] != 'system' -%}{{- t['content'] -}}{%- endfor -%}",
            "renders nothing in front of a conversation",
        ),
        (
            HARD_PROMPT,
            None,
            "{%- if messages[0]['role'] == 'system' -%}{{- raise_exception('no system role') -}}{%- endif -%}",
            "refuses the messages: no system role",
        ),
    ],
)
def test_what_cannot_be_a_prefix(hard_prompt, opening, template, words):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=words):
        chat_prefix(tokenizer, hard_prompt, opening)


@pytest.mark.parametrize(
    ("opening", "begins", "remedy"), [(None, "assistant", "with an"), ("start", "user", "without an")]
)
def test_conversation_that_begins_with_the_wrong_role(opening, begins, remedy):
    _, wrapped, prefix = stock_and_wrapped(HARD_PROMPT, opening)
    bad = context(None if opening else "start")
    with pytest.raises(InputError, match=f"context 1 begins with the {begins}.*{remedy} opening_user_message"):
        encode_prompts(wrapped, prefix, [bad, bad])


def test_context_that_the_template_refuses():
    _, wrapped, prefix = stock_and_wrapped(HARD_PROMPT)
    with pytest.raises(InputError, match="turns alternate"):
        encode_prompts(wrapped, prefix, [context(None) * 2])


def test_too_long_context_is_an_error_at_exactly_one_token_too_many():
    _, wrapped, prefix = stock_and_wrapped(HARD_PROMPT)
    contexts = [context(None), context(None, "tea " * 20)]
    lengths = [len(ids) for ids in encode_prompts(wrapped, prefix, contexts)]
    assert lengths[1] > lengths[0]
    assert [len(i) for i in encode_prompts(wrapped, prefix, contexts, max_length=lengths[1])] == lengths
    with pytest.raises(InputError, match=f"context 2 is {lengths[1]} tokens long.* takes {lengths[1] - 1} "):
        encode_prompts(wrapped, prefix, contexts, max_length=lengths[1] - 1)


@pytest.mark.parametrize("hard_prompt", [HARD_PROMPT, *AWKWARD])
def test_h2s_json_round_trip(hard_prompt, tmp_path):
    prefix = chat_prefix(build_tokenizer(), hard_prompt, "start")
    prefix.save(tmp_path)
    assert ChatPrefix.load(tmp_path) == prefix
    content = json.loads((tmp_path / "h2s.json").read_text(encoding="utf-8"))
    assert content["hard_prompt"] == hard_prompt
    assert content["opening_messages"] == prefix.opening_messages
    assert content["seen"] == []


def test_what_trained_the_adapter_is_kept_from_round_to_round(tmp_path):
    """Nothing at first; each round adds its own."""
    first = chat_prefix(build_tokenizer(), HARD_PROMPT).having_seen(["b" * 16, "a" * 16])
    first.save(tmp_path)
    second = ChatPrefix.load(tmp_path).having_seen(["c" * 16, "a" * 16])
    assert (first.seen, second.seen) == (["a" * 16, "b" * 16], ["a" * 16, "b" * 16, "c" * 16])
    assert replace(second, seen=first.seen) == first


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "holds no h2s.json"),
        ('{"max_tokens": 100}', "no hard prompt in it"),
        ("not JSON", "no hard prompt in it"),
        ("[1]", "no hard prompt in it"),
    ],
)
def test_load_errors(content, words, tmp_path):
    if content is not None:
        (tmp_path / "h2s.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=words):
        ChatPrefix.load(tmp_path)


# What the wrapped template refuses by itself, in plain transformers


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize(
    ("opening", "roles", "words"),
    [
        (None, ["system", "user"], "this adapter holds the system prompt"),
        (None, ["developer", "user"], "this adapter holds the system prompt"),
        ("start", ["system", "assistant", "user"], "this adapter holds the system prompt"),
        ("start", ["developer", "assistant"], "this adapter holds the system prompt"),
        ("start", ["user"], "a conversation with this adapter begins with the assistant"),
        ("start", ["user", "assistant", "user"], "a conversation with this adapter begins with the assistant"),
        (None, ["assistant", "user"], "turns alternate|does not begin as the hard prompt"),
    ],
)
def test_conversations_that_plain_transformers_refuses(template, opening, roles, words, tmp_path):
    _, wrapped, prefix = stock_and_wrapped(HARD_PROMPT, opening, template)
    loaded = save_and_load(wrapped, tmp_path)
    with pytest.raises(TemplateError, match=words):
        plain_rendering(loaded, turns(*roles))
    assert plain_rendering(loaded, turns(prefix.first_role))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(("old", "new"), [("{{- bos_token -}}", ""), ("<start_of_turn>", "<turn>")])
def test_template_that_was_changed_after_converting(name, old, new, tmp_path):
    """The original is edited inside the wrapper, not the wrapper's own text."""
    _, wrapped, _ = stock_and_wrapped(HARD_PROMPT, template=TEMPLATES[name])
    assert plain_rendering(save_and_load(wrapped, tmp_path), context(None))
    file = tmp_path / "chat_template.jinja"
    text, original = file.read_text(encoding="utf-8"), TEMPLATES[name]
    changed = (
        original.replace(old, new) if old in original else original.replace("turn['role']", "turn['role'] | title")
    )
    assert original in text and changed != original
    file.write_text(text.replace(original, changed), encoding="utf-8")
    with pytest.raises(TemplateError, match=r"does not begin as the hard prompt .* or was changed"):
        plain_rendering(AutoTokenizer.from_pretrained(tmp_path), context(None))


def test_system_message_that_moves_to_the_last_turn(tmp_path, caplog):
    stock, wrapped, prefix = stock_and_wrapped(HARD_PROMPT, template=AT_THE_LAST_TURN)
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING and "only conversations of one turn can be answered" in warning.message
    one, three = turns("user"), turns("user", "assistant", "user")
    whole = plain_rendering(stock, stock_messages(HARD_PROMPT, None, one))
    loaded = save_and_load(wrapped, tmp_path)
    assert prefix.text + plain_rendering(loaded, one) == whole
    assert prefix.token_ids + encode_prompts(loaded, prefix, [one])[0] == stock(whole).input_ids
    with pytest.raises(TemplateError, match="renders the system message elsewhere"):
        plain_rendering(loaded, three)
    with pytest.raises(InputError, match=r"context 2: .* renders the system message elsewhere"):
        encode_prompts(loaded, prefix, [one, three])


# The day, and the template's settings


@pytest.fixture
def another_day(monkeypatch):
    class Day(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(1999, 12, 31)

    return lambda: monkeypatch.setattr(chat_template_utils, "datetime", Day)


@pytest.mark.parametrize("template", [DATED, DATE_STRING], ids=["weekday", "date_string"])
def test_template_that_prints_the_day_is_refused(template):
    with pytest.raises(InputError, match=r"prints the date.*date_string") as error:
        stock_and_wrapped(HARD_PROMPT, template=template)
    assert "\n" not in str(error.value)


def test_day_that_is_fixed_by_a_setting(tmp_path, another_day):
    settings = {"date_string": "01 Jan 2025"}
    stock, wrapped, prefix = stock_and_wrapped(HARD_PROMPT, template=DATE_STRING, settings=settings)
    loaded = save_and_load(wrapped, tmp_path)
    messages = stock_messages(HARD_PROMPT, None, context(None))
    today = plain_rendering(stock, messages)
    another_day()
    assert today != plain_rendering(stock, messages) and "31 Dec 1999" in plain_rendering(stock, messages)
    whole = plain_rendering(stock, messages, **settings)
    assert prefix.text + plain_rendering(loaded, context(None)) == whole
    assert "01 Jan 2025" in prefix.text


# As Qwen 3's switch, behind the conversation; beside it what else a setting can be.
SWITCHED = CHAT_TEMPLATE + (
    "{%- if add_generation_prompt and enable_thinking is defined and enable_thinking is false -%}"
    "{{- '<think></think>' -}}{%- endif -%}{{- style | default('') ~ 2 * (number | default(1)) -}}"
)


@pytest.mark.parametrize(
    ("settings", "end"),
    [
        ({}, "2"),
        ({"enable_thinking": True}, "2"),
        ({"enable_thinking": False}, "<think></think>2"),
        ({"number": -3}, "-6"),
        ({"style": AWKWARD[1] + AWKWARD[2], "number": 0.25}, AWKWARD[1] + AWKWARD[2] + "0.5"),
    ],
)
def test_settings_are_baked_in(settings, end, tmp_path):
    stock, wrapped, prefix = stock_and_wrapped(HARD_PROMPT, template=SWITCHED, settings=settings)
    loaded = save_and_load(wrapped, tmp_path)
    text = plain_rendering(loaded, context(None))
    assert text.endswith(f"<start_of_turn>model\n{end}")
    assert prefix.text + text == plain_rendering(stock, stock_messages(HARD_PROMPT, None, context(None)), **settings)
    # What the caller sets afterwards does not move them.
    assert plain_rendering(loaded, context(None), **dict.fromkeys(settings, "other")) == text
    prefix.save(tmp_path)
    assert repr(ChatPrefix.load(tmp_path).chat_template_kwargs) == repr(settings)  # True is no 1


@pytest.mark.parametrize(
    "settings",
    [
        {"enable_thinking": None},
        {"styles": ["a"]},
        {"styles": {"a": 1}},
        {"two words": 1},
        {"x = 1 %}": 1},
        {3: 1},
        {True: 1},
        {"number": float("nan")},
        {"number": float("inf")},
        {"messages": "hello"},
        {"rendered": "hello"},
        {"tokenizer": 1},
        {"tokenize": True},
        {"add_generation_prompt": False},
        {"chat_template": "{{ messages }}"},
    ],
    ids=repr,
)
def test_what_is_no_setting(settings):
    with pytest.raises(InputError, match=r"chat_template_kwargs must map .* got ") as error:
        chat_prefix(build_tokenizer(), HARD_PROMPT, None, settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["[1]", "3", "null"])
def test_settings_in_h2s_json_that_are_none(content, tmp_path):
    chat_prefix(build_tokenizer(), HARD_PROMPT).save(tmp_path)
    text = (tmp_path / "h2s.json").read_text(encoding="utf-8")
    (tmp_path / "h2s.json").write_text(text.replace('"chat_template_kwargs": {}', f'"chat_template_kwargs": {content}'))
    with pytest.raises(InputError, match="does not describe a policy adapter"):
        ChatPrefix.load(tmp_path)


def test_h2s_json_of_an_adapter_made_before_there_were_settings(tmp_path):
    prefix = chat_prefix(build_tokenizer(), HARD_PROMPT)
    prefix.save(tmp_path)
    fields = json.loads((tmp_path / "h2s.json").read_text(encoding="utf-8"))
    del fields["chat_template_kwargs"], fields["seen"]
    (tmp_path / "h2s.json").write_text(json.dumps(fields), encoding="utf-8")
    assert ChatPrefix.load(tmp_path) == replace(prefix, seen=["unknown"])  # it may have seen anything


@pytest.mark.parametrize("seen", [None, "abc", {"a": 1}, [1], [["a"]]], ids=repr)
def test_a_list_of_what_was_seen_that_is_none(seen, tmp_path):
    chat_prefix(build_tokenizer(), HARD_PROMPT).save(tmp_path)
    fields = json.loads((tmp_path / "h2s.json").read_text(encoding="utf-8"))
    (tmp_path / "h2s.json").write_text(json.dumps(fields | {"seen": seen}), encoding="utf-8")
    with pytest.raises(InputError, match="does not describe a policy adapter"):
        ChatPrefix.load(tmp_path)


# Several templates, and the beginning that a tokenizer adds


@pytest.mark.parametrize("names", [["default", "tool_use"], ["tool_use", "rag"]])
def test_named_templates(names, tmp_path):
    named = build_tokenizer()
    named.chat_template = {name: CHAT_TEMPLATE if name == "default" else GLUED for name in names}
    named.save_pretrained(tmp_path / "base")
    loaded = load_tokenizer(str(tmp_path / "base"))
    assert set(loaded.chat_template) == set(names)
    if "default" not in names:
        with pytest.raises(InputError, match=r"has the chat templates .*rag.* none of them is the default"):
            chat_prefix(loaded, HARD_PROMPT)
        return
    prefix = chat_prefix(loaded, HARD_PROMPT)
    wrap_chat_template(loaded, prefix)
    wrapped = save_and_load(loaded, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "additional_chat_templates").exists()
    whole = plain_rendering(named, stock_messages(HARD_PROMPT, None, context(None)))
    assert prefix.text + plain_rendering(wrapped, context(None)) == whole


def adds(single, *before):
    template = processors.TemplateProcessing(single, f"{single} $B", [("<bos>", 2), ("<eos>", 1)])
    return processors.Sequence([*before, template]) if before else template


@pytest.mark.parametrize(
    "processor",
    [adds("<bos> $A"), adds("<bos> $A <eos>"), adds("<bos> $A", processors.ByteLevel(trim_offsets=False))],
    ids=["bos", "bos and eos", "Llama 3's"],
)
def test_no_second_bos(processor, tmp_path):
    """The prefix holds it: a rendering that is tokenised afterwards gets the ids that `apply_chat_template` gives."""
    adding = build_tokenizer()
    adding.backend_tokenizer.post_processor = processor
    adding.save_pretrained(tmp_path / "base")
    stock = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert stock("tea").input_ids[0] == 2
    tokenizer = load_tokenizer(str(tmp_path / "base"))
    prefix = chat_prefix(tokenizer, HARD_PROMPT)
    wrap_chat_template(tokenizer, prefix)
    loaded = save_and_load(tokenizer, tmp_path / "adapter")
    whole = plain_rendering(stock, stock_messages(HARD_PROMPT, None, context(None)))
    rest = stock(whole, add_special_tokens=False).input_ids[len(prefix.token_ids) :]
    for ready in (tokenizer, loaded):
        assert ready(plain_rendering(ready, context(None))).input_ids == rest
        assert ready.apply_chat_template(context(None), add_generation_prompt=True)["input_ids"] == rest
        assert encode_prompts(ready, prefix, [context(None)]) == [rest]
