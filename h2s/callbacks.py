"""What the runs add to Trainer's loop."""

import torch
from accelerate.utils import gather
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from h2s.errors import RunError, Terminated
from h2s.exits import stop_request
from h2s.prefix import soft_prefix
from h2s.run_folder import logger


class PrefixGradientCheck(TrainerCallback):
    """Stops a run whose prefix gets no gradient at the first step, and one whose gradient is no longer a number."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Look before each step: after it a checkpoint might hold what nothing can be learned from."""
        gradient = soft_prefix(model).grad
        if state.global_step == 0 and (gradient is None or not gradient.any()):
            raise RunError("the prefix has no gradient at the first step: only the head would be trained")
        if not all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None):
            raise RunError(f"the gradient of step {state.global_step + 1} is not finite: lower learning_rate")


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


# What the hard prompt has over itself: a run that only ever loses against it has no better evaluation to fall from.
HARD_PROMPT_EVALUATION = {
    "step": 0,
    "eval_reward_difference": 0.0,
    "eval_judge_difference": 0.0,
    "eval_judge_difference_low": 0.0,
    "eval_judge_difference_high": 0.0,
}


def over_optimised(log_history: list[dict]) -> tuple[dict, dict] | None:
    """Whether the last evaluation has more of the reward and less of the judge than the one the judge liked best.

    That is over-optimisation: the policy has found what the reward mistakes for good (Gao et al., arXiv 2210.10760).
    The hard prompt counts as an evaluation at step 0.

    Returns:
        The log lines of the judge's favourite and of the last evaluation; None if there is nothing to say.
    """
    evaluations = [line for line in log_history if "eval_judge_difference" in line]
    if not evaluations:
        return None
    last = evaluations[-1]
    best = max([*evaluations[:-1], HARD_PROMPT_EVALUATION], key=lambda line: line["eval_judge_difference"])
    rises = last["eval_reward_difference"] > best["eval_reward_difference"]
    return (best, last) if rises and last["eval_judge_difference"] < best["eval_judge_difference"] else None


class OverOptimisation(TrainerCallback):
    """Says so when the reward rises and the judge falls."""

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """One line in the log, with the judge's intervals: a small fall may be chance."""
        found = over_optimised(state.log_history)
        if found is not None and state.is_world_process_zero:
            best, last = found
            # The starting prefix is evaluated by eval_on_start, and never kept.
            chosen_by = "eval_" + args.metric_for_best_model.removeprefix("eval_")
            kept = (max if args.greater_is_better else min)(
                (e for e in state.log_history if chosen_by in e and e["step"] > 0), key=lambda e: e[chosen_by]
            )
            logger.warning(
                "over-optimisation: since step %d the reward rose from %+.3f to %+.3f and the judge fell from %s to %s;"
                " the adapter of step %d is kept",
                best["step"],
                best["eval_reward_difference"],
                last["eval_reward_difference"],
                *(
                    f"{e['eval_judge_difference']:+.3f} [{e['eval_judge_difference_low']:+.3f}, "
                    f"{e['eval_judge_difference_high']:+.3f}]"
                    for e in found
                ),
                kept["step"],
            )


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
