import math
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from matplotlib import image
from tiny import COLUMNS, build_reward_model

from h2s.data.datasets import read_judgements
from h2s.data.messages import conversation_id
from h2s.data.splits import folds_by_conversation
from h2s.report.accuracy import (
    accuracy_line,
    accuracy_picture,
    accuracy_report,
    calibration,
    cross_validate,
    expected_calibration_error,
    length_groups,
    log_loss,
    pair_table,
    right,
    sheet_report,
    write_accuracy,
)
from h2s.report.intervals import share_interval


@pytest.fixture(scope="module")
def judgements(sheet_file):
    return read_judgements(str(sheet_file))


# The pair table


class Stub:
    """A score of its own for every text, so that sides and rows cannot be mixed up."""

    def __init__(self, factor=1.0):
        self.factor = factor

    def score(self, contexts, responses, progress=None):
        assert all(context[0]["role"] == "user" for context in contexts)
        rows = zip(contexts, responses, strict=True)
        return torch.tensor([self.factor * len(c[0]["content"]) * len(r[0]["content"]) for c, r in rows])


def test_pair_table_by_hand():
    rows = [("ab", "abc", "a", 0, 7), ("a", "", "abcd", 1, 3)]
    test = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": context}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
                "label": label,
                "row": row,
            }
            for context, chosen, rejected, label, row in rows
        ]
    )
    table = pair_table(Stub(), test)
    assert table.to_dict("list") == {
        "conversation": [conversation_id(prompt) for prompt in test["prompt"]],
        "row": [7, 3],
        "label": [0, 1],
        "margin": [4.0, -4.0],
        "length_difference": [2, -4],
    }


def test_pair_table_of_a_reward_model(bert_folder, judgements):
    """Margins in double: a difference of two scores, each alone."""
    reward = build_reward_model(bert_folder)
    test = judgements.dataset.select(range(5))
    margins = [
        reward.score([row["prompt"]], [row["chosen"]]).item() - reward.score([row["prompt"]], [row["rejected"]]).item()
        for row in test
    ]
    assert pair_table(reward, test)["margin"].tolist() == pytest.approx(margins, abs=1e-6)


def logit(p):
    return math.log(p / (1 - p))


@pytest.fixture
def table():
    """Six pairs of three conversations whose probabilities are round numbers; the last pair is even."""
    return pd.DataFrame(
        {
            "conversation": list("aabbcc"),
            "row": range(2, 8),
            "label": [0, 1, 0, 1, 0, 0],
            "margin": [logit(0.55), -logit(0.58), logit(0.75), logit(0.95), -logit(0.92), 0.0],
            "length_difference": [10, 5, 0, 8, 3, -2],
        }
    )


def test_right_by_hand():
    assert right([0.1, -3, 0, -0.0, 1e9]).tolist() == [1, 0, 0.5, 0.5, 1]


def test_calibration_by_hand(table):
    bins = calibration(table)
    assert bins[["low", "high", "pairs"]].values.tolist() == [[0.5, 0.6, 3], [0.7, 0.8, 1], [0.9, 1.0, 2]]
    assert bins["confidence"].tolist() == pytest.approx([(0.55 + 0.58 + 0.5) / 3, 0.75, (0.95 + 0.92) / 2])
    assert bins["accuracy"].tolist() == pytest.approx([0.5, 1, 0.5])
    # Each bin's interval is of its own pairs and their conversations.
    expected = [share_interval([1, 0, 0.5], "aac"), share_interval([1], "b"), share_interval([1, 0], "bc")]
    assert bins[["accuracy", "accuracy_low", "accuracy_high"]].to_numpy().tolist() == [list(e) for e in expected]


def test_numbers_by_hand(table):
    error = (abs(0.55 + 0.58 + 0.5 - 1.5) + abs(0.75 - 1) + abs(0.95 + 0.92 - 1)) / 6
    assert expected_calibration_error(calibration(table)) == pytest.approx(error)
    chosen = [0.55, 0.42, 0.75, 0.95, 0.08, 0.5]
    assert log_loss(table) == pytest.approx(-sum(map(math.log, chosen)) / 6)
    assert log_loss(table.assign(margin=0.0)) == pytest.approx(math.log(2))
    share, low, high = share_interval([1, 0, 1, 1, 0, 0.5], "aabbcc")
    assert accuracy_line(table) == f"{share:.3f} [{low:.3f}, {high:.3f}], n=6 (3 conversations)"
    assert share == pytest.approx(3.5 / 6)


def test_a_model_that_is_certain(table):
    """A sigmoid that rounds to 1 still has a bin, and no loss overflows."""
    certain = table.assign(margin=[1000.0, -1000.0, 1000.0, 40.0, 1000.0, 1000.0])
    (last,) = calibration(certain).itertuples()
    assert (last.low, last.high, last.pairs, last.confidence) == (0.9, 1.0, 6, 1.0)
    assert log_loss(certain) == pytest.approx(1000 / 6)


def cells(report):
    """A Markdown report's rows by their first cell."""
    rows = [line.strip("| ").split(" | ") for line in report.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


def test_report_by_hand(table):
    text = accuracy_report(table, "on these six")
    rows = cells(text)
    assert "on these six" in rows
    assert rows["this model"] == [accuracy_line(table)]
    assert rows["the longer response wins"][0].startswith("0.750 [")  # 1 1 0.5 1 1 0
    assert rows["chance"] == ["0.500"]
    assert rows["this model minus the longer response"][0].startswith("-0.167 [")
    assert [row[:2] for name, row in rows.items() if name.startswith("0.")] == [
        ["3", "0.543"],
        ["1", "0.750"],
        ["2", "0.935"],
    ]
    assert rows["0.9 to 1.0"][2].startswith("0.500 [")
    assert f"calibration error 0.208; log loss {log_loss(table):.3f} nats" in text
    # Of five pairs that differ in length it sides with the longer response in the first and the fourth.
    assert "sides with the longer response in 40% of the pairs" in text
    groups = {n: (r[0][:5], r[1]) for n, r in rows.items() if n.startswith(("labelled", "lengths"))}
    assert list(groups.items()) == [
        ("labelled 0 (policy better)", ("0.625", "0.625")),
        ("labelled 1 (reference better)", ("0.500", "1.000")),
        ("lengths differ by 0 to 2 characters", ("0.750", "0.250")),
        ("lengths differ by 3 to 3 characters", ("0.000", "1.000")),
        ("lengths differ by 5 to 5 characters", ("0.000", "1.000")),
        ("lengths differ by 8 to 10 characters", ("1.000", "1.000")),
    ]
    assert "n=4 (3 conversations)" in rows["labelled 0 (policy better)"][0]


def test_length_groups_are_quartiles_of_the_size(table):
    expected = ["8 to 10", "5 to 5", "0 to 2", "8 to 10", "3 to 3", "0 to 2"]
    assert length_groups(table).tolist() == expected
    # The sign is not looked at.
    assert length_groups(table.assign(length_difference=-table["length_difference"])).tolist() == expected
    many = pd.DataFrame({"length_difference": np.random.default_rng(0).permutation(np.arange(-200, 200))})
    assert set(Counter(length_groups(many))) == {"0 to 50", "51 to 100", "101 to 150", "151 to 200"}


@pytest.mark.parametrize("lengths", [[3] * 6, [-3, 3] * 3, [0] * 6])
def test_pairs_that_all_differ_by_the_same_length(table, tmp_path, lengths):
    """A small test part, or the only pair of one: the report comes after the training, and must not end it."""
    table = table.assign(length_difference=lengths)
    for some in (table, table.head(1)):
        size = abs(lengths[0])
        assert set(length_groups(some)) == {f"{size} to {size}"}
        assert f"lengths differ by {size} to {size} characters" in accuracy_report(some, "")
        accuracy_picture(some, tmp_path / "picture.png")


# The sheet


def load_sheet(folder, rows):
    pd.DataFrame(rows, columns=COLUMNS).to_excel(folder / "sheet.xlsx", index=False)
    return read_judgements(str(folder / "sheet.xlsx"))


def test_duplicates_and_contradictions(tmp_path):
    rows = [
        # Twice the same, once with the sides exchanged and the verdict with them.
        ["tea", "one", "two", 0],
        ["tea", "two", "one", 1],
        # The sides exchanged and the verdict not: a contradiction.
        ["tea", "three", "four", 0],
        ["tea", "four", "three", 0],
        # The same two responses to another context, and another pair to the same: nothing odd.
        ["walk", "one", "two", 1],
        ["tea", "one", "four", 1],
        # No response is the better one.
        ["tea", "five", "five", 0],
        # Set aside: it has no direction to contradict.
        ["walk", "one", "two", 3],
    ]
    first, second = sheet_report(load_sheet(tmp_path, rows)).splitlines()
    assert first == ("pairs judged more than once 2, of them contradictory 1; pairs of two identical responses 1")
    share, low, high = share_interval([1, 0, 1, 1, 0, 0, 1], ["t"] * 4 + ["w"] + ["t"] * 2)
    text = f"{share:.3f} [{low:.3f}, {high:.3f}], n=7 (2 conversations)"
    assert second == f"the policy's side is the better one in {text}"


@pytest.mark.parametrize(("labels", "share", "said"), [((0,), 1, True), ((1,), 0, True), ((0, 1), 0.5, False)])
def test_a_side_that_is_preferred(tmp_path, labels, share, said):
    rows = [[f"tea {i}", "one", "two", labels[i % len(labels)]] for i in range(12)]
    first, second = sheet_report(load_sheet(tmp_path, rows)).splitlines()
    assert first == "pairs judged more than once 0, of them contradictory 0; pairs of two identical responses 0"
    assert second.startswith(f"the policy's side is the better one in {share:.3f} [")
    assert ("one side is preferred: were they shuffled?" in second) == said


def test_agreement_of_several_sheets(tmp_path):
    """Three pairs that both judged, one of them with the sides and the verdict exchanged: they differ on one."""
    first = [["tea", "one", "two", 0], ["walk", "one", "two", 3], ["rain", "one", "two", 0], ["cat", "one", "two", 0]]
    second = [
        ["tea", "two", "one", 1],
        ["walk", "two", "one", 3],
        ["rain", "one", "two", 1],
        ["cat", "one", "two", None],
    ]
    paths = []
    for name, rows in (("a.xlsx", first), ("b.xlsx", second)):
        pd.DataFrame(rows, columns=COLUMNS).to_excel(tmp_path / name, index=False)
        paths.append(str(tmp_path / name))
    said = sheet_report(read_judgements(paths)).splitlines()[-1]
    # By hand: P = 2/3, shares 2/6 (0 "one"), 2/6 (tie), with "one" 3 of 6 and "two" 1 of 6: P_e = 9/36 + 1/36 + 4/36.
    kappa = (2 / 3 - 14 / 36) / (1 - 14 / 36)
    assert said.startswith("3 pairs were judged by two people or more, and all say the same of 2 (0.667)")
    assert f"kappa {kappa:.2f} " in said


# Files


def test_picture_is_a_png(table, tmp_path):
    accuracy_picture(table, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = image.imread(tmp_path / "accuracy.png")[:, :, :3]
    assert pixels.shape == (480, 1560, 3)
    assert all((part < 0.5).any() for part in np.array_split(pixels, 3, axis=1))  # each panel shows something


def test_files_of_a_report(judgements, tmp_path):
    """Of the pairs that the model never saw; or of the whole sheet, with those of the model beside it."""
    test = judgements.dataset.select(range(30))
    unseen, whole = pair_table(Stub(), test), pair_table(Stub(), judgements.dataset)
    for name, given, table, what in (
        ("one", (), unseen, "on conversations that it never saw"),
        ("folds", (whole, 3), whole, "on all conversations, each by a model that never saw it (3 folds)"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        text = write_accuracy(Stub(), test, judgements, folder, *given)
        tables = [accuracy_report(table, what)]
        if given:
            tables.append(accuracy_report(unseen, "on conversations that this model never saw"))
        assert text == "\n\n".join(tables)
        written = (folder / "accuracy.md").read_text(encoding="utf-8")
        for part in (tables[0], judgements.summary(), sheet_report(judgements), "![](accuracy.png)"):
            assert part in written
        assert (folder / "accuracy.png").is_file()
        pd.testing.assert_frame_equal(pd.read_parquet(folder / "pairs.parquet"), table)


# Cross-validation


@pytest.fixture
def folds(judgements):
    return folds_by_conversation(judgements.dataset, 4, 42)


class Trainings:
    """Makes a model of each fold, and leaves a checkpoint; ends at the given one."""

    def __init__(self, ends_at=None):
        self.trained, self.ends_at = [], ends_at

    def __call__(self, parts, where):
        (where / "checkpoint-1").mkdir(parents=True, exist_ok=True)
        number = int(where.name)
        if number == self.ends_at:
            raise KeyboardInterrupt
        self.trained.append(number)
        return Stub()


def test_every_pair_is_scored_by_the_model_of_its_fold(judgements, folds, tmp_path):
    given = []

    def train(parts, where):
        given.append(parts)
        return Stub(len(given))

    table = cross_validate(train, folds, tmp_path, is_main_process=True)
    assert given == folds and sorted(table["row"]) == sorted(judgements.dataset["row"])
    expected = [pair_table(Stub(n), parts["test"]) for n, parts in enumerate(folds, start=1)]
    pd.testing.assert_frame_equal(table, pd.concat(expected, ignore_index=True))


def test_finished_folds_are_kept(folds, tmp_path):
    """A run that ends in the third goes on with it, from its checkpoint; what is finished leaves its table alone."""
    whole = cross_validate(Trainings(), folds, tmp_path / "whole", is_main_process=True)
    folder, first, second = tmp_path / "broken", Trainings(ends_at=3), Trainings()
    with pytest.raises(KeyboardInterrupt):
        cross_validate(first, folds, folder, is_main_process=True)
    assert (folder / "folds" / "3" / "checkpoint-1").is_dir()
    table = cross_validate(second, folds, folder, is_main_process=True)
    assert (first.trained, second.trained) == ([1, 2], [3, 4])
    pd.testing.assert_frame_equal(table, whole)
    assert sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()) == [
        f"folds/{n}/pairs.parquet" for n in range(1, 5)
    ]
    assert not list(folder.rglob("checkpoint-*"))


def test_table_that_was_being_written_is_not_a_finished_fold(folds, tmp_path, monkeypatch):
    """A kill in the middle of it."""
    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_parquet", lambda table, path: Path(path).write_bytes(b"PAR1") and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cross_validate(Trainings(), folds, tmp_path, is_main_process=True)
    again = Trainings()
    assert len(cross_validate(again, folds, tmp_path, is_main_process=True)) == sum(len(f["test"]) for f in folds)
    assert again.trained == [1, 2, 3, 4]


def test_other_processes_read_what_the_first_has_written(folds, tmp_path):
    """They train with it, and write nothing."""
    whole = cross_validate(Trainings(), folds, tmp_path, is_main_process=True)
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*")}
    table = cross_validate(Trainings(), folds, tmp_path, is_main_process=False)
    pd.testing.assert_frame_equal(table, whole)
    assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*")} == before
    with pytest.raises(FileNotFoundError):
        cross_validate(Trainings(), folds, tmp_path / "other", is_main_process=False)
