"""The soft prefix: from a hard prompt's KV cache to a PEFT PrefixTuning adapter, saved, and loaded again.

Prefix tuning (Li and Liang 2021, arXiv 2101.00190) trains keys and values in front of every layer. Copying the hard
prompt's own keys and values there makes the start of training exactly the hard prompt.
"""

import hashlib
import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    PeftType,
    PrefixTuningConfig,
    TaskType,
    get_peft_model,
    initialize_kv_prefix_from_past_key_values,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoTokenizer, DynamicCache, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from h2s.errors import InputError, in_short
from h2s.models import LOADING_ERRORS, load_config, model_source, tensor_shapes
from h2s.prefix.chat_template import ChatPrefix
from h2s.prefix.families import check_family

SOFT, HARD = "default", "hard_prompt"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def random_prefix(base: PreTrainedModel, num_virtual_tokens: int, revision: str | None = None) -> PeftModel:
    """Wrap `base` with a trainable prefix that is still to be filled, by [`load_weights`] say."""
    config = PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=num_virtual_tokens, prefix_projection=False, revision=revision
    )
    return get_peft_model(base, config).eval()


def prefix_from_hard_prompt(base: PreTrainedModel, token_ids: list[int], revision: str | None = None) -> PeftModel:
    """Wrap `base` with a trainable prefix equal to the given tokens.

    Args:
        base: the frozen model.
        token_ids: the P tokens that the prefix stands for.
        revision: the base model's revision, written into the adapter's configuration.

    Returns:
        The PEFT model, its prefix float32 whatever the base's dtype.
    """
    model = random_prefix(base, len(token_ids), revision)
    fill_with_tokens(model, token_ids)
    return model


def fill_with_tokens(model: PeftModel, token_ids: list[int], adapter: str = SOFT) -> None:
    """Make a prefix of the model equal to the given tokens, as the model in its present dtype reads them."""
    fill(model, {"input_ids": torch.tensor([token_ids], device=model.device)}, adapter)


@torch.no_grad()
def fill(model: PeftModel, inputs: dict[str, torch.Tensor], adapter: str = SOFT) -> None:
    """Make a prefix of the model equal to P tokens: `input_ids` of shape (1, P), or `inputs_embeds` (1, P, hidden).

    It is their KV cache, every layer keeping all of them. A cache made from the model's configuration would drop what
    lies beyond the sliding window, and a prompt longer than it could not be read back; `get_prompt` cuts the sliding
    layers itself when the prefix is used.
    """
    cache = DynamicCache()
    model.get_base_model()(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    initialize_kv_prefix_from_past_key_values(model, adapter_name=adapter, past_key_values=cache)


def add_hard_prompt(model: PeftModel, token_ids: list[int]) -> None:
    """Add the hard prompt as a second, frozen prefix: the reference policy costs no second model."""
    add_prefix(model, HARD)
    fill_with_tokens(model, token_ids, HARD)


def add_prefix(model: PeftModel, adapter: str) -> None:
    """Add a frozen prefix of the soft one's length that is still to be filled; the one that is active stays so."""
    soft = model.peft_config[SOFT]
    config = PrefixTuningConfig(
        task_type=soft.task_type, num_virtual_tokens=soft.num_virtual_tokens, prefix_projection=False
    )
    model.add_adapter(adapter, config)
    model.prompt_encoder[adapter].requires_grad_(False)


@contextmanager
def hard_prompt_active(model: PeftModel):
    """Inside, the model answers as the hard prompt. (`disable_adapter` leaves state behind on prefix models.)"""
    active = model.active_adapter
    model.set_adapter(HARD)
    try:
        yield model
    finally:
        model.set_adapter(active)


def soft_prefix(model: PeftModel, adapter: str = SOFT) -> torch.nn.Parameter:
    """The one trained parameter of a prefix model, shape (P, 2 * layers * kv_dim), or a further prefix's."""
    return model.prompt_encoder[adapter].embedding.weight


def hard_prefix(model: PeftModel) -> torch.nn.Parameter:
    """The frozen hard prompt beside it (`add_hard_prompt`), of the same shape."""
    return model.prompt_encoder[HARD].embedding.weight


def fingerprint(model: PeftModel, adapter: str = SOFT) -> str:
    """Of a prefix's bytes: whether it is still the one that was converted."""
    return hashlib.sha256(soft_prefix(model, adapter).detach().cpu().numpy().tobytes()).hexdigest()


def save_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prefix: ChatPrefix,
    folder: str | Path,
    is_main_process: bool = True,
) -> None:
    """Save what plain PEFT loads: the soft prefix (never the frozen hard prompt), the tokenizer, `h2s.json`.

    Where the model is sharded every process calls it, to gather the prefix, and the main one writes.
    """
    model.save_pretrained(folder, selected_adapters=[SOFT], is_main_process=is_main_process)
    if not is_main_process:
        return
    save_tokenizer(tokenizer, folder, model.get_base_model().get_input_embeddings().weight.shape[0])
    prefix.save(folder)


def read_adapter_config(folder: str | Path, task_type: TaskType, **download: Any) -> PeftConfig:
    """The configuration of a prefix adapter, checked before any model loads.

    `download` is `token` and `cache_dir` for the base model's configuration.

    Raises:
        InputError: the folder holds no prefix adapter of this task, with whole weights in safetensors, or one that
            does not fit the base model that it names.
    """
    kind = "reward" if task_type == TaskType.SEQ_CLS else "policy"
    expected = f"{folder} is not a {kind} adapter made by h2s"
    for name in ("adapter_config.json", ADAPTER_WEIGHTS):
        if not (Path(folder) / name).is_file():
            raise InputError(f"{expected}: there is no {name} in it")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except LOADING_ERRORS as error:
        raise InputError(f"{expected}: {in_short(error)}") from error
    if config.peft_type != PeftType.PREFIX_TUNING or config.task_type != task_type:
        raise InputError(f"{expected}: it is a {config.peft_type} adapter for {config.task_type}")
    found = tensor_shapes(Path(folder) / ADAPTER_WEIGHTS).get("prompt_embeddings")
    base = model_source(config.base_model_name_or_path)
    base_config = load_config(base, config.revision, **download)
    if task_type == TaskType.CAUSAL_LM:
        check_family(base_config)
    layers, width = prefix_sizes(base_config)
    fits = (config.num_virtual_tokens, 2 * layers * width)
    if (config.num_layers, config.token_dim) != (layers, width) or found != fits:
        raise InputError(
            f"the adapter in {folder} does not fit its base model {base}: expected a prefix of shape {fits} for "
            f"{layers} layers, got {found} for {config.num_layers}; base_model_name_or_path in adapter_config.json "
            "must name the model that it was made from"
        )
    return config


def prefix_sizes(config: PretrainedConfig) -> tuple[int, int]:
    """The layers of a model, and how many numbers the keys (or values) of a virtual token are in each."""
    text = config.get_text_config()
    sizes = text.to_dict()
    heads = sizes.get("num_key_value_heads") or text.num_attention_heads
    head_dim = sizes.get("head_dim") or text.hidden_size // text.num_attention_heads
    return text.num_hidden_layers, heads * head_dim


def load_prefix(model: PeftModel, folder: str | Path, prefix: ChatPrefix, adapter: str = SOFT) -> ChatPrefix:
    """Load an adapter's weights; what nothing has trained equals the hard prompt in this model's dtype too.

    Returns:
        `prefix`, its start being the one in this dtype.

    Raises:
        InputError: as [`load_weights`].
    """
    load_weights(model, folder, adapter)
    if prefix.start != fingerprint(model, adapter):
        return prefix
    fill_with_tokens(model, prefix.token_ids, adapter)
    return replace(prefix, start=fingerprint(model, adapter))


def load_weights(model: PeftModel, folder: str | Path, adapter: str = SOFT) -> None:
    """Load an adapter's weights into a prefix of the model's; the soft one stays trainable.

    `PeftModel.from_pretrained(is_trainable=True)` is refused for prompt learning; this is the way to go on training.

    Raises:
        InputError: the weights are of another shape, or the file is damaged.
    """
    soft = soft_prefix(model, adapter)
    try:
        weights = load_file(Path(folder) / ADAPTER_WEIGHTS)
        if isinstance(soft, DTensor):
            whole = weights["prompt_embeddings"].to(soft.device)
            soft.data.copy_(distribute_tensor(whole, soft.device_mesh, soft.placements))
        else:
            set_peft_model_state_dict(model, weights, adapter_name=adapter)
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:  # RuntimeError: torch's, of a shape
        raise InputError(f"the adapter in {folder} does not fit this model: {in_short(error)}") from error


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path, embedding_rows: int) -> None:
    """Save a tokenizer that has no more entries than the model has embedding rows.

    `AutoPeftModelForCausalLM` resizes the model when the tokenizer beside the adapter is larger, which would add
    untrained tokens that can be sampled. Gemma 3 1B's tokenizer has one entry too many, an image token: a prefix is
    text only, so the surplus is dropped. transformers cannot remove an added token, hence the edit of its files.
    """
    tokenizer.save_pretrained(folder)
    folder = Path(folder)
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    surplus = {t["content"] for t in spec["added_tokens"] if t["id"] >= embedding_rows}
    if not surplus:
        return
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in surplus]
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    config_file = folder / "tokenizer_config.json"
    config = _without(json.loads(config_file.read_text(encoding="utf-8")), surplus)
    config_file.write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")
    rows = len(AutoTokenizer.from_pretrained(folder))
    if rows > embedding_rows:
        raise InputError(f"the tokenizer has {rows} entries for {embedding_rows} embedding rows of the model")


def _without(value: Any, tokens: set[str]) -> Any:
    """The JSON value with every mention of one of `tokens` taken out."""

    def mentions(item: Any) -> bool:
        return item in tokens if isinstance(item, str) else isinstance(item, dict) and item.get("content") in tokens

    if isinstance(value, dict):
        return {k: _without(v, tokens) for k, v in value.items() if not mentions(v)}
    if isinstance(value, list):
        return [_without(v, tokens) for v in value if not mentions(v)]
    return value
