"""A policy before its weights load: configuration, tokenizer and prefix, and contexts checked against them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from peft import TaskType
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedTokenizerBase

from h2s.data.messages import Messages
from h2s.data.splits import UNKNOWN
from h2s.errors import InputError
from h2s.hub import adapter_folder
from h2s.models import check_attention, load_config, load_tokenizer, model_source, room_for_text
from h2s.prefix.adapter import read_adapter_config
from h2s.prefix.chat_template import ChatPrefix, chat_prefix, wrap_chat_template
from h2s.prefix.families import check_family
from h2s.prefix.legacy import OPENING_USER_MESSAGE, QUESTION_PREFIX, LegacyCheckpoint, LegacyPrefix
from h2s.prefix.prompts import encode_beside
from h2s.prefix.question_prefix import with_question_prefix
from h2s.quantization import check_quantization, quantization_settings
from h2s.run.arguments import (
    NO_DEVICE_MAP,
    QUANTIZATION,
    HardPromptArguments,
    quantization_config,
    read_hard_prompt,
)


@dataclass
class OpenedPolicy:
    """A policy without its weights: what can be known and checked before they load.

    Attributes:
        source: the base model's folder or Hub name.
        revision: its revision on the Hub.
        config: its configuration.
        tokenizer: its tokenizer, with the wrapped chat template.
        prefix: what the soft prefix stands for.
        adapter: the folder with the prefix's weights; None where it is still to be made.
        download: `token` and `cache_dir`.
        legacy: what it is to be made from in place of the hard prompt: embeddings of the prototype's.
    """

    source: str
    revision: str | None
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    prefix: ChatPrefix
    adapter: str | None = None
    download: dict[str, Any] = field(default_factory=dict)
    legacy: LegacyPrefix | None = None

    def __post_init__(self):
        check_quantization(self.config, self.prefix.quantization)

    def encode(self, contexts: Dataset | Sequence[Messages], max_completion_length: int) -> list[list[int]]:
        """The token ids that follow the prefix for each context; none is too long for a completion beside it.

        Raises:
            InputError: a context cannot be answered with this prefix; it is named by its row in its file, or by its
                place, counted from 1.
        """
        return encode_beside(self.tokenizer, self.prefix, self.config, contexts, max_completion_length)

    def with_question_prefix(self, words: str | None) -> "OpenedPolicy":
        """The same with these words in front of the assistant's question; None leaves those that it has.

        Raises:
            InputError: with this policy a conversation begins with the user, or they spell out a special token.
        """
        if words is None:
            return self
        tokenizer, prefix = with_question_prefix(self.tokenizer, self.prefix, words)
        return replace(self, tokenizer=tokenizer, prefix=prefix)

    def with_quantization(self, config: BitsAndBytesConfig | None) -> "OpenedPolicy":
        """The same with its base quantised as it loads; None leaves it as it is saved.

        Raises:
            InputError: bitsandbytes in 4 bits is not meant or not there, or the base is saved quantised already.
        """
        if config is None:
            return self
        return replace(self, prefix=replace(self.prefix, quantization=quantization_settings(config)))


def open_hard_prompt(
    model: str,
    hard_prompt: str,
    opening_user_message: str | None = None,
    revision: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    **download: Any,
) -> OpenedPolicy:
    """Open a policy that is to be made from a hard prompt; the arguments are those of `from_hard_prompt`.

    Raises:
        InputError: the model or the prompt cannot be used.
    """
    check_download(download)
    source = model_source(model)
    tokenizer = load_tokenizer(source, revision, **download)
    config = load_config(source, revision, **download)
    check_family(config)
    prefix = _take_prompt(tokenizer, config, hard_prompt, opening_user_message, chat_template_kwargs)
    return OpenedPolicy(source, revision, config, tokenizer, prefix, download=download)


def open_legacy(
    model: str,
    legacy_checkpoint: str | Path,
    revision: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> OpenedPolicy:
    """Open a policy that is to be made from a checkpoint of the prototype's, its hard prompt beside it.

    Questions get the prototype's words in front (`with_question_prefix("")` leaves them out), and what it has seen is
    unknown.

    Raises:
        InputError: the model or the checkpoint cannot be used, or they do not belong together.
    """
    checkpoint = LegacyCheckpoint.read(legacy_checkpoint)
    source = model_source(model)
    tokenizer, config = load_tokenizer(source, revision), load_config(source, revision)
    check_family(config)
    hard_prompt = checkpoint.hard_prompt(tokenizer, config)
    prefix = _take_prompt(tokenizer, config, hard_prompt, OPENING_USER_MESSAGE, chat_template_kwargs)
    legacy = checkpoint.placed(prefix.token_ids)
    opened = OpenedPolicy(source, revision, config, tokenizer, replace(prefix, seen=[UNKNOWN]), legacy=legacy)
    return opened.with_question_prefix(QUESTION_PREFIX)


def _take_prompt(
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    hard_prompt: str,
    opening_user_message: str | None,
    chat_template_kwargs: dict[str, Any] | None,
) -> ChatPrefix:
    """Find the prompt's prefix, which leaves the model room, and wrap the tokenizer's chat template."""
    prefix = chat_prefix(tokenizer, hard_prompt, opening_user_message, chat_template_kwargs)
    if room_for_text(config, len(prefix.token_ids)) < 1:
        raise InputError(
            f"the hard prompt is {len(prefix.token_ids)} tokens long and leaves the model no room for a reply"
        )
    wrap_chat_template(tokenizer, prefix)
    return prefix


def open_adapter(folder_or_hub_id: str | Path, revision: str | None = None, **download: Any) -> OpenedPolicy:
    """Open a policy that was made before; the arguments are those of `from_pretrained`.

    Raises:
        InputError: it is not a policy adapter made by h2s, or does not fit its base model.
    """
    check_download(download)
    folder = adapter_folder(folder_or_hub_id, revision, **download)
    config = read_adapter_config(folder, TaskType.CAUSAL_LM, **download)
    prefix = ChatPrefix.load(folder)
    source, base_revision = model_source(config.base_model_name_or_path), config.revision
    base_config = load_config(source, base_revision, **download)
    tokenizer = load_tokenizer(folder)
    return OpenedPolicy(source, base_revision, base_config, tokenizer, prefix, folder, download)


def check_download(download: Collection[str]) -> None:
    """Check the names of further arguments, which transformers would swallow.

    Raises:
        InputError: one is neither `token` nor `cache_dir`.
    """
    for name in download:
        if name not in ("token", "cache_dir"):
            raise InputError(f"{name} is not taken" + (f": {NO_DEVICE_MAP}" if name == "device_map" else ""))


def open_policy(
    arguments: HardPromptArguments,
    prefix_adapter: str | None = None,
    legacy_checkpoint: str | None = None,
    question_prefix: str | None = None,
) -> OpenedPolicy:
    """Open what a recipe names: a prefix adapter, a checkpoint of the prototype's, or else a model and hard prompt.

    Raises:
        InputError: it names too much or too little, or what it names cannot be used.
    """
    settings = cast(dict | None, arguments.chat_template_kwargs)  # its __post_init__ has read a text
    quantization = quantization_config(arguments)
    prompt = ["hard_prompt", "hard_prompt_file", "opening_user_message"]
    if prefix_adapter is not None:
        own = ["model_name_or_path", "model_revision", *prompt, "chat_template_kwargs", *QUANTIZATION]
        _leave_out(arguments, "prefix_adapter", *own)
        opened = open_adapter(prefix_adapter)
    elif legacy_checkpoint is not None:
        _leave_out(arguments, "legacy_checkpoint", *prompt)
        model = arguments.require("model_name_or_path", "model")
        opened = open_legacy(model, legacy_checkpoint, arguments.model_revision, settings)
    else:
        opened = open_hard_prompt(
            arguments.require("model_name_or_path", "model"),
            read_hard_prompt(arguments),
            arguments.opening_user_message,
            arguments.model_revision,
            settings,
        )
    check_attention(opened.source, opened.config, arguments.attn_implementation)
    return opened.with_question_prefix(question_prefix).with_quantization(quantization)


def _leave_out(arguments: HardPromptArguments, source: str, *keys: str) -> None:
    for key in keys:
        if getattr(arguments, key) is not None:
            raise InputError(f"{source} brings its own {key}: leave {key} out")
