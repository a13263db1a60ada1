"""A base in 4 bits by bitsandbytes: which settings are taken and kept, and what leaves a prefix on it its gradient.

QLoRA's way (Dettmers et al. 2023, arXiv 2305.14314): the frozen weights are stored in 4 bits and computed with in the
model's dtype; what is trained stays float32.
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from h2s.errors import InputError, in_short

# What decides the weights. Layers compute in the dtype that the model is loaded in, as TRL has it.
KEPT = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "llm_int8_skip_modules")


def quantization_settings(config: Any) -> dict[str, Any]:
    """The arguments of `BitsAndBytesConfig` that make the same weights again; those at their default are left out.

    Args:
        config: a quantisation as transformers has it: a configuration, or the mapping of a `config.json`.

    Raises:
        InputError: it is none of bitsandbytes in 4 bits, that package is not there, or this is a launch of FSDP2.
    """
    given = config if isinstance(config, Mapping) else config.to_dict()
    if given.get("load_in_4bit") is not True:
        method = "bitsandbytes in 8 bits" if given.get("load_in_8bit") else str(given.get("quant_method", "no method"))
        raise InputError(
            f"a base quantised by {method.rpartition('.')[2].lower()} was not run with a prefix: expected bitsandbytes "
            "in 4 bits; name the model in whole weights, with load_in_4bit where it shall be quantised"
        )
    if not is_bitsandbytes_available():
        raise InputError(
            "a base in 4 bits needs the package 'bitsandbytes', which is not installed: pip install -e \".[quantized]\""
        )
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise InputError("FSDP2 was not run with a base in 4 bits: launch with accelerate_configs/multi_gpu.yaml")
    try:
        diff = BitsAndBytesConfig(**given).to_diff_dict()
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"the quantisation cannot be read: {in_short(error)}") from error
    return {name: diff[name] for name in KEPT if name in diff}


def check_quantization(config: PretrainedConfig, settings: Mapping[str, Any] | None) -> None:
    """Check, before weights load, that a base can be had as it is to be quantised.

    Args:
        config: the base's; where it was saved quantised, that says how.
        settings: how it is to be quantised as it loads; None: not.

    Raises:
        InputError: it cannot.
    """
    own = getattr(config, "quantization_config", None)
    if own is not None:
        quantization_settings(own)
    if settings is not None:
        if own is not None:
            raise InputError("the model is saved in 4 bits already: leave load_in_4bit or quantization_config out")
        quantization_settings(settings)


def keep_trainable(model: PreTrainedModel, compute_dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Let gradients pass through a model in 4 bits, whatever it does in between; any other is left as it is.

    On a CPU with bfloat16 instructions bitsandbytes 0.50 packs a layer's weights anew at its first forward in `eval()`
    without a gradient, for good: from then on it computes in bfloat16, its scales too, and *silently passes no
    gradient*, in `train()` neither. So its layers are told that there are no such instructions, and `eval()`, `train()`
    and `generate()` may come in any order.

    Args:
        model: the base, with its weights.
        compute_dtype: what its layers compute in; None leaves what they were made with.

    Raises:
        InputError: its weights are packed already.
    """
    if getattr(model, "is_loaded_in_4bit", False):
        from bitsandbytes.nn import Linear4bit

        for layer in (module for module in model.modules() if isinstance(module, Linear4bit)):
            state = getattr(layer.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                raise InputError(
                    "the model in 4 bits has run before, and bitsandbytes packed its weights for inference on the CPU: "
                    "load it again and give it before its first forward, or give its name and quantization_config"
                )
            layer.support_avx512bf16_for_cpu = False
            layer.compute_dtype = compute_dtype or layer.compute_dtype
    return model
