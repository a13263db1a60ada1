"""The settings of DPO on a prefix."""

from dataclasses import dataclass, field

import torch
from accelerate.utils import parse_flag_from_env
from trl import DPOConfig

from h2s.errors import InputError
from h2s.run.settings import (
    NO_EFFECT,
    check_reports,
    check_schedule,
    check_settings,
    refuse_fp16,
    refuse_mixed_precision,
)

NOT_RUN = "it was not run with a prefix; leave it out"
# Settings of TRL's and Trainer's that keep their default here alone, and why.
REFUSED = {
    "activation_offloading": "it crashes with a prefix; leave it out",
    "dataloader_drop_last": "what an epoch leaves over is learnt from too; leave it out",
    "greater_is_better": "the loss selects; leave it out",
    "max_length": "it cuts replies and drops rows; leave it out",
    "metric_for_best_model": "the loss selects; leave it out",
    "train_sampling_strategy": "pairs come in random order; leave it out",
    "trust_remote_code": "code that comes with a model is never run; leave it out",
    "sync_ref_model": "the reference stays the hard prompt; leave it out",
    **dict.fromkeys(
        (
            "discopop_tau",
            "f_alpha_divergence_coef",
            "f_divergence_type",
            "label_smoothing",
            "ld_alpha",
            "loss_type",
            "loss_weights",
            "precompute_ref_log_probs",
            "use_weighting",
        ),
        NOT_RUN,
    ),
    **dict.fromkeys(
        (
            "dataset_num_proc",
            "include_num_input_tokens_seen",
            "model_init_kwargs",
            "pad_to_multiple_of",
            "pad_token",
            "padding_free",
            "precompute_ref_batch_size",
            "prediction_loss_only",
            "ref_model_mixup_alpha",
            "ref_model_sync_steps",
            "router_aux_loss_coef",
            "truncation_mode",
        ),
        NO_EFFECT,
    ),
}


@dataclass
class PrefixDPOConfig(DPOConfig):
    """Settings of [`PrefixDPOTrainer`]: TRL's `DPOConfig` with defaults for a prefix, and how its replies are drawn.

    ```python
    PrefixDPOConfig(output_dir="outputs/dpo", max_steps=40, learning_rate=3e-3, beta=0.1)
    ```

    Differing from TRL's: `output_dir` outputs, `learning_rate` 1e-2 (a prefix), `per_device_train_batch_size` and
    `per_device_eval_batch_size` 4, `num_train_epochs` 1, `lr_scheduler_type` constant, `weight_decay` 0 (decay pulls
    the prefix to zero keys, not to the hard prompt), `eval_steps` 10, `save_steps` 10, `save_total_limit` 2,
    `metric_for_best_model` loss with `greater_is_better` False, `report_to` tensorboard, `logging_nan_inf_filter`
    False, `max_length` None (TRL's cuts replies and drops rows), `bf16` False (the dtype is the model's),
    `gradient_checkpointing` refused (it crashes with a prefix), `ddp_find_unused_parameters` False,
    `resume_from_checkpoint` a bool, `use_cpu` where there is no CUDA.
    Refused by name: other losses than DPO's own, which were not run with a prefix, and what has no effect here.
    """

    output_dir: str | None = field(default="outputs", metadata={"help": "Folder that holds the runs' folders."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Pairs a step on one device."})
    per_device_eval_batch_size: int = field(default=4, metadata={"help": "Pairs a batch when evaluating."})
    learning_rate: float = field(default=1e-2, metadata={"help": "Learning rate of the prefix."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the judgements."})
    report_to: None | str | list[str] = field(default="tensorboard", metadata={"help": "Where metrics go."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN losses from the log."})
    eval_steps: float | None = field(default=10, metadata={"help": "Steps between two evaluations."})
    save_steps: float = field(default=10, metadata={"help": "Steps between two checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    metric_for_best_model: str | None = field(default="loss", metadata={"help": "What selects the step that is kept."})
    greater_is_better: bool | None = field(default=False, metadata={"help": "Whether a larger metric is better."})
    gradient_checkpointing: bool | None = field(default=None, metadata={"help": "Refused: it crashes with a prefix."})
    bf16: bool | None = field(default=False, metadata={"help": "Refused: dtype bfloat16 loads the model in it."})
    max_length: int | None = field(default=None, metadata={"help": "Refused: it cuts replies and drops rows."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "None is unused."})
    resume_from_checkpoint: bool = field(
        default=False, metadata={"help": "Go on from the newest complete checkpoint of the run's folder."}
    )
    max_completion_length: int = field(
        default=64, metadata={"help": "Most tokens of a reply where soft and hard are compared, at the end."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Of these replies."})

    def __post_init__(self):
        check_settings(self, REFUSED)
        if parse_flag_from_env("ACCELERATE_USE_FSDP"):
            raise InputError("FSDP was not run with DPO: launch with accelerate_configs/multi_gpu.yaml")
        if self.gradient_checkpointing or self.activation_checkpointing:
            raise InputError("gradient_checkpointing does not work with a prefix: leave it off")
        refuse_fp16(self)
        if self.max_completion_length < 1:
            raise InputError(f"max_completion_length must be at least 1, got {self.max_completion_length}")
        for name in ("beta", "temperature"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be above 0, got {getattr(self, name)}")
        self.use_cpu = self.use_cpu or not torch.cuda.is_available()
        super().__post_init__()
        refuse_mixed_precision(self)
        check_reports(self)
        check_schedule(self)
