"""What scores replies: any callable of TRL's reward-function signature, a reward model or the user's own."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from h2s.data.messages import Messages
from h2s.errors import InputError

# (prompts=, completions=) -> one number each; conversational, as TRL's: a completion is a list of one message.
RewardFunction = Callable[..., Sequence[float]]


def score_replies(reward: RewardFunction, prompts: Sequence[Messages], replies: Sequence[str]) -> list[float]:
    """Call a reward function on texts.

    Raises:
        ValueError: it does not return one number a reply.
    """
    completions = [[{"role": "assistant", "content": reply}] for reply in replies]
    scores: Any = list(reward(prompts=list(prompts), completions=completions))
    if len(scores) != len(replies):
        raise ValueError(f"the reward function returned {len(scores)} scores for {len(replies)} completions")
    if any(score is None for score in scores):
        raise ValueError("the reward function returned None: each completion needs a number")
    return [float(score) for score in scores]


def load_reward_function(path: str) -> RewardFunction:
    """Import a reward function by its dotted path, from the current folder or an installed package.

    Raises:
        InputError: there is no such module or name in it, or it cannot be called.
    """
    module, _, name = path.rpartition(".")
    if not module or path.startswith("."):
        raise InputError(f"reward_function must be a dotted path such as my_rewards.asks_back, got {path!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"reward_function {path} cannot be imported: {error}") from error
    if not callable(function):
        raise InputError(f"reward_function {path} is a {type(function).__name__}, not a function")
    return function
