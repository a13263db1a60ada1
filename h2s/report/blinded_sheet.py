"""Soft against hard before people's eyes: a sheet that does not say which side is which, and what they said.

People see a conversation, the replies A and B and a drop-down; beside them stand, hidden, the judgement sheet's own
columns, so `train_reward.py` reads the file as it comes back. The key stands in a file of its own: `{"seed",
"soft_side", "rows", "identical"}`, `soft_side` the column of the soft prompt's reply a row, `rows` a digest of each
row's hidden columns (so rows may be sorted or left out, and visible texts written in), `identical` how many contexts
got twice the same reply and are not in the sheet.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset

from h2s.data.cells import Stored, is_blank, is_unjudged, read_label
from h2s.data.datasets import BOTH_POOR, LABEL_WORDS, LABELS, POLICY_BETTER, REFERENCE_BETTER, TIE, VERDICTS, places_of
from h2s.data.messages import Messages, conversation_id, parse_messages
from h2s.data.tables import read_table
from h2s.errors import InputError
from h2s.report.agreement import agreement_text
from h2s.report.intervals import few_conversations, share_interval, share_text, sign_test_text
from h2s.report.verdict import needed
from h2s.report.workbook import (
    CELL,
    HIDDEN,
    SIDES,
    VERDICT,
    VISIBLE,
    cell_text,
    dialogue,
    escaped,
    judging_workbook,
    plain_text,
)

SHEET, KEY = "blinded.xlsx", "blinded.key.json"
CHOICES = "one of the list: " + ", ".join(VERDICTS["en"].values())


def write_blinded_sheet(
    table: pd.DataFrame, folder: str | Path, seed: int, language: str = "en"
) -> tuple[Path, Path, str]:
    """Write `blinded.xlsx` (first worksheet to be judged, second the instructions) and `blinded.key.json`.

    Contexts that got twice the same reply are left out, for there is nothing to choose; where all did, they are shown.

    Args:
        table: a row a context with `prompt` (messages) and the replies `soft` and `hard`.
        folder: where to.
        seed: draws the sides.
        language: of headings, choices and instructions: one of `workbook.WORDS`.

    Returns:
        The paths of both, and in words how many rows are to be judged.
    """
    sides = random.Random(seed)
    rows = [
        (prompt, cell_text(soft), cell_text(hard))
        for prompt, soft, hard in zip(table["prompt"], table["soft"], table["hard"], strict=True)
    ]
    different = [row for row in rows if row[1] != row[2]]
    soft_sides: list[str] = []
    digests: list[str] = []
    texts = []
    for prompt, soft, hard in different or rows:
        soft_first = sides.random() < 0.5
        for order in (soft_first, not soft_first):
            replies = (soft, hard) if order else (hard, soft)
            hidden = (cell_text(_as_json(prompt)), *replies)
            digest, side = _digest(hidden), SIDES[0] if order else SIDES[1]
            # The same texts must not stand for soft and hard in one row, for hard and soft in another.
            other = SIDES[SIDES.index(side) - 1]
            if not any(known == (digest, other) for known in zip(digests, soft_sides, strict=True)):
                break
        soft_sides.append(side)
        digests.append(digest)
        texts.append((cell_text(dialogue(prompt, language)), *replies, *hidden))
    path, key_path = Path(folder) / SHEET, Path(folder) / KEY
    judging_workbook(texts, language).save(path)
    identical = len(rows) - len(different)
    key = {"seed": seed, "soft_side": soft_sides, "rows": digests, "identical": identical if different else 0}
    key_path.write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")
    said = f"{len(texts)} rows"
    if identical:
        said += f"; {identical} contexts got twice the same reply and are left out"
    if not different:
        said = f"{len(texts)} rows, and all of them twice the same reply: there is nothing to choose"
    return path, key_path, said


def check_fits_cells(contexts: Dataset) -> None:
    """Check that each context fits into a cell: cut, it would be no conversation any more.

    Raises:
        InputError: one does not.
    """
    for place, prompt in zip(places_of(contexts), contexts["prompt"], strict=True):
        length = len(escaped(_as_json(prompt)))
        if length > CELL:
            raise InputError(
                f"{place} has {length} characters as JSON, and a cell of the blinded sheet holds {CELL}: "
                "shorten it or leave it out"
            )


def _as_json(prompt: Messages) -> str:
    return json.dumps(prompt, ensure_ascii=False)


def _digest(texts: Iterable[Any]) -> str:
    return hashlib.sha256("\x1f".join(map(plain_text, texts)).encode("utf-8", "replace")).hexdigest()[:16]


def read_key(path: Path) -> dict[str, Any]:
    """The key of a blinded sheet.

    Raises:
        InputError: it cannot be read or is not one.
    """
    try:
        key = json.loads(path.read_text(encoding="utf-8-sig"))
        sides, rows = key["soft_side"], key["rows"]
        if len(sides) == len(rows) and set(sides) <= set(SIDES) and all(isinstance(row, str) for row in rows):
            return key
    except OSError as error:
        raise InputError(f"the key {path} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise InputError(f"{path} is not the key of a blinded sheet: expected soft_side and rows of equal length")


def people_verdict(sheets: Sequence[str]) -> str:
    """What people said in filled-in copies of one blinded sheet, by its key, as Markdown.

    Votes on one row and rows of one conversation may depend on one another, so intervals go by conversation.

    Args:
        sheets: a file a person, of any name. The key is `NAME.key.json` beside `NAME.xlsx`, else the one `*.key.json`
            beside any of them that has its rows.

    Raises:
        InputError: no row is judged, a verdict is none of the choices, hidden columns were changed, or there is no
            one key.
    """
    if len({Path(sheet).resolve() for sheet in sheets}) < len(sheets):
        raise InputError(f"one sheet is given twice among {', '.join(sheets)}: its votes would count double")
    tables = {sheet: _read_sheet(sheet) for sheet in sheets}
    keys = {sheet: _find_key(sheet, table["digest"], sheets) for sheet, table in tables.items()}
    key = keys[sheets[0]]
    for sheet in sheets:
        if keys[sheet]["rows"] != key["rows"] or keys[sheet]["soft_side"] != key["soft_side"]:
            raise InputError(f"{sheets[0]} and {sheet} are not copies of one sheet: give those of one at a time")
        _check_rows(sheet, tables[sheet], key["rows"])
    rows = pd.concat(tables, names=["sheet"]).reset_index("sheet")
    votes = rows.dropna(subset="label")
    if votes.empty:
        raise InputError(f"{', '.join(sheets)}: no row is judged yet: column {VERDICT} is empty")
    votes = votes.assign(
        winner=_winners(votes, dict(zip(key["rows"], key["soft_side"], strict=True))),
        conversation=[conversation_id(parse_messages(str(context))) for context in votes["context"]],
    )
    lines = [f"{_first_sentence(votes)}\n", *_counts(votes, list(sheets))]
    wins, conversations = votes["winner"].map({"soft": 1.0, "hard": 0.0}).fillna(0.5), votes["conversation"]
    shown = not lines[0].startswith("Not shown")
    more = "" if shown else " " + needed((wins - 0.5).tolist(), conversations.tolist(), "judgement")
    lines.append(
        f"\nWith ties and both-poor rows as half: {share_text(wins.tolist(), conversations.tolist())}; "
        f"{sign_test_text((wins - 0.5).tolist(), conversations.tolist())}.{more}\n"
    )
    if note := few_conversations(conversations.nunique()):
        lines.append(f"{note}\n")
    judged = votes["sheet"].value_counts()
    lines += [f"- {sheet}: {judged.get(sheet, 0)} of {len(key['rows'])} rows judged" for sheet in sheets]
    if len(sheets) > 1:
        by_pair = votes.drop_duplicates(["sheet", "digest"]).groupby("digest")["label"]
        lines.append(f"- {agreement_text(by_pair.apply(list))}")
    if rows["edited"].any():
        lines.append(f"- {rows['edited'].sum()} rows had a visible text changed; what counts is the hidden columns'")
    if key.get("identical"):
        lines.append(f"- {key['identical']} contexts got twice the same reply and are not in the sheet")
    return "\n".join(lines)


def _read_sheet(sheet: str) -> pd.DataFrame:
    """A row a pair: `row` (its number in the file), `digest`, `context`, `label` (or None); what holds of its replies.

    That is `equal`, `edited` (what is seen is not what is hidden) and `moved` (it is the text of another place).
    """
    table = {
        number: {name: cell.value if isinstance(cell, Stored) else cell for name, cell in row.items()}
        for number, row in read_table(sheet, "a filled-in copy of compare.py's sheet", (*HIDDEN, VERDICT)).items()
    }
    # A verdict that was drawn down past the end belongs to nothing.
    table = {number: cells for number, cells in table.items() if not all(is_blank(cells[name]) for name in HIDDEN)}
    replies = {plain_text(cells[side]) for cells in table.values() for side in SIDES}
    rows = []
    for number, cells in table.items():
        own = [plain_text(cells[side]) for side in SIDES]
        # A sheet that was made by hand may have no more than the columns that count.
        shown = [plain_text(cells.get(name, text)) for name, text in zip(VISIBLE, own, strict=True)]
        changed = [text for text, was in zip(shown, own, strict=True) if text != was]
        try:
            label = None if is_unjudged(cells[VERDICT]) else read_label(cells[VERDICT], LABEL_WORDS, CHOICES)
        except InputError as error:
            raise InputError(f"{sheet}, row {number}, {VERDICT}: {error}") from None
        digest = _digest(cells[name] for name in HIDDEN)
        moved = not replies.isdisjoint(changed)
        rows.append((number, digest, cells[HIDDEN[0]], label, own[0] == own[1], bool(changed), moved))
    return pd.DataFrame(rows, columns=["row", "digest", "context", "label", "equal", "edited", "moved"])


def _find_key(sheet: str, digests: Iterable[str], sheets: Sequence[str]) -> dict[str, Any]:
    """The key of a sheet.

    Raises:
        InputError: there is none, or more than one.
    """
    own = Path(sheet).with_suffix(".key.json")
    if own.is_file():
        return read_key(own)
    folders = dict.fromkeys(Path(s).parent for s in (sheet, *sheets))
    found: dict[Path, dict[str, Any]] = {}
    for path in (p for folder in folders for p in sorted(folder.glob("*.key.json"))):
        key = read_key(path)
        if not set(key["rows"]).isdisjoint(digests) and key not in found.values():
            found[path] = key
    if len(found) == 1:
        return next(iter(found.values()))
    which = ", ".join(map(str, found)) if found else "none"
    raise InputError(
        f"no key {own}, and of the *.key.json beside the sheets {which} have rows of {sheet}: "
        f"put the {KEY} that compare.py wrote with it there under that name"
    )


def _check_rows(sheet: str, table: pd.DataFrame, rows: Sequence[str]) -> None:
    """Check that each row is one of the key's, stands there once, and shows what its hidden columns say.

    Raises:
        InputError: a row does not.
    """
    left = Counter(rows)
    for number, digest, moved in zip(table["row"], table["digest"], table["moved"], strict=True):
        if digest not in left:
            raise InputError(
                f"{sheet}, row {number}: not a row of the key: its hidden columns {', '.join(HIDDEN)} were changed; "
                "copy them from the sheet that compare.py wrote"
            )
        left[digest] -= 1
        if left[digest] < 0:
            raise InputError(f"{sheet}, row {number}: this pair stands there twice: delete one of the two rows")
        if moved:
            raise InputError(
                f"{sheet}, row {number}: under A or B stands the text of another place: the visible columns were moved "
                "without the hidden ones, so nobody knows what was judged; judge a fresh copy"
            )


def _winners(votes: pd.DataFrame, soft_side: dict[str, str]) -> list[str]:
    winners = []
    for digest, label, equal in zip(votes["digest"], votes["label"].astype(int), votes["equal"], strict=True):
        if equal:
            winners.append(LABELS[TIE])  # no side is soft's
        elif label in (POLICY_BETTER, REFERENCE_BETTER):
            winners.append("soft" if SIDES[label] == soft_side[digest] else "hard")
        else:
            winners.append(LABELS[label])
    return winners


def _first_sentence(votes: pd.DataFrame) -> str:
    directional = votes[votes["winner"].isin(["soft", "hard"])]
    if directional.empty:
        return f"Not shown what people prefer: none of {len(votes)} judgements has a direction."
    wins = (directional["winner"] == "soft").astype(float).tolist()
    conversations = directional["conversation"].tolist()
    _, low, high = share_interval(wins, conversations)
    verdict = (
        "People prefer soft" if low > 0.5 else "People prefer hard" if high < 0.5 else "Not shown what people prefer"
    )
    return f"{verdict}: of the judgements with a direction soft is better in {share_text(wins, conversations)}."


def _counts(votes: pd.DataFrame, sheets: list[str]) -> list[str]:
    """A table of who said what how often."""
    names = ["soft", "hard", LABELS[TIE], LABELS[BOTH_POOR]]
    counts = pd.crosstab(votes["winner"], votes["sheet"]).reindex(index=names, columns=sheets, fill_value=0)
    if len(sheets) > 1:
        counts["all"] = counts.sum(axis=1)
    else:
        counts.columns = ["rows"]
    lines = [f"| people's verdict | {' | '.join(counts.columns)} |", "|---" * (counts.shape[1] + 1) + "|"]
    return lines + [f"| {name} | {' | '.join(map(str, row))} |" for name, row in zip(names, counts.values, strict=True)]
