"""Tiny runs of the trainers that go into their second epoch, for the scripts of this folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONFAULTHANDLER": "1",  # an abort says where
    "PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{HERE}",
}
FLAGS: dict[str, dict[str, object]] = {
    "train_policy": {
        "hard_prompt": "Be kind.",
        "reward_function": "rewards_of_tests.length",
        "max_completion_length": 3,
        "per_device_train_batch_size": 8,
        "num_ppo_epochs": 2,
        "num_mini_batches": 1,
        "max_steps": 4,
        "eval_steps": 1,
        "save_steps": 2,
    },
    "train_dpo": {
        "hard_prompt": "Be kind.",
        "max_completion_length": 3,
        "per_device_train_batch_size": 16,
        "max_steps": 6,
        "eval_steps": 2,
        "save_steps": 2,
    },
    "train_reward": {"num_virtual_tokens": 4, "num_train_epochs": 2},
}
MODEL = {"train_reward": "reward_model_name_or_path"}


def start(script: str, recipe: str, model: Path, data: Path, *words: object, **flags: object) -> list[dict]:
    """Start a script of this folder on a tiny run; its JSON lines."""
    flags = {MODEL.get(recipe, "model_name_or_path"): model, "path": data} | FLAGS[recipe] | flags
    given = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    done = subprocess.run(
        [sys.executable, str(HERE / script), recipe, *map(str, words), *given],
        capture_output=True,
        text=True,
        timeout=900,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
