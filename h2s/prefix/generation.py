"""From prompts to completions, and from completions to their log-probabilities.

Letters: B rows, P virtual tokens, T text tokens (prompt and completion), C completion tokens, H hidden, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase
from trl.kernels import ChunkedLogProbFunction

from h2s.errors import InputError

# Gemma's end of a turn, which its generation config does not always list.
TURN_END = "<end_of_turn>"
# Columns of the [N, V] logits that exist at a time.
VOCABULARY_CHUNK = 4096


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. The defaults are the whole distribution, as PPO needs it."""

    max_completion_length: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.max_completion_length < 1:
            raise InputError(f"max_completion_length must be at least 1, got {self.max_completion_length}")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise InputError("expected temperature >= 0, 0 < top_p <= 1 and top_k >= 0")

    @property
    def whole(self) -> bool:
        """Whether any token may be drawn: only then do log-probabilities tell the KL of what is drawn."""
        return self.temperature > 0 and self.top_k == 0 and self.top_p == 1

    def generation_config(self, stop_ids: list[int], pad_id: int) -> GenerationConfig:
        """The settings, explicit: what is left out would be the model's own (Gemma's keeps the top 64)."""
        greedy = self.temperature == 0
        chosen = {} if greedy else {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return GenerationConfig(
            max_new_tokens=self.max_completion_length,
            do_sample=not greedy,
            eos_token_id=stop_ids,
            pad_token_id=pad_id,
            **chosen,
        )


@dataclass(frozen=True)
class Batch:
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
    **generation_kwargs: Any,
) -> list[list[int]]:
    """Draw one completion a prompt under the active prefix.

    `generate` pads on the left. That is exact only while prefix, padded prompt and completion fit into the sliding
    window; beyond it the pads would push the prefix out, and prompts are generated in groups of equal length.

    Args:
        model: the base with its prefix.
        tokenizer: pads.
        prompts: token ids that follow the prefix.
        sampling: how completions are drawn.
        stop_ids: the tokens that end a completion.
        **generation_kwargs: of transformers' `generate`, beside those of `sampling`.

    Returns:
        Token ids a prompt, up to and including the first stop token.
    """
    window = getattr(model.get_base_model().config.get_text_config(), "sliding_window", None)
    prefix_length = model.active_peft_config.num_virtual_tokens
    longest = prefix_length + max(map(len, prompts)) + sampling.max_completion_length
    groups: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        groups[len(prompt) if window is not None and longest > window else 0].append(i)
    completions: list[list[int]] = [[] for _ in prompts]
    stops = set(stop_ids)
    for group in groups.values():
        rows = {"input_ids": [prompts[i] for i in group]}
        padded = tokenizer.pad(rows, padding_side="left", return_tensors="pt").to(model.device)
        config = sampling.generation_config(stop_ids, tokenizer.pad_token_id)
        others = config.update(**generation_kwargs)  # what is no setting of its own, such as a streamer
        output = model.generate(**padded, generation_config=config, **others)
        for i, row in zip(group, output[:, padded.input_ids.shape[1] :].tolist(), strict=True):
            end = next((n for n, token in enumerate(row, start=1) if token in stops), len(row))
            completions[i] = row[:end]
    return completions


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


def completion_logps(
    model: PeftModel, batch: Batch, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of the completions under the active prefix, with gradients to it.

    The logits of the other positions never exist, and of these only `VOCABULARY_CHUNK` columns at a time.

    Args:
        model: the base with its prefixes.
        batch: right-padded rows.
        temperature: that of the sampling, or the ratio would be against another distribution.

    Returns:
        logps (B, T) and entropy (B, T), zero outside the completions, in nats; and the detached hidden state of the
        last prompt position (B, H), all float32.
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
    last_prompt = batch.completion_mask.int().argmax(1) - 1
    return (
        empty.masked_scatter(batch.completion_mask, logps),
        empty.masked_scatter(batch.completion_mask, entropy),
        hidden[torch.arange(rows, device=hidden.device), last_prompt].detach().float(),
    )
