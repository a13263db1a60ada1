"""Tiny random models of the chat families, each with a chat template of its family's shape."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tiny import CHAT_TEMPLATE, WINDOW, build_tokenizer
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,  # a tied one repeats itself
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
# Llama 3.2's: the day stands in the system message, today's where `date_string` is not given.
LLAMA_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- if not date_string is defined -%}{%- set date_string = strftime_now('%d %b %Y') -%}{%- endif -%}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set system = messages[0]['content'] | trim -%}{%- set messages = messages[1:] -%}"
    "{%- else -%}{%- set system = '' -%}{%- endif -%}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: ' -}}"
    "{{- date_string + '\n\n' + system + '<|eot_id|>' -}}"
    "{%- for message in messages -%}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' -}}"
    "{{- message['content'] | trim + '<|eot_id|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"
)
# Qwen 3's: ChatML, thoughts of earlier turns left out, an empty thought where thinking is switched off.
QWEN_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{{- message['content'].split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}"
    "{%- endif -%}"
)
# Mistral's: 0.1 has no system message, 0.3 prints it in the last turn of the user, Small 3 in front.
MISTRAL_01_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}{%- endif -%}"
    "{%- if message['role'] == 'user' -%}{{- '[INST] ' + message['content'] + ' [/INST]' -}}"
    "{%- else -%}{{- message['content'] + eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
)
MISTRAL_03_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set system = messages[0]['content'] + '\n\n' -%}{%- set messages = messages[1:] -%}"
    "{%- else -%}{%- set system = '' -%}{%- endif -%}"
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- '[INST] ' + (system if loop.last else '') + message['content'] + '[/INST]' -}}"
    "{%- else -%}{{- ' ' + message['content'] + eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
)
MISTRAL_SMALL_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{- '[SYSTEM_PROMPT]' + message['content'] + '[/SYSTEM_PROMPT]' -}}"
    "{%- elif message['role'] == 'user' -%}{{- '[INST]' + message['content'] + '[/INST]' -}}"
    "{%- else -%}{{- message['content'] + eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
)
MISTRAL_TOKENS = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]


@dataclass(frozen=True)
class Family:
    """A family's model class and configuration, its chat template and the special tokens in that.

    `settings` are the template's own; `turn_end` ends a turn and is listed in the generation config.
    """

    model: type
    config: type
    sizes: dict[str, Any] = field(default_factory=dict)
    template: str = CHAT_TEMPLATE
    tokens: list[str] = field(default_factory=list)
    turn_end: str = "<end_of_turn>"
    settings: dict[str, Any] = field(default_factory=dict)


LAYER_TYPES = ["sliding_attention", "full_attention"] * 2
GEMMA_3 = {"sliding_window": WINDOW, "layer_types": LAYER_TYPES}
FAMILIES = {
    "gemma2": Family(
        Gemma2ForCausalLM,
        Gemma2Config,
        {
            "sliding_window": WINDOW,
            "layer_types": LAYER_TYPES,
            "attn_logit_softcapping": 5.0,  # both far below what the model says without them
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 8,
        },
    ),
    "gemma3_text": Family(Gemma3ForCausalLM, Gemma3TextConfig, GEMMA_3),
    "gemma3": Family(Gemma3ForConditionalGeneration, Gemma3Config, GEMMA_3),
    "llama": Family(
        LlamaForCausalLM,
        LlamaConfig,
        template=LLAMA_TEMPLATE,
        tokens=["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        turn_end="<|eot_id|>",
        settings={"date_string": "26 Jul 2024"},
    ),
    "qwen3": Family(
        Qwen3ForCausalLM,
        Qwen3Config,
        template=QWEN_TEMPLATE,
        tokens=["<|im_start|>", "<|im_end|>"],
        turn_end="<|im_end|>",
        settings={"enable_thinking": False},
    ),
    "mistral": Family(
        MistralForCausalLM, MistralConfig, {"sliding_window": WINDOW}, MISTRAL_SMALL_TEMPLATE, MISTRAL_TOKENS, "<eos>"
    ),
}


def save_family(name: str, folder: Path, template: str | None = None) -> Path:
    """A tiny random model of a family, its tokenizer and chat template, as its files lie on the Hub."""
    family, tokenizer = FAMILIES[name], build_tokenizer()
    tokenizer.add_tokens(family.tokens, special_tokens=True)
    tokenizer.chat_template = template or family.template
    config = text = {"vocab_size": len(tokenizer), **SIZES, **family.sizes}
    if name == "gemma3":
        ties = {"tie_word_embeddings": False}
        config = {"text_config": text, "vision_config": VISION, "mm_tokens_per_image": 1, "image_token_index": 3} | ties
    torch.manual_seed(0)
    model = family.model(family.config(**config))
    eos = tokenizer.convert_tokens_to_ids(["<eos>", family.turn_end])
    model.generation_config.update(eos_token_id=sorted(set(eos)), pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
