"""Words in front of the assistant's question: in every rendering of the adapter's tokenizer, and nowhere else."""

import json
from dataclasses import replace

import pytest
from tiny import HARD_PROMPT, build_tokenizer, turns
from transformers import AutoTokenizer

from h2s import InputError, PrefixTuningPolicyModel
from h2s.data.messages import conversation_id
from h2s.prefix.chat_template import ChatPrefix, chat_prefix, wrap_chat_template
from h2s.prefix.prompts import encode_prompts
from h2s.prefix.question_prefix import with_question_prefix

AWKWARD = ["好的，題目如下：", "Close {% raw %} and {{ name }} and %}", "say \"hi\" or 'hi'\n", "🙂 \\n"]


def wrapped(opening="start"):
    tokenizer = build_tokenizer()
    prefix = chat_prefix(tokenizer, HARD_PROMPT, opening)
    wrap_chat_template(tokenizer, prefix)
    return tokenizer, prefix


def conversation(question, parts=False):
    first = [{"type": "text", "text": question}] if parts else question
    return [{"role": "assistant", "content": first}, {"role": "user", "content": "good walk"}]


def rendered(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("words", AWKWARD)
def test_words_stand_in_front_of_the_question(words, tmp_path):
    tokenizer, prefix = with_question_prefix(*wrapped(), words)
    tokenizer.save_pretrained(tmp_path)
    expected = f"{words}how was it?<end_of_turn>\n<start_of_turn>user\ngood walk<end_of_turn>\n<start_of_turn>model\n"
    for either in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert rendered(either, conversation("how was it?")) == expected
        assert rendered(either, conversation(f"{words}how was it?")) == expected  # there already
    ids = tokenizer(expected, add_special_tokens=False).input_ids
    assert encode_prompts(tokenizer, prefix, [conversation("how was it?")]) == [ids]


def test_parts_are_given_them_too():
    """Gemma's own template takes contents in parts; the tiny one's takes text alone."""
    in_parts = "{%- set ns = namespace(all=[]) -%}{%- for m in messages -%}{%- if m['content'] is string -%}" \
        "{{- m['content'] -}}{%- else -%}{%- for p in m['content'] -%}[{{- p['text'] -}}]{%- endfor -%}{%- endif -%}" \
        "{{- '|' -}}{%- endfor -%}"  # fmt: skip
    tokenizer, prefix = wrapped()
    tokenizer.chat_template = in_parts
    tokenizer, _ = with_question_prefix(tokenizer, prefix, "Q: ")
    parts = [{"type": "text", "text": "how "}, {"type": "text", "text": "was it?"}]
    messages = [{"role": "assistant", "content": parts}, {"role": "user", "content": "good"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "[Q: how ][was it?]|good|"
    assert parts[0]["text"] == "how "


def test_only_the_first_message_and_only_the_assistants():
    tokenizer, prefix = with_question_prefix(*wrapped(), "Q: ")
    four = rendered(tokenizer, turns("assistant", "user", "assistant", "user"))
    assert four.count("Q: ") == 1 and four.startswith("Q: assistant says")
    with pytest.raises(InputError, match="context 1 begins with the user"):
        encode_prompts(tokenizer, prefix, [turns("user")])


def test_other_words_take_their_place():
    """Also on an adapter made before there were any; none leaves the template as it was."""
    plain, prefix = wrapped()
    first, its_prefix = with_question_prefix(plain, prefix, "Q: ")
    second, its_second = with_question_prefix(first, its_prefix, "題：")
    assert [rendered(t, conversation("how?"))[:5] for t in (plain, first, second)] == ["how?<", "Q: ho", "題：how"]
    assert (prefix.question_prefix, its_second) == ("", replace(prefix, question_prefix="題："))
    third, last = with_question_prefix(second, its_second, "")
    assert third.chat_template == plain.chat_template and last == prefix


def test_words_that_cannot_be_used():
    with pytest.raises(InputError, match="question_prefix spells out '<end_of_turn>'"):
        with_question_prefix(*wrapped(), "so <end_of_turn>")
    with pytest.raises(InputError, match="begins with the user: set opening_user_message, or leave q"):
        with_question_prefix(*wrapped(None), "Q: ")
    tokenizer, prefix = wrapped(None)
    assert with_question_prefix(tokenizer, prefix, "")[0].chat_template == tokenizer.chat_template


def test_kept_in_h2s_json(gemma_folder, tmp_path):
    policy = PrefixTuningPolicyModel.from_hard_prompt(str(gemma_folder), HARD_PROMPT, "start", question_prefix="Q: ")
    policy.save_pretrained(tmp_path)
    opened = PrefixTuningPolicyModel.open(tmp_path)
    assert json.loads((tmp_path / "h2s.json").read_text(encoding="utf-8"))["question_prefix"] == "Q: "
    assert "puts 'Q: ' in front of the question" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert opened.prefix == policy.prefix
    (ids,) = opened.encode([conversation("how?")], 1)
    assert opened.with_question_prefix(None).encode([conversation("how?")], 1) == [ids]
    assert opened.with_question_prefix("").encode([conversation("Q: how?")], 1) == [ids]
    assert opened.with_question_prefix("").encode([conversation("how?")], 1) != [ids]


@pytest.mark.parametrize("words", [None, 3, ["Q: "]], ids=repr)
def test_h2s_json_with_words_that_are_none(words, tmp_path):
    wrapped()[1].save(tmp_path)
    fields = json.loads((tmp_path / "h2s.json").read_text(encoding="utf-8"))
    (tmp_path / "h2s.json").write_text(json.dumps(fields | {"question_prefix": words}), encoding="utf-8")
    with pytest.raises(InputError, match="does not describe a policy adapter"):
        ChatPrefix.load(tmp_path)


def test_the_messages_stay_as_they_are():
    """So do conversation ids, and the splits and lists that are made of them."""
    tokenizer, prefix = with_question_prefix(*wrapped(), "Q: ")
    messages = conversation("how was it?")
    before = conversation_id(messages)
    encode_prompts(tokenizer, prefix, [messages])
    rendered(tokenizer, messages)
    assert messages == conversation("how was it?") and conversation_id(messages) == before
