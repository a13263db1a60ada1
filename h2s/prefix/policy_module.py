"""The one module through which a policy's weights run: what Trainer, DDP and FSDP2 wrap."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import PreTrainedTokenizerBase

from h2s.prefix.generation import Batch, Completions, Sampling, completion_logps, generate


class PolicyModule(nn.Module):
    """Scores completions by `forward` and draws them by `sample`, both under the adapter that is active.

    DDP synchronises gradients of what runs through `forward`, FSDP2 gathers weights for it and for what is registered
    beside it: whatever went around this module would run on parts of the weights, or learn alone.
    """

    def __init__(self, model: PeftModel):
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        completion_mask: torch.Tensor,
        temperature: float = 1.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score right-padded rows, all shaped (B, T): see [`completion_logps`]."""
        return completion_logps(self.model, Batch(input_ids, attention_mask, completion_mask), temperature)

    def sample(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        stop_ids: list[int],
        **generation_kwargs: Any,
    ) -> Completions:
        """Draw one completion a prompt: see [`generate`]."""
        sharded = isinstance(self, FSDPModule)
        return generate(self.model, tokenizer, prompts, sampling, stop_ids, synced_gpus=sharded, **generation_kwargs)

    def register_with_fsdp(self) -> None:
        """Let FSDP2, where it shards the module, gather weights for `sample` too."""
        if isinstance(self, FSDPModule) and "sample" not in vars(self):
            register_fsdp_forward_method(self, "sample")
