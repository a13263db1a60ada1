"""`import h2s` at once; what is in it when it is asked for."""

import subprocess
import sys

import pytest
from tiny import ROOT

import h2s
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

PUBLIC = {
    "InputError": InputError,
    "PrefixDPOConfig": PrefixDPOConfig,
    "PrefixDPOTrainer": PrefixDPOTrainer,
    "PrefixTuningPolicyModel": PrefixTuningPolicyModel,
    "RewardModel": RewardModel,
    "RewardModelConfig": RewardModelConfig,
    "RewardModelTrainer": RewardModelTrainer,
    "SingleStepPPOConfig": SingleStepPPOConfig,
    "SingleStepPPOTrainer": SingleStepPPOTrainer,
    "load_contexts": load_contexts,
    "load_preferences": load_preferences,
}


def test_what_is_in_it():
    everything = {}
    exec("from h2s import *", everything)
    del everything["__builtins__"]
    assert everything == PUBLIC
    assert set(h2s.__all__) == PUBLIC.keys() and set(h2s.__all__) <= set(dir(h2s))


def test_what_is_not():
    with pytest.raises(AttributeError, match="module 'h2s' has no attribute 'load_context'"):
        _ = h2s.load_context
    with pytest.raises(ImportError, match="cannot import name 'load_context' from 'h2s'"):
        from h2s import load_context  # noqa: F401


def test_it_imports_no_library():
    code = (
        "import sys, h2s; print(*{'torch', 'transformers', 'peft', 'trl', 'datasets', 'pandas'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
