import pytest

from h2s.data.messages import as_messages, conversation_id, parse_messages
from h2s.errors import InputError

USER = {"role": "user", "content": "hi there"}
ASSISTANT = {"role": "assistant", "content": "hello"}

# What one cell can be


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("hi there", [USER]),
        ("  hi there\n", [USER]),
        ([USER], [USER]),
        ([ASSISTANT, USER], [ASSISTANT, USER]),
        ('[{"role": "user", "content": "hi there"}]', [USER]),
        (' \n[{"role": "user", "content": "hi there"}]', [USER]),
        ("[{'role': 'user', 'content': 'hi there'}]", [USER]),
        ("[{'role': 'user', 'content': \"it's \\n \\u4f60\"}]", [{"role": "user", "content": "it's \n 你"}]),
        ('[{"role": "user", "content": "a\\u2028b \\ud83d\\ude42"}]', [{"role": "user", "content": "a\u2028b 🙂"}]),
        ([{"role": "user", "content": [{"type": "text", "text": "hi "}, {"type": "text", "text": "there"}]}], [USER]),
        ("[{'role': 'user', 'content': [{'type': 'text', 'text': 'hi there'}]}]", [USER]),
        ([{"role": "user", "content": "hi there", "name": "Ann"}], [USER]),
        ("(well) [then] {so}", [{"role": "user", "content": "(well) [then] {so}"}]),
        ("__import__('os')", [{"role": "user", "content": "__import__('os')"}]),
        ("NA", [{"role": "user", "content": "NA"}]),
        ("None", [{"role": "user", "content": "None"}]),
    ],
)
def test_forms_of_a_context(cell, expected):
    assert parse_messages(cell) == expected


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("[laughs] hello", "neither JSON nor a Python literal"),
        ("{hello}", "neither JSON nor a Python literal|list of messages"),
        ("[" * 100_000, "neither JSON nor a Python literal"),
        ("[open('x')]", "neither JSON nor a Python literal"),
        ('[{"role": "user", "content": "a", "content": "b"}]', "an object has the key 'content' twice"),
        ("[{'role': 'user', 'content': 'Where is my ord", r"does not end as a list, was it cut off\?: .*my ord"),
        ("[]", "non-empty list"),
        ([], "non-empty list"),
        (None, "non-empty list"),
        (float("nan"), "non-empty list"),
        (7, "non-empty list"),
        ({"role": "user", "content": "hi"}, "non-empty list"),
        (["hi"], "expected a message"),
        ([{"role": "user"}], "expected a message"),
        ([{"content": "hi"}], "expected a message"),
        ([{"role": "system", "content": "hi"}, USER], "must be 'user' or 'assistant', got 'system'"),
        ([{"role": "User", "content": "hi"}], "must be 'user' or 'assistant', got 'User'"),
        ([{"role": "user", "content": " \n"}], "non-empty text"),
        ([{"role": "user", "content": None}], "non-empty text"),
        ([{"role": "user", "content": 3}], "non-empty text"),
        ([{"role": "user", "content": []}], "non-empty text"),
        ([{"role": "user", "content": [{"type": "text", "text": " "}]}], "non-empty text"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "content parts"),
        ([{"role": "user", "content": [{"type": "text"}]}], "content parts"),
        ([{"role": "user", "content": ["hi"]}], "content parts"),
        ("", "non-empty text"),
        (r'[{"role": "user", "content": "half \ud83d a smile"}]', "half a character .*'.ud83d'.* write the text anew"),
        ("half \udc80 a smile", "half a character"),
        ([USER, USER], "two 'user' in a row"),
        ([USER, ASSISTANT, ASSISTANT, USER], "two 'assistant' in a row"),
        ([USER, ASSISTANT], "the last message must be the user's"),
    ],
)
def test_what_is_no_context(cell, words):
    with pytest.raises(InputError, match=words) as error:
        parse_messages(cell)
    assert len(str(error.value)) < 300 and str(error.value).isprintable()


def test_a_cell_is_never_evaluated(tmp_path):
    trap = tmp_path / "trap"
    with pytest.raises(InputError):
        parse_messages(f"[__import__('pathlib').Path({str(trap)!r}).touch()]")
    assert not trap.exists()


# What the Python API takes


@pytest.mark.parametrize(
    "text", ["hi there", " hi there\n", "[laughs] hello", '[{"role": "user", "content": "hi"}]', "{}"]
)
def test_text_is_one_user_message_whatever_it_begins_with(text):
    assert as_messages(text) == [{"role": "user", "content": text}]


def test_messages_are_checked_as_those_of_a_file():
    assert as_messages([ASSISTANT, USER]) == [ASSISTANT, USER]
    for conversation, words in (
        ([USER, ASSISTANT], "the last message must be the user's"),
        (" \n", "non-empty text"),
        ((USER,), "non-empty list"),
        (USER, "non-empty list"),
        (None, "non-empty list"),
        ("half \ud83d a smile", "half a character"),
    ):
        with pytest.raises(InputError, match=words):
            as_messages(conversation)


# Which conversation it is


def test_conversation_id_by_hand():
    # printf 'user\nhi there' | sha256sum
    assert conversation_id([USER]) == "285bdd5342662185"
    assert conversation_id([{"role": "user", "content": " hi there\n"}]) == "285bdd5342662185"
    # printf 'assistant\nWelcome!\nuser\nhi there' | sha256sum
    assert conversation_id([{"role": "assistant", "content": "Welcome!"}, USER]) == "f0cf135903936cd3"


def test_turns_of_one_conversation_share_their_id():
    turns = [USER, ASSISTANT, {"role": "user", "content": "I ran."}, ASSISTANT, {"role": "user", "content": "Bye."}]
    assert len({conversation_id(turns[:n]) for n in (1, 3, 5)}) == 1
    others = [[{"role": "user", "content": "hi There"}], [{"role": "assistant", "content": "hi there"}, USER]]
    assert conversation_id([USER]) not in {conversation_id(o) for o in others}


def test_one_greeting_for_all_is_no_conversation():
    """The assistant opens each with the same words; turns of one still belong together."""
    greeting = {"role": "assistant", "content": "How was your day?"}
    talks = [[greeting, {"role": "user", "content": f"Day {i}"}] for i in range(5)]
    assert len({conversation_id(t) for t in talks}) == 5
    assert conversation_id([*talks[0], ASSISTANT, USER]) == conversation_id(talks[0])


@pytest.mark.parametrize(
    "written",
    ["cafe\u0301 au lait,\nplease", "caf\u00e9 au lait,\r\nplease", " caf\u00e9  au\xa0lait,\r please\n"],
    ids=["decomposed", "line ends of a workbook", "spaces"],
)
def test_one_text_written_in_two_ways_is_one_conversation(written):
    """A sheet and a contexts file may spell the same conversation otherwise: each program saves text in its own way."""
    # printf 'user\ncafé au lait, please' | sha256sum
    assert conversation_id([{"role": "user", "content": written}]) == "71c3fc405e39842a"
