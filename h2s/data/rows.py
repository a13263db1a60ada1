"""Rows checked one by one, so that all that is wrong with a file is said at once."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from h2s.data.cells import names_in_turn
from h2s.data.tables import Rows
from h2s.errors import InputError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# So many bad rows are named at once.
NAMED_ROWS = 10


def each_file_once(path: str | Sequence[str]) -> list[str]:
    """Paths, a file that is named twice once.

    Raises:
        InputError: there is none.
    """
    paths: dict[str, str] = {}
    for name in [path] if isinstance(path, str) else path:
        paths.setdefault(os.path.realpath(name), name)
    if not paths:
        raise InputError("path is empty: name a file")
    return list(paths.values())


def in_column(column: str, read: Callable[[Any], T], cell: Any) -> T:
    """What `read` makes of a cell.

    Raises:
        InputError: it cannot be used; the column is named.
    """
    try:
        return read(cell)
    except InputError as error:
        raise InputError(f"{column}: {error}") from None


def check_rows(file: str, rows: Rows, read: Callable[[dict[str, Any]], T]) -> list[T]:
    """What `read` makes of each row.

    Raises:
        InputError: some rows cannot be used; the first of them are named.
    """
    values, bad = [], {}
    for number, row in rows.items():
        try:
            values.append(read(row))
        except InputError as error:
            bad[number] = str(error)
    if len(bad) == 1:
        ((number, why),) = bad.items()
        raise InputError(f"{file}, row {number}, {why}")
    if bad:
        reasons: dict[str, list[int]] = {}
        for number in list(bad)[:NAMED_ROWS]:
            reasons.setdefault(bad[number][:200], []).append(number)
        named = "; ".join(
            f"row{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}, {why}" for why, numbers in reasons.items()
        )
        more = f"; and {len(bad) - NAMED_ROWS} more" if len(bad) > NAMED_ROWS else ""
        raise InputError(f"{file}: {len(bad)} rows cannot be used: {named}{more}")
    return values


def tell_of_turns(file: str, contexts: Mapping[int, Any]) -> None:
    """Log texts that may be conversations: read as one user message, or given as lists of messages."""
    found = {number: names for number, cell in contexts.items() if (names := names_in_turn(cell))}
    if found:
        row, names = next(iter(found.items()))
        what = "%s: %d contexts have lines that take turns (%s in row %d); as text each is one user message"
        logger.warning(what, file, len(found), names, row)
