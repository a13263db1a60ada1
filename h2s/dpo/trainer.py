"""DPO on a soft prefix: TRL's `DPOTrainer`, whose reference is the hard prompt."""

import copy
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import DPOTrainer

from h2s.data.datasets import each_context_once
from h2s.data.splits import conversations_in
from h2s.dpo.config import PrefixDPOConfig
from h2s.dpo.pairs import ImplicitReward, as_trl_has_it, check_run
from h2s.prefix.adapter import fill_with_tokens, load_weights, soft_prefix
from h2s.prefix.generation import Sampling
from h2s.prefix.policy_model import PrefixTuningPolicyModel
from h2s.prefix.to_train import began_as, policy_to_train
from h2s.report.soft_vs_hard import soft_vs_hard
from h2s.reward.functions import RewardFunctions
from h2s.reward.trainer import PrefixGradientCheck
from h2s.run.callbacks import ChooseAnewElsewhere, EvaluateLastStep, LogBeforeSaving
from h2s.run.checkpoints import WholeCheckpoints

REFERENCE = "ref"  # TRL's name
HARD_PROMPT_LOSS = math.log(2)  # it prefers neither reply to itself


class PrefixDPOTrainer(WholeCheckpoints, DPOTrainer):
    """Moves a soft prefix straight toward what people preferred, with no reward between (Rafailov et al. 2023).

    ```python
    trainer = PrefixDPOTrainer(
        model=PrefixTuningPolicyModel.from_hard_prompt("embedded:gemma-3-270m", "You keep a conversation going."),
        args=PrefixDPOConfig(output_dir="outputs/dpo", max_steps=4),
        train_dataset=load_preferences("recipes/sample_data/judgements.xlsx"),
    )
    trainer.train()
    ```

    After `train()` the policy holds the step whose loss on `eval_dataset` is least, or the last where nothing is
    evaluated; `kept_step()` names it. It lies at the root of `args.output_dir` at any time.

    Args:
        model: the policy, or the folder or Hub name of its adapter. The hard prompt is its reference.
        args: the settings; `PrefixDPOConfig()` by default.
        train_dataset: judgements with `prompt`, `chosen` and `rejected`, as `load_preferences` gives them.
        eval_dataset: the same, held out; needed where `eval_strategy` is not "no".
        processing_class: the policy's own tokenizer, which is the default; no other one can be used.
        callbacks: further Trainer callbacks.
        peft_config: refused, with the reason.

    Attributes:
        policy: the `PrefixTuningPolicyModel` that is trained.

    Raises:
        InputError: something of the above cannot be used.
    """

    check = staticmethod(check_run)  # before weights load, if the caller has them still to load

    def __init__(
        self,
        model: PrefixTuningPolicyModel | str | Path,
        args: PrefixDPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any = None,
    ):
        args = copy.copy(args) if args is not None else PrefixDPOConfig()
        self.policy = self.adapter = policy = policy_to_train(model, processing_class, peft_config, args.device)
        check_run(args, policy, train_dataset, eval_dataset)
        train_dataset, eval_dataset = as_trl_has_it(train_dataset), as_trl_has_it(eval_dataset)
        if REFERENCE in policy.model.peft_config:  # of another trainer
            policy.model.delete_adapter(REFERENCE)
        with warnings.catch_warnings():
            # PEFT's on a name that is a part of its own; nothing of this name is loaded.
            warnings.filterwarnings("ignore", f"Adapter name '{REFERENCE}' should not be")
            super().__init__(
                model=policy.model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=policy.tokenizer,
                callbacks=[
                    PrefixGradientCheck(),
                    *(callbacks or []),
                    ChooseAnewElsewhere(),
                    EvaluateLastStep(),
                    LogBeforeSaving(),
                ],
            )
        # TRL copies the prefix as it is, which may be trained already, and leaves the copy trainable.
        policy.model.prompt_encoder[REFERENCE].requires_grad_(False)
        fill_with_tokens(policy.model, policy.prefix.token_ids, REFERENCE)
        policy.prefix = policy.prefix.having_seen(conversations_in(train_dataset, eval_dataset))

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW on the prefix."""
        self.optimizer = self.adamw(([soft_prefix(self.policy.model)], self.args.learning_rate))
        return self.optimizer

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """TRL's metrics, also of other judgements; in training the prefix is kept if its loss is the least so far."""
        if isinstance(eval_dataset, Dataset) and eval_dataset is not self.eval_dataset:
            check_run(self.args, self.policy, eval_dataset)
            eval_dataset = as_trl_has_it(eval_dataset)
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self.keep_if_best(metrics)
        return metrics

    @property
    def implicit_reward(self) -> ImplicitReward:
        """What the prefix, as it is then, prefers beside its hard prompt."""
        return ImplicitReward(self.policy, self.args.beta, self.args.per_device_eval_batch_size)

    def compare(self, pairs: Dataset, scorers: Mapping[str, RewardFunctions]) -> pd.DataFrame:
        """Soft against hard on the contexts of judgements, each once: the table of `soft_vs_hard`."""
        args = self.args
        sampling = Sampling(args.max_completion_length, args.temperature)
        contexts, size = each_context_once(pairs), args.per_device_eval_batch_size
        return soft_vs_hard(self.policy, contexts, scorers, sampling, size, args.seed, progress=not args.disable_tqdm)

    def learnt_from(self, rows: Dataset) -> list[str]:
        """The tokens."""
        return ["prompt_ids", "chosen_ids", "rejected_ids"]

    def began_with(self) -> dict[str, Any]:
        """Also the prompt, and what the loss is."""
        return super().began_with() | began_as(self.policy) | {"beta": self.args.beta}

    def kept_step(self) -> str:
        """Which step is kept and what chose it, in words; "best" is one that beat the hard prompt on what selects."""
        state = self.state
        if state.best_global_step is None:
            return f"Step {state.global_step} of {state.max_steps}, the last, is kept: none was evaluated."
        step = f"{state.best_global_step} of {state.max_steps}"
        by = f"the loss on {len(self.eval_dataset)} pairs, {state.best_metric:.4f} (the hard prompt's: ln 2 = 0.6931)"
        if state.best_metric < HARD_PROMPT_LOSS:
            return f"Step {step} is kept, the best one by {by}."
        return f"No step beat the hard prompt by {by}: step {step}, which came nearest, is kept."

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter as `policy.save_pretrained` writes it."""
        self.policy.save_pretrained(output_dir or self.args.output_dir, is_main_process=self.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """The counterpart of `save_model`."""
        load_weights(self.policy.model, resume_from_checkpoint)

    def load_kept(self) -> None:
        """That of the run's root; the model is left as it answers."""
        super().load_kept()
        self.policy.model.eval()
