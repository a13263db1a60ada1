"""A policy as trainers take it, and what a resumed run must find in it again."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from h2s.errors import InputError
from h2s.prefix.adapter import SOFT
from h2s.prefix.policy_model import PrefixTuningPolicyModel
from h2s.run.resume import short_hash

NOT_PREFIX = (
    "peft_config is not taken: a new prefix would be random, with no prompt behind it and none in its reference. Give "
    "PrefixTuningPolicyModel.from_hard_prompt(…), which begins as the prompt, or an adapter made by it"
)


def policy_to_train(
    model: PrefixTuningPolicyModel | str | Path,
    processing_class: PreTrainedTokenizerBase | None,
    peft_config: Any,
    device: torch.device,
) -> PrefixTuningPolicyModel:
    """The policy that a trainer was given, loaded to `device` if it is an adapter's folder or Hub name.

    Raises:
        InputError: it is none, another prefix than its own is active, or there is more than it takes.
    """
    if peft_config is not None:
        raise InputError(NOT_PREFIX)
    if isinstance(model, (str, Path)):
        model = PrefixTuningPolicyModel.from_pretrained(model, device=device)
    if not isinstance(model, PrefixTuningPolicyModel):
        raise InputError(f"model must be a PrefixTuningPolicyModel or an adapter, got a {type(model).__name__}")
    model.check_own_is_active("trained")
    if processing_class is not None and processing_class.chat_template != model.tokenizer.chat_template:
        raise InputError(
            "processing_class is not the policy's tokenizer: its chat template would print what the prefix holds; "
            "leave it out, or give policy.tokenizer"
        )
    return model


def began_as(policy: PrefixTuningPolicyModel) -> dict[str, Any]:
    """What a run that resumes another one's training must have, too."""
    prefix = policy.prefix
    return {
        "model": Path(policy.model.peft_config[SOFT].base_model_name_or_path).name,  # it may have been moved
        "hard_prompt": [message["content"] for message in prefix.opening_messages],
        "chat_template_kwargs": prefix.chat_template_kwargs,
        "quantization": prefix.quantization,
        "list of seen conversations": f"{len(prefix.seen)} ({short_hash(prefix.seen)})",
    }
