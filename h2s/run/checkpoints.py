"""Checkpoints that are whole or not there, and what runs add to Trainer's loop."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, rotate_checkpoints

from h2s.errors import InputError, RunError, Terminated
from h2s.run.folder import logger, stop_request

TRAINER_STATE_NAME = "trainer_state.json"


UNFINISHED, UNFINISHED_ADAPTER = "unfinished-checkpoint", "unfinished-adapter"


PICKLED_ARGUMENTS = "training_args.bin"


class WholeCheckpoints(Trainer):
    """A Trainer whose checkpoints appear by a rename, after every process has written its part of them.

    Trainer writes a checkpoint file by file into its final folder: a kill in between leaves one that looks complete.
    It has no hook for writing elsewhere, so the method that writes is overridden here.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # What is deleted is decided here: Trainer's own, at its end, deletes the newest file by file if limited to 1.
        self.kept, self.args.save_total_limit = self.args.save_total_limit, None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Not one step more than there are: Trainer counts them after a step, so a finished run would make another."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model, trial) -> None:
        run = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            clear_unfinished(run)
        self.accelerator.wait_for_everyone()
        with _told(run / name):
            self.args.output_dir = str(run / UNFINISHED)  # Trainer derives every path from it
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = str(run)
            self.accelerator.wait_for_everyone()  # each process has written its random state
            best = run / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best) if best.is_dir() or best.name == name else None
            self.accelerator.wait_for_everyone()  # each process has looked
            if self.args.should_save:
                self._publish(run / UNFINISHED / name, run / name)
        self.accelerator.wait_for_everyone()

    def _publish(self, written: Path, final: Path) -> None:
        self.state.save_to_json(str(written / TRAINER_STATE_NAME))
        # Trainer pickles its arguments; recipe.yaml says the same and can be trusted.
        (written / PICKLED_ARGUMENTS).unlink(missing_ok=True)
        publish(written, final)
        shutil.rmtree(written.parent)
        rotate_checkpoints(
            output_dir=str(final.parent),
            save_total_limit=self.kept,
            best_model_checkpoint=self.state.best_model_checkpoint,
        )

    def is_best(self, metrics: dict[str, float]) -> bool:
        """Whether an evaluation beats all before it."""
        name = "eval_" + str(self.args.metric_for_best_model).removeprefix("eval_")
        value, best = metrics[name], self.state.best_metric
        self.check_finite(f"{name} is {value}: no adapter can be chosen by it", torch.tensor(value))
        return best is None or (value > best if self.args.greater_is_better else value < best)

    def save_best(self) -> None:
        """Replace what lies at the run's root, file by file: a kill leaves each of them whole."""
        root = Path(self.args.output_dir)
        with _told(root):
            self.save_model(str(root / UNFINISHED_ADAPTER), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish_files(root / UNFINISHED_ADAPTER, root)

    def check_finite(self, problem: str, *tensors: torch.Tensor) -> None:
        """End the run on every process if one of them holds what is no number, before a checkpoint can hold it.

        Raises:
            RunError: it is so.
        """
        finite = torch.stack([t.isfinite().all() for t in tensors]).all()
        if not self.accelerator.gather(finite.int().to(self.args.device)).all():
            raise RunError(problem)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Say what could not be written and how much room there is: torch's and safetensors' own errors do not."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(path.parent).free / 2**20
        raise OSError(f"{path} could not be written ({error}), {free:.0f} MB are free there") from error


def publish(written: Path, final: Path) -> None:
    """Rename a folder once the disk holds all that is in it; one that is there already makes room for it."""
    for path in [*written.rglob("*"), written]:
        _sync(path)
    if final.exists():
        final.rename(written.parent / "replaced")
    written.rename(final)
    _sync(final.parent)


def publish_files(written: Path, folder: Path) -> None:
    """Move each file of a folder into another, replacing those of the same name; each is whole at any time."""
    for file in sorted(written.iterdir()):
        _sync(file)
        file.replace(folder / file.name)
    written.rmdir()
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def clear_unfinished(folder: Path) -> None:
    """Delete what a run was writing when it ended."""
    for name in (UNFINISHED, UNFINISHED_ADAPTER):
        shutil.rmtree(folder / name, ignore_errors=True)


def checkpoint_to_resume(args: TrainingArguments, folder: Path) -> str | None:
    """The checkpoint of the most steps in `folder` if the run resumes; None, and a line that says so, without one.

    Raises:
        InputError: another number of processes wrote it: their random states and shares of the data do not fit.
    """
    if not args.resume_from_checkpoint:
        return None
    if args.should_save:
        clear_unfinished(folder)
    # A folder of this name is complete; one that is being written has another.
    found = sorted(folder.glob("checkpoint-*"), key=lambda f: int(f.name.rsplit("-", 1)[1]))
    if not found:
        logger.info("no checkpoint in %s yet: starting over", folder)
        return None
    wrote = len(list(found[-1].glob("rng_state*.pth")))
    if wrote != args.world_size:
        raise InputError(f"{found[-1]} was written by {wrote} processes, this run has {args.world_size}: start {wrote}")
    args.eval_on_start = False  # this is not the start
    logger.info("going on from %s", found[-1])
    return str(found[-1])


class ReadableLog(TrainerCallback):
    """Writes each of Trainer's log lines to `train.log` in words and rounded numbers (the terminal has its own)."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """One line."""
        parts = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in (logs or {}).items()]
        logger.info("step %d: %s", state.global_step, "  ".join(parts), extra={"file_only": True})


class EvaluateLastStep(TrainerCallback):
    """The last iteration is always evaluated, unless evaluations are off."""

    def on_step_end(self, args, state, control, **kwargs):
        """Ask for an evaluation after the last step."""
        if state.global_step >= state.max_steps and args.eval_strategy != IntervalStrategy.NO:
            control.should_evaluate = True


class StopOnSigterm(TrainerCallback):
    """Saves at the end of the step in which a SIGTERM came to any process, and ends the run there."""

    def __init__(self):
        self.stopping = False

    def on_train_begin(self, args, state, control, **kwargs):
        """From here on there is something to save."""
        stop_request.can_wait = True

    def on_step_end(self, args, state, control, **kwargs):
        """All processes stop together: a scheduler may signal one of them first."""
        came = torch.tensor([stop_request.came_at is not None], dtype=torch.int, device=args.device)
        self.stopping = bool(gather(came).any())
        # What is due at an epoch's end, an evaluation say, comes before the checkpoint of its last step.
        control.should_save |= self.stopping and state.epoch % 1 != 0

    def on_epoch_end(self, args, state, control, **kwargs):
        """The rest of the above."""
        control.should_save |= self.stopping

    def on_save(self, args, state, control, **kwargs):
        """What was asked for is done."""
        if self.stopping:
            raise Terminated

    def on_train_end(self, args, state, control, **kwargs):
        """It came too late for a step to see it; the last checkpoint holds all."""
        stop_request.can_wait = False
        if stop_request.came_at is not None:
            raise Terminated


class LogBeforeSaving(TrainerCallback):
    """No log line spans a checkpoint: what it would be the mean of is in no checkpoint. To be the last callback."""

    def on_step_end(self, args, state, control, **kwargs):
        """A save after a step."""
        control.should_log |= control.should_save

    def on_epoch_end(self, args, state, control, **kwargs):
        """A save after an epoch."""
        control.should_log |= control.should_save
