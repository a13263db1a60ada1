"""What Trainer leaves open: the last evaluation, log lines before checkpoints, what a resumed run has of its own."""

import logging
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

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
