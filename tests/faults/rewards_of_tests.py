"""Reward functions of the runs that are disturbed here."""

import os
from pathlib import Path


def length(prompts, completions, **kwargs):
    return [len(completion[0]["content"]) / 10 for completion in completions]


def dies(prompts, completions, **kwargs):
    """The second process ends without a word once the run in this folder has a checkpoint."""
    if os.environ["RANK"] == "1" and list(Path().glob("run/checkpoint-*")):
        Path("died").touch()
        os._exit(7)
    return length(prompts, completions)
