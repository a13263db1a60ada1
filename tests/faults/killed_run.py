"""Kill a recipe at chosen moments, resume it, and hold what it ends with against the run that nothing disturbed.

    python killed_run.py RECIPE PROCESSES POINTS FOLDER FLAG…

The moments are counted events: a call of one of the recipe's `MOMENTS` by the first process, and all are killed at
once. Prints a JSON line a kill point: where it fell and what differed.
"""

import functools
import json
import os
import random
import signal
import sys
from pathlib import Path

import torch
from forks import recipe, run
from safetensors.torch import load_file

import h2s.dpo.pairs
import h2s.dpo.trainer
import h2s.ppo.iteration_log
import h2s.ppo.trainer
import h2s.prefix.policy_model
import h2s.report.soft_vs_hard
import h2s.reward.model
import h2s.reward.trainer
import h2s.run.checkpoints
import h2s.run.whole_files

# Where a kill may fall: each file of a checkpoint or an adapter, and
SAVING = (
    (h2s.run.checkpoints.WholeCheckpoints, "_save_optimizer_and_scheduler"),
    (h2s.run.checkpoints.WholeCheckpoints, "_save_rng_state"),
    (h2s.run.checkpoints.WholeCheckpoints, "_publish"),
    (h2s.run.whole_files, "_sync"),
    (h2s.run.checkpoints, "rotate_checkpoints"),
)
MOMENTS = {
    # sampling, an update, the parts of an evaluation;
    "train_policy": (
        *SAVING,
        (h2s.prefix.policy_model.PrefixTuningPolicyModel, "draw"),
        (h2s.report.soft_vs_hard, "_answer"),
        (h2s.ppo.trainer.SingleStepPPOTrainer, "_apply"),
        (h2s.prefix.policy_model, "save_adapter"),
        (h2s.ppo.iteration_log.IterationLog, "write_completions"),
    ),
    # a step, a batch of an evaluation, of the report;
    "train_dpo": (
        *SAVING,
        (h2s.dpo.trainer.PrefixDPOTrainer, "training_step"),
        (h2s.dpo.trainer.PrefixDPOTrainer, "prediction_step"),
        (h2s.report.soft_vs_hard, "_answer"),
        (h2s.dpo.pairs.ImplicitReward, "score"),
        (h2s.prefix.policy_model, "save_adapter"),
    ),
    # a step, a batch of an evaluation.
    "train_reward": (
        *SAVING,
        (h2s.reward.trainer.RewardModelTrainer, "training_step"),
        (h2s.reward.trainer.RewardModelTrainer, "prediction_step"),
        (h2s.reward.model.RewardModel, "_save_files"),
    ),
}
# Not compared: the clock, and two of Trainer's and TRL's that count since the last start (the closing mean of the loss,
# the tokens seen).
NOT_COMPARED = ("_runtime", "_per_second", "train_loss", "num_tokens")


def counted(function, on_moment):
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        on_moment(function.__name__)
        return function(*args, **kwargs)

    return wrapped


def count_moments(rank: int, recipe: str, report: int, kill_at: int | None = None) -> None:
    """Write a line to `report` at each moment of the first process, and kill all before the given one."""
    seen = [0]

    def on_moment(name: str) -> None:
        seen[0] += 1
        os.write(report, f"{name}\n".encode())
        if seen[0] == kill_at:
            print(f"killed before moment {kill_at}, {name}", flush=True)
            os.killpg(0, signal.SIGKILL)

    if rank == 0:
        for owner, name in MOMENTS[recipe]:
            setattr(owner, name, counted(getattr(owner, name), on_moment))


def ending(folder: Path) -> dict:
    """All that a run ends with: adapters, value head, optimiser, schedule, random states, logged numbers, replies."""
    newest = max(folder.glob("checkpoint-*"), key=lambda f: int(f.name.rsplit("-", 1)[1]))
    found: dict = {
        "checkpoints": sorted(f.name for f in folder.glob("checkpoint-*")),
        "files": sorted(str(f.relative_to(folder)) for f in folder.rglob("*")),
    }
    for file in (folder / "trainer_state.json", newest / "trainer_state.json"):
        if file.is_file():
            found[file] = repr(json.loads(file.read_text(), object_hook=compared)).replace(str(folder), "")
    for file in (*folder.glob("*.safetensors"), *newest.glob("*.safetensors")):
        found[file] = {k: v.numpy().tobytes() for k, v in load_file(file).items()}
    for file in newest.glob("*.pt*"):
        # Our own run's file of a moment ago; numpy's state in it needs the full unpickler.
        found[file] = repr(flat(torch.load(file, weights_only=False)))
    for file in (*folder.glob("completions/*.parquet"), *folder.glob("*.md"), *folder.glob("*.parquet")):
        found[file] = file.read_bytes().replace(bytes(folder), b"")
    return {str(k).replace(str(folder), ""): v for k, v in found.items()}


def compared(line: dict) -> dict:
    """A JSON object without what is not compared."""
    return {k: v for k, v in line.items() if not any(t in k for t in NOT_COMPARED)}


def flat(value):
    """Tensors as bytes, so that equality is to the bit."""
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes().hex()
    if isinstance(value, dict):
        return {k: flat(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [flat(v) for v in value]
    return value.tobytes().hex() if hasattr(value, "tobytes") else value


def main() -> None:
    name, processes, points, folder, *flags = sys.argv[1:]
    torch.set_num_threads(1)
    out = Path(folder)
    start, processes = recipe(name), int(processes)
    flags += ["--run_name", "run", "--disable_tqdm", "true", "--report_to", "none"]

    def begin(label: str, *more: str, kill_at: int | None = None) -> tuple[list[int], list[str]]:
        """Exit codes and moments of a run in the folder `label`."""
        (out / label).mkdir(parents=True, exist_ok=True)
        reader, writer = os.pipe()
        prepare = functools.partial(count_moments, recipe=name, report=writer, kill_at=kill_at)
        codes = run(start, [*flags, "--output_dir", str(out / label), *more], out / f"{label}.log", processes, prepare)
        os.close(writer)
        with os.fdopen(reader) as moments:
            return codes, moments.read().splitlines()

    codes, moments = begin("undisturbed")
    assert not any(codes), (out / "undisturbed.err").read_text()[-3000:]
    expected = ending(out / "undisturbed" / "run")
    assert {n for _, n in MOMENTS[name]} == set(moments), "a name has moved, and no kill would fall there"
    assert sum("rng_state" in name and name.endswith(".pth") for name in expected) == processes
    for point in sorted(random.Random(0).sample(range(1, len(moments) + 1), int(points))):
        label = f"killed-{point}"
        killed, _ = begin(label, kill_at=point)
        (where,) = [line for line in (out / f"{label}.log").read_text().splitlines() if line.startswith("killed")]
        resumed, _ = begin(label, "--resume_from_checkpoint", "true")
        result = {
            "point": point,
            "of": len(moments),
            "where": where.rsplit(" ", 1)[1],
            "killed": killed,
            "resumed": resumed,
        }
        if not any(resumed):
            found = ending(out / label / "run")
            result["differs"] = sorted(k for k in {*expected, *found} if expected.get(k) != found.get(k))
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
