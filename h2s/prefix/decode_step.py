"""What a decode step of training costs beside the layers: the draw over the whole vocabulary, and the head.

Letters: B rows, V vocabulary, C completion tokens, H hidden.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LogitsProcessor, PreTrainedModel

# Columns that are summed before one of them is looked for: about the square root of a large vocabulary.
BLOCK = 512


class DrawTokens(LogitsProcessor):
    """Draws each row's next token from the whole distribution, and keeps how likely it was.

    What it returns is finite at the drawn token only, which greedy decoding then takes. The distribution is the one
    that sampling draws from; torch.multinomial over a large vocabulary takes as long as the layers.

    Args:
        temperature: of the sampling.

    Attributes:
        logps: log-probabilities of what was drawn, a tensor (B,) a step, float32.
        entropies: of the distributions, in nats, likewise.
    """

    def __init__(self, temperature: float):
        self.temperature = temperature
        self.logps: list[torch.Tensor] = []
        self.entropies: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """The next tokens' scores (B, V): 0 at the drawn token, minus infinity elsewhere."""
        logits = scores / self.temperature
        probabilities = logits.softmax(-1)
        tokens = inverse_transform(probabilities, torch.rand(len(scores), 1, dtype=torch.float64, device=scores.device))
        # Softmax sums so many columns to 1e-5 or 1e-4 in float32: a bias that a reply would add up. Blocks are exact.
        blocks = in_blocks(probabilities)
        total = blocks.sum(-1).double().sum(-1, keepdim=True)  # (B, 1), 1 but for that
        logps = probabilities.gather(1, tokens).double().log() - total.log()
        mean_logit = torch.linalg.vecdot(blocks, in_blocks(logits)).double().sum(-1, keepdim=True) / total
        self.logps.append(logps[:, 0].float())
        self.entropies.append((logits.gather(1, tokens) - logps - mean_logit)[:, 0].float())
        scores.fill_(-torch.inf).scatter_(1, tokens, 0.0)  # `generate` hands over a copy
        return scores


def in_blocks(columns: torch.Tensor) -> torch.Tensor:
    """(B, V) as (B, V / BLOCK, BLOCK), the last one filled with zeros."""
    return F.pad(columns, (0, -columns.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))


def inverse_transform(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The tokens at which the cumulative distribution passes `uniform`: first among sums of blocks, then in a block.

    Args:
        probabilities: shape (B, V).
        uniform: in [0, 1), float64, shape (B, 1).

    Returns:
        Token ids, shape (B, 1); none that has no probability.
    """
    below_one = 1 - torch.finfo(torch.float64).eps
    blocks = in_blocks(probabilities)
    mass = blocks.sum(-1).double()  # (B, V / BLOCK)
    up_to = mass.cumsum(-1)
    target = uniform * up_to[:, -1:]
    block = torch.searchsorted(up_to, target, right=True)  # (B, 1)
    # What is left to go within the block, as a share: its columns sum to its mass only up to rounding.
    share = 1 - (up_to.gather(1, block) - target) / mass.gather(1, block)
    within = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0].double().cumsum(-1)  # (B, BLOCK)
    target = share.clamp(0, below_one) * within[:, -1:]
    return block * BLOCK + torch.searchsorted(within, target, right=True)


@contextmanager
def quick_head(base: PreTrainedModel) -> Iterator[None]:
    """Inside, the CPU multiplies the head as weight times rows: half of the time for 2 to 8 rows, as long for 100."""
    head = base.get_output_embeddings()
    if head.weight.device.type != "cpu" or type(head) is not nn.Linear or head.bias is not None:
        yield
        return

    def forward(x: torch.Tensor) -> torch.Tensor:
        return (head.weight @ x.flatten(0, -2).T).T.contiguous().unflatten(0, x.shape[:-1])

    head.forward = forward
    try:
        yield
    finally:
        del head.forward
