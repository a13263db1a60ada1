"""What the reports' tests share: a comparison whose numbers are known, contexts, and a prefix that has moved."""

import pandas as pd
import pytest
import torch
from datasets import Dataset
from tiny import sample_context

from h2s.prefix.adapter import soft_prefix


@pytest.fixture
def compared():
    """Four contexts of two conversations. Differences 2, -1, 0, 3: mean 1; a's add up to 1 below it, b's to 1 above.

    So the mean's standard error is sqrt(2 * (1 + 1)) / 4 = 0.5, times T. Over the tokens' differences 2, 4, 4, 6: slope
    2 / 8, intercept 0.
    """
    return pd.DataFrame(
        {
            "conversation": ["a", "a", "b", "b"],
            "prompt": [sample_context(i) for i in range(4)],
            "soft": ["s0", "s1", "s2", "s3"],
            "hard": ["h0", "h1", "h2", "h3"],
            "soft_reward": [3.0, 0.0, 1.0, 4.0],
            "hard_reward": [1.0, 1.0, 1.0, 1.0],
            "soft_tokens": [4, 6, 8, 10],
            "hard_tokens": [2, 2, 4, 4],
            "soft_finished": [True, True, True, False],
            "hard_finished": [True, False, False, True],
            "kl": [0.5, 1.5, 2.0, 0.0],
        }
    )


@pytest.fixture
def contexts():
    """Six, with a column for rewards that ask for it."""
    return Dataset.from_dict({"prompt": [sample_context(i) for i in range(6)], "level": [10 * i for i in range(6)]})


@pytest.fixture
def moved(policy):
    """A policy that has left its hard prompt."""
    with torch.no_grad():
        noise = torch.randn(soft_prefix(policy.model).shape, generator=torch.Generator().manual_seed(0))
        soft_prefix(policy.model).add_(2 * noise)
    return policy
