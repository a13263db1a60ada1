"""What stage 2 trains and wraps, the value head, and what they say of a rollout."""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor

from h2s.prefix.adapter import hard_prompt_active
from h2s.prefix.generation import Batch, completion_logps


@dataclass(frozen=True)
class Rollout:
    """What one iteration learns from; B responses on this process.

    Attributes:
        batch: the right-padded rows.
        old_logps: log-probabilities when sampled, (B, T).
        returns: score minus KL and penalties, (B,).
        advantages: whitened returns minus values, (B,).
        mean_length: completion tokens on average over all processes.
        last_prompt: hidden states of the last prompt positions, (B, H).
    """

    batch: Batch
    old_logps: torch.Tensor
    returns: torch.Tensor
    advantages: torch.Tensor
    mean_length: float
    last_prompt: torch.Tensor


VALUE_HEAD_FILE = "value_head.safetensors"


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
    def score(self, batch: Batch, num_parts: int) -> "Scores":
        """Score rows under both prompts, in `num_parts` parts that bound the memory."""
        rows, device = batch.input_ids.shape[0], batch.input_ids.device
        logps, ref_logps, entropy = (torch.zeros(batch.input_ids.shape, device=device) for _ in range(3))
        hidden = []
        for index in torch.arange(rows, device=device).chunk(num_parts):
            part = batch.rows(index)
            width = part.input_ids.shape[1]
            logps[index, :width], entropy[index, :width], last = completion_logps(self.model, part, self.temperature)
            hidden.append(last)
            with hard_prompt_active(self.model):
                ref_logps[index, :width] = completion_logps(self.model, part, self.temperature)[0]
        last_prompt = torch.cat(hidden)
        return Scores(logps, ref_logps, entropy, last_prompt, self.value_head(last_prompt))

    def save_value_head(self, folder: str | Path, is_main_process: bool = True) -> None:
        """Write the head as safetensors; where it is sharded every process calls this, and the main one writes."""
        state = self.value_head.state_dict()
        whole = {name: v.full_tensor() if isinstance(v, DTensor) else v for name, v in state.items()}
        if is_main_process:
            save_file(whole, Path(folder) / VALUE_HEAD_FILE)

    def load_value_head(self, folder: str | Path) -> None:
        """Read what `save_value_head` wrote."""
        self.value_head.load_state_dict(load_file(Path(folder) / VALUE_HEAD_FILE))


@dataclass(frozen=True)
class Scores:
    """What the policy says of sampled rows, without gradients.

    Attributes:
        logps: log-probabilities of the completions under the soft prefix, (B, T), zero outside them.
        ref_logps: the same under the hard prompt, (B, T).
        entropy: of the soft prefix's distribution, (B, T).
        last_prompt: hidden states of the last prompt positions, (B, H).
        values: (B,).
    """

    logps: torch.Tensor
    ref_logps: torch.Tensor
    entropy: torch.Tensor
    last_prompt: torch.Tensor
    values: torch.Tensor
