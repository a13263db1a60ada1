"""Stage 2: single-step PPO on a soft prefix, as a transformers Trainer.

One Trainer step is one PPO iteration. A textbook's PPO (Schulman et al. 2017) has an action a token and a critic at
each; here the whole response is one action with one reward, one value (of the context) and one advantage, and only the
prefix and the value head move. The updates of an iteration are made inside `training_step`, which then leaves no
gradient behind: the loop's own `optimizer.step()` moves nothing, and its schedule advances once an iteration. So a
checkpoint always lies between iterations.
"""

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from torch.optim.lr_scheduler import OneCycleLR
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl.models import unwrap_model_for_generation

from h2s.errors import InputError, RunError
from h2s.ppo.config import SingleStepPPOConfig
from h2s.ppo.contexts import as_columns, check_run, encode_contexts, selection_metric
from h2s.ppo.evaluation import EvaluatedPolicy
from h2s.ppo.iteration_log import IterationLog
from h2s.ppo.loss import (
    approx_kl_per_token,
    explained_variance,
    k3_per_token,
    kl_to_reference,
    masked_mean,
    policy_loss,
    value_loss,
    whiten,
)
from h2s.ppo.policy import PolicyWithValueHead, Rollout
from h2s.prefix.adapter import soft_prefix
from h2s.prefix.generation import Batch, Sampling
from h2s.prefix.policy_model import PrefixTuningPolicyModel
from h2s.reward.functions import RewardFunction, RewardFunctions, reward_columns
from h2s.run.checkpoints import ChooseAnewElsewhere, EvaluateLastStep, LogBeforeSaving

logger = logging.getLogger(__name__)

VALUE_WARMUP_UPDATES = 20
REMEDY = "lower learning_rate or raise kl_coef"
# How far the first pass's ratio may lie from 1: float32 sums differ by 1e-5, bf16 ones by more.
RATIO_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2}
NOT_PREFIX = (
    "peft_config is not taken: a new prefix would be random, with no prompt behind it and none in its reference. Give "
    "PrefixTuningPolicyModel.from_hard_prompt(…), which begins as the prompt, or an adapter made by it"
)


class SingleStepPPOTrainer(EvaluatedPolicy):
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

    The best prefix so far lies at the root of `args.output_dir` at any time; the starting prefix is never a candidate.
    After `train()` the policy holds the one that is kept: the best, or the last where nothing is evaluated.

    Args:
        model: the policy, or the folder or Hub name of its adapter. The hard prompt is its reference.
        reward_funcs: one or a list of functions of TRL's signature, `RewardModel`s and reward adapters, weighted by
            `args.reward_weights`. A reward may return None and so leave a reply out.
        args: the settings; `SingleStepPPOConfig()` by default.
        train_dataset: contexts with a column `prompt`: messages, or text that is one user message. Further columns are
            handed to the rewards.
        eval_dataset: held-out contexts; they select the best prefix. Needed where `eval_strategy` is not "no".
        processing_class: the policy's own tokenizer, which is the default; no other one can be used.
        judge: a reward that is never trained on: where there is one, it selects the best prefix, and a run whose reward
            rises while the judge falls says so.
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
        if peft_config is not None:
            raise InputError(NOT_PREFIX)
        args = copy.copy(args) if args is not None else SingleStepPPOConfig()
        if isinstance(model, (str, Path)):
            model = PrefixTuningPolicyModel.from_pretrained(model, device=args.device)
        if not isinstance(model, PrefixTuningPolicyModel):
            raise InputError(f"model must be a PrefixTuningPolicyModel or an adapter, got a {type(model).__name__}")
        if processing_class is not None and processing_class.chat_template != model.tokenizer.chat_template:
            raise InputError(
                "processing_class is not the policy's tokenizer: its chat template would print what the prefix holds; "
                "leave it out, or give policy.tokenizer"
            )
        self.policy = self.adapter = model
        self.rewards = RewardFunctions(reward_funcs, args.reward_weights)
        self.scorers = {"reward": self.rewards}
        if judge is not None:
            self.scorers["judge"] = RewardFunctions(judge)
        check_run(args, train_dataset, eval_dataset, self.scorers)
        for scorer in self.scorers.values():  # now, not at the first call: it draws random numbers
            scorer.load(args.device)
        length = args.max_completion_length
        train_dataset = encode_contexts(train_dataset, "train_dataset", self.policy, length)
        if eval_dataset is not None:
            eval_dataset = encode_contexts(eval_dataset, "eval_dataset", self.policy, length)
        args.metric_for_best_model = selection_metric(args, self.scorers)
        self.sampling = Sampling(args.max_completion_length, args.temperature)
        self.optimizer: Any  # a torch optimizer, then Accelerate's wrapper of it
        self.policy.add_hard_prompt()
        # Loading draws random numbers: what was loaded here, and what before, makes no difference to the value head.
        set_seed(args.seed)
        super().__init__(
            model=PolicyWithValueHead(self.policy.model, args.temperature),
            args=args,
            data_collator=as_columns,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self.policy.tokenizer,
            callbacks=[*(callbacks or []), ChooseAnewElsewhere(), EvaluateLastStep(), LogBeforeSaving()],
        )
        self.iterations = IterationLog(self.accelerator, self.rewards.names)

    # ---- what is trained ----

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with two groups: the prefix and the value head, each with its own learning rate."""
        head = list(self.model.value_head.parameters())
        prefix = [soft_prefix(self.policy.model)]
        self.optimizer = self.adamw((prefix, self.args.learning_rate), (head, self.args.value_learning_rate))
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Trainer's schedules, or the one-cycle schedule over the iterations (Smith and Topin, arXiv 1708.07120)."""
        if self.args.one_cycle_pct_start is None:
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler = OneCycleLR(
            self.optimizer.optimizer,  # Accelerate's wrapper is no torch optimizer
            max_lr=[self.args.learning_rate, self.args.value_learning_rate],
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
            self._warm_up_value_head()
        rollout = self._roll_out(inputs)
        if self.accelerator.gather(rollout.returns.isnan()).all():
            return torch.zeros((), device=self.accelerator.device)  # not even Adam's momentum or weight decay moves it
        return self._update(model, rollout)

    def _roll_out(self, inputs: dict[str, list], record: bool = True) -> Rollout:
        args, device = self.args, self.accelerator.device
        # 1. Sample a completion a prompt.
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator):
            completions = self.policy.complete(inputs["prompt_ids"], self.sampling)
        batch = Batch.from_rows(self.processing_class, inputs["prompt_ids"], completions, device)
        mask = batch.completion_mask  # (B, T)

        # 2. Score the texts.
        texts = [self.policy.decode(completion) for completion in completions]
        values = self.rewards(
            inputs["prompt"],
            texts,
            completions,
            reward_columns(inputs),
            self.state,
            self.iterations.log_extra,
            self.iterations.log_metric,
        ).to(device)  # (B, F)
        scores = self.rewards.total(values)  # (B,), NaN where all left the reply out
        everyone = self.accelerator.gather(scores)
        problem = f"the reward of a reply is not finite: {everyone.tolist()}"
        self.check_finite(problem, values.nan_to_num(nan=0.0, posinf=math.inf))
        clipped = scores if args.reward_clip is None else scores.clamp(-args.reward_clip, args.reward_clip)
        unfinished = torch.tensor([c[-1] not in self.policy.stop_ids for c in completions], device=device)

        # 3. Log-probabilities under the policy and under the hard prompt, values of the contexts.
        scored = self.model.score(batch, args.num_mini_batches)

        # 4. The reward that is optimised, and one advantage a response; 0 for one that was left out.
        kl = kl_to_reference(scored.logps, scored.ref_logps, mask)  # (B,)
        self.check_finite(f"the KL to the hard prompt is not finite: {REMEDY}", kl)
        returns = clipped - args.kl_coef * kl - args.missing_eos_penalty * unfinished
        advantages = returns - scored.values
        if args.whiten_advantages:
            together = self.accelerator.gather(advantages)
            advantages = whiten(advantages, together[~together.isnan()])
        advantages = advantages.nan_to_num(nan=0.0)
        lengths = mask.sum(1).float()
        mean_length = self.accelerator.gather(lengths).mean().item()

        if record:
            log = self.iterations
            log.add_rewards(values, everyone)
            log.add("objective/kl", kl)
            log.add("objective/kl_k3_per_token", k3_per_token(scored.logps, scored.ref_logps, mask))
            log.add("objective/returns", returns)
            log.add("policy/entropy", masked_mean(scored.entropy, mask))
            log.add("completions/mean_length", lengths)
            log.add("completions/clipped_ratio", unfinished.float())
            pairs = self.accelerator.gather(torch.stack([scored.values, returns]).T.contiguous())
            log.metrics["val/explained_variance"].append(explained_variance(pairs[:, 0], pairs[:, 1]))
            columns = {
                "prompt": inputs["prompt"],
                "completion": texts,
                "score": scores.tolist(),
                "kl": kl.tolist(),
                "advantage": advantages.tolist(),
            }
            log.write_completions(Path(args.output_dir), self.state.global_step + 1, columns, values)
        self.iterations.forget_extras()
        return Rollout(batch, scored.logps, returns, advantages, mean_length, scored.last_prompt)

    def _update(self, model, rollout: Rollout) -> torch.Tensor:
        """5. Several epochs of clipped updates on the rollout batch."""
        args, losses = self.args, []
        for index, first_pass in self._mini_batches(len(rollout.returns)):
            part = rollout.batch.rows(index)
            mask = part.completion_mask
            old_logps = rollout.old_logps[index, : mask.shape[1]]
            logps, entropy, values = model(part.input_ids, part.attention_mask, mask)
            approx_kl = self.accelerator.reduce(
                approx_kl_per_token(logps, old_logps, mask).mean().detach(), reduction="mean"
            ).item()
            self.iterations.metrics["policy/approxkl"].append(approx_kl)
            # The same number on every rank, so all leave together. The first pass differs by rounding alone.
            if not first_pass and args.target_kl is not None and approx_kl > args.target_kl:
                self.iterations.metrics["policy/early_stop"].append(1.0)
                break
            pg_loss, ratio, clipped = policy_loss(
                logps, old_logps, mask, rollout.advantages[index], args.cliprange, args.ratio_norm, rollout.mean_length
            )
            vf_loss = value_loss(values, rollout.returns[index])
            bonus = (masked_mean(entropy, mask) * ~rollout.returns[index].isnan()).mean()
            loss = pg_loss + args.vf_coef * vf_loss - args.entropy_coef * bonus
            self.check_finite(f"the loss is {loss.item()}: {REMEDY}", loss)
            norm = self._apply(loss)
            if first_pass:
                # Advantages of 0 (a sparse reward, say) have no gradient, and need none.
                self._check_first_pass(ratio, norm, bool(rollout.advantages[index].any()))
            self.iterations.add("policy/clipfrac", clipped.float())
            self.iterations.add("loss/policy", pg_loss.detach())
            self.iterations.add("loss/value", vf_loss.detach())
            losses.append(loss.detach())
        else:  # no break
            if args.target_kl is not None:
                self.iterations.metrics["policy/early_stop"].append(0.0)
        self.check_finite(f"an update broke the prefix: {REMEDY}", *(p for p in model.parameters() if p.requires_grad))
        return torch.stack(losses).mean()

    def _mini_batches(self, rows: int) -> Iterator[tuple[torch.Tensor, bool]]:
        """Row indices of each update, and whether no update of this iteration came before it."""
        first = True
        for _ in range(self.args.num_ppo_epochs):
            order = torch.randperm(rows).to(self.accelerator.device)
            for index in order.tensor_split(self.args.num_mini_batches):  # chunk may give fewer
                yield index, first
                first = False

    def _apply(self, loss: torch.Tensor) -> float:
        """Backward, clip each group by itself, step, leave no gradient (Adam skips what has none).

        Returns:
            The norm of the prefix's gradient before clipping.
        """
        self.accelerator.backward(loss)
        prefix_group, value_group = self.optimizer.param_groups
        largest = self.args.max_grad_norm or math.inf  # 0 is no clipping, as Trainer has it
        norm = float(self.accelerator.clip_grad_norm_(prefix_group["params"], largest))
        self.iterations.metrics["policy/grad_norm"].append(norm)
        self.accelerator.clip_grad_norm_(value_group["params"], largest)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _warm_up_value_head(self) -> None:
        """Fit the value head to a few rollout batches before the prefix moves; it costs no step of the prefix.

        The head alone is run, on what all ranks gathered: they stay equal without DDP.
        """
        args = self.args
        contexts = args.per_device_train_batch_size * args.world_size
        generator = torch.Generator().manual_seed(args.seed)  # the same on every rank, each takes its share
        for _ in range(args.value_warmup_batches):
            chosen = torch.randperm(len(self.train_dataset), generator=generator)[:contexts].tolist()
            rollout = self._roll_out(self.train_dataset[chosen[args.process_index :: args.world_size]], record=False)
            hidden, returns = self.accelerator.gather(rollout.last_prompt), self.accelerator.gather(rollout.returns)
            hidden, returns = hidden[~returns.isnan()], returns[~returns.isnan()]
            if not len(returns):  # rewards left out every reply
                continue
            with torch.no_grad():
                # From 0 the way to the mean would push every unit of the head to one side, where it learns no more.
                self.model.value_head.out.bias.add_((returns - self.model.value_head(hidden)).mean())
            for _ in range(VALUE_WARMUP_UPDATES):
                value_loss(self.model.value_head(hidden), returns).backward()
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)

    def _check_first_pass(self, ratio: torch.Tensor, norm: float, gradient_expected: bool) -> None:
        if self.state.global_step == 0 and norm == 0 and gradient_expected:
            raise RunError("the prefix has no gradient at the first update")
        self.iterations.add("val/ratio", ratio)
        error = (ratio - 1).abs().max().item()
        tolerance = RATIO_TOLERANCE.get(self.policy.model.get_base_model().dtype, 0.2)
        if error > tolerance:
            logger.warning("the first pass's ratio is %.3g away from 1, more than %g", error, tolerance)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of what the iterations recorded since the last line."""
        if "loss" in logs:
            logs.pop("grad_norm", None)  # of the loop's own step, which has no gradient; ours is policy/grad_norm
            logs |= self.iterations.means()
        super().log(logs, start_time)
