"""Checked rows as data sets in TRL's conversational format: contexts (`prompt`), judgements (`chosen`, `rejected`)."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from h2s.data.cells import is_missing, is_unjudged, label_words, read_context, read_label, read_reply
from h2s.data.messages import Messages, conversation_id
from h2s.data.rows import check_rows, each_file_once, in_column, tell_of_turns
from h2s.data.tables import read_table
from h2s.errors import InputError, in_short

logger = logging.getLogger(__name__)

# What TRL's trainers do not hand to a reward either, and what says here where a context stands.
NOT_HANDED_ON = ("prompt", "completion", "completion_ids", "file", "row")
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


# What a sheet's verdicts mean where `labels` does not say.
NUMBERS = {str(label): label for label in LABELS}
DROP_DOWN = {label_words(words): label for verdicts in VERDICTS.values() for label, words in verdicts.items()}
LABEL_WORDS = NUMBERS | DROP_DOWN


def load_contexts(path: str | Sequence[str]) -> Dataset:
    """Read the contexts that a policy learns from and is reported on.

    ```python
    contexts = load_contexts("recipes/sample_data/contexts.json")
    contexts[0]["prompt"]  # [{"role": "user", "content": "…"}]
    ```

    Args:
        path: a JSON list of items with a `context` (or csv, xlsx, jsonl, parquet, a data set of the Hub), or several:
            messages, the same as text, or one user message.

    Returns:
        A row a context, in the files' order: `prompt` (messages, the last one the user's), the files' further columns,
        which a reward function is handed by name, and where it stands, `file` and `row`.

    Raises:
        InputError: a file, a row (named) or a column of it cannot be used.
    """
    columns: dict[str, list] = {"prompt": []}
    paths = each_file_once(path)
    tables = {name: read_table(name, "a JSON list of items with a 'context'", ["context"]) for name in paths}
    for name, rows in tables.items():
        tell_of_turns(name, {number: row["context"] for number, row in rows.items()})
        columns["prompt"] += check_rows(name, rows, lambda row: in_column("context", read_context, row["context"]))
    if not columns["prompt"]:
        raise InputError(f"{', '.join(paths)}: no contexts in it")
    further = dict.fromkeys(name for rows in tables.values() for row in rows.values() for name in row)
    for name in (name for name in further if name not in ("context", *NOT_HANDED_ON)):
        values = [row.get(name) for rows in tables.values() for row in rows.values()]
        columns[name] = _typed(f"{', '.join(paths)}, column {name}", values)
    columns["file"] = [name for name, rows in tables.items() for _ in rows]
    columns["row"] = [number for rows in tables.values() for number in rows]
    return Dataset.from_dict(columns)


def each_context_once(pairs: Dataset) -> Dataset:
    """The first row of each context: judgements name one as often as its replies were compared."""
    first: dict[str, int] = {}
    for row, prompt in enumerate(pairs["prompt"]):
        first.setdefault(repr(prompt), row)
    return pairs.select(first.values())


def places_of(contexts: Dataset) -> list[str]:
    """What to call each context: `context 65` where row 65 of its file is meant, else its place, counted from 1."""
    if not {"file", "row"} <= set(contexts.column_names):
        return [f"context {number}" for number in range(1, len(contexts) + 1)]
    files, rows = contexts["file"][:], contexts["row"][:]
    several = len(set(files)) > 1
    return [f"context {row}" + (f" of {file}" if several else "") for file, row in zip(files, rows, strict=True)]


def _typed(where: str, column: list) -> list:
    """A column's values, None where one is missing, if they are of one type.

    Raises:
        InputError: they are not; a data set cannot hold them.
    """
    values = [None if not isinstance(value, (list, dict)) and is_missing(value) else value for value in column]
    if not all(isinstance(value, str | None) for value in values):  # an empty cell is '' among numbers too
        values = [None if value == "" else value for value in values]
    try:
        Dataset.from_dict({"column": values})
    except (TypeError, ValueError, NotImplementedError, OverflowError) as error:  # Arrow's, which derive from these
        raise InputError(f"{where}: a column holds values of one type ({in_short(error)}): mend or drop it") from error
    return values


def load_preferences(
    path: str | Sequence[str],
    sheet: str | None = None,
    columns: Mapping[str, str] | None = None,
    labels: Mapping[Any, int] | None = None,
    encoding: str | None = None,
) -> Dataset:
    """Read judgements as TRL's preference data set, for its own trainers as well.

    ```python
    pairs = load_preferences("recipes/sample_data/judgements.xlsx")
    pairs[0]["chosen"]  # [{"role": "assistant", "content": "…"}]
    ```

    Args: those of [`read_judgements`].

    Returns:
        A row a judgement with a direction: `prompt`, `chosen`, `rejected` (lists of messages), `label` (0 the policy's
        is better, 1 the reference's), and where it stands, `file` and `row` (its number in the file).

    Raises:
        InputError: as [`read_judgements`].
    """
    return read_judgements(path, sheet=sheet, columns=columns, labels=labels, encoding=encoding).dataset


@dataclass(frozen=True)
class Judgement:
    """A judged row: where it stands, what was judged and how (of `LABELS`)."""

    file: str
    row: int
    prompt: Messages
    policy_response: str
    reference_response: str
    label: int


@dataclass(frozen=True)
class Judgements:
    """Checked sheets.

    Attributes:
        rows: all that was judged, in the sheets' order.
        unjudged: how many rows of each file have no verdict yet.
    """

    rows: list[Judgement]
    unjudged: dict[str, int]

    @property
    def counts(self) -> Counter:
        """How many rows carry each label."""
        return Counter(row.label for row in self.rows)

    @property
    def dataset(self) -> Dataset:
        """The rows with a direction, as [`load_preferences`] gives them."""
        columns: dict[str, list] = {name: [] for name in ("prompt", "chosen", "rejected", "label", "file", "row")}
        for row in self.rows:
            if row.label not in (POLICY_BETTER, REFERENCE_BETTER):
                continue
            texts = (row.policy_response, row.reference_response)
            replies = [[{"role": "assistant", "content": text}] for text in texts]
            chosen, rejected = replies if row.label == POLICY_BETTER else replies[::-1]
            values = (row.prompt, chosen, rejected, row.label, row.file, row.row)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
        return Dataset.from_dict(columns)

    def summary(self) -> str:
        """The counts in a line, and one a file where there are several: what trains and what is set aside."""
        lines = []
        if len(self.unjudged) > 1:
            judged = Counter(row.file for row in self.rows)
            lines = [f"{file}: {judged[file]} rows judged, {left} not yet" for file, left in self.unjudged.items()]
        counts = self.counts
        aside = counts[BOTH_POOR] + counts[TIE]
        pairs = [row for row in self.rows if row.label in (POLICY_BETTER, REFERENCE_BETTER)]
        conversations = len({conversation_id(row.prompt) for row in pairs})
        words = ", ".join(f"{counts[label]} {name}" for label, name in LABELS.items())
        left = f", {sum(self.unjudged.values())} not judged yet" if any(self.unjudged.values()) else ""
        lines.append(f"{words}; {len(pairs)} pairs over {conversations} conversations, {aside} rows set aside{left}")
        return "\n".join(lines)


def read_judgements(
    path: str | Sequence[str],
    need_direction: bool = True,
    sheet: str | None = None,
    columns: Mapping[str, str] | None = None,
    labels: Mapping[Any, int] | None = None,
    encoding: str | None = None,
) -> Judgements:
    """Read and check sheets of judgements.

    Rows labelled 2 (both poor) and 3 (tie) have no direction: they are checked, counted and set aside. Rows without a
    verdict are counted and left out.

    Args:
        path: xlsx, csv, json, jsonl, parquet or a data set of the Hub with the columns of `COLUMNS`; or several
            (rounds, annotators).
        need_direction: whether sheets without any direction are an error.
        sheet: the worksheet of a workbook; the first visible one by default.
        columns: what the files call the columns of `COLUMNS`, where it is something else.
        labels: which of 0, 1, 2 and 3 the files' own verdicts mean: `{"A": 0, "B": 1, "tie": 3}`. The blinded sheet's
            words are read all the same, and 0 to 3 where no key is a number.
        encoding: of csv files; found by default.

    Raises:
        InputError: a file cannot be read, a column is missing, rows are malformed (named by their numbers in the file,
            where 1 is a worksheet's first row), or no row has a direction.
    """
    names = {name: name for name in COLUMNS} | check_columns(columns)
    words = check_labels(labels)
    # How a person would write them.
    meanings = (
        "0, 1, 2 or 3 (labels maps other verdicts)" if labels is None else f"one of {', '.join(map(str, labels))}"
    )
    paths = each_file_once(path)
    for name, value, suffixes in (("sheet", sheet, (".xlsx",)), ("encoding", encoding, (".csv", ".tsv"))):
        if value is not None and not any(file.lower().endswith(suffixes) for file in paths):
            raise InputError(f"{name} is for {' and '.join(suffixes)} files, got {', '.join(paths)}: leave it out")
    expected = f"a sheet of judgements with the columns {', '.join(names.values())}"
    rows: list[Judgement] = []
    unjudged = {}
    for file in paths:
        table = read_table(file, expected, list(names.values()), sheet, encoding)
        filled = {number: row for number, row in table.items() if not is_unjudged(row[names["human_eval"]])}
        unjudged[file] = len(table) - len(filled)
        tell_of_turns(file, {number: row[names["context_messages"]] for number, row in filled.items()})
        checked = check_rows(file, filled, lambda row: _judgement(row, names, words, meanings))
        rows += [Judgement(file, number, *judged) for number, judged in zip(filled, checked, strict=True)]
    judgements = Judgements(rows, unjudged)
    counts = judgements.counts
    if labels is None and not counts[POLICY_BETTER] and counts[REFERENCE_BETTER] and counts[BOTH_POOR]:
        logger.warning("%s: no verdict is 0: where 1 is the first and 2 the second, set labels {1: 0, 2: 1}", paths[0])
    if need_direction and not {POLICY_BETTER, REFERENCE_BETTER} & judgements.counts.keys():
        left = f", {sum(unjudged.values())} without a verdict" if any(unjudged.values()) else ""
        raise InputError(
            f"{', '.join(unjudged)}: no row is labelled 0 or 1, so there is no preference to learn ({len(rows)} rows"
            f"{left})"
        )
    return judgements


def check_columns(columns: Mapping[str, str] | None) -> dict[str, str]:
    """Check what files are said to call the columns of `COLUMNS`.

    Raises:
        InputError: a key is none of them, or a name is no text or given twice.
    """
    if not isinstance(columns, Mapping | None):
        raise InputError(f"columns must be a mapping, got {columns!r}")
    for key, name in (columns or {}).items():
        if key not in COLUMNS or not isinstance(name, str) or not name.strip():
            raise InputError(f"columns maps {', '.join(COLUMNS)} to a file's own headers, got {key}: {name!r}")
    names = list(({name: name for name in COLUMNS} | dict(columns or {})).values())
    if len({" ".join(name.split()).casefold() for name in names}) < len(names):
        raise InputError(f"columns names one header twice: {', '.join(names)}")
    return dict(columns or {})


def check_labels(labels: Mapping[Any, int] | None) -> dict[str, int]:
    """Verdicts by the words for them, in lower case.

    Raises:
        InputError: a value is none of `LABELS`, or a key is one that YAML has changed (yes, no).
    """
    if labels is None:
        return LABEL_WORDS
    if not isinstance(labels, Mapping) or not labels:
        raise InputError(f"labels must be a mapping of verdicts, got {labels!r}")
    words: dict[str, int] = {}
    for word, label in labels.items():
        if isinstance(word, bool) or type(label) is not int or label not in LABELS:
            meanings = ", ".join(f"{label} {name}" for label, name in LABELS.items())
            raise InputError(f"labels maps a file's verdicts (in quotes) to {meanings}, got {word!r}: {label!r}")
        if words.setdefault(label_words(word), label) != label:
            raise InputError(f"labels says two things of {word!r}, which is read without regard to case: keep one")
    # Sheets of compare.py, and those in numbers, are read beside others; a file's own numbers stand for ours.
    return DROP_DOWN | (words if any(word.isdigit() for word in words) else NUMBERS | words)


def _judgement(
    row: Mapping[str, Any], names: Mapping[str, str], words: Mapping[str, int], meanings: str
) -> tuple[Messages, str, str, int]:
    context, policy, reference, label = (names[name] for name in COLUMNS)
    return (
        in_column(context, read_context, row[context]),
        in_column(policy, read_reply, row[policy]),
        in_column(reference, read_reply, row[reference]),
        in_column(label, lambda cell: read_label(cell, words, meanings), row[label]),
    )
