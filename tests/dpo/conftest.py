"""The one trainer fixture of the DPO tests."""

import inspect

import pytest
import torch
from tiny import HARD_PROMPT

from h2s import PrefixDPOConfig, PrefixDPOTrainer, PrefixTuningPolicyModel, load_preferences
from h2s.prefix.adapter import soft_prefix

SMALL_AND_QUIET = {
    "max_steps": 4,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
ARGUMENTS = inspect.signature(PrefixDPOTrainer).parameters


@pytest.fixture(scope="session")
def pairs(sheet_file):
    """Judgements by a rule: the reply that asks is better. Two a conversation."""
    return load_preferences(str(sheet_file))


@pytest.fixture
def policy(gemma_folder):
    return PrefixTuningPolicyModel.from_hard_prompt(str(gemma_folder), HARD_PROMPT, dtype="float32")


@pytest.fixture
def build(policy, pairs, tmp_path):
    """A trainer as a user makes one, on 24 pairs, 8 held out; `move` takes the prefix from the hard prompt first."""

    def make(folder="run", move=0.0, **given):
        arguments = {name: given.pop(name) for name in ARGUMENTS if name in given}
        with torch.no_grad():
            soft_prefix(policy.model).add_(move * torch.randn_like(soft_prefix(policy.model)))
        args = PrefixDPOConfig(output_dir=str(tmp_path / folder), **SMALL_AND_QUIET | given)
        usual = {"model": policy, "train_dataset": pairs.select(range(24)), "eval_dataset": pairs.select(range(24, 32))}
        return PrefixDPOTrainer(args=args, **usual | arguments)

    return make
