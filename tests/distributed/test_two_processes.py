"""Launched as users launch it: `accelerate launch` on CPU, one and two processes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

UPDATE = ROOT / "tests" / "distributed" / "one_update.py"


def launch(processes: int, *command: str) -> subprocess.CompletedProcess:
    config = ROOT / "accelerate_configs" / "cpu.yaml"
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return subprocess.run(
        [*accelerate, "--num_processes", str(processes), *command],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=False,
    )


@pytest.mark.parametrize("ratio_norm", ["none", "mean"])
def test_two_processes_give_the_gradient_that_one_gives(ratio_norm, gemma_folder, tmp_path):
    results = {}
    for processes, batch in ((1, 8), (2, 4)):
        out = tmp_path / f"{processes}.safetensors"
        done = launch(processes, str(UPDATE), str(gemma_folder), str(out), str(batch), ratio_norm)
        assert done.returncode == 0, done.stderr[-2000:]
        results[processes] = load_file(out), json.loads(out.with_suffix(".json").read_text())
    one, two = results[1][1], results[2][1]
    assert one["world_size"] == 1 and two["world_size"] == 2
    first, second = two["seen"]
    assert not set(first) & set(second)  # no context on both ranks
    assert sorted(first + second) == sorted(one["seen"][0])
    for name, gradient in results[1][0].items():
        scale = gradient.abs().max()
        assert scale > 0
        assert (results[2][0][name] - gradient).abs().max() / scale < 1e-5, name
        assert torch.isfinite(gradient).all()


def test_both_stages_run_on_two_processes(gemma_folder, bert_folder, sheet_file, contexts_file, tmp_path):
    common = ["--output_dir", str(tmp_path), "--report_to", "none", "--disable_tqdm", "true"]
    reward = ["recipes/train_reward.py", "--reward_model_name_or_path", str(bert_folder), "--path", str(sheet_file)]
    done = launch(2, *reward, "--run_name", "reward", "--num_train_epochs", "1", *common)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "reward" / "adapter_model.safetensors").is_file()

    policy = ["recipes/train_policy.py", "--model_name_or_path", str(gemma_folder), "--path", str(contexts_file)]
    policy += ["--hard_prompt", "You are a kind helper.", "--reward_adapter", str(tmp_path / "reward")]
    small = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--max_completion_length", "6"]
    done = launch(2, *policy, "--run_name", "policy", *small, *common)
    assert done.returncode == 0, done.stderr[-2000:]
    names = {f.name for f in (tmp_path / "policy").iterdir()}
    assert {"adapter_model.safetensors", "h2s.json", "recipe.yaml", "train.log", "trainer_state.json"} <= names
    log = (tmp_path / "policy" / "train.log").read_text()
    assert log.count("contexts that train") == 1  # one writer
    assert len([f for f in tmp_path.iterdir() if f.name.startswith("policy")]) == 1


def test_bad_input_is_one_line_for_all_processes(tmp_path):
    done = launch(2, "recipes/train_reward.py", "--path", str(tmp_path / "none.xlsx"), "--output_dir", str(tmp_path))
    assert done.returncode != 0
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
