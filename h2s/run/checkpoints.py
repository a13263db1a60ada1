"""Checkpoints that are whole or not there, and how a run resumes from them."""

import copy
import logging
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK, OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import IntervalStrategy, TrainOutput, rotate_checkpoints

from h2s.errors import InputError, RunError
from h2s.hub import SavedAdapter, check_push, push_folders
from h2s.run.callbacks import OneLinePerLog, OwnPace
from h2s.run.resume import BEGAN_WITH, check_began_with, rows_in_short, settings_to_keep, write_began_with
from h2s.run.whole_files import (
    UNFINISHED,
    UNFINISHED_ADAPTER,
    clear_unfinished,
    publish,
    publish_files,
    told,
)

logger = logging.getLogger(__name__)

TRAINER_STATE_NAME = "trainer_state.json"
WHOLE = StateDictOptions(full_state_dict=True)  # what a process has only a shard of
# What a checkpoint is resumed from. PEFT would take weights of another format, too.
NEEDED = {
    "adapter_model.safetensors": "adapter_model.safetensors",
    "optimizer*": "optimizer (as by save_only_model)",
    BEGAN_WITH: BEGAN_WITH,
}
PICKLED_ARGUMENTS = "training_args.bin"


class WholeCheckpoints(Trainer):
    """A Trainer whose checkpoints appear by a rename, after every process has written its part of them.

    Trainer writes a checkpoint file by file into its final folder: a kill in between leaves one that looks complete.
    It has no hook for writing elsewhere, so the method that writes is overridden here. Nor does anything but the
    adapter go to the Hub: Trainer would upload the whole output folder.
    """

    adapter: SavedAdapter

    def __init__(self, *, args: TrainingArguments, **kwargs: Any):
        check_one_device(args)
        if args.eval_strategy != IntervalStrategy.NO and kwargs.get("eval_dataset") is None:
            asked = IntervalStrategy(args.eval_strategy).value
            raise InputError(f"eval_strategy is {asked}, but there is no eval_dataset: give it one")
        args = copy.copy(args)  # the caller's own stay as they are
        kwargs["callbacks"] = [OwnPace(), *(kwargs.get("callbacks") or [])]
        self.pushes_at_end, args.push_to_hub = args.push_to_hub, False
        super().__init__(args=args, **kwargs)
        self.terminal = OneLinePerLog(self.short_line)
        self.remove_callback(PrinterCallback if args.disable_tqdm else DEFAULT_PROGRESS_CALLBACK)
        self.add_callback(self.terminal)
        # What is deleted is decided here: Trainer's own, at its end, deletes the newest file by file if limited to 1.
        self.kept, self.args.save_total_limit = self.args.save_total_limit, None

    def train(self, resume_from_checkpoint: bool | str | Path | None = None, **kwargs: Any) -> TrainOutput:
        """Train; afterwards the model holds the step that is kept, and `push_to_hub: true` pushes it.

        Args:
            resume_from_checkpoint: True for the newest complete checkpoint of `args.output_dir` (the run starts over,
                and says so, where there is none), or the folder of one.
            **kwargs: Trainer's.

        Raises:
            InputError: there is no such checkpoint, another number of processes wrote it, it is not whole, it
                lies beyond this run's last step, or this run has not what it began with; or what is to be pushed
                cannot be.
            PushError: the Hub does not take the adapter, which is saved in `args.output_dir`.
        """
        if self.pushes_at_end:
            check_push(self.args, self.adapter.base_model, Path(self.args.output_dir).name)
        self.beginning, checkpoint = self.began_with(), None
        if resume_from_checkpoint:
            checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        elif any(Path(self.args.output_dir).glob("checkpoint-*")):
            logger.warning("%s holds checkpoints of another run: choose another output_dir", self.args.output_dir)
        try:
            output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
        finally:
            self.terminal.close()
        self.load_kept()
        if self.pushes_at_end:
            self.push_to_hub()
        return output

    def adamw(self, *groups: tuple[list[torch.nn.Parameter], float]) -> torch.optim.Optimizer:
        """AdamW by the settings, on parameters with a learning rate of their own.

        By `create_optimizer`, since Trainer takes no optimizer from outside under FSDP.
        """
        args = self.args
        return AdamW(
            [{"params": parameters, "lr": rate} for parameters, rate in groups],
            lr=args.learning_rate,  # transformers' schedules with a least rate count in it
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )

    def short_line(self, logs: dict[str, float]) -> str | None:
        """What the terminal says of a log line: loss and accuracy, of training or of an evaluation."""
        shown, hidden = ("loss", "accuracy", "rewards/accuracies"), "mean_token_accuracy"
        said = [f"{k} {v:.4f}" for k, v in logs.items() if k.endswith(shown) and not k.endswith(hidden)]
        epoch = [f"epoch {logs['epoch']:.2f}"] if "epoch" in logs else []
        return ", ".join(epoch + said) if said else None

    def learnt_from(self, rows: Dataset) -> Sequence[str]:
        """The columns that make a data set another one. Each trainer knows what it uses."""
        raise NotImplementedError

    def began_with(self) -> dict[str, Any]:
        """What a run that resumes this one must have, too."""
        parts = {"train_dataset": self.train_dataset, "eval_dataset": self.eval_dataset}
        data = {n: None if part is None else rows_in_short(part, self.learnt_from(part)) for n, part in parts.items()}
        return settings_to_keep(self.args) | data

    def load_kept(self) -> None:
        """Bring the model to the step that is kept: that at the run's root, or, saved there now, the last one."""
        if self.state.best_metric is None:
            self.save_model()
        else:
            self._load_from_checkpoint(self.args.output_dir)

    def _load_best_model(self) -> None:
        """Trainer's own takes checkpoints for further adapters: `load_kept` does it."""

    def _checkpoint_to_resume(self, asked: bool | str | Path) -> str | None:
        """The checkpoint to go on from, one that this run can go on from.

        Raises:
            InputError: as `train`.
        """
        run = Path(self.args.output_dir)
        if self.args.should_save:
            clear_unfinished(run)
        if asked is True:
            # A folder of this name is complete; one that is being written has another.
            found = sorted(run.glob("checkpoint-*"), key=lambda f: int(f.name.rsplit("-", 1)[1]))
            if not found:
                logger.info("no checkpoint in %s yet: starting over", run)
                return None
            folder = found[-1]
        else:
            folder = Path(str(asked))
            if not (folder / TRAINER_STATE_NAME).is_file():
                raise InputError(f"resume_from_checkpoint must be True or a checkpoint's folder, got {asked}")
        for pattern, what in NEEDED.items():
            if not any(folder.glob(pattern)):
                raise InputError(f"{folder} holds no {what}: it cannot be resumed")
        wrote, have = len(list(folder.glob("rng_state*.pth"))), self.args.world_size
        if wrote != have:
            raise InputError(f"{folder} was written by {wrote} processes, this run has {have}: start {wrote}")
        check_began_with(folder, self.beginning)
        self.args.eval_on_start = False  # this is not the start
        logger.info("resuming from %s", folder)
        return str(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Under FSDP Trainer saves the whole frozen model beside them: here the moments alone, gathered by all."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        moments = get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=WHOLE)
        if self.args.should_save:
            torch.save(moments, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The moments, and the place in this run's own schedule: Trainer keeps old rates, and one cycle its old end."""
        schedule, groups = self.lr_scheduler, self.optimizer.param_groups
        own, settings = dict(vars(schedule)), [{k: v for k, v in g.items() if k != "params"} for g in groups]
        if checkpoint and self.is_fsdp_enabled:
            moments, place = (
                torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
                for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
            )
            set_optimizer_state_dict(self.model, self.optimizer.optimizer, moments, options=WHOLE)
            schedule.load_state_dict(place)
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not isinstance(schedule, LRScheduler) or isinstance(schedule, ReduceLROnPlateau):
            return  # what evaluations have made of the rate is in the checkpoint alone
        step, last = self.state.global_step, self.state.max_steps
        if step > last:
            raise InputError(f"{checkpoint} is past this run's last step, {last}: raise max_steps or num_train_epochs")
        for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(setting)
        vars(schedule).update(own)
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that no optimizer stepped before
            for _ in range(step):
                schedule.step()

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        report: str = "",
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> str | None:
        """Save the adapter and a card with `report` in `args.output_dir`, and upload that and nothing else of the run.

        Every process calls it, as Trainer's own, and the main one pushes. It always waits for the upload; what TRL's
        scripts hand over for TRL's card (`dataset_name`) is not used.

        Returns:
            The repository's URL; None on processes that do not push.

        Raises:
            InputError: the base model is a folder of this machine, so nobody else could load the adapter.
            PushError: the Hub does not take it.
        """
        settings = copy.copy(self.args)
        settings.hub_token, settings.hub_revision = token or settings.hub_token, revision or settings.hub_revision
        folder = Path(settings.output_dir)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.adapter.write_card(folder, report)
        (url,) = push_folders({folder: settings.hub_model_id or folder.name}, settings, commit_message)
        return url

    def create_model_card(self, **kwargs: Any) -> None:
        """Write h2s's card to `args.output_dir`, without TRL's arguments for its own."""
        if self.is_world_process_zero():
            self.adapter.write_card(self.args.output_dir)

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
        with told(run / name):
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
        write_began_with(written, self.beginning)
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

    def keep_if_best(self, metrics: dict[str, float]) -> None:
        """In training: save what was evaluated at the run's root, if it beats all before it. Step 0 is none of them."""
        if self.is_in_train and self.state.global_step > 0 and self.is_best(metrics):
            self.save_best()
            # Trainer's own counts it only where checkpoints are saved.
            self.state.best_global_step = self.state.global_step

    def save_best(self) -> None:
        """Replace what lies at the run's root, file by file: a kill leaves each of them whole."""
        root = Path(self.args.output_dir)
        with told(root):
            self.save_model(str(root / UNFINISHED_ADAPTER), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish_files(root / UNFINISHED_ADAPTER, root)
                self.adapter.write_card(root)  # its example names the folder that it lies in
        self.accelerator.wait_for_everyone()

    def check_finite(self, problem: str, *tensors: torch.Tensor) -> None:
        """End the run on every process if one of them holds what is no number, before a checkpoint can hold it.

        Raises:
            RunError: it is so.
        """
        here = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        finite = torch.stack([t.isfinite().all() for t in here]).all()
        if not self.accelerator.gather(finite.int().to(self.args.device)).all():
            raise RunError(problem)


def check_one_device(args: TrainingArguments) -> None:
    """Check that this process has one device: Trainer would split a batch over several by DataParallel.

    Raises:
        InputError: it sees several.
    """
    if args.n_gpu > 1:
        raise InputError(
            f"one process sees {args.n_gpu} CUDA devices: start it with accelerate launch, or show it one by "
            "CUDA_VISIBLE_DEVICES"
        )
