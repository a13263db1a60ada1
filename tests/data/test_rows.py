import pytest

from h2s.data.rows import check_rows, each_file_once, in_column, tell_of_turns
from h2s.errors import InputError


def read(row):
    """A number, or the fault that the row says."""
    return in_column("n", int_of, row["n"])


def int_of(cell):
    if not isinstance(cell, int):
        raise InputError(f"no number: {cell}")
    return cell


def test_rows_that_can_be_used_come_in_order():
    assert check_rows("f", {3: {"n": 1}, 7: {"n": 2}}, read) == [1, 2]


def test_rows_of_one_fault_are_named_together():
    rows = {2: {"n": "a"}, 3: {"n": "b"}, 4: {"n": 1}, 5: {"n": "a"}}
    with pytest.raises(
        InputError, match=r"^f: 3 rows cannot be used: rows 2, 5, n: no number: a; row 3, n: no number: b$"
    ):
        check_rows("f", rows, read)
    with pytest.raises(InputError, match=r"^f, row 9, n: no number: x$"):
        check_rows("f", {9: {"n": "x"}}, read)
    with pytest.raises(InputError, match=r"^f: 12 rows .* rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, n: .*; and 2 more$"):
        check_rows("f", {n: {"n": "x"} for n in range(12)}, read)


def test_a_file_that_is_named_twice_comes_once(tmp_path):
    assert each_file_once(["b", "a", "./b"]) == ["b", "a"]
    assert each_file_once("a") == ["a"]
    with pytest.raises(InputError, match="path is empty"):
        each_file_once([])


def test_turns_are_told_once_a_file(caplog):
    turns = "Q: a\nA: b\nQ: c"
    tell_of_turns("f", {2: "hi", 5: turns, 6: turns})
    tell_of_turns("g", {2: "hi"})
    assert caplog.messages == [
        "f: 2 contexts have lines that take turns (Q: and A: in row 5); as text each is one user message"
    ]
