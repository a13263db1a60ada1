"""What return to expect of a context: a regression that stands beside the policy, with an optimizer of its own."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import AdamW

from h2s.ppo.loss import ROUNDING

VALUE_HEAD_FILE = "value_head.safetensors"
UPDATES_A_FIT = 20
SATURATED = 0.97


class ValueHead(nn.Module):
    """Layer norm, linear, tanh, linear: a context's expected return, from the hidden state of its last position.

    Without the norm hidden states, whose size differs from model to model (rms 4 in Gemma 3 270M), would drive the
    units into saturation, where they learn no more. The head predicts 0 until it is fitted. It also keeps the unit of
    the rewards, that their returns may mean the same after a resume.

    Input shape: (B, H), float32

    Output shape: (B,), float32
    """

    reward_mean: torch.Tensor
    reward_std: torch.Tensor

    def __init__(self, hidden_size: int):
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.out = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.register_buffer("reward_mean", torch.zeros(()))
        self.register_buffer("reward_std", torch.ones(()))

    def units(self, hidden: torch.Tensor) -> torch.Tensor:
        """The hidden layer's activations, (B, H) -> (B, H)."""
        return torch.tanh(self.dense(F.layer_norm(hidden, hidden.shape[-1:])))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, H) -> (B,)."""
        return self.out(self.units(hidden)).squeeze(-1)

    def fit(self, hidden: torch.Tensor, returns: torch.Tensor, learning_rate: float) -> None:
        """Some steps of AdamW on (V - R)^2. The first fit begins at the mean return.

        Each fit has a fresh optimizer: there is no state to save between them.

        Args:
            hidden: of all processes, so that their heads stay equal, (N, H).
            returns: (N,); those that are NaN are left out.
            learning_rate: of AdamW, times H. A step of Adam moves each weight as far, so the wider the layer the
                farther its units: divided by H, one rate suits all models (Yang et al. 2022, arXiv 2203.03466).
        """
        hidden, returns = hidden[~returns.isnan()], returns[~returns.isnan()]
        if not len(returns):
            return
        if not self.out.weight.any():
            # From 0 the way to the mean would push every unit to one side.
            nn.init.constant_(self.out.bias, returns.mean().item())
        # The epsilon keeps rounding from passing for a gradient: heads of several processes would part by it.
        optimizer = AdamW(self.parameters(), lr=learning_rate / hidden.shape[1], eps=1e-5, weight_decay=0.0)
        for _ in range(UPDATES_A_FIT):
            optimizer.zero_grad()
            F.mse_loss(self(hidden), returns).backward()
            optimizer.step()

    def saturated(self, hidden: torch.Tensor) -> torch.Tensor:
        """The share of the units that hardly learn, |tanh| > 0.97: (B, H) -> (B,)."""
        return (self.units(hidden).abs() > SATURATED).float().mean(1)

    def measure_rewards(self, scores: torch.Tensor) -> None:
        """Take the mean and the spread of these scores as 0 and 1 of the rewards (Ziegler et al. 2019, section 2).

        Args:
            scores: of the hard prompt's replies, over all processes, (N,); NaN is left out. Without a spread the unit
                stays.
        """
        known = scores[~scores.isnan()]
        if len(known) > 1 and known.std() > ROUNDING * known.mean().abs():
            self.reward_mean, self.reward_std = known.mean(), known.std()

    def in_units(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores as the returns count them, (B,) -> (B,)."""
        return (scores - self.reward_mean) / self.reward_std

    def save(self, folder: str | Path) -> None:
        """Write the head and the unit as safetensors."""
        save_file(self.state_dict(), Path(folder) / VALUE_HEAD_FILE)

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote."""
        self.load_state_dict(load_file(Path(folder) / VALUE_HEAD_FILE))
