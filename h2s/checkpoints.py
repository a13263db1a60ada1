"""Checkpoints that are whole or not there: written to a folder beside, renamed when complete."""

import os
import shutil
from pathlib import Path

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from h2s.errors import InputError
from h2s.run_folder import logger

TRAINER_STATE_NAME = "trainer_state.json"
UNFINISHED, UNFINISHED_ADAPTER = "unfinished-checkpoint", "unfinished-adapter"
PICKLED_ARGUMENTS = "training_args.bin"


class WholeCheckpoints(Trainer):
    """A Trainer whose checkpoints appear by a rename, after every process has written its part of them.

    Trainer writes a checkpoint file by file into its final folder: a kill in between leaves one that looks complete.
    """

    def _save_checkpoint(self, model, trial) -> None:
        run = Path(self.args.output_dir)
        unfinished, limit = run / UNFINISHED, self.args.save_total_limit
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        # Trainer derives every path from these two; it shall write elsewhere and delete nothing.
        self.args.output_dir, self.args.save_total_limit = str(unfinished), None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir, self.args.save_total_limit = str(run), limit
        self.accelerator.wait_for_everyone()  # each process has written its random state
        name = f"checkpoint-{self.state.global_step}"
        best = run / f"checkpoint-{self.state.best_global_step}"
        self.state.best_model_checkpoint = str(best) if best.is_dir() or best.name == name else None
        self.accelerator.wait_for_everyone()  # each process has looked
        if self.args.should_save:
            self._publish(unfinished / name, run / name)
        self.accelerator.wait_for_everyone()

    def _publish(self, written: Path, final: Path) -> None:
        self.state.save_to_json(str(written / TRAINER_STATE_NAME))
        # Trainer pickles its arguments; recipe.yaml says the same and can be trusted.
        (written / PICKLED_ARGUMENTS).unlink(missing_ok=True)
        shutil.rmtree(final, ignore_errors=True)  # of a run that went on from an earlier checkpoint than this
        publish(written, final)
        shutil.rmtree(written.parent)
        rotate_checkpoints(
            output_dir=str(final.parent),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
        )

    def is_best(self, metrics: dict[str, float]) -> bool:
        """Whether an evaluation beats all before it."""
        value = metrics["eval_" + str(self.args.metric_for_best_model).removeprefix("eval_")]
        best = self.state.best_metric
        return best is None or (value > best if self.args.greater_is_better else value < best)

    def save_best(self) -> None:
        """Replace what lies at the run's root, file by file: a kill leaves each of them whole."""
        root = Path(self.args.output_dir)
        self._save(str(root / UNFINISHED_ADAPTER))
        if self.args.should_save:
            publish_files(root / UNFINISHED_ADAPTER, root)


def publish(written: Path, final: Path) -> None:
    """Rename a folder once the disk holds all that is in it."""
    for path in [*written.rglob("*"), written]:
        _sync(path)
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


def checkpoint_to_resume(args: TrainingArguments, folder: Path) -> str | None:
    """The checkpoint of the most steps in `folder` if the run resumes; None, and a line that says so, without one.

    Raises:
        InputError: another number of processes wrote it: their random states and shares of the data do not fit.
    """
    if not args.resume_from_checkpoint:
        return None
    # A folder of this name is complete; one that is being written has another.
    found = sorted(folder.glob("checkpoint-*"), key=lambda f: int(f.name.rsplit("-", 1)[1]))
    if not found:
        logger.info("no checkpoint in %s yet: starting over", folder)
        return None
    wrote = len(list(found[-1].glob("rng_state*.pth")))
    if wrote != args.world_size:
        raise InputError(f"{found[-1]} was written by {wrote} processes, this run has {args.world_size}: start {wrote}")
    logger.info("going on from %s", found[-1])
    return str(found[-1])
