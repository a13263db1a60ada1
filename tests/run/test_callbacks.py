"""What happens at a run's steps, and where a resumed one begins."""

import pytest

from h2s.errors import InputError
from h2s.run.callbacks import ChooseAnewElsewhere, EvaluateLastStep, LogBeforeSaving


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"per_device_train_batch_size": 2},
            "per_device_train_batch_size was 1 when this run began, now it is 2: go on",
        ),
        (
            {"gradient_accumulation_steps": 2},
            "step 4 was epoch 1.333 when this run began, here it is 2: go on with the",
        ),
        ({"rows": 4}, "step 4 was epoch 1.333 when this run began, here it is 1: go on with the data and"),
    ],
)
def test_a_run_that_would_not_go_on_as_it_began_is_refused(build, tmp_path, settings, words):
    build(losses=[1] * 4).train()
    again = build(losses=[1] * 6, **settings)
    with pytest.raises(InputError, match=words):
        again.train(resume_from_checkpoint=True)
    assert not (tmp_path / "run" / "checkpoint-5").exists()


def test_accumulation_goes_on_within_an_epoch(build):
    """Two steps an epoch, of two batches and of one."""
    for steps in (1, 3, 4):
        trainer = build(losses=[1] * steps, gradient_accumulation_steps=2)
        trainer.train(resume_from_checkpoint=steps > 1)
    assert trainer.state.global_step == 4


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
