"""What the runs add to Trainer's loop."""

from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from h2s.prefix import soft_prefix
from h2s.run_folder import logger


class PrefixGradientCheck(TrainerCallback):
    """Stops a run whose prefix gets no gradient at the first step, which otherwise nobody would notice."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Look at the gradient before the first step."""
        if state.global_step == 0:
            gradient = soft_prefix(model).grad
            if gradient is None or not gradient.abs().sum() > 0:
                raise RuntimeError("the prefix has no gradient at the first step: only the head would be trained")


class SelectByAccuracy(TrainerCallback):
    """Adds `eval_selection`: accuracy, and where it ties (a small part often reaches 1 early) the lower loss."""

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Add the metric before Trainer looks for the best."""
        metrics["eval_selection"] = metrics["eval_accuracy"] - 1e-6 * metrics["eval_loss"]


class ReadableLog(TrainerCallback):
    """Writes each of Trainer's log lines to `train.log` in words and rounded numbers (the terminal has its own)."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """One line."""
        parts = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in (logs or {}).items()]
        logger.info("step %d: %s", state.global_step, "  ".join(parts), extra={"file_only": True})


class DropPickledArguments(TrainerCallback):
    """Trainer pickles its arguments beside every checkpoint; `recipe.yaml` says the same and can be trusted."""

    def on_save(self, args, state, control, **kwargs):
        """Remove what was just pickled."""
        if state.is_world_process_zero:
            for file in Path(args.output_dir).rglob("training_args.bin"):
                file.unlink()


class EvaluateLastStep(TrainerCallback):
    """The last iteration is always evaluated, unless evaluations are off."""

    def on_step_end(self, args, state, control, **kwargs):
        """Ask for an evaluation after the last step."""
        if state.global_step >= state.max_steps and args.eval_strategy != IntervalStrategy.NO:
            control.should_evaluate = True
