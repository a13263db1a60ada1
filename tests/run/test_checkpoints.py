"""Which checkpoint a run goes on from, and which are deleted."""

import json
from pathlib import Path

import pytest
import transformers
from torch.optim.lr_scheduler import OneCycleLR
from transformers import TrainerCallback, TrainingArguments

import h2s.run.checkpoints
from h2s.errors import InputError, RunError
from h2s.run.resume import write_began_with


def checkpoint(folder, processes: int = 1) -> Path:
    folder.mkdir(parents=True)
    for name in ("trainer_state.json", "adapter_model.safetensors", "optimizer.pt"):
        (folder / name).touch()
    for rank in range(processes):
        (folder / f"rng_state_{rank}.pth").touch()
    return folder


def names(folder) -> set[str]:
    return {f.name for f in folder.iterdir()}


# Where a run goes on


@pytest.fixture
def goes_on_from(build, monkeypatch, tmp_path):
    """What Trainer's own `train` is told to go on from."""
    told = []
    monkeypatch.setattr(
        transformers.Trainer,
        "train",
        lambda self, resume_from_checkpoint, **kwargs: told.append(resume_from_checkpoint),
    )

    def run(asked, **settings):
        trainer = build(**settings)
        for folder in tmp_path.rglob("checkpoint-*"):
            write_began_with(folder, trainer.began_with())
        trainer.train(resume_from_checkpoint=asked)
        return told.pop(), trainer

    return run


def test_without_a_complete_checkpoint_a_run_starts_over_and_says_so(goes_on_from, tmp_path, said):
    run = tmp_path / "run"
    checkpoint(run / "unfinished-checkpoint" / "checkpoint-8")
    (run / "unfinished-adapter").mkdir()
    assert goes_on_from(True)[0] is None
    assert said == [f"no checkpoint in {run} yet: starting over"]
    assert names(run) == set()  # what was left is gone


@pytest.mark.parametrize("asked", [True, "checkpoint-8", "elsewhere/checkpoint-3"])
def test_the_newest_complete_checkpoint_or_the_one_that_is_named(goes_on_from, tmp_path, said, asked):
    run = tmp_path / "run"
    # The judge's are another training's.
    for name in ("checkpoint-8", "checkpoint-16", "unfinished-checkpoint/checkpoint-24", "judge/checkpoint-32"):
        checkpoint(run / name)
    checkpoint(run / "elsewhere" / "checkpoint-3")
    expected = run / ("checkpoint-16" if asked is True else asked)
    for form in [True] if asked is True else [expected, str(expected)]:
        found, trainer = goes_on_from(form, eval_on_start=True)
        assert found == str(expected)
        assert said.pop() == f"resuming from {expected}"
        assert not trainer.args.eval_on_start  # this is not the start


@pytest.mark.parametrize("asked", [None, False])
def test_a_run_that_is_to_start_starts(goes_on_from, tmp_path, said, asked):
    assert goes_on_from(asked)[0] is None and said == []
    checkpoint(tmp_path / "run" / "checkpoint-8")
    found, trainer = goes_on_from(asked, eval_on_start=True)
    assert found is None and trainer.args.eval_on_start
    assert said == [f"{tmp_path / 'run'} holds checkpoints of another run: choose another output_dir"]


@pytest.mark.parametrize("asked", ["none", "empty", "file", "run", "yes"])
def test_what_is_no_checkpoint_is_refused(goes_on_from, tmp_path, asked):
    """Also the run's own folder, which holds one."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    checkpoint(tmp_path / "run" / "checkpoint-8")
    folder = asked if asked == "yes" else str(tmp_path / asked)
    with pytest.raises(InputError, match=f"resume_from_checkpoint must be True or a checkpoint's folder, got {folder}"):
        goes_on_from(folder)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("wrote", [0, 2, 3])
def test_another_number_of_processes_is_refused(goes_on_from, tmp_path, wrote, by_name):
    folder = checkpoint(tmp_path / "run" / "checkpoint-8", processes=wrote)
    words = f"{folder} was written by {wrote} processes, this run has 1: start {wrote}"
    with pytest.raises(InputError, match=words):
        goes_on_from(str(folder) if by_name else True)


@pytest.mark.parametrize(
    ("file", "instead", "words"),
    [
        ("optimizer.pt", "other.pt", r"holds no optimizer \(as by save_only_model\): it cannot be resumed"),
        ("adapter_model.safetensors", "adapter_model.bin", "holds no adapter_model.safetensors: it cannot be resumed"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(goes_on_from, tmp_path, file, instead, words):
    """Nor are weights read that are no safetensors."""
    folder = checkpoint(tmp_path / "run" / "checkpoint-8")
    (folder / file).rename(folder / instead)
    with pytest.raises(InputError, match=f"{folder} {words}"):
        goes_on_from(True)


class Rates(TrainerCallback):
    """The learning rate that each step was made with."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append(optimizer.param_groups[0]["lr"])


class OneCycle:
    """The trainer of these tests with torch's schedule, which keeps its length in its state."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        steps = num_training_steps + 1
        self.lr_scheduler = OneCycleLR(self.optimizer.optimizer, self.args.learning_rate, steps, cycle_momentum=False)
        self._created_lr_scheduler = True
        return self.lr_scheduler


@pytest.fixture
def rates(build):
    """The rates of a run's steps."""

    def run(steps, resume=False, one_cycle=False, **settings):
        watch = Rates()
        trainer = build(losses=[1] * steps, limit=None, callbacks=[watch], **{"learning_rate": 0.1, **settings})
        if one_cycle:
            trainer.__class__ = type("Cycled", (OneCycle, type(trainer)), {})
        trainer.train(resume_from_checkpoint=resume)
        return watch.seen

    return run


SCHEDULES = [
    {"one_cycle": True},
    *[{"lr_scheduler_type": kind} for kind in ("constant", "linear", "cosine", "inverse_sqrt", "polynomial")],
    {"lr_scheduler_type": "linear", "warmup_steps": 2},
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.01}},
    {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}},
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: next(iter(s.values())))
def test_a_run_that_is_given_more_steps_has_the_schedule_of_its_new_length(rates, tmp_path, schedule):
    """From its first step on, which Trainer would still make at the old schedule's rate."""
    whole = rates(7, output_dir=str(tmp_path / "whole"), **schedule)
    begun = rates(3, **schedule)
    assert rates(7, resume=True, **schedule) == whole[3:]
    assert len(whole) == 7 and len(begun) == 3
    assert schedule == {"lr_scheduler_type": "constant"} or len(set(whole)) > 1


def test_a_resumed_run_has_the_rate_that_it_is_given(rates):
    """Trainer would keep the old one without a word."""
    assert rates(2, lr_scheduler_type="constant") == [0.1, 0.1]
    assert rates(4, resume=True, lr_scheduler_type="constant", learning_rate=0.5) == [0.5, 0.5]


def test_what_evaluations_made_of_the_rate_is_gone_on_with(rates):
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5}}
    assert rates(3, **plateau) == [0.1, 0.1, 0.05]
    assert rates(5, resume=True, **plateau) == [0.025, 0.0125]


def test_a_schedules_least_rate_counts_in_learning_rate(build, monkeypatch):
    """Transformers takes the optimizer's default rate for it."""
    trainer = build(learning_rate=0.5)
    assert trainer.adamw((list(trainer.model.parameters()), 0.5)).defaults["lr"] == 0.5


def test_a_checkpoint_beyond_the_last_step_is_refused(build, tmp_path):
    build(losses=[1] * 4).train()
    again = build(losses=[1] * 3)
    with pytest.raises(
        InputError, match=r"checkpoint-4 is past this run's last step, 3: raise max_steps or num_train_ep"
    ):
        again.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("push", [False, True])
def test_at_the_end_what_is_kept_is_loaded_and_then_pushed(build, monkeypatch, push):
    trainer = build(losses=(1,), push_to_hub=push, hub_model_id="me/line")
    done, root = trainer.done, Path(trainer.args.output_dir)
    monkeypatch.setattr(h2s.run.checkpoints, "check_push", lambda settings, *of: done.append(of))
    monkeypatch.setattr(
        h2s.run.checkpoints, "push_folders", lambda folders, *rest: [done.append((folders, names(root)))]
    )
    trainer.train()
    if not push:
        assert done == ["kept"]
        return
    checked, kept, (folders, there) = done
    assert (checked, kept, folders) == (("makers/line", "run"), "kept", {root: "me/line"})
    assert {"adapter_model.safetensors", "README.md"} <= there


def test_the_callers_arguments_stay_as_they_are(build, monkeypatch):
    """Trainer itself would push the whole folder, and delete by its own limit."""
    given = []
    plain = h2s.run.checkpoints.copy.copy
    monkeypatch.setattr(h2s.run.checkpoints.copy, "copy", lambda args: (given.append(args), plain(args))[1])
    trainer = build(push_to_hub=True, limit=3)
    (args,) = [g for g in given if isinstance(g, TrainingArguments)]
    assert (args.push_to_hub, args.save_total_limit) == (True, 3)
    assert (trainer.args.push_to_hub, trainer.args.save_total_limit) == (False, None)


def test_a_process_that_sees_several_devices_is_refused(build, monkeypatch):
    """Trainer would spread a batch over them by DataParallel, which no prefix survives."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(InputError, match="one process sees 2 CUDA devices: start it with accelerate launch"):
        build()


# What is kept


def test_rotation_keeps_the_newest_and_the_best(build, tmp_path):
    trainer = build()
    kept = []
    rotate = trainer._publish
    trainer._publish = lambda written, final: (rotate(written, final), kept.append(names(final.parent)))
    trainer.train()
    numbers = [{int(n.rsplit("-", 1)[1]) for n in at} for at in kept]
    assert numbers == [{1}, {2}, {2, 3}, {2, 4}, {2, 5}]
    assert names(tmp_path / "run") == {"checkpoint-2", "checkpoint-5"}  # also at the end
    state = json.loads((tmp_path / "run" / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "run" / "checkpoint-2")
    assert state["best_metric"] == 1 and state["best_global_step"] == 2
    assert not list(tmp_path.rglob("training_args.bin"))


def test_the_only_checkpoint_stays_until_the_next_is_whole(build, tmp_path, monkeypatch):
    """At the rename itself both are there; before it, the old one."""
    trainer = build(losses=(2, 1))
    seen = []
    publish = trainer._publish
    trainer._publish = lambda written, final: (seen.append(names(final.parent)), publish(written, final))
    trainer.train()
    assert seen == [{"unfinished-checkpoint"}, {"unfinished-checkpoint", "checkpoint-1"}]


def test_a_finished_run_that_is_resumed_makes_no_further_step(build, tmp_path):
    """Its last step lies within an epoch: five steps of an epoch of three."""
    build().train()
    again = build()
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    assert again.state.global_step == 5
    assert names(tmp_path / "run") == {"checkpoint-2", "checkpoint-5"}


def test_what_is_no_number_is_never_the_best(build):
    trainer = build()
    with pytest.raises(RunError, match="eval_loss is nan: no adapter can be chosen by it"):
        trainer.is_best({"eval_loss": float("nan")})
    assert trainer.is_best({"eval_loss": 5.0})


@pytest.mark.parametrize(("greater", "values"), [(False, [3, 1, 1, 2, 0.5]), (True, [3, 5, 5, 4, 6])])
def test_best_is_what_beats_all_before_it(build, greater, values):
    trainer = build(greater_is_better=greater)
    found = []
    for value in values:
        found.append(trainer.is_best({"eval_loss": value}))
        if found[-1]:
            trainer.state.best_metric = value
    assert found == [True, True, False, False, True]


def test_the_best_replaces_what_lies_at_the_runs_root(build, tmp_path):
    run = tmp_path / "run"
    trainer = build()
    run.mkdir(exist_ok=True)
    for name in ("adapter_model.safetensors", "train.log"):
        (run / name).write_text("before", encoding="utf-8")
    trainer.save_best()
    assert names(run) == {"adapter_model.safetensors", "train.log", "README.md"}
    assert (run / "train.log").read_text(encoding="utf-8") == "before"
    assert (run / "adapter_model.safetensors").read_bytes() != b"before"
