"""What Trainer leaves open: the last evaluation, log lines before checkpoints, where a resumed run begins."""

import logging
import math
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from h2s.errors import InputError

logger = logging.getLogger(__name__)


class EvaluateLastStep(TrainerCallback):
    """The last iteration is always evaluated, unless evaluations are off."""

    def on_step_end(self, args, state, control, **kwargs):
        """Ask for an evaluation after the last step."""
        if state.global_step >= state.max_steps and args.eval_strategy != IntervalStrategy.NO:
            control.should_evaluate = True


class GoesOnAsItBegan(TrainerCallback):
    """A resumed run whose batches are not those that it began with would learn from some twice, from others never."""

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        """Compare the checkpoint's place in its epoch with the one that its step has here.

        Raises:
            InputError: they differ.
        """
        if state.global_step == 0:
            return
        if state.train_batch_size != args.train_batch_size:
            raise InputError(
                f"per_device_train_batch_size was {state.train_batch_size} when this run began, now it is "
                f"{args.train_batch_size}: go on with the former"
            )
        batches, together = len(train_dataloader), args.gradient_accumulation_steps
        epochs, steps = divmod(state.global_step, math.ceil(batches / together))
        epoch = epochs + steps * together / batches
        if abs(state.epoch - epoch) > 1e-6:
            raise InputError(
                f"step {state.global_step} was epoch {state.epoch:.4g} when this run began, here it is {epoch:.4g}: "
                "go on with the data and the gradient_accumulation_steps that it began with"
            )


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
