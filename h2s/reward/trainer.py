"""One training of a reward model by TRL's `RewardTrainer`: a fold's, the judge's or the run's own."""

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset
from torch.optim import AdamW
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed
from trl import RewardTrainer

from h2s.data.splits import Part
from h2s.errors import RunError
from h2s.prefix.adapter import load_weights, soft_prefix
from h2s.reward.config import RewardModelConfig
from h2s.reward.model import PreferenceCollator, RewardModel, build_reward_model, tokenize_preferences
from h2s.run.checkpoints import LogBeforeSaving, ReadableLog, StopOnSigterm, WholeCheckpoints, checkpoint_to_resume
from h2s.run.folder import logger


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


class PrefixRewardTrainer(WholeCheckpoints, RewardTrainer):
    """TRL's trainer with a learning rate of its own for pooler and head, and the pairs of a conversation together."""

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

        def scored(**texts):
            outputs = model(**texts)
            outputs.logits = outputs.logits[pairs.T.flatten()]  # (2 N, 1), the chosen first, as TRL expects them
            return outputs

        return super().compute_loss(scored, inputs, return_outputs, num_items_in_batch)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with two groups: the prefix, which wants large steps, and pooler and head, which do not.

        By this method, since Trainer takes no optimizer from outside under FSDP.
        """
        args = self.args
        prefix = soft_prefix(self.model)
        head = [p for p in self.model.parameters() if p.requires_grad and p is not prefix]
        self.optimizer = AdamW(
            [{"params": [prefix], "lr": args.learning_rate}, {"params": head, "lr": args.head_learning_rate}],
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )
        return self.optimizer


def train_reward_model(
    source: str,
    num_virtual_tokens: int,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    parts: dict[Part, Dataset],
    args: RewardModelConfig,
    folder: Path,
) -> RewardModel:
    """Train on `parts["train"]`, keep the epoch that is best on `parts["validation"]`.

    Args:
        source: the BERT's folder or Hub name.
        num_virtual_tokens: length of its prefix.
        tokenizer: the BERT's.
        max_tokens: text tokens of a (context, response) pair.
        parts: of a sheet; the test part is not looked at.
        args: the settings; `output_dir` is `folder` instead.
        folder: where checkpoints go; with `args.resume_from_checkpoint` the newest complete one in it is gone on from.

    Returns:
        The model of the best epoch, the same on every process.
    """
    args = copy.copy(args)
    args.output_dir = str(folder)
    set_seed(args.seed)
    model = build_reward_model(source, num_virtual_tokens)
    cuts: Counter[str] = Counter()
    trainer = PrefixRewardTrainer(
        model=model,
        args=args,
        data_collator=PreferenceCollator(tokenizer),
        train_dataset=tokenize_preferences(parts["train"], tokenizer, max_tokens, cuts),
        eval_dataset=tokenize_preferences(parts["validation"], tokenizer, max_tokens, cuts),
        processing_class=tokenizer,
        callbacks=[PrefixGradientCheck(), ReadableLog(), StopOnSigterm(), LogBeforeSaving()],
    )
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(args, folder))
    best = trainer.state.best_model_checkpoint
    if best is not None:
        load_weights(model, best)
        what = args.metric_for_best_model
        logger.info("best epoch by validation %s: %s (%.3f)", what, best, trainer.state.best_metric)
    logger.info("cut to %d tokens: %d contexts, %d responses", max_tokens, cuts["context"], cuts["response"])
    return RewardModel(model, tokenizer, max_tokens)


class PrefixGradientCheck(TrainerCallback):
    """Stops a run whose prefix gets no gradient at the first step, and one whose gradient is no longer a number."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Look before each step: after it a checkpoint might hold what nothing can be learned from."""
        gradient = soft_prefix(model).grad
        if state.global_step == 0 and (gradient is None or not gradient.any()):
            raise RunError("the prefix has no gradient at the first step: only the head would be trained")
        if not all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None):
            raise RunError(f"the gradient of step {state.global_step + 1} is not finite: lower learning_rate")
