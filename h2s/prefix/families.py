"""Which chat models a prefix can serve: what cannot be served is refused by name, before weights load.

A prefix is a key and a value a virtual token in every layer, equally wide in all of them, and log-probabilities are
computed from the last hidden state by the output matrix alone. Whatever keeps something else, or computes its logits
otherwise, would fail half-way or learn from wrong numbers without a word (Cohere's were 5 nats off).
"""

import logging

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from h2s.errors import InputError

logger = logging.getLogger(__name__)

# Model types that tests/prefix/test_families.py runs from conversion to plain PEFT.
SHOWN = ("gemma2", "gemma3", "gemma3_text", "llama", "mistral", "qwen3")
SERVED_LAYERS = {"full_attention", "sliding_attention"}
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


def check_family(config: PretrainedConfig) -> None:
    """Check that a prefix can serve a model, by its configuration; one of a family that was never run is told.

    Raises:
        InputError: it cannot.
    """
    why = _obstacle(config, config.get_text_config())
    if why is not None:
        raise InputError(
            f"{config.model_type} models cannot be used: {why}; expected another chat model, {', '.join(SHOWN)} say"
        )
    if config.model_type not in SHOWN:
        logger.warning(
            "h2s was shown on %s, not on %s models: convert_prompt.py measures whether the prefix equals the prompt",
            ", ".join(SHOWN),
            config.model_type,
        )


def _obstacle(config: PretrainedConfig, text: PretrainedConfig) -> str | None:
    """Why a prefix cannot serve the model, if it cannot."""
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "they are no decoder-only language models"
    if getattr(config, "is_decoder", True) is False:
        return "they are encoders, which read a text from both sides"
    others = sorted(set(getattr(text, "layer_types", None) or []) - SERVED_LAYERS)
    if others:
        return f"a prefix has no place in their layers of {', '.join(others)}"
    if not hasattr(text, "num_attention_heads"):
        return "they keep a state, and a prefix is keys and values"
    if getattr(text, "v_head_dim", None):
        return "their keys are wider than their values (as with latent attention), and a prefix has one width"
    sizes = text.to_dict()
    if sizes.get("per_layer_config") or getattr(text, "num_kv_shared_layers", 0):
        return "their layers have keys of unlike sizes or share them, and a prefix has one size and all layers"
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", True):
        return "PEFT makes a prefix for all their heads, and they have one key for all"
    if not hasattr(text, "max_position_embeddings"):
        return "their configuration does not say how many tokens they take"
    for name in SCALES:
        if sizes.get(name) not in (None, 1):
            return f"they scale their logits ({name} {sizes[name]}), which the log-probabilities would not know"
    return None
