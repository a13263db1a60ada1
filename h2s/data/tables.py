"""People's files as rows of plain Python values: xlsx, csv, json, jsonl, parquet, data sets of the Hub."""

import json
import os
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

import pandas as pd
import pyarrow.parquet as pq
from datasets import Dataset, load_dataset

from h2s.errors import InputError, in_short

FORMATS = (".xlsx", ".csv", ".json", ".jsonl", ".parquet")
# What a compressed file may hold more than its own size: some 30,000 pairs of a sheet. A few KB can hold any number.
UNPACKED_MB = 32
# The first bytes of Office's old container, in which encrypted workbooks stand too.
OLE = bytes.fromhex("d0cf11e0a1b11ae1")
# What pandas, openpyxl, json and Arrow raise of a file that is not what its name says. Their errors of content are
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


def read_table(path: str, expected: str) -> pd.DataFrame:
    """Read a table of cells as they are: files by pandas and json, Hub data sets by `datasets.load_dataset`.

    Not files too: it takes brackets in a name for a pattern, makes numbers of a csv column of texts like 007, and an
    Arrow column cannot mix the forms that a context may have.

    Args:
        path: a file, or the name `owner/name` of a data set on the Hub (its train split).
        expected: what the caller needs, for the error.

    Returns:
        A frame of dtype object, whose lists and mappings are Python's own.

    Raises:
        InputError: there is no such file, or it is not what its name says.
    """
    file = Path(path)
    suffix = file.suffix.lower()
    exists = os.path.exists(path)  # False, too, for what cannot be a path
    is_hub_name = not exists and suffix not in FORMATS and path.count("/") == 1 and path[0] not in "./~"
    if not is_hub_name:
        if not exists:
            raise InputError(f"no such file: {path} (expected {expected})")
        if file.is_dir() or suffix not in FORMATS:
            raise InputError(f"{path} is not a {', '.join(FORMATS)} file (expected {expected})")
        if suffix == ".xlsx":
            _check_workbook(file, f"{path} cannot be read as .xlsx ({expected})")
    read = _read_hub if is_hub_name else READERS[suffix]
    try:
        return read(path)
    except READER_ERRORS as error:
        cause = in_short(error.__cause__ or error)
        raise InputError(f"{path} cannot be read as {suffix or 'a Hub data set'} ({expected}): {cause}") from error


def _check_workbook(file: Path, refusal: str) -> None:
    """Check that a file is a workbook at all (the zip reader's own words help nobody), and of a size to be read.

    Raises:
        InputError: it is not; the line begins with `refusal`.
    """
    with file.open("rb") as opened:
        begins = opened.read(len(OLE))
    if begins == OLE:
        raise InputError(f"{refusal}: it is encrypted or an old .xls: save it as .xlsx without a password")
    if not begins:
        raise InputError(f"{refusal}: it is empty (0 bytes): save or copy it again")
    if not zipfile.is_zipfile(file):
        raise InputError(f"{refusal}: it is no workbook, but another kind of file or cut off: save it as .xlsx")
    try:
        with zipfile.ZipFile(file) as parts:
            added = sum(part.file_size - part.compress_size for part in parts.infolist())  # pictures add nothing
    except READER_ERRORS as error:
        raise InputError(f"{refusal}: {in_short(error)}") from error
    if added > UNPACKED_MB * 2**20:
        raise InputError(f"{refusal}: it {_unpacks_to(added + file.stat().st_size)}")


def _unpacks_to(size: int) -> str:
    return f"unpacks to {size / 2**20:.0f} MB, more than the {UNPACKED_MB} MB that are read: save it as .csv or .jsonl"


def _read_xlsx(path: str) -> pd.DataFrame:
    with warnings.catch_warnings(action="ignore"):  # openpyxl's, on styles and lists that it leaves out
        return pd.read_excel(path, engine="openpyxl", dtype=object, keep_default_na=False)


def _read_csv(path: str) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def _read_json(path: str) -> pd.DataFrame:
    return _frame_of_objects(json.loads(Path(path).read_text(encoding="utf-8-sig")))


def _read_jsonl(path: str) -> pd.DataFrame:
    # Not splitlines: a JSON string may hold U+2028.
    lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    return _frame_of_objects([json.loads(line) for line in lines if line.strip()])


def _read_parquet(path: str) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    size = 0
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        index = [name for name in (schema.pandas_metadata or {}).get("index_columns", []) if isinstance(name, str)]
        columns = [name for name in schema.names if name not in index]
        if len(set(columns)) < len(columns):
            raise ValueError(f"two of its columns have one name: {', '.join(columns)}")
        for batch in file.iter_batches(batch_size=16, columns=columns):
            rows += batch.to_pylist()
            size += sum(len(str(row)) for row in rows[-len(batch) :])  # Arrow counts a repeated text once
            if size > UNPACKED_MB * 2**20:
                raise ValueError(f"it {_unpacks_to(size)}")
    return pd.DataFrame(rows, columns=columns, dtype=object)


def _read_hub(name: str) -> pd.DataFrame:
    return _plain_frame(load_dataset(name, split="train"))


READERS = {
    ".xlsx": _read_xlsx,
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _plain_frame(dataset: Dataset) -> pd.DataFrame:
    return pd.DataFrame(dataset.to_list(), columns=dataset.column_names, dtype=object)


def _frame_of_objects(items: Any) -> pd.DataFrame:
    if not isinstance(items, list) or not all(isinstance(i, dict) for i in items):
        raise ValueError("it is not a list of objects")
    return pd.DataFrame(items, dtype=object)


def first_row(path: str) -> int:
    """The number that a file's first row of cells has where people see it: a sheet's header is row 1."""
    return 2 if path.lower().endswith((".xlsx", ".csv")) else 1
