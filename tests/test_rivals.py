"""tests/benchmarks/rivals.py end to end on tiny models: every arm, and a run that was stopped."""

import json
import math
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tiny import ROOT, sample_context

from h2s import RewardModel

SCRIPT = ROOT / "tests" / "benchmarks" / "rivals.py"
ADAPTER = "adapter_model.safetensors"
ARMS = ["ppo", "ppo-4", "dpo", "rloo", "best-of-4", "lora-dpo"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Run it, for no time at all: a step a training."""
    folder = tmp_path_factory.mktemp("rivals")
    contexts = folder / "contexts.json"
    contexts.write_text(json.dumps([{"context": sample_context(i)} for i in range(36)]))

    def run(*flags, minutes=0, out=folder / "out"):
        command = [sys.executable, str(SCRIPT), "--out", str(out), "--model", "tiny"]
        command += ["--contexts", str(contexts), "--max_completion_length", "6", "--minutes", str(minutes)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*command, *flags], capture_output=True, text=True, timeout=900, env=environment, check=False
        )

    run.out = folder / "out"
    return run


@pytest.fixture(scope="module")
def whole(start):
    """What it printed, and the lines of each arm's results."""
    done = start()
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, {arm: lines_of(start.out / f"{arm}-1") for arm in ARMS}


def lines_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.faults
def test_every_arm_looks_three_times_and_is_reported(whole, start):
    for arm, (*looks, report) in whole[1].items():
        assert [line["kind"] for line in (*looks, report)] == ["look"] * len(looks) + ["report"]
        assert len({look["rate"] for look in looks}) == len(looks) == (0 if arm == "best-of-4" else 3)
        assert all(look["steps"] == 1 and look["memory"] > 0.1 and "kl" in look for look in looks)
        if looks:
            assert report["rate"] == max(looks, key=lambda look: look["judge_difference"])["rate"]
    rows = [line.split(" | ")[0] for line in whole[0].splitlines() if line.startswith("| ")]
    assert rows == ["| arm", *(f"| {arm}" for arm in ARMS)]
    assert whole[0].count(" by the judge: ") == len(ARMS) - 1


@pytest.mark.faults
def test_arms_answer_the_same_contexts_which_nothing_saw(whole, start):
    tables = {arm: pd.read_parquet(start.out / f"{arm}-1" / "replies.parquet") for arm in ARMS}
    adapters = (start.out / "reward", start.out / "reward" / "judge")
    seen = {c for folder in adapters for c in json.loads((folder / "h2s.json").read_text())["seen"]}
    for table in tables.values():
        assert table["conversation"].tolist() == tables["ppo"]["conversation"].tolist()
        assert table["hard"].tolist() == tables["ppo"]["hard"].tolist()  # one hard prompt, one random state
        assert seen.isdisjoint(table["conversation"]) and table["soft_judge"].notna().all()
    for arm in ("dpo", "lora-dpo"):  # a small step goes next to nowhere
        assert tables[arm]["kl"].abs().max() < 0.5
    best = tables["best-of-4"]
    assert best["kl"].tolist() == [math.log(4) - 0.75] * len(best)
    assert best["soft_reward"].mean() > best["hard_reward"].mean()


@pytest.mark.faults
def test_a_run_that_was_stopped_goes_on(whole, start):
    """After the second look of dpo; another seed takes the first one's rate; other settings are refused."""
    folder = start.out / "dpo-1"
    *looks, report = whole[1]["dpo"]
    (folder / "results.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in looks[:2]))
    done = start("--arms", "ppo", "dpo", "--seeds", "1", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "dpo, seed 1" in done.stdout and "ppo, seed 1" not in done.stdout
    again = lines_of(folder)
    assert again[:2] == looks[:2] and [line["kind"] for line in again[2:]] == ["look", "report"]
    assert again[3]["rate"] == report["rate"]
    (other,) = lines_of(start.out / "dpo-2")
    assert (other["kind"], other["rate"], other["steps"]) == ("report", report["rate"], 1)
    refused = start(minutes=1)
    assert refused.returncode == 1 and "minutes '0.0', now '1.0': take another --out" in refused.stderr
    printed = start("--table").stdout
    assert printed.count("| dpo |") == 3 and printed.count("| dpo | all |") == 1


@pytest.mark.faults
def test_another_reward_from_an_adapter_by_another_judge(whole, start, tmp_path):
    began = next((start.out / "dpo-1").glob("0*"))
    flags = ["--members", "2", "--minus_spread", "--rate", "1e-3", "--start", str(began), "--arms", "ppo"]
    flags += ["--num_mini_batches", "1"]
    done = start(*flags, out=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (report,) = lines_of(tmp_path / "ppo-1")
    assert (report["kind"], report["rate"], report["steps"]) == ("report", 1e-3, 1)
    ends = [load_file(folder / ADAPTER)["prompt_embeddings"] for folder in (began, tmp_path / "ppo-1" / "0.001")]
    # One update: Adam's first is as large as the rate (a little less, by its epsilon).
    assert (ends[1] - ends[0]).abs().max().item() == pytest.approx(1e-3, rel=0.05)
    replies = pd.read_parquet(tmp_path / "ppo-1" / "replies.parquet")
    members = [RewardModel.from_pretrained(tmp_path / name) for name in ("reward", "reward-1")]
    scores = {
        side: torch.stack([m.score(list(replies["prompt"]), list(replies[side])) for m in members])
        for side in ("soft", "hard")
    }
    expected = (scores["soft"].mean(0) - scores["soft"].std(0)).tolist()
    assert replies["soft_reward"].tolist() == pytest.approx(expected, abs=1e-5)
    printed = start("--table", "--judge", str(tmp_path / "reward-1"), out=tmp_path).stdout
    row = next(line for line in printed.splitlines() if line.startswith("| ppo |"))
    assert row.split(" | ")[3].startswith(f"{(scores['soft'][1] - scores['hard'][1]).mean().item():+.3f} [")
    assert "--rate and --start are for --arms ppo" in start("--rate", "1e-3", out=tmp_path).stderr
