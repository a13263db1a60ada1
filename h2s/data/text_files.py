"""Text files: which encoding; the fields of a csv, its delimiter and its quotes."""

import csv
import io
import logging
import re
from pathlib import Path
from typing import Any

from charset_normalizer import from_bytes

from h2s.errors import InputError

logger = logging.getLogger(__name__)

csv.field_size_limit(2**31 - 1)  # a long conversation passes 131,072 characters
# What spreadsheet programs write where it is not UTF-8. Among all that there are, short texts in cp1252 are taken for
# its Baltic neighbour: 2 of 19 right, with these 19 of 19.
ENCODINGS = [
    *("utf_16", "utf_16_le", "utf_16_be", "utf_32"),
    *("big5", "gb18030", "cp932", "cp949", "cp1252", "cp1251"),
]
# A field as spreadsheets write one that shall not become a number: ="007".
FORMULA_TEXT = re.compile('="((?:[^"]|"")*)"')


def decode(path: str, encoding: str | None = None) -> str:
    """A file's text: UTF-8 where it is that, else what charset-normalizer finds, which is logged.

    Raises:
        InputError: it is not in `encoding`, or in none that is found.
    """
    data = Path(path).read_bytes()
    if encoding is None:
        try:
            text = data.decode("utf-8-sig")
            if "\0" not in text:  # as UTF-16 without its mark has them
                return text
        except UnicodeDecodeError:
            pass
        best = from_bytes(data, cp_isolation=ENCODINGS).best()
        if best is None:
            raise InputError("no encoding fits it: save it as UTF-8, or set encoding (big5, gbk, utf-16, say)")
        logger.warning("%s: read as %s (encoding overrides)", path, best.encoding)
        return str(best).removeprefix("\ufeff")
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except LookupError:
        raise InputError(f"encoding {encoding!r} is unknown: big5, gbk, utf-8 or utf-16, say") from None
    except ValueError as error:
        raise InputError(f"it is not in the encoding {encoding}: {error}") from None


def read_csv(path: str, header_name: str, encoding: str | None = None) -> dict[int, list[Any]]:
    """The fields of each record, by its number as spreadsheets count rows (blank lines count).

    Args:
        path: the file.
        header_name: a column; the delimiter is the one that makes it a field of the header.
        encoding: None: found.

    Raises:
        InputError: its bytes or quotes cannot be read, or a record has more fields than the header.
    """
    text = decode(path, encoding)
    # Not by csv.Sniffer: it takes the comma of a text for the one between fields.
    header = next((line for line in text.splitlines() if header_name.casefold() in line.casefold()), "")
    fields = {mark: next(csv.reader([header], delimiter=mark), []) for mark in ",;\t"}
    names = {mark: [name.strip().casefold() for name in fields[mark]] for mark in fields}
    delimiter = max(fields, key=lambda mark: (header_name.casefold() in names[mark], len(names[mark])))
    # In a quoted field every quote is doubled, so one before another character closes none: it was written otherwise.
    lone = rf'"(?!["{delimiter}\r\n]|$)'
    dialect: dict[str, Any] = {"delimiter": delimiter, "strict": True}
    if re.search(rf"\\{lone}", text):
        dialect |= {"escapechar": "\\", "doublequote": False}
        logger.warning("%s: its quotes are escaped by backslashes, and read so", path)
    if re.search(rf"(?m)(?:^|{delimiter}) +{lone}", text):
        dialect["skipinitialspace"] = True
    rows: dict[int, list[Any]] = {}
    reader = csv.reader(io.StringIO(text, newline=""), **dialect)
    try:
        for number, record in enumerate(reader, start=1):
            rows[number] = [_plain(field) for field in record]
    except csv.Error as error:
        raise InputError(f'row {len(rows) + 1}: {error}: a quote within a text is written twice ("")') from None
    return rows


def _plain(field: str) -> str:
    formula = FORMULA_TEXT.fullmatch(field)
    return formula[1].replace('""', '"') if formula else field
