"""Stage 1: a BERT cross-encoder with a soft prefix that scores (context, response) pairs.

Trained by TRL's `RewardTrainer` with the pairwise logistic loss of Bradley and Terry on better minus worse. Input:
`[CLS] context [SEP] response [SEP]`, the context its messages' contents joined by newlines.
"""

import copy
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification, PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    BatchEncoding,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import logging as transformers_logging

from h2s.data.messages import Messages, as_messages, conversation_id
from h2s.data.splits import UNKNOWN
from h2s.errors import InputError, in_short
from h2s.hub import SavedAdapter, adapter_folder, write_card
from h2s.models import LOADING_ERRORS, load_config, load_tokenizer, model_source
from h2s.prefix.adapter import SOFT, read_adapter_config, soft_prefix
from h2s.prefix.chat_template import H2S_FILE
from h2s.run.terminal import progress_bar

logger = logging.getLogger(__name__)

CARD_EXAMPLE = """from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

model = AutoPeftModelForSequenceClassification.from_pretrained({source}, num_labels=1)
tokenizer = AutoTokenizer.from_pretrained({source})
model(**tokenizer("the context", "the response", return_tensors="pt")).logits"""


# Of what an encoder cannot read or tell apart: with more than this share nothing is learnt.
NEARLY_ALL = 0.9
# Keys near zero: the prefix begins as a faint, even share of the attention instead of random loud tokens.
PREFIX_INIT_STD = 0.1


@contextmanager
def _head_not_in_checkpoint() -> Iterator[None]:
    """Silences the warning that the scalar head is new: it is about to be trained, or loaded from the adapter."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def context_text(context: str | Messages) -> str:
    """A context as the reward model reads it: its messages' contents joined by newlines."""
    return context if isinstance(context, str) else "\n".join(m["content"] for m in context)


def reply_text(reply: str | Messages) -> str:
    """A reply as text; TRL's is a list of one message."""
    return reply if isinstance(reply, str) else reply[-1]["content"]


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, context: str, response: str, max_tokens: int, cuts: Counter | None = None
) -> BatchEncoding:
    """The tokenizer's own encoding of a pair, `[CLS] context [SEP] response [SEP]`, in at most `max_tokens` tokens.

    When too long the context is cut from its beginning, and only then the response from its end; `cuts` counts both
    under "context" and "response". Special tokens spelled out in a text stay text.

    Returns:
        `input_ids`, `token_type_ids` (0 up to the first [SEP], 1 after it) and `attention_mask`, lists of one length.
    """
    # Not cut by the tokenizer: it would keep the side and the length, and save them as its own.
    whole = tokenizer(context, response, split_special_tokens=True, verbose=False)
    sides = whole.sequence_ids()  # 0, 1, or None of a special token
    of_context, of_response = ([i for i, s in enumerate(sides) if s == side] for side in (0, 1))
    over = max(len(sides) - max_tokens, 0)
    over_response = max(over - len(of_context), 0)
    cut = {*of_context[:over], *of_response[len(of_response) - over_response :]}
    if cuts is not None:
        cuts["context"] += bool(of_context) and over > 0
        cuts["response"] += over_response > 0
    return BatchEncoding({name: [v for i, v in enumerate(row) if i not in cut] for name, row in whole.items()})


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
    room = config.max_position_embeddings - num_virtual_tokens
    fewest = tokenizer.num_special_tokens_to_add(pair=True) + 2
    limit = room if max_tokens is None else max_tokens
    if not fewest <= limit <= room:
        raise InputError(
            f"max_tokens must lie between {fewest} and {room} ({config.max_position_embeddings} positions "
            f"minus {num_virtual_tokens} virtual tokens), got {limit}"
        )
    return limit


def check_encoder(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Check that a reward model's encoder is a BERT: absolute positions, [CLS] and [SEP].

    Raises:
        InputError: it is something else.
    """
    if config.model_type != "bert" or tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise InputError(f"{source} is a {config.model_type} model: the reward model must be a BERT")


def load_encoder(source: str) -> PreTrainedModel:
    """An encoder with a new scalar head, float32.

    Raises:
        InputError: it cannot be loaded.
    """
    try:
        with _head_not_in_checkpoint():
            return AutoModelForSequenceClassification.from_pretrained(
                source, num_labels=1, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            )
    except LOADING_ERRORS as error:
        cause = in_short(error)
        raise InputError(f"no sequence classification model can be loaded from {source}: {cause}") from error


def add_reward_prefix(base: PreTrainedModel, config: PrefixTuningConfig) -> PeftModel:
    """Wrap an encoder with a random trainable prefix; else only pooler, head and the last layer's query are trained."""
    config = copy.copy(config)
    # The pooler stands between [CLS] and the head; the one an encoder comes with was trained for something else.
    query = f"encoder.layer.{base.config.num_hidden_layers - 1}.attention.self.query"
    config.modules_to_save = ["pooler", query]
    model = get_peft_model(base, config)
    with torch.no_grad():
        soft_prefix(model).mul_(PREFIX_INIT_STD)  # PEFT draws it with a standard deviation of 1
        # With a query of zero [CLS] attends to all tokens alike: it begins as their mean, and learns where to look.
        for parameter in model.get_submodule(f"base_model.bert.{query}").modules_to_save.parameters():
            parameter.zero_()
    return model


def tokenize_preferences(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_tokens: int, cuts: Counter
) -> Dataset:
    """`chosen_ids`, `rejected_ids`, their `…_type_ids` and `conversation`: what trainer and collator use of pairs.

    `cuts` counts as in [`encode_pair`], but a pair's context once.
    """
    rows = []
    for row in dataset:
        text = context_text(row["prompt"])
        encoded: dict[str, Any] = {"conversation": conversation_id(as_messages(row["prompt"]))}
        cut: Counter[str] = Counter()
        for side in ("chosen", "rejected"):
            pair = encode_pair(tokenizer, text, reply_text(row[side]), max_tokens, cut)
            encoded |= {f"{side}_ids": pair["input_ids"], f"{side}_type_ids": pair["token_type_ids"]}
        cuts["context"] += cut["context"] > 0
        cuts["response"] += cut["response"]
        rows.append(encoded)
    return Dataset.from_list(rows)


def readable_pairs(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Dataset:
    """The pairs whose two responses the encoder tells apart; what it cannot is counted and logged.

    Raises:
        InputError: it is nearly all: the vocabulary lacks the language, or `max_tokens` cuts what differs.
    """
    unknown = tokens = 0
    apart = []
    for number, row in enumerate(dataset):
        text = context_text(row["prompt"])
        sides = [
            encode_pair(tokenizer, text, reply_text(row[s]), max_tokens)["input_ids"] for s in ("chosen", "rejected")
        ]
        for ids in sides:
            unknown += ids.count(tokenizer.unk_token_id)
            tokens += len(ids) - tokenizer.num_special_tokens_to_add(pair=True)
        if sides[0] != sides[1]:
            apart.append(number)
    share = unknown / max(tokens, 1)
    if share > NEARLY_ALL:
        raise InputError(
            f"the encoder reads {share:.0%} of the texts' tokens as {tokenizer.unk_token} (unknown): its vocabulary "
            "lacks this language; choose another reward_model_name_or_path (google-bert/bert-base-chinese, say)"
        )
    alike = len(dataset) - len(apart)
    if alike > NEARLY_ALL * len(dataset):
        raise InputError(
            f"{alike} of {len(dataset)} pairs read alike to the encoder: their responses are the same, or differ only "
            f"beyond max_tokens {max_tokens} or in what its vocabulary lacks; raise max_tokens or take another encoder"
        )
    if share >= 0.001:
        logger.info("the encoder reads %.1f%% of the tokens as %s (unknown)", 100 * share, tokenizer.unk_token)
    if alike:
        what = "%d of %d pairs read alike to the encoder (the same responses, or cut to %d tokens): set aside"
        logger.warning(what, alike, len(dataset), max_tokens)
    return dataset.select(apart) if alike else dataset


@dataclass
class PreferenceCollator:
    """Pads the distinct texts of some pairs; judgements of one conversation share many of them."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, rows: Sequence[dict[str, Any]]) -> BatchEncoding:
        """M padded texts from N pairs, and `pairs`, shape (N, 2): which of them are a pair's chosen and rejected."""
        pairs = [[(tuple(r[f"{s}_ids"]), tuple(r[f"{s}_type_ids"])) for s in ("chosen", "rejected")] for r in rows]
        places = {text: place for place, text in enumerate(dict.fromkeys(text for pair in pairs for text in pair))}
        features = [{"input_ids": list(ids), "token_type_ids": list(types)} for ids, types in places]
        # First, since Trainer takes the batch's size from what comes first: it shall count pairs.
        indices = {"pairs": torch.tensor([[places[text] for text in pair] for pair in pairs])}
        return BatchEncoding(indices | self.tokenizer.pad(features, return_tensors="pt").data)


def read_settings(folder: str | Path) -> dict[str, Any]:
    """A reward adapter's `h2s.json`: `max_tokens`, None where it sets no limit, and `seen`.

    Raises:
        InputError: it is not one.
    """
    file = Path(folder) / H2S_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        settings = {"max_tokens": None, "seen": [UNKNOWN]} | content
        if not isinstance(settings["max_tokens"], int | None) or not isinstance(settings["seen"], list):
            raise TypeError
        if not all(isinstance(conversation, str) for conversation in settings["seen"]):
            raise TypeError
        return settings
    except (ValueError, TypeError, RecursionError):
        raise InputError(f"{file} does not describe a reward adapter") from None


class RewardModel(SavedAdapter):
    """A trained reward model: score(context, response) -> one number, many pairs at once.

    ```python
    reward = RewardModel.from_pretrained("outputs/embedded-reward")
    reward.score([[{"role": "user", "content": "I ran."}]], ["How far did you run?"])  # shape (1,)
    ```

    Calling it follows TRL's reward-function signature, so it is one of `reward_funcs`.

    Attributes:
        model: the plain PEFT model.
        tokenizer: the plain transformers tokenizer.
        max_tokens: text tokens of a context and its response.
        cuts: how many contexts and responses were cut to that.
        seen: ids of the conversations that trained or selected it.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        batch_size: int = 64,
        name: str = "reward_model",
        seen: Iterable[str] = (),
    ):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.batch_size = batch_size
        self.cuts: Counter = Counter()
        self.seen = list(seen)
        self.__name__ = name  # what logs call it

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | Path,
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
        **download: Any,
    ) -> "RewardModel":
        """Load an adapter made by `train_reward.py` or [`RewardModelTrainer`].

        Args:
            folder_or_hub_id: the adapter.
            revision: of the adapter on the Hub.
            device: this process's own by default (Accelerate's `PartialState().device`).
            **download: `token` and `cache_dir`, as transformers has them.

        Raises:
            InputError: it is no reward adapter.
        """
        folder = adapter_folder(folder_or_hub_id, revision, **download)
        config = read_adapter_config(folder, TaskType.SEQ_CLS, **download)
        tokenizer = load_tokenizer(folder)
        with _head_not_in_checkpoint():
            model = AutoPeftModelForSequenceClassification.from_pretrained(
                folder, num_labels=1, use_safetensors=True, trust_remote_code=False, **download
            )
        settings = read_settings(folder)
        base = load_config(config.base_model_name_or_path, **download)
        max_tokens = max_text_tokens(base, tokenizer, config.num_virtual_tokens, settings["max_tokens"])
        name = Path(str(folder_or_hub_id)).name
        model = model.to(device or PartialState().device)
        return cls(model, tokenizer, max_tokens, name=name, seen=settings["seen"])

    def _save_files(self, folder: str | Path, is_main_process: bool = True) -> None:
        self.model.save_pretrained(folder, is_main_process=is_main_process)
        if not is_main_process:
            return
        self.tokenizer.save_pretrained(folder)
        text = json.dumps({"max_tokens": self.max_tokens, "seen": self.seen}, indent=2)
        (Path(folder) / H2S_FILE).write_text(text + "\n", encoding="utf-8")

    def _write_card(self, folder: Path, report: str, source: str) -> None:
        about = (
            "Scores a response to a context, the context being its messages' contents joined by newlines; trained on "
            "human A/B judgements with the pairwise logistic loss."
        )
        base = self.model.peft_config[SOFT].base_model_name_or_path
        use = CARD_EXAMPLE.format(source=source)
        title, tags = "A reward model of human judgements", ["reward-model"]
        write_card(folder, title, base, about, report, use, "text-classification", tags)

    @torch.no_grad()
    def score(
        self, contexts: Sequence[str | Messages], responses: Sequence[str | Messages], progress: str | None = None
    ) -> torch.Tensor:
        """Score pairs in batches of similar length.

        Args:
            contexts: N conversations, each a list of messages or text.
            responses: N replies, one a conversation, each text or a list of one message.
            progress: the label of a progress bar; none if None.

        Returns:
            Rewards, shape (N,), float32, on the CPU.
        """
        rows = [
            encode_pair(self.tokenizer, context_text(c), reply_text(r), self.max_tokens, self.cuts)
            for c, r in zip(contexts, responses, strict=True)
        ]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
        rewards = torch.empty(len(rows))
        starts = range(0, len(order), self.batch_size)
        for start in progress_bar(starts, progress):
            chunk = order[start : start + self.batch_size]
            batch = self.tokenizer.pad([rows[i] for i in chunk], return_tensors="pt").to(self.model.device)
            rewards[chunk] = self.model(**batch).logits.squeeze(-1).float().cpu()
        return rewards

    def __call__(self, prompts: Sequence[Messages], completions: Sequence[Messages], **kwargs: Any) -> list[float]:
        """TRL's reward-function signature around [`score`]."""
        return self.score(prompts, completions).tolist()
