"""One cell: what it is taken for, and what it is refused for."""

import datetime
import math

import numpy as np
import pandas as pd
import pytest

from h2s.data.cells import Stored, is_blank, read_context, read_label, read_reply
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


@pytest.mark.parametrize("cell", ["nan", "NaN", "-nan", "<NA>", "NaT", "NULL", "null", "None", " none "])
def test_missing_as_a_program_writes_it(cell):
    for read in (read_context, read_reply):
        with pytest.raises(InputError, match="as programs write a missing value"):
            read(cell)


@pytest.mark.parametrize("cell", ["NA", "n/a", "Nan is my name", "null and void", "0", "-", "[UNK]", "#REF", "# N/A"])
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
    ["User: what is that?", "My assistant: he is kind.", "role-play a user", "Is an AI: good or bad?", "a [inst] b"],
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
    words = {"0": 0, "a": 0, "both bad": 2}
    assert [read_label(c, words) for c in ("A", " a ", "Both\n Bad", 0, 0.0, Stored(0, "0%"), "0.0")] == [
        0,
        0,
        2,
        0,
        0,
        0,
        0,
    ]
    for cell in ("c", True, False, Stored(True, "General"), 1):
        with pytest.raises(InputError, match="expected one of 0, a, both bad, got"):
            read_label(cell, words)
