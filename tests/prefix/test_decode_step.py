"""The draw and the head of a decode step, beside numpy's cumulative sum, float64 and torch's own product."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from h2s.prefix.decode_step import DrawTokens, inverse_transform, quick_head


@pytest.fixture
def probabilities():
    """Of 1,300 tokens, which is no multiple of a block: some have none, among them the first and the last."""
    found = torch.randn(1300, generator=torch.Generator().manual_seed(0)).mul(3).softmax(-1)
    found[::7] = 0
    found[-40:] = 0
    return found / found.sum()


def test_tokens_are_drawn_with_exactly_their_probabilities(probabilities):
    """Over an even grid of numbers each token comes as often as its probability says, within one number at each end."""
    count = 20_000
    uniform = (torch.arange(count, dtype=torch.float64)[:, None] + 0.5) / count
    tokens = torch.cat([inverse_transform(probabilities.expand(len(part), -1), part) for part in uniform.split(2000)])
    found = tokens[:, 0].bincount(minlength=1300)
    assert (found - count * probabilities.double()).abs().max() <= 1
    expected = np.searchsorted(np.cumsum(probabilities.double().numpy()), uniform[:, 0].numpy(), side="right")
    assert (tokens[:, 0].numpy() != expected).mean() < 1e-3  # float32 sums a block in another order


def test_what_has_no_probability_is_never_drawn(probabilities):
    ends = [0.0, 5e-324, 1e-17, 0.5, 1 - 1e-9, 1 - 2**-53]
    edges = np.cumsum(probabilities.double().numpy())[511::512]  # the ends of the blocks
    uniform = torch.tensor([[u] for u in [*ends, *edges, *np.nextafter(edges, 0), *np.nextafter(edges, 1)]])
    tokens = inverse_transform(probabilities.expand(len(uniform), -1), uniform.clamp(max=1 - 2**-53))
    assert (probabilities[tokens] > 0).all()
    sure = torch.zeros(3, 600)
    sure[[0, 1, 2], [0, 599, 300]] = 1.0
    for u in ends:
        assert inverse_transform(sure, torch.full((3, 1), u, dtype=torch.float64))[:, 0].tolist() == [0, 599, 300]


@pytest.mark.parametrize(("temperature", "vocabulary"), [(0.5, 1300), (1.0, 1300), (2.0, 1300), (1.0, 262_144)])
def test_what_is_kept_of_a_draw(temperature, vocabulary):
    """To 1e-6, also where float32's own sum over all columns would be 1e-4 off."""
    logits = torch.randn(6, vocabulary, generator=torch.Generator().manual_seed(1)) * 4
    draw = DrawTokens(temperature)
    torch.manual_seed(2)
    scores = [draw(None, logits.clone()) for _ in range(3)]
    lines = (logits.double() / temperature).log_softmax(-1)
    for step, found in enumerate(scores):
        tokens = found.argmax(-1, keepdim=True)
        assert torch.isfinite(found).sum(-1).tolist() == [1] * 6
        torch.testing.assert_close(draw.logps[step].double(), lines.gather(1, tokens)[:, 0], rtol=0, atol=4e-6)
        torch.testing.assert_close(draw.entropies[step].double(), -(lines.exp() * lines).sum(1), rtol=0, atol=4e-6)
    assert not torch.equal(scores[0], scores[1])
    torch.manual_seed(2)
    assert torch.equal(DrawTokens(temperature)(None, logits.clone()), scores[0])


def test_the_head_is_the_same_product(gemma_folder):
    base = AutoModelForCausalLM.from_pretrained(gemma_folder)
    head = base.get_output_embeddings()
    for shape in ((1, 1), (16, 1), (2, 3)):
        x = torch.randn(*shape, head.in_features, generator=torch.Generator().manual_seed(0))
        expected = head(x)
        with pytest.raises(KeyError), quick_head(base):
            assert "forward" in vars(head)
            found = head(x)
            assert found.is_contiguous() and found.shape == expected.shape
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            raise KeyError
        assert "forward" not in vars(head)
    base.set_output_embeddings(nn.Linear(head.in_features, 320, bias=True))
    with quick_head(base):
        assert "forward" not in vars(base.get_output_embeddings())
