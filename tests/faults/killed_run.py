"""Kill a recipe at chosen moments, resume it, and hold what it ends with against the run that nothing disturbed.

    python killed_run.py RECIPE POINTS FOLDER FLAG…

Each run is a fork of this process, which has imported everything and computed nothing. The moments are counted events:
a call of one of `MOMENTS`. Prints a JSON line a kill point: where it fell and what differed.
"""

import functools
import importlib.util
import json
import os
import random
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import h2s.checkpoints
import h2s.evaluation
import h2s.ppo_trainer
import h2s.reward_training
import h2s.rollout

ROOT = Path(__file__).parents[2]
# Where a kill may fall: sampling, an update, the parts of an evaluation, and each file of a checkpoint or an adapter.
MOMENTS = (
    (h2s.ppo_trainer, "generate"),
    (h2s.evaluation, "generate"),
    (h2s.evaluation, "completion_logps"),
    (h2s.ppo_trainer.SingleStepPPOTrainer, "_apply"),
    (h2s.ppo_trainer, "save_adapter"),
    (h2s.ppo_trainer.SingleStepPPOTrainer, "_write_completions"),
    (h2s.reward_training.PrefixRewardTrainer, "training_step"),
    (h2s.reward_training.PrefixRewardTrainer, "prediction_step"),
    (h2s.checkpoints.WholeCheckpoints, "_save_optimizer_and_scheduler"),
    (h2s.checkpoints.WholeCheckpoints, "_save_rng_state"),
    (h2s.checkpoints.WholeCheckpoints, "_publish"),
    (h2s.checkpoints, "_sync"),
    (h2s.checkpoints, "rotate_checkpoints"),
)
TIMES = ("runtime", "per_second", "flos", "train_loss")  # of the machine; train_loss counts the steps since the start


def recipe(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def run(main, flags: list[str], log: Path, kill_at: int | None = None) -> tuple[int, int]:
    """Run `main` in a fork; returns the wait status and how many moments it counted."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        with os.fdopen(reader) as pipe:
            counted = pipe.read().splitlines()
        return os.waitpid(child, 0)[1], len(counted)
    os.close(reader)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    seen = [0]

    def counting(function, name):
        @functools.wraps(function)
        def counted(*args, **kwargs):
            seen[0] += 1
            os.write(writer, f"{name}\n".encode())
            if seen[0] == kill_at:
                print(f"killed before moment {kill_at}, {name}", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counted

    for owner, name in MOMENTS:
        setattr(owner, name, counting(getattr(owner, name), name))
    code = 0
    try:
        main(flags)
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    os._exit(code)


def ending(folder: Path) -> dict:
    """All that a run ends with: adapters, value head, optimiser, schedule, random states, logged numbers, replies."""
    state = json.loads((folder / "trainer_state.json").read_text()) if (folder / "trainer_state.json").is_file() else {}
    newest = max(folder.glob("checkpoint-*"), key=lambda f: int(f.name.rsplit("-", 1)[1]))
    in_checkpoint = json.loads((newest / "trainer_state.json").read_text())
    found: dict = {
        "checkpoint": newest.name,
        "checkpoints": sorted(f.name for f in folder.glob("checkpoint-*")),
        "best": (in_checkpoint["best_metric"], in_checkpoint["best_global_step"]),
        "leftovers": sorted(f.name for f in folder.glob("unfinished*")),
    }
    for name, history in (("log", state.get("log_history", [])), ("checkpoint's log", in_checkpoint["log_history"])):
        found[name] = [{k: repr(v) for k, v in h.items() if not any(t in k for t in TIMES)} for h in history]
    for where in (folder, newest):
        for file in where.glob("*.safetensors"):
            found[f"{where.name if where != folder else 'root'}/{file.name}"] = {
                k: v.numpy().tobytes() for k, v in load_file(file).items()
            }
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        # Our own run's file of a moment ago; numpy's state in it needs the full unpickler.
        found[name] = repr(flat(torch.load(newest / name, weights_only=False)))
    found["completions"] = {f.name: f.read_bytes() for f in sorted(folder.glob("completions/*.parquet"))}
    return found


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
    name, points, folder, *flags = sys.argv[1:]
    torch.set_num_threads(1)
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    start = recipe(name)
    common = [*flags, "--output_dir", str(out), "--disable_tqdm", "true", "--report_to", "none"]
    status, total = run(start, [*common, "--run_name", "whole"], out / "whole.log")
    assert status == 0, (out / "whole.log").read_text()[-3000:]
    expected = ending(out / "whole")
    for point in sorted(random.Random(0).sample(range(1, total + 1), int(points))):
        run_name, log = f"killed-{point}", out / f"killed-{point}.log"
        status, _ = run(start, [*common, "--run_name", run_name], log, kill_at=point)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        resumed, _ = run(start, [*common, "--run_name", run_name, "--resume_from_checkpoint", "true"], log)
        result = {"point": point, "of": total, "killed": killed, "resumed": resumed, "log": str(log)}
        if resumed == 0:
            found = ending(out / run_name)
            result["differs"] = [k for k in {*expected, *found} if expected.get(k) != found.get(k)]
        where = [line for line in log.read_text().splitlines() if line.startswith("killed before")]
        print(json.dumps(result | {"where": where[0].rsplit(" ", 1)[1] if where else None}), flush=True)


if __name__ == "__main__":
    main()
