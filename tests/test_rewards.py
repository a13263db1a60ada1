"""tests/benchmarks/rewards.py: its arithmetic by hand; and that it runs, on a tiny encoder (no figure is tested)."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import rewards
from tiny import ROOT, save_loud_encoder

SHEET = ROOT / "recipes" / "sample_data" / "judgements.xlsx"


def keep(out, name, rows, slope):
    """One pair a fold: (chosen score, rejected score, difference in characters)."""
    for number, (chosen, rejected, characters) in enumerate(rows, start=1):
        folder = out / name / str(number)
        folder.mkdir(parents=True)
        row = {"conversation": f"c{number}", "row": number, "label": 0, "margin": chosen - rejected}
        row |= {"length_difference": characters, "chosen": chosen, "rejected": rejected}
        pd.DataFrame([row]).to_parquet(folder / "pairs.parquet")
        (folder / "slopes.json").write_text(json.dumps({"scores": slope}))


def test_ways_by_hand(tmp_path):
    keep(tmp_path, "member-1", [(2, 1, 100), (0, 1, -50), (3, 1, 200), (1, 0, 10), (1, 2, 20)], slope=1.5)
    keep(tmp_path, "member-2", [(2, 2, 100), (2, 1, -50), (1, 1, 200), (3, 0, 10), (1, 2, 20)], slope=0.5)
    keep(tmp_path, "member-10", [(9, 9, 9)], slope=0)  # not whole: left out
    keep(tmp_path, "offset-1", [(1, 0, 100), (1, 0, -50), (0, 1, 200), (1, 0, 10), (0, 0, 20)], slope=0)
    _, ways = rewards.margins(tmp_path)
    half = math.sqrt(0.5)  # the standard deviation of two numbers that differ by 1
    expected = {
        "the longer wins": [100, -50, 200, 10, 20],
        "one model, seed 1": [1, -1, 2, 1, -1],
        "one model, seed 2": [0, 1, 0, 3, -1],
        "length taken out of the first's scores": [1 - 1.5, -1 + 0.75, 2 - 3, 1 - 0.15, -1 - 0.3],
        "mean of 2": [0.5, 0, 1, 2, -1],
        # Less the spread of the chosen (0, 2, 2, 2, 0 apart) and of the rejected (1, 0, 0, 0, 0 apart).
        "mean minus spread of 2": [0.5 + half, -2 * half, 1 - 2 * half, 2 - 2 * half, -1],
        "length taken out of the mean of 2": [0.5 - 1, 0.5, 1 - 2, 2 - 0.1, -1 - 0.2],
        "length in the loss, what is left": [1, 1, -1, 1, 0],
    }
    assert list(ways) == list(expected)
    for name, margins in ways.items():
        assert margins.tolist() == pytest.approx(expected[name]), name
    row = next(line for line in rewards.table(tmp_path).splitlines() if line.startswith("| one model, seed 1 "))
    cells = row.split(" | ")
    # The longer one wins in 4 of 5, the model in 3 of 5, and in 1 of the 2 pairs that differ by 10 and 20 characters.
    assert cells[1].startswith("0.600 [") and cells[2].startswith("-0.200 [") and cells[3].startswith("0.500 [")
    loss = np.mean([math.log1p(math.exp(-m)) for m in (1, -1, 2, 1, -1)])
    assert cells[4:] == ["0.80", f"{loss:.3f} |"]
    # Right are, a tie as half: length 4 of 5, the models 3 each, their mean 3.5, less its spread 2; there all 5.
    other = tmp_path / "other"
    keep(other, "member-1", [(1, 0, 100), (1, 0, -50), (1, 0, 200), (1, 0, 10), (1, 0, 20)], slope=0)
    paired = [line.split(" [")[0] for line in rewards.table(tmp_path, other).splitlines() if line.startswith("- ")]
    assert paired == [
        "- one model on average minus the longer wins: -0.200",
        "- mean of 2 minus one model on average: +0.100",
        "- mean minus spread of 2 minus mean of 2: -0.300",
        f"- one model on average, here minus {other}: -0.400",
    ]


def test_the_slope_of_labels_is_the_likeliest():
    """Two differences of 1 that were right three times in four: the odds are 3."""
    assert rewards.slope_of_labels(np.array([1.0, 1.0, 1.0, -1.0])) == pytest.approx(math.log(3), abs=1e-4)


@pytest.mark.faults
def test_it_runs_and_goes_on(tmp_path):
    encoder, out = save_loud_encoder(tmp_path / "electra", "electra"), tmp_path / "out"

    def start(*flags):
        command = [sys.executable, str(ROOT / "tests" / "benchmarks" / "rewards.py"), "--out", str(out)]
        command += ["--sheet", str(SHEET), "--encoder", str(encoder), "--num_virtual_tokens", "4", "--max_steps", "1"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, *flags], capture_output=True, text=True, timeout=600, env=environment, check=False
        )
        assert done.returncode == 0 or "take another --out" in done.stderr, done.stderr[-3000:]
        return done.stdout or done.stderr

    start("--members", "1", "2")
    printed = start("--offset")
    for way in ("one model, seed 2", "mean minus spread of 2", "length in the loss, what is left"):
        assert f"| {way} | 0." in printed, printed
    pairs, _ = rewards.margins(out)
    assert len(pairs) == 196 and pairs["row"].is_unique  # every judged pair once
    assert "fold" not in start("--members", "1", "2")
    assert "max_steps '1', now '2'" in start("--max_steps", "2")
