"""Soft against hard along the dial."""

import math

import pandas as pd
import pytest
import torch

from h2s.prefix.adapter import soft_prefix
from h2s.prefix.generation import Sampling
from h2s.report.soft_vs_hard import soft_vs_hard
from h2s.report.strengths import along, report, write_strengths
from h2s.reward.functions import RewardFunctions

SAMPLED = Sampling(8)


def length(completions, **given):
    return [len(c[0]["content"]) for c in completions]


SCORERS = {"reward": RewardFunctions(length), "judge": RewardFunctions(lambda level, **given: [n / 10 for n in level])}


# The tables


@pytest.mark.parametrize("sampling", [SAMPLED, Sampling(8, 0.0)], ids=["sampled", "greedy"])
def test_each_strength_is_a_comparison_of_its_own(moved, contexts, sampling):
    """The whole one, both sides drawn anew, of a policy set to that strength; the hard side is drawn once for all."""
    drawn, complete = [], moved.complete

    def watched(*arguments):
        drawn.append(moved.model.active_adapter)
        return complete(*arguments)

    trained = soft_prefix(moved.model).detach().clone()
    moved.complete = watched
    tables = along(moved, contexts, SCORERS, sampling, [1.5, 0.5, 1], 4, 7)
    assert drawn.count("hard_prompt") == 2 and len(drawn) == 2 * 4  # two batches: hard, and three strengths
    assert list(tables) == [0, 0.5, 1, 1.5]
    assert torch.equal(soft_prefix(moved.model), trained)
    for strength, table in tables.items():
        moved.set_strength(strength)
        alone = soft_vs_hard(moved, contexts, SCORERS, sampling, 4, 7, progress=False)
        assert sorted(table) == sorted(alone)
        if strength == 0:
            assert (table["kl"] == 0).all() and not (alone["kl"].abs() > 1e-3).any()
            table, alone = table.drop(columns="kl"), alone.drop(columns="kl")
        pd.testing.assert_frame_equal(table[list(alone)], alone)
    assert tables[0.5]["soft"].tolist() != tables[1]["soft"].tolist() != tables[1.5]["soft"].tolist()


def test_without_strengths_it_is_the_comparison(moved, contexts):
    """Of the prefix as it was trained, wherever the dial stood."""
    alone = soft_vs_hard(moved, contexts, SCORERS, SAMPLED, 4, 7, progress=False)
    moved.set_strength(0.5)
    for strengths in (None, []):
        tables = along(moved, contexts, SCORERS, SAMPLED, strengths, 4, 7)
        assert list(tables) == [1]
        pd.testing.assert_frame_equal(tables[1], alone)


def test_a_failure_leaves_the_policy_at_strength_1(moved, contexts):
    trained, calls = soft_prefix(moved.model).detach().clone(), []

    def fails_later(completions, **given):
        calls.append(completions)
        if len(calls) > 2:
            raise RuntimeError("broken reward")
        return length(completions)

    with pytest.raises(RuntimeError, match="broken reward"):
        along(moved, contexts, {"reward": RewardFunctions(fails_later)}, SAMPLED, [0.5], 4, 7)
    assert torch.equal(soft_prefix(moved.model), trained)


# What they say


@pytest.fixture
def tables(compared):
    """At 1 as in conftest; at 0.5 half of every difference; at 1.5 one more in every context, and all replies end."""
    half, more = compared.copy(), compared.copy()
    half["soft_reward"] = (compared["soft_reward"] + compared["hard_reward"]) / 2
    more["soft_reward"] += 1
    more["soft_finished"] = True
    none = compared.assign(kl=0.0, soft_reward=compared["hard_reward"], soft_tokens=compared["hard_tokens"])
    none["soft_finished"] = compared["hard_finished"]
    return {0.0: none, 0.5: half, 1.0: compared, 1.5: more}


def test_report_by_hand(tables):
    """Mean 1 at standard error 0.5 (t = 12.706 at one degree of freedom), half of both, and one more at the same error.

    KL: 0.5, 1.5 of a, 2, 0 of b, so conversations' sums are as the mean has them: no error is left.
    """
    ends = "+1.000 [-5.353, +7.353]"
    assert report(tables, ["reward"]).splitlines() == [
        "| strength | reward, soft minus hard (95% interval) | KL, nats a reply | tokens | unfinished |",
        "|---|---|---|---|---|",
        "| 0 | +0.000 [+0.000, +0.000] | 0.000 [0.000, 0.000] | 3.0 | 0.50 |",
        "| 0.5 | +0.500 [-2.677, +3.677] | 1.000 [1.000, 1.000] | 7.0 | 0.25 |",
        f"| 1 | {ends} | 1.000 [1.000, 1.000] | 7.0 | 0.25 |",
        "| 1.5 | +2.000 [-4.353, +8.353] | 1.000 [1.000, 1.000] | 7.0 | 0.00 |",
        "",
        "Strength 0 is the hard prompt, 1 the trained prefix; all answer the same 4 contexts of 2 conversations from "
        "the same random states.",
        "By the reward strength 1.5 is highest, +1.000 [+1.000, +1.000] above strength 1. It was picked on these very "
        "contexts, which flatters it: look at it again on others.",
    ]


def test_none_is_above_where_training_ended_if_all_are_alike(tables):
    alike = {at: table.assign(soft_judge=1.0, hard_judge=1.0) for at, table in tables.items()}
    assert report(alike, ["judge"]).endswith("By the judge none is higher than 1, where training ended.")


def test_what_a_score_left_out_and_what_has_no_kl(tables):
    """Of strength 0.5 one context is left out: 2, 0 and 3 halved are left. The judge, if there is one, decides."""
    tables[0.5].loc[1, "soft_reward"] = math.nan
    for at, table in tables.items():
        table["soft_judge"], table["hard_judge"] = (2.0 if at == 1 else 1.0), 1.0
        table["kl"] = math.nan
    lines = report(tables, ["reward", "judge"]).splitlines()
    assert lines[3].startswith("| 0.5 | +0.833 [") and "], 3 of 4 | +0.000 [" in lines[3] and " | - | 7.0 |" in lines[3]
    assert lines[-1] == "By the judge none is higher than 1, where training ended."


@pytest.mark.parametrize("names", [[], ["reward"], ["reward", "judge"]])
def test_what_is_written(moved, contexts, tmp_path, names):
    scorers = {name: SCORERS[name] for name in names}
    for folder, sampling, drawn in (("sampled", SAMPLED, True), ("greedy", Sampling(8, 0.0), bool(names))):
        (tmp_path / folder).mkdir()
        tables = along(moved, contexts, scorers, sampling, [0.5], 4, 7)
        text = write_strengths(tables, names, tmp_path / folder)
        assert text == report(tables, names) and ("By the" in text) == bool(names)
        assert (tmp_path / folder / "strengths.png").is_file() == drawn
        rows = pd.read_parquet(tmp_path / folder / "strengths.parquet")
        assert rows["strength"].tolist() == [0] * 6 + [0.5] * 6 + [1] * 6
        assert rows["soft"].tolist() == [reply for table in tables.values() for reply in table["soft"]]


# The recipe


def test_compare_along_the_dial(recipes, write_recipe_of, reward_adapter, tmp_path, capsys):
    """The report's curve stands beside what it says without one, and neither changes the other."""
    config = write_recipe_of("compare", model={"reward_adapter": str(reward_adapter)}, task={"temperature": 1.0})
    for name, flags in (("plain", []), ("dial", ["--strengths", "0.5,1.5"])):
        recipes["compare"].main(["--config", str(config), "--best_of_n", "0", "--run_name", name, *flags])
    plain, dial = (tmp_path / "outputs" / name for name in ("plain", "dial"))
    files = [{f.name for f in folder.iterdir()} for folder in (plain, dial)]
    assert files[1] - files[0] == {"strengths.parquet", "strengths.png"} and files[0] < files[1]
    said, before = ((folder / "README.md").read_text(encoding="utf-8") for folder in (dial, plain))
    assert said.startswith(before.removesuffix("\n\n![](differences.png)\n"))
    assert said.endswith("\n\n![](differences.png)\n\n![](strengths.png)\n")
    assert [line[:6] for line in said.splitlines() if line.startswith(("| 0", "| 1"))] == [
        "| 0 | ", "| 0.5 ", "| 1 | ", "| 1.5 "
    ]  # fmt: skip
    pd.testing.assert_frame_equal(*(pd.read_parquet(folder / "replies.parquet") for folder in (plain, dial)))
    assert "strengths:\n  - 0.5\n  - 1.5\n" in (dial / "recipe.yaml").read_text(encoding="utf-8")
    assert "KL, nats a reply" in capsys.readouterr().out + (dial / "train.log").read_text(encoding="utf-8")
