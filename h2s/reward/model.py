"""A reward model: a cross-encoder (BERT or its like) with a soft prefix that scores (context, response) pairs.

Trained by TRL's `RewardTrainer` with the pairwise logistic loss of Bradley and Terry on better minus worse.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import AutoPeftModelForSequenceClassification, PeftModel, TaskType
from transformers import PreTrainedTokenizerBase

from h2s.data.messages import Messages
from h2s.data.splits import UNKNOWN
from h2s.errors import InputError
from h2s.hub import SavedAdapter, adapter_folder, short_name, write_card
from h2s.models import load_config, load_tokenizer
from h2s.prefix.adapter import read_adapter_config
from h2s.prefix.chat_template import H2S_FILE
from h2s.reward.encoder import head_not_in_checkpoint, max_text_tokens
from h2s.reward.pairs import context_text, encode_pair, reply_text
from h2s.run.terminal import progress_bar

CARD_EXAMPLE = """from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

model = AutoPeftModelForSequenceClassification.from_pretrained({source}, num_labels=1)
tokenizer = AutoTokenizer.from_pretrained({source})
model(**tokenizer("the context", "the response", return_tensors="pt")).logits"""


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
            folder_or_hub_id: the adapter: a folder, or a repository `user/name` or `user/name@revision`.
            revision: of the adapter on the Hub.
            device: this process's own by default (Accelerate's `PartialState().device`).
            **download: `token` and `cache_dir`, as transformers has them.

        Raises:
            InputError: it is no reward adapter.
        """
        folder = adapter_folder(folder_or_hub_id, revision, **download)
        config = read_adapter_config(folder, TaskType.SEQ_CLS, **download)
        tokenizer = load_tokenizer(folder)
        with head_not_in_checkpoint():
            model = AutoPeftModelForSequenceClassification.from_pretrained(
                folder, num_labels=1, use_safetensors=True, trust_remote_code=False, **download
            )
        settings = read_settings(folder)
        base = load_config(config.base_model_name_or_path, config.revision, **download)
        max_tokens = max_text_tokens(base, tokenizer, config.num_virtual_tokens, settings["max_tokens"])
        name = short_name(str(folder_or_hub_id))
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
        use = CARD_EXAMPLE.format(source=source)
        title, tags = "A reward model of human judgements", ["reward-model"]
        write_card(folder, title, self.base_model, about, report, use, "text-classification", tags)

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
