"""Files of people to rows: xlsx, csv, json, jsonl, parquet, data sets of the Hub."""

import json
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import load_dataset

from h2s.errors import InputError

FORMATS = (".xlsx", ".csv", ".json", ".jsonl", ".parquet")


# The first bytes of Office's old container, in which encrypted workbooks stand too.
OLE = bytes.fromhex("d0cf11e0a1b11ae1")


def read_table(path: str, expected: str) -> pd.DataFrame:
    """Read a table of cells as they are: files by pandas and json, Hub data sets by `datasets.load_dataset`.

    Not files too: it takes brackets in a name for a pattern, makes numbers of a csv column of texts like 007, and an
    Arrow column cannot mix the forms that a context may have.

    Args:
        path: a file, or the name `owner/name` of a data set on the Hub (its train split).
        expected: what the caller needs, for the error.

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
    try:
        if is_hub_name:
            return load_dataset(path, split="train").to_pandas()
        if suffix == ".xlsx":
            _check_workbook(file)
            with warnings.catch_warnings(action="ignore"):  # openpyxl's, on styles and lists that it leaves out
                return pd.read_excel(file, engine="openpyxl", dtype=object, keep_default_na=False)
        if suffix == ".csv":
            return pd.read_csv(file, dtype=str, keep_default_na=False)
        if suffix == ".parquet":
            return pd.read_parquet(file)
        text = file.read_text(encoding="utf-8-sig")
        # Not splitlines: a JSON string may hold U+2028.
        items = json.loads(text) if suffix == ".json" else [json.loads(t) for t in text.split("\n") if t.strip()]
        return pd.DataFrame(_records(items), dtype=object)
    except Exception as error:  # whatever the reader raises, the user's file is what it could not read
        lines = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{path} cannot be read as {suffix or 'a Hub data set'} ({expected}): {lines[0]}") from error


def _check_workbook(file: Path) -> None:
    """Whether a workbook can be read at all: the zip reader's own words for it help nobody."""
    with file.open("rb") as opened:
        begins = opened.read(len(OLE))
    if begins == OLE:
        raise ValueError("it is encrypted or an old .xls: save it as .xlsx without a password")
    if not begins:
        raise ValueError("it is empty (0 bytes): save or copy it again")
    if not zipfile.is_zipfile(file):
        raise ValueError("it is no workbook, but another kind of file or cut off: save it as .xlsx")


def _records(items: Any) -> list[dict]:
    if not isinstance(items, list) or not all(isinstance(i, dict) for i in items):
        raise ValueError("it is not a list of objects")
    return items


def first_row(path: str) -> int:
    """The number that a file's first row of cells has where people see it: a sheet's header is row 1."""
    return 2 if path.lower().endswith((".xlsx", ".csv")) else 1
