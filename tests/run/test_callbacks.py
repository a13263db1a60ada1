"""What happens at a run's steps."""

import pytest

from h2s.run.callbacks import ChooseAnewElsewhere, EvaluateLastStep, LogBeforeSaving


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
