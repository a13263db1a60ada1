"""What goes into the PPO trainer: contexts with their tokens, and whether settings, data and rewards fit together."""

from collections.abc import Collection, Mapping
from typing import Any

from datasets import Dataset
from transformers.trainer_utils import IntervalStrategy

from h2s.data.messages import as_messages
from h2s.errors import InputError
from h2s.ppo.config import SingleStepPPOConfig
from h2s.prefix.policy_model import PrefixTuningPolicyModel
from h2s.report.comparison import metric_names
from h2s.reward.functions import TAKEN_NAMES, RewardFunctions
from h2s.run.checkpoints import check_one_device


def check_run(
    args: SingleStepPPOConfig, train_dataset: Any, eval_dataset: Any, scorers: Mapping[str, RewardFunctions]
) -> None:
    """Check that this machine and this data can run these settings: before weights load.

    Raises:
        InputError: one process sees several CUDA devices, a data set has the wrong columns, the contexts do not fill
            an iteration, or the first evaluation would fail.
    """
    check_one_device(args)
    check_columns(train_dataset, "train_dataset")
    if eval_dataset is not None:
        check_columns(eval_dataset, "eval_dataset")
    needed = args.per_device_train_batch_size * args.world_size
    if len(train_dataset) < needed:
        raise InputError(
            f"{len(train_dataset)} contexts train, fewer than the {needed} of one iteration: lower "
            "per_device_train_batch_size or add contexts"
        )
    RewardFunctions(scorers["reward"], args.reward_weights)  # as many weights as rewards
    metric, metrics = selection_metric(args, scorers), metric_names(scorers)
    if args.eval_strategy == IntervalStrategy.NO:
        return
    if eval_dataset is None:
        raise InputError(f"eval_strategy is {args.eval_strategy.value}, but there is no eval_dataset: give it one")
    if metric.removeprefix("eval_") not in metrics:
        others = "" if "judge" in scorers else "; those of the judge need a judge_adapter"
        raise InputError(f"metric_for_best_model must be one of {', '.join(metrics)}, got {metric}{others}")


def check_columns(dataset: Any, name: str) -> None:
    """Check that contexts are a data set with a `prompt`, whose other columns rewards can be handed.

    Raises:
        InputError: they are not.
    """
    if not isinstance(dataset, Dataset) or "prompt" not in dataset.column_names:
        got = dataset.column_names if isinstance(dataset, Dataset) else type(dataset).__name__
        raise InputError(f"{name} must be a datasets.Dataset with a column prompt, got {got}")
    taken = [column for column in dataset.column_names if column in TAKEN_NAMES]
    if taken:
        raise InputError(f"{name} has a column {taken[0]}, a name that rewards are handed something else by: rename it")


def encode_contexts(
    dataset: Dataset, name: str, policy: PrefixTuningPolicyModel, max_completion_length: int
) -> Dataset:
    """Contexts with `prompt` as messages and `prompt_ids`, what is fed after the prefix.

    Raises:
        InputError: the columns are wrong, or a context cannot be answered (named by its row or place).
    """
    check_columns(dataset, name)
    prompts = []
    for number, prompt in enumerate(dataset["prompt"], start=1):
        try:
            prompts.append(as_messages(prompt))
        except InputError as error:
            raise InputError(f"{name}, context {number}: {error}") from error
    prompt_ids = policy.encode(dataset, max_completion_length)
    others = {c: dataset[c][:] for c in dataset.column_names if c not in ("prompt", "prompt_ids")}
    return Dataset.from_dict({**others, "prompt": prompts, "prompt_ids": prompt_ids})


def selection_metric(args: SingleStepPPOConfig, scorers: Collection[str]) -> str:
    """What selects the best prefix: what was asked for, else the judge's difference, else the reward's."""
    return args.metric_for_best_model or ("judge_difference" if "judge" in scorers else "reward_difference")


def as_columns(rows: list[dict[str, Any]]) -> dict[str, list]:
    """Collate contexts: they have nothing to pad before they are answered, so a batch is its columns."""
    return {name: [row[name] for row in rows] for name in rows[0]}
