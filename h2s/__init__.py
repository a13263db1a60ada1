"""h2s: hard prompt to soft prompt.

A hand-written system prompt becomes a soft prefix that starts out exactly equal to it (PEFT prefix tuning), and then
moves only that prefix toward what people preferred (a reward model of their judgements, single-step PPO).
"""

import logging

# PEFT imports bitsandbytes where it is installed, which warns at once, on some CPUs, of a kernel that h2s leaves out.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in record.msg)

from h2s.data.datasets import load_contexts, load_preferences
from h2s.errors import InputError
from h2s.ppo.config import SingleStepPPOConfig
from h2s.ppo.trainer import SingleStepPPOTrainer
from h2s.prefix.policy_model import PrefixTuningPolicyModel
from h2s.reward.config import RewardModelConfig
from h2s.reward.model import RewardModel
from h2s.reward.trainer import RewardModelTrainer

__all__ = [
    "InputError",
    "PrefixTuningPolicyModel",
    "RewardModel",
    "RewardModelConfig",
    "RewardModelTrainer",
    "SingleStepPPOConfig",
    "SingleStepPPOTrainer",
    "load_contexts",
    "load_preferences",
]
