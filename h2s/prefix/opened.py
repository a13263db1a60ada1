"""A policy before its weights load: configuration, tokenizer and prefix, and contexts checked against them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from peft import TaskType
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from h2s.data.messages import Messages
from h2s.errors import InputError
from h2s.hub import adapter_folder
from h2s.models import load_config, load_tokenizer, model_source, room_for_text
from h2s.prefix.adapter import read_adapter_config
from h2s.prefix.chat_template import ChatPrefix, chat_prefix, encode_prompts, wrap_chat_template
from h2s.run.arguments import HardPromptArguments, read_hard_prompt
from h2s.run.settings import NO_DEVICE_MAP


@dataclass
class OpenedPolicy:
    """A policy without its weights: what can be known and checked before they load.

    Attributes:
        source: the base model's folder or Hub name.
        revision: its revision on the Hub.
        config: its configuration.
        tokenizer: its tokenizer, with the wrapped chat template.
        prefix: what the soft prefix stands for.
        adapter: the folder with the prefix's weights; None where it is still to be made from the hard prompt.
        download: `token` and `cache_dir`.
    """

    source: str
    revision: str | None
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    prefix: ChatPrefix
    adapter: str | None = None
    download: dict[str, Any] = field(default_factory=dict)

    def encode(self, contexts: Sequence[Messages], max_completion_length: int) -> list[list[int]]:
        """The token ids that follow the prefix for each context; none is too long for a completion beside it.

        Raises:
            InputError: a context cannot be answered with this prefix; it is named by its place, counted from 1.
        """
        return encode_beside(self.tokenizer, self.prefix, self.config, contexts, max_completion_length)


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
    prefix = chat_prefix(tokenizer, hard_prompt, opening_user_message, chat_template_kwargs)
    config = load_config(source, revision, **download)
    if room_for_text(config, len(prefix.token_ids)) < 1:
        raise InputError(
            f"the hard prompt is {len(prefix.token_ids)} tokens long and leaves the model no room for a reply"
        )
    wrap_chat_template(tokenizer, prefix)
    return OpenedPolicy(source, revision, config, tokenizer, prefix, download=download)


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


def open_policy(arguments: HardPromptArguments, prefix_adapter: str | None = None) -> OpenedPolicy:
    """Open what a recipe names: a prefix adapter, or else its model and hard prompt.

    Raises:
        InputError: it names both or neither, or what it names cannot be used.
    """
    if prefix_adapter is None:
        return open_hard_prompt(
            arguments.require("model_name_or_path", "model"),
            read_hard_prompt(arguments),
            arguments.opening_user_message,
            arguments.model_revision,
            cast(dict | None, arguments.chat_template_kwargs),  # its __post_init__ has read a text
        )
    for key in (
        "model_name_or_path",
        "model_revision",
        "hard_prompt",
        "hard_prompt_file",
        "opening_user_message",
        "chat_template_kwargs",
    ):
        if getattr(arguments, key) is not None:
            raise InputError(f"prefix_adapter brings its own {key}: leave {key} out")
    return open_adapter(prefix_adapter)


def encode_beside(
    tokenizer: PreTrainedTokenizerBase,
    prefix: ChatPrefix,
    config: PretrainedConfig,
    contexts: Sequence[Messages],
    max_completion_length: int,
) -> list[list[int]]:
    """Encode contexts that leave room for a completion beside prefix and prompt."""
    room = room_for_text(config, len(prefix.token_ids)) - max_completion_length
    return encode_prompts(tokenizer, prefix, contexts, room)
