"""Reward functions of the runs that are launched here."""

import os
import signal


def length(completions, **kwargs):
    return [len(completion[0]["content"]) / 10 for completion in completions]


def killed(completions, trainer_state, **kwargs):
    """The second process is killed within the third iteration, while the first one waits for it, if KILLS says so."""
    if "KILLS" in os.environ and os.environ["RANK"] == "1" and trainer_state.global_step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return length(completions)
