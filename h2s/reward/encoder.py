"""The encoder that becomes a reward model: its family, the room beside its prefix, and what of it is trained."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    ElectraForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaForSequenceClassification,
    XLMRobertaForSequenceClassification,
)
from transformers import logging as transformers_logging

from h2s.errors import InputError, in_short
from h2s.models import LOADING_ERRORS, load_config, load_tokenizer, model_source
from h2s.prefix.adapter import soft_prefix

# What was shown to learn with a prefix; others may run and be wrong.
ENCODERS = (
    BertForSequenceClassification,
    ElectraForSequenceClassification,
    RobertaForSequenceClassification,
    XLMRobertaForSequenceClassification,
)
FAMILIES = "BERT, ELECTRA, RoBERTa or XLM-R"
# The ones that a prefix cannot reach: their layers take no keys and values but their own.
NO_PAST = (
    "albert",
    "deberta",
    "deberta-v2",
    "distilbert",
    "eurobert",
    "longformer",
    "modernbert",
    "mpnet",
    "nomic_bert",
)
# Their positions are counted from the one after padding's id: of 514 a text can take 512.
COUNTED_FROM_PADDING = ("roberta", "xlm-roberta")
# Keys near zero: the prefix begins as a faint, even share of the attention instead of random loud tokens.
PREFIX_INIT_STD = 0.1


@contextmanager
def head_not_in_checkpoint() -> Iterator[None]:
    """Silences the warning that the scalar head is new: it is about to be trained, or loaded from the adapter."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def open_encoder(
    name: str, num_virtual_tokens: int, max_tokens: int | None = None
) -> tuple[str, PreTrainedTokenizerBase, int]:
    """The source, tokenizer and text tokens of an encoder that is to become a reward model; no weights.

    Args:
        name: a folder, a Hub name or `embedded:minilm`.
        num_virtual_tokens: length of its prefix.
        max_tokens: text tokens wanted; all that fit by default.

    Raises:
        InputError: it cannot take the prefix or the text.
    """
    source = model_source(name)
    tokenizer, config = load_tokenizer(source), load_config(source)
    check_encoder(config, tokenizer, name)
    return source, tokenizer, max_text_tokens(config, tokenizer, num_virtual_tokens, max_tokens)


def max_text_tokens(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, num_virtual_tokens: int, max_tokens: int | None
) -> int:
    """How many text tokens fit beside the prefix; `max_tokens` if given.

    Raises:
        InputError: `max_tokens` is more than fits, or too few to hold any text.
    """
    positions = config.max_position_embeddings
    if config.model_type in COUNTED_FROM_PADDING:
        positions -= config.pad_token_id + 1
    room = positions - num_virtual_tokens
    fewest = tokenizer.num_special_tokens_to_add(pair=True) + 2
    limit = room if max_tokens is None else max_tokens
    if not fewest <= limit <= room:
        raise InputError(
            f"max_tokens must lie between {fewest} and {room} ({positions} positions "
            f"minus {num_virtual_tokens} virtual tokens), got {limit}"
        )
    return limit


def check_encoder(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Check that a reward model's encoder is of a family that was shown: absolute positions, [CLS] and [SEP].

    Raises:
        InputError: it is something else.
    """
    kind = config.model_type
    if kind not in [encoder.config_class.model_type for encoder in ENCODERS]:
        why = ", which takes no past key values (PEFT's way to hand a prefix over)" if kind in NO_PAST else ""
        raise InputError(f"{source} is a {kind} model{why}: the reward model must be a {FAMILIES}")
    if config.is_decoder:
        raise InputError(f"the config.json of {source} sets is_decoder: [CLS] would read none of the text behind it")
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise InputError(f"the tokenizer of {source} lacks a cls_token or a sep_token: take the encoder's own")
    if kind in COUNTED_FROM_PADDING and tokenizer.pad_token_id != config.pad_token_id:
        ids = f"{tokenizer.pad_token_id} to its tokenizer and {config.pad_token_id} to its configuration"
        raise InputError(f"the padding of {source} is {ids}: a {kind} model counts its positions from it")


def load_encoder(source: str) -> PreTrainedModel:
    """An encoder with a new scalar head, float32.

    Raises:
        InputError: it cannot be loaded.
    """
    try:
        with head_not_in_checkpoint():
            return AutoModelForSequenceClassification.from_pretrained(
                source, num_labels=1, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            )
    except LOADING_ERRORS as error:
        cause = in_short(error)
        raise InputError(f"no sequence classification model can be loaded from {source}: {cause}") from error


def prefix_config(num_virtual_tokens: int = 20) -> PrefixTuningConfig:
    """A reward model's prefix as PEFT describes it."""
    return PrefixTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=num_virtual_tokens)


def add_reward_prefix(base: PreTrainedModel, config: PrefixTuningConfig) -> PeftModel:
    """Wrap an encoder with a random trainable prefix; else only pooler, head and the last layer's query are trained."""
    config = copy.copy(config)
    # BERT's pooler stands between [CLS] and the head; the one it comes with was trained for something else. The others
    # have such a layer within their head, which PEFT trains anyway.
    query = f"encoder.layer.{base.config.num_hidden_layers - 1}.attention.self.query"
    config.modules_to_save = ["pooler", query]
    model = get_peft_model(base, config)
    with torch.no_grad():
        soft_prefix(model).mul_(PREFIX_INIT_STD)  # PEFT draws it with a standard deviation of 1
        # With a query of zero [CLS] attends to all tokens alike: it begins as their mean, and learns where to look.
        for parameter in base.base_model.get_submodule(query).modules_to_save.parameters():
            parameter.zero_()
    return model
