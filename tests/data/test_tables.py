"""Files as rows of plain Python values: each format, and what is not what its name says."""

import os
import zipfile
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.written import write_table

from h2s.data.cells import Stored
from h2s.data.tables import FORMATS, GRIDS, read_table
from h2s.errors import InputError


def rows_of(path, *wanted):
    """Rows with a workbook's values as they are stored."""
    rows = read_table(path, "a table", wanted)
    return [{k: v.value if isinstance(v, Stored) else v for k, v in row.items()} for row in rows.values()]


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
    rows = rows_of(write_table(tmp_path, suffix, columns), "text", "number")
    assert {name: [row[name] for row in rows] for name in columns} == columns


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_cells_are_pythons_own_all_the_way_down(tmp_path, suffix):
    cell = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    (row,) = rows_of(write_table(tmp_path, suffix, {"cell": [cell], "n": [3], "x": [0.5], "b": [True]}), "cell")
    assert list(row.values()) == [cell, 3, 0.5, True]
    assert [type(v) for v in row.values()] == [list, int, float, bool]
    assert type(row["cell"][0]["content"]) is list


def test_numbers_beside_missing_ones_stay_whole(tmp_path):
    """A column of integers with a gap would be one of floats to pandas, and 2**53 + 1 another number."""
    rows = rows_of(write_table(tmp_path, ".json", {"a": ["x"] * 3, "n": [2**53 + 1, None, 2]}), "a")
    assert [row["n"] for row in rows] == [2**53 + 1, None, 2]


def test_file_name_with_brackets(tmp_path):
    """As browsers name a second download."""
    folder = tmp_path / "data [1]*"
    folder.mkdir()
    for suffix in FORMATS:
        assert rows_of(write_table(folder, suffix, {"a": ["x"]}), "a") == [{"a": "x"}]


@pytest.mark.parametrize(("suffix", "text"), [("json", '[{"a": "x"}]'), ("jsonl", '{"a": "x"}'), ("csv", "a\nx\n")])
def test_byte_order_mark(tmp_path, suffix, text):
    """As Windows programs write UTF-8."""
    file = tmp_path / f"table.{suffix}"
    file.write_text("\ufeff" + text, encoding="utf-8")
    assert rows_of(str(file), "a") == [{"a": "x"}]


def test_a_file_read_again_after_a_change_is_the_new_one(tmp_path):
    for text in ("one", "two"):
        assert rows_of(write_table(tmp_path, ".parquet", {"a": [text]}), "a") == [{"a": text}]


def test_a_suffix_in_capitals(tmp_path):
    file = write_table(tmp_path, ".csv", {"a": ["x"]})
    (tmp_path / "table.csv").rename(tmp_path / "TABLE.CSV")
    assert rows_of(file.replace("table.csv", "TABLE.CSV"), "a") == [{"a": "x"}]


@pytest.mark.parametrize("name", ["none.json", "none.xlsx", "owner/none.csv", "./owner/none", "/owner/none", "a/b/c"])
def test_no_such_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"no such file: {name} .expected a sheet"):
        read_table(name, "a sheet", ["a"])


@pytest.mark.parametrize(
    ("suffix", "content", "words"),
    [
        (".json", "{", "cannot be read as .json"),
        (".json", '{"a": ["x"]', "cannot be read as .json .*delimiter: line 1 column 12"),
        (".json", '[{"a": "x", "a": "y"}]', "cannot be read as .json .*: an object has the key 'a' twice"),
        (".json", '{"a": "x"}', "cannot be read as .json .*: it is not a list of objects"),
        (".json", '["x"]', "cannot be read as .json .*: it is not a list of objects"),
        (".jsonl", '{"a": "x"}\n{"a": "y', "cannot be read as .jsonl"),
        (".csv", "a\nx\ny,z\n", "row 3 has 2 fields, the header 1: put a text that holds"),
        (".csv", 'a\nx\n"y"z\n', "cannot be read as .csv .*: row 3: .*: a quote within a text is written twice"),
        (".xlsx", "a,b\n", "cannot be read as .xlsx .*: it is no workbook"),
        (".parquet", "PAR1", "cannot be read as .parquet"),
        (".docx", "x", "is not a .xlsx, .csv, .tsv, .json, .jsonl, .parquet file"),
    ],
)
def test_what_is_not_what_its_name_says(tmp_path, suffix, content, words):
    file = tmp_path / f"table{suffix}"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=rf"table{suffix}[: ]+{words}") as error:
        read_table(str(file), "a table", ["a"])
    assert str(error.value).isprintable()
    with pytest.raises(InputError, match=r"is not a \.xlsx"):
        read_table(str(tmp_path), "a table", ["a"])


def packed(folder, megabytes):
    """A small workbook whose sheet holds that much, in one-byte cells as spreadsheets write them."""
    file = write_table(folder, ".xlsx", {"a": ["x"]})
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (sheet,) = (name for name in parts if name.startswith("xl/worksheets/"))
    row = b'<row><c t="inlineStr"><is><t>' + b"x" * 1000 + b"</t></is></c></row>"
    rows = row * (megabytes * 2**20 // len(row)) + b"</sheetData>"
    parts[sheet] = parts[sheet].replace(b"</sheetData>", rows)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return file


def test_a_small_workbook_that_unpacks_to_much_is_refused_unread(tmp_path, monkeypatch):
    file = packed(tmp_path, 60)
    assert Path(file).stat().st_size < 2**18
    monkeypatch.setattr("h2s.data.workbooks.load_workbook", None)
    with pytest.raises(
        InputError, match=r"table.xlsx cannot be read as .xlsx \(a sheet\): it unpacks to 60 MB, more than "
    ):
        read_table(file, "a sheet", ["a"])


def test_a_workbook_of_many_rows_or_with_pictures_is_read(tmp_path):
    file = packed(tmp_path, 10)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("xl/media/image1.png", os.urandom(40 * 2**20), zipfile.ZIP_DEFLATED, 1)
    assert len(read_table(file, "a sheet", ["a"])) > 9000


@pytest.mark.parametrize(("rows", "refused"), [(2_000, False), (200_000, True)])
def test_a_small_parquet_that_unpacks_to_much_is_refused(tmp_path, rows, refused):
    """A text that is repeated is stored once: 900 bytes hold a gigabyte."""
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * 5000]))
    pq.write_table(pa.table({"a": repeated}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 4096
    if not refused:
        assert rows_of(str(tmp_path / "a.parquet"), "a") == [{"a": "x" * 5000}] * rows
        return
    with pytest.raises(
        InputError, match=r"a.parquet cannot be read as .parquet .*: it unpacks to 3\d MB, more than the"
    ):
        read_table(str(tmp_path / "a.parquet"), "a table", ["a"])


def test_columns_of_a_parquet(tmp_path):
    """What pandas keeps as a frame's index is no column; two of one name would be one."""
    file = str(tmp_path / "a.parquet")
    pd.DataFrame({"a": ["x", None], "b": [1, 2]}, index=pd.Index([5, 6], name="row")).to_parquet(file)
    assert rows_of(file, "b") == [{"a": "x", "b": 1}, {"a": None, "b": 2}]
    pq.write_table(pa.table([["x"], ["y"]], names=["a", "a"]), file)
    with pytest.raises(InputError, match="two of its columns have one name: a, a"):
        read_table(file, "a table", ["a"])


def test_rows_are_counted_as_people_see_them(tmp_path):
    """A sheet's header is row 1."""
    for suffix in FORMATS:
        numbers = list(read_table(write_table(tmp_path, suffix, {"a": ["x", "y"]}), "a table", ["a"]))
        assert numbers == ([2, 3] if suffix in GRIDS else [1, 2])
