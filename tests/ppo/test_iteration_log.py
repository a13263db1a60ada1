"""What is kept of each iteration, by hand and on one process."""

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from ppo.runs import logged, texts
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations import TensorBoardCallback
from trl import RLOOConfig

from h2s import SingleStepPPOConfig
from h2s.ppo.iteration_log import SAMPLES, Charts, IterationLog, in_words

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


# What a terminal says


def test_an_iteration_in_words():
    logs = {
        "loss": 0.1,
        "reward": 1.23456,
        "rewards/kind/mean": 9.0,
        "kl": 0.4567,
        "completions/mean_length": 12.34,
        "completions/clipped_ratio": 0.25,
    }
    assert in_words(logs) == "reward +1.235, KL 0.457, 12.3 tokens, unfinished 25%"


def evaluated(prefix, *scorers):
    numbers = {"soft_{}": 1.5, "hard_{}": 0.25, "{}_difference": 1.25, "{}_difference_low": -0.5, "{}_win": 0.75}
    numbers |= {"{}_difference_high": 3.0, "{}_same_length_low": 7.0}
    logs = {f"{prefix}_{name.format(scorer)}": value for scorer in scorers for name, value in numbers.items()}
    return logs | {f"{prefix}_contexts": 25, f"{prefix}_soft_tokens": 6.0, f"{prefix}_tokens_difference": 1.0}


@pytest.mark.parametrize("prefix", ["eval", "my_test"])
def test_an_evaluation_in_words(prefix):
    """The number of tokens is no scorer."""
    words = "soft and hard on 25 contexts: reward 1.500 and 0.250, +1.250 [-0.500, +3.000]"
    assert in_words(evaluated(prefix, "reward")) == words
    assert in_words(evaluated(prefix, "reward", "judge")) == f"{words}; {words.replace('reward', 'judge')[30:]}"


def test_no_words_for_other_lines():
    assert in_words({"train_runtime": 5.0, "train_loss": 1.0}) is None and in_words({}) is None


def test_a_run_in_the_terminal(build, capsys):
    """The iterations and the evaluations, in the numbers of the log; nothing else."""
    trainer = build(judge=lambda completions, **kwargs: [1.0] * len(completions), eval_strategy="steps", eval_steps=2)
    trainer.train()
    first, second, evaluation, end = capsys.readouterr().out.splitlines()
    (tokens, _), (kl, _) = logged(trainer, "completions/mean_length"), logged(trainer, "kl")
    reward, unfinished = logged(trainer, "reward")[0], logged(trainer, "completions/clipped_ratio")[0]
    said = f"reward {reward:+.3f}, KL {kl:.3f}, {tokens:.1f} tokens, unfinished {unfinished:.0%}"
    assert first.startswith(f"step 1 of 2: {said}, ") and first.endswith(" left")
    assert second.startswith("step 2 of 2: reward ") and "left" not in second
    assert evaluation.startswith("step 2 of 2: soft and hard on 5 contexts: reward ")
    assert evaluation.endswith("judge 1.000 and 1.000, +0.000 [+0.000, +0.000]")
    assert end.startswith("step 2 of 2: trained in 00:")


# Sample completions


@pytest.mark.parametrize("name", ["log_completions", "num_completions_to_print"])
def test_settings_of_trl(name):
    assert getattr(SingleStepPPOConfig(), name) == getattr(RLOOConfig(use_cpu=True, bf16=False), name)


def score_column(completions, log_extra, **kwargs):
    log_extra("letters", [len(text) for text in texts(completions)])
    return [float(i) for i in range(len(completions))]


@pytest.mark.parametrize(("settings", "rows"), [({}, 6), ({"num_completions_to_print": 2}, 2)])
def test_completions_are_printed_at_each_log_line(build, capsys, settings, rows):
    build(reward_funcs=score_column, max_steps=4, logging_steps=2, log_completions=True, **settings).train()
    out = capsys.readouterr().out
    assert [out.count(f" Step {step} ") for step in (1, 2, 3, 4)] == [0, 1, 0, 1]
    assert out.count("USER") >= 2 * rows and "Completion" in out and "score_column" in out and "Advantage" in out
    separators = sum("├" in line for line in out.splitlines())
    assert separators == 2 * (rows - 1)


# TensorBoard


@pytest.fixture
def events(build):
    def of(trainer):
        (file,) = Path(trainer.args.output_dir).rglob("events.out.tfevents.*")
        accumulator = EventAccumulator(str(file), size_guidance={"tensors": 0})
        return accumulator.Reload()

    return of


def test_charts(build, events):
    """No ends of intervals, though the log has them; nothing that could be taken for validation but evaluations."""
    trainer = build(report_to="tensorboard", eval_strategy="steps", eval_steps=2)
    trainer.train()
    charted = set(events(trainer).Tags()["scalars"])
    assert {"train/reward", "train/kl", "train/value/rho", "train/value/explained_variance"} <= charted
    assert {"train/policy/ratio", "eval/reward_difference", "train/grad_norm"} <= charted
    assert not [tag for tag in charted if tag.endswith(("_low", "_high")) or "/val/" in tag]
    assert logged(trainer, "value/rho_low") and logged(trainer, "eval_reward_difference_high")
    assert [type(c) for c in trainer.callback_handler.callbacks if isinstance(c, TensorBoardCallback)] == [Charts]


def test_a_number_of_a_reward_that_ends_as_an_interval_is_charted(build, events):
    def reward(completions, log_metric, **kwargs):
        log_metric("water_low", 1.0)
        return [1.0] * len(completions)

    trainer = build(reward_funcs=reward, report_to="tensorboard", max_steps=1)
    trainer.train()
    assert "train/water_low" in events(trainer).Tags()["scalars"]


def test_sample_replies_as_text(build, events):
    trainer = build(report_to="tensorboard", max_steps=2, logging_steps=2)
    trainer.train()
    (event,) = events(trainer).Tensors("completions/text_summary")
    (text,) = event.tensor_proto.string_val
    table = pd.read_parquet(Path(trainer.args.output_dir) / "completions" / "step-000002.parquet")
    assert event.step == 2 and text.decode().count("score ") == SAMPLES < len(table)
    for _, row in table[:SAMPLES].iterrows():
        first = f"completion: {row['completion']}".splitlines()[0]
        assert f"score {row['score']:.4g}\n\n    user: {row['prompt'][0]['content']}\n" in text.decode()
        assert f"    {first}" in text.decode()


def test_no_tensorboard_no_charts(build):
    trainer = build(report_to="none")
    assert not [c for c in trainer.callback_handler.callbacks if isinstance(c, TensorBoardCallback)]
