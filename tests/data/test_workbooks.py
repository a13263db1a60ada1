"""Worksheets as people see them: what is hidden, merged, spelt by escapes, or another program's."""

import logging
import re
import zipfile

import pytest
from openpyxl import Workbook, load_workbook

from h2s.data import workbooks
from h2s.data.cells import Stored
from h2s.errors import InputError


def read_worksheet(path, sheet=None, is_it=lambda cells: True):
    return workbooks.read_worksheet(path, sheet, is_it)


def save(folder, *rows, title="first"):
    """A workbook, open, and its path."""
    book = Workbook()
    book.active.title = title
    for row in rows:
        book.active.append(row)
    return book, str(folder / "book.xlsx")


def changed(path, change):
    """Another hand's workbook: each part by `change(name, content)`."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, change(name, content))
    return path


def test_rows_have_the_numbers_of_the_sheet(tmp_path):
    book, path = save(tmp_path)
    book.active["B3"], book.active["C5"] = "x", "y"
    book.save(path)
    none = [None] * 3
    assert read_worksheet(path) == {1: none, 2: none, 3: [None, "x", None], 4: none, 5: [None, None, "y"]}


def test_values_that_may_be_shown_otherwise_carry_their_format(tmp_path):
    book, path = save(tmp_path, ["text", 0.5, 7, True])
    book.active["B1"].number_format = "0%"
    book.active["A2"], book.active["A2"].number_format = "hidden", ";;;"
    book.active["B2"], book.active["B2"].number_format = "#N/A", "@"
    book.active["B2"].data_type = "s"
    book.save(path)
    first, second = read_worksheet(path).values()
    assert first == ["text", Stored(0.5, "0%"), Stored(7, "General"), Stored(True, "General")]
    assert second[:2] == [Stored("hidden", ";;;"), Stored("#N/A", "@")]


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        ("a_x000D_\nb", "a\r\nb"),
        ("caf_x00E9_", "café"),
        ("_x005F_x0041_", "_x0041_"),  # how a text that spells an escape is written
        ("_x005F_x005F_x005F_x0041_", "_x005F_x0041_"),
        ("_x0041__x0042_", "AB"),
        ("_x0041_x0042_", "Ax0042_"),  # they do not overlap
        ("_xD83D__xDE42_", "🙂"),
        ("snake_case_x_1", "snake_case_x_1"),
    ],
)
def test_escapes_are_the_characters_that_excel_shows(tmp_path, stored, shown):
    book, path = save(tmp_path, [stored])
    book.save(path)
    assert read_worksheet(path) == {1: [shown]}


def test_the_first_visible_worksheet_is_read_and_the_others_named(tmp_path, caplog):
    book, path = save(tmp_path, ["old"], ["old"], title="round 1")
    for title in ("round 2", "notes"):
        book.create_sheet(title).append([title])
        book[title].append([title])
    book.create_sheet("empty")
    book["round 1"].sheet_state = "hidden"
    book.save(path)
    assert read_worksheet(path)[1] == ["round 2"]
    (said,) = caplog.messages
    assert (
        said
        == f"{path}: the worksheet 'round 2' is read, not 'round 1' (hidden), 'notes' (for judgements sheet picks one)"
    )
    caplog.clear()
    assert read_worksheet(path, "round 1")[1] == ["old"]
    assert not caplog.messages
    with pytest.raises(
        InputError, match=r"no worksheet 'round', but 'round 1' \(hidden\), 'round 2', 'notes', 'empty'"
    ):
        read_worksheet(path, "round")


def test_hidden_rows_are_told(tmp_path, caplog):
    book, path = save(tmp_path, ["header"], ["a"], ["b"], ["c"])
    for row in (3, 4, 9):  # what is empty there does not count
        book.active.row_dimensions[row].hidden = True
    book.save(path)
    assert [cells[0] for cells in read_worksheet(path).values()] == ["header", "a", "b", "c"]
    assert caplog.messages == [f"{path}: 2 hidden rows are read like the others: delete them to leave them out"]


def test_merged_cells_hold_their_value_in_each_row(tmp_path, caplog):
    book, path = save(tmp_path, ["a", 1], [None, 2], [None, 3], ["b", 4])
    book.active.merge_cells("A1:A3")
    book.save(path)
    assert [cells[0] for cells in read_worksheet(path).values()] == ["a", "a", "a", "b"]
    assert "2 merged cells are read with the value that they show" in caplog.messages[0]


def test_an_error_value_stays_an_error(tmp_path):
    book, path = save(tmp_path, ["#REF!"])
    book.save(path)
    assert load_workbook(path).active["A1"].data_type == "e"
    assert read_worksheet(path) == {1: ["#REF!"]}


@pytest.mark.parametrize(
    ("parts", "what"),
    [
        (["mimetype", "content.xml"], "an OpenDocument spreadsheet"),
        (["Index/Document.iwa"], "a Numbers spreadsheet"),
        (["xl/workbook.bin"], "a binary workbook"),
        (["word/document.xml"], "a Word document"),
    ],
)
def test_other_programs_files(tmp_path, parts, what):
    path = tmp_path / "book.xlsx"
    with zipfile.ZipFile(path, "w") as archive:
        for part in parts:
            archive.writestr(part, "x")
    with pytest.raises(InputError, match=rf"it is {what}.*: save it as \.xlsx"):
        read_worksheet(str(path))


def test_the_lock_of_an_open_workbook(tmp_path):
    (tmp_path / "~$book.xlsx").write_bytes(b"\x05user" + b"\0" * 160)
    with pytest.raises(InputError, match=r"beside a workbook that is open: give the one without ~\$"):
        read_worksheet(str(tmp_path / "~$book.xlsx"))


def test_a_strict_workbook_is_named(tmp_path):
    book, path = save(tmp_path, ["a"])
    book.save(path)
    main = b"http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    changed(path, lambda _, content: content.replace(main, b"http://purl.oclc.org/ooxml/spreadsheetml/main"))
    with pytest.raises(InputError, match="it is a Strict Open XML workbook: save it as"):
        read_worksheet(path)


def test_what_openpyxl_cannot_read_names_a_remedy(tmp_path):
    """A bare <fill/>, as some exports write it: Excel opens it."""
    from h2s.data.tables import read_table

    book, path = save(tmp_path, ["a"], ["x"])
    book.save(path)
    changed(path, lambda _, c: re.sub(rb"<fills.*?</fills>", b'<fills count="2"><fill/><fill/></fills>', c, flags=re.S))
    with pytest.raises(InputError, match=r"cannot be read as \.xlsx .*: save it as \.xlsx"):
        read_table(path, "a table", ["a"])


@pytest.fixture(autouse=True)
def _heard(caplog):
    caplog.set_level(logging.INFO, "h2s")


def test_escapes_of_shared_texts(tmp_path):
    """As Excel and LibreOffice store them; openpyxl itself writes a text into its cell."""
    stored = ["_x005F_x0041_", "_x0041_", "_x005F_x005F_", "a_x000D_b", "plain"]
    book, path = save(tmp_path, stored)
    book.save(path)
    texts = "".join(f"<si><t>{text}</t></si>" for text in stored)
    kind = "application/vnd.openxmlformats-officedocument.spreadsheetml.sharedStrings+xml"
    link = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/sharedStrings"

    def share(name, content):
        text = content.decode() if name.endswith((".xml", ".rels")) else ""
        if name.endswith("sheet1.xml"):
            for number, value in enumerate(stored):
                text = re.sub(rf't="inlineStr"><is><t[^>]*>{value}</t></is>', f't="s"><v>{number}</v>', text)
            assert "inlineStr" not in text
        if name == "[Content_Types].xml" and kind not in text:
            text = text.replace(
                "</Types>", f'<Override PartName="/xl/sharedStrings.xml" ContentType="{kind}"/></Types>'
            )
        if name.endswith("workbook.xml.rels") and link not in text:
            shared = f'<Relationship Id="rId99" Type="{link}" Target="sharedStrings.xml"/></Relationships>'
            text = text.replace("</Relationships>", shared)
        return text.encode() if text else content

    changed(path, share)
    with zipfile.ZipFile(path) as archive:
        parts = {n: archive.read(n) for n in archive.namelist() if n != "xl/sharedStrings.xml"}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
        main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
        archive.writestr("xl/sharedStrings.xml", f'<sst xmlns="{main}">{texts}</sst>')
    assert read_worksheet(path) == {1: ["_x0041_", "A", "_x005F_", "a\rb", "plain"]}
