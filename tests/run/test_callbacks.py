"""What happens at a run's steps."""

import os
import signal

import pytest

from h2s.errors import Terminated
from h2s.run.callbacks import ChooseAnewElsewhere, EvaluateLastStep, LogBeforeSaving, StopOnSigterm
from h2s.run.folder import StopRequest


def test_no_log_line_spans_a_checkpoint(build):
    trainer = build(losses=[1] * 5, logging_steps=2, save_steps=3, eval_strategy="no", callbacks=[LogBeforeSaving()])
    trainer.train()
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [2, 3, 4, 5]


@pytest.mark.parametrize(("strategy", "at"), [("steps", [2, 4, 5]), ("no", [])])
def test_the_last_step_is_evaluated(build, strategy, at):
    trainer = build(eval_steps=2, eval_strategy=strategy, save_strategy="no", callbacks=[EvaluateLastStep()])
    trainer.train()
    assert [line["step"] for line in trainer.state.log_history if "eval_loss" in line] == at


@pytest.mark.parametrize("adapter_lies_there", [True, False])
def test_a_run_that_goes_on_elsewhere_chooses_anew(build, tmp_path, said, adapter_lies_there):
    trainer = build()
    if adapter_lies_there:
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "adapter_model.safetensors").touch()
    trainer.state.best_metric, trainer.state.best_global_step, trainer.state.best_model_checkpoint = 0.5, 2, "x"
    ChooseAnewElsewhere().on_train_begin(trainer.args, trainer.state, None)
    best = trainer.state.best_metric, trainer.state.best_global_step, trainer.state.best_model_checkpoint
    assert best == ((0.5, 2, "x") if adapter_lies_there else (None, None, None))
    assert len(said) == (not adapter_lies_there)


class SigtermAt:
    """A loss that sends this process a SIGTERM at a step."""

    def __init__(self, trainer, step):
        plain = trainer.training_step

        def training_step(*args, **kwargs):
            if trainer.state.global_step == step - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return plain(*args, **kwargs)

        trainer.training_step = training_step


@pytest.fixture
def stop():
    """A stop request in place of Python's own handler."""
    request = StopRequest()
    previous = signal.signal(signal.SIGTERM, request)
    yield request
    signal.signal(signal.SIGTERM, previous)


@pytest.mark.parametrize(("at", "strategy", "evaluated"), [(2, "steps", [1, 2]), (2, "epoch", []), (3, "epoch", [3])])
def test_sigterm_saves_the_step_it_came_in(build, stop, tmp_path, at, strategy, evaluated):
    """Within an epoch of three steps, and at its end, where what is due there comes first."""
    trainer = build(eval_strategy=strategy, save_strategy="no", callbacks=[StopOnSigterm(stop)])
    SigtermAt(trainer, at)
    with pytest.raises(Terminated):
        trainer.train()
    assert [f.name for f in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{at}"]
    assert [line["step"] for line in trainer.state.log_history if "eval_loss" in line] == evaluated
    assert trainer.done == []


def test_sigterm_after_the_last_step_ends_the_run(build, stop):
    trainer = build(losses=(1,), callbacks=[StopOnSigterm(stop)])
    save = trainer._save_checkpoint
    trainer._save_checkpoint = lambda *args: (save(*args), os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Terminated):
        trainer.train()
    assert not stop.can_wait  # outside of a loop the next ends the process at once


def test_a_run_without_sigterm_ends_as_it_would(build, stop):
    trainer = build(callbacks=[StopOnSigterm(stop)])
    trainer.train()
    assert trainer.state.global_step == 5 and trainer.done == ["kept"] and not stop.can_wait
