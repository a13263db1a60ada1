"""What is kept of each iteration, by hand and on one process."""

import math

import pandas as pd
import pytest
import torch
from accelerate import Accelerator

from h2s.ppo.iteration_log import IterationLog

NAN = math.nan


@pytest.fixture
def log():
    return IterationLog(Accelerator(cpu=True), ["kind", "short"])


def test_means_of_what_came_since_the_last_line(log):
    log.add("kl", torch.tensor([1.0, 2.0, 6.0]))
    log.add("kl", torch.tensor([5, 6]))
    log.metrics["norm"].append(0.5)
    assert log.means() == {"kl": (3 + 5.5) / 2, "norm": 0.5}
    assert log.means() == {}


def test_a_mean_leaves_out_what_is_nan(log):
    log.add("returns", torch.tensor([1.0, NAN, 4.0]))
    assert log.means() == {"returns": 2.5}


def test_rewards_by_hand(log):
    """Means and unbiased deviations of what was given: 1, 2, 6 and 5, 9; of the sums 6, 2, 15."""
    values = torch.tensor([[1.0, 5.0], [2.0, NAN], [NAN, NAN], [6.0, 9.0]])
    log.add_rewards(values, torch.tensor([6.0, 2.0, NAN, 15.0]))
    assert log.means() == pytest.approx(
        {
            "rewards/kind/mean": 3.0,
            "rewards/kind/std": math.sqrt(7),  # (4 + 1 + 9) / 2
            "rewards/short/mean": 7.0,
            "rewards/short/std": math.sqrt(8),
            "reward": 23 / 3,
            "reward_std": math.sqrt(((6 - 23 / 3) ** 2 + (2 - 23 / 3) ** 2 + (15 - 23 / 3) ** 2) / 2),
        }
    )


def test_one_value_has_no_spread_and_none_no_mean(log):
    log.add_rewards(torch.tensor([[3.0, NAN], [NAN, NAN]]), torch.tensor([3.0, NAN]))
    means = log.means()
    assert means["rewards/kind/mean"] == 3 == means["reward"]
    assert all(math.isnan(means[f"{name}"]) for name in ("rewards/kind/std", "reward_std"))
    assert all(math.isnan(means[f"rewards/short/{name}"]) for name in ("mean", "std"))


def test_what_rewards_log_themselves(log):
    """The mean of an iteration; forgotten once it is written, or where it is not to be."""
    values, scores = torch.ones(2, 2), torch.ones(2)
    for number in (1.0, 2.0, 6.0):
        log.log_metric("my/number", number)
    log.add_rewards(values, scores)
    log.forget_extras()
    log.add_rewards(values, scores)
    log.log_metric("my/number", 100.0)
    log.forget_extras()
    log.add_rewards(values, scores)
    assert log.means()["my/number"] == 3


def test_completions_as_a_table(log, tmp_path):
    log.log_extra("letters", [2, 4])
    columns = {"prompt": [[{"role": "user", "content": "hi"}]] * 2, "completion": ["so", "then"], "score": [6.0, NAN]}
    log.write_completions(tmp_path, 7, columns, torch.tensor([[1.0, 5.0], [NAN, NAN]]))
    log.forget_extras()
    log.write_completions(tmp_path, 8, {"completion": ["x"]}, torch.tensor([[1.0, 2.0]]))
    table = pd.read_parquet(tmp_path / "completions" / "step-000007.parquet")
    extra = ["rewards/kind", "rewards/short", "letters"]
    assert list(table.columns) == ["prompt", "completion", "score", *extra]
    assert table["completion"].tolist() == ["so", "then"] and table["letters"].tolist() == [2, 4]
    assert table["prompt"][0][0]["content"] == "hi"
    assert table["rewards/short"][0] == 5 and table.iloc[1][["score", *extra[:2]]].isna().all()
    after = pd.read_parquet(tmp_path / "completions" / "step-000008.parquet")
    assert list(after.columns) == ["completion", *extra[:2]]


def test_a_column_has_a_value_a_reply(log, tmp_path):
    log.log_extra("letters", [2])
    with pytest.raises(ValueError, match="shorter"):
        log.write_completions(tmp_path, 1, {"completion": ["so", "then"]}, torch.ones(2, 2))
