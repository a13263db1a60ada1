"""The settings: what differs from TRL's defaults, and what is refused."""

import dataclasses

import pytest
import torch
from trl import RewardConfig

from h2s import InputError, RewardModelConfig
from h2s.reward.config import TaskArguments


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_is_refused(name):
    with pytest.raises(InputError, match="gradient_checkpointing with a prefix silently trains the head alone"):
        RewardModelConfig(**{name: True})
    assert not getattr(RewardModelConfig(), name)


def test_a_launch_with_fsdp_is_refused(monkeypatch):
    """accelerate_configs/fsdp2.yaml wraps the policy's layers, which no encoder has."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="FSDP is not for stage 1, whose model fits a card: launch with accelerate_co"):
        RewardModelConfig()


def test_a_negative_rate_is_refused():
    with pytest.raises(InputError, match="head_learning_rate must be at least 0, got -1"):
        RewardModelConfig(head_learning_rate=-1)


def test_the_defaults_that_differ_are_those_that_the_docstring_lists():
    ours, theirs = ({f.name: f.default for f in dataclasses.fields(c)} for c in (RewardModelConfig, RewardConfig))
    differing = sorted(name for name, value in theirs.items() if ours[name] != value)
    text = RewardModelConfig.__doc__.split("Differing from TRL's")[1]
    assert len(differing) > 10 and [name for name in differing if f"`{name}`" not in text] == []
    assert ours.keys() - theirs.keys() == {"head_learning_rate", "max_tokens"}


def test_every_setting_has_a_help():
    fields = RewardModelConfig.__dataclass_fields__
    assert [name for name in RewardModelConfig.__annotations__ if not fields[name].metadata.get("help")] == []


def test_nothing_is_evaluated_until_it_is_asked_for():
    """A trainer without an `eval_dataset` runs."""
    args = RewardModelConfig()
    assert args.eval_strategy == "no" and args.metric_for_best_model == "loss" and args.greater_is_better is False


@pytest.mark.parametrize(
    ("cuda", "bf16_supported", "settings", "use_cpu", "bf16"),
    [
        (False, False, {}, True, False),
        (True, True, {}, False, True),
        (True, False, {}, False, False),
        (True, True, {"use_cpu": True}, True, False),
        (True, True, {"fp16": True}, False, False),
        (True, True, {"bf16": False}, False, False),
    ],
)
def test_device_and_precision(monkeypatch, cuda, bf16_supported, settings, use_cpu, bf16):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16_supported)
    monkeypatch.setattr(RewardConfig, "__post_init__", lambda self: setattr(self, "report_to", []))
    args = RewardModelConfig(**settings)
    assert (args.use_cpu, args.bf16) == (use_cpu, bf16)


def test_a_recipes_task_leaves_max_tokens_to_its_section_model():
    """One key in two sections would be two answers."""
    with pytest.raises(TypeError, match="max_tokens"):
        TaskArguments(max_tokens=64)
    names = {f.name for f in dataclasses.fields(TaskArguments) if f.init}
    assert names == {f.name for f in dataclasses.fields(RewardModelConfig)} - {"max_tokens"}
    assert TaskArguments().max_tokens is None
