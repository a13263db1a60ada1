"""Soft against hard before people's eyes: a sheet that does not say which side is which, and what they said.

The sheet has the judgement sheet's own columns, so `train_reward.py` reads it once `human_eval` is filled in. The key
stands in a file of its own: `{"seed", "soft_side", "rows"}`, `soft_side` the column of the soft prompt's reply a row,
`rows` a digest of each row's texts, so that rows may be sorted or left out.
"""

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from openpyxl import Workbook
from openpyxl.styles import Alignment, Font
from openpyxl.worksheet.datavalidation import DataValidation

from h2s.data.datasets import BOTH_POOR, COLUMNS, LABELS, POLICY_BETTER, REFERENCE_BETTER, TIE, read_judgements
from h2s.data.messages import Messages, conversation_id, parse_messages
from h2s.data.tables import read_table
from h2s.errors import InputError
from h2s.report.intervals import share_text, sign_test_text

SHEET, KEY = "blinded.xlsx", "blinded.key.json"
# What XML cannot hold; openpyxl's own list lacks the last three, and a file that holds them cannot be opened.
ILLEGAL_CHARACTERS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


CELL = 32_767  # characters; openpyxl cuts what is longer without a word
SIDES = ("policy_response", "reference_response")


MEANINGS = {
    POLICY_BETTER: "the reply in column B (policy_response) is better",
    REFERENCE_BETTER: "the reply in column C (reference_response) is better",
    BOTH_POOR: "both are poor",
    TIE: "both are good, or equally good",
}
INSTRUCTIONS = (
    "How to judge",
    "Each row of the first sheet is a conversation (column A) and two replies to its last message (columns B and C).",
    "Read all three, then choose in column D, human_eval:",
    *(f"{label}  {meaning}" for label, meaning in MEANINGS.items()),
    "Judge each row by itself and fill in every row. Which column holds whose reply was drawn by chance, row by row.",
    "Do not change the texts: a row is found again by them. Sorting rows is fine.",
)


def write_blinded_sheet(table: pd.DataFrame, folder: str | Path, seed: int) -> tuple[Path, Path]:
    """Write `blinded.xlsx` (first worksheet to be judged, second the instructions) and `blinded.key.json`.

    Args:
        table: a row a context with `prompt` (messages) and the replies `soft` and `hard`.
        folder: where to.
        seed: draws the sides.

    Returns:
        The paths of both.
    """
    sides = random.Random(seed)
    book = Workbook()
    sheet = book.active
    sheet.title = "judgements"
    sheet.append(list(COLUMNS))
    soft_sides, digests = [], []
    for row, (prompt, soft, hard) in enumerate(
        zip(table["prompt"], table["soft"], table["hard"], strict=True), start=2
    ):
        soft_first = sides.random() < 0.5
        soft_sides.append(SIDES[0] if soft_first else SIDES[1])
        first, second = (soft, hard) if soft_first else (hard, soft)
        texts = [cell_text(text) for text in (_as_json(prompt), first, second)]
        digests.append(_digest(texts))
        for column, text in enumerate(texts, start=1):
            cell = sheet.cell(row, column, text)
            # A reply that begins with "=" is text, not a formula.
            cell.data_type = "s"
            cell.alignment = Alignment(wrap_text=True, vertical="top")
    for letter, width in zip("ABCD", (60, 50, 50, 14), strict=True):
        sheet.column_dimensions[letter].width = width
        sheet[f"{letter}1"].font = Font(bold=True)
    sheet.freeze_panes = "A2"
    choices = DataValidation(type="list", formula1=f'"{",".join(map(str, MEANINGS))}"', allow_blank=True)
    choices.showErrorMessage = choices.showInputMessage = True
    choices.errorTitle, choices.error = "human_eval", "Choose 0, 1, 2 or 3."
    choices.promptTitle = "human_eval"
    choices.prompt = "0 B is better, 1 C is better, 2 both are poor, 3 tie or both good"
    sheet.add_data_validation(choices)
    choices.add(f"D2:D{len(table) + 1}")
    page = book.create_sheet("instructions")
    page.column_dimensions["A"].width = 110
    for line in INSTRUCTIONS:
        page.append([line])
    page["A1"].font = Font(bold=True)
    path, key_path = Path(folder) / SHEET, Path(folder) / KEY
    book.save(path)
    key = {"seed": seed, "soft_side": soft_sides, "rows": digests}
    key_path.write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")
    return path, key_path


def check_fits_cells(prompts: Iterable[Messages]) -> None:
    """Check that each context fits into a cell: cut, it would be no conversation any more.

    Raises:
        InputError: one does not, named by its place from 1.
    """
    for number, prompt in enumerate(prompts, start=1):
        length = len(_as_json(prompt))
        if length > CELL:
            raise InputError(
                f"context {number} has {length} characters as JSON, and a cell of the blinded sheet holds {CELL}: "
                "shorten it or leave it out"
            )


def cell_text(text: str) -> str:
    """Text as a cell can hold it, never empty."""
    text = ILLEGAL_CHARACTERS.sub("", text)[:CELL]
    return text if text.strip() else "(no text)"


def _as_json(prompt: Messages) -> str:
    return json.dumps(prompt, ensure_ascii=False)


def _digest(texts: list[str]) -> str:
    # Excel ends lines with \n, some of its like with \r\n, and XML cannot tell a lone \r from \n.
    joined = "\x1f".join(re.sub(r"\r\n?", "\n", text).strip() for text in texts)
    return hashlib.sha256(joined.encode("utf-8", "replace")).hexdigest()[:16]


def read_key(sheet: str | Path) -> dict[str, Any]:
    """The key of a blinded sheet: `NAME.key.json` beside `NAME.xlsx`.

    Raises:
        InputError: it is missing or is not one.
    """
    path = Path(sheet).with_suffix(".key.json")
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
        if len(key["soft_side"]) == len(key["rows"]) and set(key["soft_side"]) <= set(SIDES):
            return key
    except OSError as error:
        raise InputError(f"no key {path} beside {sheet} ({error.strerror}): compare.py wrote both") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise InputError(f"{path} is not the key of a blinded sheet: expected soft_side and rows of equal length")


def people_verdict(sheet: str) -> str:
    """What people said of a filled-in sheet, by its key, as Markdown.

    Raises:
        InputError: the sheet is not filled in, or its rows are not those of the key.
    """
    key = read_key(sheet)
    read_judgements(sheet, need_direction=False)  # every row is checked as for training
    soft_side = dict(zip(key["rows"], key["soft_side"], strict=True))
    counts: Counter[str] = Counter()
    wins, conversations = [], []
    for number, row in read_table(sheet, "a filled-in blinded sheet", COLUMNS).items():
        *texts, label = (row[column] for column in COLUMNS)
        label = getattr(label, "value", label)
        side = soft_side.get(_digest([str(text) for text in texts]))
        if side is None:
            raise InputError(f"{sheet}, row {number}: not a row of the key: its texts were changed")
        label = int(float(label))
        if texts[1] == texts[2]:
            winner = LABELS[TIE]  # equal replies: no side is soft's
        elif label in (POLICY_BETTER, REFERENCE_BETTER):
            winner = "soft" if SIDES[label] == side else "hard"
        else:
            winner = LABELS[label]
        counts[winner] += 1
        wins.append({"soft": 1.0, "hard": 0.0}.get(winner, 0.5))
        conversations.append(conversation_id(parse_messages(str(texts[0]))))
    lines = ["| people's verdict | rows |", "|---|---|"]
    lines += [f"| {name} | {counts[name]} |" for name in ("soft", "hard")]
    lines += [f"| {LABELS[label]} | {counts[LABELS[label]]} |" for label in (TIE, BOTH_POOR)]
    directional = [(w, c) for w, c in zip(wins, conversations, strict=True) if w != 0.5]
    if directional:
        share = share_text(*map(list, zip(*directional, strict=True)))
        lines.append(f"\nSoft is better in {share} of the rows with a direction.")
    lines.append(
        f"\nWith ties and both-poor rows as half: {share_text(wins, conversations)}; "
        f"{sign_test_text([w - 0.5 for w in wins], conversations)}."
    )
    return "\n".join(lines)
