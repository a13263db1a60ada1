"""What may go wrong in a run: it ends in one line and a code that tells, keeps what it has, and can be gone on with."""

import pytest
import torch
from faults.tiny_runs import start
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from safetensors.torch import load_file

pytestmark = pytest.mark.faults

SIGNALS = ("error: ", "interrupted by ", "ended by ")
# What strikes in the third of four steps, with a checkpoint each second: code, first words, newest checkpoint.
POLICY = {
    "full_disk_adapter": (1, "error: OSError: {run}/checkpoint-4 could not be written ([Errno 28] No space left", 2),
    "full_disk_optimizer": (1, "error: OSError: {run}/checkpoint-4 could not be written (PytorchStreamWriter", 2),
    "unwritable": (1, "error: OSError: {run}/checkpoint-4 could not be written ([Errno 13] Permission denied", 2),
    "full_disk_completions": (1, "error: OSError: [Errno 28] No space left", 2),
    "nan_reward": (1, "error: the reward of a reply is not finite: [inf, ", 2),
    "nan_evaluation": (1, "error: the reward of a reply is not finite; {run} holds", 2),
    "reward_raises": (1, "error: KeyError: 'score'", 2),
    "infinite_loss": (1, "error: the loss is ", 2),
    "infinite_kl": (1, "error: the KL to the hard prompt is not finite: lower learning_rate or raise kl_coef", 2),
    "endless_step": (1, "error: an update broke the prefix: lower learning_rate or raise kl_coef", 2),
    "ctrl_c": (130, "interrupted by Ctrl-C", 2),
    "ctrl_c_while_saving": (130, "interrupted by Ctrl-C", 2),
    "sigterm": (143, "ended by SIGTERM", 3),
    "sigterm_passed_on": (143, "ended by SIGTERM", 3),
    "sigterm_twice": (143, "ended by SIGTERM", 2),
    "sigterm_report": (143, "ended by SIGTERM", 4),
}
# Epochs of four steps, a checkpoint each.
REWARD = {
    "infinite_pair_loss": (1, "error: the gradient of step 5 is not finite: lower learning_rate", 4),
    "sigterm_pairs": (143, "ended by SIGTERM", 5),
}


@pytest.fixture(scope="module")
def outcomes(gemma_folder, loud_bert, contexts_file, sheet_file, tmp_path_factory):
    """Each stage's faults, in forks of one process: what became of each."""
    found = {}
    stages = (("train_policy", POLICY, gemma_folder, contexts_file), ("train_reward", REWARD, loud_bert, sheet_file))
    for recipe, faults, model, data in stages:
        folder = tmp_path_factory.mktemp(recipe)
        for outcome in start("faulty_run.py", recipe, model, data, folder, ",".join(faults)):
            found[outcome["fault"]] = outcome | {"folder": folder / outcome["fault"]}
    return found


@pytest.mark.parametrize("fault", [*POLICY, *REWARD])
def test_a_fault_is_one_line_and_loses_nothing(outcomes, fault):
    outcome = outcomes[fault]
    code, words, newest = (POLICY | REWARD)[fault]
    run, left = outcome["folder"] / "run", outcome["folder"] / "left"
    assert outcome["code"] == code
    lines = [line for line in outcome["said"].splitlines() if line.strip() and "it/s]" not in line]
    (line,) = [line for line in lines if any(word in line for word in SIGNALS)]
    assert words.format(run=run) in line
    assert "Traceback" not in outcome["said"]
    assert f"{run} holds checkpoint-{newest}" in line
    assert line.endswith(f"--output_dir {run.parent} --run_name run --resume_from_checkpoint true goes on")

    adapters = [left / f"checkpoint-{newest}", *([left] if fault in POLICY else [])]
    kind = AutoPeftModelForCausalLM if fault in POLICY else AutoPeftModelForSequenceClassification
    for folder in adapters:
        kind.from_pretrained(folder, **({} if fault in POLICY else {"num_labels": 1}))
        assert all(torch.isfinite(w).all() for w in load_file(folder / "adapter_model.safetensors").values())

    assert outcome["resumed"] == 0
    # A SIGTERM's checkpoint is one more than was asked for, and so is the log line before it.
    more = ("checkpoints", "files", "trainer_state.json") if code == 143 else ()
    assert [name for name in outcome["differs"] if not name.endswith(more)] == []
