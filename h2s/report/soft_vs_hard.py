"""Soft against hard: the same contexts and random states, answered by both prompts and scored.

A *comparison table* has a row a context: `conversation`, `prompt` (messages), and for `soft` and `hard` the reply `…`,
its tokens `…_tokens`, whether it ended by itself `…_finished`, its scores `…_{name}`; `kl` is the soft reply's summed
log-ratio to the hard prompt, in nats.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import TrainerState

from h2s.data.messages import Messages, as_messages, conversation_id
from h2s.errors import RunError
from h2s.prefix.generation import Batch, Sampling, seeded
from h2s.prefix.policy_model import PrefixTuningPolicyModel
from h2s.reward.functions import RewardFunctions, reward_columns
from h2s.run.terminal import progress_bar


def soft_vs_hard(
    policy: PrefixTuningPolicyModel,
    contexts: Dataset,
    scorers: Mapping[str, RewardFunctions],
    sampling: Sampling,
    batch_size: int = 16,
    seed: int = 42,
    trainer_state: TrainerState | None = None,
    progress: bool = True,
    hard: pd.DataFrame | None = None,
    label: str = "soft against hard",
) -> pd.DataFrame:
    """Answer each context with the soft and with the hard prompt, from the same random state, and score both.

    Several processes share the batches out; each of them gets the whole table, the same as from one process.

    Args:
        policy: its random state outside is left as it was.
        contexts: `prompt` (messages) and, for rewards that ask for them, further columns.
        scorers: rewards by the name that the table gives their weighted sum.
        sampling: how completions are drawn, the same for both.
        batch_size: contexts at a time.
        seed: of the sampling; the same seed gives the same hard completions.
        trainer_state: for rewards that ask for it.
        progress: whether to show a bar.
        hard: a comparison table of the same contexts, sampling and seed: the hard side is taken from it, not drawn.
        label: of the bar.

    Returns:
        The comparison table, its index being the context's place. A score is NaN where a reward left the reply out.

    Raises:
        InputError: a context cannot be answered.
        RunError: a score is not finite; it would count as neither won nor lost.
    """
    policy.add_hard_prompt()
    prompts = [as_messages(prompt) for prompt in contexts["prompt"]]
    prompt_ids = policy.encode(prompts, sampling.max_completion_length)
    sides = ("soft", "hard") if hard is None else ("soft",)
    records: list[dict] = []
    for rows in shared_batches(len(contexts), batch_size, label, progress):
        batch = [prompts[i] for i in rows], [prompt_ids[i] for i in rows]
        records += _answer(policy, *batch, rows, sampling, seed, sides)
    mine = contexts.select([record["row"] for record in records])
    for name, scorer in scorers.items():
        for side in sides:
            score_replies(scorer, mine, records, side, f"{side}_{name}", trainer_state)
    table = gather_rows(records).drop(columns=[f"{side}_ids" for side in sides])
    if hard is not None:
        table = table.join(hard.filter(regex="^hard"))
    for name in scorers:
        both = table[[f"soft_{name}", f"hard_{name}"]]
        if np.isinf(both).any(axis=None):
            raise RunError(f"the {name} of a reply is not finite")
    return table


def score_replies(
    scorer: RewardFunctions,
    contexts: Dataset,
    records: list[dict],
    reply: str,
    name: str,
    trainer_state: TrainerState | None = None,
) -> None:
    """Add the score `name` of the texts `reply` to records, in place; `contexts` holds their rows in the same order."""
    texts, ids = ([record[key] for record in records] for key in (reply, f"{reply}_ids"))
    prompts = [record["prompt"] for record in records]
    values = scorer(prompts, texts, ids, reward_columns(contexts), trainer_state)
    for record, score in zip(records, scorer.total(values).tolist(), strict=True):
        record[name] = score


def shared_batches(count: int, batch_size: int, label: str, progress: bool) -> Iterator[range]:
    """This process's batches of `count` rows.

    All processes have as many (a sharded model needs the same calls of each), so some may come twice: `gather_rows`
    takes each row once.
    """
    state = PartialState()
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    each = math.ceil(len(batches) / state.num_processes)
    mine = [batches[(state.process_index + n * state.num_processes) % len(batches)] for n in range(each)]
    yield from progress_bar(mine, label, progress and state.is_main_process)


def gather_rows(records: list[dict]) -> pd.DataFrame:
    """All processes' records, each `row` once, in order: the table that one process would have made."""
    gathered = {record["row"]: record for record in gather_object(records)}
    return pd.DataFrame.from_records([gathered[row] for row in sorted(gathered)], index="row")


@torch.no_grad()
def _answer(
    policy: PrefixTuningPolicyModel,
    prompts: list[Messages],
    prompt_ids: list[list[int]],
    rows: range,
    sampling: Sampling,
    seed: int,
    sides: Sequence[str],
) -> list[dict]:
    """A record a context of one batch, whose first row is part of its seed."""
    drawn = {}
    for side in sides:
        prompt = nullcontext() if side == "soft" else policy.hard_prompt_active()
        with seeded(policy.model.device, seed + rows.start), prompt:
            drawn[side] = policy.complete(prompt_ids, sampling)
    kls = [math.nan] * len(prompts)
    if sampling.whole:
        batch = Batch.from_rows(policy.tokenizer, prompt_ids, drawn["soft"], policy.model.device)
        logps = policy.module(*batch, sampling.temperature)[0]
        with policy.hard_prompt_active():
            ref_logps = policy.module(*batch, sampling.temperature)[0]
        kls = (logps - ref_logps).sum(1).tolist()
    records = []
    for row, messages, kl, *completions in zip(rows, prompts, kls, *drawn.values(), strict=True):
        record: dict[str, Any] = {"row": row, "conversation": conversation_id(messages), "prompt": messages, "kl": kl}
        for name, completion in zip(sides, completions, strict=True):
            record[name] = policy.decode(completion)
            record[f"{name}_ids"] = completion
            record[f"{name}_tokens"] = len(completion)
            record[f"{name}_finished"] = completion[-1] in policy.stop_ids
        records.append(record)
    return records
