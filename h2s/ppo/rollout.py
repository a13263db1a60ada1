"""What one iteration draws and learns from. Letters: B responses on this process, b of a mini-batch, T positions."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from h2s.data.splits import conversations_of
from h2s.ppo.evaluation import EvaluatedPolicy
from h2s.ppo.iteration_log import IterationLog
from h2s.ppo.loss import explained_variance, k3_per_token, kl_to_reference, leave_one_out, masked_mean, whiten
from h2s.prefix.generation import Batch, Completions
from h2s.report.intervals import between_share
from h2s.reward.functions import RewardFunctions, reward_columns

logger = logging.getLogger(__name__)

REMEDY = "lower learning_rate or raise kl_coef"


@dataclass(frozen=True)
class Replies:
    """Sampled completions with their rewards.

    Attributes:
        batch: the right-padded rows.
        completions: as they were drawn, B of them.
        texts: the same as text.
        values: of F rewards, (B, F).
        scores: the weighted sums, (B,), NaN where all rewards left the reply out.
        unfinished: whether no stop token ends it, (B,).
    """

    batch: Batch
    completions: Completions
    texts: list[str]
    values: torch.Tensor
    scores: torch.Tensor
    unfinished: torch.Tensor


@dataclass(frozen=True)
class MiniBatch:
    """Rows that are scored, and later learnt from, together.

    Log-probabilities depend in their last bits on what stands beside a row, in bfloat16 by as much as 0.05 a reply. So
    mini-batches are drawn before scoring: then the ratio is 1 before the first update. (In float32, where they are
    those of the sampling, it is 1 to 1e-4.)

    Attributes:
        rows: their places in the iteration, (b,).
        batch: without the columns that are padding in all of them.
        logps: log-probabilities when sampled, (b, T), with their graph where the iteration makes a single update.
        entropy: of the distribution, (b, T), likewise.
        ref_logps: log-probabilities under the hard prompt, (b, T).
    """

    rows: torch.Tensor
    batch: Batch
    logps: torch.Tensor
    entropy: torch.Tensor
    ref_logps: torch.Tensor

    @property
    def mask(self) -> torch.Tensor:
        """The responses' own tokens, (b, T)."""
        return self.batch.completion_mask

    @property
    def old_logps(self) -> torch.Tensor:
        """`logps` without their graph."""
        return self.logps.detach()


@dataclass(frozen=True)
class Rollout:
    """What the updates of an iteration are made from.

    Attributes:
        parts: its mini-batches.
        returns: reward minus KL and penalties, (B,); NaN for a reply that was left out.
        advantages: whitened returns minus a baseline, (B,); 0 for a reply that was left out.
        mean_length: completion tokens on average over all processes.
        last_prompt: hidden states of the last prompt positions, (B, H).
    """

    parts: list[MiniBatch]
    returns: torch.Tensor
    advantages: torch.Tensor
    mean_length: float
    last_prompt: torch.Tensor


class SampledPolicy(EvaluatedPolicy):
    """A Trainer of a policy: it draws replies, has them scored, and says what there is to learn from them.

    Attributes:
        rewards: what replies are learnt from.
        iterations: what is kept of each iteration.
    """

    rewards: RewardFunctions
    iterations: IterationLog
    args: Any  # SingleStepPPOConfig, where Trainer says TrainingArguments
    train_dataset: Any

    def _reply(self, inputs: dict[str, list]) -> Replies:
        """Sample a completion a prompt under the active prefix, and have the texts scored."""
        drawn = self.policy.draw(inputs["prompt_ids"], self.sampling)
        completions = drawn.ids
        texts = [self.policy.decode(completion) for completion in completions]
        values = self.rewards(
            inputs["prompt"],
            texts,
            completions,
            reward_columns(inputs),
            self.state,
            self.iterations.log_extra,
            self.iterations.log_metric,
        ).to(self.accelerator.device)  # (B, F)
        scores = self.rewards.total(values)  # (B,), NaN where all left the reply out
        problem = f"the reward of a reply is not finite: {self.accelerator.gather(scores).tolist()}"
        self.check_finite(problem, values.nan_to_num(nan=0.0, posinf=math.inf))
        batch = Batch.from_rows(self.processing_class, inputs["prompt_ids"], completions, scores.device)
        unfinished = torch.tensor([c[-1] not in self.policy.stop_ids for c in completions], device=scores.device)
        return Replies(batch, drawn, texts, values, scores, unfinished)

    def _returns(self, scores: torch.Tensor, unfinished: torch.Tensor, kl: torch.Tensor | float = 0.0) -> torch.Tensor:
        """The reward that is optimised, (B,): NaN for a reply that was left out."""
        args = self.args
        rewards = self.value_head.in_units(scores)
        if args.reward_clip is not None:
            rewards = rewards.clamp(-args.reward_clip, args.reward_clip)
        return rewards - args.kl_coef * kl - args.missing_eos_penalty * unfinished

    def _score(self, model, replies: Replies) -> list[MiniBatch]:
        """Log-probabilities under both prompts, in the mini-batches that the updates will be made on.

        Those under the soft prompt are known from the sampling. They are made again where that would cost exactness
        (another precision than float32) or save nothing (an iteration of one update needs their graph).
        """
        batch, parts = replies.batch, []
        single = self.args.updates == 1
        exact = self.policy.model.get_base_model().dtype == torch.float32
        drawn = replies.completions.logps_and_entropy if exact and not single else None
        known = drawn and [batch.at_completions(values) for values in drawn]  # each (B, T)
        order = torch.randperm(len(batch.input_ids)).to(batch.input_ids.device)
        for rows in order.tensor_split(self.args.num_mini_batches):  # chunk may give fewer
            part = batch.rows(rows)
            if known is None:
                with torch.set_grad_enabled(single):
                    logps, entropy = model(*part, self.args.temperature)
            else:
                logps, entropy = (values[rows, : part.input_ids.shape[1]] for values in known)
            with torch.no_grad(), self.policy.hard_prompt_active():
                ref_logps = self.policy.module(*part, self.args.temperature)[0]
            parts.append(MiniBatch(rows, part, logps, entropy, ref_logps))
        return parts

    def _roll_out(self, model, inputs: dict[str, list]) -> Rollout:
        """1. Sample and score, 2. measure the KL, 3. one advantage a response; 0 for one that was left out."""
        args, log = self.args, self.iterations
        inputs = {name: [x for x in column for _ in range(args.num_generations)] for name, column in inputs.items()}
        self.terminal.doing("sampling")
        replies = self._reply(inputs)
        self.terminal.doing("scoring")
        parts = self._score(model, replies)
        self.check_finite(f"the log-probabilities are not finite: {REMEDY}", *(p.logps for p in parts))

        by_row = torch.cat([part.rows for part in parts]).argsort()
        kl = torch.cat([kl_to_reference(p.old_logps, p.ref_logps, p.mask) for p in parts])[by_row]  # (B,)
        self.check_finite(f"the KL to the hard prompt is not finite: {REMEDY}", kl)

        last_prompt = replies.completions.last_prompt  # (B, H)
        with torch.no_grad():
            values = self.value_head(last_prompt)
        returns = self._returns(replies.scores, replies.unfinished, kl)
        advantages = returns - (values if args.num_generations == 1 else leave_one_out(returns, args.num_generations))
        if args.whiten_advantages:
            together = self.accelerator.gather(advantages)
            advantages = whiten(advantages, together[~together.isnan()])
        advantages = advantages.nan_to_num(nan=0.0)
        lengths = replies.batch.completion_mask.sum(1).float()

        log.add_rewards(replies.values, self.accelerator.gather(replies.scores))
        log.add("kl", kl)
        log.add("kl_k3_per_token", torch.cat([k3_per_token(p.old_logps, p.ref_logps, p.mask) for p in parts]))
        log.add("returns", returns)
        log.add("entropy", torch.cat([masked_mean(p.entropy.detach(), p.mask) for p in parts]))
        log.add("completions/mean_length", lengths)
        log.add("completions/clipped_ratio", replies.unfinished.float())
        log.add("value/saturated", self.value_head.saturated(last_prompt).detach())
        pairs = self.accelerator.gather(torch.stack([values, returns]).T.contiguous())
        log.metrics["value/explained_variance"].append(explained_variance(pairs[:, 0], pairs[:, 1]))
        columns = {
            "prompt": inputs["prompt"],
            "completion": replies.texts,
            "score": replies.scores.tolist(),
            "kl": kl.tolist(),
            "advantage": advantages.tolist(),
        }
        log.write_completions(Path(args.output_dir), self.state.global_step + 1, columns, replies.values)
        log.forget_extras()
        return Rollout(parts, returns, advantages, self.accelerator.gather(lengths).mean().item(), last_prompt)

    def _warm_up(self) -> None:
        """Measure the rewards on the hard prompt's replies, and fit the value head to their returns.

        It costs no step of the prefix. The same contexts are answered each time, which tells how much of the rewards'
        variance lies between contexts: the most that a value head can explain.
        """
        args, drawn = self.args, []
        contexts = args.per_device_train_batch_size * args.world_size
        generator = torch.Generator().manual_seed(args.seed)  # the same on every rank, each takes its share
        chosen = torch.randperm(len(self.train_dataset), generator=generator)[:contexts].tolist()
        shares = [chosen[rank :: args.world_size] for rank in range(args.world_size)]
        inputs = self.train_dataset[shares[args.process_index]]
        for number in range(args.value_warmup_batches):
            self.terminal.doing(f"warm-up {number + 1} of {args.value_warmup_batches}")
            with torch.no_grad(), self.policy.hard_prompt_active():
                replies = self._reply(inputs)
            drawn.append((replies.completions.last_prompt, replies.scores, replies.unfinished))
            self.iterations.forget_extras()
        if drawn:
            logger.info("warm-up: the hard prompt has answered %d contexts %d times", contexts, len(drawn))
            hidden, scores, unfinished = (torch.cat(parts) for parts in zip(*drawn, strict=True))
            by_context = self.accelerator.gather(scores.view(len(drawn), -1).T.contiguous())  # (B * world_size, k)
            conversations = conversations_of(self.train_dataset.select([i for share in shares for i in share]))
            share = between_share(by_context.cpu().numpy(), conversations)
            for end, value in zip(("", "_low", "_high"), share, strict=True):
                self.iterations.metrics[f"value/rho{end}"].append(value)
            needed = 1 - 4 / 3 * (1 - share[0])  # the advantage's variance is 1 - EV, or k / (k - 1) (1 - rho)
            if args.num_generations == 1 and needed > 0:
                logger.info(
                    "value/rho is %.2f [%.2f, %.2f]: num_generations 4, at a quarter of the contexts, learns from less "
                    "noise unless value/explained_variance comes to %.2f",
                    *share,
                    needed,
                )
            if args.scale_rewards:
                self.value_head.measure_rewards(by_context.flatten())
            self._fit_value_head(hidden, self._returns(scores, unfinished))

    def _fit_value_head(self, hidden: torch.Tensor, returns: torch.Tensor) -> None:
        """On what all ranks gathered, so that their heads stay equal without DDP."""
        gather = self.accelerator.gather
        self.value_head.fit(gather(hidden), gather(returns), self.args.value_learning_rate)
