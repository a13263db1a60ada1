"""The settings of stage 1."""

from dataclasses import dataclass, field

import torch
from accelerate.utils import parse_flag_from_env
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from trl import RewardConfig

from h2s.errors import InputError
from h2s.run.settings import NO_EFFECT, check_reports, check_schedule, check_settings

# Settings of TRL's and Trainer's that keep their default in this stage alone, and why.
REFUSED = {
    "activation_offloading": "it crashes with a prefix; leave it out",
    "dataloader_num_workers": "the pairs are tokens already, workers would have nothing to do; leave it out",
    "max_length": "it drops rows; max_tokens cuts them",
    "trust_remote_code": "code that comes with a model is never run; leave it out",
    **dict.fromkeys(
        (
            "chat_template_path",
            "dataloader_drop_last",
            "dataset_num_proc",
            "eos_token",
            "model_init_kwargs",
            "pad_to_multiple_of",
            "pad_token",
            "train_sampling_strategy",
        ),
        NO_EFFECT,
    ),
}


@dataclass
class RewardModelConfig(RewardConfig):
    """Settings of [`RewardModelTrainer`]: TRL's `RewardConfig` with defaults for a prefix, and `max_tokens`.

    ```python
    RewardModelConfig(output_dir="outputs/reward", num_train_epochs=3, max_tokens=256, eval_strategy="epoch")
    ```

    Differing from TRL's: `output_dir` outputs, `learning_rate` 3e-2 (a prefix; 1e-4 is for LoRA), `num_train_epochs` 5,
    `per_device_train_batch_size` 16, `per_device_eval_batch_size` 64, `save_strategy` epoch, `metric_for_best_model`
    loss (a small part's accuracy is mostly chance) with `greater_is_better` False, `save_total_limit` 1, `report_to`
    tensorboard, `logging_nan_inf_filter` False, `gradient_checkpointing` refused (a prefix on BERT silently loses its
    gradient under it), `bf16` only on CUDA, `use_cpu` where there is no CUDA, `remove_unused_columns` False (the
    collator needs the token types), `max_length` None (it would drop long rows; they are cut before),
    `resume_from_checkpoint` a bool. Refused by name: what has no effect or cannot work here
    (`train_sampling_strategy`, say: the pairs of a conversation come one after the other).
    """

    output_dir: str | None = field(default="outputs", metadata={"help": "Folder that holds the runs' folders."})
    learning_rate: float = field(default=3e-2, metadata={"help": "Peak learning rate of the prefix."})
    head_learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of pooler and head."})
    num_train_epochs: float = field(default=5.0, metadata={"help": "Passes over the judgements."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Pairs a step on one device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Pairs a batch when evaluating."})
    save_strategy: str = field(default="epoch", metadata={"help": "When a checkpoint is written."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept (the best one always)."})
    metric_for_best_model: str | None = field(default="loss", metadata={"help": "What selects the best epoch."})
    greater_is_better: bool | None = field(default=False, metadata={"help": "Whether a larger metric is better."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two log lines."})
    report_to: None | str | list[str] = field(default="tensorboard", metadata={"help": "Where metrics go."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN losses from the log."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Refused: it loses the prefix's gradient."}
    )
    max_tokens: int | None = field(
        default=None, metadata={"help": "Text tokens of a context and its response; positions minus virtual tokens."}
    )
    max_length: int | None = field(default=None, metadata={"help": "TRL drops longer rows; see max_tokens instead."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Keep the token types."})
    resume_from_checkpoint: bool = field(
        default=False, metadata={"help": "Go on from the newest complete checkpoint of the run's folder."}
    )

    def __post_init__(self):
        check_settings(self, REFUSED)
        if parse_flag_from_env("ACCELERATE_USE_FSDP"):
            raise InputError(
                "FSDP is not for stage 1, whose model fits a card: launch with accelerate_configs/multi_gpu.yaml"
            )
        if not self.head_learning_rate >= 0:
            raise InputError(f"head_learning_rate must be at least 0, got {self.head_learning_rate}")
        if self.gradient_checkpointing or self.activation_checkpointing:
            raise InputError("gradient_checkpointing with a prefix silently trains the head alone: leave it off")
        self.use_cpu = self.use_cpu or not torch.cuda.is_available()
        if self.bf16 is None:
            self.bf16 = not self.use_cpu and not self.fp16 and torch.cuda.is_bf16_supported()
        super().__post_init__()
        check_reports(self)
        check_schedule(self)
        evaluated, saved = IntervalStrategy(self.eval_strategy).value, SaveStrategy(self.save_strategy).value
        steps = {"steps": (self.eval_steps, self.save_steps)}.get(evaluated, (None, None))
        if evaluated != "no" and saved != "best" and (saved != evaluated or steps[0] != steps[1]):
            raise InputError(
                f"save_strategy must be as eval_strategy, which is {evaluated}, with the same steps, got {saved}: the "
                "best epoch is taken from its checkpoint"
            )


@dataclass
class TaskArguments(RewardModelConfig):
    """The section `task` of a recipe: `max_tokens` stands in its section `model`."""

    max_tokens: int | None = field(default=None, init=False)
