"""What Trainer can be told and a run of h2s cannot do: refused by name, with the reason, before anything loads."""

from collections.abc import Mapping
from dataclasses import MISSING, fields

import torch
from accelerate.utils import parse_flag_from_env
from torch.optim import AdamW
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_pt_utils import AcceleratorConfig

from h2s.errors import InputError, in_short

NO_EFFECT = "it would have no effect here; leave it out"
ADAMW = "the prefix and what stands beside it have torch's AdamW; leave it out"
NO_DEEPSPEED = (
    "DeepSpeed (ZeRO) steps its engine within backward and leaves weights empty outside its own forward, so an "
    "iteration's sampling and updates cannot run; accelerate_configs/multi_gpu.yaml is for a model that fits a card, "
    "fsdp2.yaml for one that does not"
)

# Settings of both stages that keep their default, and why.
REFUSED = {
    "auto_find_batch_size": "it would start again, from a prefix that has moved; lower per_device_train_batch_size",
    "save_only_model": "a checkpoint without its optimizer cannot be resumed; leave it out, a prefix's is small",
    "save_on_each_node": "a run has one folder, which all its machines share; leave it out",
    "enable_jit_checkpoint": "a kill would leave half a checkpoint; recipes save a whole one when a SIGTERM comes",
    "ignore_data_skip": "a resumed run goes on with what its epoch has left; leave it out",
    "optim": ADAMW,
    "optim_args": ADAMW,
    "optim_target_modules": ADAMW,
    "neftune_noise_alpha": "its noise is for embeddings that are trained, a prefix's stay as they are; leave it out",
    "use_liger_kernel": "its kernels were not run with a prefix; leave it out",
    "liger_kernel_config": "its kernels were not run with a prefix; leave it out",
    "bf16_full_eval": "the prefix itself would lose its precision for good; leave it out",
    "fp16_full_eval": "the prefix itself would lose its precision for good; leave it out",
    "remove_unused_columns": "they are what is learnt from; leave it out",
    "accelerator_config": "batches are shared out as an exact resume needs it; leave it out",
    "parallelism_config": "launch with a file of accelerate_configs/ instead",
    "fsdp": "launch with accelerate_configs/fsdp2.yaml instead",
    "fsdp_config": "launch with accelerate_configs/fsdp2.yaml instead",
    "deepspeed": NO_DEEPSPEED,
    "debug": "it cannot look into a model whose masks are booleans; leave it out",
    "hub_strategy": "the kept adapter alone is pushed, at the end; leave it out",
    "hub_always_push": "the kept adapter alone is pushed, at the end; leave it out",
    **dict.fromkeys(
        (
            "activation_checkpointing_kwargs",
            "average_tokens_across_devices",
            "batch_eval_metrics",
            "do_predict",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "gradient_checkpointing_kwargs",
            "include_for_metrics",
            "label_names",
            "label_smoothing_factor",
            "length_column_name",
            "use_cache",
        ),
        NO_EFFECT,
    ),
}
# What else says the same as a default, or stands in its place once transformers has filled it in.
AS_GOOD = {
    "accelerator_config": [AcceleratorConfig()],
    "debug": [None, []],
    "hub_strategy": ["end"],
    "include_num_input_tokens_seen": [False],
    "loss_type": ["sigmoid"],
    "metric_for_best_model": ["eval_loss"],
    "optim": ["adamw_torch"],
    "pad_to_multiple_of": [None],
    "remove_unused_columns": [None],
}
# Numbers that Trainer takes as they are, and the least that makes sense.
AT_LEAST = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "max_grad_norm": 0}
BY_METRIC = ("reduce_lr_on_plateau", "greedy")


def check_settings(args: TrainingArguments, also_refused: Mapping[str, str]) -> None:
    """Check the settings as they were given: before transformers' own `__post_init__`, which may begin what is refused.

    Args:
        args: the settings.
        also_refused: those of this stage that keep their default, and why, as `REFUSED` has them.

    Raises:
        InputError: one is set that no run of h2s can do, one has no effect, or a number is too small.
    """
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise InputError(f"this was launched with DeepSpeed: {NO_DEEPSPEED}")
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(args)}
    for name, reason in {**REFUSED, **also_refused}.items():
        value = getattr(args, name)
        if value != defaults[name] and value not in AS_GOOD.get(name, []):
            raise InputError(f"{name} cannot be {value}: {reason}")
    for name, least in AT_LEAST.items():
        if not getattr(args, name) >= least:
            raise InputError(f"{name} must be at least {least}, got {getattr(args, name)}")
    if args.max_steps == 0 or (args.max_steps < 0 and not args.num_train_epochs > 0):
        raise InputError(
            f"no step would be made: max_steps is {args.max_steps}, num_train_epochs {args.num_train_epochs}; raise one"
        )
    if args.dataloader_persistent_workers and args.dataloader_num_workers == 0:
        raise InputError("dataloader_persistent_workers needs dataloader_num_workers of at least 1, got 0")


def refuse_fp16(args: TrainingArguments) -> None:
    """Before transformers' own checks, which refuse it on a CPU for another reason.

    Raises:
        InputError: it is asked for.
    """
    if args.fp16:
        raise InputError("fp16 is not supported (Gemma overflows in it): use dtype bfloat16 in the model section")


def refuse_mixed_precision(args: TrainingArguments) -> None:
    """After transformers' own checks: a policy trains in the precision that it answers and is compared in.

    Raises:
        InputError: it is asked for.
    """
    if args.mixed_precision != "no":
        raise InputError(
            f"mixed_precision must be no, got {args.mixed_precision} (of bf16, or of accelerate's config): what is "
            "sampled would be scored otherwise; dtype bfloat16 loads the model in it, accelerate launch "
            "--mixed_precision no turns the other off"
        )


def check_reports(args: TrainingArguments) -> None:
    """Check that what `report_to` names is there: after transformers' own checks, which make a list of it.

    Raises:
        InputError: it is unknown, or its package is not installed.
    """
    # They bring transformers' models, seconds that `--help` does without.
    from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

    try:
        get_reporting_integration_callbacks(args.report_to)
    except ValueError as error:
        raise InputError(f"report_to: {error}") from error
    for name in args.report_to or []:
        if name not in get_available_reporting_integrations():
            raise InputError(f"report_to {name} needs a package that is not installed: install it, or leave {name} out")


def check_schedule(args: TrainingArguments) -> None:
    """Check that optimizer and schedule can be made of the settings, by making them: after transformers' own checks.

    Raises:
        InputError: they cannot, or the schedule would not do what is asked of it.
    """
    kind, kwargs = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type), args.lr_scheduler_kwargs or {}
    if args.warmup_steps and kind in ("constant", *BY_METRIC):
        raise InputError(
            f"lr_scheduler_type {kind} has no warm-up, got warmup_steps {args.warmup_steps}: choose another"
        )
    if kwargs and kind in ("constant", "constant_with_warmup"):
        raise InputError(f"lr_scheduler_type {kind} has no lr_scheduler_kwargs, got {kwargs}: leave them out")
    mode = "max" if args.greater_is_better else "min"
    if kind in BY_METRIC and kwargs.get("mode", "min") != mode:
        raise InputError(
            f"lr_scheduler_type {kind} would take better for worse, as greater_is_better is {args.greater_is_better}: "
            f"lr_scheduler_kwargs must hold mode: {mode}"
        )
    steps = max(args.max_steps, 1)
    try:
        optimizer = AdamW(
            [torch.nn.Parameter(torch.zeros(1))],
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )
        get_scheduler(kind, optimizer, args.get_warmup_steps(steps), steps, dict(kwargs))
    except (ValueError, TypeError, ArithmeticError) as error:
        raise InputError(f"optimizer or schedule cannot be made ({kind}): {in_short(error)}") from error
