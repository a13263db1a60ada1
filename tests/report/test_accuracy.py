import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from matplotlib import image

from h2s.data.datasets import load_preferences
from h2s.report.accuracy import (
    accuracy_line,
    accuracy_picture,
    accuracy_report,
    calibration,
    expected_calibration_error,
    length_groups,
    log_loss,
    pair_table,
    right,
    sheet_report,
    write_report,
)
from h2s.report.intervals import share_interval


@pytest.fixture(scope="module")
def preferences(sheet_file):
    return load_preferences(str(sheet_file))


# The pair table


def test_pair_table_by_hand():
    """A score of its own for every text, so that sides and rows cannot be mixed up."""

    class Stub:
        def score(self, contexts, responses, progress=None):
            assert all(context[0]["role"] == "user" for context in contexts)
            return torch.tensor(
                [float(len(c[0]["content"]) * len(r)) for c, r in zip(contexts, responses, strict=True)]
            )

    rows = [("ab", "abc", "a", 0, "x", 7), ("a", "", "abcd", 1, "y", 3)]
    test = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": context}],
                "chosen": chosen,
                "rejected": rejected,
                "label": label,
                "conversation": conversation,
                "row": row,
            }
            for context, chosen, rejected, label, conversation, row in rows
        ]
    )
    table = pair_table(Stub(), test)
    assert table.to_dict("list") == {
        "conversation": ["x", "y"],
        "row": [7, 3],
        "label": [0, 1],
        "margin": [4.0, -4.0],
        "length_difference": [2, -4],
    }


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
    columns = ["context_messages", "policy_response", "reference_response", "human_eval"]
    pd.DataFrame(rows, columns=columns).to_excel(folder / "sheet.xlsx", index=False)
    return load_preferences(str(folder / "sheet.xlsx"))


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


# Files


def test_picture_is_a_png(table, tmp_path):
    accuracy_picture(table, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = image.imread(tmp_path / "accuracy.png")[:, :, :3]
    assert pixels.shape == (480, 1560, 3)
    assert all((part < 0.5).any() for part in np.array_split(pixels, 3, axis=1))  # each panel shows something


def test_files_of_a_report(table, preferences, tmp_path):
    text = write_report(table, "on these six", preferences, tmp_path)
    assert text == accuracy_report(table, "on these six")
    written = (tmp_path / "accuracy.md").read_text(encoding="utf-8")
    for part in (text, preferences.summary(), sheet_report(preferences), "![](accuracy.png)"):
        assert part in written
    assert (tmp_path / "accuracy.png").is_file()
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "pairs.parquet"), table)
