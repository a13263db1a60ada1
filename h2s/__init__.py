"""h2s: hard prompt to soft prompt.

A hand-written system prompt becomes a soft prefix that starts out exactly equal to it (PEFT prefix tuning), and then
moves only that prefix toward what people preferred (a BERT reward model, single-step PPO).
"""

from h2s.prefix.policy_model import PrefixTuningPolicyModel

__all__ = ["PrefixTuningPolicyModel"]
