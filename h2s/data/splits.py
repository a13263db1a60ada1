"""Split by conversation: train, validation, test; the judge's share; folds; what no model has seen."""

import hashlib
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Literal

from datasets import Dataset, concatenate_datasets

from h2s.data.messages import as_messages, conversation_id
from h2s.errors import InputError

logger = logging.getLogger(__name__)

Part = Literal["train", "validation", "test"]
# Fewer conversations are warned of: README has how often a cluster-robust interval over 10, 16 and 25 holds the truth.
FEWEST_REPORTED, FEWEST_SELECTING = 30, 10
# Among the ids that an adapter's h2s.json lists: there are others, of a time when it listed none.
UNKNOWN = "unknown"


def conversations_of(dataset: Dataset) -> list[str]:
    """The conversation id of each row's `prompt`."""
    return [conversation_id(as_messages(prompt)) for prompt in dataset["prompt"]]


def conversations_in(*datasets: Dataset | None) -> list[str]:
    """The conversation ids of several data sets, each once, in order; what is None is left out."""
    return sorted({c for dataset in datasets if dataset is not None for c in conversations_of(dataset)})


def set_aside_seen(
    dataset: Dataset, seen_by: Mapping[str, Iterable[str]], purpose: str = "to report on", rows: str = "contexts"
) -> tuple[Dataset, str]:
    """Set aside the rows whose conversations trained or selected a model: of these no report is one of unseen data.

    Args:
        dataset: contexts, with a `prompt`.
        seen_by: the conversation ids that each model lists, by its name.
        purpose: what the rows are for, in words.
        rows: what they are.

    Returns:
        The rows that are left, and how many were set aside, in words.

    Raises:
        InputError: none is left.
    """
    ids, seen = conversations_of(dataset), {name: set(listed) for name, listed in seen_by.items()}
    left = [row for row, c in enumerate(ids) if not any(c in listed for listed in seen.values())]
    counts = {name: "unknown" if UNKNOWN in seen[name] else sum(c in seen[name] for c in ids) for name in seen}
    words = (
        f"{len(ids) - len(left)} of {len(ids)} {rows} are set aside, since their conversations trained or selected a "
        f"model: {', '.join(f'{name} {count}' for name, count in counts.items())}"
    )
    if not left:
        raise InputError(
            f"nothing is left {purpose}: {words}; give {rows} of other conversations, or the test_size and "
            "split_seed of those models' own runs"
        )
    unknown = " Unknown: made when an adapter's h2s.json did not list them." if "unknown" in counts.values() else ""
    return dataset.select(left), f"{words}.{unknown}"


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
    """Split rows that carry a `prompt` into train, validation and test.

    Raises:
        InputError: a part would be empty.
    """
    if not 0 < test_size < 0.6 or math.isnan(test_size):
        raise InputError(f"test_size must lie between 0 and 0.6 (half as much again selects), got {test_size}")
    ids = conversations_of(dataset)
    where = [part_of(c, split_seed, test_size) for c in ids]
    conversations = len(set(ids))
    if set(where) == {"test"} and conversations > 3:  # of so many all would hardly be held out by chance
        raise InputError(
            f"{conversations} conversations found, all held out by test_size {test_size} and split_seed {split_seed}, "
            "as are those of a sheet that compare.py wrote with both: take another split_seed, the same in every recipe"
        )
    files = dataset["file"][:] if "file" in dataset.column_names else []
    for file in dict.fromkeys(files):
        rows = [w for f, w in zip(files, where, strict=True) if f == file]
        if "train" not in rows:
            logger.warning(
                "%s: all its %d rows are held out by split_seed %d, none trains", file, len(rows), split_seed
            )
    parts: dict[Part, Dataset] = {}
    for part in ("train", "validation", "test"):
        parts[part] = dataset.select([i for i, p in enumerate(where) if p == part])
        if not len(parts[part]):
            raise InputError(
                f"{conversations} conversations found, the {part} part is empty: {conversations} conversations are too "
                f"few for test_size {test_size} with split_seed {split_seed}; add some or change one of the two"
            )
    return parts


def warn_of_few(reported: Dataset, selecting: Dataset | None = None) -> None:
    """Log where an interval, or a choice, rests on few conversations."""
    for dataset, enough, words in (
        (reported, FEWEST_REPORTED, "reported on: an interval over so few is itself uncertain"),
        (selecting, FEWEST_SELECTING, "used to select: so few choose nearly by chance"),
    ):
        if dataset is not None and (found := len(conversations_in(dataset))) < enough:
            logger.warning("%d conversations found that are %s (%d or more are better)", found, words, enough)


def split_for_models(
    dataset: Dataset, split_seed: int, test_size: float, judge_share: float | None
) -> dict[str, dict[Part, Dataset]]:
    """The parts of a sheet for the reward model, `reward`, and where there is a share for it for a `judge`.

    Raises:
        InputError: a part would be empty.
    """
    parts = split_by_conversation(dataset, split_seed, test_size)
    if judge_share is None:
        return {"reward": parts}
    reward, judge = share_with_judge(parts, split_seed, judge_share)
    return {"reward": reward, "judge": judge}


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
        ids = conversations_of(parts[part])
        of_judge = [_draw(f"judge:{split_seed}:{c}") < judge_share for c in ids]
        if len(set(of_judge)) < 2:
            raise InputError(
                f"{len(set(ids))} conversations found in the {part} part, too few to share between a reward model and "
                f"a judge (judge_share {judge_share}): add conversations or raise test_size"
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
    ids = conversations_of(dataset)
    conversations = sorted(set(ids), key=lambda c: _draw(f"folds:{split_seed}:{c}"))
    if folds < 2 or len(conversations) < 2 * folds:
        raise InputError(
            f"{len(conversations)} conversations found: folds must be at least 2 and at most half of them, got {folds}"
        )
    result = []
    for fold in range(folds):
        part: dict[str, Part] = dict.fromkeys(conversations[fold::folds], "test")
        part |= dict.fromkeys(conversations[(fold + 1) % folds :: folds][::2], "validation")
        where = [part.get(c, "train") for c in ids]
        names: tuple[Part, ...] = ("train", "validation", "test")
        result.append({n: dataset.select([i for i, w in enumerate(where) if w == n]) for n in names})
    return result
