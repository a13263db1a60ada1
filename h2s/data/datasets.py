"""Checked rows to data sets: contexts and judgements."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from h2s.data.messages import check_unicode, conversation_id, parse_messages, plain
from h2s.data.tables import first_row, read_table
from h2s.errors import InputError


def load_contexts(path: str) -> Dataset:
    """Read the policy's contexts: JSON (csv, jsonl, parquet, Hub) items with a `context`.

    Returns:
        A data set with columns `prompt` (messages), `conversation` (id) and `row` (its number in the file).

    Raises:
        InputError: the file or a row of it cannot be used; the row is named.
    """
    table = read_table(path, "a JSON list of items with a 'context'")
    if "context" not in table.columns:
        raise InputError(f"{path}: no column 'context'; found {', '.join(map(str, table.columns)) or 'none'}")
    rows = []
    for number, cell in enumerate(table["context"], start=first_row(path)):
        try:
            messages = parse_messages(plain(cell))
        except InputError as error:
            raise InputError(f"{path}, row {number}, context: {error}") from None
        rows.append({"prompt": messages, "conversation": conversation_id(messages), "row": number})
    if not rows:
        raise InputError(f"{path}: no contexts in it")
    return Dataset.from_list(rows)


COLUMNS = ("context_messages", "policy_response", "reference_response", "human_eval")


POLICY_BETTER, REFERENCE_BETTER, BOTH_POOR, TIE = range(4)


LABELS = {
    POLICY_BETTER: "policy better",
    REFERENCE_BETTER: "reference better",
    BOTH_POOR: "both poor",
    TIE: "tie or both good",
}


@dataclass(frozen=True)
class Preferences:
    """A checked sheet.

    Attributes:
        dataset: the directional rows, with columns `prompt` (messages), `chosen`, `rejected` (texts), `label` (0 the
            policy's is better, 1 the reference's), `conversation` (id) and `row` (the row's number in the file).
        counts: how many rows carry each label.
    """

    dataset: Dataset
    counts: Counter

    def summary(self) -> str:
        """The counts in one line: what trains and what is set aside."""
        aside = self.counts[BOTH_POOR] + self.counts[TIE]
        counts = ", ".join(f"{self.counts[label]} {name}" for label, name in LABELS.items())
        conversations = len(set(self.dataset["conversation"]))
        return f"{counts}; {len(self.dataset)} pairs over {conversations} conversations, {aside} rows set aside"


def load_preferences(path: str, need_direction: bool = True) -> Preferences:
    """Read and check a judgement sheet.

    Rows labelled 2 (both poor) and 3 (tie) have no direction: they are checked, counted and set aside. A sheet of
    nothing else is an error unless `need_direction` is False.

    Raises:
        InputError: the file cannot be read, a column is missing, a row is malformed (named by its number in the
            file, where 1 is a worksheet's header), or no row has a direction.
    """
    table = read_table(path, f"a sheet of judgements with the columns {', '.join(COLUMNS)}")
    missing = [c for c in COLUMNS if c not in table.columns]
    if missing:
        found = ", ".join(map(str, table.columns)) or "none"
        raise InputError(f"{path}: missing column {', '.join(missing)}; found {found}")
    counts: Counter[int] = Counter()
    pairs = []
    records = table.loc[:, list(COLUMNS)].itertuples(index=False, name=None)
    for number, (context, policy, reference, label) in enumerate(records, start=first_row(path)):
        try:
            value = _label(plain(label))
            prompt = _in_column("context_messages", parse_messages, plain(context))
            policy = _in_column("policy_response", _response, plain(policy))
            reference = _in_column("reference_response", _response, plain(reference))
        except InputError as error:
            raise InputError(f"{path}, row {number}: {error}") from None
        counts[value] += 1
        if value in (POLICY_BETTER, REFERENCE_BETTER):
            chosen, rejected = (policy, reference) if value == POLICY_BETTER else (reference, policy)
            pairs.append(
                {
                    "prompt": prompt,
                    "chosen": chosen,
                    "rejected": rejected,
                    "label": value,
                    "conversation": conversation_id(prompt),
                    "row": number,
                }
            )
    if need_direction and not pairs:
        raise InputError(f"{path}: no row is labelled 0 or 1, so there is no preference to learn ({len(table)} rows)")
    return Preferences(Dataset.from_list(pairs), counts)


def _in_column(column: str, read, cell: Any) -> Any:
    try:
        return read(cell)
    except InputError as error:
        raise InputError(f"{column}: {error}") from None


def _label(cell: Any) -> int:
    text = str(cell).strip().removesuffix(".0")
    if isinstance(cell, bool) or text not in map(str, LABELS):
        raise InputError(f"human_eval must be 0, 1, 2 or 3, got {cell!r}")
    return int(text)


def _response(cell: Any) -> str:
    # A reply such as 42 is a number to Excel; an empty cell is NaN, None or ''.
    if isinstance(cell, (int, float)) and not isinstance(cell, bool) and cell == cell:
        cell = str(cell)
    if cell is None or cell != cell or (isinstance(cell, str) and not cell.strip()):
        # A formula is empty until a spreadsheet program has saved its value, and so is an error such as #REF!.
        raise InputError("expected a response, got an empty cell (or an error or uncomputed formula): give its text")
    if not isinstance(cell, str):
        raise InputError(f"expected the text of a response, got {cell!r}: format the cell as text, then fill it in")
    check_unicode(cell)
    return cell
