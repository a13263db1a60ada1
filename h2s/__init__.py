"""h2s: hard prompt to soft prompt.

A hand-written system prompt becomes a soft prefix that starts out exactly equal to it (PEFT prefix tuning), and then
moves only that prefix toward what people preferred (a reward model of their judgements and single-step PPO, or DPO).
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from h2s.data.datasets import load_contexts, load_preferences
    from h2s.dpo.config import PrefixDPOConfig
    from h2s.dpo.trainer import PrefixDPOTrainer
    from h2s.errors import InputError
    from h2s.ppo.config import SingleStepPPOConfig
    from h2s.ppo.trainer import SingleStepPPOTrainer
    from h2s.prefix.policy_model import PrefixTuningPolicyModel
    from h2s.reward.config import RewardModelConfig
    from h2s.reward.model import RewardModel
    from h2s.reward.trainer import RewardModelTrainer

# PEFT imports bitsandbytes where it is installed, which warns at once, on some CPUs, of a kernel that h2s leaves out.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in record.msg)

__all__ = [
    "InputError",
    "PrefixDPOConfig",
    "PrefixDPOTrainer",
    "PrefixTuningPolicyModel",
    "RewardModel",
    "RewardModelConfig",
    "RewardModelTrainer",
    "SingleStepPPOConfig",
    "SingleStepPPOTrainer",
    "load_contexts",
    "load_preferences",
]

_HOMES = {
    "InputError": "h2s.errors",
    "PrefixDPOConfig": "h2s.dpo.config",
    "PrefixDPOTrainer": "h2s.dpo.trainer",
    "PrefixTuningPolicyModel": "h2s.prefix.policy_model",
    "RewardModel": "h2s.reward.model",
    "RewardModelConfig": "h2s.reward.config",
    "RewardModelTrainer": "h2s.reward.trainer",
    "SingleStepPPOConfig": "h2s.ppo.config",
    "SingleStepPPOTrainer": "h2s.ppo.trainer",
    "load_contexts": "h2s.data.datasets",
    "load_preferences": "h2s.data.datasets",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, when it is: torch, transformers and PEFT take seconds (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
