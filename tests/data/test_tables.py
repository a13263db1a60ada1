"""Files as rows of plain Python values: each format, and what is not what its name says."""

import pytest
from data.written import write_table

from h2s.data.tables import FORMATS, first_row, read_table
from h2s.errors import InputError

# Text that some reader might take for something else: an empty cell, a line's end, a number, a date, a formula.
ODD_TEXTS = [
    "NA",
    "N/A",
    "#N/A",
    "None",
    "null",
    "nan",
    "a\nb",
    "a\u2028b",
    "a\x85b",
    '"quoted", and, commas',
    "1.50",
    "007",
    "TRUE",
    "2024-01-02",
    "你好 🙂",
]


@pytest.mark.parametrize("suffix", FORMATS)
def test_text_comes_through_as_it_is(tmp_path, suffix):
    """Also where a whole column of it looks like numbers."""
    columns = {"text": ODD_TEXTS, "number": [f"00{n}" for n in range(len(ODD_TEXTS))]}
    table = read_table(write_table(tmp_path, suffix, columns), "a table")
    assert {name: list(table[name]) for name in table.columns} == columns


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_cells_are_pythons_own_all_the_way_down(tmp_path, suffix):
    cell = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    table = read_table(write_table(tmp_path, suffix, {"cell": [cell], "n": [3], "x": [0.5], "b": [True]}), "a table")
    assert table.loc[0].tolist() == [cell, 3, 0.5, True]
    assert [type(v) for v in table.loc[0]] == [list, int, float, bool]
    assert type(table["cell"][0][0]["content"]) is list


def test_numbers_beside_missing_ones_stay_whole(tmp_path):
    """A column of integers with a gap would be one of floats to pandas, and 2**53 + 1 another number."""
    table = read_table(write_table(tmp_path, ".json", {"n": [2**53 + 1, None, 2]}), "a table")
    assert table["n"].tolist() == [2**53 + 1, None, 2]


def test_file_name_with_brackets(tmp_path):
    """As browsers name a second download."""
    folder = tmp_path / "data [1]*"
    folder.mkdir()
    for suffix in FORMATS:
        assert read_table(write_table(folder, suffix, {"a": ["x"]}), "a table")["a"].tolist() == ["x"]


@pytest.mark.parametrize(("suffix", "text"), [("json", '[{"a": "x"}]'), ("jsonl", '{"a": "x"}'), ("csv", "a\nx\n")])
def test_byte_order_mark(tmp_path, suffix, text):
    """As Windows programs write UTF-8."""
    file = tmp_path / f"table.{suffix}"
    file.write_text("\ufeff" + text, encoding="utf-8")
    assert read_table(str(file), "a table").to_dict("records") == [{"a": "x"}]


def test_a_file_read_again_after_a_change_is_the_new_one(tmp_path):
    for text in ("one", "two"):
        assert read_table(write_table(tmp_path, ".parquet", {"a": [text]}), "a table")["a"].tolist() == [text]


def test_a_suffix_in_capitals(tmp_path):
    file = write_table(tmp_path, ".csv", {"a": ["x"]})
    (tmp_path / "table.csv").rename(tmp_path / "TABLE.CSV")
    assert read_table(file.replace("table.csv", "TABLE.CSV"), "a table")["a"].tolist() == ["x"]


@pytest.mark.parametrize("name", ["none.json", "none.xlsx", "owner/none.csv", "./owner/none", "/owner/none", "a/b/c"])
def test_no_such_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"no such file: {name} .expected a sheet"):
        read_table(name, "a sheet")


@pytest.mark.parametrize(
    ("suffix", "content", "words"),
    [
        (".json", "{", "cannot be read as .json"),
        (".json", '{"a": "x"}', "cannot be read as .json .*: it is not a list of objects"),
        (".json", '["x"]', "cannot be read as .json .*: it is not a list of objects"),
        (".jsonl", '{"a": "x"}\n{"a": "y', "cannot be read as .jsonl"),
        (".csv", "a\nx\ny,z\n", "cannot be read as .csv"),
        (".xlsx", "a,b\n", "cannot be read as .xlsx .*: it is no workbook"),
        (".parquet", "PAR1", "cannot be read as .parquet"),
        (".docx", "x", "is not a .xlsx, .csv, .json, .jsonl, .parquet file"),
    ],
)
def test_what_is_not_what_its_name_says(tmp_path, suffix, content, words):
    file = tmp_path / f"table{suffix}"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=rf"table{suffix} {words}") as error:
        read_table(str(file), "a table")
    assert "a table" in str(error.value) and str(error.value).isprintable()
    with pytest.raises(InputError, match=r"is not a \.xlsx"):
        read_table(str(tmp_path), "a table")


def test_rows_are_counted_as_people_see_them():
    """A sheet's header is row 1."""
    assert [first_row(f"a{suffix}") for suffix in FORMATS] == [2, 2, 1, 1, 1]
    assert first_row("owner/name") == 1 and first_row("A.XLSX") == 2
