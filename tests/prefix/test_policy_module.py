"""The module that is wrapped: what it says of rows, and that all replies are drawn through it."""

import pytest
import torch

from h2s.prefix.adapter import soft_prefix
from h2s.prefix.generation import Batch, Completions, Sampling

COMPLETIONS = [[50, 60, 70, 5], [51, 5], [52, 61, 62], [53, 5], [54], [55, 60, 61, 62, 63, 5]]


@pytest.fixture
def module(policy):
    """With a prefix that has moved."""
    with torch.no_grad():
        noise = torch.randn(soft_prefix(policy.model).shape, generator=torch.Generator().manual_seed(0))
        soft_prefix(policy.model).add_(noise)
    return policy.module


def batch_of(policy, prompts, completions):
    return Batch.from_rows(policy.tokenizer, prompts, completions, policy.model.device)


def test_forward_is_the_plain_models_own(policy, module, prompts):
    """Row by row, unpadded, in float64: log-probabilities and entropies."""
    batch = batch_of(policy, prompts, COMPLETIONS)
    logps, entropy = module(*batch)
    for i, (prompt, completion) in enumerate(zip(prompts, COMPLETIONS, strict=True)):
        with torch.no_grad():
            logits = policy.model(torch.tensor([prompt + completion])).logits
        lines = logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        where = slice(len(prompt), len(prompt) + len(completion))
        expected = lines.gather(1, torch.tensor(completion)[:, None])[:, 0].float()
        torch.testing.assert_close(logps[i, where], expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(entropy[i, where], -(lines.exp() * lines).sum(1).float(), rtol=0, atol=1e-4)
    assert not logps[~batch.completion_mask].any() and not entropy[~batch.completion_mask].any()


def test_temperature_divides_the_logits(policy, module, prompts):
    batch = batch_of(policy, prompts[:1], [[50]])
    with torch.no_grad():
        found = module(*batch, 0.5)[0][0, -1]
        logits = policy.model(torch.tensor([prompts[0]])).logits[0, -1]
    assert found.item() == pytest.approx((logits / 0.5).log_softmax(-1)[50].item(), abs=1e-4)


def test_the_policy_draws_through_it(policy, prompts):
    """Nothing runs the weights around the module: what is not sharded has no hook to register."""
    policy.complete(prompts, Sampling(2))
    assert "sample" not in vars(policy.module)
    drawn = Completions([[9, 5]] * len(prompts), torch.zeros(len(prompts), 1))
    policy.module.sample = lambda *_, **__: drawn
    assert policy.draw(prompts, Sampling(2)) is drawn and policy.complete(prompts, Sampling(2)) == drawn.ids
