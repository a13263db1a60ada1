import json

import pytest
from tiny import CHAT_TEMPLATE, HARD_PROMPT, build_tokenizer, sample_context, save_gemma
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers import decoders as token_decoders
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from h2s.errors import InputError
from h2s.prefix.chat_template import ChatPrefix, chat_prefix, encode_prompts, render, save_tokenizer, wrap_chat_template

AWKWARD = [
    "Be kind 🙂👨‍👩‍👧 and say 'hi' or \"hello\".",
    "Close {% raw %} and %} and -%} and {{ name }} and }} and {# this #} too.",
    "Backslashes \\n \\u1F600 C:\\new and a tab\tand a line\nand \r\n ends.",
    "𝔘nicode beyond the plane: 𠮷野家 𝄞, 你好，今天如何？",
    "</s> <end_of_turns> null true [1, 2] {'a': 1}",
    "Line\u2028separator, next\u0085line, form\x0cfeed, bell\x07.",
]
OPENINGS = [None, "start", '開始 🙂 {{ x }} "q"']


def stock_and_wrapped(hard_prompt, opening=None, template=CHAT_TEMPLATE):
    stock, wrapped = build_tokenizer(), build_tokenizer()
    stock.chat_template = wrapped.chat_template = template
    prefix = chat_prefix(wrapped, hard_prompt, opening)
    wrap_chat_template(wrapped, prefix)
    return stock, wrapped, prefix


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


@pytest.mark.parametrize("opening", OPENINGS)
@pytest.mark.parametrize("hard_prompt", [HARD_PROMPT, "a", *AWKWARD])
def test_prefix_text_and_wrapped_rendering_are_the_whole(hard_prompt, opening):
    stock, wrapped, prefix = stock_and_wrapped(hard_prompt, opening)
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
    wrapped.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
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


@pytest.mark.parametrize(("opening", "begins", "remedy"), [(None, "assistant", "set"), ("start", "user", "leave out")])
def test_conversation_that_begins_with_the_wrong_role(opening, begins, remedy):
    _, wrapped, prefix = stock_and_wrapped(HARD_PROMPT, opening)
    good, bad = context(opening), context(None if opening else "start")
    with pytest.raises(InputError, match=f"context 2 begins with the {begins}.*{remedy} opening_user_message"):
        encode_prompts(wrapped, prefix, [good, bad])


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


@pytest.mark.parametrize("extra", [0, 1, 3])
def test_saved_tokenizer_has_no_more_entries_than_the_embeddings(extra, tmp_path):
    save_gemma(tmp_path / "model", extra=extra)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    rows = len(tokenizer) - extra
    save_tokenizer(tokenizer, tmp_path / "saved", rows)
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert len(saved) == rows
    assert max(saved.get_vocab().values()) == rows - 1
    text = "<bos>how was it, 你好 🙂<end_of_turn>"
    assert saved(text).input_ids == tokenizer(text).input_ids
    assert saved.pad_token_id == tokenizer.pad_token_id and saved.eos_token_id == tokenizer.eos_token_id


def test_tokenizer_whose_own_vocabulary_is_too_large_is_refused(tmp_path):
    tokenizer = build_tokenizer(extra=1)
    with pytest.raises(InputError, match=f"{len(tokenizer) - 1} entries for {len(tokenizer) - 3} embedding rows"):
        save_tokenizer(tokenizer, tmp_path, len(tokenizer) - 3)
