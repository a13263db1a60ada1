"""The settings: what differs from TRL's defaults, and what is refused."""

import dataclasses

import pytest
from trl import DPOConfig

from h2s import InputError, PrefixDPOConfig
from h2s.dpo.config import REFUSED


def default_of(field: dataclasses.Field):
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def test_the_defaults_that_differ_are_those_that_the_docstring_lists():
    ours, theirs = ({f.name: default_of(f) for f in dataclasses.fields(c)} for c in (PrefixDPOConfig, DPOConfig))
    differing = sorted(name for name, value in theirs.items() if ours[name] != value)
    text = PrefixDPOConfig.__doc__.split("Differing from TRL's")[1]
    assert len(differing) > 10 and [name for name in differing if f"`{name}`" not in text] == []
    assert ours.keys() - theirs.keys() == {"max_completion_length", "temperature"}


def test_every_setting_has_a_help():
    fields = PrefixDPOConfig.__dataclass_fields__
    assert [name for name in PrefixDPOConfig.__annotations__ if not fields[name].metadata.get("help")] == []


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_by_name(name):
    assert name in {f.name for f in dataclasses.fields(DPOConfig)}
    with pytest.raises(InputError, match=f"{name} cannot be changed: "):
        PrefixDPOConfig(**{name: "changed"})


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"gradient_checkpointing": True}, "gradient_checkpointing does not work with a prefix"),
        ({"fp16": True}, "fp16 is not supported"),
        ({"bf16": True}, "mixed_precision must be no, got bf16"),
        ({"beta": 0.0}, "beta must be above 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be above 0, got nan"),
        ({"max_completion_length": 0}, "max_completion_length must be at least 1, got 0"),
        ({"max_steps": 0}, "no step would be made"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 3}, "lr_scheduler_type constant has no warm-up"),
    ],
)
def test_what_makes_no_sense_is_refused(setting, words):
    with pytest.raises(InputError, match=words):
        PrefixDPOConfig(**setting)


def test_the_same_in_other_words_is_taken():
    args = PrefixDPOConfig(loss_type="sigmoid", metric_for_best_model="eval_loss")
    assert args.metric_for_best_model == "eval_loss"


def test_a_launch_with_fsdp_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match=r"FSDP was not run with DPO: launch with accelerate_configs/multi_gpu.yaml"):
        PrefixDPOConfig()
