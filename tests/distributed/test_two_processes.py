"""Launched as users launch it: `accelerate launch` on CPU, one and two processes."""

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from distributed.launching import launch, run
from safetensors.torch import load_file
from tiny import HARD_PROMPT, ROOT
from torch import distributed as dist

from h2s import PrefixTuningPolicyModel
from h2s.run.folder import run_recipe

UPDATES = ROOT / "tests" / "distributed" / "updates.py"
ADAPTER = "adapter_model.safetensors"
FSDP2 = ROOT / "tests" / "distributed" / "fsdp2.py"


@pytest.fixture(scope="module")
def updates(gemma_folder, tmp_path_factory):
    """Folders with what one and two processes ended with."""
    folders = {}
    for processes, batch in ((1, 8), (2, 4)):
        folders[processes] = tmp_path_factory.mktemp(f"processes-{processes}-")
        done = launch(processes, str(UPDATES), str(gemma_folder), str(folders[processes]), str(batch), "9")
        assert done.returncode == 0, done.stderr[-8000:]
    return folders


@pytest.mark.parametrize("way", ["none", "single", "mean", "4-bits", "left-out"])
def test_two_processes_end_where_one_does(way, updates):
    """Three iterations of two passes, or one, on the same 8 of 9 contexts, which do not share out evenly."""
    ends = {n: load_file(folder / f"{way}.safetensors") for n, folder in updates.items()}
    one, two = (json.loads((folder / f"{way}.json").read_text()) for folder in updates.values())
    assert one["world_size"] == 1 and two["world_size"] == 2
    # The warm-up's two batches, three iterations, an evaluation of both prompts.
    assert len(one["seen"][0]) == 5 + 2 * (way != "left-out")
    for alone, first, second in zip(one["seen"][0][:-2], *(seen[:-2] for seen in two["seen"]), strict=True):
        assert not set(first) & set(second)  # no context on both ranks
        assert sorted(first + second) == sorted(alone)
    assert ends[1]["moved"].abs().max() > 1e-3
    if way == "4-bits":
        assert (ends[1]["prefix"] - load_file(updates[1] / "mean.safetensors")["prefix"]).abs().max() > 1e-2
    for name, value in ends[1].items():
        # The value head is fitted to rows in another order; where gradients are next to 0 Adam takes rounding for them.
        assert (ends[2][name] - value).abs().max() < 1e-5, name
    # What is logged of training, rewards and evaluation is that of all contexts; the last line is of the time.
    for alone, together in zip(one["log"][:-1], two["log"][:-1], strict=True):
        assert together == pytest.approx(alone, rel=1e-4, abs=1e-5)
    assert one["log"][3]["eval_contexts"] == 3 and sum("metric of walk" in name for name in one["log"][0]) == 8
    for step in (1, 2, 3):
        name = Path(f"run-{way}", "completions", f"step-{step:06d}.parquet")
        alone, together = (pd.read_parquet(folder / name).sort_values("completion") for folder in updates.values())
        assert len(alone) == 8 and together["letters"].tolist() == alone["letters"].tolist()
        assert together["advantage"].tolist() == pytest.approx(alone["advantage"].tolist(), abs=1e-4)
        assert together["score"].isna().tolist() == alone["score"].isna().tolist()
        assert alone["score"].isna().any() == (way == "left-out")


@pytest.fixture(scope="module")
def shards(gemma_folder, tmp_path_factory):
    """Folders of `fsdp2.py`: by `fsdp2.yaml` as it is on two processes, and whole on one."""
    folders = [tmp_path_factory.mktemp(name) for name in ("whole", "sharded")]
    for done in (
        run(sys.executable, str(FSDP2), str(gemma_folder), str(folders[0]), "4"),
        launch(2, str(FSDP2), str(gemma_folder), str(folders[1]), "2", config="fsdp2"),
    ):
        assert done.returncode == 0, done.stderr[-8000:]
    return folders


def test_a_policy_that_fsdp2_shards_ends_where_it_ends_whole(shards):
    """It samples, scores, updates, evaluates, saves, resumes and reports as one process does."""
    whole, sharded = (json.loads((folder / "result.json").read_text()) for folder in shards)
    assert not whole["sharded"] and sharded["sharded"] and sharded["world_size"] == 2
    assert 0 < sharded["rows here"] < sharded["rows"] == whole["rows"]
    for passes in (1, 2):
        runs = [folder / f"run-{passes}" for folder in shards]
        ends = [load_file(run / "checkpoint-3" / ADAPTER)["prompt_embeddings"] for run in runs]
        assert (ends[0] - load_file(runs[0] / "checkpoint-1" / ADAPTER)["prompt_embeddings"]).abs().max() > 1e-3
        torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-5)
        heads = [load_file(run / "checkpoint-3" / "value_head.safetensors") for run in runs]
        for name, value in heads[0].items():
            torch.testing.assert_close(heads[1][name], value, rtol=0, atol=1e-5)
    for one, two in zip(whole["log"], sharded["log"], strict=True):
        timeless = {name: value for name, value in one.items() if "runtime" not in name and "second" not in name}
        assert {name: two[name] for name in timeless} == pytest.approx(timeless, rel=1e-4, abs=1e-5, nan_ok=True)
    assert sharded["replies"] == whole["replies"] and len(set(whole["replies"])) == 2
    for name, values in whole["report"].items():
        assert sharded["report"][name] == (values if name in ("soft", "hard") else pytest.approx(values, abs=1e-4))
    torch.testing.assert_close(*(torch.tensor(way["moved"]) for way in (sharded, whole)), rtol=0, atol=1e-5)
    assert min(whole["moved"][0]) > 0
    # No process wrote the frozen model, and what was written is what one process writes.
    names = [{f.name for f in (folder / "run-2" / "checkpoint-3").iterdir()} for folder in shards]
    assert names[1] - names[0] == {"rng_state_0.pth", "rng_state_1.pth"} and names[0] - names[1] == {"rng_state.pth"}


@pytest.fixture(scope="module")
def compared(policy_adapter, reward_adapter, contexts_file, tmp_path_factory):
    """Folders of `compare.py` on one and two processes."""
    out = tmp_path_factory.mktemp("compared")
    flags = ["--policy_adapter", policy_adapter, "--reward_adapter", reward_adapter, "--path", contexts_file]
    flags += ["--max_completion_length", 6, "--batch_size", 3, "--best_of_n", 2, "--output_dir", out, "--split", "all"]
    flags += ["--strengths", "0.5", "--temperature", 1]
    for processes in (1, 2):
        done = launch(processes, "recipes/compare.py", *map(str, flags), "--run_name", str(processes))
        assert done.returncode == 0, done.stderr[-8000:]
    return out


@pytest.mark.faults
def test_comparing_on_two_processes_says_what_one_says(compared):
    """40 contexts in 14 batches of up to 3: the same replies, scores, report and sheet, each file written once."""
    one, two = (compared / str(n) for n in (1, 2))
    assert sorted(f.name for f in compared.iterdir()) == ["1", "2"]
    assert {f.name for f in one.iterdir()} == {f.name for f in two.iterdir()} > {"blinded.xlsx", "README.md"}
    tables = [pd.read_parquet(folder / "replies.parquet") for folder in (one, two)]
    pd.testing.assert_frame_equal(*tables)
    assert len(tables[0]) == 40 and tables[0]["soft_reward"].nunique() > 5
    pd.testing.assert_frame_equal(*(pd.read_parquet(folder / "strengths.parquet") for folder in (one, two)))
    assert (one / "README.md").read_text() == (two / "README.md").read_text()
    sheets = [pd.read_excel(folder / "blinded.xlsx") for folder in (one, two)]
    pd.testing.assert_frame_equal(*sheets)
    assert (two / "train.log").read_text().count("Temperature ") == 1


@pytest.mark.faults
def test_converting_on_two_processes_writes_once(gemma_folder, tmp_path):
    flags = ["--model_name_or_path", str(gemma_folder), "--hard_prompt", HARD_PROMPT, "--output_dir", str(tmp_path)]
    done = launch(2, "recipes/convert_prompt.py", *flags)
    assert done.returncode == 0, done.stderr[-8000:]
    (folder,) = tmp_path.iterdir()  # named after the time, the same on both
    assert {"adapter_model.safetensors", "h2s.json", "recipe.yaml", "train.log"} <= {f.name for f in folder.iterdir()}
    log = (folder / "train.log").read_text()
    assert log.count("saved to") == 1 == log.count("virtual tokens")
    again = PrefixTuningPolicyModel.from_pretrained(folder, device="cpu")
    assert again.difference_to_hard_prompt() < 1e-4


@pytest.mark.faults
def test_generating_is_of_one_process(policy_adapter):
    """Told in one line for both, as all bad input is."""
    done = launch(2, "recipes/generate.py", "--policy_adapter", str(policy_adapter), "--conversation", "hello")
    assert done.returncode != 0 and "exitcode  : 2" in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: generate.py is one conversation on one process, got 2: start it with python"]


@pytest.mark.faults
def test_both_stages_run_on_two_processes(gemma_folder, bert_folder, sheet_file, contexts_file, tmp_path):
    common = ["--output_dir", str(tmp_path), "--report_to", "none", "--disable_tqdm", "true"]
    reward = ["recipes/train_reward.py", "--reward_model_name_or_path", str(bert_folder), "--path", str(sheet_file)]
    done = launch(2, *reward, "--run_name", "reward", "--num_train_epochs", "1", *common)
    assert done.returncode == 0, done.stderr[-8000:]
    assert (tmp_path / "reward" / "adapter_model.safetensors").is_file()

    policy = ["recipes/train_policy.py", "--model_name_or_path", str(gemma_folder), "--path", str(contexts_file)]
    policy += ["--hard_prompt", "You are a kind helper.", "--reward_adapter", str(tmp_path / "reward")]
    small = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--max_completion_length", "6"]
    done = launch(2, *policy, "--run_name", "policy", *small, *common)
    assert done.returncode == 0, done.stderr[-8000:]
    names = {f.name for f in (tmp_path / "policy").iterdir()}
    assert {"adapter_model.safetensors", "h2s.json", "recipe.yaml", "train.log", "trainer_state.json"} <= names
    log = (tmp_path / "policy" / "train.log").read_text()
    assert log.count("contexts that train") == 1  # one writer
    assert len([f for f in tmp_path.iterdir() if f.name.startswith("policy")]) == 1


def test_a_recipe_leaves_its_process_group():
    """Left to the interpreter's end, gloo's threads can abort it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    inside = []
    run_recipe(lambda run, argv: inside.append(dist.is_initialized()))()
    assert inside == [True]
    assert not dist.is_initialized()
