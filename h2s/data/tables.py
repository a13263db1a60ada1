"""People's files as rows of plain Python values: xlsx, csv, json, jsonl, parquet, data sets of the Hub."""

import json
import logging
import os
import struct
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

import pyarrow.parquet as pq
from datasets import load_dataset

from h2s.data.cells import INVISIBLE, Stored, is_blank
from h2s.data.messages import each_key_once
from h2s.data.text_files import decode, read_csv
from h2s.data.workbooks import SAVE, UNPACKED_MB, Grid, read_worksheet, unpacks_to, worksheet_names
from h2s.errors import InputError, in_short

logger = logging.getLogger(__name__)

FORMATS = (".xlsx", ".csv", ".tsv", ".json", ".jsonl", ".parquet")
GRIDS = (".xlsx", ".csv", ".tsv")
# What openpyxl, json and Arrow raise of a file that is not what its name says. Their errors of content are
# ValueErrors; openpyxl looks up and converts what a workbook's XML names without a check of its own.
READER_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    NotImplementedError,
    RecursionError,
    EOFError,
    ParseError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
)
# Titles and blank rows may stand above a header, in so many rows.
ABOVE_HEADER = 20

Rows = dict[int, dict[str, Any]]


def read_table(
    path: str, expected: str, wanted: Sequence[str], sheet: str | None = None, encoding: str | None = None
) -> Rows:
    """Read a table of cells as they are.

    Neither by `datasets.load_dataset` nor by pandas: they make numbers of a csv column of texts like 007, count rows
    otherwise than the file, move fields that do not fit the header, and know nothing of what a workbook hides.

    Args:
        path: a file, or the name `owner/name` of a data set on the Hub (its train split).
        expected: what the caller needs, for the error.
        wanted: columns that must be there; in a worksheet or csv the header is the row that holds them.
        sheet: the worksheet of a workbook; the first visible one by default.
        encoding: of a csv file; found by default.

    Returns:
        Rows that are not blank in every wanted column, by their number in the file as its own programs count (the
        first row of a worksheet or csv, the first line of jsonl, the first item otherwise is 1): cells by column, those
        of a workbook that it may show otherwise as [`Stored`] in wanted columns.

    Raises:
        InputError: there is no such file, it is not what its name says, or a wanted column is missing or there twice.
    """
    file = Path(path)
    suffix = file.suffix.lower()
    exists = os.path.exists(path)  # False, too, for what cannot be a path
    is_hub_name = not exists and suffix not in FORMATS and path.count("/") == 1 and path[0] not in "./~"
    if not is_hub_name:
        if not exists:
            raise InputError(f"no such file: {path} (expected {expected})")
        if file.is_dir() or suffix not in FORMATS:
            known = ", ".join(FORMATS)
            raise InputError(f"{path} is not a {known} file (expected {expected}): save it as one of them")
    kind = f"{path} cannot be read as {suffix or 'a Hub data set'} ({expected})"
    grid: Grid = {}
    items: list[tuple[int, Any]] = []
    try:
        if suffix == ".xlsx":
            grid = read_worksheet(path, sheet, lambda cells: _has(cells, wanted))
        elif suffix in GRIDS:
            grid = read_csv(path, wanted[0], encoding)
        else:
            items = _read_items(path, suffix)
            if not all(isinstance(item, dict) for _, item in items):
                raise InputError(f"it is not a list of objects with {', '.join(wanted)}")
    except InputError as error:
        raise InputError(f"{kind}: {error}") from error
    except READER_ERRORS as error:
        remedy = f": {SAVE}" if suffix == ".xlsx" else ""
        raise InputError(f"{kind}: {in_short(error.__cause__ or error)}{remedy}") from error
    try:
        columns, rows = _below_header(path, grid, wanted, suffix) if suffix in GRIDS else _by_key(items, wanted)
    except InputError as error:
        sheets = f" (its worksheets: {worksheet_names(path)})" if suffix == ".xlsx" else ""
        raise InputError(f"{path}: {error}{sheets}") from error
    return _without_blank_rows(path, columns, rows, wanted, suffix)


def _name(header: Any) -> str:
    """A header as people read it: without what is invisible, white space and composed characters alike."""
    value = header.value if isinstance(header, Stored) else header
    return " ".join(INVISIBLE.sub("", unicodedata.normalize("NFKC", "" if value is None else str(value))).split())


def _columns(names: Iterable[str], wanted: Sequence[str], where: str = "") -> list[str]:
    """Columns by their places: wanted ones by the name that is asked for, "" where there is no name of its own.

    Raises:
        InputError: a wanted column is missing, or there twice.
    """
    asked = {_name(name).casefold(): name for name in wanted}
    found = [asked.get(name.casefold(), name) for name in names]
    missing = [name for name in wanted if name not in found]
    if missing:
        heads = ", ".join(name for name in found if name)
        raise InputError(
            f"missing column {', '.join(missing)}{where}; found {heads or 'none'} (for judgements columns maps others)"
        )
    counts = Counter(found)
    for name in wanted:
        if counts[name] > 1:
            raise InputError(f"{counts[name]} columns are named {name}{where}: rename those that do not count")
    return [name if counts[name] == 1 else "" for name in found]


def _has(grid: Grid, wanted: Sequence[str]) -> bool:
    """Whether a row has all wanted columns."""
    asked = {_name(name).casefold() for name in wanted}
    return any(asked <= {_name(cell).casefold() for cell in cells} for cells in grid.values())


def _below_header(path: str, grid: Grid, wanted: Sequence[str], suffix: str) -> tuple[list[str], Rows]:
    """The columns and rows below a header, which is the row that holds most of the wanted columns."""
    asked = {_name(name).casefold() for name in wanted}
    filled = [number for number, cells in grid.items() if not all(map(is_blank, cells))][:ABOVE_HEADER]
    names = {number: [_name(cell) for cell in grid[number]] for number in filled}
    at = max(filled, key=lambda number: len(asked & {name.casefold() for name in names[number]}), default=0)
    columns = _columns(names.get(at, []), wanted, f" in row {at}" if at > 1 else "")
    if at > 1:
        logger.warning("%s: the header stands in row %d; what is above it is not read", path, at)
    rows = {}
    last = max((place for place, name in enumerate(names.get(at, []), start=1) if name), default=0)
    for number in (n for n in grid if n > at):
        cells = grid[number]
        if [_name(cell) for cell in cells] == names[at]:
            logger.warning("%s: row %d is the header once more and is left out", path, number)
            continue
        filled_to = max((place for place, cell in enumerate(cells, start=1) if not is_blank(cell)), default=0)
        if suffix != ".xlsx" and filled_to and not len(cells) >= last >= filled_to:
            raise InputError(
                f"row {number} has {len(cells)} fields, the header {last}: put a text that holds the delimiter or a "
                "line break in quotes"
            )
        rows[number] = dict(zip_longest(columns, cells[: len(columns)]))
    return columns, rows


def _by_key(items: list[tuple[int, Any]], wanted: Sequence[str]) -> tuple[list[str], Rows]:
    """The columns and rows of objects."""
    keys = list(dict.fromkeys(key for _, item in items for key in item))
    columns = dict(zip(keys, _columns(map(_name, keys), wanted), strict=True))
    return list(columns.values()), {number: {columns[k]: v for k, v in item.items()} for number, item in items}


def _without_blank_rows(path: str, columns: Sequence[str], rows: Rows, wanted: Sequence[str], suffix: str) -> Rows:
    """The rows with a cell in some wanted column, each with all columns.

    What else is left out is counted and logged, but for the blank rows that programs leave at a sheet's end.
    """
    left: Rows = {}
    without = at_end = 0
    for number, row in rows.items():
        cells = {name: row.get(name) for name in columns if name}
        if all(is_blank(cells[name]) for name in wanted):
            without += 1
            at_end = at_end + 1 if suffix in GRIDS and all(map(is_blank, cells.values())) else 0
            continue
        at_end = 0
        left[number] = {n: c.value if isinstance(c, Stored) and n not in wanted else c for n, c in cells.items()}
    if without := without - at_end:
        logger.warning("%s: %d rows hold nothing in %s and are left out", path, without, ", ".join(wanted))
    return left


def _read_items(path: str, suffix: str) -> list[tuple[int, Any]]:
    if suffix == ".parquet":
        return list(enumerate(_read_parquet(path), start=1))
    if suffix in (".json", ".jsonl"):
        return _read_json(path, lines=suffix == ".jsonl")
    return list(enumerate(load_dataset(path, split="train").to_list(), start=1))


def _read_json(path: str, lines: bool) -> list[tuple[int, Any]]:
    """The items of a JSON list, or of an object a line, whichever it is: the name may say the other."""
    text = decode(path)
    if not lines or text.lstrip()[:1] == "[":
        try:
            items = json.loads(text, object_pairs_hook=each_key_once)
        except json.JSONDecodeError as error:
            if error.msg != "Extra data" or text.lstrip()[:1] != "{":  # after an object another one begins
                raise
        else:
            if isinstance(items, list):
                return list(enumerate(items, start=1))
            raise InputError("it is not a list of objects")
    rows = []
    # Not splitlines: a JSON string may hold U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line, object_pairs_hook=each_key_once)
        except json.JSONDecodeError as error:
            raise InputError(f"line {number}, character {error.pos + 1}: {error.msg} (an object a line)") from error
        if not isinstance(item, dict):
            raise InputError(f"line {number}: expected an object, got {in_short(ValueError(item))[:40]}")
        rows.append((number, item))
    return rows


def _read_parquet(path: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    size = 0
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        index = [name for name in (schema.pandas_metadata or {}).get("index_columns", []) if isinstance(name, str)]
        columns = [name for name in schema.names if name not in index]
        if len(set(columns)) < len(columns):
            raise InputError(f"two of its columns have one name: {', '.join(columns)}")
        for batch in file.iter_batches(batch_size=16, columns=columns):
            rows += batch.to_pylist()
            size += sum(len(str(row)) for row in rows[-len(batch) :])  # Arrow counts a repeated text once
            if size > UNPACKED_MB * 2**20:
                raise InputError(f"it {unpacks_to(size)}")
    return rows
