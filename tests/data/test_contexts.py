import hashlib
import json

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from tiny import sample_context

from h2s.data.datasets import load_contexts, load_preferences
from h2s.data.messages import conversation_id, parse_messages, plain
from h2s.data.splits import folds_by_conversation, part_of, share_with_judge, split_by_conversation
from h2s.data.tables import read_table
from h2s.errors import InputError

USER = {"role": "user", "content": "hi there"}
ASSISTANT = {"role": "assistant", "content": "hello"}


def contexts_json(folder, items, name="contexts.json"):
    (folder / name).write_text(json.dumps(items, ensure_ascii=False), encoding="utf-8")
    return str(folder / name)


# What one cell can be


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("hi there", [USER]),
        ("  hi there\n", [USER]),
        ([USER], [USER]),
        ([ASSISTANT, USER], [ASSISTANT, USER]),
        ('[{"role": "user", "content": "hi there"}]', [USER]),
        (' \n[{"role": "user", "content": "hi there"}]', [USER]),
        ("[{'role': 'user', 'content': 'hi there'}]", [USER]),
        ("[{'role': 'user', 'content': \"it's \\n \\u4f60\"}]", [{"role": "user", "content": "it's \n 你"}]),
        ('[{"role": "user", "content": "a\\u2028b \\ud83d\\ude42"}]', [{"role": "user", "content": "a\u2028b 🙂"}]),
        ([{"role": "user", "content": [{"type": "text", "text": "hi "}, {"type": "text", "text": "there"}]}], [USER]),
        ("[{'role': 'user', 'content': [{'type': 'text', 'text': 'hi there'}]}]", [USER]),
        ([{"role": "user", "content": "hi there", "name": "Ann"}], [USER]),
        ("(well) [then] {so}", [{"role": "user", "content": "(well) [then] {so}"}]),
        ("NA", [{"role": "user", "content": "NA"}]),
        ("None", [{"role": "user", "content": "None"}]),
    ],
)
def test_forms_of_a_context(cell, expected):
    assert parse_messages(cell) == expected


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("[laughs] hello", "neither JSON nor a Python literal"),
        ("{hello}", "neither JSON nor a Python literal|list of messages"),
        ("[" * 100_000, "neither JSON nor a Python literal"),
        ("[open('x')]", "neither JSON nor a Python literal"),
        ("[]", "non-empty list"),
        ([], "non-empty list"),
        (None, "non-empty list"),
        (float("nan"), "non-empty list"),
        (7, "non-empty list"),
        ({"role": "user", "content": "hi"}, "non-empty list"),
        (["hi"], "expected a message"),
        ([{"role": "user"}], "expected a message"),
        ([{"content": "hi"}], "expected a message"),
        ([{"role": "system", "content": "hi"}, USER], "must be 'user' or 'assistant', got 'system'"),
        ([{"role": "User", "content": "hi"}], "must be 'user' or 'assistant', got 'User'"),
        ([{"role": "user", "content": " \n"}], "non-empty text"),
        ([{"role": "user", "content": None}], "non-empty text"),
        ([{"role": "user", "content": 3}], "non-empty text"),
        ([{"role": "user", "content": []}], "non-empty text"),
        ([{"role": "user", "content": [{"type": "text", "text": " "}]}], "non-empty text"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "content parts"),
        ([{"role": "user", "content": [{"type": "text"}]}], "content parts"),
        ([{"role": "user", "content": ["hi"]}], "content parts"),
        ("", "non-empty text"),
        ([USER, USER], "two 'user' in a row"),
        ([USER, ASSISTANT, ASSISTANT, USER], "two 'assistant' in a row"),
        ([USER, ASSISTANT], "the last message must be the user's"),
    ],
)
def test_what_is_no_context(cell, words):
    with pytest.raises(InputError, match=words) as error:
        parse_messages(cell)
    assert len(str(error.value)) < 300


def test_a_cell_is_never_evaluated(tmp_path):
    trap = tmp_path / "trap"
    with pytest.raises(InputError):
        parse_messages(f"[__import__('pathlib').Path({str(trap)!r}).touch()]")
    assert not trap.exists()


def test_plain_undoes_numpy_all_the_way_down():
    cell = np.array(
        [{"role": "user", "content": np.array([{"type": "text", "text": "a"}], dtype=object)}], dtype=object
    )
    assert plain(cell) == [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    assert type(plain(np.int64(3))) is int


# Files


def test_mixed_forms_in_one_json(tmp_path):
    items = [
        {"context": "hi there"},
        {"context": [ASSISTANT, USER], "id": 7},
        {"context": str([USER])},
        {"context": json.dumps([USER])},
        {"context": [{"role": "user", "content": [{"type": "text", "text": "hi there"}]}]},
    ]
    rows = load_contexts(contexts_json(tmp_path, items))
    assert rows.column_names == ["prompt", "conversation", "row"]
    assert list(rows["prompt"]) == [[USER], [ASSISTANT, USER], [USER], [USER], [USER]]
    assert list(rows["row"]) == [1, 2, 3, 4, 5]
    ids = list(rows["conversation"])
    assert ids[0] == ids[2] == ids[3] == ids[4] != ids[1]


def write_contexts(folder, suffix, contexts):
    file = folder / f"contexts.{suffix}"
    texts = pd.DataFrame({"context": [json.dumps(c, ensure_ascii=False) for c in contexts]})
    if suffix == "json":
        file.write_text(json.dumps([{"context": c} for c in contexts], ensure_ascii=False), encoding="utf-8")
    if suffix == "jsonl":
        lines = [json.dumps({"context": c}, ensure_ascii=False) for c in contexts]
        file.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    if suffix == "csv":
        texts.to_csv(file, index=False)
    if suffix == "xlsx":
        texts.to_excel(file, index=False)
    if suffix == "parquet":
        Dataset.from_dict({"context": contexts}).to_parquet(file)
    return str(file)


FORMATS = ["json", "jsonl", "csv", "xlsx", "parquet"]
# Text that some reader might take for something else: an empty cell, a line's end, a number, a date.
ODD_TEXTS = [
    "NA",
    "None",
    "null",
    "nan",
    "a\nb",
    "a\u2028b",
    "a\x85b",
    '"quoted", and, commas',
    "1.50",
    "2024-01-02",
    "你好 🙂",
]


@pytest.mark.parametrize("suffix", FORMATS)
def test_all_formats_give_the_same_contexts(tmp_path, suffix):
    contexts = [sample_context(i) for i in range(5)] + [[{"role": "user", "content": t}] for t in ODD_TEXTS]
    rows = load_contexts(write_contexts(tmp_path, suffix, contexts))
    assert list(rows["prompt"]) == contexts


def test_file_name_with_brackets(tmp_path):
    """As browsers name a second download."""
    for suffix in FORMATS:
        folder = tmp_path / "data [1]*"
        folder.mkdir(exist_ok=True)
        assert list(load_contexts(write_contexts(folder, suffix, [[USER]]))["prompt"]) == [[USER]]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_byte_order_mark(tmp_path, suffix):
    """As Windows programs write UTF-8."""
    file = tmp_path / f"contexts.{suffix}"
    text = {"json": '[{"context": "hi there"}]', "jsonl": '{"context": "hi there"}', "csv": "context\nhi there\n"}
    file.write_text("\ufeff" + text[suffix], encoding="utf-8")
    assert list(load_contexts(str(file))["prompt"]) == [[USER]]


def test_a_file_read_again_after_a_change_is_the_new_one(tmp_path):
    for text in ("hi there", "hello there"):
        (tmp_path / "contexts.csv").write_text(f"context\n{text}\n", encoding="utf-8")
        assert load_contexts(str(tmp_path / "contexts.csv"))["prompt"][0] == [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([{"context": "hi"}, {"context": "[1"}], r"contexts\.json, row 2, context: .*neither JSON"),
        ([{"context": "hi"}, {"id": 3}], r"contexts\.json, row 2, context: .*non-empty list"),
        ([{"context": "hi"}, {"context": None}], r"contexts\.json, row 2, context: .*non-empty list"),
        ([{"context": [USER, ASSISTANT]}], r"contexts\.json, row 1, context: the last message"),
        ([{"Context": "hi", "b": 1}], r"no column 'context'; found Context, b"),
        ([], r"no column 'context'; found none"),
        (["hi"], "is not a list of objects"),
        ({"context": "hi"}, "is not a list of objects"),
    ],
)
def test_errors_name_file_and_row(tmp_path, items, words):
    with pytest.raises(InputError, match=words):
        load_contexts(contexts_json(tmp_path, items))


@pytest.mark.parametrize(("suffix", "row"), [("csv", 3), ("xlsx", 3), ("parquet", 2)])
def test_a_sheet_is_counted_with_its_header(tmp_path, suffix, row):
    file = tmp_path / f"contexts.{suffix}"
    table = pd.DataFrame({"context": ["hi", "[1"]})
    {"csv": table.to_csv, "xlsx": table.to_excel, "parquet": table.to_parquet}[suffix](file, index=False)
    with pytest.raises(InputError, match=f"row {row}, context: .*neither JSON"):
        load_contexts(str(file))


def test_table_with_a_header_alone(tmp_path):
    (tmp_path / "contexts.csv").write_text("context\n", encoding="utf-8")
    with pytest.raises(InputError, match="no contexts in it"):
        load_contexts(str(tmp_path / "contexts.csv"))


@pytest.mark.parametrize("name", ["none.json", "none.xlsx", "owner/none.csv", "./owner/none", "/owner/none", "a/b/c"])
def test_no_such_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"no such file: {name} .expected a sheet"):
        read_table(name, "a sheet")


# Conversations and their parts


def test_conversation_id_by_hand():
    # printf 'user\nhi there' | sha256sum
    assert conversation_id([USER]) == "285bdd5342662185"
    assert conversation_id([{"role": "user", "content": " hi there\n"}]) == "285bdd5342662185"
    # printf 'assistant\nWelcome!\nuser\nhi there' | sha256sum
    assert conversation_id([{"role": "assistant", "content": "Welcome!"}, USER]) == "f0cf135903936cd3"


def test_turns_of_one_conversation_share_their_id():
    turns = [USER, ASSISTANT, {"role": "user", "content": "I ran."}, ASSISTANT, {"role": "user", "content": "Bye."}]
    assert len({conversation_id(turns[:n]) for n in (1, 3, 5)}) == 1
    others = [[{"role": "user", "content": "hi There"}], [{"role": "assistant", "content": "hi there"}, USER]]
    assert conversation_id([USER]) not in {conversation_id(o) for o in others}


def test_one_greeting_for_all_is_no_conversation():
    """The assistant opens each with the same words; turns of one still belong together."""
    greeting = {"role": "assistant", "content": "How was your day?"}
    talks = [[greeting, {"role": "user", "content": f"Day {i}"}] for i in range(5)]
    assert len({conversation_id(t) for t in talks}) == 5
    assert conversation_id([*talks[0], ASSISTANT, USER]) == conversation_id(talks[0])


def expected_part(conversation, seed, size):
    """By the definition: the first 8 bytes of a hash as a share of 2^64; below the size test, half again validation."""
    share = int(hashlib.sha256(f"{seed}:{conversation}".encode()).hexdigest()[:16], 16) / 16**16
    return "test" if share < size else "validation" if share < size * 3 / 2 else "train"


def test_part_by_hand():
    # printf 42:abc | sha256sum begins 4c61, which is 0.298 of ffff; 1:abc fac4, 0.980; 6:abc 56bb, 0.339.
    assert [part_of("abc", 42, size) for size in (0.15, 0.2, 0.29, 0.3)] == ["train", *["validation"] * 2, "test"]
    assert [part_of("abc", 6, size) for size in (0.2, 0.3, 0.35)] == ["train", "validation", "test"]
    assert part_of("abc", 1, 0.59) == "train"


def many(count=400, turns=2):
    prompts = [[{"role": "user", "content": f"talk {i % (count // turns)}"}] for i in range(count)]
    return Dataset.from_list(
        [{"prompt": p, "conversation": conversation_id(p), "row": n} for n, p in enumerate(prompts, start=1)]
    )


def test_split_is_deterministic_whole_and_disjoint_by_conversation():
    rows = many()
    parts = split_by_conversation(rows, 42, 0.2)
    again = split_by_conversation(rows.shuffle(seed=1), 42, 0.2)
    assert list(parts) == ["train", "validation", "test"]
    assert sorted(r for p in parts.values() for r in p["row"]) == list(range(1, 401))
    ids = {name: set(p["conversation"]) for name, p in parts.items()}
    assert sum(map(len, ids.values())) == len(set.union(*ids.values())) == 200
    assert ids == {name: set(p["conversation"]) for name, p in again.items()}
    for name, found in ids.items():
        assert {expected_part(c, 42, 0.2) for c in found} == {name}
    # Shares 0.7, 0.1, 0.2 of 200 conversations, within four standard deviations.
    for name, share in {"train": 0.7, "validation": 0.1, "test": 0.2}.items():
        assert abs(len(ids[name]) - 200 * share) < 4 * (200 * share * (1 - share)) ** 0.5


def test_split_depends_on_its_seed_and_size():
    rows = many()
    test = set(split_by_conversation(rows, 42, 0.2)["test"]["conversation"])
    assert test != set(split_by_conversation(rows, 43, 0.2)["test"]["conversation"])
    assert test < set(split_by_conversation(rows, 42, 0.3)["test"]["conversation"])


def test_adding_conversations_moves_none():
    few, more = many(200), many(400)
    before, after = (split_by_conversation(r, 42, 0.2) for r in (few, more))
    for part in before:
        assert set(before[part]["conversation"]) <= set(after[part]["conversation"])


def test_sheet_and_contexts_hold_out_the_same_conversations(sheet_file, contexts_file):
    sheet = split_by_conversation(load_preferences(str(sheet_file)).dataset, 42, 0.2)
    contexts = split_by_conversation(load_contexts(str(contexts_file)), 42, 0.2)
    for part in ("train", "validation", "test"):
        assert set(sheet[part]["conversation"]) == set(contexts[part]["conversation"])


@pytest.mark.parametrize("size", [0, -0.1, 0.6, 1, float("nan")])
def test_sizes_that_leave_a_part_empty(size):
    with pytest.raises(InputError, match=r"test_size must lie between 0 and 0\.6"):
        split_by_conversation(many(), 42, size)


def test_too_few_conversations():
    rows = many(10, turns=10)
    with pytest.raises(InputError, match=r"part is empty: 1 conversations are too few for test_size 0\.2"):
        split_by_conversation(rows, 42, 0.2)


# Folds and the judge's share


def ids_of(parts):
    return {name: set(part["conversation"]) for name, part in parts.items()}


@pytest.mark.parametrize(("conversations", "folds"), [(4, 2), (6, 3), (23, 5), (200, 10)])
def test_folds_test_each_conversation_once(conversations, folds):
    """Three turns a conversation; within a fold no conversation is in two parts, and no row is lost."""
    rows = many(conversations * 3, turns=3)
    splits = folds_by_conversation(rows, folds, 42)
    assert len(splits) == folds and all(list(s) == ["train", "validation", "test"] for s in splits)
    tested = [c for s in splits for c in ids_of(s)["test"]]
    assert sorted(tested) == sorted(set(rows["conversation"])) and len(tested) == conversations
    for split in splits:
        assert sorted(r for part in split.values() for r in part["row"]) == sorted(rows["row"])
        ids = ids_of(split)
        assert all(ids.values()) and sum(map(len, ids.values())) == len(set.union(*ids.values()))
        # Of equal size but for the rest of a division; half as many select.
        assert len(ids["test"]) in (conversations // folds, -(-conversations // folds))
        assert abs(len(ids["validation"]) - len(ids["test"]) / 2) <= 1


def test_no_conversation_selects_in_every_fold():
    """It would never train, and all folds would choose their epoch by nearly the same pairs."""
    splits = folds_by_conversation(many(), 5, 42)
    trained = set.union(*(ids_of(s)["train"] for s in splits))
    assert len(trained) == 200


def test_folds_are_deterministic_and_depend_on_their_seed():
    rows = many(60)
    first, again, other = (folds_by_conversation(r, 3, s) for r, s in ((rows, 1), (rows.shuffle(seed=1), 1), (rows, 2)))
    assert [ids_of(s) for s in first] == [ids_of(s) for s in again]
    assert [ids_of(s)["test"] for s in first] != [ids_of(s)["test"] for s in other]


def test_folds_do_not_follow_the_order_of_the_file():
    """A sheet may be sorted by who judged it."""
    rows = many(200, turns=1)
    for split in folds_by_conversation(rows, 2, 42):
        assert 60 < sum(split["test"]["row"]) / 100 < 140  # near the middle, 100
        assert split["test"]["row"] != rows["row"][::2] and split["test"]["row"] != rows["row"][1::2]


@pytest.mark.parametrize(("conversations", "folds"), [(10, 1), (10, 0), (10, -2), (10, 6), (3, 2)])
def test_folds_that_do_not_fit(conversations, folds):
    words = f"folds must be at least 2 and at most half of the {conversations} conversations, got {folds}"
    with pytest.raises(InputError, match=words):
        folds_by_conversation(many(conversations * 2), folds, 42)


def test_neither_model_sees_the_others_conversations():
    rows = many(800)
    parts = split_by_conversation(rows, 42, 0.2)
    reward, judge = (ids_of(p) for p in share_with_judge(parts, 42, 0.5))
    for part in ("train", "validation"):
        assert reward[part] | judge[part] == set(parts[part]["conversation"])
    seen = {"reward": reward["train"] | reward["validation"], "judge": judge["train"] | judge["validation"]}
    assert not seen["reward"] & seen["judge"]
    # What each is reported on is all that it never saw: nothing left out, nothing it trained or selected on.
    everything = set(rows["conversation"])
    assert reward["test"] == everything - seen["reward"] and judge["test"] == everything - seen["judge"]


def test_judge_loses_and_doubles_no_row():
    rows = many(200)
    parts = split_by_conversation(rows, 42, 0.2)
    for model in share_with_judge(parts, 42, 0.3):
        assert sorted(r for part in model.values() for r in part["row"]) == sorted(rows["row"])
        assert set(parts["test"]["row"]) <= set(model["test"]["row"])


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_judge_gets_its_share(share):
    parts = split_by_conversation(many(1600), 42, 0.2)
    reward, judge = share_with_judge(parts, 42, share)
    count = len(ids_of(parts)["train"])
    assert abs(len(ids_of(judge)["train"]) - count * share) < 4 * (count * share * (1 - share)) ** 0.5
    again = share_with_judge(split_by_conversation(many(1600).shuffle(seed=3), 42, 0.2), 42, share)
    assert [ids_of(p) for p in again] == [ids_of(reward), ids_of(judge)]


def test_judges_share_is_not_the_splits_draw():
    """Drawn anew: the same number again would give all that selects to one of the two."""
    reward, judge = share_with_judge(split_by_conversation(many(1600), 42, 0.2), 42, 0.5)
    low, high = sorted(len(ids_of(p)["validation"]) for p in (reward, judge))
    assert low > high / 2


@pytest.mark.parametrize("share", [0, 1, -0.2, 1.2, float("nan")])
def test_judge_shares_that_leave_nothing(share):
    with pytest.raises(InputError, match="judge_share must lie between 0 and 1, got"):
        share_with_judge(split_by_conversation(many(), 42, 0.2), 42, share)


def test_too_few_conversations_for_a_judge():
    parts = split_by_conversation(many(), 42, 0.2)
    one = parts["validation"].select(range(1))
    with pytest.raises(InputError, match="the validation part holds 1 conversations, too few to share"):
        share_with_judge(parts | {"validation": one}, 42, 0.5)
    with pytest.raises(InputError, match="the train part holds 1 conversations, too few to share"):
        share_with_judge(parts | {"train": one}, 42, 0.5)
