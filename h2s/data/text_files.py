"""Text files: which encoding; the fields of a csv, its delimiter and its quotes."""

import csv
import io
import logging
import re
from pathlib import Path
from typing import Any

from charset_normalizer import CharsetMatch, from_bytes

from h2s.errors import InputError

logger = logging.getLogger(__name__)

csv.field_size_limit(2**31 - 1)  # a long conversation passes 131,072 characters
# What spreadsheet programs write where it is not UTF-8; among all that there are, short texts are taken for others.
WIDE = ["utf_16", "utf_16_le", "utf_16_be", "utf_32"]
EAST_ASIAN = ["big5", "gb18030", "cp932", "cp949"]
WESTERN = ["cp1252", "cp1251"]
# A field as spreadsheets write one that shall not become a number: ="007".
FORMULA_TEXT = re.compile('="((?:[^"]|"")*)"')


def decode(path: str, encoding: str | None = None) -> str:
    """A file's text: UTF-8 where it is that, else what charset-normalizer finds, which is logged.

    Raises:
        InputError: it is not in `encoding`, or in none that is found.
    """
    data = Path(path).read_bytes()
    if encoding is not None:
        try:
            return data.decode(encoding).removeprefix("\ufeff")
        except LookupError:
            raise InputError(f"encoding {encoding!r} is unknown: big5, gbk, utf-8 or utf-16, say") from None
        except ValueError as error:
            raise InputError(f"it is not in the encoding {encoding}: {error}") from None
    text = data.decode("utf-8-sig", "replace")
    broken = text.count("\ufffd") - data.count("\ufffd".encode())
    if broken == 0 and "\0" not in text:  # as UTF-16 without its mark has them
        return text
    if "\0" not in text and 3 * broken <= sum(ord(c) > 127 for c in text) - broken:
        line = text[: text.index("\ufffd")].count("\n") + 1
        raise InputError(f"it is UTF-8, but line {line} holds a broken character: mend it there and save it as UTF-8")
    found = _found(data, WIDE if "\0" in text else [*EAST_ASIAN, *WESTERN])
    if found is None:
        raise InputError("no encoding fits it: save it as UTF-8")
    logger.warning("%s: read as %s (for judgements encoding overrides)", path, found.encoding)
    return str(found).removeprefix("\ufeff")


def _found(data: bytes, encodings: list[str]) -> CharsetMatch | None:
    """What charset-normalizer finds, but for what it makes of a few letters: a pair of bytes fits some sign always."""
    best = from_bytes(data, cp_isolation=encodings).best()
    if best is None or best.encoding in WIDE:
        return best
    text, others = str(best), []
    if best.encoding in EAST_ASIAN and not re.search(r"[^\x00-\x7f]{2}", text):
        others = WESTERN
    elif best.encoding == "cp949" and re.search("[\u4e00-\u9fff\uf900-\ufaff]", text):  # Hanja
        others = [name for name in encodings if name != "cp949"]
    elif best.encoding == "cp1251" and not re.search("[\u0400-\u04ff]{3}", text):
        others = [name for name in encodings if name != "cp1251"]
    return _found(data, others) if others and others != encodings else best


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
    delimiter = ""
    if asked := re.match(r"sep=(.)\r?\n", text):  # Excel obeys the line and does not show it
        delimiter, text = asked[1], text[asked.end() :]
    delimiter = delimiter or _delimiter(text, header_name)
    # In a quoted field every quote is doubled, so one before another character closes none: it was written otherwise.
    lone = rf'"(?!["{re.escape(delimiter)}\r\n]|$)'
    dialect: dict[str, Any] = {"delimiter": delimiter, "strict": True}
    lines = [line for line in text.splitlines() if line.strip()]
    if (
        delimiter == "\t"
        and '"' not in lines[0]
        and '""' not in text
        and len({line.count("\t") for line in lines}) == 1
    ):
        dialect["quoting"] = csv.QUOTE_NONE  # a quote is a quote
    elif re.search(rf"\\{lone}", text):
        dialect |= {"escapechar": "\\", "doublequote": False}
        logger.warning("%s: its quotes are escaped by backslashes, and read so", path)
        # Of quotes, line ends and backslashes alone: \d and \n are a text's own.
        text = re.sub(r'\\(\\|"|\r?\n)|\\', lambda found: found[0] if found[1] else r"\\", text)
    if re.search(rf"(?m)(?:^|{re.escape(delimiter)}) +{lone}", text):
        dialect["skipinitialspace"] = True
    rows: dict[int, list[Any]] = {}
    reader = csv.reader(io.StringIO(text, newline=""), **dialect)
    try:
        for number, record in enumerate(reader, start=1):
            rows[number] = [_plain(field) for field in record]
    except csv.Error as error:
        raise InputError(f'row {len(rows) + 1}: {error}: a quote within a text is written twice ("")') from None
    return rows


def _delimiter(text: str, header_name: str) -> str:
    """The one that makes the name a field of a line. (csv.Sniffer takes the comma of a text for the one between.)"""
    wanted, best = header_name.casefold(), (False, 0, ",")
    for line in text.splitlines()[:50]:
        for mark in ",;\t":
            names = [name.strip(" \ufeff").casefold() for name in next(csv.reader([line], delimiter=mark), [])]
            best = max(best, (wanted in names, len(names), mark), key=lambda found: found[:2])
    return best[2]


def _plain(field: str) -> str:
    formula = FORMULA_TEXT.fullmatch(field)
    return formula[1].replace('""', '"') if formula else field
