"""Stage 1's trainer: TRL's `RewardTrainer` on an encoder with a soft prefix."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from peft import PrefixTuningConfig, TaskType
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from trl import RewardTrainer

from h2s.data.splits import conversations_in
from h2s.errors import InputError, RunError
from h2s.models import check_config, load_tokenizer
from h2s.prefix.adapter import SOFT, load_weights, soft_prefix
from h2s.reward.config import RewardModelConfig
from h2s.reward.encoder import (
    ENCODERS,
    FAMILIES,
    add_reward_prefix,
    check_encoder,
    load_encoder,
    max_text_tokens,
    open_encoder,
    prefix_config,
)
from h2s.reward.model import RewardModel
from h2s.reward.pairs import PreferenceCollator, readable_pairs, tokenize_preferences
from h2s.run.callbacks import LogBeforeSaving
from h2s.run.checkpoints import WholeCheckpoints

logger = logging.getLogger(__name__)


class PrefixGradientCheck(TrainerCallback):
    """Stops a run whose prefix gets no gradient at the first step, and one whose gradient is no longer a number."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Look before each step: after it a checkpoint might hold what nothing can be learned from."""
        gradient = soft_prefix(model).grad
        if state.global_step == 0 and (gradient is None or not gradient.any()):
            raise RunError("the prefix has no gradient at the first step")
        if not all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None):
            raise RunError(f"the gradient of step {state.global_step + 1} is not finite: lower learning_rate")


class ConversationSampler(Sampler[int]):
    """Pairs in a random order of their conversations, those of one conversation together.

    So one step sees all that was judged of a conversation, or neighbouring steps where one ends within it. With its
    pairs strewn over an epoch the model meets the same texts again and again, and learns them by heart (Ouyang et al.
    2022, arXiv 2203.02155, section 3.5).
    """

    def __init__(self, conversations: Sequence[str], seed: int):
        self.rows = pd.Series(range(len(conversations))).groupby(list(conversations), sort=False).agg(list).tolist()
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return sum(map(len, self.rows))

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        for conversation in torch.randperm(len(self.rows), generator=generator).tolist():
            yield from self.rows[conversation]

    def set_epoch(self, epoch: int) -> None:
        """Accelerate's call at the start of each epoch: another order."""
        self.epoch = epoch


def check_pairs(dataset: Any, name: str) -> None:
    """Check that judgements are a data set with `prompt`, `chosen` and `rejected`.

    Raises:
        InputError: they are not.
    """
    columns = dataset.column_names if isinstance(dataset, Dataset) else type(dataset).__name__
    if not isinstance(dataset, Dataset) or not {"prompt", "chosen", "rejected"} <= set(columns):
        raise InputError(
            f"{name} must be a datasets.Dataset with the columns prompt, chosen and rejected, got {columns}; "
            "load_preferences reads judgements"
        )


class RewardModelTrainer(WholeCheckpoints, RewardTrainer):
    """Learns judgements as a reward model: TRL's trainer with a soft prefix on an encoder.

    The prefix has a learning rate of its own, and the pairs of a conversation come together. After `train()`
    `reward_model` holds the epoch that is best by `metric_for_best_model`, or the last where nothing is evaluated.

    ```python
    trainer = RewardModelTrainer(
        model="embedded:minilm",
        args=RewardModelConfig(output_dir="outputs/reward"),
        train_dataset=load_preferences("recipes/sample_data/judgements.xlsx"),
    )
    trainer.train()
    trainer.reward_model.save_pretrained("outputs/reward")
    ```

    Args:
        model: a BERT, ELECTRA, RoBERTa or XLM-R: a folder, a Hub name, `embedded:minilm`, or one with a scalar head
            that is loaded already.
        args: the settings; `RewardModelConfig()` by default.
        train_dataset: judgements with `prompt`, `chosen` and `rejected`, as `load_preferences` gives them; with a
            `margin` (TRL's column) the loss asks for chosen minus rejected minus that.
        eval_dataset: the same, held out; needed where `eval_strategy` is not "no".
        processing_class: the tokenizer of a loaded model; by default the one of the name that it was loaded from.
        peft_config: `PrefixTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=20)` by default.
        callbacks: further Trainer callbacks.

    Raises:
        InputError: the model is none of these, the adapter no prefix, or `max_tokens` does not fit.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        args: RewardModelConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PrefixTuningConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        args = args or RewardModelConfig()
        peft_config = peft_config or prefix_config()
        if not isinstance(peft_config, PrefixTuningConfig) or peft_config.task_type != TaskType.SEQ_CLS:
            raise InputError(f"peft_config must be a PrefixTuningConfig of task SEQ_CLS, got {peft_config!r}")
        check_pairs(train_dataset, "train_dataset")
        if eval_dataset is not None:
            check_pairs(eval_dataset, "eval_dataset")
        virtual = peft_config.num_virtual_tokens
        set_seed(args.seed)
        if isinstance(model, (str, Path)):
            if processing_class is not None:
                raise InputError("processing_class is for a model that is loaded already: leave it out")
            source, tokenizer, max_tokens = open_encoder(str(model), virtual, args.max_tokens)
        else:
            if not isinstance(model, ENCODERS) or model.config.num_labels != 1:
                got = type(model).__name__
                raise InputError(
                    f"model must be a name, or a {FAMILIES} for sequence classification with one label, got a {got}"
                )
            source, tokenizer = model, processing_class or load_tokenizer(model.name_or_path)
            check_config(model.config, model.name_or_path)
            check_encoder(model.config, tokenizer, model.name_or_path)
            max_tokens = max_text_tokens(model.config, tokenizer, virtual, args.max_tokens)
        train_dataset = readable_pairs(train_dataset, tokenizer, max_tokens)
        if eval_dataset is not None:
            eval_dataset = readable_pairs(eval_dataset, tokenizer, max_tokens)
        base = source if isinstance(source, PreTrainedModel) else load_encoder(source)
        peft_model = add_reward_prefix(base, peft_config)
        self.cuts: Counter[str] = Counter()
        parts = [
            None if part is None else tokenize_preferences(part, tokenizer, max_tokens, self.cuts)
            for part in (train_dataset, eval_dataset)
        ]
        super().__init__(
            model=peft_model,
            args=args,
            data_collator=PreferenceCollator(tokenizer),
            train_dataset=parts[0],
            eval_dataset=parts[1],
            processing_class=tokenizer,
            callbacks=[PrefixGradientCheck(), *(callbacks or []), LogBeforeSaving()],
        )
        seen = conversations_in(train_dataset, eval_dataset)
        self.adapter = self.reward_model = RewardModel(peft_model, tokenizer, max_tokens, seen=seen)

    def learnt_from(self, rows: Dataset) -> list[str]:
        """The texts' tokens, and margins."""
        return [name for name in ("chosen_ids", "rejected_ids", "margin") if name in rows.column_names]

    def began_with(self) -> dict[str, Any]:
        """Also the encoder and its prefix."""
        config = self.reward_model.model.peft_config[SOFT]
        base = Path(config.base_model_name_or_path).name  # it may have been moved
        return super().began_with() | {"model": base, "num_virtual_tokens": config.num_virtual_tokens}

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """TRL's metrics of `eval_dataset`, or of judgements that are given, as `train_dataset` is."""
        if isinstance(eval_dataset, Dataset) and eval_dataset is not self.eval_dataset:
            check_pairs(eval_dataset, "eval_dataset")
            reward = self.reward_model
            eval_dataset = tokenize_preferences(eval_dataset, reward.tokenizer, reward.max_tokens, Counter())
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def load_kept(self) -> None:
        """The best epoch's checkpoint, if epochs were evaluated."""
        state, args = self.state, self.args
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
        if state.best_model_checkpoint is None and best.is_dir():  # the run's folder was moved
            state.best_model_checkpoint = str(best)
        if state.best_model_checkpoint is not None:
            load_weights(self.reward_model.model, state.best_model_checkpoint)
            what, kept = args.metric_for_best_model, state.best_model_checkpoint
            logger.info("best epoch by validation %s: %s (%.3f)", what, kept, state.best_metric)
        self.reward_model.model.eval()
        tokens, cuts = self.reward_model.max_tokens, self.cuts
        logger.info("cut to %d tokens: %d contexts, %d responses", tokens, cuts["context"], cuts["response"])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter as `reward_model.save_pretrained` writes it: Trainer's own save has no `h2s.json`."""
        self.reward_model.save_pretrained(output_dir or self.args.output_dir, is_main_process=self.args.should_save)

    def get_train_dataloader(self) -> DataLoader:
        """Batches of pairs in the order of [`ConversationSampler`], the same on every process; each takes its share."""
        args, pairs = self.args, self.train_dataset
        seed = args.seed if args.data_seed is None else args.data_seed
        sampler = ConversationSampler(pairs["conversation"], seed)
        loader = DataLoader(pairs, args.train_batch_size, sampler=sampler, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's pairwise loss, each distinct text of the batch encoded once."""
        pairs = inputs.pop("pairs")  # (N, 2)

        def scored(margin: Any = None, **texts: Any) -> Any:
            outputs = model(**texts)
            outputs.logits = outputs.logits[pairs.T.flatten()]  # (2 N, 1), the chosen first, as TRL expects them
            return outputs

        return super().compute_loss(scored, inputs, return_outputs, num_items_in_batch)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with two groups: the prefix, which wants large steps, and pooler and head, which do not."""
        prefix = soft_prefix(self.model)
        head = [p for p in self.model.parameters() if p.requires_grad and p is not prefix]
        self.optimizer = self.adamw(([prefix], self.args.learning_rate), (head, self.args.head_learning_rate))
        return self.optimizer
