"""Launched as users launch it: `accelerate launch` on CPU, one and two processes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny import ROOT
from torch import distributed as dist

from h2s.run.folder import reports_errors

UPDATES = ROOT / "tests" / "distributed" / "updates.py"
SHARDED = ROOT / "tests" / "distributed" / "sharded.py"


def launch(processes: int, *command: str) -> subprocess.CompletedProcess:
    config = ROOT / "accelerate_configs" / "cpu.yaml"
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return run(*accelerate, "--num_processes", str(processes), *command)


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=False,
    )


@pytest.fixture(scope="module")
def updates(gemma_folder, tmp_path_factory):
    """Folders with what one and two processes ended with."""
    folders = {}
    for processes, batch in ((1, 8), (2, 4)):
        folders[processes] = tmp_path_factory.mktemp(f"processes-{processes}-")
        done = launch(processes, str(UPDATES), str(gemma_folder), str(folders[processes]), str(batch), "9")
        assert done.returncode == 0, done.stderr[-2000:]
    return folders


@pytest.mark.parametrize("ratio_norm", ["none", "mean"])
def test_two_processes_end_where_one_does(ratio_norm, updates):
    """Three iterations of two passes on the same global batch of 8 out of 9 contexts, which do not share out evenly."""
    results = {
        processes: (load_file(f / f"{ratio_norm}.safetensors"), json.loads((f / f"{ratio_norm}.json").read_text()))
        for processes, f in updates.items()
    }
    one, two = results[1][1], results[2][1]
    assert one["world_size"] == 1 and two["world_size"] == 2
    assert len(one["seen"][0]) == 4  # the value head's batch and three iterations
    for alone, first, second in zip(one["seen"][0], *two["seen"], strict=True):
        assert not set(first) & set(second)  # no context on both ranks
        assert sorted(first + second) == sorted(alone)
    # Three contexts over two ranks: one has two of them.
    assert one["evaluated"] == two["evaluated"] == [3]
    assert results[1][0]["moved"].abs().max() > 1e-3
    for name, value in results[1][0].items():
        assert (results[2][0][name] - value).abs().max() < 1e-6, name


def test_sharded_by_fsdp2(gemma_folder, tmp_path):
    """Forward, gradient and the saved prefix of a model that no process holds whole."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = run(*torchrun, str(SHARDED), str(gemma_folder), str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert [r["world_size"] for r in results] == [2, 2]
    rows = results[0]["rows of the prefix"]
    assert sum(r["rows of the prefix here"] for r in results) == rows and rows > results[0]["rows of the prefix here"]
    for result in results:
        assert result["logps"] < 1e-6 and result["gradient"] < 1e-6 and result["largest gradient"] > 1e-3
    saved = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    whole = load_file(tmp_path / "whole.safetensors")
    assert torch.equal(saved, whole.pop("prefix"))
    head = load_file(tmp_path / "value_head.safetensors")
    assert head.keys() == whole.keys() and all(torch.equal(head[name], whole[name]) for name in whole)


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


def test_a_recipe_leaves_its_process_group():
    """Left to the interpreter's end, gloo's threads can abort it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    inside = []
    reports_errors(lambda: inside.append(dist.is_initialized()))()
    assert inside == [True]
    assert not dist.is_initialized()
