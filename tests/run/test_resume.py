"""What a resumed run must have as it began."""

import json

import pytest

from h2s.errors import InputError
from h2s.run.resume import BEGAN_WITH


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size was 1 when the run of .* now it is 2: go on"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps was 1 when the run of .* now it is 2: go on"),
        ({"seed": 7}, "seed was 42 when the run of .* now it is 7: go on with the former"),
        ({"data_seed": 7}, "data_seed was 42 when the run of .* now it is 7: go on with the former"),
        ({"greater_is_better": True}, "greater_is_better was False when the run of .* now it is True: go on"),
        ({"metric_for_best_model": "accuracy"}, "metric_for_best_model was loss when the run of .* it is accuracy: go"),
        ({"rows": 4}, r"train_dataset was 3 rows \(\w{8}\) when the run of .* now it is 4 rows \(\w{8}\): go on"),
        ({"first": 9.0}, r"train_dataset was 3 rows \(\w{8}\) when the run of .* now it is 3 rows \(\w{8}\): go on"),
    ],
)
def test_what_must_stay_as_it_began(build, tmp_path, settings, words):
    build(losses=[1] * 4).train()
    again = build(losses=[1] * 6, **settings)
    with pytest.raises(InputError, match=words):
        again.train(resume_from_checkpoint=True)
    assert not (tmp_path / "run" / "checkpoint-5").exists()


def test_what_may_change_counts_from_there(build, tmp_path):
    build(losses=[1] * 3).train()
    others = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1, "eval_steps": 2}
    again = build(losses=[1] * 6, limit=None, save_steps=3, **others)
    again.train(resume_from_checkpoint=True)
    rates = {line["step"]: line["learning_rate"] for line in again.state.log_history if "learning_rate" in line}
    assert rates == {4: 1e-2, 5: 1e-2, 6: 1e-2}
    assert [line["step"] for line in again.state.log_history if "eval_loss" in line] == [1, 2, 3, 4, 6]
    assert {f.name for f in (tmp_path / "run").glob("checkpoint-*")} >= {"checkpoint-6"}
    assert not (tmp_path / "run" / "checkpoint-4").exists() and not (tmp_path / "run" / "checkpoint-5").exists()


def test_the_same_said_otherwise_goes_on(build):
    build(losses=[1] * 2).train()
    again = build(losses=[1] * 3, data_seed=42, metric_for_best_model="eval_loss")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3


def test_accumulation_goes_on_within_an_epoch(build):
    """Two steps an epoch, of two batches and of one."""
    for steps in (1, 3, 4):
        trainer = build(losses=[1] * steps, gradient_accumulation_steps=2)
        trainer.train(resume_from_checkpoint=steps > 1)
    assert trainer.state.global_step == 4


def test_it_lies_in_the_checkpoint(build, tmp_path):
    trainer = build(losses=[1])
    trainer.train()
    file = tmp_path / "run" / "checkpoint-1" / BEGAN_WITH
    assert json.loads(file.read_text(encoding="utf-8")) == trainer.began_with()
    for damaged in (file.read_text(encoding="utf-8")[:-9], "[1]"):
        file.write_text(damaged, encoding="utf-8")
        with pytest.raises(InputError, match=f"{BEGAN_WITH} is damaged .*: it cannot be resumed"):
            build(losses=[1] * 2).train(resume_from_checkpoint=True)
    file.unlink()
    with pytest.raises(InputError, match=f"checkpoint-1 holds no {BEGAN_WITH}: it cannot be resumed"):
        build(losses=[1] * 2).train(resume_from_checkpoint=True)
