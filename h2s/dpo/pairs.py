"""Judgements as a policy's tokens, and how much it prefers one reply to another: DPO's implicit reward."""

import logging
from collections.abc import Sequence

import torch
from datasets import Dataset

from h2s.data.datasets import places_of
from h2s.data.messages import Messages, as_messages
from h2s.dpo.config import PrefixDPOConfig
from h2s.errors import InputError
from h2s.models import room_for_text
from h2s.prefix.chat_template import check_plain_text, render, special_tokens
from h2s.prefix.generation import Batch
from h2s.prefix.opened import OpenedPolicy
from h2s.prefix.policy_model import PrefixTuningPolicyModel
from h2s.reward.pairs import reply_text
from h2s.reward.trainer import check_pairs
from h2s.run.checkpoints import check_one_device
from h2s.run.terminal import progress_bar

logger = logging.getLogger(__name__)

SIDES = ("chosen", "rejected")


def check_run(
    args: PrefixDPOConfig,
    policy: OpenedPolicy | PrefixTuningPolicyModel,
    train_dataset: Dataset | None,
    eval_dataset: Dataset | None = None,
) -> None:
    """Check what DPO is to learn, and from which policy: before weights load, if the caller has them still to load.

    Raises:
        InputError: this process sees several devices; the base is in 4 bits; a data set holds nothing to learn from; a
            context cannot be answered; or a reply spells out a special token, does not follow its context's tokens, or
            is too long. The row is named.
    """
    check_one_device(args)
    if policy.prefix.quantization is not None or getattr(policy.config, "quantization_config", None) is not None:
        raise InputError("DPO was not run on a base in 4 bits, whose prefix TRL rounds: take one in whole weights")
    check_pairs(train_dataset, "train_dataset")
    if eval_dataset is not None:
        check_pairs(eval_dataset, "eval_dataset")
    for part, name in ((train_dataset, "train_dataset"), (eval_dataset, "eval_dataset")):
        if part is not None:
            if not any(reply_text(row["chosen"]) != reply_text(row["rejected"]) for row in part):
                raise InputError(f"{name} holds no judgement of two unlike replies")
            _check_pairs_fit(policy, part)


def _check_pairs_fit(policy: OpenedPolicy | PrefixTuningPolicyModel, pairs: Dataset) -> None:
    room, special = room_for_text(policy.config, len(policy.prefix.token_ids)), special_tokens(policy.tokenizer)
    prompts = policy.encode(pairs, 1)
    for place, row, ids in zip(places_of(pairs), pairs, prompts, strict=True):
        for side in SIDES:
            check_plain_text(f"{place}: the {side} reply", reply_text(row[side]), special)
            length = len(ids) + len(reply_tokens(policy, as_messages(row["prompt"]), ids, row[side], place))
            if length > room:
                raise InputError(
                    f"{place} and its {side} reply are {length} tokens long, but the model takes {room} beside the "
                    "prefix: leave the row out"
                )


def as_trl_has_it(pairs: Dataset | None) -> Dataset | None:
    """Judgements as the lists of messages from which TRL makes the tokens that were checked, and nothing else of them.

    Two identical replies teach nothing and are left out.
    """
    if pairs is None:
        return None
    rows = [
        [as_messages(row["prompt"]), *([{"role": "assistant", "content": reply_text(row[side])}] for side in SIDES)]
        for row in pairs
    ]
    unlike = [row for row in rows if row[1] != row[2]]
    if len(unlike) < len(rows):
        logger.info("%d pairs of two identical replies are left out", len(rows) - len(unlike))
    return Dataset.from_dict(dict(zip(("prompt", *SIDES), zip(*unlike, strict=True), strict=True)))


def reply_tokens(
    policy: OpenedPolicy | PrefixTuningPolicyModel,
    prompt: Messages,
    prompt_ids: list[int],
    reply: str | Messages,
    place: str,
) -> list[int]:
    """A reply's tokens behind its context, what ends its turn included: those that TRL learns from.

    Raises:
        InputError: the chat template renders the context otherwise once it is answered.
    """
    answered = [*prompt, {"role": "assistant", "content": reply_text(reply)}]
    ids = policy.tokenizer(render(policy.tokenizer, answered), add_special_tokens=False).input_ids
    if ids[: len(prompt_ids)] != prompt_ids:
        raise InputError(
            f"{place}: with its reply the context has other tokens than when it waits for one, so DPO would learn "
            "another one than it answers: train on this model by train_policy.py"
        )
    return ids[len(prompt_ids) :]


class ImplicitReward:
    """beta (log pi(reply | context) - log pi_hard(reply | context)): what DPO's loss compares.

    Rafailov et al. 2023, arXiv 2305.18290, equation 5 (its term of the context alone is the same for both replies).

    Args:
        policy: the soft prefix, and the hard prompt beside it.
        beta: that of the training; in probabilities its unit matters.
        batch_size: replies at a time.
    """

    def __init__(self, policy: PrefixTuningPolicyModel, beta: float, batch_size: int = 8):
        self.policy, self.beta, self.batch_size = policy, beta, batch_size

    @torch.no_grad()
    def score(
        self, contexts: Sequence[str | Messages], responses: Sequence[str | Messages], progress: str | None = None
    ) -> torch.Tensor:
        """The rewards of N responses, shape (N,), as `RewardModel.score` has it; `progress` is the label of a bar."""
        policy, scores = self.policy, []
        messages = [as_messages(context) for context in contexts]
        prompts = policy.encode(messages, 1)
        replies = [
            reply_tokens(policy, *of, f"context {number}")
            for number, of in enumerate(zip(messages, prompts, responses, strict=True), start=1)
        ]
        policy.model.eval()
        for start in progress_bar(range(0, len(prompts), self.batch_size), progress):
            some = slice(start, start + self.batch_size)
            batch = Batch.from_rows(policy.tokenizer, prompts[some], replies[some], policy.model.device)
            soft = policy.module(*batch)[0].sum(1)
            with policy.hard_prompt_active():
                hard = policy.module(*batch)[0].sum(1)
            scores.append(self.beta * (soft - hard).cpu())
        return torch.cat(scores)
