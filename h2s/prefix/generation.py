"""From prompts to completions, and from completions to their log-probabilities.

Letters: B rows, P virtual tokens, T text tokens (prompt and completion), C completion tokens, H hidden, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StaticLayer,
)
from trl.kernels import ChunkedLogProbFunction

from h2s.errors import InputError
from h2s.prefix.decode_step import DrawTokens, quick_head

# Gemma's end of a turn, which its generation config does not always list.
TURN_END = "<end_of_turn>"
# Columns of the [N, V] logits that exist at a time.
VOCABULARY_CHUNK = 4096
# Tokens by which a static cache is longer than a shorter one.
LENGTH_STEP = 128


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. The defaults are the whole distribution, as PPO needs it.

    `cache_implementation` is None or `static`: keys and values then lie in tensors of their final length, with which
    transformers compiles the decode step where it can (on CUDA, not on a CPU).
    """

    max_completion_length: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    cache_implementation: str | None = None

    def __post_init__(self):
        if self.max_completion_length < 1:
            raise InputError(f"max_completion_length must be at least 1, got {self.max_completion_length}")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise InputError("expected temperature >= 0, 0 < top_p <= 1 and top_k >= 0")
        if self.cache_implementation not in (None, "static"):
            raise InputError(f"cache_implementation must be static or left out, got {self.cache_implementation!r}")

    @property
    def whole(self) -> bool:
        """Whether any token may be drawn: only then do log-probabilities tell the KL of what is drawn."""
        return self.temperature > 0 and self.top_k == 0 and self.top_p == 1

    def generation_config(self, stop_ids: list[int], pad_id: int) -> GenerationConfig:
        """The settings; what is left out is transformers' own default (see `without_own_settings`)."""
        greedy = self.temperature == 0
        chosen = {} if greedy else {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return GenerationConfig(
            max_new_tokens=self.max_completion_length,
            do_sample=not greedy,
            eos_token_id=stop_ids,
            pad_token_id=pad_id,
            **chosen,
        )


class Completions(NamedTuple):
    """What was drawn.

    Attributes:
        ids: token ids a prompt, up to and including the first stop token.
        last_prompt: hidden states of the last prompt positions, shape (B, H), float32.
        logps_and_entropy: log-probabilities of the tokens as they were drawn, and the entropies of the distributions
            that they were drawn from, each (B, C) and arbitrary after a row's end; None where not any token could be
            drawn.
    """

    ids: list[list[int]]
    last_prompt: torch.Tensor
    logps_and_entropy: tuple[torch.Tensor, torch.Tensor] | None = None


class Batch(NamedTuple):
    """Right-padded rows `[prompt, completion, pad…]`, which are always exact (left-padded ones are not).

    Attributes:
        input_ids: shape (B, T).
        attention_mask: 1 on tokens, shape (B, T).
        completion_mask: True on the completion, its stop token included, shape (B, T).
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    completion_mask: torch.Tensor

    @classmethod
    def from_rows(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[list[int]],
        completions: Sequence[list[int]],
        device: torch.device,
    ) -> "Batch":
        """Pad token lists into one batch."""
        rows = [p + c for p, c in zip(prompts, completions, strict=True)]
        padded = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt").to(device)
        starts = torch.tensor([len(p) for p in prompts], device=device)
        after_prompt = torch.arange(padded.input_ids.shape[1], device=device) >= starts[:, None]  # (B, T)
        return cls(padded.input_ids, padded.attention_mask, after_prompt & padded.attention_mask.bool())

    def rows(self, index: torch.Tensor) -> "Batch":
        """Some rows, without the columns that are padding in all of them."""
        width = int(self.attention_mask[index].sum(1).max())
        return Batch(
            self.input_ids[index, :width], self.attention_mask[index, :width], self.completion_mask[index, :width]
        )

    def at_completions(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the completions' tokens, (B, C), at their places in the rows, (B, T); elsewhere 0."""
        lengths = self.completion_mask.sum(1, keepdim=True)
        own = torch.arange(values.shape[1], device=values.device) < lengths  # (B, C)
        return values.new_zeros(self.input_ids.shape).masked_scatter(self.completion_mask, values[own])


def stop_token_ids(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a reply: the generation config's eos ids, the tokenizer's, and Gemma's end of a turn."""
    listed = model.generation_config.eos_token_id
    ids = set([listed] if isinstance(listed, int) else listed or [])
    vocabulary = tokenizer.get_vocab()
    ids |= {vocabulary[t] for t in (tokenizer.eos_token, TURN_END) if t in vocabulary}
    return sorted(ids)


@torch.no_grad()
def generate(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    stop_ids: list[int],
    synced_gpus: bool = False,
    **generation_kwargs: Any,
) -> Completions:
    """Draw one completion a prompt under the active prefix: one batch, each row exactly as it would be alone.

    transformers pads on the left, between prefix and prompt: beyond a sliding window the pads would push the prefix
    out of it. So prefix and prompts fill a cache padded on the right, whose rows are then turned until their pads come
    first, before the prefix.

    Args:
        model: the base with its prefix.
        tokenizer: pads.
        prompts: token ids that follow the prefix.
        sampling: how completions are drawn.
        stop_ids: the tokens that end a completion.
        synced_gpus: whether processes whose rows have ended go on with the others, as sharded weights need it.
        **generation_kwargs: of transformers' `generate`, beside those of `sampling`.
    """
    base = model.get_base_model()
    padded = tokenizer.pad({"input_ids": list(prompts)}, padding_side="right", return_tensors="pt").to(model.device)
    rows, width = padded.input_ids.shape
    prefix_length = model.active_peft_config.num_virtual_tokens
    mask = torch.cat([padded.attention_mask.new_ones(rows, prefix_length), padded.attention_mask], dim=1)  # (B, P + T)
    cache = full_cache(model, rows)
    hidden = base.get_decoder()(
        input_ids=padded.input_ids, attention_mask=mask, past_key_values=cache, use_cache=True
    ).last_hidden_state  # (B, T, H)
    last_prompt = hidden[torch.arange(rows, device=model.device), padded.attention_mask.sum(1) - 1].float()
    # What is cached already needs no tokens. The first of the prompt's own stands in, also for the pads: a repetition
    # penalty then sees what it would see of the row alone.
    ids = torch.cat([padded.input_ids[:, :1].expand(rows, prefix_length), padded.input_ids], dim=1)
    ids = torch.where(mask.bool(), ids, padded.input_ids[:, :1])
    turn = (torch.arange(prefix_length + width, device=model.device) - (mask == 0).sum(1, keepdim=True)) % mask.shape[1]
    for layer in cache.layers:
        index = turn[:, None, :, None].expand_as(layer.keys)
        layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)
    cache.crop(-1)  # the last token is for `generate`, which needs its logits
    drawn = DrawTokens(sampling.temperature) if sampling.whole and not generation_kwargs else None
    # `drawn` leaves one token to choose from.
    how = sampling if drawn is None else replace(sampling, temperature=0)
    config = how.generation_config(stop_ids, tokenizer.pad_token_id)
    others = config.update(**generation_kwargs)  # what is no setting of its own, such as a streamer
    if drawn is not None:
        others["logits_processor"] = LogitsProcessorList([drawn])
    if (beams := config.num_beams or 1) > 1:
        cache.batch_repeat_interleave(beams)
    if sampling.cache_implementation == "static":
        cache = static_cache(cache, ids.shape[1] + sampling.max_completion_length)
    with without_own_settings(base), quick_head(base):
        output = base.generate(
            ids.gather(1, turn),
            attention_mask=mask.gather(1, turn),
            past_key_values=cache,
            generation_config=config,
            synced_gpus=synced_gpus,
            **others,
        )
    completions, stops = [], set(stop_ids)
    for row in output[:, ids.shape[1] :].tolist():
        end = next((n for n, token in enumerate(row, start=1) if token in stops), len(row))
        completions.append(row[:end])
    if drawn is None:
        return Completions(completions, last_prompt)
    return Completions(completions, last_prompt, (torch.stack(drawn.logps, 1), torch.stack(drawn.entropies, 1)))


def full_cache(model: PeftModel, rows: int) -> DynamicCache:
    """The active prefix for `rows` rows, in a cache whose every layer keeps all that comes.

    `get_prompt` cuts sliding layers to their window; what it cut off no later token sees, and zeros stand there.
    """
    cache, length = DynamicCache(), model.active_peft_config.num_virtual_tokens
    for number, layer in enumerate(model.get_prompt(1).layers):
        keys, values = (
            F.pad(x, (0, 0, length - x.shape[2], 0)).expand(rows, -1, -1, -1) for x in (layer.keys, layer.values)
        )
        cache.update(keys, values, number)
    return cache


def static_cache(filled: DynamicCache, length: int) -> Cache:
    """The same keys and values with room for `length` tokens, a multiple of `LENGTH_STEP`: each length is compiled."""
    cache = Cache(layers=[StaticLayer(-(-length // LENGTH_STEP) * LENGTH_STEP) for _ in filled.layers])
    for number, layer in enumerate(filled.layers):
        cache.update(layer.keys, layer.values, number)
    return cache


@contextmanager
def without_own_settings(base: PreTrainedModel) -> Iterator[None]:
    """Inside, `generate` takes nothing from the model's own generation config, such as a penalty or a cutoff.

    It fills in whatever a config leaves open, and the log-probabilities would not know of it.
    """
    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Inside, torch's random state is that of `seed`; outside it stays as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def decode(tokenizer: PreTrainedTokenizerBase, completion: list[int], stop_ids: list[int]) -> str:
    """A completion as text, without its stop token."""
    body = completion[:-1] if completion and completion[-1] in stop_ids else completion
    return tokenizer.decode(body, skip_special_tokens=True).strip()


def completion_logps(model: PeftModel, batch: Batch, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of the completions under the active prefix, with gradients to it.

    The logits of the other positions never exist, and of these only `VOCABULARY_CHUNK` columns at a time.

    Args:
        model: the base with its prefixes.
        batch: right-padded rows.
        temperature: that of the sampling, or the ratio would be against another distribution.

    Returns:
        logps (B, T) and entropy (B, T), zero outside the completions, in nats, float32.
    """
    base = model.get_base_model()
    rows = batch.input_ids.shape[0]
    prefix_mask = batch.attention_mask.new_ones(rows, model.active_peft_config.num_virtual_tokens)
    hidden = base.get_decoder()(
        input_ids=batch.input_ids,
        attention_mask=torch.cat([prefix_mask, batch.attention_mask], dim=1),  # (B, P + T)
        past_key_values=model.get_prompt(rows),
        use_cache=True,
    ).last_hidden_state  # (B, T, H)
    # The token at t is predicted by the hidden state at t - 1.
    predicted = batch.completion_mask[:, 1:]
    head = base.get_output_embeddings()
    logps, entropy, *_ = ChunkedLogProbFunction.apply(
        hidden[:, :-1][predicted].float(),  # (N, H), N completion tokens
        head.weight,
        head.bias,
        batch.input_ids[:, 1:][predicted],
        temperature,
        VOCABULARY_CHUNK,
        getattr(base.config.get_text_config(), "final_logit_softcapping", None),
        1.0,
        ("entropy",),
    )
    empty = hidden.new_zeros(batch.input_ids.shape, dtype=torch.float32)
    mask = batch.completion_mask
    return empty.masked_scatter(mask, logps), empty.masked_scatter(mask, entropy)
