"""The benchmark's arithmetic, on numbers by hand; and that its arms run (no figure is tested)."""

import os
import re
import subprocess
import sys

import growth
import measuring
import pandas as pd
import pytest
import speed
from tiny import ROOT, build_reward_model, save_gemma, save_loud_encoder


def test_medians_spreads_and_ratios():
    assert measuring.spread([3.0, 1.0, 10.0]) == "3.00 (1.00 to 10.00)"
    assert measuring.spread([0.25, 0.75], digits=1) == "0.5 (0.2 to 0.8)"
    # Round by round: a ratio of medians would be 2 / 4.
    assert measuring.ratios([1.0, 2.0, 9.0], [4.0, 2.0, 6.0]) == [0.25, 1.0, 1.5]
    rounds = {"h2s": [{"seconds": 1.0}, {"seconds": 3.0}], "trl-prefix": [{"seconds": 2.0}, {"seconds": 4.0}]}
    rows = speed.compared(rounds, "h2s", "trl-prefix", "trl-lora")  # the last was not run
    assert rows == [["(a) h2s / (b) TRL RLOO, same prefix", "0.62 (0.50 to 0.75)"]]


def test_the_tables_of_two_rounds_by_hand():
    """An older checkout beside this one: seconds 4 and 6, 8 and 8; a step of 30 ms and 20 ms."""

    def iteration(seconds):
        return {"seconds": seconds, "sampling": 2.0, "scoring": 1.0, "updates": seconds - 3, "bytes": 5e6}

    def rollout(step):
        return {"whole": {"50": {"seconds": 100 * step, "bytes": 7e6}}, "step": step}

    rounds = {
        "h2s": [iteration(4.0), iteration(6.0)],
        "before": [iteration(8.0), iteration(8.0)],
        "complete": [rollout(0.02), rollout(0.02)],
        "complete-before": [rollout(0.03), rollout(0.04)],
        "limits": [{"read": 0.01, "products": 0.02}] * 2,
    }
    printed = speed.report(rounds, speed.parse(["--batch", "8", "--completion", "4", "--prefixes", "50"]))
    for row in (
        "(a) h2s | 5.00 (4.00 to 6.00) | 2.00 (2.00 to 2.00) | 1.00 (1.00 to 1.00) | 2.00 (1.00 to 3.00) | "
        "16.0 (16.0 to 16.0) | 5 (5 to 5)",
        "(a) h2s / (a) h2s, before | 0.62 (0.50 to 0.75)",
        "50 | (d) h2s `complete`, before | 3.50 (3.00 to 4.00) | 9.3 (8.0 to 10.7) | 0.58 (0.50 to 0.67) | 7 (7 to 7)",
        "(d) h2s `complete`, before | 35.0 (30.0 to 40.0) | 3.50 (3.00 to 4.00) | 1.75 (1.50 to 2.00)",
        "(d) h2s `complete` / (d) h2s `complete`, before | 0.58 (0.50 to 0.67)",
    ):
        assert f"| {row} |" in printed, printed


def test_growth_is_called_by_its_slopes():
    assert growth.slopes([1, 2, 4], [5, 7, 11]) == (pytest.approx(2), 1)
    assert growth.slopes([0, 1, 2], [0, 1, 4])[1] == 3
    assert [growth.called(ratio) for ratio in (1.0, 3.0, 0.5)] == ["linear", "faster than linear", "slower than linear"]


def test_memory_of_a_small_shape_by_hand():
    shape = growth.Shape(layers=2, hidden=3, intermediate=5, heads=4, kv_heads=1, head_dim=2, vocabulary=7)
    # A layer: q and o 3 x 8 each, k and v 3 x 2 each, the MLP 3 x 3 x 5, norms 4 x 3 + 2 x 2.
    assert shape.parameters == 7 * 3 + 2 * (48 + 12 + 45 + 16) + 3
    needed = growth.memory(shape, batch=6, rows=3, prefix=10, prompt=4, completion=2, number=2)
    assert needed["weights"] == 2 * shape.parameters
    assert needed["prefixes"] == 5 * 10 * (2 * 2 * 1 * 2) * 4
    assert needed["cache"] == 6 * 16 * 8 * 2
    assert needed["activations"] == 3 * 6 * 2 * ((12 + 10) * 4 + 16 * 2 + 15 * 2) + 3 * 16 * 8 * 2
    assert needed["head"] == 3 * 2 * (4 * growth.VOCABULARY_CHUNK + 6) * 4
    assert growth.peak(needed) == needed["held"] + max(needed["rollout"], needed["update"])


@pytest.mark.parametrize(("name", "billions"), [("1B", 1.0), ("4B", 3.88), ("12B", 11.77), ("27B", 27.01)])
def test_the_published_shapes_have_the_published_sizes(name, billions):
    assert growth.SHAPES[f"Gemma 3 {name}"].parameters / 1e9 == pytest.approx(billions, abs=0.005)


@pytest.mark.faults
def test_every_arm_runs_on_the_tiny_model():
    sizes = "--model tiny --rounds 1 --batch 4 --completion 4 --prompt 30 --prefixes 20 40 --updates 2 --threads 1"
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / "speed.py"), *sizes.split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    cells = {line.split("|")[i].strip() for line in done.stdout.splitlines() if line.startswith("|") for i in (1, 2)}
    arms = ("h2s", "trl-prefix", "trl-lora", "complete", "generate")
    for name in [
        *(speed.NAMES[arm] for arm in arms),
        "(e) h2s",
        "(e) full logits",
        "weights read once",
        "its matrix products alone",
    ]:
        assert name in cells, (name, done.stdout)
    assert not re.search(r"\bnan\b", done.stdout)


@pytest.mark.faults
def test_settings_are_looked_at_beside_the_defaults(tmp_path):
    for seed, role in enumerate((".", "judge")):
        folder = save_loud_encoder(tmp_path / f"encoder-{seed}", "electra")
        build_reward_model(folder, seed=seed).save_pretrained(tmp_path / "reward" / role)
    grid = "--num_mini_batches 1 4 --steps 2 --eval_steps 1 --max_completion_length 4 --seeds 1 2 --jobs 2"
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / "defaults.py"), "--out", str(tmp_path / "out")]
    command += ["--model", str(save_gemma(tmp_path / "gemma")), "--reward", str(tmp_path / "reward"), *grid.split()]
    command += ["--contexts", str(ROOT / "recipes" / "sample_data" / "contexts.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[:4] for row in rows] == [["1", "0.01", "1", "1, 2"], ["4", "0.01", "1", "1, 2"]]
    last = {
        (updates, seed): pd.read_parquet(tmp_path / "out" / f"{updates}-0.01-1-{seed}" / "2.parquet")
        for updates in (1, 4)
        for seed in (1, 2)
    }
    for row, updates in zip(rows, (1, 4), strict=True):
        both = pd.concat([last[updates, 1], last[updates, 2]])
        gained = (both["soft_judge"] - both["hard_judge"]).mean()
        assert row[4].split(", ")[1] == f"{gained:+.3f} ({both['kl'].mean():.1f})"
    gain = sum((last[1, seed]["soft_judge"] - last[4, seed]["soft_judge"]).mean() for seed in (1, 2)) / 2
    assert rows[0][8].startswith(f"{gain:+.3f} [") and rows[1][8] == "-"
    again = subprocess.run([*command, "--table"], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.endswith(again.stdout)
