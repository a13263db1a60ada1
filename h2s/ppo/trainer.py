"""Stage 2: single-step PPO on a soft prefix, as a transformers Trainer.

One Trainer step is one PPO iteration. A textbook's PPO (Schulman et al. 2017) has an action a token and a critic at
each; here the whole response is one action with one reward, one value (of the context) and one advantage, and only the
prefix and the value head move. The updates of an iteration are made inside `training_step`, which then leaves no
gradient behind: the loop's own `optimizer.step()` moves nothing, and its schedule advances once an iteration. So a
checkpoint always lies between iterations.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate.utils import gather_object, set_seed
from datasets import Dataset
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import IntervalStrategy
from trl.models import unwrap_model_for_generation

from h2s.errors import InputError, RunError
from h2s.ppo.config import SingleStepPPOConfig
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
from h2s.prefix.adapter import load_weights, save_adapter, soft_prefix
from h2s.prefix.chat_template import ChatPrefix
from h2s.prefix.generation import Batch, Sampling, decode, generate, stop_token_ids
from h2s.report.soft_vs_hard import add_scores, answer_both, over_optimised, summarise
from h2s.reward.functions import RewardFunction, score_replies
from h2s.run.checkpoints import EvaluateLastStep, LogBeforeSaving, StopOnSigterm, WholeCheckpoints
from h2s.run.folder import logger


def columns(rows: list[dict[str, Any]]) -> dict[str, list]:
    """Collate contexts: they have nothing to pad before they are answered, so a batch is its columns."""
    return {name: [row[name] for row in rows] for name in ("prompt", "prompt_ids")}


VALUE_WARMUP_UPDATES = 20


REMEDY = "lower learning_rate or raise kl_coef"


# How far the first pass's ratio may lie from 1: float32 sums differ by 1e-5, bf16 ones by more.
RATIO_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2}


def measured_by(judges: Collection[str]) -> list[str]:
    """What an evaluation by these judges is made of: `summarise` is asked, over one context of zeros."""
    sides = [f"{side}_{what}" for side in ("soft", "hard") for what in ("tokens", "finished", *judges)]
    table = pd.DataFrame(0.0, index=[0], columns=["conversation", "kl", *sides])
    return list(dict.fromkeys(key for name in judges for key in summarise(table, name)))


def check_metric(args: SingleStepPPOConfig, judges: Collection[str]) -> None:
    """Whether an evaluation by these judges, if there is any, measures what is to select the best adapter.

    Raises:
        InputError: it does not; the first evaluation would be too late to say so.
    """
    names, name = measured_by(judges), str(args.metric_for_best_model)
    if args.eval_strategy != IntervalStrategy.NO and name.removeprefix("eval_") not in names:
        others = "" if "judge" in judges else "; those of the judge need a judge_adapter"
        raise InputError(f"metric_for_best_model must be one of {', '.join(names)}, got {name}{others}")


class SingleStepPPOTrainer(WholeCheckpoints):
    """Moves a soft prefix toward what a reward prefers, starting from its hard prompt.

    Args:
        model: the policy, with the hard prompt as its second, frozen prefix.
        args: the settings.
        train_dataset: contexts with columns `prompt` (messages) and `prompt_ids` (what is fed after the prefix).
        eval_dataset: held-out contexts, the same columns and `conversation`; they select the best adapter.
        processing_class: the adapter's tokenizer, with the wrapped chat template.
        prefix: what the adapter's `h2s.json` says.
        reward: TRL's reward-function signature: (prompts=, completions=) -> one number each, a completion being a list
            of one message.
        judge: the same, but never trained on: where there is one, it selects the best adapter, and a run whose reward
            rises while the judge falls says so.
        callbacks: further Trainer callbacks.

    The best adapter so far lies at the root of `args.output_dir` at any time. The starting prefix is never a candidate.
    """

    def __init__(
        self,
        model: PolicyWithValueHead,
        args: SingleStepPPOConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        processing_class: PreTrainedTokenizerBase,
        prefix: ChatPrefix,
        reward: RewardFunction,
        judge: RewardFunction | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        args.check_run(len(train_dataset))
        self.policy = model
        self.prefix = prefix
        self.reward = reward
        self.judges = {"reward": reward} if judge is None else {"reward": reward, "judge": judge}
        if judge is not None and args.metric_for_best_model == "reward_difference":
            args.metric_for_best_model = "judge_difference"
        check_metric(args, self.judges)
        self.sampling = Sampling(args.max_completion_length, args.temperature)
        self.stop_ids = stop_token_ids(model.model, processing_class)
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self.optimizer: Any  # a torch optimizer, then Accelerate's wrapper of it
        self.control: Any
        super().__init__(
            model=model,
            args=args,
            data_collator=columns,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[*(callbacks or []), EvaluateLastStep(), OverOptimisation(), StopOnSigterm(), LogBeforeSaving()],
        )

    # ---- what is trained ----

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with two groups: the prefix and the value head, each with its own learning rate."""
        args = self.args
        self.optimizer = AdamW(
            [
                {"params": [soft_prefix(self.policy.model)], "lr": args.learning_rate},
                {"params": list(self.policy.value_head.parameters()), "lr": args.value_learning_rate},
            ],
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )
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
        return self._update(model, self._roll_out(inputs))

    def _sample(self, prompts: list[list[int]]) -> list[list[int]]:
        """1. Sample a completion a prompt."""
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as policy:
            return generate(policy.model, prompts, self.sampling, self.stop_ids, self.processing_class.pad_token_id)

    def _roll_out(self, inputs: dict[str, list], record: bool = True) -> Rollout:
        args, device = self.args, self.accelerator.device
        completions = self._sample(inputs["prompt_ids"])
        batch = Batch.from_rows(inputs["prompt_ids"], completions, self.processing_class.pad_token_id, device)
        mask = batch.completion_mask  # (B, T)

        # 2. Score the texts.
        texts = [decode(self.processing_class, c, self.stop_ids) for c in completions]
        scores = torch.tensor(score_replies(self.reward, inputs["prompt"], texts), device=device)  # (B,)
        self.check_finite(f"the reward of a reply is not finite: {self.accelerator.gather(scores).tolist()}", scores)
        clipped = scores if args.reward_clip is None else scores.clamp(-args.reward_clip, args.reward_clip)
        unfinished = torch.tensor([c[-1] not in self.stop_ids for c in completions], device=device)

        # 3. Log-probabilities under the policy and under the hard prompt, values of the contexts.
        scored = self.policy.score(batch, args.num_mini_batches)

        # 4. The reward that is optimised, and one advantage a response.
        kl = kl_to_reference(scored.logps, scored.ref_logps, mask)  # (B,)
        self.check_finite(f"the KL to the hard prompt is not finite: {REMEDY}", kl)
        returns = clipped - args.kl_coef * kl - args.missing_eos_penalty * unfinished
        advantages = returns - scored.values
        if args.whiten_advantages:
            advantages = whiten(advantages, self.accelerator.gather(advantages))
        lengths = mask.sum(1).float()
        mean_length = self.accelerator.gather(lengths).mean().item()

        if record:
            self._record("objective/scores", scores)
            self._record("objective/kl", kl)
            self._record("objective/kl_k3_per_token", k3_per_token(scored.logps, scored.ref_logps, mask))
            self._record("objective/returns", returns)
            self._record("policy/entropy", masked_mean(scored.entropy, mask))
            self._record("completions/mean_length", lengths)
            self._record("completions/clipped_ratio", unfinished.float())
            everyone = self.accelerator.gather(torch.stack([scored.values, returns]).T.contiguous())
            self._metrics["val/explained_variance"].append(explained_variance(everyone[:, 0], everyone[:, 1]))
            self._write_completions(inputs["prompt"], texts, scores, kl, advantages)
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
            self._metrics["policy/approxkl"].append(approx_kl)
            # The same number on every rank, so all leave together. The first pass differs by rounding alone.
            if not first_pass and args.target_kl is not None and approx_kl > args.target_kl:
                self._metrics["policy/early_stop"].append(1.0)
                break
            pg_loss, ratio, clipped = policy_loss(
                logps, old_logps, mask, rollout.advantages[index], args.cliprange, args.ratio_norm, rollout.mean_length
            )
            vf_loss = value_loss(values, rollout.returns[index])
            loss = pg_loss + args.vf_coef * vf_loss - args.entropy_coef * masked_mean(entropy, mask).mean()
            self.check_finite(f"the loss is {loss.item()}: {REMEDY}", loss)
            norm = self._apply(loss)
            if first_pass:
                # Advantages of 0 (a sparse reward, say) have no gradient, and need none.
                self._check_first_pass(ratio, norm, bool(rollout.advantages[index].any()))
            self._record("policy/clipfrac", clipped.float())
            self._record("loss/policy", pg_loss.detach())
            self._record("loss/value", vf_loss.detach())
            losses.append(loss.detach())
        else:  # no break
            if args.target_kl is not None:
                self._metrics["policy/early_stop"].append(0.0)
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
        norm = float(self.accelerator.clip_grad_norm_(prefix_group["params"], self.args.max_grad_norm))
        self._metrics["policy/grad_norm"].append(norm)
        self.accelerator.clip_grad_norm_(value_group["params"], self.args.max_grad_norm)
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
            with torch.no_grad():
                # From 0 the way to the mean would push every unit of the head to one side, where it learns no more.
                self.policy.value_head.out.bias.add_((returns - self.policy.value_head(hidden)).mean())
            for _ in range(VALUE_WARMUP_UPDATES):
                value_loss(self.policy.value_head(hidden), returns).backward()
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)

    def _check_first_pass(self, ratio: torch.Tensor, norm: float, gradient_expected: bool) -> None:
        if self.state.global_step == 0 and norm == 0 and gradient_expected:
            raise RunError("the prefix has no gradient at the first update")
        self._record("val/ratio", ratio)
        error = (ratio - 1).abs().max().item()
        tolerance = RATIO_TOLERANCE.get(self.policy.model.get_base_model().dtype, 0.2)
        if error > tolerance:
            print(f"warning: the first pass's ratio is {error:.3g} away from 1, more than {tolerance}", flush=True)

    # ---- soft against hard ----

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Compare soft with hard on held-out contexts; keep the adapter if it is the best so far."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        rank, world = self.args.process_index, self.args.world_size
        mine = rows.select(range(rank, len(rows), world)) if world > 1 else rows
        table = pd.DataFrame()
        if len(mine):  # few contexts may leave a rank without one
            table = answer_both(
                self.policy.model,
                self.processing_class,
                mine,
                self.sampling,
                self.args.per_device_eval_batch_size,
                self.args.seed + rank,
                progress=not self.args.disable_tqdm and self.is_world_process_zero(),
            )
            for name, judge in self.judges.items():
                add_scores(table, name, judge)
        if world > 1:
            table = pd.DataFrame.from_records(gather_object(table.to_dict("records")))
        metrics = {f"{metric_key_prefix}_{k}": v for name in self.judges for k, v in summarise(table, name).items()}
        if "eval_judge_difference" in metrics:
            metrics["eval_over_optimised"] = float(over_optimised([*self.state.log_history, metrics]) is not None)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.is_in_train and self.state.global_step > 0 and self.is_best(metrics):
            self.save_best()
        return metrics

    # ---- logs and files ----

    def _record(self, name: str, values: torch.Tensor) -> None:
        self._metrics[name].append(self.accelerator.gather(values.float()).mean().item())

    def _write_completions(self, prompts, texts, scores, kl, advantages) -> None:
        columns = zip(prompts, texts, scores.tolist(), kl.tolist(), advantages.tolist(), strict=True)
        names = ("prompt", "completion", "score", "kl", "advantage")
        records = gather_object([dict(zip(names, c, strict=True)) for c in columns])
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir) / "completions"
            folder.mkdir(parents=True, exist_ok=True)
            pd.DataFrame.from_records(records).to_parquet(folder / f"step-{self.state.global_step + 1:06d}.parquet")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of what the iterations recorded since the last line."""
        if "loss" in logs:
            logs.pop("grad_norm", None)  # of the loop's own step, which has no gradient; ours is policy/grad_norm
            logs |= {name: sum(values) / len(values) for name, values in self._metrics.items()}
            self._metrics.clear()
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter, its tokenizer, `h2s.json`, the value head; a sharded model is gathered by all processes."""
        folder, first = Path(output_dir or self.args.output_dir), self.args.should_save
        folder.mkdir(parents=True, exist_ok=True)
        save_adapter(self.policy.model, self.processing_class, self.prefix, folder, is_main_process=first)
        self.policy.save_value_head(folder, is_main_process=first)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """The counterpart of `save_model`."""
        load_weights(self.policy.model, resume_from_checkpoint)
        self.policy.load_value_head(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """The best adapter lies at the run's root."""
        self._load_from_checkpoint(self.args.output_dir)


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
