"""Run a recipe with each of some faults, then go on without it.

    python faulty_run.py RECIPE FOLDER FAULTS FLAG…

FAULTS are names of `FAULTS`, with commas between. Each strikes once the run has a checkpoint. Prints a JSON line a
fault: how the run ended and what stderr said, how going on ended and what then differs from a run without faults. What
the fault left is copied to FOLDER/<fault>/left.
"""

import errno
import functools
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import rewards_of_tests
import torch
from forks import recipe, run
from killed_run import ending

import h2s.ppo.rollout
import h2s.ppo.trainer
import h2s.prefix.policy_model
import h2s.report.comparison
import h2s.report.soft_vs_hard
import h2s.run.folder
from h2s import RewardModelTrainer, SingleStepPPOTrainer
from h2s.ppo.iteration_log import IterationLog
from h2s.reward.functions import RewardFunctions


def strike(owner, name: str, effect: Callable, run_folder: Path) -> None:
    """Have `effect` called in place of a function, with it and its arguments, once the run has a checkpoint."""
    plain = getattr(owner, name)

    @functools.wraps(plain)
    def struck(*args, **kwargs):
        if any(run_folder.glob("checkpoint-*")):
            return effect(plain, *args, **kwargs)
        return plain(*args, **kwargs)

    setattr(owner, name, struck)


def fails(error: Exception) -> Callable:
    def effect(plain, *args, **kwargs):
        raise error

    return effect


def signals(*numbers: int, seconds: float = 0.0) -> Callable:
    """Real signals to this process, with a pause after each; once."""
    left = list(numbers)

    def effect(plain, *args, **kwargs):
        while left:
            os.kill(os.getpid(), left.pop())
            time.sleep(seconds)
        return plain(*args, **kwargs)

    return effect


def infinite(plain, *args, **kwargs):
    value = plain(*args, **kwargs)
    return (value[0] * torch.inf, *value[1:]) if isinstance(value, tuple) else value * torch.inf


def no_number(plain, *args, **kwargs):
    return [math.nan for _ in plain(*args, **kwargs)]


def scored_by_no_number(plain, scorer, *args):
    """The scorer's function returns NaN; what a function returned None for is no fault."""
    (function,) = scorer.functions
    return plain(RewardFunctions(functools.partial(no_number, function)), *args)


def endless_step(plain, trainer, loss, calls=itertools.count(1)):  # noqa: B008 (one count a process is meant)
    """The second update, the last of an iteration, is infinitely large."""
    if next(calls) == 2:
        trainer.optimizer.param_groups[0]["lr"] = math.inf
    return plain(trainer, loss)


full_disk = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FAULTS: dict[str, tuple] = {
    "full_disk_adapter": (h2s.prefix.policy_model, "save_adapter", fails(full_disk)),
    # As torch says it on a full disk.
    "full_disk_optimizer": (torch, "save", fails(RuntimeError("PytorchStreamWriter failed writing file data/0"))),
    "full_disk_completions": (IterationLog, "write_completions", fails(full_disk)),
    "unwritable": (Path, "rename", fails(PermissionError(errno.EACCES, os.strerror(errno.EACCES)))),
    "nan_reward": (rewards_of_tests, "length", no_number),
    "nan_evaluation": (h2s.report.soft_vs_hard, "score_replies", scored_by_no_number),
    "reward_raises": (rewards_of_tests, "length", fails(KeyError("score"))),
    "infinite_loss": (h2s.ppo.trainer, "policy_loss", infinite),
    "infinite_kl": (h2s.ppo.rollout, "kl_to_reference", infinite),
    "endless_step": (SingleStepPPOTrainer, "_apply", endless_step),
    "infinite_pair_loss": (RewardModelTrainer, "compute_loss", infinite),
    "ctrl_c": (SingleStepPPOTrainer, "_apply", signals(signal.SIGINT)),
    "ctrl_c_while_saving": (SingleStepPPOTrainer, "_publish", signals(signal.SIGINT)),
    "sigterm": (SingleStepPPOTrainer, "_apply", signals(signal.SIGTERM)),
    "sigterm_passed_on": (SingleStepPPOTrainer, "_apply", signals(signal.SIGTERM, signal.SIGTERM)),
    "sigterm_twice": (SingleStepPPOTrainer, "_apply", signals(signal.SIGTERM, signal.SIGTERM, seconds=0.5)),
    "sigterm_report": (h2s.report.comparison, "sign_test_text", signals(signal.SIGTERM)),
    "sigterm_pairs": (RewardModelTrainer, "training_step", signals(signal.SIGTERM)),
}


def main() -> None:
    name, folder, faults, *flags = sys.argv[1:]
    torch.set_num_threads(1)
    h2s.run.folder.ONE_SIGNAL = 0.2
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    start, out = recipe(name), Path(folder)
    flags += ["--run_name", "run", "--disable_tqdm", "true", "--report_to", "none"]

    def begin(label: str, *more: str, prepare: Callable[[int], None] = lambda rank: None) -> int:
        (out / label).mkdir(parents=True, exist_ok=True)
        (code,) = run(start, [*flags, "--output_dir", str(out / label), *more], out / f"{label}.log", prepare=prepare)
        return code

    assert begin("undisturbed") == 0, (out / "undisturbed.err").read_text()[-3000:]
    expected = ending(out / "undisturbed" / "run")
    for fault in faults.split(","):
        here = out / fault / "run"
        code = begin(fault, prepare=lambda rank, f=fault, where=here: strike(*FAULTS[f], where))
        said = (out / f"{fault}.err").read_text()
        shutil.copytree(here, out / fault / "left")
        resumed = begin(fault, "--resume_from_checkpoint", "true")
        found = ending(here)
        differs = sorted(k for k in {*expected, *found} if expected.get(k) != found.get(k))
        print(
            json.dumps({"fault": fault, "code": code, "said": said, "resumed": resumed, "differs": differs}), flush=True
        )


if __name__ == "__main__":
    main()
