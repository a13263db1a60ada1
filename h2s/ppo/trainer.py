"""Stage 2: single-step PPO on a soft prefix, as a transformers Trainer.

One Trainer step is one PPO iteration. A textbook's PPO (Schulman et al. 2017) has an action a token and a critic at
each; here the whole response is one action with one reward, one baseline (the value of its context, or the mean return
of the context's other responses) and one advantage, and only the prefix and the value head move. The updates of an
iteration are made inside `training_step`, which then leaves no gradient behind: the loop's own `optimizer.step()` moves
nothing, and its schedule advances once an iteration. So a checkpoint always lies between iterations.
"""

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import OneCycleLR
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations import TensorBoardCallback

from h2s.data.splits import conversations_in
from h2s.errors import RunError
from h2s.ppo.config import SingleStepPPOConfig
from h2s.ppo.contexts import as_columns, check_run, encode_contexts, selection_metric
from h2s.ppo.iteration_log import Charts, IterationLog, in_words
from h2s.ppo.loss import approx_kl_per_token, masked_mean, policy_loss
from h2s.ppo.rollout import REMEDY, Rollout, SampledPolicy
from h2s.ppo.value_head import ValueHead
from h2s.prefix.adapter import soft_prefix
from h2s.prefix.generation import Sampling
from h2s.prefix.policy_model import PrefixTuningPolicyModel
from h2s.prefix.to_train import policy_to_train
from h2s.reward.functions import RewardFunction, RewardFunctions
from h2s.run.callbacks import ChooseAnewElsewhere, EvaluateLastStep, LogBeforeSaving

logger = logging.getLogger(__name__)

RATIO_TOLERANCE = 1e-3  # the same rows in the same padding are scored alike, in bfloat16 too


class SingleStepPPOTrainer(SampledPolicy):
    """Moves a soft prefix toward what rewards prefer, starting from its hard prompt.

    ```python
    trainer = SingleStepPPOTrainer(
        model=PrefixTuningPolicyModel.from_hard_prompt("embedded:gemma-3-270m", "You keep a conversation going."),
        reward_funcs=lambda completions, **kwargs: [float(c[0]["content"].endswith("?")) for c in completions],
        args=SingleStepPPOConfig(output_dir="outputs/ppo", max_steps=4, max_completion_length=16),
        train_dataset=load_contexts("recipes/sample_data/contexts.json"),
    )
    trainer.train()
    ```

    The step that is ahead so far lies at the root of `args.output_dir` at any time; the starting prefix is never a
    candidate. After `train()` the policy holds the one that is kept: that one, or the last where nothing is evaluated.
    `kept_step()` names it, and says whether it beat the hard prompt.

    Args:
        model: the policy, or the folder or Hub name of its adapter. The hard prompt is its reference.
        reward_funcs: one or a list of functions of TRL's signature, `RewardModel`s and reward adapters, weighted by
            `args.reward_weights`. A reward may return None and so leave a reply out.
        args: the settings; `SingleStepPPOConfig()` by default.
        train_dataset: contexts with a column `prompt`: messages, or text that is one user message. Further columns are
            handed to the rewards.
        eval_dataset: held-out contexts; they select the step that is kept. Needed where `eval_strategy` is not "no".
        processing_class: the policy's own tokenizer, which is the default; no other one can be used.
        judge: a reward that is never trained on: where there is one, it selects the step that is kept, and a run whose
            reward rises while the judge falls says so.
        callbacks: further Trainer callbacks.
        peft_config: refused, with the reason.

    Attributes:
        policy: the `PrefixTuningPolicyModel` that is trained.
        scorers: what evaluations are scored by: `reward`, and `judge` if there is one.

    Raises:
        InputError: something of the above cannot be used.
    """

    check = staticmethod(check_run)  # before weights load, if the caller has them still to load

    def __init__(
        self,
        model: PrefixTuningPolicyModel | str | Path,
        reward_funcs: RewardFunctions | RewardFunction | str | Path | Sequence[RewardFunction | str | Path],
        args: SingleStepPPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        judge: RewardFunctions | RewardFunction | str | Path | None = None,
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any = None,
    ):
        args = copy.copy(args) if args is not None else SingleStepPPOConfig()
        self.policy = self.adapter = policy_to_train(model, processing_class, peft_config, args.device)
        self.rewards = RewardFunctions(reward_funcs, args.reward_weights)
        self.scorers = {"reward": self.rewards}
        if judge is not None:
            self.scorers["judge"] = RewardFunctions(judge)
        check_run(args, train_dataset, eval_dataset, self.scorers)
        for scorer in self.scorers.values():  # now, not at the first call: it draws random numbers
            scorer.load(args.device)
        train_dataset = encode_contexts(train_dataset, "train_dataset", self.policy, args.max_completion_length)
        if eval_dataset is not None:
            cap = args.compared_completion_length
            eval_dataset = encode_contexts(eval_dataset, "eval_dataset", self.policy, cap)
        # What made its rewards and its judge made it too.
        seen = [*conversations_in(train_dataset, eval_dataset), *(c for s in self.scorers.values() for c in s.seen)]
        self.policy.prefix = self.policy.prefix.having_seen(seen)
        args.metric_for_best_model = selection_metric(args, self.scorers)
        self.sampling = Sampling(
            args.max_completion_length, args.temperature, cache_implementation=args.cache_implementation
        )
        self.compared_sampling = replace(self.sampling, max_completion_length=args.compared_completion_length)
        self.optimizer: Any  # a torch optimizer, then Accelerate's wrapper of it
        self.policy.add_hard_prompt()
        # Loading draws random numbers: what was loaded here, and what before, makes no difference to the value head.
        set_seed(args.seed)
        hidden_size = self.policy.model.get_base_model().config.get_text_config().hidden_size
        self.value_head = ValueHead(hidden_size).to(args.device)
        super().__init__(
            model=self.policy.module,
            args=args,
            data_collator=as_columns,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self.policy.tokenizer,
            callbacks=[*(callbacks or []), ChooseAnewElsewhere(), EvaluateLastStep(), LogBeforeSaving()],
        )
        self.iterations = IterationLog(self.accelerator, self.rewards.names)
        if (plain := self.pop_callback(TensorBoardCallback)) is not None:
            self.add_callback(Charts(self.iterations, plain.tb_writer))

    # ---- what is trained ----

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW on the prefix; the value head has its own."""
        self.optimizer = self.adamw(([soft_prefix(self.policy.model)], self.args.learning_rate))
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Trainer's schedules, or the one-cycle schedule over the iterations (Smith and Topin, arXiv 1708.07120)."""
        if self.args.one_cycle_pct_start is None:
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler = OneCycleLR(
            self.optimizer.optimizer,  # Accelerate's wrapper is no torch optimizer
            max_lr=self.args.learning_rate,
            total_steps=num_training_steps + 1,
            pct_start=self.args.one_cycle_pct_start,
            cycle_momentum=False,
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    # ---- one iteration ----

    def training_step(self, model, inputs: dict[str, list], num_items_in_batch=None) -> torch.Tensor:
        """One PPO iteration on the contexts of `inputs`; returns its mean loss, with no gradient left behind."""
        model.eval()  # no dropout: the first pass must score what was sampled
        if self.state.global_step == 0:
            # Ranks hold different contexts: they shall not draw the same random numbers for them.
            set_seed(self.args.seed, device_specific=True)
            self._warm_up()
        rollout = self._roll_out(model, inputs)
        if self.accelerator.gather(rollout.returns.isnan()).all():
            return torch.zeros((), device=self.accelerator.device)  # not even Adam's momentum or weight decay moves it
        loss = self._update(model, rollout)
        self._fit_value_head(rollout.last_prompt, rollout.returns)
        return loss

    def _update(self, model, rollout: Rollout) -> torch.Tensor:
        """Several epochs of clipped updates on the rollout's mini-batches."""
        args, log, losses = self.args, self.iterations, []
        for number, part in enumerate(rollout.parts * args.num_ppo_epochs):
            self.terminal.doing(f"update {number + 1} of {args.updates}")
            logps, entropy = part.logps, part.entropy  # with their graph, where this is the only update
            if args.updates > 1:
                logps, entropy = model(*part.batch, args.temperature)
            approx_kl = self.accelerator.reduce(
                approx_kl_per_token(logps, part.old_logps, part.mask).mean().detach(), reduction="mean"
            ).item()
            log.metrics["policy/approxkl"].append(approx_kl)
            # The same number on every rank, so all leave together. Before the first update nothing has moved.
            if number > 0 and args.target_kl is not None and approx_kl > args.target_kl:
                log.metrics["policy/early_stop"].append(1.0)
                break
            advantages = rollout.advantages[part.rows]
            loss, ratio, clipped = policy_loss(
                logps, part.old_logps, part.mask, advantages, args.cliprange, args.ratio_norm, rollout.mean_length
            )
            log.add("loss/policy", loss.detach())
            learnt_from = ~rollout.returns[part.rows].isnan()
            loss = loss - args.entropy_coef * (masked_mean(entropy, part.mask) * learnt_from).mean()
            self.check_finite(f"the loss is {loss.item()}: {REMEDY}", loss)
            norm = self._apply(loss)
            if number == 0:
                # Advantages of 0 (a sparse reward, say) have no gradient, and need none.
                self._check_first_update(ratio, norm, bool(advantages.any()))
            log.add("clip_ratio/region_mean", clipped.float())
            losses.append(loss.detach())
        else:  # no break
            if args.target_kl is not None:
                log.metrics["policy/early_stop"].append(0.0)
        self.check_finite(f"an update broke the prefix: {REMEDY}", soft_prefix(self.policy.model))
        return torch.stack(losses).mean()

    def _apply(self, loss: torch.Tensor) -> float:
        """Backward, clip, step, leave no gradient (Adam skips what has none).

        Returns:
            The norm of the prefix's gradient before clipping.
        """
        self.accelerator.backward(loss)
        largest = self.args.max_grad_norm or math.inf  # 0 is no clipping, as Trainer has it
        norm = self.accelerator.clip_grad_norm_([soft_prefix(self.policy.model)], largest)
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        self.iterations.metrics["grad_norm"].append(norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _check_first_update(self, ratio: torch.Tensor, norm: float, gradient_expected: bool) -> None:
        if self.state.global_step == 0 and norm == 0 and gradient_expected:
            raise RunError("the prefix has no gradient at the first update")
        self.iterations.add("policy/ratio", ratio)
        error = (ratio - 1).abs().max().item()
        if error > RATIO_TOLERANCE:
            logger.warning("the first update's ratio is %.3g away from 1, more than %g", error, RATIO_TOLERANCE)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of what the iterations recorded since the last line."""
        if "loss" in logs:
            logs.pop("grad_norm", None)  # of the loop's own step, which has no gradient
            logs |= self.iterations.means()
        super().log(logs, start_time)
        if "loss" in logs and self.args.log_completions and self.is_world_process_zero():
            self.iterations.print_completions(self.state.global_step, self.args.num_completions_to_print)

    def short_line(self, logs: dict[str, float]) -> str | None:
        """Reward, KL, length; of an evaluation soft against hard."""
        return in_words(logs)
