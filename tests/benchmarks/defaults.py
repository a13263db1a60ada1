"""PPO's defaults: runs of as many replies each, beside each other, on contexts that no table of results reports.

    python tests/benchmarks/defaults.py --out outputs/defaults --seeds 1 2 --num_mini_batches 1 4 \
        --learning_rate 1e-2 3e-2 --num_generations 1 4
    python tests/benchmarks/defaults.py --out outputs/defaults --table  # what is there so far

Every combination of the three settings and a seed is a process, `--jobs` of them at a time; all other settings have
their defaults. All answer with 16 replies an iteration, from one hard prompt and by one reward; every `--eval_steps`
iterations soft is compared with hard, by the judge. A share `--test_size` of the contexts is left alone (it is what
recipes and `rivals.py` report on), 0.4 of the rest are for these looks and the others train. A look is a table of
replies in its run's folder; what was stopped goes on with the runs that are not whole.
"""

import argparse
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import concatenate_datasets
from measuring import ROOT, check_same

from h2s import PrefixTuningPolicyModel, SingleStepPPOConfig, SingleStepPPOTrainer, load_contexts
from h2s.data.splits import set_aside_seen, split_by_conversation
from h2s.report.comparison import summarise
from h2s.report.intervals import difference_text
from h2s.reward.functions import RewardFunctions

CUDA = torch.cuda.is_available()
REPLIES = 16  # of an iteration
GRID = ("num_mini_batches", "learning_rate", "num_generations")
LOOKED_AT = 0.4  # of the contexts that are not left alone
SEEN = {"judge_same_length": "+.3f", "soft_tokens": ".1f", "soft_unfinished": ".2f"}  # at the last look


class LookedAt(SingleStepPPOTrainer):
    """Keeps every look's table, and the seconds of its iterations alone."""

    seconds = 0.0
    looks: Path

    def training_step(self, *args, **kwargs):
        began = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        if CUDA:
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - began
        return loss

    def compare(self, contexts):
        table = super().compare(contexts)
        table.to_parquet(self.looks / f"{self.state.global_step}.parquet")
        return table


def run(settings: argparse.Namespace, folder: Path, chosen: dict[str, float], seed: int) -> None:
    """Train with the chosen settings; the looks, and `run.json` when all is done."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    judge = RewardFunctions(str(settings.reward / "judge"))
    parts = split_by_conversation(load_contexts(settings.contexts), settings.split_seed, settings.test_size)
    rest = concatenate_datasets([parts["train"], parts["validation"]])
    rest, _ = set_aside_seen(rest, {"judge": judge.seen})  # it would be asked about its own
    parts = split_by_conversation(rest, settings.split_seed + 1, LOOKED_AT)  # the same seed would halve the same line
    args = SingleStepPPOConfig(
        output_dir=str(folder / "run"),
        seed=seed,
        max_steps=settings.steps,
        per_device_train_batch_size=REPLIES // chosen["num_generations"],
        value_warmup_batches=2 * chosen["num_generations"],  # as many replies
        max_completion_length=settings.max_completion_length,
        temperature=settings.temperature,
        per_device_eval_batch_size=64,
        eval_strategy="steps",
        eval_steps=settings.eval_steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **chosen,
    )
    trainer = LookedAt(
        PrefixTuningPolicyModel.from_hard_prompt(settings.model, settings.hard_prompt, dtype="float32"),
        str(settings.reward),
        args,
        train_dataset=concatenate_datasets([parts["train"], parts["validation"]]),
        eval_dataset=parts["test"],
        judge=judge,
    )
    trainer.looks = folder
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if CUDA else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    shutil.rmtree(args.output_dir)
    measured = {**chosen, "seed": seed, "minutes": trainer.seconds / 60, "memory": peak / 2**30}
    (folder / "run.json").write_text(json.dumps(measured), encoding="utf-8")


# ---- what is printed ----


def table(out: Path) -> str:
    """A row a combination, its seeds together: judge and KL at each look; the last look beside the defaults'."""
    runs = [json.loads(f.read_text(encoding="utf-8")) | {"folder": f.parent} for f in sorted(out.glob("*/run.json"))]
    by_setting: dict[tuple, list[dict]] = {}
    for one in runs:
        by_setting.setdefault(tuple(one[name] for name in GRID), []).append(one)
    default = tuple(getattr(SingleStepPPOConfig, name) for name in GRID)
    last = {
        setting: {one["seed"]: looks(one["folder"])[-1][1] for one in by_setting[setting]} for setting in by_setting
    }
    lines = [
        f"| {' | '.join(GRID)} | seeds | judge, soft minus hard (KL) at each look | at equal length | tokens "
        "| unfinished | last look minus the defaults' | minutes | peak with looks, GiB |",
        "|---" * 10 + "|",
    ]
    for setting, of_setting in sorted(by_setting.items()):
        steps = [[summarise(look, "judge") for _, look in looks(one["folder"])] for one in of_setting]
        path = [
            f"{np.mean([x['judge_difference'] for x in at]):+.3f} ({np.mean([x['kl'] for x in at]):.1f})"
            for at in zip(*steps, strict=True)
        ]
        at_last = [of_run[-1] for of_run in steps]
        both = sorted(last[setting].keys() & last.get(default, {}).keys())
        gain = "-"
        if both and setting != default:
            gains = [last[setting][s]["soft_judge"] - last[default][s]["soft_judge"] for s in both]
            gain = difference_text(np.mean(gains, axis=0).tolist(), last[default][both[0]]["conversation"].tolist())
        cells = [
            *(f"{value:g}" for value in setting),
            ", ".join(str(one["seed"]) for one in of_setting),
            ", ".join(path),
            *(f"{np.mean([x[name] for x in at_last]):{form}}" for name, form in SEEN.items()),
            gain,
            *(f"{np.mean([one[name] for one in of_setting]):.1f}" for name in ("minutes", "memory")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def looks(folder: Path) -> list[tuple[int, pd.DataFrame]]:
    """A run's looks: after how many iterations, and the table."""
    return sorted((int(f.stem), pd.read_parquet(f)) for f in folder.glob("*.parquet"))


# ---- the whole ----


def main() -> None:
    data, prompt = ROOT / "recipes" / "sample_data", ROOT / "recipes" / "embedded" / "hard_prompt.txt"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; a run that was stopped goes on")
    parser.add_argument("--model", default="embedded:gemma-3-270m", help="as h2s names models")
    parser.add_argument("--reward", type=Path, default=Path("outputs/embedded-reward"), help="a folder with a judge")
    parser.add_argument("--hard_prompt", default=prompt.read_text(encoding="utf-8").strip())
    parser.add_argument("--contexts", default=str(data / "more_contexts.json"))
    parser.add_argument("--test_size", type=float, default=0.3, help="share of the contexts that is left alone")
    parser.add_argument("--split_seed", type=int, default=42)
    parser.add_argument("--max_completion_length", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--eval_steps", type=int, default=4)
    for name in GRID:
        kind = type(getattr(SingleStepPPOConfig, name))
        parser.add_argument(f"--{name}", type=kind, nargs="+", default=[getattr(SingleStepPPOConfig, name)])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--table", action="store_true", help="print what is there and do nothing")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    settings = parser.parse_args()

    def folder(combination: tuple, seed: int) -> Path:
        return settings.out / "-".join(f"{value:g}" for value in (*combination, seed))

    if settings.child:
        *combination, seed = (kind(x) for kind, x in zip((int, float, int, int), settings.child, strict=True))
        return run(settings, folder(tuple(combination), seed), dict(zip(GRID, combination, strict=True)), seed)
    if not settings.table:
        settings.out.mkdir(parents=True, exist_ok=True)
        own = ("out", *GRID, "seeds", "jobs", "table", "child")
        check_same(settings.out / "settings.json", {k: str(v) for k, v in vars(settings).items() if k not in own})
        grid = itertools.product(settings.seeds, *(getattr(settings, name) for name in GRID))
        missing = [one for one in grid if not (folder(one[1:], one[0]) / "run.json").is_file()]

        def child(one: tuple) -> None:
            seed, *combination = one
            named = (f"{name} {value:g}" for name, value in zip(GRID, combination, strict=True))
            print(*named, f"seed {seed}", flush=True)
            of_child = ["--child", *map(str, combination), str(seed)]
            subprocess.run([*sys.orig_argv, *of_child], check=True, stdout=sys.stderr)

        with ThreadPoolExecutor(settings.jobs) as pool:
            list(pool.map(child, missing))
    print(table(settings.out))


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main()
