"""One cell: what it is taken for, and what it is refused for."""

import datetime
import json
import math

import numpy as np
import pandas as pd
import pytest

from h2s.data.cells import Stored, is_blank, label_words, names_in_turn, read_context, read_label, read_reply
from h2s.errors import InputError

USER = {"role": "user", "content": "What is tea?"}
MISSING = [
    None,
    math.nan,
    float("-nan"),
    np.float64("nan"),
    pd.NA,
    pd.NaT,
    np.datetime64("NaT"),
    "",
    " \n\t",
    "\u200b\ufeff",
    "\xa0",
]


@pytest.mark.parametrize("cell", MISSING, ids=repr)
def test_missing_of_every_kind(cell):
    assert is_blank(cell)
    for read, what in ((read_context, "context"), (read_reply, "response")):
        with pytest.raises(InputError, match=f"expected a {what}, got an empty cell"):
            read(cell)


@pytest.mark.parametrize("cell", ["nan", "NaN", "-nan", "<NA>", "NaT", "NULL", "null", "None", " none ", "NA", "\\N"])
def test_missing_as_a_program_writes_it(cell):
    for read in (read_context, read_reply):
        with pytest.raises(InputError, match="as programs write a missing value"):
            read(cell)


@pytest.mark.parametrize("cell", ["n/a", "na", "Nan is my name", "null and void", "0", "-", "[UNK]", "#REF", "# N/A"])
def test_short_replies_are_replies(cell):
    assert read_reply(cell) == cell


@pytest.mark.parametrize("cell", ["#REF!", "#N/A", "#DIV/0!", "#NAME?", "#SPILL!", " #VALUE! ", "Err:502"])
def test_errors_of_formulas(cell):
    for read in (read_context, read_reply):
        with pytest.raises(InputError, match=r"got the error .* of a formula"):
            read(cell)


@pytest.mark.parametrize("text", ["#N/A", "None", "nan"])
def test_a_cell_that_is_formatted_as_text_holds_a_text(text):
    assert read_reply(Stored(text, "@")) == text
    assert is_blank(Stored(" ", "@"))
    with pytest.raises(InputError):
        read_reply(Stored(text, "General"))


@pytest.mark.parametrize(
    ("value", "number_format", "shown"),
    [
        (42, "General", "42"),
        (42.0, "0", "42"),
        (0.5, "General", "0.5"),
        (-1.25, "@", "-1.25"),
        (99_999_999_999, "General", "99999999999"),
    ],
)
def test_a_number_is_what_the_workbook_shows(value, number_format, shown):
    assert read_reply(Stored(value, number_format)) == shown
    assert read_context(Stored(value, number_format)) == [{"role": "user", "content": shown}]


@pytest.mark.parametrize(
    ("value", "number_format"),
    [
        (0.5, "0%"),
        (1234567, "#,##0"),
        (0.1 + 0.2, "General"),  # shown as 0.3
        (886912345678, "General"),  # a telephone number, shown as 8.86912E+11
        (1e-7, "General"),
        (1 / 3, "0"),
        ("hello", ";;;"),
        ("hello", '"Dear "@'),
    ],
)
def test_what_is_shown_otherwise_is_refused(value, number_format):
    with pytest.raises(InputError, match=r"stores .* and shows it otherwise"):
        read_reply(Stored(value, number_format))


@pytest.mark.parametrize("value", [True, datetime.datetime(2024, 3, 4), datetime.time(3, 4)])
def test_what_a_program_made_of_a_text(value):
    """1:2 became a time, 3/4 a date."""
    with pytest.raises(InputError, match="format the cell as text"):
        read_reply(Stored(value, "General"))


RENDERED = [
    '"Human: hi\nAssistant: hello\nHuman: x"',
    json.dumps("Human: hi\n\nAssistant: hello"),
    "user\nhi\nassistant\nhello",
    "You said:\nhi\nChatGPT said:\nhello",
    "### Instruction:\nhi\n### Response:",
    "USER: hi ASSISTANT: hello",
    "問：嗨\n答：你好",
    "- User: hi\n- Assistant: hello",
    "1. User: hi\n2. Assistant: hello",
    "User (10:32): hi\nAssistant (10:33): hello",
    "Ｕｓｅｒ：hi\nＡｓｓｉｓｔａｎｔ：hello",
    "User: hi\\nAssistant: hello",
    "User: hi<br>Assistant: hello",
    "ChatMessage(role='user', content='hi')",
    "<user>hi</user>",
    "<｜User｜>hi",
    "<|header_start|>user<|header_end|>",
    "\n\nHuman: What is tea?\n\nAssistant:",
    "User: What is tea?\nAssistant: A drink.\nUser: And coffee?",
    "使用者：茶是什麼？\n助理：",
    "**User:** hi\n**Assistant:** ho",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<start_of_turn>user\nhi<end_of_turn>\n",
    "<|start_header_id|>user<|end_header_id|>\n\nhi",
    "<s>[INST] hi [/INST]",
    "<|user|>\nhi\n<|assistant|>",
    'messages=[{"role": "user", "content": "hi"}]',
    "role: 'user' {'role': 'user', 'content': 'hi'}",
    "conversations: [{'from': 'human', 'value': 'hi'}]",
]


@pytest.mark.parametrize("text", RENDERED)
def test_a_conversation_printed_as_text_is_refused(text):
    with pytest.raises(InputError, match=r"it looks like .*: give a list of"):
        read_context(text)


@pytest.mark.parametrize(
    "text",
    [
        "User: what is that?",
        "My assistant: he is kind.",
        "role-play a user",
        "Is an AI: good or bad?",
        "a [inst] b",
        "Customer: ACME\\nModel: X100\\nCan it be mended?",
        "Name: Ann\\nAge: 3\\nTown: Ulm",
        "a < b | c > d",
        '"Yes," she said. Why?',
        "Question: what is 2 + 2?\nA: 3\nB: 4\nAnswer:",
        "Sentence: fine\nLabel: good\nSentence: bad\nLabel:",
    ],
)
def test_a_message_that_only_mentions_them_is_a_message(text):
    assert read_context(text) == [{"role": "user", "content": text}]


def test_line_ends_are_alike():
    assert read_context("a\r\nb\rc") == read_context("a\nb\nc")
    assert read_reply("a\r\nb") == "a\nb"


def test_a_text_that_fills_its_cell_was_cut():
    assert read_reply("x" * 32_766)
    for cell, read in (
        ("x" * 32_767, read_reply),
        ("x" * 32_767, read_context),
        ("[{'role': 'user', 'content': '" + "x" * 32_737, read_context),
    ):
        assert len(cell) == 32_767
        with pytest.raises(InputError, match=r"the cell is full \(32,767 characters\) and was cut"):
            read(cell)


def test_labels_by_words():
    words = {label_words(word): label for word, label in {0: 0, "A": 0, "both bad": 2}.items()}
    for cell in ("A", " a ", 0, 0.0, Stored(0, "0%"), "0.0"):
        assert read_label(cell, words, "") == 0
    assert read_label("Both\n Bad", words, "") == 2
    for cell in ("c", True, False, Stored(True, "General"), 1):
        with pytest.raises(InputError, match="expected A or B, got"):
            read_label(cell, words, "A or B")


@pytest.mark.parametrize(
    ("cell", "word"),
    [
        ("１", 1),
        ("Ａ 較好", "A較好"),
        ("1\u200b", 1),
        ("1.00", 1),
        (1, 1.0),
        ("e\u0301gal", "\u00e9gal"),
        (True, "TRUE"),
    ],
)
def test_verdicts_are_compared_as_people_read_them(cell, word):
    assert read_label(cell, {label_words(word): 1}, "") == 1


def test_a_verdict_that_is_shown_otherwise():
    for shown_by in ('"B";"A";"A"', ";;;", "0;-0;;@"):
        with pytest.raises(InputError, match="stores 1 and shows it otherwise"):
            read_label(Stored(1, shown_by), {"1": 1}, "")
    assert read_label(Stored(1, "0.0"), {"1": 1}, "") == 1


def test_numbers_and_bytes_are_text():
    assert read_context(42) == [{"role": "user", "content": "42"}]
    assert read_reply("茶".encode()) == "茶"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Patient: hi\nDoctor: hello\nPatient: x", "Patient: and Doctor:"),
        ("User 1: hi\nUser 2: ho\nUser 1: x", "User 1: and User 2:"),
        ("Q: hi\nA: hello\nQ: x\nA:", "Q: and A:"),
        ("Q: hi\nA: hello", ""),
        ("Name: Ann\nAge: 3\nTown: Ulm\nName: Ben", ""),
        (["Q: "], ""),
        ("[{'role': 'user', 'content': '''Q: a\nA: b\nQ: c'}]", ""),
    ],
)
def test_names_that_take_turns(text, names):
    assert names_in_turn(text) == names
