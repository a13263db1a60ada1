"""What scores replies: functions, reward models and their adapters.

They are called as TRL 1.16's `RLOOTrainer` calls its rewards.
"""

import asyncio
import copy
import functools
import importlib
import inspect
import math
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import TaskType
from transformers import TrainerState

from h2s.data.datasets import NOT_HANDED_ON
from h2s.data.messages import Messages
from h2s.errors import InputError
from h2s.hub import adapter_folder, short_name
from h2s.prefix.adapter import fingerprint, read_adapter_config
from h2s.reward.model import RewardModel, read_settings

# (prompts=, completions=, completion_ids=, every other column, trainer_state=, log_extra=, log_metric=) -> a number or
# None for each completion, which is a list of one message.
RewardFunction = Callable[..., Any]
# What a reward is handed by these names; a column of the data set cannot have one of them.
TAKEN_NAMES = ("prompts", "completions", "trainer_state", "log_extra", "log_metric")


def reward_columns(rows: Dataset | Mapping[str, list]) -> dict[str, list]:
    """The columns of a data set or a batch that a reward is handed by their names."""
    names = rows.column_names if isinstance(rows, Dataset) else rows
    return {name: list(rows[name]) for name in names if name not in (*NOT_HANDED_ON, "prompt_ids")}


class RewardFunctions:
    """One or several rewards with their weights.

    ```python
    rewards = RewardFunctions([asks_back, "outputs/reward"], weights=[1.0, 0.5])
    values = rewards(prompts, ["And you?"])  # (1, 2)
    rewards.total(values)  # (1,)
    ```

    Adapters are checked at once and loaded by `load`, or by the first call.

    Args:
        reward_funcs: callables of TRL's signature (`async` ones are awaited together), `RewardModel`s, folders or Hub
            names of reward adapters, or a list of these.
        weights: one a reward; 1 each by default.

    Attributes:
        functions: what was given.
        names: as TRL makes them: a function's name, a callable's class, an adapter's folder; numbered where some are
            alike, since the log and the completions know rewards by them.
        weights: (F,).

    Raises:
        InputError: something else is given, an adapter is none, or the weights are of another number.
    """

    def __init__(
        self,
        reward_funcs: "RewardFunctions | RewardFunction | str | Path | Sequence[RewardFunction | str | Path]",
        weights: Sequence[float] | None = None,
    ):
        if isinstance(reward_funcs, RewardFunctions):
            weights = reward_funcs.weights.tolist() if weights is None else weights
            reward_funcs = reward_funcs.functions
        given = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        if not given:
            raise InputError("expected at least one reward, got an empty list")
        if weights is not None and len(weights) != len(given):
            raise InputError(f"reward_weights must hold one weight a reward, got {len(weights)} for {len(given)}")
        self.functions: list[Any] = [_checked(reward) for reward in given]
        names = [_name(function) for function in self.functions]
        self.names = [
            f"{name}_{names[:i].count(name) + 1}" if names.count(name) > 1 else name for i, name in enumerate(names)
        ]
        self.weights: torch.Tensor = torch.tensor(
            [1.0] * len(given) if weights is None else weights, dtype=torch.float32
        )
        self._loop: asyncio.AbstractEventLoop | None = None

    def load(self, device: str | torch.device | None = None) -> "RewardFunctions":
        """Load the adapters, on this process's own device by default."""
        self.functions = [
            RewardModel.from_pretrained(f, device=device) if isinstance(f, str) else f for f in self.functions
        ]
        return self

    def __call__(
        self,
        prompts: Sequence[Messages],
        replies: Sequence[str],
        completion_ids: Sequence[list[int]] | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        trainer_state: TrainerState | None = None,
        log_extra: Callable[[str, list], None] = lambda column, values: None,
        log_metric: Callable[[str, float], None] = lambda name, value: None,
    ) -> torch.Tensor:
        """Score N replies by F rewards.

        Args:
            prompts: N conversations.
            replies: N texts.
            completion_ids: their tokens; empty lists by default.
            columns: the data set's other columns, N values each.
            trainer_state: that of the training; an empty one by default.
            log_extra: takes a column of the completions table.
            log_metric: takes a number for the log.

        Returns:
            (N, F), float32: NaN where a reward returned None and so leaves a reply out, infinite where it returned a
            number that is not finite.

        Raises:
            ValueError: a reward does not return one value a reply.
        """
        self.load()
        rows = {
            "prompts": list(prompts),
            "completions": [[{"role": "assistant", "content": reply}] for reply in replies],
            "completion_ids": list(completion_ids or [[] for _ in replies]),
            **(columns or {}),
        }
        others = {"trainer_state": trainer_state or TrainerState(), "log_extra": log_extra, "log_metric": log_metric}
        # A copy each: what one reward does to its arguments is nobody else's affair.
        outputs = [function(**copy.deepcopy(rows), **others) for function in self.functions]
        waiting = [i for i, function in enumerate(self.functions) if _is_async(function)]
        for i, output in zip(waiting, self._await([outputs[i] for i in waiting]), strict=True):
            outputs[i] = output
        values = torch.full((len(replies), len(self.functions)), math.nan)
        for i, (name, output) in enumerate(zip(self.names, outputs, strict=True)):
            scores = list(output)
            if len(scores) != len(replies):
                raise ValueError(f"the reward {name} returned {len(scores)} scores for {len(replies)} completions")
            for row, score in enumerate(scores):
                if score is not None:
                    values[row, i] = float(score) if math.isfinite(float(score)) else math.inf
        return values

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The weighted sum, (N, F) -> (N,), without those that left a reply out; NaN where all did.

        Infinite where one is, whatever weights (0, of both signs) would make of it.
        """
        left_out, infinite = values.isnan().all(dim=1), values.isinf().any(dim=1)
        total = (values * self.weights.to(values.device)).nansum(dim=1)
        return total.masked_fill(left_out, math.nan).masked_fill(infinite, math.inf)

    @property
    def seen(self) -> set[str]:
        """The ids of the conversations that its reward models list, loaded or not; of functions nothing is known.

        Raises:
            InputError: an adapter's `h2s.json` is broken.
        """
        adapters = [f for f in self.functions if isinstance(f, str)]
        models = [f for f in self.functions if isinstance(f, RewardModel)]
        return {c for f in adapters for c in read_settings(f)["seen"]} | {c for f in models for c in f.seen}

    def described(self) -> list[str]:
        """Each reward by its name, its weight, and of a reward model the fingerprint of its prefix."""
        known = [  # a model's folder may have been moved
            f"reward model {fingerprint(f.model)[:8]}" if isinstance(f, RewardModel) else name
            for name, f in zip(self.names, self.functions, strict=True)
        ]
        return [f"{reward} times {weight:g}" for reward, weight in zip(known, self.weights.tolist(), strict=True)]

    def cuts(self) -> Counter:
        """How many contexts and responses its reward models cut to what they take."""
        return sum((f.cuts for f in self.functions if isinstance(f, RewardModel)), Counter())

    def _await(self, coroutines: list[Coroutine]) -> list[Any]:
        """Wait for `async` rewards together, on one loop of their own: a client in them may be bound to it."""
        if not coroutines:
            return []
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, daemon=True).start()

        async def together() -> list[Any]:
            return await asyncio.gather(*coroutines)

        return asyncio.run_coroutine_threadsafe(together(), self._loop).result()


def _checked(reward: Any) -> RewardFunction | str:
    """A reward as it was given; of an adapter its folder.

    Raises:
        InputError: it is neither a callable nor an adapter.
    """
    if isinstance(reward, (str, Path)):
        folder = adapter_folder(reward)
        read_adapter_config(folder, TaskType.SEQ_CLS)
        return folder
    if isinstance(reward, torch.nn.Module):
        raise InputError(f"a reward must be a function, a RewardModel or an adapter, got a {type(reward).__name__}")
    if not callable(reward):
        raise InputError(f"a reward must be a function, a RewardModel or an adapter, got {reward!r}")
    return reward


def _unwrapped(function: RewardFunction) -> RewardFunction:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _name(function: RewardFunction | str) -> str:
    if isinstance(function, str):
        return short_name(function)
    return getattr(_unwrapped(function), "__name__", type(_unwrapped(function)).__name__)


def _is_async(function: RewardFunction) -> bool:
    plain = _unwrapped(function)
    return inspect.iscoroutinefunction(plain) or inspect.iscoroutinefunction(plain.__call__)  # type: ignore[operator]


def open_scorers(
    reward_adapter: str | list[str] | None = None, judge_adapter: str | None = None, reward_function: str | None = None
) -> dict[str, RewardFunctions]:
    """The `reward` and the `judge` that are given.

    Args:
        reward_adapter: of the reward; of several the reward is their mean.
        judge_adapter: of a model that the policy was not trained on.
        reward_function: in place of a reward adapter, a dotted path.

    Raises:
        InputError: one is not what it should be, or the judge is the reward.
    """
    scorers = {}
    if reward_adapter is not None:
        adapters = [reward_adapter] if isinstance(reward_adapter, str) else reward_adapter
        scorers["reward"] = RewardFunctions(adapters, [1 / len(adapters) for _ in adapters])
        if len(set(scorers["reward"].functions)) < len(adapters):
            raise InputError(f"reward_adapter names an adapter twice: {', '.join(adapters)}")
    if judge_adapter is not None:
        scorers["judge"] = RewardFunctions(judge_adapter)
        if "reward" in scorers and scorers["judge"].functions[0] in scorers["reward"].functions:
            raise InputError(
                f"judge_adapter and reward_adapter are the same, {judge_adapter}: a judge is a model that the policy "
                "was not trained on; train_reward.py --judge_share makes one"
            )
    if reward_function is not None:
        scorers = {"reward": RewardFunctions(load_reward_function(reward_function)), **scorers}
    return scorers


def load_reward_function(path: str) -> RewardFunction:
    """Import a reward function by its dotted path, from the current folder or an installed package.

    With a folder in front (`../mine/my_rewards.asks_back`) it is imported from there.

    Raises:
        InputError: there is no such module or name in it, or it cannot be called.
    """
    given, dotted = os.path.split(path)
    module, _, name = dotted.rpartition(".")
    if not module or dotted.startswith("."):
        raise InputError(f"reward_function must be a dotted path such as my_rewards.asks_back, got {path!r}")
    folder = os.path.abspath(given)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"reward_function {path} cannot be imported: {error} (looked for in {folder} and among installed packages)"
        ) from error
    if not callable(function):
        raise InputError(f"reward_function {path} is a {type(function).__name__}, not a function")
    return function
