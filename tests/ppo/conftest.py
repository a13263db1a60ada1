"""The one trainer fixture of the PPO tests."""

import inspect

import pytest
import torch
from ppo.runs import BATCH, HELD_OUT, contexts_of, varied
from tiny import HARD_PROMPT

from h2s import PrefixTuningPolicyModel, SingleStepPPOConfig, SingleStepPPOTrainer
from h2s.prefix.adapter import soft_prefix

SMALL_AND_QUIET = {
    "max_steps": 2,
    "per_device_train_batch_size": BATCH,
    "max_completion_length": 6,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "target_kl": None,
    "num_ppo_epochs": 2,
    "num_mini_batches": 1,
    "scale_rewards": False,
}
ARGUMENTS = inspect.signature(SingleStepPPOTrainer).parameters


@pytest.fixture
def build(gemma_folder, tmp_path):
    """A trainer as a user makes one, on a fresh tiny policy.

    `given` are the trainer's own arguments and settings of `SingleStepPPOConfig`; `move` takes the prefix away from
    the hard prompt first.
    """

    def make(reward_funcs=varied, folder="run", contexts=range(12), move=0.0, **given):
        arguments = {name: given.pop(name) for name in ARGUMENTS if name in given}
        if "model" not in arguments:
            policy = PrefixTuningPolicyModel.from_hard_prompt(str(gemma_folder), HARD_PROMPT, dtype="float32")
            with torch.no_grad():
                noise = torch.randn(soft_prefix(policy.model).shape, generator=torch.Generator().manual_seed(0))
                soft_prefix(policy.model).add_(move * noise)
            arguments["model"] = policy
        return SingleStepPPOTrainer(
            reward_funcs=reward_funcs,
            **{
                "args": SingleStepPPOConfig(output_dir=str(tmp_path / folder), **SMALL_AND_QUIET | given),
                "train_dataset": contexts_of(contexts),
                "eval_dataset": contexts_of(range(100, 100 + HELD_OUT)),
            }
            | arguments,
        )

    return make
