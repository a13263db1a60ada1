import hashlib

import pytest
from datasets import Dataset, concatenate_datasets

from h2s.data.datasets import load_contexts, load_preferences
from h2s.data.splits import (
    UNKNOWN,
    conversations_in,
    conversations_of,
    folds_by_conversation,
    part_of,
    set_aside_seen,
    share_with_judge,
    split_by_conversation,
    split_for_models,
)
from h2s.errors import InputError


def test_conversations_of_rows_by_hand():
    """The hash of a first message: `printf 'user\\nhi there' | sha256sum`."""
    prompts = [[{"role": "user", "content": text}] for text in ("hi there", "talk 0", "hi there")]
    first, other, again = conversations_of(Dataset.from_dict({"prompt": prompts}))
    assert first == again == "285bdd5342662185" != other


def test_conversations_in_several_data_sets():
    """Each once, in order; text is one user message, as the Python API has it."""
    few, texts = many(6), Dataset.from_dict({"prompt": ["hi there", "talk 1"]})
    found = conversations_in(few, None, texts)
    assert found == sorted({*conversations_of(few), "285bdd5342662185"}) and len(found) == 4
    assert conversations_in() == conversations_in(None) == []


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
    return Dataset.from_dict({"prompt": prompts, "row": list(range(1, count + 1))})


def ids_of(parts):
    return {name: set(conversations_of(part)) for name, part in parts.items()}


def test_split_is_deterministic_whole_and_disjoint_by_conversation():
    rows = many()
    parts = split_by_conversation(rows, 42, 0.2)
    again = split_by_conversation(rows.shuffle(seed=1), 42, 0.2)
    assert list(parts) == ["train", "validation", "test"]
    assert sorted(r for p in parts.values() for r in p["row"]) == list(range(1, 401))
    ids = ids_of(parts)
    assert sum(map(len, ids.values())) == len(set.union(*ids.values())) == 200
    assert ids == ids_of(again)
    for name, found in ids.items():
        assert {expected_part(c, 42, 0.2) for c in found} == {name}
    # Shares 0.7, 0.1, 0.2 of 200 conversations, within four standard deviations.
    for name, share in {"train": 0.7, "validation": 0.1, "test": 0.2}.items():
        assert abs(len(ids[name]) - 200 * share) < 4 * (200 * share * (1 - share)) ** 0.5


def test_split_depends_on_its_seed_and_size():
    rows = many()
    test, other_seed, larger = (
        ids_of(split_by_conversation(rows, *how))["test"] for how in ((42, 0.2), (43, 0.2), (42, 0.3))
    )
    assert test != other_seed
    assert test < larger


def test_adding_conversations_moves_none():
    few, more = many(200), many(400)
    before, after = (ids_of(split_by_conversation(r, 42, 0.2)) for r in (few, more))
    assert all(before[part] <= after[part] for part in before)


def test_sheet_and_contexts_hold_out_the_same_conversations(sheet_file, contexts_file):
    sheet = split_by_conversation(load_preferences(str(sheet_file)), 42, 0.2)
    contexts = split_by_conversation(load_contexts(str(contexts_file)), 42, 0.2)
    assert ids_of(sheet) == ids_of(contexts)


@pytest.mark.parametrize("size", [0, -0.1, 0.6, 1, float("nan")])
def test_sizes_that_leave_a_part_empty(size):
    with pytest.raises(InputError, match=r"test_size must lie between 0 and 0\.6"):
        split_by_conversation(many(), 42, size)


def test_too_few_conversations():
    rows = many(10, turns=10)
    with pytest.raises(InputError, match=r"part is empty: 1 conversations are too few for test_size 0\.2"):
        split_by_conversation(rows, 42, 0.2)


# Folds and the judge's share


@pytest.mark.parametrize(("conversations", "folds"), [(4, 2), (6, 3), (23, 5), (200, 10)])
def test_folds_test_each_conversation_once(conversations, folds):
    """Three turns a conversation; within a fold no conversation is in two parts, and no row is lost."""
    rows = many(conversations * 3, turns=3)
    splits = folds_by_conversation(rows, folds, 42)
    assert len(splits) == folds and all(list(s) == ["train", "validation", "test"] for s in splits)
    tested = [c for s in splits for c in ids_of(s)["test"]]
    assert sorted(tested) == sorted(set(conversations_of(rows))) and len(tested) == conversations
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
    words = f"{conversations} conversations found: folds must be at least 2 and at most half of them, got {folds}"
    with pytest.raises(InputError, match=words):
        folds_by_conversation(many(conversations * 2), folds, 42)


def test_neither_model_sees_the_others_conversations():
    rows = many(800)
    parts = split_by_conversation(rows, 42, 0.2)
    reward, judge = (ids_of(p) for p in share_with_judge(parts, 42, 0.5))
    for part in ("train", "validation"):
        assert reward[part] | judge[part] == ids_of(parts)[part]
    seen = {"reward": reward["train"] | reward["validation"], "judge": judge["train"] | judge["validation"]}
    assert not seen["reward"] & seen["judge"]
    # What each is reported on is all that it never saw: nothing left out, nothing it trained or selected on.
    everything = set(conversations_of(rows))
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
    with pytest.raises(InputError, match="1 conversations found in the validation part, too few to share"):
        share_with_judge(parts | {"validation": one}, 42, 0.5)
    with pytest.raises(InputError, match="1 conversations found in the train part, too few to share"):
        share_with_judge(parts | {"train": one}, 42, 0.5)


def test_parts_of_the_models():
    """Of the reward model alone, or of it and the judge: what the two splits above give."""
    rows = many()
    parts = split_by_conversation(rows, 42, 0.2)
    alone = split_for_models(rows, 42, 0.2, None)
    assert list(alone) == ["reward"] and ids_of(alone["reward"]) == ids_of(parts)
    both = split_for_models(rows, 42, 0.2, 0.4)
    reward, judge = share_with_judge(parts, 42, 0.4)
    assert list(both) == ["reward", "judge"]
    assert [ids_of(p) for p in both.values()] == [ids_of(reward), ids_of(judge)]


def test_a_sheet_that_is_held_out_whole():
    """As one that compare.py wrote: its conversations are the test part of the same seed and size."""
    held_out = split_by_conversation(many(), 42, 0.2)["test"]
    words = "[0-9]+ conversations found, all held out by test_size 0.2 and split_seed 42, .* take another split_seed"
    with pytest.raises(InputError, match=words):
        split_by_conversation(held_out, 42, 0.2)
    assert split_by_conversation(held_out, 43, 0.2)


# What was seen


def test_what_was_seen_is_set_aside_and_counted():
    """By whole conversations: a later turn of one that was seen goes with it."""
    turns = [[{"role": "user", "content": f"talk {i}"}] for i in range(4)]
    turns.append([*turns[1], {"role": "assistant", "content": "And you?"}, {"role": "user", "content": "Fine."}])
    rows = Dataset.from_dict({"prompt": turns, "row": list(range(5))})
    ids = conversations_of(rows)
    unseen, words = set_aside_seen(rows, {"policy": [], "reward": [ids[1], "0" * 16], "judge": ids[:2]})
    assert unseen["row"] == [2, 3]
    assert words == (
        "3 of 5 contexts are set aside, since their conversations trained or selected a model: policy 0, reward 2, "
        "judge 3."
    )
    unseen, words = set_aside_seen(rows, {"policy": []})
    assert unseen["row"] == rows["row"] and words.startswith("0 of 5 contexts are set aside")


def test_a_model_that_does_not_say_what_it_saw():
    rows = many(4)
    unseen, words = set_aside_seen(rows, {"policy": [UNKNOWN, conversations_of(rows)[0]], "reward": []})
    assert len(unseen) == 2
    assert words.startswith("2 of 4 contexts are") and ": policy unknown, reward 0. Unknown: " in words


def test_nothing_is_left():
    rows = many(4)
    words = "nothing is left to report on: 4 of 4 contexts are set aside, .*: judge 4; give contexts of other conv"
    with pytest.raises(InputError, match=words):
        set_aside_seen(rows, {"judge": conversations_of(rows)})


def test_a_file_whose_rows_are_all_held_out_is_named(caplog):
    """As one that compare.py wrote, beside the sheets that train."""
    rows = many()
    held_out = split_by_conversation(rows, 42, 0.2)["test"]
    assert not caplog.messages
    both = [part.add_column("file", [name] * len(part)) for name, part in (("a.xlsx", rows), ("b.xlsx", held_out))]
    split_by_conversation(concatenate_datasets(both), 42, 0.2)
    assert caplog.messages == [f"b.xlsx: all its {len(held_out)} rows are held out by split_seed 42, none trains"]
