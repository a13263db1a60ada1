import json

import pandas as pd
import pytest
from openpyxl import Workbook
from tiny import sample_context

from h2s.data.datasets import COLUMNS, load_preferences
from h2s.data.messages import conversation_id
from h2s.errors import InputError

CONTEXT = "[{'role': 'user', 'content': 'hi there'}]"
ROW = [CONTEXT, "how was it?", "I see.", 0]


def workbook(folder, rows, columns=COLUMNS, name="sheet.xlsx"):
    book = Workbook()
    book.active.append(list(columns))
    for number, row in enumerate(rows, start=2):
        for column, value in enumerate(row, start=1):
            cell = book.active.cell(number, column, value)
            if isinstance(value, str):
                cell.data_type = "s"  # also what looks like a formula or an error
    book.save(folder / name)
    return str(folder / name)


def test_directions(tmp_path):
    rows = [[CONTEXT, "A", "B", 0], [CONTEXT, "C", "D", 1]]
    loaded = load_preferences(workbook(tmp_path, rows)).dataset
    assert loaded.column_names == ["prompt", "chosen", "rejected", "label", "conversation", "row"]
    assert list(loaded["label"]) == [0, 1]
    assert list(loaded["chosen"]) == ["A", "D"]
    assert list(loaded["rejected"]) == ["B", "C"]
    assert list(loaded["row"]) == [2, 3]
    assert loaded["prompt"][0] == [{"role": "user", "content": "hi there"}]
    assert set(loaded["conversation"]) == {conversation_id(loaded["prompt"][0])}


def test_rows_without_direction_are_counted_and_set_aside(tmp_path):
    labels = [0, 2, 3, 1, 3, 0, 3]
    contexts = [str(sample_context(i)) for i in range(7)]
    rows = [[c, f"a{n}", f"b{n}", label] for n, (c, label) in enumerate(zip(contexts, labels, strict=True))]
    preferences = load_preferences(workbook(tmp_path, rows))
    assert dict(preferences.counts) == {0: 2, 1: 1, 2: 1, 3: 3}
    assert list(preferences.dataset["row"]) == [2, 5, 7]
    assert list(preferences.dataset["chosen"]) == ["a0", "b3", "a5"]
    assert preferences.summary() == (
        "2 policy better, 1 reference better, 1 both poor, 3 tie or both good; "
        "3 pairs over 3 conversations, 4 rows set aside"
    )


@pytest.mark.parametrize("label", [0, 0.0, "0", "0.0", " 0 "])
def test_forms_of_a_label(tmp_path, label):
    assert load_preferences(workbook(tmp_path, [[*ROW[:3], label]])).counts == {0: 1}


@pytest.mark.parametrize("label", [4, -1, 0.5, 1.5, "policy", "", None, False, True, "NA", "1, 2"])
def test_labels_that_are_none(tmp_path, label):
    path = workbook(tmp_path, [ROW, ROW, [*ROW[:3], label], ROW])
    with pytest.raises(InputError, match=r"sheet\.xlsx, row 4: human_eval must be 0, 1, 2 or 3, got"):
        load_preferences(path)


def write(folder, suffix, rows):
    file = folder / f"sheet.{suffix}"
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    if suffix == "xlsx":
        return workbook(folder, rows)
    if suffix == "csv":
        table.to_csv(file, index=False)
    if suffix == "parquet":
        table.to_parquet(file)
    if suffix == "json":
        file.write_text(json.dumps(table.to_dict("records"), ensure_ascii=False), encoding="utf-8")
    if suffix == "jsonl":
        lines = [json.dumps(r, ensure_ascii=False) for r in table.to_dict("records")]
        file.write_text("\n".join(lines), encoding="utf-8")
    return str(file)


FORMATS = ["xlsx", "csv", "json", "jsonl", "parquet"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_all_formats_give_the_same_pairs(tmp_path, suffix):
    odd = [
        "NA",
        "None",
        "null",
        "nan",
        "N/A",
        "#N/A",
        "a\nb",
        "a\u2028b",
        '"q", x',
        "你好 🙂",
        "=1+1",
        "1.50",
        "007",
        "TRUE",
    ]
    rows = [["plain " + text, text, f"not {text}", n % 2] for n, text in enumerate(odd)]
    rows.append([CONTEXT, "x", "y", 3])
    loaded = load_preferences(write(tmp_path, suffix, rows))
    expected = [(r[0], r[1], r[2]) if r[3] == 0 else (r[0], r[2], r[1]) for r in rows[:-1]]
    found = [(r["prompt"][0]["content"], r["chosen"], r["rejected"]) for r in loaded.dataset]
    assert found == expected
    assert loaded.counts[3] == 1


@pytest.mark.parametrize("suffix", FORMATS)
def test_columns_that_hold_text_like_numbers_stay_text(tmp_path, suffix):
    """A whole column of such cells: no reader may turn them into numbers, dates or truth values."""
    rows = [["1", "007", "TRUE", 0], ["2", "1.50", "FALSE", 0]]
    loaded = load_preferences(write(tmp_path, suffix, rows)).dataset
    assert [p[0]["content"] for p in loaded["prompt"]] == ["1", "2"]
    assert list(loaded["chosen"]) == ["007", "1.50"]
    assert list(loaded["rejected"]) == ["TRUE", "FALSE"]


def test_number_that_excel_made_of_a_reply(tmp_path):
    loaded = load_preferences(workbook(tmp_path, [[CONTEXT, 42, "forty-two", 0]])).dataset
    assert list(loaded["chosen"]) == ["42"]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    ("column", "cell", "words"),
    [
        (0, "", "context_messages: .*non-empty"),
        (0, "[{'role': 'user'", "context_messages: .*neither JSON nor a Python literal"),
        (0, "[{'role': 'assistant', 'content': 'hi'}]", "context_messages: the last message must be the user's"),
        (1, "", "policy_response: expected a response, got an empty cell"),
        (1, " \n", "policy_response: expected a response, got an empty cell"),
        (2, None, "reference_response: expected a response, got an empty cell"),
        (3, 7, "human_eval must be 0, 1, 2 or 3, got"),
    ],
)
def test_malformed_row_is_named(tmp_path, suffix, column, cell, words):
    bad = [CONTEXT, "a", "b", 2]  # set aside or not, a row is checked
    bad[column] = cell
    row = 4 if suffix in ("xlsx", "csv") else 3
    with pytest.raises(InputError, match=rf"sheet\.{suffix}, row {row}: {words}"):
        load_preferences(write(tmp_path, suffix, [ROW, ROW, bad, ROW]))


def test_empty_row_in_the_middle_is_named(tmp_path):
    with pytest.raises(InputError, match="row 3: human_eval"):
        load_preferences(workbook(tmp_path, [ROW, [None] * 4, ROW]))


def test_response_that_is_no_text(tmp_path):
    with pytest.raises(InputError, match="row 2: policy_response: expected the text of a response, got True"):
        load_preferences(workbook(tmp_path, [[CONTEXT, True, "b", 0]]))


def test_missing_columns_name_those_found(tmp_path):
    path = workbook(tmp_path, [["a", "b", 0]], ["context_messages", "Policy_response", "human_eval"])
    words = r"missing column policy_response, reference_response; found context_messages, Policy_response, human_eval"
    with pytest.raises(InputError, match=words):
        load_preferences(path)


def test_order_and_further_columns_do_not_matter(tmp_path):
    columns = ["rater", *reversed(COLUMNS)]
    loaded = load_preferences(workbook(tmp_path, [["Ann", 1, "B", "A", CONTEXT]], columns)).dataset
    assert (loaded["chosen"][0], loaded["rejected"][0]) == ("B", "A")


@pytest.mark.parametrize("labels", [[], [2], [2, 3, 3]])
def test_no_direction_at_all(tmp_path, labels):
    path = workbook(tmp_path, [[*ROW[:3], label] for label in labels])
    with pytest.raises(InputError, match=rf"no row is labelled 0 or 1.*\({len(labels)} rows\)"):
        load_preferences(path)
