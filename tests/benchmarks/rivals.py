"""What people would do instead: h2s's PPO beside TRL's own trainers, from one hard prompt, sheet, contexts and judge.

    python tests/benchmarks/rivals.py --out outputs/rivals --minutes 20 --seeds 1 2 3 --sheet human_eval.xlsx
    python tests/benchmarks/rivals.py --out outputs/look --model tiny --minutes 0.05  # its figures say nothing
    python tests/benchmarks/rivals.py --out outputs/rivals --table                    # what is there so far
    python tests/benchmarks/rivals.py --out outputs/rivals --table --judge outputs/e5/reward/judge  # by another judge

PPO by other rewards, from other prefixes:

    python tests/benchmarks/rivals.py --out outputs/e5 --encoder outputs/e5-small --members 5 --arms ppo --rate 3e-3
    python tests/benchmarks/rivals.py --out outputs/more --start outputs/rivals/dpo-1/0.01 --arms ppo --rate 3e-3

The arms, all from the hard prompt (but for `--start`) and compared with it:

- ppo: h2s's SingleStepPPOTrainer on the prefix, by the reward: a reply each to sixteen contexts.
- ppo-4: the same, four replies to four contexts (`num_generations`).
- dpo: TRL's DPOTrainer on the prefix, straight from the judgements that the reward learnt from.
- rloo: TRL's RLOOTrainer on the prefix, by the reward, four replies a prompt; its objective is that of ppo.
- best-of-4: the hard prompt, of whose four replies the reward chooses one: nothing is trained.
- lora-dpo, for scale, with the first seed alone: TRL's DPOTrainer on a LoRA (PEFT's defaults), the prompt as text.

An arm and a seed is a process. The first seed trains once at each of three rates, for the same time by the clock, and
looks once at each result: soft against hard by the judge on the contexts that select. The rate that is ahead there is
every seed's, reported on contexts that nothing saw. The judge learnt from conversations of the sheet that no arm and no
reward has seen. Each arm and seed has a folder with a `results.jsonl` of its own, a line a look and a line a report: a
run that was stopped goes on after the last one, and two shells can share the arms out.
"""

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, concatenate_datasets
from measuring import check_same
from peft import LoraConfig, PeftModel, TaskType
from rewards import trained
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer import utils as trl_utils

from h2s import PrefixTuningPolicyModel, SingleStepPPOConfig, SingleStepPPOTrainer, load_contexts, load_preferences
from h2s.data.splits import conversations_of, set_aside_seen, split_by_conversation, split_for_models
from h2s.models import load_base_model, load_tokenizer, resolve_embedded
from h2s.prefix.generation import Batch, Sampling, seeded
from h2s.report.best_of_n import draw_hard
from h2s.report.comparison import summarise
from h2s.report.intervals import difference_text
from h2s.report.soft_vs_hard import shared_batches, soft_vs_hard
from h2s.reward.encoder import open_encoder
from h2s.reward.functions import RewardFunctions
from h2s.reward.pairs import readable_pairs
from h2s.run.arguments import RewardDatasetArguments

ROOT = Path(__file__).parents[2]
CUDA = torch.cuda.is_available()
# Three each. The largest of ppo is its default, which came to a KL of 4 nats a reply within four iterations of SmolLM2
# on the sample contexts, before these were chosen; rloo makes one update where ppo makes four.
RATES = {
    "ppo": (1e-3, 3e-3, 1e-2),
    "ppo-4": (1e-3, 3e-3, 1e-2),
    "dpo": (3e-3, 1e-2, 3e-2),
    "rloo": (3e-3, 1e-2, 3e-2),
    "best-of-4": (),
    "lora-dpo": (1e-4, 3e-4, 1e-3),
}
REPLIES = 16  # of an iteration: contexts of ppo, four replies to four contexts of ppo-4 and rloo
EVALUATION_BATCH = 16
JUDGE_SHARE, VIRTUAL_TOKENS = 0.5, 20
MEANS = {"steps": 0, "minutes": 1, "memory": 2}  # of a report, and their digits
# Of a look: the first chooses the rate, the others say what it cost.
LOOKED_AT = ("judge_difference", "judge_same_length", "kl", "soft_tokens", "soft_unfinished")
# Of TRL's trainers on a prefix: gradient checkpointing crashes with one, weight decay pulls it to zero keys.
TRL_SETTINGS = {
    "max_steps": 1_000_000,  # the clock ends it
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": not CUDA,
    "save_strategy": "no",
    "report_to": "none",
    "logging_steps": 10,
    "disable_tqdm": True,
    "ddp_find_unused_parameters": False,
}
# On CPU TRL projects every position to the vocabulary unless it is told this: the same numbers, in half of the time.
trl_utils._use_triton = lambda device: True


class Clock(TrainerCallback):
    """Ends a training at the step at which its time is over; it runs from here, so making the trainer counts."""

    def __init__(self, minutes: float):
        self.began, self.minutes = time.monotonic(), minutes

    def spent(self) -> float:
        return (time.monotonic() - self.began) / 60

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= self.spent() >= self.minutes


class Bench:
    """One arm and one seed: what all arms share, and what is kept of them."""

    def __init__(self, settings: argparse.Namespace, arm: str, seed: int):
        self.settings, self.arm, self.seed = settings, arm, seed
        self.folder = settings.out / f"{arm}-{seed}"
        self.sampling = Sampling(settings.max_completion_length, settings.temperature)
        members = RewardFunctions(*members_of(settings))
        self.learnt = members.seen
        reward = minus_spread(members) if settings.minus_spread else members
        self.scorers = {"reward": reward, "judge": RewardFunctions(str(settings.out / "reward" / "judge"))}
        parts = split_by_conversation(load_contexts(settings.contexts), settings.split_seed, settings.test_size)
        seen_by = {"reward": self.learnt, "judge": self.scorers["judge"].seen}
        # The judge's conversations neither train nor select: it would be asked about its own.
        judged = {"judge": seen_by["judge"]}
        self.train, self.selecting = (set_aside_seen(parts[name], judged)[0] for name in ("train", "validation"))
        reported = parts["test"]
        if settings.reported:  # other contexts: those of the test part help to select
            reported = load_contexts(settings.reported)
            self.selecting = concatenate_datasets([self.selecting, set_aside_seen(parts["test"], judged)[0]])
            seen_by["contexts"] = set(conversations_of(self.train)) | set(conversations_of(self.selecting))
        self.reported, _ = set_aside_seen(reported, seen_by)

    def hard_prompt(self) -> PrefixTuningPolicyModel:
        return PrefixTuningPolicyModel.from_hard_prompt(self.settings.model, self.settings.hard_prompt, dtype="float32")

    def judgements(self, system: str | None = None) -> Dataset:
        """What the reward learnt from or was selected by, in TRL's format; nothing of the judge's."""
        pairs = load_preferences(self.settings.sheet).select_columns(["prompt", "chosen", "rejected"])
        pairs = pairs.select([i for i, c in enumerate(conversations_of(pairs)) if c in self.learnt])
        if system is None:
            return pairs
        return pairs.map(lambda row: {"prompt": [{"role": "system", "content": system}, *row["prompt"]]})

    def compare(self, adapter: Path | None, contexts: Dataset, scorers: dict[str, RewardFunctions]) -> pd.DataFrame:
        """The comparison table of h2s, "soft" being this arm."""
        common = (contexts, scorers, self.sampling, EVALUATION_BATCH)
        if self.arm == "best-of-4":
            return self._best_of_4(*common)
        if self.arm == "lora-dpo":
            return self._lora(adapter, *common)
        policy = PrefixTuningPolicyModel.from_pretrained(adapter, dtype="float32")
        return soft_vs_hard(policy, *common, seed=self.seed, progress=False, hard=self.hard(*common))

    def hard(self, contexts, scorers, *common) -> pd.DataFrame:
        """What the hard prompt answers: drawn once a seed, for all arms."""
        file = self.settings.out / f"hard-{self.seed}-{'-'.join(scorers)}.parquet"
        if not file.is_file():
            own = self.folder / "hard.parquet"  # two shells may be at it: the one or the other, they are the same
            soft_vs_hard(self.hard_prompt(), contexts, scorers, *common, seed=self.seed, progress=False).to_parquet(own)
            own.replace(file)
        return pd.read_parquet(file)

    def _best_of_4(self, *common) -> pd.DataFrame:
        policy, hard = self.hard_prompt(), self.hard(*common)
        draws = [
            soft_vs_hard(policy, *common, seed=self.seed + 10_000 * n, progress=False, hard=hard) for n in range(1, 5)
        ]
        best = np.argmax([draw["soft_reward"] for draw in draws], axis=0)
        table = pd.concat([draws[which].iloc[[row]] for row, which in enumerate(best)])
        return table.assign(kl=math.log(4) - 3 / 4)  # at most (Beirami et al., arXiv 2401.01879)

    def _lora(self, adapter, contexts, scorers, sampling, batch_size) -> pd.DataFrame:
        """The LoRA is merged, and the hard prompt becomes a prefix of the result: the same as the prompt as text."""
        base, source = self.hard_prompt(), resolve_embedded(self.settings.model)
        merged = PeftModel.from_pretrained(load_base_model(source, dtype="float32"), adapter).merge_and_unload()
        lora = PrefixTuningPolicyModel.from_hard_prompt(
            merged, self.settings.hard_prompt, tokenizer=load_tokenizer(source)
        )
        common = (contexts, scorers, sampling, batch_size)
        table = soft_vs_hard(lora, *common, seed=self.seed, progress=False, hard=self.hard(*common))
        # What that gives as KL is to the LoRA's own hard prompt. The same replies again, scored by the base model.
        ids, kl = lora.encode(contexts, sampling.max_completion_length), []
        for rows in shared_batches(len(contexts), batch_size, "KL", progress=False):
            prompts = [ids[i] for i in rows]
            with torch.no_grad(), seeded(lora.model.device, self.seed + rows.start):
                batch = Batch.from_rows(lora.tokenizer, prompts, lora.complete(prompts, sampling), lora.model.device)
                soft, hard = (policy.module(*batch, sampling.temperature)[0] for policy in (lora, base))
                kl += (soft - hard).sum(1).tolist()
        return table.assign(kl=kl)

    # ---- the trainers ----

    def train_at(self, rate: float) -> dict[str, float]:
        """Train, write the adapter; steps, minutes and the process's peak memory so far."""
        adapter = self.adapter(rate)
        shutil.rmtree(adapter, ignore_errors=True)
        torch.manual_seed(self.seed)
        make = {"dpo": self._dpo, "rloo": self._rloo, "lora-dpo": self._lora_dpo}.get(self.arm, self._ppo)
        policy = None
        if self.settings.start:
            policy = PrefixTuningPolicyModel.from_pretrained(self.settings.start, dtype="float32")
        elif self.arm != "lora-dpo":
            policy = self.hard_prompt()
        common = {"learning_rate": rate, "seed": self.seed, "output_dir": str(self.folder / "run")}
        clock = Clock(self.settings.minutes)
        trainer = make(policy, common, clock)
        trainer.train()
        spent, peak = clock.spent(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if policy is None:
            trainer.model.save_pretrained(adapter)
        else:
            policy.save_pretrained(adapter)
        shutil.rmtree(common["output_dir"], ignore_errors=True)
        memory = torch.cuda.max_memory_allocated() if CUDA else peak * 1024
        logged = [x for x in trainer.state.log_history if "value/explained_variance" in x]  # ppo's alone
        return {
            "rate": rate,
            "steps": trainer.state.global_step,
            "minutes": spent,
            "memory": memory / 2**30,
            "rho": [x["value/rho"] for x in logged[:1]],
            "explained_variance": [x["value/explained_variance"] for x in logged],
        }

    def _ppo(self, policy, common, clock):
        replies = 4 if self.arm == "ppo-4" else 1  # to a context
        args = SingleStepPPOConfig(
            **common,
            max_steps=TRL_SETTINGS["max_steps"],
            per_device_train_batch_size=REPLIES // replies,
            num_generations=replies,
            num_mini_batches=self.settings.num_mini_batches,
            value_warmup_batches=2 * replies,
            max_completion_length=self.sampling.max_completion_length,
            temperature=self.sampling.temperature,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        return SingleStepPPOTrainer(policy, self.scorers["reward"], args, train_dataset=self.train, callbacks=[clock])

    def _dpo_args(self, common) -> DPOConfig:
        # TRL's max_length cuts replies and drops rows.
        return DPOConfig(**common, **TRL_SETTINGS, per_device_train_batch_size=4, beta=0.1, max_length=None)

    def _dpo(self, policy, common, clock):
        trainer = DPOTrainer(
            model=policy.model,
            args=self._dpo_args(common),
            train_dataset=self.judgements(),
            processing_class=policy.tokenizer,
            callbacks=[clock],
        )
        policy.model.prompt_encoder["ref"].requires_grad_(False)  # the constructor's copy of the hard prompt
        return trainer

    def _lora_dpo(self, _, common, clock):
        source = resolve_embedded(self.settings.model)
        return DPOTrainer(
            model=load_base_model(source, dtype="float32"),
            args=self._dpo_args(common),
            train_dataset=self.judgements(self.settings.hard_prompt),
            processing_class=load_tokenizer(source),
            peft_config=LoraConfig(task_type=TaskType.CAUSAL_LM),
            callbacks=[clock],
        )

    def _rloo(self, policy, common, clock):
        """One prompt a generation batch: with a prefix TRL scores left-padded rows wrongly."""
        reward, spread = self.scorers["reward"].load(), self._reward_spread(policy)
        penalty = SingleStepPPOConfig.missing_eos_penalty

        def in_spreads(prompts, completion_ids, **kwargs):
            values = reward.total(reward(prompts, [policy.decode(ids) for ids in completion_ids]))
            unfinished = torch.tensor([ids[-1] not in policy.stop_ids for ids in completion_ids])
            return (values / spread - penalty * unfinished).tolist()

        policy.model.generation_config.eos_token_id = policy.stop_ids
        args = RLOOConfig(
            **common,
            **TRL_SETTINGS,
            num_generations=4,
            per_device_train_batch_size=4,
            steps_per_generation=1,
            gradient_accumulation_steps=REPLIES // 4,
            max_completion_length=self.sampling.max_completion_length,
            pad_to_multiple_of=None,
            beta=SingleStepPPOConfig.kl_coef,
            temperature=self.sampling.temperature,
        )
        trainer = RLOOTrainer(
            model=policy.model,
            reward_funcs=in_spreads,
            args=args,
            train_dataset=self.train,
            processing_class=policy.tokenizer,
            callbacks=[clock],
        )
        policy.model.prompt_encoder["ref"].requires_grad_(False)
        return trainer

    def _reward_spread(self, policy) -> float:
        """The unit of ppo's rewards: their spread over two replies of the hard prompt to each of a batch's contexts."""
        contexts = self.train.shuffle(seed=self.seed).select(range(min(REPLIES, len(self.train))))
        reward = {"reward": self.scorers["reward"]}
        drawn = draw_hard(policy, contexts, reward, self.sampling, 2, EVALUATION_BATCH, self.seed)
        return float(drawn["reward"].std())

    # ---- what is kept ----

    def run(self) -> None:
        """The looks that are missing, then the report."""
        self.folder.mkdir(exist_ok=True)
        looks = {x["rate"]: x for x in read(self.settings.out) if (x["kind"], x["arm"]) == ("look", self.arm)}
        for rate in () if self.settings.rate else RATES[self.arm]:
            if rate not in looks:
                training = self.train_at(rate)
                table = self.compare(self.adapter(rate), self.selecting, {"judge": self.scorers["judge"]})
                seen = {name: value for name, value in summarise(table, "judge").items() if name in LOOKED_AT}
                looks[rate] = self.keep("look", **training, selecting=len(table), **seen)
        best = max(looks.values(), key=lambda line: line["judge_difference"]) if looks else {}
        rate = self.settings.rate or best.get("rate")
        if rate and best.get("seed") != self.seed:
            best = self.train_at(rate)
        table = self.compare(self.adapter(best["rate"]) if best else None, self.reported, self.scorers)
        table.to_parquet(self.folder / "replies.parquet")
        training = {name: best.get(name) for name in ("rate", "steps", "minutes")}
        # A process's peak never falls: that of the first look is of one training alone.
        memory = min((x["memory"] for x in looks.values()), default=best.get("memory"))
        self.keep("report", **training, memory=memory, contexts=len(table))

    def adapter(self, rate: float) -> Path:
        """Where this seed's result at that rate lies."""
        return self.folder / f"{rate:g}"

    def keep(self, kind: str, **values: Any) -> dict[str, Any]:
        line = {"kind": kind, "arm": self.arm, "seed": self.seed, **values}
        file = self.folder / "results.jsonl"
        before = file.read_text(encoding="utf-8") if file.is_file() else ""
        written = self.folder / "results.new"
        written.write_text(f"{before}{json.dumps(line)}\n", encoding="utf-8")
        written.replace(file)  # a kill leaves the one or the other
        return line


def read(out: Path) -> list[dict[str, Any]]:
    """All looks and reports, in the order of the arms."""
    lines = [json.loads(x) for f in out.glob("*/results.jsonl") for x in f.read_text(encoding="utf-8").splitlines()]
    return sorted(lines, key=lambda line: (list(RATES).index(line["arm"]), line["seed"]))


# ---- what is printed ----


def table(out: Path, judge: str = "") -> str:
    """The reports as Markdown, an arm's seeds together too, and the first arm minus each other by the judge.

    `judge` is another one, in the place of theirs.
    """
    other = RewardFunctions(judge) if judge else None
    lines = [
        "| arm | seed | rate | judge, soft minus hard | judge at equal length | judge, both replies finished "
        "| reward, soft minus hard | KL, nats a reply | tokens soft / hard | unfinished soft / hard | steps | minutes "
        "| memory, GiB |",
        "|---" * 13 + "|",
    ]
    judged: dict[str, dict[int, pd.DataFrame]] = {}
    reports = [x for x in read(out) if x["kind"] == "report"]
    for line in reports:
        replies = pd.read_parquet(out / f"{line['arm']}-{line['seed']}" / "replies.parquet")
        if other and other.seen & set(replies["conversation"]):
            raise SystemExit(f"{judge} has seen conversations that are reported here")
        for side in ("soft", "hard") if other else ():
            replies[f"{side}_judge"] = other.total(other(list(replies["prompt"]), list(replies[side])))
        judged.setdefault(line["arm"], {})[line["seed"]] = replies
    for arm, by_seed in judged.items():
        of_arm = [x for x in reports if x["arm"] == arm]
        lines += [row(line, by_seed[line["seed"]]) for line in of_arm]
        if len(of_arm) > 1:
            means = {name: np.mean([x[name] for x in of_arm]) if of_arm[0][name] else None for name in MEANS}
            lines.append(row(of_arm[0] | means | {"seed": "all"}, pd.concat(by_seed, ignore_index=True)))
    for arm in [arm for arm in judged if arm != "ppo" and "ppo" in judged]:
        seeds = sorted(judged["ppo"].keys() & judged[arm].keys())
        if seeds:
            gains = [judged["ppo"][s]["soft_judge"] - judged[arm][s]["soft_judge"] for s in seeds]
            text = difference_text(np.mean(gains, axis=0).tolist(), judged["ppo"][seeds[0]]["conversation"].tolist())
            lines.append(f"\nppo minus {arm} by the judge: {text}, seeds {', '.join(map(str, seeds))}.")
    return "\n".join(lines)


def row(line: dict[str, Any], replies: pd.DataFrame) -> str:
    """A report's row; of several seeds together an interval takes a context's replies as one cluster."""
    judge, groups = replies["soft_judge"] - replies["hard_judge"], replies["conversation"]
    ended = replies["soft_finished"] & replies["hard_finished"]
    numbers = summarise(replies, "judge")
    both = f"{difference_text(judge[ended], groups[ended])}, {ended.sum()}" if ended.any() else "none"
    at_most = "at most " if line["arm"] == "best-of-4" else ""
    cells = [
        line["arm"],
        line["seed"],
        "-" if line["rate"] is None else f"{line['rate']:g}",
        difference_text(judge, groups),
        "{:+.3f} [{:+.3f}, {:+.3f}]".format(*(numbers[f"judge_same_length{end}"] for end in ("", "_low", "_high"))),
        f"{both} of {len(replies)}",
        difference_text(replies["soft_reward"] - replies["hard_reward"], groups),
        f"{at_most}{numbers['kl']:.2f}",
        f"{numbers['soft_tokens']:.1f} / {numbers['hard_tokens']:.1f}",
        f"{numbers['soft_unfinished']:.2f} / {numbers['hard_unfinished']:.2f}",
        *("-" if line[name] is None else f"{line[name]:.{digits}f}" for name, digits in MEANS.items()),
    ]
    return f"| {' | '.join(map(str, cells))} |"


# ---- the whole ----


def members_of(settings: argparse.Namespace) -> tuple[list[str], list[float]]:
    """The reward's members and their weights."""
    others = [str(settings.out / f"reward-{seed}") for seed in range(1, settings.members)]
    return [str(settings.out / "reward"), *others], [1 / settings.members] * settings.members


def minus_spread(members: RewardFunctions) -> RewardFunctions:
    """Of the members' mean, less the standard deviation over them of a reply's score."""

    def mean_minus_spread(prompts, completions, **kwargs):
        values = members(prompts, [completion[0]["content"] for completion in completions])
        return (values.mean(1) - values.std(1)).tolist()

    return RewardFunctions(mean_minus_spread)


def train_rewards(settings: argparse.Namespace, flags: list[str]) -> None:
    """The reward and the judge of all arms by the recipe, and the reward's further members, if they are not there."""
    first, *others = map(Path, members_of(settings)[0])
    if not (first / "judge" / "README.md").is_file():
        shutil.rmtree(first, ignore_errors=True)
        command = [sys.executable, str(ROOT / "recipes" / "train_reward.py"), "--judge_share", str(JUDGE_SHARE)]
        command += ["--path", settings.sheet, "--reward_model_name_or_path", settings.encoder]
        command += ["--output_dir", str(settings.out), "--run_name", first.name]
        subprocess.run([*command, *flags], check=True, stdout=sys.stderr)
    if others:
        data = RewardDatasetArguments()  # the recipe's defaults: the same parts
        source, tokenizer, max_tokens = open_encoder(settings.encoder, VIRTUAL_TOKENS)
        pairs = readable_pairs(load_preferences(settings.sheet), tokenizer, max_tokens)
        parts = split_for_models(pairs, data.split_seed, data.test_size, JUDGE_SHARE)["reward"]
    for seed, folder in enumerate(others, start=1):
        if not (folder / "README.md").is_file():
            run = folder / "run"
            shutil.rmtree(run, ignore_errors=True)
            trained(source, parts["train"], parts["validation"], run, seed).save_pretrained(folder)
            shutil.rmtree(run)


def main() -> None:
    data, prompt = ROOT / "recipes" / "sample_data", ROOT / "recipes" / "embedded" / "hard_prompt.txt"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; a run that was stopped goes on")
    parser.add_argument("--model", default="embedded:gemma-3-270m", help="as h2s names models, or tiny")
    parser.add_argument("--encoder", default="embedded:minilm", help="of the reward and the judge")
    parser.add_argument("--members", type=int, default=1, help="models whose mean is the reward")
    parser.add_argument("--minus_spread", action="store_true", help="less the standard deviation over the members")
    parser.add_argument("--hard_prompt", default=prompt.read_text(encoding="utf-8").strip())
    parser.add_argument("--sheet", default=str(data / "judgements.xlsx"), help="the judgements")
    parser.add_argument("--contexts", default=str(data / "more_contexts.json"), help="that train, select, are reported")
    parser.add_argument("--test_size", type=float, default=0.3, help="share of the contexts that is reported on")
    parser.add_argument("--reported", default="", help="other contexts, reported on; then that share selects")
    parser.add_argument("--split_seed", type=int, default=42)
    parser.add_argument("--max_completion_length", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--start", default="", help="an adapter to train from, in the hard prompt's place")
    parser.add_argument("--rate", type=float, help="chosen before: no looks")
    parser.add_argument("--num_mini_batches", type=int, default=SingleStepPPOConfig.num_mini_batches, help="of ppo")
    parser.add_argument("--minutes", type=float, default=10, help="of each training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--arms", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--table", action="store_true", help="print what is there and do nothing")
    parser.add_argument("--judge", default="", help="of the table: another judge")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if (settings.rate or settings.start) and not set(settings.arms) <= {"ppo", "ppo-4"}:
        parser.error("--rate and --start are for --arms ppo ppo-4")
    if settings.minus_spread and settings.members < 2:
        parser.error("--minus_spread needs --members 2 or more")
    if settings.child:
        return Bench(settings, settings.child[0], int(settings.child[1])).run()
    if not settings.table:
        settings.out.mkdir(parents=True, exist_ok=True)
        flags = []
        if settings.model == "tiny":
            sys.path.append(str(ROOT / "tests"))
            from tiny import save_gemma, save_loud_encoder

            settings.model = str(save_gemma(settings.out / "tiny-gemma", positions=4096))
            settings.encoder = str(save_loud_encoder(settings.out / "tiny-electra", "electra"))
            flags = ["--num_virtual_tokens", "4", "--max_steps", "2"]
        own = ("out", "seeds", "arms", "table", "judge", "child")
        shared = {name: str(value) for name, value in vars(settings).items() if name not in own}
        check_same(settings.out / "settings.json", shared)
        train_rewards(settings, flags)
        models = ["--model", settings.model, "--encoder", settings.encoder]  # the tiny ones are made by now
        done = {(line["arm"], line["seed"]) for line in read(settings.out) if line["kind"] == "report"}
        for seed in settings.seeds:
            for arm in settings.arms:
                if (arm, seed) not in done and not (arm == "lora-dpo" and seed != settings.seeds[0]):
                    print(f"{arm}, seed {seed}", flush=True)
                    child = ["--out", str(settings.out), "--child", arm, str(seed)]
                    subprocess.run([*sys.orig_argv, *models, *child], check=True, stdout=sys.stderr)
    print(table(settings.out, settings.judge))
    if settings.judge:
        print(f"\nThe judge is {settings.judge}.")


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main()
