"""What a cell of a file holds, and what it is not: missing, an error, cut off, another thing than it shows."""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from h2s.data.messages import Messages, check_unicode, parse_messages
from h2s.errors import InputError

# What a cell of a spreadsheet holds at most; programs cut what is longer without a word.
FULL_CELL = 32_767
# Missing, as programs write it out into text (R's NA, MySQL's \N); "n/a" and "none so far" are a person's own.
MISSING = re.compile(r"-?nan|<na>|nat|null|none|(?-i:NA)|\\N", re.IGNORECASE)
ERROR = re.compile(r"#(?:REF|VALUE|DIV/0|NUM|NULL|SPILL|CALC|FIELD|BLOCKED|BUSY|ERROR)!|#NAME\?|#N/A|Err:\d{3}")
# Characters that show nothing; str.strip leaves them.
INVISIBLE = re.compile("[\u200b\u200c\u200d\u2060\ufeff]")
# Conversations that are already text, by a chat template's mark, ...
TEMPLATE_MARK = re.compile(
    r"[<‹][|｜][^<>|｜\n]{1,30}[|｜][>›]|</?(?:start_of_turn|end_of_turn|user|assistant|human)>|\[/?INST\]"
    r"|^### (?:Instruction|Response|Human|Assistant)\b",
    re.MULTILINE,
)
# ... by a message's fields, ...
ENCODED = re.compile(r"""["'](?:role|from)["']\s*:|\brole\s*[=:]\s*["']?(?:user|assistant)\b""", re.IGNORECASE)
# ... by both speakers' names at the beginnings of lines (on one line if in capitals), ...
_PERSON = "human|user|you said|usuario|utilisateur|使用者|用户|用戶|客戶|提問者|問"
_MACHINE = "assistant|ai|bot|chatbot|gpt|chatgpt|chatgpt said|助理|助手|機器人|客服|答"
_BEFORE, _AFTER = r"^[\s>*#\-•\"'\[(]*(?:\d+[.:)]\s*)?", r"(?:\s*\d+|\s*\([^)\n]*\))?[\"'\])*\s]*(?:[:：>]|-(?= )|$)"
SPEAKERS = [re.compile(f"{_BEFORE}({names}){_AFTER}", re.I | re.M) for names in (_PERSON, _MACHINE)]
ONE_LINE = re.compile(r"\b(?:USER|HUMAN): .*\b(?:ASSISTANT|AI):")
# Two names of any kind that take turns may be a conversation, or a prompt with examples: this is only told.
NAMED_LINE = re.compile(rf"{_BEFORE}([^\W\d_][\w ]{{0,20}}?)(?:\s*\([^)\n]*\))?[\"'\])*\s]*[:：]", re.M)


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
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        text = str(text)
    if not isinstance(text, str):
        return parse_messages(text)
    cut, begins = _cut(cell), text.lstrip()[:2]
    if begins[:1] not in ("[", "{") and begins not in ('"[', "'["):
        if cut:
            raise InputError(cut)
        _refuse_rendered(text)
    try:
        return parse_messages(text)
    except InputError as error:
        raise InputError(f"{error}; {cut}" if cut else str(error)) from None


def _refuse_rendered(text: str) -> None:
    lines = _lines(text)
    speakers = [found[1] for found in (speaker.search(lines) for speaker in SPEAKERS) if found]
    if mark := TEMPLATE_MARK.search(text) or ENCODED.search(lines) or ONE_LINE.search(lines):
        what = mark[0][:40]
    elif len(speakers) == 2:
        what = " and ".join(f"{name}:" for name in speakers)
    else:
        return
    raise InputError(
        f'it looks like a conversation printed as text ({what!r}): give a list of {{"role": …, "content": …}} (a list '
        "of one message where it is one)"
    )


def _lines(text: str) -> str:
    return re.sub(r"\\n|<br\s*/?>", "\n", unicodedata.normalize("NFKC", text))


def names_in_turn(cell: Any) -> str:
    """Two names that take turns at the beginnings of a text's lines, three times or more; none: an empty text."""
    text = cell.value if isinstance(cell, Stored) else cell
    is_text = isinstance(text, str) and text.lstrip()[:1] not in ("[", "{")
    names = NAMED_LINE.findall(_lines(text)) if is_text else []
    folded = [name.casefold() for name in names]
    in_turn = len(names) > 2 and folded[0] != folded[1] and folded == (folded[:2] * len(names))[: len(names)]
    return f"{names[0]}: and {names[1]}:" if in_turn else ""


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
    if cut := _cut(cell):
        raise InputError(cut)
    check_unicode(text)
    return text


def label_words(verdict: Any) -> str:
    """A verdict as it is compared: white space, case, widths and composition of characters apart; 1.0 is 1."""
    if isinstance(verdict, float) and verdict.is_integer():
        verdict = int(verdict)
    words = "".join(INVISIBLE.sub("", unicodedata.normalize("NFKC", str(verdict))).split()).casefold()
    return re.sub(r"(\d)\.0+", r"\1", words) if re.fullmatch(r"\d\.0+", words) else words


def is_unjudged(cell: Any) -> bool:
    """Whether a cell holds no verdict yet."""
    value = cell.value if isinstance(cell, Stored) else cell
    return is_blank(cell) or (isinstance(value, str) and bool(MISSING.fullmatch(value.strip())))


def read_label(cell: Any, labels: Mapping[str, int], expected: str) -> int:
    """A verdict: 0, 1, 2 or 3, by the words that mean it (as [`label_words`] gives them).

    Raises:
        InputError: it is none of them, which is `expected`, or is not shown as it is.
    """
    value = cell.value if isinstance(cell, Stored) else cell
    if isinstance(cell, Stored) and not isinstance(value, str) and re.search('[";]', cell.number_format):
        raise InputError(_shown_otherwise(cell))
    label = labels.get(label_words(value))
    if label is None:
        raise InputError(f"expected {expected}, got {value!r}")
    return label


def _text(cell: Any, what: str) -> Any:
    """The cell as it is shown, line ends alike.

    Raises:
        InputError: it is blank, an error, or shown otherwise.
    """
    if is_blank(cell):
        # A formula is empty until a program has saved its value, and so is what is merged with the cell beside it.
        raise InputError(f"expected {what}, got an empty cell (uncomputed formula? merged sideways?): give its text")
    declared_text = isinstance(cell, Stored) and isinstance(cell.value, str) and cell.number_format == "@"
    text = _shown(cell) if isinstance(cell, Stored) else cell
    if isinstance(text, bytes):  # parquet's binary columns
        text = text.decode("utf-8", "replace")
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
    raise InputError(_shown_otherwise(cell))


def _shown_otherwise(cell: Stored) -> str:
    return (
        f"the cell stores {cell.value!r} and shows it otherwise (by its format {cell.number_format!r}): format it as "
        "text, then write what it shall say"
    )


def _cut(cell: Any) -> str:
    """What to say of a text that fills a spreadsheet's cell, which counts UTF-16 units and \\r\\n as two."""
    text = cell.value if isinstance(cell, Stored) else cell
    if not isinstance(text, str) or FULL_CELL not in (len(text), len(text.encode("utf-16-le", "surrogatepass")) // 2):
        return ""
    return f"the cell is full ({FULL_CELL:,} characters) and was cut: keep such texts in json, jsonl or parquet"
