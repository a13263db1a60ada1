"""What one iteration draws and learns from. Letters: B responses on this process, b of a mini-batch, T positions."""

from dataclasses import dataclass

import torch

from h2s.prefix.generation import Batch


@dataclass(frozen=True)
class Replies:
    """Sampled completions with their rewards.

    Attributes:
        batch: the right-padded rows.
        texts: the completions, B of them.
        values: of F rewards, (B, F).
        scores: the weighted sums, (B,), NaN where all rewards left the reply out.
        unfinished: whether no stop token ends it, (B,).
    """

    batch: Batch
    texts: list[str]
    values: torch.Tensor
    scores: torch.Tensor
    unfinished: torch.Tensor


@dataclass(frozen=True)
class MiniBatch:
    """Rows that are scored, and later learnt from, together.

    Log-probabilities depend in their last bits on what stands beside a row, in bfloat16 by as much as 0.05 a reply. So
    mini-batches are drawn before scoring: then the ratio is 1 before the first update.

    Attributes:
        rows: their places in the iteration, (b,).
        batch: without the columns that are padding in all of them.
        logps: log-probabilities when sampled, (b, T), with their graph where the iteration makes a single update.
        entropy: of the distribution, (b, T), likewise.
        ref_logps: log-probabilities under the hard prompt, (b, T).
        last_prompt: hidden states of the last prompt positions, (b, H).
    """

    rows: torch.Tensor
    batch: Batch
    logps: torch.Tensor
    entropy: torch.Tensor
    ref_logps: torch.Tensor
    last_prompt: torch.Tensor

    @property
    def mask(self) -> torch.Tensor:
        """The responses' own tokens, (b, T)."""
        return self.batch.completion_mask

    @property
    def old_logps(self) -> torch.Tensor:
        """`logps` without their graph."""
        return self.logps.detach()


@dataclass(frozen=True)
class Rollout:
    """What the updates of an iteration are made from.

    Attributes:
        parts: its mini-batches.
        returns: reward minus KL and penalties, (B,); NaN for a reply that was left out.
        advantages: whitened returns minus values, (B,); 0 for a reply that was left out.
        mean_length: completion tokens on average over all processes.
        last_prompt: hidden states of the last prompt positions, (B, H).
    """

    parts: list[MiniBatch]
    returns: torch.Tensor
    advantages: torch.Tensor
    mean_length: float
    last_prompt: torch.Tensor
