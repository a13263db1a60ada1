"""A policy for use: a chat model with a soft prefix, made from a hard prompt or from an adapter."""

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import copy, deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from h2s.data.messages import Messages, as_messages, parse_messages
from h2s.errors import InputError
from h2s.hub import SavedAdapter, write_card
from h2s.models import check_config, load_base_model, load_tokenizer, model_source
from h2s.prefix.adapter import (
    fill,
    fingerprint,
    load_prefix,
    prefix_from_hard_prompt,
    random_prefix,
    save_adapter,
)
from h2s.prefix.card import EXAMPLES, describe
from h2s.prefix.chat_template import ChatPrefix, chat_prefix, wrap_chat_template
from h2s.prefix.families import check_family
from h2s.prefix.generation import Batch, Completions, Sampling, decode, seeded, stop_token_ids
from h2s.prefix.legacy import LegacyPrefix
from h2s.prefix.named_prefixes import NamedPrefixes
from h2s.prefix.opened import OpenedPolicy, check_download, open_adapter, open_hard_prompt
from h2s.prefix.policy_module import PolicyModule
from h2s.prefix.prompts import encode_beside
from h2s.prefix.question_prefix import with_question_prefix
from h2s.quantization import check_quantization, keep_trainable, quantization_settings
from h2s.run.arguments import NO_DEVICE_MAP

# What `generate` sets itself, and the argument that says it.
OWN_ARGUMENTS = {
    "max_new_tokens": "max_completion_length",
    "max_length": "max_completion_length",
    "do_sample": "temperature (0 is greedy)",
    "generation_config": "max_completion_length, temperature, top_k and top_p",
    "num_return_sequences": "a conversation as often as you want replies to it",
    "return_dict_in_generate": "policy.model.generate the tokens of policy.encode",
}


class PrefixTuningPolicyModel(NamedPrefixes, SavedAdapter):
    """A chat model whose system prompt is a soft prefix.

    ```python
    policy = PrefixTuningPolicyModel.from_hard_prompt("google/gemma-3-1b-it", "You keep a friendly conversation going.")
    policy.generate(["I went hiking today.", "It rains."])  # two texts
    with policy.hard_prompt_active():
        policy.reply("I went hiking today.")  # the same model under the hard prompt
    policy.save_pretrained("outputs/kind")  # plain peft loads it
    ```

    Attributes:
        model: the plain PEFT model; its adapter `default` is the soft prefix, trainable, float32.
        module: what DDP or FSDP2 wrap, where the policy is trained by several processes.
        tokenizer: the plain transformers tokenizer, whose chat template leaves out what the prefix holds.
        prefix: what the prefix stood for at the start.
        active: the name of the prefix that answers: `default`, or one that `load_adapter` put beside it.
        stop_ids: the tokens that end a reply.
    """

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, prefix: ChatPrefix):
        super().__init__(model, prefix)
        self.module = PolicyModule(model)
        self.tokenizer = tokenizer
        self.stop_ids = stop_token_ids(model, tokenizer)

    @classmethod
    def from_hard_prompt(
        cls,
        model: str | Path | PreTrainedModel,
        hard_prompt: str,
        opening_user_message: str | None = None,
        *,
        question_prefix: str = "",
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        device: str | torch.device | None = None,
        **download: Any,
    ) -> "PrefixTuningPolicyModel":
        """Make a soft prefix that equals a hard prompt.

        Args:
            model: a folder, a Hub name, `embedded:gemma-3-270m`, or a model that is loaded already; it is frozen.
            hard_prompt: the system prompt.
            opening_user_message: a user message before conversations that begin with the assistant.
            question_prefix: words in front of the question that these begin with (`h2s.prefix.question_prefix`).
            tokenizer: of a loaded model; by default the one of the name that it was loaded from.
            chat_template_kwargs: settings of the model's chat template, such as Qwen 3's `enable_thinking`.
            revision: of the model on the Hub.
            dtype: of a model that is to be loaded; `auto` is bfloat16 on CUDA and float32 elsewhere.
            attn_implementation: as transformers names them.
            quantization_config: 4 bits, as transformers has them, for a model that is to be loaded; its layers compute
                in `dtype`. It is kept with the adapter, whose base is quantised so wherever it loads.
            device: this process's own by default (Accelerate's `PartialState().device`).
            **download: `token` and `cache_dir`, as transformers has them.

        Raises:
            InputError: the model or the prompt cannot be used.
        """
        if isinstance(model, (str, Path)):
            if tokenizer is not None:
                raise InputError("tokenizer is for a model that is loaded already: leave it out")
            opened = open_hard_prompt(
                str(model), hard_prompt, opening_user_message, revision, chat_template_kwargs, **download
            )
            opened = opened.with_question_prefix(question_prefix).with_quantization(quantization_config)
            return cls.load(opened, dtype, attn_implementation, device)
        if not isinstance(model, PreTrainedModel):
            raise InputError(f"model must be a name or a transformers model, got a {type(model).__name__}")
        check_download(download)
        check_family(model.config)
        check_config(model.config, model.name_or_path)
        if quantization_config is not None:
            raise InputError("quantization_config is for a name: a loaded model is quantised as it was loaded")
        check_quantization(model.config, None)
        if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            raise InputError(f"the model lies on several devices by device_map: {NO_DEVICE_MAP}")
        if os.path.isdir(model.name_or_path):
            model.name_or_path = model_source(model.name_or_path)  # the adapter must find it from elsewhere too
        # A copy: its template is wrapped, and the caller's stays as it is.
        tokenizer = deepcopy(tokenizer) if tokenizer else load_tokenizer(model.name_or_path, revision, **download)
        prefix = chat_prefix(tokenizer, hard_prompt, opening_user_message, chat_template_kwargs)
        wrap_chat_template(tokenizer, prefix)
        tokenizer, prefix = with_question_prefix(tokenizer, prefix, question_prefix)
        if getattr(model, "is_loaded_in_4bit", False) and not model.hf_quantizer.pre_quantized:
            prefix = replace(prefix, quantization=quantization_settings(model.config.quantization_config))
        model = keep_trainable(model.requires_grad_(False).eval().to(device or PartialState().device))
        return cls._converted(model, tokenizer, prefix, revision)

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | Path,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        device: str | torch.device | None = None,
        **download: Any,
    ) -> "PrefixTuningPolicyModel":
        """Load a policy adapter and the model that it was made for.

        Args:
            folder_or_hub_id: an adapter made by `save_pretrained`, `convert_prompt.py` or `train_policy.py`: a folder,
                or a repository `user/name` or `user/name@revision`.
            revision: of the adapter on the Hub.
            dtype: of the frozen model; `auto` is bfloat16 on CUDA and float32 elsewhere.
            attn_implementation: as transformers names them.
            device: this process's own by default (Accelerate's `PartialState().device`).
            **download: `token` and `cache_dir`, as transformers has them.

        Raises:
            InputError: it is not a policy adapter.
        """
        return cls.load(cls.open(folder_or_hub_id, revision, **download), dtype, attn_implementation, device)

    @staticmethod
    def open(folder_or_hub_id: str | Path, revision: str | None = None, **download: Any) -> OpenedPolicy:
        """The first step of `from_pretrained`, without weights: what cannot be used is refused before they load."""
        return open_adapter(folder_or_hub_id, revision, **download)

    @classmethod
    def load(
        cls,
        opened: OpenedPolicy,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        device: str | torch.device | None = None,
    ) -> "PrefixTuningPolicyModel":
        """The second step of both: the base model's weights, and the adapter's or the hard prompt's own prefix."""
        how: dict[str, Any] = {"device": device or PartialState().device, "quantization": opened.prefix.quantization}
        base = load_base_model(opened.source, opened.revision, dtype, attn_implementation, **how, **opened.download)
        if opened.legacy is None and opened.adapter is None:
            return cls._converted(base, opened.tokenizer, opened.prefix, opened.revision)
        model, prefix = random_prefix(base, len(opened.prefix.token_ids), opened.revision), opened.prefix
        if opened.adapter is not None:
            prefix = load_prefix(model, opened.adapter, prefix)
        elif opened.legacy is not None:
            fill(model, opened.legacy.inputs(base, prefix.token_ids))
        return cls(model, opened.tokenizer, prefix)

    @classmethod
    def _converted(
        cls, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prefix: ChatPrefix, revision: str | None
    ) -> "PrefixTuningPolicyModel":
        model = prefix_from_hard_prompt(base, prefix.token_ids, revision)
        return cls(model, tokenizer, replace(prefix, start=fingerprint(model)))

    def _save_files(self, folder: str | Path, is_main_process: bool = True) -> None:
        self.check_own_is_active("saved")
        save_adapter(self.model, self.tokenizer, self.prefix, folder, is_main_process)

    def _write_card(self, folder: Path, report: str, source: str) -> None:
        about, use = describe(self.prefix, source, self.model.get_base_model().generation_config)
        title = "A system prompt as a soft prefix"
        write_card(folder, title, self.base_model, about, report, use, "text-generation", [])

    def difference_to_hard_prompt(self) -> float:
        """The largest difference between the prefix and the hard prompt as text, on an example conversation.

        Of a logit, or of a log-probability as training computes it, relative to the largest logit: 1e-6 is float32's
        rounding.
        """
        return self._difference(lambda ids: {"input_ids": torch.tensor([ids], device=self.model.device)})

    def difference_to_legacy(self, legacy: LegacyPrefix) -> float:
        """The same between the prefix and the prototype's own forward, all in one pass."""
        return self._difference(partial(legacy.inputs, self.model.get_base_model()))

    @torch.no_grad()
    def _difference(self, inputs: Callable[[list[int]], dict[str, torch.Tensor]]) -> float:
        """Between the prefix and what the base model makes of `inputs(token ids of the whole)`."""
        (prompt,) = self.encode([parse_messages(EXAMPLES[self.prefix.first_role])], 1)
        ids = torch.tensor([prompt], device=self.model.device)
        soft = self.model(ids).logits[0].float()  # (T, V)
        whole = self.model.get_base_model()(**inputs(self.prefix.token_ids + prompt), logits_to_keep=len(prompt))
        expected = whole.logits[0].float()
        # Training has a way of its own from hidden states to log-probabilities, and a family may have another.
        scored = self.module(*Batch.from_rows(self.tokenizer, [prompt[:1]], [prompt[1:]], self.model.device))[0]
        expected_logps = expected[:-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        largest = max((soft - expected).abs().max(), (scored[0, 1:] - expected_logps).abs().max())
        return (largest / expected.abs().max()).item()

    @property
    def config(self) -> PretrainedConfig:
        """The base model's configuration."""
        return self.model.get_base_model().config

    def encode(self, contexts: Dataset | Sequence[Messages], max_completion_length: int) -> list[list[int]]:
        """As [`OpenedPolicy.encode`]."""
        return encode_beside(self.tokenizer, self.prefix, self.config, contexts, max_completion_length)

    def complete(
        self, prompt_ids: Sequence[list[int]], sampling: Sampling, **generation_kwargs: Any
    ) -> list[list[int]]:
        """Token ids of one completion a prompt, as `encode` gives them, up to and including the first stop token."""
        return self.draw(prompt_ids, sampling, **generation_kwargs).ids

    def draw(self, prompt_ids: Sequence[list[int]], sampling: Sampling, **generation_kwargs: Any) -> Completions:
        """As `complete`, with how likely the tokens were."""
        self.module.register_with_fsdp()
        return self.module.sample(self.tokenizer, prompt_ids, sampling, self.stop_ids, **generation_kwargs)

    def decode(self, completion: list[int]) -> str:
        """A completion as text, without its stop token."""
        return decode(self.tokenizer, completion, self.stop_ids)

    def generate(
        self,
        conversations: Sequence[str | Messages],
        max_completion_length: int = 128,
        temperature: float = 0.7,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        **generation_kwargs: Any,
    ) -> list[str]:
        """Reply to a batch of conversations, each exactly as it would be answered alone.

        Args:
            conversations: N of them, each a list of messages that waits for the assistant's reply, or text that is one
                user message.
            max_completion_length: most tokens of a reply.
            temperature: 0 is greedy.
            top_k: the likeliest tokens that may be drawn; 0 is all.
            top_p: the smallest share of probability that may be drawn; 1 is all.
            seed: of the sampling; the random state outside is then left as it was.
            **generation_kwargs: further arguments of transformers' `generate`: `repetition_penalty`, `num_beams`,
                `streamer` (for one conversation), …; of `cache_implementation` only `static`.

        Returns:
            N texts, in order.

        Raises:
            InputError: a conversation cannot be answered with this prefix (named by its place, counted from 1), or an
                argument has another name here.
        """
        if isinstance(conversations, str):
            raise InputError("generate takes a list of conversations, got a text: reply takes one")
        for name in generation_kwargs:
            if name in OWN_ARGUMENTS:
                raise InputError(f"{name} has another name here: give {OWN_ARGUMENTS[name]}")
        if not conversations:
            return []
        cache = generation_kwargs.pop("cache_implementation", None)
        sampling = Sampling(max_completion_length, temperature, top_k, top_p, cache)
        prompts = self.encode([as_messages(c) for c in conversations], max_completion_length)
        with nullcontext() if seed is None else seeded(self.model.device, seed):
            completions = self.complete(prompts, sampling, **generation_kwargs)
        return [self.decode(completion) for completion in completions]

    def reply(self, conversation: str | Messages, **arguments: Any) -> str:
        """Reply to one conversation; `arguments` are those of [`generate`]."""
        return self.generate([conversation], **arguments)[0]

    def generate_response(
        self,
        asked_question: str,
        conversation_history: list[dict[str, Any]],
        temperature: float = 0.7,
        max_completion_length: int = 128,
        question_prefix: str | None = None,
    ) -> list[dict[str, Any]]:
        """Reply as the prototype did: the question stands as the conversation's first message, the assistant's.

        Args:
            asked_question: the question.
            conversation_history: the messages after it, contents as text or `[{"type": "text", "text": …}]`.
            temperature: 0 is greedy.
            max_completion_length: most tokens of the reply.
            question_prefix: words in front of the question, in place of the adapter's own (`h2s.json`).

        Returns:
            The history with the reply appended, in the form `[{"type": "text", "text": …}]`, without the question.

        Raises:
            InputError: the adapter was made without an `opening_user_message`, so no conversation with it can begin
                with the assistant.
        """
        if self.prefix.first_role != "assistant":
            raise InputError(
                "generate_response begins the conversation with the assistant's question, which this adapter cannot: "
                "convert the prompt with an opening_user_message"
            )
        policy = copy(self)
        if question_prefix is not None:
            policy.tokenizer, policy.prefix = with_question_prefix(self.tokenizer, self.prefix, question_prefix)
        conversation = parse_messages([{"role": "assistant", "content": asked_question}, *conversation_history])
        text = policy.reply(conversation, max_completion_length=max_completion_length, temperature=temperature)
        return [*conversation_history, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
