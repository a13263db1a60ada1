"""How a policy in training is evaluated, and which step of it is kept."""

import logging
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset

from h2s.ppo.contexts import check_columns
from h2s.ppo.value_head import ValueHead
from h2s.prefix.adapter import load_weights
from h2s.prefix.generation import Sampling
from h2s.prefix.policy_model import PrefixTuningPolicyModel
from h2s.prefix.to_train import began_as
from h2s.report.comparison import of_hard_prompt, over_optimisation_line, over_optimised, summarise, unfair_match
from h2s.report.soft_vs_hard import soft_vs_hard
from h2s.reward.functions import RewardFunctions, reward_columns
from h2s.run.checkpoints import WholeCheckpoints

logger = logging.getLogger(__name__)

SELECTS = {"judge_difference": "the judge", "reward_difference": "the reward"}  # what selects by default, in words


class EvaluatedPolicy(WholeCheckpoints):
    """A Trainer of a policy: soft against hard is its evaluation, and the kept prefix lies at the run's root.

    Attributes:
        policy: what is trained.
        scorers: what scores replies: `reward`, and `judge` if there is one.
        sampling: how replies are drawn in training.
        compared_sampling: the same where soft and hard are compared, perhaps with more tokens to end in.
        value_head: the other thing that is trained.
    """

    policy: PrefixTuningPolicyModel
    scorers: dict[str, RewardFunctions]
    sampling: Sampling
    compared_sampling: Sampling
    value_head: ValueHead
    control: Any

    def compare(self, contexts: Dataset) -> pd.DataFrame:
        """Soft against hard on contexts that nothing was chosen by: the table of `soft_vs_hard`, scored as here."""
        size, seed, quiet = self.args.per_device_eval_batch_size, self.args.seed, self.args.disable_tqdm
        return soft_vs_hard(
            self.policy, contexts, self.scorers, self.compared_sampling, size, seed, self.state, progress=not quiet
        )

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Compare soft with hard on held-out contexts; keep the prefix if it is ahead of all before."""
        contexts = self.eval_dataset if eval_dataset is None else eval_dataset
        check_columns(contexts, "eval_dataset")
        table = self.compare(contexts)
        metrics = {f"{metric_key_prefix}_{k}": v for name in self.scorers for k, v in summarise(table, name).items()}
        if not any("eval_contexts" in line for line in self.state.log_history):  # the hard replies are always the same
            self._warn(unfair_match(table))
        verdict = over_optimised([*self.state.log_history, metrics | {"step": self.state.global_step}])
        if "eval_judge_difference" in metrics:
            metrics["eval_over_optimised"] = float(verdict is not None)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.keep_if_best(metrics)
        if verdict is not None:
            self._warn(f"{over_optimisation_line(*verdict)}; the adapter of step {self.state.best_global_step} is kept")
        return metrics

    def learnt_from(self, rows: Dataset) -> list[str]:
        """The prompts, and what rewards are handed."""
        return ["prompt_ids", *reward_columns(rows)]

    def began_with(self) -> dict[str, Any]:
        """Also the prompt, what it is compared with, and the rewards, whose unit is measured at the beginning."""
        args = self.args
        return (
            super().began_with()
            | began_as(self.policy)
            | {
                "rewards": {name: scorer.described() for name, scorer in self.scorers.items()},
                # What soft and hard are compared by: the best step so far could not be compared with others.
                "eval_max_completion_length": args.compared_completion_length,
                "temperature": args.temperature,
                "scale_rewards": args.scale_rewards,
                "value_warmup_batches": args.value_warmup_batches,
            }
        )

    def _warn(self, line: str | None) -> None:
        if line is not None and self.is_world_process_zero():
            logger.warning(line)

    def kept_step(self) -> str:
        """Which step is kept and what chose it, in words; "best" is one that beat the hard prompt on what selects."""
        state, asked = self.state, str(self.args.metric_for_best_model).removeprefix("eval_")
        if state.best_global_step is None:
            return f"Step {state.global_step} of {state.max_steps}, the last, is kept: none was evaluated."
        evaluations = [line for line in state.log_history if "eval_contexts" in line]
        line = next(line for line in evaluations if line["step"] == state.best_global_step)
        metrics = {name.removeprefix("eval_"): value for name, value in line.items()}
        step = f"{state.best_global_step} of {state.max_steps}"
        value = metrics[asked]
        hard, by = of_hard_prompt(asked, metrics), f"{SELECTS.get(asked, asked)} on {metrics['contexts']:.0f} contexts"
        if value > hard if self.args.greater_is_better else value < hard:
            return f"Step {step} is kept, the best one, chosen by {by}."
        return f"No step beat the hard prompt on what selects ({by}): step {step}, which came nearest, is kept."

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter as `policy.save_pretrained` writes it, and the value head; a sharded model is gathered by all."""
        folder, first = Path(output_dir or self.args.output_dir), self.args.should_save
        folder.mkdir(parents=True, exist_ok=True)
        self.policy.save_pretrained(folder, is_main_process=first)
        if first:
            self.value_head.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """The counterpart of `save_model`."""
        load_weights(self.policy.model, resume_from_checkpoint)
        self.value_head.load(resume_from_checkpoint)
