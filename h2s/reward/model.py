"""Stage 1: a BERT cross-encoder with a soft prefix that scores (context, response) pairs.

Trained by TRL's `RewardTrainer` with the pairwise logistic loss of Bradley and Terry on better minus worse. Input:
`[CLS] context [SEP] response [SEP]`, the context its messages' contents joined by newlines.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification, PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, BatchEncoding, PretrainedConfig, PreTrainedTokenizerBase
from transformers import logging as transformers_logging

from h2s.data.messages import Messages
from h2s.errors import InputError
from h2s.hub import adapter_folder
from h2s.models import load_config, load_tokenizer
from h2s.prefix.adapter import read_adapter_config, soft_prefix
from h2s.prefix.chat_template import H2S_FILE

SPECIAL_TOKENS = 3  # [CLS], [SEP], [SEP]


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


def context_text(messages: Messages) -> str:
    """A context as the reward model reads it."""
    return "\n".join(m["content"] for m in messages)


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, context: str, response: str, max_tokens: int, cuts: Counter | None = None
) -> dict[str, list[int]]:
    """`[CLS] context [SEP] response [SEP]` in at most `max_tokens` tokens.

    When too long the context is cut from its beginning, and only then the response from its end; `cuts` counts both
    under "context" and "response". Special tokens spelled out in a text stay text.

    Returns:
        `input_ids` and `token_type_ids` (0 up to the first [SEP], 1 after it), each a list of the same length.
    """
    head = tokenizer(context, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
    tail = tokenizer(response, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
    room = max_tokens - SPECIAL_TOKENS
    if cuts is not None:
        cuts["context"] += bool(head) and len(head) + len(tail) > room
        cuts["response"] += len(tail) > room
    tail = tail[:room]
    head = head[max(0, len(head) - (room - len(tail))) :]
    first = [tokenizer.cls_token_id, *head, tokenizer.sep_token_id]
    second = [*tail, tokenizer.sep_token_id]
    return {"input_ids": first + second, "token_type_ids": [0] * len(first) + [1] * len(second)}


def max_text_tokens(config: PretrainedConfig, num_virtual_tokens: int, max_tokens: int | None) -> int:
    """How many text tokens fit beside the prefix; `max_tokens` if given.

    Raises:
        InputError: `max_tokens` is more than fits, or too few to hold any text.
    """
    room = config.max_position_embeddings - num_virtual_tokens
    limit = room if max_tokens is None else max_tokens
    if not SPECIAL_TOKENS + 2 <= limit <= room:
        raise InputError(
            f"max_tokens must lie between {SPECIAL_TOKENS + 2} and {room} ({config.max_position_embeddings} positions "
            f"minus {num_virtual_tokens} virtual tokens), got {limit}"
        )
    return limit


def check_encoder(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """A reward model is a BERT: absolute positions, [CLS] and [SEP].

    Raises:
        InputError: it is something else.
    """
    if config.model_type != "bert" or tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise InputError(f"{source} is a {config.model_type} model: the reward model must be a BERT")


def build_reward_model(source: str, num_virtual_tokens: int) -> PeftModel:
    """A BERT with a scalar head and a random trainable prefix; else only pooler and the last layer's query are trained.

    Raises:
        InputError: the model cannot be loaded.
    """
    try:
        with _head_not_in_checkpoint():
            base = AutoModelForSequenceClassification.from_pretrained(
                source, num_labels=1, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"no sequence classification model can be loaded from {source}: {error}") from error
    # The pooler stands between [CLS] and the head; the one an encoder comes with was trained for something else.
    query = f"encoder.layer.{base.config.num_hidden_layers - 1}.attention.self.query"
    config = PrefixTuningConfig(
        task_type=TaskType.SEQ_CLS, num_virtual_tokens=num_virtual_tokens, modules_to_save=["pooler", query]
    )
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
    """`chosen_ids`, `rejected_ids`, their `…_type_ids` and `conversation`: what trainer and collator use.

    `cuts` counts as in [`encode_pair`], but a pair's context once.
    """
    rows = []
    for row in dataset:
        text = context_text(row["prompt"])
        encoded: dict[str, Any] = {"conversation": row["conversation"]}
        cut: Counter[str] = Counter()
        for side in ("chosen", "rejected"):
            pair = encode_pair(tokenizer, text, row[side], max_tokens, cut)
            encoded |= {f"{side}_ids": pair["input_ids"], f"{side}_type_ids": pair["token_type_ids"]}
        cuts["context"] += cut["context"] > 0
        cuts["response"] += cut["response"]
        rows.append(encoded)
    return Dataset.from_list(rows)


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


def scorer_adapters(reward: str | None, judge: str | None) -> dict[str, str]:
    """The folders of the reward and judge adapters that are given, by `reward` and `judge`.

    Raises:
        InputError: one is not a reward adapter, or the judge is the reward.
    """
    folders = {name: adapter_folder(a) for name, a in (("reward", reward), ("judge", judge)) if a is not None}
    for folder in folders.values():
        read_adapter_config(folder, TaskType.SEQ_CLS)
    if len(set(folders.values())) < len(folders):
        raise InputError(
            f"judge_adapter and reward_adapter are the same, {reward}: a judge is a model that the policy was not "
            "trained on; train_reward.py --judge_share makes one"
        )
    return folders


class RewardModel:
    """A trained reward model: score(context, response) -> one number, many pairs at once.

    Calling it follows TRL's reward-function signature.
    """

    def __init__(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int, batch_size: int = 64):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.batch_size = batch_size
        self.cuts: Counter = Counter()

    @classmethod
    def from_pretrained(cls, folder: str, device: str | torch.device = "cpu") -> "RewardModel":
        """Load an adapter made by `train_reward.py`.

        Raises:
            InputError: the folder holds no reward adapter.
        """
        folder = adapter_folder(folder)
        config = read_adapter_config(folder, TaskType.SEQ_CLS)
        tokenizer = load_tokenizer(folder)
        with _head_not_in_checkpoint():
            model = AutoPeftModelForSequenceClassification.from_pretrained(
                folder, num_labels=1, use_safetensors=True, trust_remote_code=False
            )
        file = Path(folder) / H2S_FILE
        limit = json.loads(file.read_text(encoding="utf-8")).get("max_tokens") if file.is_file() else None
        max_tokens = max_text_tokens(load_config(config.base_model_name_or_path), config.num_virtual_tokens, limit)
        return cls(model.to(device), tokenizer, max_tokens)

    def save(self, folder: str | Path) -> None:
        """Write adapter, tokenizer and `h2s.json`."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        text = json.dumps({"max_tokens": self.max_tokens}, indent=2)
        (Path(folder) / H2S_FILE).write_text(text + "\n", encoding="utf-8")

    @torch.no_grad()
    def score(
        self, contexts: Sequence[Messages], responses: Sequence[str], progress: str | None = None
    ) -> torch.Tensor:
        """Score pairs in batches of similar length.

        Args:
            contexts: N conversations.
            responses: N replies, one a conversation.
            progress: the label of a progress bar; none if None.

        Returns:
            Rewards, shape (N,), float32, on the CPU.
        """
        rows = [
            encode_pair(self.tokenizer, context_text(c), r, self.max_tokens, self.cuts)
            for c, r in zip(contexts, responses, strict=True)
        ]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
        rewards = torch.empty(len(rows))
        starts = range(0, len(order), self.batch_size)
        for start in tqdm(starts, desc=progress, disable=progress is None, leave=False):
            chunk = order[start : start + self.batch_size]
            batch = self.tokenizer.pad([rows[i] for i in chunk], return_tensors="pt").to(self.model.device)
            rewards[chunk] = self.model(**batch).logits.squeeze(-1).float().cpu()
        return rewards

    def __call__(self, prompts: Sequence[Messages], completions: Sequence[Messages], **kwargs: Any) -> list[float]:
        """TRL's reward-function signature around [`score`]; a completion is a list of one message."""
        return self.score(prompts, [completion[0]["content"] for completion in completions]).tolist()
