"""What a cell of a file holds, and what it is not: missing, an error, cut off, another thing than it shows."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from h2s.data.messages import Messages, check_unicode, parse_messages
from h2s.errors import InputError

# What a cell of a spreadsheet holds at most; programs cut what is longer without a word.
FULL_CELL = 32_767
# Missing, as programs write it out into text; not NA or None of a person's own, such as "n/a".
MISSING = re.compile("-?nan|<na>|nat|null|none", re.IGNORECASE)
ERROR = re.compile(r"#(?:REF|VALUE|DIV/0|NUM|NULL|SPILL|CALC|FIELD|BLOCKED|BUSY|ERROR)!|#NAME\?|#N/A|Err:\d{3}")
# Characters that show nothing; str.strip leaves them.
INVISIBLE = re.compile("[\u200b\u200c\u200d\u2060\ufeff]")
# Conversations that are already text: a template's marks, or both names at the beginnings of lines.
TEMPLATE_MARK = re.compile(r"<\|im_start\|>|<start_of_turn>|<\|start_header_id\|>|<\|(?:user|assistant)\|>|\[/?INST\]")
SPEAKERS = [
    re.compile(rf"^[ \t>*#]*(?:{names})[ \t*]*[:：]", re.IGNORECASE | re.MULTILINE)
    for names in (
        "human|user|customer|使用者|用户|用戶|提問者",
        "assistant|ai|bot|chatbot|model|gpt|chatgpt|助理|助手|機器人",
    )
]
ENCODED = re.compile(r"""["'](?:role|from)["']\s*:""")


@dataclass(frozen=True)
class Stored:
    """A workbook's value that may be shown as something else.

    Attributes:
        value: a number, truth value, date, time or text.
        number_format: how the workbook shows it, as Excel writes it (`General`, `0%`).
    """

    value: Any
    number_format: str


def is_blank(cell: Any) -> bool:
    """Whether a cell shows nothing: missing of every kind, or nothing but white space."""
    if isinstance(cell, Stored):
        cell = cell.value
    if isinstance(cell, str):
        return not INVISIBLE.sub("", cell).strip()
    return cell is None or (not isinstance(cell, (list, dict)) and is_missing(cell))


def is_missing(value: Any) -> bool:
    """Whether a scalar is none of pandas', NumPy's or Python's own: NA, NaT and NaN equal not even themselves."""
    try:
        return value is None or bool(value != value)
    except TypeError:  # pandas.NA is neither
        return True


def read_context(cell: Any) -> Messages:
    """One context: messages as [`parse_messages`] reads them, or a text that is one user message.

    Raises:
        InputError: it is neither.
    """
    text = _text(cell, "a context")
    if not isinstance(text, str):
        return parse_messages(cell)
    cut = _cut(text)
    if text.lstrip()[:1] not in ("[", "{", '"', "'"):
        if cut:
            raise InputError(cut)
        _refuse_rendered(text)
    try:
        return parse_messages(text)
    except InputError as error:
        raise InputError(f"{error}; {cut}" if cut else str(error)) from None


def _refuse_rendered(text: str) -> None:
    mark = TEMPLATE_MARK.search(text)
    names = [found[0].strip() for found in (s.search(text) for s in SPEAKERS) if found]
    what = repr(mark[0]) if mark else " and ".join(map(repr, names)) if len(names) == 2 else ""
    if not what and not ENCODED.search(text):
        return
    looks = f"a conversation printed as text ({what})" if what else "an encoded conversation, but begins like text"
    raise InputError(
        f'it looks like {looks}: give a list of {{"role": …, "content": …}} (a list of one message where it is one)'
    )


def read_reply(cell: Any) -> str:
    """The text of a reply. A reply such as 42 is a number to a spreadsheet program.

    Raises:
        InputError: there is none, or another than the cell shows.
    """
    text = _text(cell, "a response")
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        text = str(text)
    if not isinstance(text, str):
        raise InputError(f"expected the text of a response, got {text!r}: format the cell as text, then fill it in")
    if cut := _cut(text):
        raise InputError(cut)
    check_unicode(text)
    return text


def read_label(cell: Any, labels: Mapping[str, int]) -> int:
    """A verdict: 0, 1, 2 or 3, by the words that mean it (in lower case, white space as one space).

    Raises:
        InputError: it is none of them.
    """
    value = cell.value if isinstance(cell, Stored) else cell
    text = " ".join(str(value).split()).casefold()
    label = labels.get(text, labels.get(text.removesuffix(".0")))
    if label is None or isinstance(value, bool):
        words = [*list(labels)[:4], "…"] if len(labels) > 4 else labels
        raise InputError(f"expected one of {', '.join(words)}, got {value!r}: labels maps other verdicts")
    return label


def _text(cell: Any, what: str) -> Any:
    """The cell as it is shown, line ends alike.

    Raises:
        InputError: it is blank, an error, or shown otherwise.
    """
    if is_blank(cell):
        # A formula is empty until a spreadsheet program has saved its value.
        raise InputError(f"expected {what}, got an empty cell (or an uncomputed formula): give its text")
    declared_text = isinstance(cell, Stored) and isinstance(cell.value, str) and cell.number_format == "@"
    text = _shown(cell) if isinstance(cell, Stored) else cell
    if not isinstance(text, str):
        return text
    if ERROR.fullmatch(text.strip()) and not declared_text:
        raise InputError(f"expected {what}, got the error {text.strip()} of a formula: give its text")
    if MISSING.fullmatch(text.strip()) and not declared_text:
        raise InputError(f"expected {what}, got {text.strip()!r}, as programs write a missing value: give its text")
    return re.sub(r"\r\n?", "\n", text)  # Excel ends lines with \n, some of its like with \r\n


def _shown(cell: Stored) -> Any:
    """A text or number as a workbook shows it.

    Raises:
        InputError: it shows it rounded, in another form, as nothing.
    """
    value, shown_by = cell.value, cell.number_format
    if isinstance(value, str) and (shown_by == "@" or "@" not in shown_by) and shown_by != ";;;":
        return value  # formats of numbers leave it alone
    if not isinstance(value, (int, float, str)) or isinstance(value, bool):
        return value
    if not isinstance(value, str) and shown_by in ("General", "@", "0") and abs(value) < 1e11:
        text = f"{value:.11g}"  # General shows about as many digits
        if float(text) == value and "e" not in text:
            return text
    raise InputError(
        f"the cell stores {value!r} and shows it otherwise (by its format {shown_by!r}): format it as text, then write "
        "what it shall say"
    )


def _cut(text: str) -> str:
    """What to say of a text that fills a spreadsheet's cell."""
    if len(text) != FULL_CELL:
        return ""
    return f"the cell is full ({FULL_CELL:,} characters) and was cut: keep such texts in json, jsonl or parquet"
