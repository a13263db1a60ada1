"""The value head, and the one module that is trained and wrapped by DDP."""

import torch
from peft import PeftModel
from torch import nn

from h2s.prefix import hard_prompt_active
from h2s.rollout import Batch, completion_logps


class ValueHead(nn.Module):
    """Linear, tanh, linear: what reward to expect from a context. It predicts 0 until it is trained.

    Input shape: (B, H), float32

    Output shape: (B,), float32
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.out = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, H) -> (B,)."""
        return self.out(torch.tanh(self.dense(hidden))).squeeze(-1)


class PolicyWithValueHead(nn.Module):
    """The prefix model and the value head beside it, used through one `forward` so that DDP sees every gradient.

    The head stands beside the PEFT model, not in it: `save_pretrained` would drop it.
    """

    is_gradient_checkpointing = False  # TRL's `unwrap_model_for_generation` asks every model

    def __init__(self, model: PeftModel, temperature: float = 1.0):
        super().__init__()
        self.model = model
        self.value_head = ValueHead(model.get_base_model().config.get_text_config().hidden_size).to(model.device)
        self.temperature = temperature

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Score right-padded rows, all shaped (B, T).

        Returns:
            logps (B, T), entropy (B, T), both zero outside the completions, and values (B,) of the last prompt
            position, whose hidden state is detached: the value loss does not move the prefix.
        """
        batch = Batch(input_ids, attention_mask, completion_mask)
        logps, entropy, hidden = completion_logps(self.model, batch, self.temperature)
        return logps, entropy, self.value_head(hidden)

    @torch.no_grad()
    def reference_logps(self, batch: Batch) -> torch.Tensor:
        """Log-probabilities under the hard prompt, shape (B, T)."""
        with hard_prompt_active(self.model):
            return completion_logps(self.model, batch, self.temperature)[0]
