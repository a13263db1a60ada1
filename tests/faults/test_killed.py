"""Runs killed by SIGKILL at seeded random moments end, resumed, in the bytes of the run that nothing disturbed."""

import signal

import pytest
from faults.tiny_runs import start

pytestmark = pytest.mark.faults

# Log lines, evaluations and checkpoints at different steps, so that none of them hides what another forgets.
POLICY = {"logging_steps": 3, "eval_on_start": "true"}


@pytest.mark.parametrize(
    ("recipe", "processes", "points", "flags"),
    [
        ("train_policy", 1, 8, POLICY),
        ("train_reward", 1, 4, {"logging_steps": 3}),
        ("train_dpo", 1, 3, {"logging_steps": 3}),
        ("train_policy", 2, 2, POLICY | {"per_device_train_batch_size": 4, "max_steps": 3}),
        ("train_reward", 2, 2, {}),
    ],
)
def test_a_killed_run_ends_in_the_same_bytes(
    recipe, processes, points, flags, gemma_folder, loud_bert, contexts_file, sheet_file, tmp_path
):
    judged = (loud_bert if recipe == "train_reward" else gemma_folder, sheet_file)
    given = (gemma_folder, contexts_file) if recipe == "train_policy" else judged
    results = start("killed_run.py", recipe, *given, processes, points, tmp_path, **flags)
    assert len(results) == points
    for result in results:
        assert result["killed"] == [-signal.SIGKILL] * processes, result
        assert result["resumed"] == [0] * processes and result["differs"] == [], result
