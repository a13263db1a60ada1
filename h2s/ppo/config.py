"""The settings of stage 2."""

import os
from dataclasses import dataclass, field

import torch
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments

from h2s.errors import InputError
from h2s.run.settings import (
    NO_EFFECT,
    check_reports,
    check_schedule,
    check_settings,
    refuse_fp16,
    refuse_mixed_precision,
)

# Settings of Trainer that keep their default in this stage alone, and why.
REFUSED = {
    "dataloader_drop_last": "iterations are of one size, what an epoch leaves over may come in the next; leave it out",
    **dict.fromkeys(
        ("eval_accumulation_steps", "include_num_input_tokens_seen", "prediction_loss_only", "torch_empty_cache_steps"),
        NO_EFFECT,
    ),
}


@dataclass
class SingleStepPPOConfig(TrainingArguments):
    """Settings of [`SingleStepPPOTrainer`]: transformers' `TrainingArguments` and what PPO adds.

    ```python
    SingleStepPPOConfig(output_dir="outputs/ppo", max_steps=16, max_completion_length=32, kl_coef=0.05)
    ```

    One step is one PPO iteration: sample, score, update. `per_device_train_batch_size` is the number of contexts in an
    iteration on one device, each answered `num_generations` times; `max_steps`, `logging_steps`, `eval_steps` and
    `save_steps` count iterations.

    Defaults that differ from transformers': `output_dir` outputs, `per_device_train_batch_size` 16,
    `per_device_eval_batch_size` 16, `learning_rate` 1e-2, `adam_epsilon` 1e-5, `lr_scheduler_type` constant,
    `weight_decay` 0 (decay pulls the prefix to zero keys, not to the hard prompt), `report_to` tensorboard,
    `eval_steps` 10, `save_steps` 10, `save_total_limit` 2, `logging_steps` 1,
    `logging_nan_inf_filter` False, `metric_for_best_model` judge_difference (without a judge reward_difference),
    `greater_is_better` True, `dataloader_drop_last` True,
    `remove_unused_columns` False, `resume_from_checkpoint` a bool, `ddp_find_unused_parameters` False, `use_cpu` where
    there is no CUDA. Refused by name: gradient checkpointing (it loses the prefix), fp16 (Gemma overflows), gradient
    accumulation (see `num_mini_batches`), and what has no effect or cannot work here.
    """

    output_dir: str | None = field(default="outputs", metadata={"help": "Folder that holds the runs' folders."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Contexts an iteration on one device."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Contexts a batch when evaluating."})
    learning_rate: float = field(default=1e-2, metadata={"help": "Learning rate of the prefix."})
    adam_epsilon: float = field(default=1e-5, metadata={"help": "Epsilon of AdamW."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule; see also one_cycle_pct_start."})
    report_to: None | str | list[str] = field(default="tensorboard", metadata={"help": "Where metrics go."})
    logging_steps: float = field(default=1, metadata={"help": "Iterations between two log lines."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN losses from the log."})
    eval_steps: float | None = field(default=10, metadata={"help": "Iterations between two evaluations."})
    save_steps: float = field(default=10, metadata={"help": "Iterations between two checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    metric_for_best_model: str | None = field(
        default=None,
        metadata={"help": "What selects the step that is kept: judge_difference by default, or reward_difference."},
    )
    greater_is_better: bool | None = field(default=True, metadata={"help": "Whether a larger metric is better."})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "Iterations of equal size."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Keep the contexts' columns."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "None is unused."})
    resume_from_checkpoint: bool = field(
        default=False, metadata={"help": "Go on from the newest complete checkpoint of the run's folder."}
    )

    # Parameters that control the rollout
    num_generations: int = field(
        default=1,
        metadata={
            "help": "Replies to each context. With 2 or more the mean return of a context's other replies is the "
            "baseline, in the value head's place."
        },
    )
    max_completion_length: int = field(default=64, metadata={"help": "Most tokens of a completion."})
    eval_max_completion_length: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens of a completion where soft and hard are compared; that of training by default. More "
            "lets both end where training cuts them."
        },
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of sampling and of scoring alike."})
    cache_implementation: str | None = field(
        default=None,
        metadata={
            "help": "static: keys and values in tensors of their final length, with which transformers compiles the "
            "decode step on CUDA.",
            "choices": ["static"],
        },
    )

    # Parameters that control the updates of an iteration
    num_ppo_epochs: int = field(default=1, metadata={"help": "Passes over a rollout batch."})
    num_mini_batches: int = field(default=4, metadata={"help": "Updates a pass; they also bound the memory."})
    cliprange: float = field(default=0.2, metadata={"help": "Clip range of a response's ratio."})
    ratio_norm: str = field(
        default="none",
        metadata={"help": "The ratio of the whole response, or its mean a token.", "choices": ["none", "mean"]},
    )
    value_learning_rate: float = field(
        default=3e-2, metadata={"help": "Learning rate of the value head, times the model's hidden size."}
    )
    value_warmup_batches: int = field(
        default=2,
        metadata={
            "help": "Replies of the hard prompt to each of a batch's contexts, before the prefix moves: they give the "
            "rewards their unit and fit the value head."
        },
    )
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy bonus, a token."})
    target_kl: float | None = field(
        default=0.1, metadata={"help": "An iteration's updates end when the approximate KL a token passes this."}
    )
    one_cycle_pct_start: float | None = field(
        default=None,
        metadata={"help": "Use torch's OneCycleLR with this share of the iterations rising (the prototype: 0.2)."},
    )

    # Parameters that control the reward
    reward_weights: list[float] | None = field(
        default=None,
        metadata={"help": "A weight for each of several rewards; 1 each by default, in train_policy.py their mean."},
    )
    scale_rewards: bool = field(
        default=True,
        metadata={
            "help": "Count rewards in spreads of the hard prompt's replies (from the warm-up's), 0 being their mean."
        },
    )
    kl_coef: float = field(default=0.05, metadata={"help": "Weight of the KL to the hard prompt, in nats a response."})
    whiten_advantages: bool = field(default=True, metadata={"help": "Whiten advantages over the global batch."})
    missing_eos_penalty: float = field(default=1.0, metadata={"help": "Taken from a reply that does not end."})
    reward_clip: float | None = field(
        default=None, metadata={"help": "Rewards, scaled, are clamped to plus and minus this."}
    )

    # Parameters that control the logging
    log_completions: bool = field(
        default=False, metadata={"help": "Print a sample of the completions every logging_steps iterations."}
    )
    num_completions_to_print: int | None = field(
        default=None, metadata={"help": "How many log_completions prints; all by default."}
    )

    def __post_init__(self):
        check_settings(self, REFUSED)
        if parse_flag_from_env("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION") != "2":
            raise InputError("FSDP 1 was not run with a prefix: launch with accelerate_configs/fsdp2.yaml")
        if self.gradient_checkpointing or self.activation_checkpointing:
            raise InputError("gradient_checkpointing does not work with a prefix: leave it off, raise num_mini_batches")
        refuse_fp16(self)
        if self.gradient_accumulation_steps != 1:
            raise InputError("gradient_accumulation_steps must be 1: num_mini_batches bounds the memory")
        _require(
            self.cache_implementation in (None, "static"), "cache_implementation", "static", self.cache_implementation
        )
        _require(self.ratio_norm in ("none", "mean"), "ratio_norm", "none or mean", self.ratio_norm)
        _require(self.temperature > 0, "temperature", "above 0", self.temperature)
        _require(0 < self.cliprange < 1, "cliprange", "between 0 and 1", self.cliprange)
        for name in ("num_generations", "max_completion_length", "num_ppo_epochs", "num_mini_batches"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        least, cap = self.max_completion_length, self.compared_completion_length
        expected = f"at least max_completion_length, {least}"
        _require(cap >= least, "eval_max_completion_length", expected, cap)
        for name in ("value_learning_rate", "value_warmup_batches"):
            _require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        sampling = self.train_sampling_strategy
        _require(sampling in ("random", "sequential"), "train_sampling_strategy", "random or sequential", sampling)
        rising = self.one_cycle_pct_start
        _require(rising is None or 0 <= rising <= 1, "one_cycle_pct_start", "between 0 and 1", rising)
        if rising is not None and (self.lr_scheduler_type != "constant" or self.warmup_steps):
            raise InputError(
                "one_cycle_pct_start is a schedule of its own: leave lr_scheduler_type and warmup_steps out"
            )
        replies = self.per_device_train_batch_size * self.num_generations
        if self.num_mini_batches > replies:
            raise InputError(
                f"num_mini_batches is {self.num_mini_batches}, more than the {replies} replies of an iteration "
                "(per_device_train_batch_size contexts, num_generations each)"
            )
        if self.scale_rewards and self.value_warmup_batches < 1:
            raise InputError(
                "scale_rewards takes its unit from the warm-up: value_warmup_batches must be at least 1, got "
                f"{self.value_warmup_batches}; or set scale_rewards false"
            )
        self.use_cpu = self.use_cpu or not torch.cuda.is_available()
        chosen = self.metric_for_best_model
        super().__post_init__()
        refuse_mixed_precision(self)
        check_reports(self)
        check_schedule(self)
        self.metric_for_best_model = chosen  # transformers puts the loss in, which no evaluation here measures

    @property
    def compared_completion_length(self) -> int:
        """Most tokens of a completion where soft and hard are compared."""
        cap = self.eval_max_completion_length
        return self.max_completion_length if cap is None else cap

    @property
    def updates(self) -> int:
        """Updates of the prefix in an iteration."""
        return self.num_ppo_epochs * self.num_mini_batches


def _require(holds: bool, name: str, expected: str, value: object) -> None:
    if not holds:
        raise InputError(f"{name} must be {expected}, got {value}")
