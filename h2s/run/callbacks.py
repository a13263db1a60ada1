"""What Trainer leaves open: the last evaluation, readable log lines, the end by a SIGTERM, how a run is resumed."""

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from h2s.errors import Terminated
from h2s.run.terminal import above_bars

logger = logging.getLogger(__name__)


class EvaluateLastStep(TrainerCallback):
    """The last iteration is always evaluated, unless evaluations are off."""

    def on_step_end(self, args, state, control, **kwargs):
        """Ask for an evaluation after the last step."""
        if state.global_step >= state.max_steps and args.eval_strategy != IntervalStrategy.NO:
            control.should_evaluate = True


class OwnPace(TrainerCallback):
    """A resumed run logs, evaluates and saves as its own settings say: Trainer goes on at the checkpoint's pace."""

    def on_train_begin(self, args, state, control, **kwargs):
        """After the checkpoint's state has been read."""
        state.compute_steps(args, state.max_steps)


class ChooseAnewElsewhere(TrainerCallback):
    """A run resumed from another run's checkpoint has that run's best metric, but not its adapter: it chooses anew."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Forget the best step if no adapter lies at the run's root."""
        if state.best_metric is not None and not (Path(args.output_dir) / "adapter_model.safetensors").is_file():
            logger.info("the best step so far is not in %s: choosing among those that follow", args.output_dir)
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None


class LogBeforeSaving(TrainerCallback):
    """No log line spans a checkpoint: what it would be the mean of is in no checkpoint. To be the last callback."""

    def on_step_end(self, args, state, control, **kwargs):
        """A save after a step, or after an epoch."""
        control.should_log |= control.should_save

    on_epoch_end = on_step_end


class ReadableLog(TrainerCallback):
    """Writes each of Trainer's log lines to `train.log` in words and rounded numbers (the terminal has its own)."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """One line."""
        parts = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in (logs or {}).items()]
        logger.info("step %d: %s", state.global_step, "  ".join(parts), extra={"file_only": True})


class StopOnSigterm(TrainerCallback):
    """Saves at the end of the step in which a SIGTERM came to any process, and ends the run there.

    Args:
        request: the run's `StopRequest`.
    """

    def __init__(self, request: Any):
        self.request = request
        self.stopping = False

    def on_train_begin(self, args, state, control, **kwargs):
        """From here on there is something to save."""
        self.request.can_wait = True

    def on_step_end(self, args, state, control, **kwargs):
        """All processes stop together: a scheduler may signal one of them first."""
        came = torch.tensor([self.request.came_at is not None], dtype=torch.int, device=args.device)
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
        self.request.can_wait = False
        if self.request.came_at is not None:
            raise Terminated


class OneLinePerLog(ProgressCallback):
    """Prints one short line where Trainer prints all that it logs, and draws its bar on terminals alone.

    Args:
        words: makes the line of what is logged; None where there is nothing to say.
    """

    def __init__(self, words: Callable[[dict[str, float]], str | None]):
        super().__init__()
        self.words = words

    def on_train_begin(self, args, state, control, **kwargs):
        """The bar begins at a resumed run's step."""
        self.began, self.current_step = (time.monotonic(), state.global_step), state.global_step
        self.training_bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            leave=False,
            dynamic_ncols=True,
            disable=args.disable_tqdm or not state.is_world_process_zero or not sys.stderr.isatty(),
        )

    def on_prediction_step(self, args, state, control, **kwargs):
        """Trainer's bar."""
        if not args.disable_tqdm and sys.stderr.isatty():
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """The line: its step, its words, and after a step of training the time left."""
        logs = logs or {}
        took = logs.get("train_runtime")
        line = self.words(logs) if took is None else f"trained in {tqdm.format_interval(took)}"
        if line is None or not state.is_world_process_zero:
            return
        step, last = state.global_step, state.max_steps
        place = f"step {step:{len(str(last))}} of {last}: " if last > 0 else ""
        left = ""
        if "loss" in logs and step < last:
            began, at = self.began
            left = f", {tqdm.format_interval((time.monotonic() - began) / (step - at) * (last - step))} left"
        with above_bars():
            print(f"{place}{line}{left}", flush=True)

    def doing(self, what: str) -> None:
        """Say beside the bar what a long step is at."""
        if self.training_bar is not None:
            self.training_bar.set_description(what)

    def close(self) -> None:
        """Take the bar away, however the training ended."""
        if self.training_bar is not None:
            self.training_bar.close()
