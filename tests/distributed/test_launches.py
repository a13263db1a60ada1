"""The configurations of several processes, launched as they are: both stages, bad input, a process that is killed."""

import json

import pandas as pd
import pytest
from distributed.launching import ENVIRONMENT, launch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from safetensors.torch import load_file

from h2s import PrefixTuningPolicyModel
from h2s.prefix.adapter import soft_prefix

QUIET = ["--report_to", "none", "--disable_tqdm", "true"]
# The number of launchers; each pair makes two processes.
CONFIGS = {"multi_gpu": 1, "multi_node": 2}


@pytest.fixture
def reward(bert_folder, sheet_file):
    """The command of a small stage 1."""
    command = ["recipes/train_reward.py", "--reward_model_name_or_path", str(bert_folder), "--path", str(sheet_file)]
    return [*command, "--num_train_epochs", "1", "--per_device_train_batch_size", "4", *QUIET]


@pytest.fixture
def policy(gemma_folder, contexts_file):
    """The command of a small stage 2."""
    command = ["recipes/train_policy.py", "--model_name_or_path", str(gemma_folder), "--path", str(contexts_file)]
    command += ["--hard_prompt", "You are a kind helper.", "--reward_function", "rewards_of_launches.length"]
    return [*command, "--max_steps", "2", "--per_device_train_batch_size", "4", "--max_completion_length", "4", *QUIET]


def of_two(folder) -> dict:
    """The newest checkpoint's state, once it is seen to be whole and written by two processes."""
    newest = max(folder.glob("checkpoint-*"), key=lambda f: int(f.name.rsplit("-", 1)[1]))
    files = {f.name for f in newest.iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "adapter_model.safetensors"} <= files
    assert not list(folder.glob("unfinished*"))
    return json.loads((newest / "trainer_state.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("config", ["multi_gpu", pytest.param("multi_node", marks=pytest.mark.faults)])
def test_stage_1_as_configured(config, reward, tmp_path):
    done = launch(2, *reward, "--output_dir", str(tmp_path), config=config, machines=CONFIGS[config])
    assert done.returncode == 0, done.stderr[-8000:]
    (folder,) = tmp_path.iterdir()  # named after the time, the same on both
    log = (folder / "train.log").read_text(encoding="utf-8")
    assert log.count("pairs that train") == 1
    pairs = int(log.split("pairs that train ")[1].split(",")[0])
    state = of_two(folder)
    assert state["global_step"] == state["max_steps"] == -(-pairs // 8)  # 4 on each
    AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1)


@pytest.mark.parametrize("config", CONFIGS)
def test_stage_2_as_configured(config, policy, tmp_path):
    done = launch(2, *policy, "--output_dir", str(tmp_path), config=config, machines=CONFIGS[config])
    assert done.returncode == 0, done.stderr[-8000:]
    (folder,) = tmp_path.iterdir()
    assert (folder / "train.log").read_text(encoding="utf-8").count("contexts that train") == 1
    assert of_two(folder)["global_step"] == 2
    said = [line.split(": ")[1].split(" ")[0] for line in done.stdout.splitlines() if line.startswith("step ")]
    assert said == ["reward", "reward", "soft", "trained"]  # once, by the first of them
    files = sorted((folder / "completions").iterdir())
    prompts = [pd.read_parquet(file)["prompt"].map(str) for file in files]
    assert [len(p) for p in prompts] == [8, 8] == [p.nunique() for p in prompts]  # 4 on each, none on both
    AutoPeftModelForCausalLM.from_pretrained(folder)


@pytest.mark.faults
def test_dpo_on_two_processes_ends_where_one_does(gemma_folder, sheet_file, tmp_path):
    command = ["recipes/train_dpo.py", "--model_name_or_path", str(gemma_folder), "--path", str(sheet_file)]
    command += ["--hard_prompt", "You are a kind helper.", "--max_steps", "3", "--eval_steps", "3", "--save_steps", "3"]
    command += ["--max_completion_length", "4", "--output_dir", str(tmp_path), *QUIET]
    for processes, pairs in ((1, 4), (2, 2)):
        flags = ["--run_name", str(processes), "--per_device_train_batch_size", str(pairs)]
        done = launch(processes, *command, *flags, config="multi_gpu")
        assert done.returncode == 0, done.stderr[-8000:]
        said = [line for line in done.stdout.splitlines() if line.startswith("step ")]
        assert len(said) == 3  # the last step's, its evaluation, the time; once, by the first of them
    assert of_two(tmp_path / "2")["global_step"] == 3
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors")["prompt_embeddings"] for n in "12")
    began = PrefixTuningPolicyModel.from_hard_prompt(str(gemma_folder), "You are a kind helper.")
    assert (one - soft_prefix(began.model)).abs().max() > 1e-2
    assert (one - two).abs().max() < 1e-3 and (one - two).abs().mean() < 1e-6
    tables = [pd.read_parquet(tmp_path / n / "pairs.parquet") for n in "12"]
    assert tables[0]["margin"].tolist() == pytest.approx(tables[1]["margin"].tolist(), abs=1e-4)
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "2")


@pytest.mark.parametrize(
    ("config", "stage", "flags", "words"),
    [
        pytest.param(
            *("multi_gpu", "reward", ["--test_size", "0.7"], "test_size must lie between 0 and 0.6"),
            marks=pytest.mark.faults,
        ),
        # Enough for one process.
        ("multi_node", "policy", ["--per_device_train_batch_size", "20"], "fewer than the 40 of one iteration: lower"),
    ],
)
def test_bad_input_is_told_once(config, stage, flags, words, request, tmp_path):
    command = request.getfixturevalue(stage)
    done = launch(2, *command, "--output_dir", str(tmp_path), *flags, config=config, machines=CONFIGS[config])
    assert done.returncode != 0 and "exitcode  : 2" in done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert words in error
    assert not list(tmp_path.iterdir())


@pytest.mark.faults
def test_a_killed_process_ends_the_run_and_leaves_what_can_be_gone_on_with(policy, tmp_path, monkeypatch):
    flags = ["--output_dir", str(tmp_path), "--run_name", "run", "--save_steps", "1", "--max_steps", "4"]
    flags += ["--reward_function", "rewards_of_launches.killed"]
    monkeypatch.setitem(ENVIRONMENT, "KILLS", "1")
    done = launch(2, *policy, *flags, config="multi_gpu")
    assert done.returncode != 0 and "Signal 9 (SIGKILL)" in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "goes on" in line]
    assert "run holds checkpoint-2" in line
    assert of_two(tmp_path / "run")["global_step"] == 2
    monkeypatch.delitem(ENVIRONMENT, "KILLS")
    done = launch(2, *policy, *flags, "--resume_from_checkpoint", "true", config="multi_gpu")
    assert done.returncode == 0, done.stderr[-8000:]
    assert of_two(tmp_path / "run")["global_step"] == 4
