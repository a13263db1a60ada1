"""One training of a reward model by TRL's `RewardTrainer`: a fold's, the judge's or the run's own."""

import copy
from collections import Counter
from pathlib import Path

import torch
from datasets import Dataset
from torch.optim import AdamW
from transformers import PreTrainedTokenizerBase, set_seed
from trl import RewardTrainer

from h2s.callbacks import DropPickledArguments, PrefixGradientCheck, ReadableLog, SelectByAccuracy
from h2s.contexts import Part
from h2s.prefix import load_weights, soft_prefix
from h2s.reward_model import (
    PreferenceCollator,
    RewardModel,
    RewardModelConfig,
    build_reward_model,
    tokenize_preferences,
)
from h2s.run_folder import logger, newest_checkpoint


class PrefixRewardTrainer(RewardTrainer):
    """TRL's trainer with a learning rate of its own for pooler and head."""

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
        callbacks=[PrefixGradientCheck(), SelectByAccuracy(), ReadableLog(), DropPickledArguments()],
    )
    trainer.train(resume_from_checkpoint=newest_checkpoint(folder) if args.resume_from_checkpoint else None)
    best = trainer.state.best_model_checkpoint
    if best is not None:
        load_weights(model, best)
        logger.info("best epoch by validation accuracy: %s (%.3f; ties by loss)", best, trainer.state.best_metric)
    logger.info("cut to %d tokens: %d contexts, %d responses", max_tokens, cuts["context"], cuts["response"])
    return RewardModel(model, tokenizer, max_tokens)
