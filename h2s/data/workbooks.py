"""A worksheet's cells as people see them."""

import io
import logging
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from openpyxl import Workbook, load_workbook
from openpyxl.worksheet.worksheet import Worksheet

from h2s.data.cells import Stored
from h2s.errors import InputError

logger = logging.getLogger(__name__)

# What a compressed file may hold more than its own size: some 30,000 pairs of a sheet. A few KB can hold any number.
UNPACKED_MB = 32
# The first bytes of Office's old container, in which encrypted workbooks stand too.
OLE = bytes.fromhex("d0cf11e0a1b11ae1")
SAVE = "save it as .xlsx (Excel Workbook) or .csv with the program that opens it"
# A part that only another program's file has.
OTHER_PROGRAMS = {
    "content.xml": "an OpenDocument spreadsheet (LibreOffice)",
    "Index/Document.iwa": "a Numbers spreadsheet",
    "xl/workbook.bin": "a binary workbook (.xlsb)",
    "word/document.xml": "a Word document",
}
STRICT = b"http://purl.oclc.org/ooxml/"
# A character as OOXML spells one (ECMA-376 part 1, 22.9.2.19): _x000D_ is a carriage return, _x005F_ an underscore.
ESCAPE = re.compile("_x([0-9A-Fa-f]{4})_")

SHARED_TEXTS = "xl/sharedStrings.xml"
# What openpyxl takes out of shared texts, and the same with a character of nobody's that keeps it from that.
STRIPPED, KEPT = b"x005F_", "x005\ue000F_".encode()

Grid = dict[int, list[Any]]


def unpacks_to(size: int) -> str:
    """The refusal of a file that holds too much."""
    return f"unpacks to {size / 2**20:.0f} MB, more than the {UNPACKED_MB} MB that are read: save it as .csv or .jsonl"


def check_workbook(file: Path) -> None:
    """Check that a file is a workbook at all (the zip reader's own words help nobody), and of a size to be read.

    Raises:
        InputError: it is not.
    """
    if file.name.startswith("~$"):
        raise InputError("it is what Excel keeps beside a workbook that is open: give the one without ~$")
    with file.open("rb") as opened:
        begins = opened.read(len(OLE))
    if begins == OLE:
        raise InputError("it is encrypted or an old .xls: save it as .xlsx without a password")
    if not begins:
        raise InputError("it is empty (0 bytes): save or copy it again")
    if not zipfile.is_zipfile(file):
        raise InputError(f"it is no workbook, but another kind of file or cut off: {SAVE}")
    with zipfile.ZipFile(file) as parts:
        added = sum(part.file_size - part.compress_size for part in parts.infolist())  # pictures add nothing
        names = parts.namelist()
        if added > UNPACKED_MB * 2**20:
            raise InputError(f"it {unpacks_to(added + file.stat().st_size)}")
        strict = "xl/workbook.xml" in names and STRICT in parts.read("xl/workbook.xml")
    for part, what in OTHER_PROGRAMS.items():
        if part in names:
            raise InputError(f"it is {what}: {SAVE}")
    if strict:
        raise InputError(f"it is a Strict Open XML workbook: {SAVE}")


def read_worksheet(path: str, sheet: str | None, is_it: Callable[[Grid], bool]) -> Grid:
    """The cells of a worksheet, by row.

    Merged cells hold their value in each of their rows. What was not read, or is hidden and read, is logged.

    Args:
        path: the workbook.
        sheet: the worksheet's name; None: the first visible one that `is_it` says yes to, else the first visible one.
        is_it: whether cells are those that are looked for.

    Raises:
        InputError: there is no such worksheet, or the file cannot be read.
    """
    check_workbook(Path(path))
    book = _open(path)
    visible = [s for s in book.worksheets if s.sheet_state == "visible"]
    grids = {s.title: _cells(s) for s in (visible if sheet is None else book.worksheets) if sheet in (None, s.title)}
    if not grids:
        wanted = "visible worksheet" if sheet is None else f"worksheet {sheet!r}"
        raise InputError(f"it has no {wanted}, but {_names(book.worksheets) or 'no worksheet at all'}")
    chosen = next((title for title, grid in grids.items() if is_it(grid)), next(iter(grids)))
    others = [s for s in book.worksheets if s.title != chosen and s.max_row > 1]
    if others and sheet is None:
        logger.warning(
            "%s: the worksheet %r is read, not %s (for judgements sheet picks one)", path, chosen, _names(others)
        )
    grid, of = grids[chosen], book[chosen]
    merged = sum((area.max_row - area.min_row) for area in of.merged_cells.ranges)
    hidden = sum(of.row_dimensions[n].hidden for n in grid if any(v is not None for v in grid[n]))
    if merged:
        logger.warning("%s: %d merged cells are read with the value that they show", path, merged)
    if hidden:
        logger.warning("%s: %d hidden rows are read like the others: delete them to leave them out", path, hidden)
    return grid


def worksheet_names(path: str) -> str:
    """The worksheets of a workbook that can be read, in words."""
    return _names(_open(path).worksheets)


def _names(sheets: Iterable[Worksheet]) -> str:
    return ", ".join(repr(s.title) + ("" if s.sheet_state == "visible" else " (hidden)") for s in sheets)


def _open(path: str) -> Workbook:
    with warnings.catch_warnings(action="ignore"):  # openpyxl's, on styles and lists that it leaves out
        return load_workbook(_unstripped(Path(path)), data_only=True)


def _unstripped(file: Path) -> Path | io.BytesIO:
    """The file, or a copy in memory whose shared texts openpyxl does not strip of `x005F_`, as it does.

    Without it `_x0041_` would stand for an A and for itself.
    """
    with zipfile.ZipFile(file) as parts:
        if SHARED_TEXTS not in parts.namelist() or STRIPPED not in parts.read(SHARED_TEXTS):
            return file
        copy = io.BytesIO()
        with zipfile.ZipFile(copy, "w") as changed:
            for name in parts.namelist():
                content = parts.read(name)
                changed.writestr(name, content.replace(STRIPPED, KEPT) if name == SHARED_TEXTS else content)
        return copy


def _cells(sheet: Worksheet) -> Grid:
    # From A1 on, wherever the table begins.
    grid = {number: [_value(cell) for cell in row] for number, row in enumerate(sheet.iter_rows(), start=1)}
    for area in sheet.merged_cells.ranges:
        for number in range(area.min_row + 1, area.max_row + 1):
            grid[number][area.min_col - 1] = grid[area.min_row][area.min_col - 1]
    return grid


def _value(cell: Any) -> Any:
    value, shown_by = cell.value, cell.number_format
    if isinstance(value, str):
        text = ESCAPE.sub(lambda escape: chr(int(escape[1], 16)), value.replace(KEPT.decode(), STRIPPED.decode()))
        # Halves of a character, spelt one by one, are that character.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        return text if shown_by == "General" else Stored(text, shown_by)
    return value if value is None else Stored(value, shown_by)
