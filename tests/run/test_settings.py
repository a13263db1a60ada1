"""What Trainer can be told and a run cannot do, in both stages: refused by name before anything loads."""

import dataclasses

import pytest
import transformers.integrations
from transformers import TrainingArguments
from trl import RewardConfig

from h2s import InputError, RewardModelConfig, SingleStepPPOConfig
from h2s.ppo.config import REFUSED as OF_POLICIES
from h2s.reward.config import REFUSED as OF_REWARDS
from h2s.run.settings import NO_DEEPSPEED, REFUSED

BOTH = [SingleStepPPOConfig, RewardModelConfig]
# A value that differs from the default, where `not default` is none.
OTHER = {
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "accelerator_config": {"split_batches": True},
    "chat_template_path": "template.jinja",
    "dataloader_num_workers": 2,
    "dataset_num_proc": 2,
    "debug": "underflow_overflow",
    "deepspeed": "zero3.json",
    "eos_token": "[SEP]",
    "eval_accumulation_steps": 2,
    "fsdp": "full_shard",
    "fsdp_config": {"version": 2},
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "hub_strategy": "checkpoint",
    "include_for_metrics": ["inputs"],
    "include_num_input_tokens_seen": "all",
    "label_names": ["labels"],
    "label_smoothing_factor": 0.1,
    "length_column_name": "tokens",
    "liger_kernel_config": {"rope": True},
    "max_length": 64,
    "model_init_kwargs": {"dtype": "float32"},
    "neftune_noise_alpha": 5.0,
    "optim": "adafactor",
    "optim_args": "r=2",
    "optim_target_modules": "all-linear",
    "pad_to_multiple_of": 8,
    "pad_token": "[PAD]",
    "parallelism_config": object(),
    "torch_empty_cache_steps": 2,
    "train_sampling_strategy": "group_by_length",
}
EACH = [
    *[(config, name, reason) for config in BOTH for name, reason in REFUSED.items()],
    *[(SingleStepPPOConfig, name, reason) for name, reason in OF_POLICIES.items()],
    *[(RewardModelConfig, name, reason) for name, reason in OF_REWARDS.items()],
]


@pytest.mark.parametrize(("config", "name", "reason"), EACH, ids=lambda value: getattr(value, "__name__", None))
def test_what_cannot_be_followed_is_refused_by_name(config, name, reason):
    default = {f.name: f.default for f in dataclasses.fields(config)}[name]
    with pytest.raises(InputError) as refusal:
        config(**{name: OTHER.get(name, not default)})
    assert str(refusal.value).startswith(f"{name} cannot be ") and str(refusal.value).endswith(reason)


def test_the_tables_know_trainers_names():
    """A field that a new transformers has renamed would be refused no more."""
    of_trainer, of_trl = ({f.name for f in dataclasses.fields(c)} for c in (TrainingArguments, RewardConfig))
    assert REFUSED.keys() | OF_POLICIES.keys() <= of_trainer and OF_REWARDS.keys() <= of_trl
    assert not REFUSED.keys() & (OF_POLICIES.keys() | OF_REWARDS.keys())


@pytest.mark.parametrize("config", BOTH)
def test_loggers_that_are_not_there(config, monkeypatch):
    monkeypatch.setattr(
        transformers.integrations, "get_available_reporting_integrations", lambda: ["tensorboard", "trackio"]
    )
    assert config(report_to="all").report_to and config(report_to=["tensorboard", "trackio"])
    with pytest.raises(
        InputError, match="report_to wandb needs a package that is not installed: install it, or leave wandb out"
    ):
        config(report_to=["tensorboard", "wandb"])
    with pytest.raises(InputError, match=r"report_to: tensorbord is not supported, only .*tensorboard.* are supported"):
        config(report_to="tensorbord")


@pytest.mark.parametrize("config", BOTH)
def test_what_is_given_twice_or_says_the_same_is_taken(config):
    """Transformers fills settings in, and a copy is checked again."""
    dataclasses.replace(config(optim="adamw_torch", hub_strategy="end", remove_unused_columns=None))


@pytest.mark.parametrize("config", BOTH)
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size must be at least 1, got 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be at least 0, got -1.0"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm must be at least 0, got nan"),
        ({"max_steps": 0}, "no step would be made: max_steps is 0"),
        ({"num_train_epochs": 0}, "no step would be made: max_steps is -1, num_train_epochs 0; raise one"),
        ({"learning_rate": -1e-3}, "cannot be made .*: Invalid learning rate: -0.001"),
        ({"adam_beta2": 1.5}, "cannot be made .*: Invalid beta parameter at index 1: 1.5"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "cannot be made .cosine_with_min_lr.: One of min_lr or min_lr_ra",
        ),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "cannot be made .*num_decay_steps"),
        ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"x": 1}}, "cannot be made .*'x'"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 3}, "constant has no warm-up, got warmup_steps 3"),
        ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"x": 1}}, "constant has no lr_scheduler_kwargs"),
    ],
)
def test_numbers_and_schedules_that_cannot_be(config, settings, words):
    with pytest.raises(InputError, match=words):
        config(**settings)


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
@pytest.mark.parametrize(("greater", "mode", "other"), [(True, "max", "min"), (False, "min", "max")])
def test_a_schedule_by_evaluations_looks_the_right_way(kind, greater, mode, other):
    settings = {"lr_scheduler_type": kind, "greater_is_better": greater, "eval_strategy": "steps", "eval_steps": 1}
    SingleStepPPOConfig(**settings, lr_scheduler_kwargs={"mode": mode})
    with pytest.raises(InputError, match=f"lr_scheduler_type {kind} would take better for worse.* hold mode: {mode}"):
        SingleStepPPOConfig(**settings, lr_scheduler_kwargs={"mode": other})


def test_workers_that_stay_need_workers():
    with pytest.raises(InputError, match="dataloader_persistent_workers needs dataloader_num_workers of at least 1"):
        SingleStepPPOConfig(dataloader_persistent_workers=True)
    SingleStepPPOConfig(dataloader_persistent_workers=True, dataloader_num_workers=1)


@pytest.mark.parametrize("config", BOTH)
def test_a_launch_with_deepspeed_is_refused(config, monkeypatch):
    """Before transformers looks for it: it need not be installed."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InputError) as refusal:
        config()
    assert str(refusal.value) == f"this was launched with DeepSpeed: {NO_DEEPSPEED}"


@pytest.mark.parametrize("recipe", ["train_reward", "train_policy"])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, ("this was launched with DeepSpeed: ", NO_DEEPSPEED)),
        ({"task": {"deepspeed": "zero3.json"}}, ("deepspeed cannot be zero3.json: ", NO_DEEPSPEED)),
        ({"task": {"save_only_model": True}}, ("save_only_model cannot be True: ", REFUSED["save_only_model"])),
    ],
)
def test_a_recipe_says_so_before_anything_loads(refused, monkeypatch, recipe, given, words):
    if not given:  # as accelerate launch has it of a configuration with DeepSpeed
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert refused(recipe, **given) == "error: " + "".join(words)
