"""Which checkpoint a run goes on from, and which are deleted."""

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

import h2s.run.checkpoints
from h2s.errors import InputError, RunError
from h2s.run.arguments import RewardDatasetArguments, RewardModelArguments, RunArguments
from h2s.run.checkpoints import LogBeforeSaving, WholeCheckpoints, checkpoint_to_resume
from h2s.run.folder import create_run_folder, logger
from h2s.run.recipe import write_recipe


def resuming(world_size: int = 1) -> SimpleNamespace:
    return SimpleNamespace(resume_from_checkpoint=True, should_save=True, world_size=world_size, eval_on_start=True)


def checkpoint(folder, processes: int = 1) -> None:
    folder.mkdir(parents=True)
    for rank in range(processes):
        (folder / f"rng_state_{rank}.pth").touch()


@pytest.fixture
def said(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(logger, "info", lambda text, *values, **kwargs: lines.append(text % values))
    return lines


def test_without_a_complete_checkpoint_a_run_starts_over_and_says_so(tmp_path, said):
    checkpoint(tmp_path / "unfinished-checkpoint" / "checkpoint-8")
    (tmp_path / "unfinished-adapter").mkdir()
    assert checkpoint_to_resume(resuming(), tmp_path) is None
    assert said == [f"no checkpoint in {tmp_path} yet: starting over"]
    assert list(tmp_path.iterdir()) == []  # what was left is gone


def test_the_newest_complete_checkpoint_is_gone_on_from(tmp_path, said):
    # The judge's are another training's.
    for folder in ("checkpoint-8", "checkpoint-16", "unfinished-checkpoint/checkpoint-24", "judge/checkpoint-32"):
        checkpoint(tmp_path / folder)
    args = resuming()
    assert checkpoint_to_resume(args, tmp_path) == str(tmp_path / "checkpoint-16")
    assert said == [f"going on from {tmp_path / 'checkpoint-16'}"]
    assert not args.eval_on_start
    args.resume_from_checkpoint = False
    assert checkpoint_to_resume(args, tmp_path) is None


@pytest.mark.parametrize(("wrote", "now"), [(1, 2), (2, 1)])
def test_another_number_of_processes_is_refused(tmp_path, wrote, now):
    checkpoint(tmp_path / "checkpoint-8", processes=wrote)
    with pytest.raises(InputError, match=f"written by {wrote} processes, this run has {now}: start {wrote}"):
        checkpoint_to_resume(resuming(now), tmp_path)


def test_a_folder_that_exists_is_not_written_over(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train.log").write_text("hours of work", encoding="utf-8")
    with pytest.raises(InputError, match="run exists: choose another run_name, or go on with --resume_from_checkpoint"):
        create_run_folder(str(tmp_path), "run")
    assert create_run_folder(str(tmp_path), "run", resume=True) == tmp_path / "run"
    assert (tmp_path / "run" / "train.log").read_text(encoding="utf-8") == "hours of work"


@pytest.mark.parametrize(
    ("key", "began", "now"),
    [("split_seed", 7, 42), ("test_size", 0.2, 0.3), ("folds", 5, 4), ("judge_share", None, 0.5)],
)
def test_a_run_goes_on_with_the_split_that_it_began_with(tmp_path, key, began, now):
    first = RewardDatasetArguments(path="sheet.xlsx", **{key: began})
    create_run_folder(str(tmp_path), "run", True, first)  # it writes its recipe next
    create_run_folder(str(tmp_path), "run", True, first)  # killed before it did
    write_recipe(tmp_path / "run" / "recipe.yaml", RewardModelArguments(), first, RunArguments())
    create_run_folder(str(tmp_path), "run", True, RewardDatasetArguments(path="moved/sheet.xlsx", **{key: began}))
    with pytest.raises(InputError, match=f"run began with {key} {began}, this run has {now}: go on with"):
        create_run_folder(str(tmp_path), "run", True, RewardDatasetArguments(path="sheet.xlsx", **{key: now}))


@pytest.mark.parametrize("recipe", ["train_policy", "train_reward"])
def test_going_on_with_another_split_is_refused(refused, tmp_path, recipe):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.yaml").write_text("dataset: {split_seed: 9}", encoding="utf-8")
    task = {"output_dir": str(tmp_path), "run_name": "begun", "resume_from_checkpoint": True}
    assert "began with split_seed 9, this run has" in refused(recipe, task=task)
    assert [f.name for f in (tmp_path / "begun").iterdir()] == ["recipe.yaml"]


def test_a_folder_that_cannot_be_made_is_bad_input(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"the run's folder cannot be made .*: choose another output_dir"):
        create_run_folder(str(tmp_path / "file"), "run")


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, labels=None):
        return {"loss": ((self.slope * x - 1) ** 2).mean(), "logits": self.slope * x}


class Scripted(WholeCheckpoints):
    """Evaluations give the losses of a list."""

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_loss": self.losses[self.state.global_step - 1]}
        self.log(dict(metrics))
        return metrics

    def _save(self, output_dir=None, state_dict=None):
        if self.args.should_save:
            os.makedirs(output_dir, exist_ok=True)
            torch.save(self.model.state_dict(), os.path.join(output_dir, "line.pt"))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self.model.load_state_dict(torch.load(os.path.join(resume_from_checkpoint, "line.pt"), weights_only=True))


@pytest.fixture
def build(tmp_path):
    def make(losses=(3, 1, 2, 2, 2), limit: int | None = 1, **settings) -> Scripted:
        args = TrainingArguments(
            **{
                "output_dir": str(tmp_path / "run"),
                "max_steps": len(losses),
                "per_device_train_batch_size": 1,
                "eval_strategy": "steps",
                "eval_steps": 1,
                "save_steps": 1,
                "save_total_limit": limit,
                "metric_for_best_model": "loss",
                "greater_is_better": False,
                "report_to": "none",
                "use_cpu": True,
                "disable_tqdm": True,
            }
            | settings
        )
        rows = Dataset.from_dict({"x": [1.0, 2.0, 3.0]})
        trainer = Scripted(model=Line(), args=args, train_dataset=rows, eval_dataset=rows)
        trainer.losses = losses
        return trainer

    return make


def names(folder) -> set[str]:
    return {f.name for f in folder.iterdir()}


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


def test_a_full_disk_leaves_the_last_checkpoint(build, tmp_path, monkeypatch):
    trainer = build(losses=(2, 1, 1))
    plain = os.fsync

    def full(handle):
        if trainer.state.global_step == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"checkpoint-2 could not be written .*No space left.* MB are free there"):
        trainer.train()
    assert names(tmp_path / "run") == {"checkpoint-1", "unfinished-checkpoint"}
    monkeypatch.undo()
    again = build(losses=(2, 1, 1))
    again.train(resume_from_checkpoint=checkpoint_to_resume(resuming(), tmp_path / "run"))
    assert names(tmp_path / "run") == {"checkpoint-2", "checkpoint-3"}


def test_a_finished_run_that_is_resumed_makes_no_further_step(build, tmp_path):
    """Its last step lies within an epoch: five steps of an epoch of three."""
    build().train()
    again = build()
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    assert again.state.global_step == 5
    assert names(tmp_path / "run") == {"checkpoint-2", "checkpoint-5"}


def test_no_log_line_spans_a_checkpoint(build):
    trainer = build(losses=[1] * 5, logging_steps=2, save_steps=3, eval_strategy="no", max_grad_norm=0.0)
    trainer.add_callback(LogBeforeSaving())
    trainer.train()
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [2, 3, 4, 5]


def test_what_is_no_number_is_never_the_best(build):
    trainer = build()
    with pytest.raises(RunError, match="eval_loss is nan: no adapter can be chosen by it"):
        trainer.is_best({"eval_loss": float("nan")})
    assert trainer.is_best({"eval_loss": 5.0})


def test_the_disk_holds_a_checkpoint_before_its_name_says_so(build, tmp_path, monkeypatch):
    """Every file and the folder itself are synced, then renamed, then the rename is synced."""
    trainer = build(losses=(1,))
    done = []
    plain, rename = h2s.run.checkpoints._sync, Path.rename
    monkeypatch.setattr(h2s.run.checkpoints, "_sync", lambda path: (done.append(path.name), plain(path)))
    monkeypatch.setattr(Path, "rename", lambda path, to: (done.append("renamed"), rename(path, to))[1])
    trainer.train()
    at = done.index("renamed")
    assert set(done[:at]) == names(tmp_path / "run" / "checkpoint-1") | {"checkpoint-1"}
    assert done[at + 1 :] == ["run"]
