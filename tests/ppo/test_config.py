"""The settings: what differs from transformers' defaults, and what is refused."""

import dataclasses

import pytest
import torch
from transformers import TrainingArguments

from h2s import InputError, SingleStepPPOConfig


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gradient_checkpointing": True}, "gradient_checkpointing does not work with a prefix"),
        ({"fp16": True}, "fp16 is not supported"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps must be 1: num_mini_batches bounds"),
        ({"ratio_norm": "sum"}, "ratio_norm must be none or mean, got sum"),
        ({"temperature": 0}, "temperature must be above 0, got 0"),
        ({"cliprange": 0}, "cliprange must be between 0 and 1, got 0"),
        ({"cliprange": 1}, "cliprange must be between 0 and 1, got 1"),
        ({"num_ppo_epochs": 0}, "num_ppo_epochs must be at least 1, got 0"),
        ({"max_completion_length": 0}, "max_completion_length must be at least 1, got 0"),
        (
            {"eval_max_completion_length": 63},
            "eval_max_completion_length must be at least max_completion_length, 64, got 63",
        ),
        ({"num_mini_batches": 0}, "num_mini_batches must be at least 1, got 0"),
        ({"num_generations": 0}, "num_generations must be at least 1, got 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
        ({"value_learning_rate": -1}, "value_learning_rate must be at least 0, got -1"),
        ({"value_warmup_batches": -1}, "value_warmup_batches must be at least 0, got -1"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy must be random or sequential, got g"),
        ({"one_cycle_pct_start": 1.5}, "one_cycle_pct_start must be between 0 and 1, got 1.5"),
        ({"one_cycle_pct_start": 0.2, "lr_scheduler_type": "cosine"}, "one_cycle_pct_start is a schedule of its own"),
        ({"one_cycle_pct_start": 0.2, "warmup_steps": 2}, "one_cycle_pct_start is a schedule of its own: leave lr"),
        ({"num_mini_batches": 7, "per_device_train_batch_size": 6}, "num_mini_batches is 7, more than the 6 replies"),
        ({"bf16": True}, "mixed_precision must be no, got bf16"),
        ({"value_warmup_batches": 0}, "scale_rewards takes its unit from the warm-up: value_warmup_batches must be at"),
    ],
)
def test_settings_that_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        SingleStepPPOConfig(**settings)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision must be no, got bf16 .*accelerate launch"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP 1 was not run with a prefix: launch with accelerate_configs/fsdp2"),
    ],
)
def test_launches_that_are_refused(monkeypatch, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words):
        SingleStepPPOConfig()


def test_the_defaults_that_differ_are_those_that_the_docstring_lists():
    ours, theirs = (
        {f.name: f.default for f in dataclasses.fields(c)} for c in (SingleStepPPOConfig, TrainingArguments)
    )
    differing = sorted(name for name, value in theirs.items() if ours[name] != value)
    text = SingleStepPPOConfig.__doc__.split("Defaults that differ")[1]
    assert len(differing) > 10 and [name for name in differing if f"`{name}`" not in text] == []


def test_nothing_is_evaluated_or_selected_until_it_is_asked_for():
    """Transformers would put the loss in, which no evaluation here measures."""
    args = SingleStepPPOConfig()
    assert args.eval_strategy == "no" and args.metric_for_best_model is None
    assert SingleStepPPOConfig(load_best_model_at_end=True, eval_strategy="steps").metric_for_best_model is None
    assert SingleStepPPOConfig(metric_for_best_model="kl").metric_for_best_model == "kl"


def test_soft_and_hard_are_compared_with_the_tokens_of_training_unless_more_are_given():
    assert SingleStepPPOConfig(max_completion_length=9).compared_completion_length == 9
    larger = SingleStepPPOConfig(max_completion_length=9, eval_max_completion_length=20)
    assert (larger.max_completion_length, larger.compared_completion_length) == (9, 20)


@pytest.mark.parametrize("cuda", [False, True])
def test_use_cpu_where_there_is_no_cuda(monkeypatch, cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(
        TrainingArguments, "__post_init__", lambda self: vars(self).update(mixed_precision="no", report_to=[])
    )
    assert SingleStepPPOConfig().use_cpu is not cuda
    assert SingleStepPPOConfig(use_cpu=True).use_cpu is True
