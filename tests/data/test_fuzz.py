"""The readers on anything at all: they return, or raise `InputError` in one short line; nothing else."""

import json
import string
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openpyxl import Workbook
from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
from tiny import COLUMNS

from h2s.data.datasets import load_contexts, load_preferences, read_judgements
from h2s.data.messages import parse_messages
from h2s.errors import InputError
from h2s.ppo.config import SingleStepPPOConfig
from h2s.run.arguments import (
    CompareArguments,
    CompareDatasetArguments,
    CompareModelArguments,
    ConvertArguments,
    HardPromptArguments,
    QuestionArguments,
)
from h2s.run.recipe import parse_recipe

pytestmark = pytest.mark.filterwarnings("ignore")


def quick(examples: int):
    """The same examples at every run, however slow the machine."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def made_of(*pieces: str, most: int):
    """Text put together from what means something to a reader."""
    return st.lists(st.sampled_from(pieces), max_size=most).map("".join)


# Halves of characters too: JSON and YAML can spell them.
TEXT = st.text(st.characters() | st.sampled_from("\ud800\udfff\0\x1b\u202e"), max_size=30)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(TEXT, v, max_size=4), max_leaves=8)
# What is nearly a conversation reaches further than what is nothing like one.
PARTS = st.fixed_dictionaries({"type": st.just("text") | st.sampled_from(["text", "image", 1]), "text": TEXT | VALUES})
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "user", "assistant", "system", 3, None, ["user"]])},
    optional={"content": TEXT | st.lists(PARTS, max_size=3) | VALUES, "name": VALUES},
)
# Right but for what the texts may hold.
RIGHT = st.lists(TEXT.map("a".__add__), min_size=1, max_size=2).map(
    lambda texts: [
        {"role": ("user", "assistant")[(len(texts) - n) % 2 == 0], "content": t} for n, t in enumerate(texts)
    ]
)
IN_PARTS = st.lists(PARTS, max_size=2).map(lambda parts: [{"role": "user", "content": parts}])
CONVERSATIONS = RIGHT | RIGHT | IN_PARTS | st.lists(MESSAGES | VALUES, max_size=4)
LITERALS = made_of(*"[]{}()'\"\\,: \n\t\0#-+*.eEjJ019_", *"rbfuxN", "é", "\ud800", most=40)
CELLS = (
    CONVERSATIONS
    | CONVERSATIONS.map(repr)
    | CONVERSATIONS.map(json.dumps)
    | LITERALS.map("[".__add__)
    | LITERALS
    | VALUES
    | st.binary(max_size=20)
)


def returns_or_refuses(read, *args):
    """What `read` returns; None if it raises `InputError`. Any other exception ends the test."""
    try:
        return read(*args)
    except InputError as error:
        assert 0 < len(str(error)) < 3000
        return None


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def are_messages(messages) -> bool:
    roles = [m["role"] for m in messages]
    return (
        roles[-1] == "user"
        and set(roles) <= {"user", "assistant"}
        and all(a != b for a, b in pairwise(roles))
        and all(m.keys() == {"role", "content"} and m["content"].strip() for m in messages)
        and all(m["content"].encode("utf-8") for m in messages)  # raises on half a character
    )


@quick(200)
@given(CELLS)
def test_a_context(cell):
    messages = returns_or_refuses(parse_messages, cell)
    assert messages is None or are_messages(messages)


@quick(70)
@given(
    st.lists(st.fixed_dictionaries({}, optional={"context": CELLS, "id": VALUES}), max_size=4) | VALUES, st.booleans()
)
def test_contexts_in_json(folder, items, lines):
    def plain(value):
        return value.decode("latin-1") if isinstance(value, bytes) else str(value)

    file = folder / ("contexts.jsonl" if lines else "contexts.json")
    texts = [json.dumps(i, default=plain) for i in (items if lines and isinstance(items, list) else [items])]
    file.write_text("\n".join(texts), encoding="utf-8")
    rows = returns_or_refuses(load_contexts, str(file))
    assert rows is None or (
        all(map(are_messages, rows["prompt"])) and set(rows.column_names) <= {"prompt", "id", "file", "row"}
    )


@quick(100)
@given(
    st.lists(
        VALUES | st.sampled_from([1, "a", None, True, 2**63, {"a": 1}, {"a": "b"}, [1], []]), min_size=1, max_size=4
    )
)
def test_a_further_column(folder, values):
    """It is kept with a value a row, or refused by its name."""
    file = folder / "contexts.json"
    file.write_text(json.dumps([{"context": "hi", "further": v} for v in values]), encoding="utf-8")
    try:
        assert len(load_contexts(str(file))["further"]) == len(values)
    except InputError as error:
        assert f"{file}, column further: " in str(error) and len(str(error)) < 1000


@quick(80)
@given(st.sampled_from(["json", "jsonl", "csv", "xlsx", "parquet"]), st.binary(max_size=200))
def test_files_of_any_bytes(folder, suffix, content):
    magic = {"xlsx": b"PK\x03\x04", "parquet": b"PAR1"}.get(suffix, b"")
    for data in (content, magic + content + magic):
        (folder / f"any.{suffix}").write_bytes(data)
        for read in (load_contexts, load_preferences):
            returns_or_refuses(read, str(folder / f"any.{suffix}"))


CSV = made_of(*'",;\n\r\t \0=[]{}01aé', "context", ",", "\n", most=40)


@quick(80)
@given(CSV)
def test_tables_of_text(folder, content):
    for read, header in ((load_contexts, "context"), (load_preferences, ",".join(COLUMNS))):
        (folder / "any.csv").write_text(f"{header}\n{content}", encoding="utf-8")
        returns_or_refuses(read, str(folder / "any.csv"))


# As a workbook can hold them: some texts are formulas, some errors.
SHEET_TEXTS = st.text(max_size=20).map(lambda t: ILLEGAL_CHARACTERS_RE.sub("", t))
SHEET_CELLS = (
    st.none()
    | st.booleans()
    | st.integers(-5, 10**15)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.dates()
    | st.datetimes()
    | st.times()
    | st.timedeltas()
    | SHEET_TEXTS
    | st.sampled_from(
        ["=1+1", "#REF!", "#N/A", "=cmd|' /C calc'!A0", "[]", "[{'role': 'user', 'content': 'hi'}]", "hi"]
    )
)
RIGHT_LABELS = st.sampled_from([0, 1, 2, 3, "0", "1.0", " 2 "])
LABELS = RIGHT_LABELS | SHEET_CELLS
# One cell of a row is anything; or all are.
ROWS = st.tuples(SHEET_CELLS, SHEET_CELLS, SHEET_CELLS, LABELS) | st.builds(
    lambda cell, column, label: tuple(cell if n == column else v for n, v in enumerate(["hi", "a", "b", label])),
    SHEET_CELLS,
    st.integers(0, 3),
    RIGHT_LABELS,
)


@quick(70)
@given(st.lists(ROWS, max_size=4))
def test_a_sheet(folder, rows):
    book = Workbook()
    for row in [COLUMNS, *rows]:
        try:
            book.active.append(list(row))
        except ValueError:  # a year that Excel does not know
            return
    try:
        book.save(folder / "any.xlsx")
    except (ValueError, TypeError):
        return
    judgements = returns_or_refuses(read_judgements, str(folder / "any.xlsx"))
    if judgements is not None:
        assert judgements.counts.total() + sum(judgements.unjudged.values()) <= len(rows)
        for row in judgements.dataset:
            assert are_messages(row["prompt"])
            for (reply,) in (row["chosen"], row["rejected"]):
                assert reply["role"] == "assistant" and reply["content"].strip()


@quick(40)
@given(st.lists(st.fixed_dictionaries(dict.fromkeys(COLUMNS[:3], CELLS) | {COLUMNS[3]: LABELS | CELLS}), max_size=3))
def test_a_sheet_in_json(folder, rows):
    (folder / "any.json").write_text(json.dumps(rows, default=str), encoding="utf-8")
    returns_or_refuses(load_preferences, str(folder / "any.json"))


RECIPES = (
    (HardPromptArguments, QuestionArguments, ConvertArguments),
    (CompareModelArguments, CompareDatasetArguments, CompareArguments),
    (HardPromptArguments, QuestionArguments, SingleStepPPOConfig),
)
KEYS = st.sampled_from(["model", "dataset", "task", "hard_prompt", "path", "seed", "temperature", "run_name", "lr"])
YAML_TEXT = made_of(*"{}[]:-?&*!|>%@`'\",# \n\ta1é\0", "task:", "\n  ", "!!", "<<: ", "0x", "2024-", "seed: ", most=25)
SECTIONS = st.dictionaries(KEYS, st.dictionaries(KEYS, VALUES, max_size=4) | VALUES, max_size=4)
TAGS = st.builds(
    "task:\n  seed: !!{} {}".format,
    st.sampled_from(["int", "float", "bool", "null", "timestamp", "binary", "set", "omap", "pairs", "map", "seq",
                     "python/name:os.system", "python/object/new:os.system"]),
    st.text(string.printable, max_size=12),
)  # fmt: skip


@quick(200)
@given(SECTIONS.map(yaml.safe_dump) | YAML_TEXT | YAML_TEXT.map("task:\n  seed: ".__add__) | TAGS,
       st.sampled_from(RECIPES))  # fmt: skip
def test_a_recipe(folder, content, classes):
    (folder / "recipe.yaml").write_text(content, encoding="utf-8", errors="replace")
    parsed = returns_or_refuses(parse_recipe, *classes, ["--config", str(folder / "recipe.yaml")])
    assert parsed is None or all(isinstance(p, c) for p, c in zip(parsed, classes, strict=True))


@quick(50)
@given(st.binary(max_size=60))
def test_a_recipe_of_any_bytes(folder, content):
    (folder / "recipe.yaml").write_bytes(content)
    returns_or_refuses(parse_recipe, *RECIPES[0], ["--config", str(folder / "recipe.yaml")])
