"""Checked rows as data sets in TRL's conversational format: contexts (`prompt`), judgements (`chosen`, `rejected`)."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pandas as pd
from datasets import Dataset

from h2s.data.messages import check_unicode, conversation_id, parse_messages
from h2s.data.tables import first_row, read_table
from h2s.errors import InputError, in_short

# What TRL's trainers do not hand to a reward either.
NOT_HANDED_ON = ("prompt", "completion", "completion_ids")
COLUMNS = ("context_messages", "policy_response", "reference_response", "human_eval")
POLICY_BETTER, REFERENCE_BETTER, BOTH_POOR, TIE = range(4)
LABELS = {
    POLICY_BETTER: "policy better",
    REFERENCE_BETTER: "reference better",
    BOTH_POOR: "both poor",
    TIE: "tie or both good",
}
# The same in the words of the blinded sheet's drop-down, by language; A stands for the policy's response.
VERDICTS = {
    "en": {
        POLICY_BETTER: "A is better",
        REFERENCE_BETTER: "B is better",
        BOTH_POOR: "both are poor",
        TIE: "tie or both good",
    },
    "zh-TW": {
        POLICY_BETTER: "A 較好",
        REFERENCE_BETTER: "B 較好",
        BOTH_POOR: "兩個都不好",
        TIE: "平手或兩個都好",
    },
}
LABEL_OF_WORDS = {"".join(words.split()).casefold(): n for v in VERDICTS.values() for n, words in v.items()}


def load_contexts(path: str) -> Dataset:
    """Read the contexts that a policy learns from and is reported on.

    ```python
    contexts = load_contexts("recipes/sample_data/contexts.json")
    contexts[0]["prompt"]  # [{"role": "user", "content": "…"}]
    ```

    Args:
        path: a JSON list of items with a `context` (or csv, xlsx, jsonl, parquet, a data set of the Hub): messages, the
            same as text, or one user message.

    Returns:
        A row a context, in the file's order: `prompt` (messages, the last one the user's) and the file's further
        columns, which a reward function is handed by name.

    Raises:
        InputError: the file, a row (named) or a column of it cannot be used.
    """
    table = read_table(path, "a JSON list of items with a 'context'")
    if "context" not in table.columns:
        raise InputError(f"{path}: no column 'context'; found {', '.join(map(str, table.columns)) or 'none'}")
    prompts = []
    for number, cell in enumerate(table["context"], start=first_row(path)):
        try:
            prompts.append(parse_messages(cell))
        except InputError as error:
            raise InputError(f"{path}, row {number}, context: {error}") from None
    if not prompts:
        raise InputError(f"{path}: no contexts in it")
    columns: dict[str, list] = {"prompt": prompts}
    for name in (n for n in table.columns if n not in ("context", *NOT_HANDED_ON)):
        columns[str(name)] = _typed(f"{path}, column {name}", table[name])
    return Dataset.from_dict(columns)


def _typed(where: str, column: pd.Series) -> list:
    """A column's values, None where one is missing, if they are of one type.

    Raises:
        InputError: they are not; a data set cannot hold them.
    """
    values = [None if value is None or value is pd.NA or value != value else value for value in column]
    if not all(isinstance(value, str | None) for value in values):  # a workbook's empty cell is '' among numbers too
        values = [None if value == "" else value for value in values]
    try:
        Dataset.from_dict({"column": values})
    except (TypeError, ValueError, NotImplementedError, OverflowError) as error:  # Arrow's, which derive from these
        raise InputError(f"{where}: a column holds values of one type ({in_short(error)}): mend or drop it") from error
    return values


def load_preferences(path: str) -> Dataset:
    """Read a sheet of judgements as TRL's preference data set, for its own trainers as well.

    ```python
    pairs = load_preferences("recipes/sample_data/judgements.xlsx")
    pairs[0]["chosen"]  # [{"role": "assistant", "content": "…"}]
    ```

    Args:
        path: as [`read_judgements`] takes it.

    Returns:
        A row a judgement with a direction: `prompt`, `chosen`, `rejected` (lists of messages), `label` (0 the policy's
        is better, 1 the reference's) and `row` (its number in the file).

    Raises:
        InputError: as [`read_judgements`].
    """
    return read_judgements(path).dataset


@dataclass(frozen=True)
class Judgements:
    """A checked sheet.

    Attributes:
        dataset: the rows with a direction, as [`load_preferences`] gives them.
        counts: how many rows carry each label.
    """

    dataset: Dataset
    counts: Counter

    def summary(self) -> str:
        """The counts in one line: what trains and what is set aside."""
        aside = self.counts[BOTH_POOR] + self.counts[TIE]
        counts = ", ".join(f"{self.counts[label]} {name}" for label, name in LABELS.items())
        conversations = len({conversation_id(prompt) for prompt in self.dataset["prompt"]})
        return f"{counts}; {len(self.dataset)} pairs over {conversations} conversations, {aside} rows set aside"


def read_judgements(path: str, need_direction: bool = True) -> Judgements:
    """Read and check a judgement sheet.

    Rows labelled 2 (both poor) and 3 (tie) have no direction: they are checked, counted and set aside.

    Args:
        path: xlsx, csv, json, jsonl, parquet or a data set of the Hub with the columns of `COLUMNS`.
        need_direction: whether a sheet without any direction is an error.

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
            value = parse_label(label)
            prompt = _in_column("context_messages", parse_messages, context)
            policy = _in_column("policy_response", _response, policy)
            reference = _in_column("reference_response", _response, reference)
        except InputError as error:
            raise InputError(f"{path}, row {number}: {error}") from None
        counts[value] += 1
        if value in (POLICY_BETTER, REFERENCE_BETTER):
            replies = [[{"role": "assistant", "content": text}] for text in (policy, reference)]
            chosen, rejected = replies if value == POLICY_BETTER else replies[::-1]
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "label": value, "row": number})
    if need_direction and not pairs:
        raise InputError(f"{path}: no row is labelled 0 or 1, so there is no preference to learn ({len(table)} rows)")
    columns = ("prompt", "chosen", "rejected", "label", "row")  # also where there is no pair
    return Judgements(Dataset.from_dict({name: [pair[name] for pair in pairs] for name in columns}), counts)


def _in_column(column: str, read, cell: Any) -> Any:
    try:
        return read(cell)
    except InputError as error:
        raise InputError(f"{column}: {error}") from None


def parse_label(cell: Any) -> int:
    """A cell of `human_eval` as a label: 0 to 3, or the words of the blinded sheet in any language.

    Raises:
        InputError: it is neither.
    """
    text = str(cell).strip().removesuffix(".0")
    label = LABEL_OF_WORDS.get("".join(text.split()).casefold())
    if label is not None:
        return label
    if isinstance(cell, bool) or text not in map(str, LABELS):
        raise InputError(f"human_eval must be 0, 1, 2 or 3, got {cell!r} (or in the words of the blinded sheet)")
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
