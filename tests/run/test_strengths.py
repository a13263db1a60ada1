"""How far a prefix may go: what is read, what is refused. (As flags and in YAML: `test_arguments.py`.)"""

import pytest

from h2s.errors import InputError
from h2s.run.strengths import check_strength, read_strengths


def test_numbers_or_a_text_of_them():
    assert read_strengths("0.5, 1,1.5") == read_strengths([0.5, 1, 1.5]) == [0.5, 1, 1.5]
    for strength in (0, 1.5):
        check_strength(strength)


@pytest.mark.parametrize(
    ("strengths", "words"),
    [
        ("0.5,high", r"strengths must be numbers with commas between them \(0.5,1,1.5\), got '0.5,high'"),
        ("0.5,,1", "strengths must be numbers with commas"),
        ([], "strengths are none: leave them out"),
        ("", "strengths must be numbers with commas"),
        ("0.5;1", "strengths must be numbers with commas"),
        ("-0.5", "a strength must be a number from 0, the hard prompt, to 1.5 .*, got -0.5"),
        ("1,1.6", "a strength must be a number from 0, .*, got 1.6"),
        ("nan", "a strength must be a number from 0, .*, got nan"),
        ("1,0.5,1.0", "strengths must be given once each, got '1,0.5,1.0'"),
        ([0.5, 2], "a strength must be a number from 0, .*, got 2.0"),
    ],
)
def test_strengths_that_are_none(strengths, words):
    with pytest.raises(InputError, match=words):
        read_strengths(strengths)
