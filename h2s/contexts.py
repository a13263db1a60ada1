"""Conversations: from a cell or a contexts file to checked messages, and from messages to their part of the split.

A *context* is a conversation that waits for the assistant's reply: alternating user and assistant messages, the last
one the user's. A *conversation id* is the same for all contexts that begin with the same message, so that turns of one
conversation never stand on both sides of a split.
"""

import ast
import hashlib
import json
import math
import os
import re
import warnings
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from datasets import Dataset, concatenate_datasets, load_dataset

from h2s.errors import InputError

Part = Literal["train", "validation", "test"]
Messages = list[dict[str, str]]

SURROGATE = re.compile("[\ud800-\udfff]")
FORMATS = (".xlsx", ".csv", ".json", ".jsonl", ".parquet")
# The first bytes of Office's old container, in which encrypted workbooks stand too.
OLE = bytes.fromhex("d0cf11e0a1b11ae1")


def parse_messages(cell: Any) -> Messages:
    """Read one context.

    Args:
        cell: a list of `{"role", "content"}` (content a string or a list of `{"type": "text", "text"}` parts), the
            same as a JSON or Python-literal string, or plain text (one user message). Text that begins with `[` or
            `{` must parse.

    Returns:
        Messages with string contents, alternating user and assistant, the last one the user's.

    Raises:
        InputError: the cell is none of these.
    """
    if isinstance(cell, str):
        text = cell.strip()
        cell = _parse_literal(text) if text[:1] in ("[", "{") else [{"role": "user", "content": text}]
    if not isinstance(cell, list) or not cell:
        raise InputError(f"expected a non-empty list of messages or plain text, got {_short(cell)}")
    messages = [_message(m) for m in cell]
    for before, after in pairwise(messages):
        if before["role"] == after["role"]:
            raise InputError(f"messages must alternate between user and assistant, got two {after['role']!r} in a row")
    if messages[-1]["role"] != "user":
        raise InputError("the last message must be the user's, since the response answers it")
    return messages


def _parse_literal(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings(action="ignore"):  # Python's own remarks on such escapes as '\%'
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise InputError(f"begins like a list but is neither JSON nor a Python literal: {_short(text)}") from None


def _message(message: Any) -> dict[str, str]:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise InputError(f'expected a message {{"role": …, "content": …}}, got {_short(message)}')
    role, content = message["role"], message["content"]
    if role not in ("user", "assistant"):
        raise InputError(f"a message's role must be 'user' or 'assistant', got {_short(role)}")
    if isinstance(content, list):
        if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content):
            raise InputError(f'content parts must be {{"type": "text", "text": …}}, got {_short(content)}')
        content = "".join(p["text"] for p in content)
    if not isinstance(content, str) or not content.strip():
        raise InputError(f"a message's content must be non-empty text, got {_short(content)}")
    check_unicode(content)
    return {"role": role, "content": content}


def check_unicode(text: str) -> None:
    """Refuse half a surrogate pair (JSON can spell one, as \\ud83d): no tokenizer or file takes it.

    Raises:
        InputError: there is one.
    """
    found = SURROGATE.search(text)
    if found:
        around = text[max(0, found.start() - 20) : found.end() + 20]
        raise InputError(f"half a character (a lone surrogate, {found[0]!r}) in {around!r}: write the text anew there")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read_table(path: str, expected: str) -> pd.DataFrame:
    """Read a table of cells as they are: files by pandas and json, Hub data sets by `datasets.load_dataset`.

    Not files too: it takes brackets in a name for a pattern, makes numbers of a csv column of texts like 007, and an
    Arrow column cannot mix the forms that a context may have.

    Args:
        path: a file, or the name `owner/name` of a data set on the Hub (its train split).
        expected: what the caller needs, for the error.

    Raises:
        InputError: there is no such file, or it is not what its name says.
    """
    file = Path(path)
    suffix = file.suffix.lower()
    exists = os.path.exists(path)  # False, too, for what cannot be a path
    is_hub_name = not exists and suffix not in FORMATS and path.count("/") == 1 and path[0] not in "./~"
    if not is_hub_name:
        if not exists:
            raise InputError(f"no such file: {path} (expected {expected})")
        if file.is_dir() or suffix not in FORMATS:
            raise InputError(f"{path} is not a {', '.join(FORMATS)} file (expected {expected})")
    try:
        if is_hub_name:
            return load_dataset(path, split="train").to_pandas()
        if suffix == ".xlsx":
            _check_workbook(file)
            with warnings.catch_warnings(action="ignore"):  # openpyxl's, on styles and lists that it leaves out
                return pd.read_excel(file, engine="openpyxl", dtype=object, keep_default_na=False)
        if suffix == ".csv":
            return pd.read_csv(file, dtype=str, keep_default_na=False)
        if suffix == ".parquet":
            return pd.read_parquet(file)
        text = file.read_text(encoding="utf-8-sig")
        # Not splitlines: a JSON string may hold U+2028.
        items = json.loads(text) if suffix == ".json" else [json.loads(t) for t in text.split("\n") if t.strip()]
        return pd.DataFrame(_records(items), dtype=object)
    except Exception as error:  # whatever the reader raises, the user's file is what it could not read
        lines = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{path} cannot be read as {suffix or 'a Hub data set'} ({expected}): {lines[0]}") from error


def _check_workbook(file: Path) -> None:
    """Whether a workbook can be read at all: the zip reader's own words for it help nobody."""
    with file.open("rb") as opened:
        begins = opened.read(len(OLE))
    if begins == OLE:
        raise ValueError("it is encrypted or an old .xls: save it as .xlsx without a password")
    if not begins:
        raise ValueError("it is empty (0 bytes): save or copy it again")
    if not zipfile.is_zipfile(file):
        raise ValueError("it is no workbook, but another kind of file or cut off: save it as .xlsx")


def _records(items: Any) -> list[dict]:
    if not isinstance(items, list) or not all(isinstance(i, dict) for i in items):
        raise ValueError("it is not a list of objects")
    return items


def first_row(path: str) -> int:
    """The number that a file's first row of cells has where people see it: a sheet's header is row 1."""
    return 2 if path.lower().endswith((".xlsx", ".csv")) else 1


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


def plain(cell: Any) -> Any:
    """A cell as plain Python: Arrow hands lists over as numpy arrays, nested ones too.

    Raises:
        InputError: it is nested too deep.
    """
    try:
        return _plain(cell)
    except RecursionError:
        raise InputError("expected a non-empty list of messages or plain text, got lists nested too deep") from None


def _plain(cell: Any) -> Any:
    if hasattr(cell, "tolist"):
        cell = cell.tolist()
    if isinstance(cell, list):
        return [_plain(c) for c in cell]
    if isinstance(cell, dict):
        return {k: _plain(v) for k, v in cell.items()}
    return cell


def conversation_id(messages: Messages) -> str:
    """A short id of the conversation that `messages` belong to: a hash of its beginning.

    That is all up to the user's first message: an assistant may open every conversation with the same greeting.
    """
    end = next((i for i, m in enumerate(messages) if m["role"] == "user"), 0) + 1
    beginning = "\n".join(f"{m['role']}\n{m['content'].strip()}" for m in messages[:end])
    return hashlib.sha256(beginning.encode("utf-8", "replace")).hexdigest()[:16]


def part_of(conversation: str, split_seed: int, test_size: float) -> Part:
    """The part a conversation belongs to, by hash(conversation, split_seed) and the test part's size.

    A share `test_size` of all conversations is reported on, a further half of that selects (the best step, the best
    epoch), the rest trains. Both stages ask here, so they hold out the same conversations of one file.
    """
    share = _draw(f"{split_seed}:{conversation}")
    if share < test_size:
        return "test"
    return "validation" if share < 1.5 * test_size else "train"


def _draw(text: str) -> float:
    """A number in [0, 1) that is `text`'s own."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split_by_conversation(dataset: Dataset, split_seed: int, test_size: float) -> dict[Part, Dataset]:
    """Split rows that carry a `conversation` id into train, validation and test.

    Raises:
        InputError: a part would be empty.
    """
    if not 0 < test_size < 0.6 or math.isnan(test_size):
        raise InputError(f"test_size must lie between 0 and 0.6 (half as much again selects), got {test_size}")
    where = [part_of(c, split_seed, test_size) for c in dataset["conversation"]]
    conversations = len(set(dataset["conversation"]))
    if set(where) == {"test"} and conversations > 3:  # of so many all would hardly be held out by chance
        raise InputError(
            f"all {conversations} conversations are held out by test_size {test_size} and split_seed {split_seed}, as "
            "are those of a sheet that compare.py wrote with both: take another split_seed, the same in every recipe"
        )
    parts: dict[Part, Dataset] = {}
    for part in ("train", "validation", "test"):
        parts[part] = dataset.select([i for i, p in enumerate(where) if p == part])
        if not len(parts[part]):
            raise InputError(
                f"the {part} part is empty: {conversations} conversations are too few for "
                f"test_size {test_size} with split_seed {split_seed}; add conversations or change one of the two"
            )
    return parts


def share_with_judge(
    parts: dict[Part, Dataset], split_seed: int, judge_share: float
) -> tuple[dict[Part, Dataset], dict[Part, Dataset]]:
    """Share the conversations that train and select between a reward model and a judge: neither sees the other's.

    Returns:
        The reward model's parts and the judge's. The test part of each is all that it never saw: that of `parts`, and
        the other's.

    Raises:
        InputError: the share is not between 0 and 1, or a part would be empty.
    """
    if not 0 < judge_share < 1:
        raise InputError(f"judge_share must lie between 0 and 1, got {judge_share}")
    reward: dict[Part, Dataset] = {}
    judge: dict[Part, Dataset] = {}
    names: tuple[Part, ...] = ("train", "validation")
    for part in names:
        of_judge = [_draw(f"judge:{split_seed}:{c}") < judge_share for c in parts[part]["conversation"]]
        if len(set(of_judge)) < 2:
            count = len(set(parts[part]["conversation"]))
            raise InputError(
                f"the {part} part holds {count} conversations, too few to share between a reward model and a judge "
                f"(judge_share {judge_share}): add conversations or raise test_size"
            )
        judge[part] = parts[part].select([i for i, j in enumerate(of_judge) if j])
        reward[part] = parts[part].select([i for i, j in enumerate(of_judge) if not j])
    both = [[parts["test"], *(model[n] for n in names)] for model in (judge, reward)]
    reward["test"], judge["test"] = (concatenate_datasets(unseen) for unseen in both)
    return reward, judge


def folds_by_conversation(dataset: Dataset, folds: int, split_seed: int) -> list[dict[Part, Dataset]]:
    """Cross-validation: each conversation is in the test part of exactly one fold.

    Of a fold's other conversations half as many as it tests select, the rest train.

    Raises:
        InputError: fewer than 2 folds, or too few conversations for them.
    """
    conversations = sorted(set(dataset["conversation"]), key=lambda c: _draw(f"folds:{split_seed}:{c}"))
    if folds < 2 or len(conversations) < 2 * folds:
        raise InputError(
            f"folds must be at least 2 and at most half of the {len(conversations)} conversations, got {folds}"
        )
    result = []
    for fold in range(folds):
        part: dict[str, Part] = dict.fromkeys(conversations[fold::folds], "test")
        part |= dict.fromkeys(conversations[(fold + 1) % folds :: folds][::2], "validation")
        where = [part.get(c, "train") for c in dataset["conversation"]]
        names: tuple[Part, ...] = ("train", "validation", "test")
        result.append({n: dataset.select([i for i, w in enumerate(where) if w == n]) for n in names})
    return result


def columns(rows: list[dict[str, Any]]) -> dict[str, list]:
    """Collate contexts: they have nothing to pad before they are answered, so a batch is its columns."""
    return {name: [row[name] for row in rows] for name in ("prompt", "prompt_ids")}
