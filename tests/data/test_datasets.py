"""Contexts and judgements as data sets: what a row becomes, what is set aside, and which row or column is refused."""

import csv
import datetime
import json

import pytest
from data.written import write_table
from datasets import Dataset
from openpyxl import Workbook
from tiny import COLUMNS, sample_context
from trl import is_conversational

import h2s
from h2s.data.datasets import each_context_once, load_contexts, load_preferences, read_judgements
from h2s.data.tables import FORMATS, GRIDS
from h2s.errors import InputError

USER = {"role": "user", "content": "hi there"}
ASSISTANT = {"role": "assistant", "content": "hello"}
CONTEXT = str([USER])
ROW = [CONTEXT, "how was it?", "I see.", 0]
ODD_TEXTS = ["n/a", "a\nb", "a\u2028b", '"quoted", and, commas', "=1+1", "1.50", "007", "TRUE", "nandu", "#REF"]


def write_items(folder, items):
    (folder / "contexts.json").write_text(json.dumps(items, ensure_ascii=False), encoding="utf-8")
    return str(folder / "contexts.json")


def write_sheet(folder, rows, suffix=".xlsx", columns=COLUMNS):
    return write_table(folder, suffix, {c: [row[n] for row in rows] for n, c in enumerate(columns)}, "sheet")


def test_bad_input_is_a_value_error():
    """As whoever calls from Python would catch it."""
    assert issubclass(h2s.InputError, ValueError)
    with pytest.raises(ValueError, match=r"no such file: none\.json .expected a JSON list of items with a 'context'"):
        h2s.load_contexts("none.json")


# Contexts


def test_mixed_forms_in_one_json(tmp_path):
    forms = ["hi there", [USER], CONTEXT, json.dumps([USER])]
    forms.append([{"role": "user", "content": [{"type": "text", "text": "hi there"}]}])
    contexts = load_contexts(write_items(tmp_path, [{"context": f} for f in [*forms, [ASSISTANT, USER]]]))
    assert contexts.column_names == ["prompt", "file", "row"]
    assert list(contexts["prompt"]) == [[USER]] * 5 + [[ASSISTANT, USER]]


@pytest.mark.parametrize("suffix", FORMATS)
def test_all_formats_give_the_same_contexts(tmp_path, suffix):
    expected = [sample_context(i) for i in range(5)] + [[{"role": "user", "content": t}] for t in ODD_TEXTS]
    cells = [json.dumps(c, ensure_ascii=False) if suffix in GRIDS else c for c in expected]
    contexts = load_contexts(write_table(tmp_path, suffix, {"context": cells}))
    assert list(contexts["prompt"]) == expected


@pytest.mark.parametrize("suffix", FORMATS)
def test_further_columns_stay_beside_their_rows(tmp_path, suffix):
    """What the format can say of them: csv knows text alone, parquet makes floats of integers beside a gap."""
    columns = {
        "topic": ["tea", "rain", "NA"],
        "length": [3, None, 2**40],
        "weight": [0.5, 2, 1],
        "context": ["a", "b", "c"],
    }
    contexts = load_contexts(write_table(tmp_path, suffix, columns))
    assert set(contexts.column_names) == {"prompt", "topic", "length", "weight", "file", "row"}
    assert [p[0]["content"] for p in contexts["prompt"]] == ["a", "b", "c"]
    assert list(contexts["topic"]) == ["tea", "rain", "NA"]
    if suffix in (".csv", ".tsv"):
        assert list(contexts["weight"]) == ["0.5", "2.0", "1.0"]
    else:
        assert list(contexts["length"]) == [3, None, 2**40]
        assert list(contexts["weight"]) == [0.5, 2, 1]


@pytest.mark.parametrize(
    "values",
    [
        [{"a": 1}, None, {"a": 2}],
        [["x"], [], ["y", "z"]],
        [True, None, False],
        [None, None, None],
        [None, "text", ""],
    ],
)
def test_values_of_a_column(tmp_path, values):
    items = [{"context": "hi", "extra": v} for v in values]
    assert list(load_contexts(write_items(tmp_path, items))["extra"]) == values
    del items[1]["extra"]  # a key that an item lacks is a value that is missing
    assert load_contexts(write_items(tmp_path, items))["extra"][1] is None


def test_values_of_a_workbook(tmp_path):
    """An empty cell is missing among numbers, dates and truth values too."""
    day = datetime.datetime(2024, 1, 2)
    columns = {"context": ["a", "b"], "number": [None, 7], "day": [day, None], "true": [None, True]}
    contexts = load_contexts(write_table(tmp_path, ".xlsx", columns))
    assert [list(contexts[name]) for name in ("number", "day", "true")] == [[None, 7], [day, None], [None, True]]


@pytest.mark.parametrize(
    ("values", "suffix"),
    [
        ([1, "a"], ".json"),
        ([1, "a"], ".xlsx"),
        (["a", 1], ".json"),
        ([True, 1], ".json"),
        ([{"a": 1}, [1]], ".json"),
        ([{"a": 1}, {"a": "b"}], ".json"),
        ([2**70, 1], ".json"),
    ],
)
def test_a_column_of_mixed_types_is_refused_by_name(tmp_path, values, suffix):
    path = write_table(tmp_path, suffix, {"context": ["hi", "ho"], "topic": ["x", "y"], "extra": values})
    with pytest.raises(InputError, match=rf"table{suffix}, column extra: .*one type .*: mend or drop it") as error:
        load_contexts(path)
    assert str(error.value).isprintable()


def test_columns_that_trl_gives_a_meaning_of_its_own_are_left_out(tmp_path):
    """Nor can they hinder: their values may be of any types."""
    others = {
        "prompt": [1, "a"],
        "completion": [[2], "b"],
        "completion_ids": ["c", 3],
        "row": ["?", 9],
        "kept": ["x", "y"],
    }
    contexts = load_contexts(write_table(tmp_path, ".json", {**others, "context": ["hi", "ho"]}))
    assert contexts.column_names == ["prompt", "kept", "file", "row"]
    assert [p[0]["content"] for p in contexts["prompt"]] == ["hi", "ho"]


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([{"context": "hi"}, {"context": "[1"}], r"contexts\.json, row 2, context: .*neither JSON"),
        ([{"context": "hi"}, {"context": True}], r"contexts\.json, row 2, context: .*non-empty list"),
        ([{"context": [USER, ASSISTANT]}], r"contexts\.json, row 1, context: the last message"),
        ([{"Contexts": "hi", "b": 1}], r"contexts\.json: missing column context; found Contexts, b"),
        ([], r"missing column context; found none"),
    ],
)
def test_what_is_no_context_is_named(tmp_path, items, words):
    with pytest.raises(InputError, match=words):
        load_contexts(write_items(tmp_path, items))


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_sheet_is_counted_with_its_header(tmp_path, suffix):
    row = 3 if suffix in GRIDS else 2
    with pytest.raises(InputError, match=f"row {row}, context: .*neither JSON"):
        load_contexts(write_table(tmp_path, suffix, {"context": ["hi", "[1"]}))


def test_table_with_a_header_alone(tmp_path):
    with pytest.raises(InputError, match="no contexts in it"):
        load_contexts(write_table(tmp_path, ".csv", {"context": []}))


# Judgements


def test_directions(tmp_path):
    pairs = load_preferences(write_sheet(tmp_path, [[CONTEXT, "A", "B", 0], [CONTEXT, "C", "D", 1]]))
    assert pairs.column_names == ["prompt", "chosen", "rejected", "label", "file", "row"]
    assert list(pairs["prompt"]) == [[USER]] * 2
    assert list(pairs["chosen"]) == [[{"role": "assistant", "content": text}] for text in "AD"]
    assert list(pairs["rejected"]) == [[{"role": "assistant", "content": text}] for text in "BC"]
    assert list(pairs["label"]) == [0, 1]
    assert list(pairs["row"]) == [2, 3]
    assert all(map(is_conversational, pairs))  # TRL's own check of its conversational format


def test_rows_without_direction_are_counted_and_set_aside(tmp_path):
    labels = [0, 2, 3, 1, 3, 0, 3]
    rows = [[str(sample_context(n)), f"a{n}", f"b{n}", label] for n, label in enumerate(labels)]
    judgements = read_judgements(write_sheet(tmp_path, rows))
    assert dict(judgements.counts) == {0: 2, 1: 1, 2: 1, 3: 3}
    assert list(judgements.dataset["row"]) == [2, 5, 7]
    assert [c[0]["content"] for c in judgements.dataset["chosen"]] == ["a0", "b3", "a5"]
    assert judgements.summary() == (
        "2 policy better, 1 reference better, 1 both poor, 3 tie or both good; "
        "3 pairs over 3 conversations, 4 rows set aside"
    )


@pytest.mark.parametrize("labels", [[], [2], [2, 3, 3]])
def test_no_direction_at_all(tmp_path, labels):
    """Nothing to learn from, and still a verdict to report."""
    path = write_sheet(tmp_path, [[*ROW[:3], label] for label in labels])
    with pytest.raises(InputError, match=rf"no row is labelled 0 or 1.*\({len(labels)} rows\)"):
        load_preferences(path)
    judgements = read_judgements(path, need_direction=False)
    assert judgements.counts.total() == len(labels) and len(judgements.dataset) == 0
    assert judgements.summary().endswith(f"0 pairs over 0 conversations, {len(labels)} rows set aside")


@pytest.mark.parametrize("label", [0, 0.0, "0", "0.0", " 0 "])
def test_forms_of_a_label(tmp_path, label):
    assert read_judgements(write_sheet(tmp_path, [[*ROW[:3], label]])).counts == {0: 1}


@pytest.mark.parametrize(
    ("label", "number"),
    [
        ("A is better", 0),
        (" b IS\tbetter ", 1),
        ("both are poor", 2),
        ("tie or both good", 3),
        ("A 較好", 0),
        ("平手或兩個都好\u3000", 3),
    ],
)
def test_words_of_the_blinded_sheet_are_labels(tmp_path, label, number):
    assert read_judgements(write_sheet(tmp_path, [ROW, [*ROW[:3], label]])).counts[number] == 1 + (ROW[3] == number)


@pytest.mark.parametrize("label", ["A", "tie", 4, -1, 0.5, 1.5, "policy", False, True, "1, 2"])
def test_labels_that_are_none(tmp_path, label):
    path = write_sheet(tmp_path, [ROW, ROW, [*ROW[:3], label], ROW])
    with pytest.raises(InputError, match=r"sheet\.xlsx, row 4, human_eval: expected .*, got"):
        load_preferences(path)


@pytest.mark.parametrize("suffix", FORMATS)
def test_all_formats_give_the_same_pairs(tmp_path, suffix):
    """Also where a whole column of text looks like numbers or truth values."""
    rows = [[f"{n}", text, f"0{n}", n % 2] for n, text in enumerate(ODD_TEXTS)] + [[CONTEXT, "x", "y", 3]]
    judgements = read_judgements(write_sheet(tmp_path, rows, suffix))
    expected = [(r[0], r[1], r[2]) if r[3] == 0 else (r[0], r[2], r[1]) for r in rows[:-1]]
    found = [tuple(r[c][0]["content"] for c in ("prompt", "chosen", "rejected")) for r in judgements.dataset]
    assert found == expected
    assert judgements.counts[3] == 1


def test_number_that_excel_made_of_a_reply(tmp_path):
    pairs = load_preferences(write_sheet(tmp_path, [[CONTEXT, 42, "forty-two", 0]]))
    assert pairs["chosen"][0][0]["content"] == "42"


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    ("column", "cell", "words"),
    [
        (0, "", "context_messages: expected a context, got an empty cell"),
        (0, "[{'role': 'user'", "context_messages: .*neither JSON nor a Python literal"),
        (0, "[{'role': 'assistant', 'content': 'hi'}]", "context_messages: the last message must be the user's"),
        (1, "", "policy_response: expected a response, got an empty cell"),
        (1, " \n", "policy_response: expected a response, got an empty cell"),
        (2, None, "reference_response: expected a response, got an empty cell"),
        (3, 7, "human_eval: expected .*, got"),
    ],
)
def test_malformed_row_is_named(tmp_path, suffix, column, cell, words):
    bad = [CONTEXT, "a", "b", 2]  # set aside or not, a row is checked
    bad[column] = cell
    row = 4 if suffix in GRIDS else 3
    with pytest.raises(InputError, match=rf"sheet\{suffix}, row {row}, {words}"):
        load_preferences(write_sheet(tmp_path, [ROW, ROW, bad, ROW], suffix))


def test_odd_rows_are_named(tmp_path):
    with pytest.raises(InputError, match="row 3, policy_response"):
        load_preferences(write_sheet(tmp_path, [ROW, [CONTEXT, None, "b", 0], ROW]))
    with pytest.raises(InputError, match="row 2, policy_response: expected the text of a response, got True"):
        load_preferences(write_sheet(tmp_path, [[CONTEXT, True, "b", 0]]))
    path = write_items(tmp_path, [])
    (tmp_path / "contexts.json").write_text(json.dumps([dict(zip(COLUMNS, [CONTEXT, "a", "\ud83d", 2], strict=True))]))
    with pytest.raises(InputError, match="row 1, reference_response: half a character"):
        load_preferences(path)


def test_missing_columns_name_those_found(tmp_path):
    path = write_sheet(tmp_path, [["a", "b", 0]], columns=["context_messages", "reply", "human_eval"])
    words = r"missing column policy_response, reference_response; found context_messages, reply, human_eval"
    with pytest.raises(InputError, match=words):
        load_preferences(path)


def test_order_and_further_columns_do_not_matter(tmp_path):
    pairs = load_preferences(write_sheet(tmp_path, [["Ann", 1, "B", "A", CONTEXT]], columns=["rater", *COLUMNS[::-1]]))
    assert (pairs["chosen"][0][0]["content"], pairs["rejected"][0][0]["content"]) == ("B", "A")
    assert "rater" not in pairs.column_names


# Sheets as people have them


def test_several_sheets(tmp_path):
    """Each row says which file it is of; counts a sheet, and what is not judged yet."""
    first = write_sheet(tmp_path, [ROW, [*ROW[:3], 3], [*ROW[:3], None]])
    second = write_table(
        tmp_path, ".csv", dict(zip(COLUMNS, zip([CONTEXT, "c", "d", 1], strict=True), strict=True)), "b"
    )
    judgements = read_judgements([first, second])
    assert list(judgements.dataset["file"]) == [first, second]
    assert list(judgements.dataset["row"]) == [2, 2]
    assert judgements.unjudged == {first: 1, second: 0}
    assert judgements.summary().splitlines() == [
        f"{first}: 2 rows judged, 1 not yet",
        f"{second}: 1 rows judged, 0 not yet",
        "1 policy better, 1 reference better, 0 both poor, 1 tie or both good; 2 pairs over 1 conversations, 1 rows "
        "set aside, 1 not judged yet",
    ]
    contexts = [write_table(tmp_path, ".json", {"context": ["hi", "ho"], "topic": ["a", "b"]}, "c1")]
    contexts.append(write_table(tmp_path, ".csv", {"context": ["he"]}, "c2"))
    read = load_contexts(contexts)
    assert [p[0]["content"] for p in read["prompt"]] == ["hi", "ho", "he"]
    assert list(read["topic"]) == ["a", "b", None] and list(read["row"]) == [1, 2, 2]
    assert list(read["file"]) == [contexts[0], contexts[0], contexts[1]]


@pytest.mark.parametrize("blank", [None, "", " ", "\xa0", "NA"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_rows_not_judged_yet_are_counted_and_left_out(tmp_path, suffix, blank):
    path = write_sheet(tmp_path, [[*ROW[:3], "0"], [*ROW[:3], blank], [*ROW[:3], "1"]], suffix)
    judgements = read_judgements(path)
    assert judgements.counts == {0: 1, 1: 1} and judgements.unjudged == {path: 1}
    with pytest.raises(InputError, match=r"no row is labelled 0 or 1, .* \(0 rows, 2 without a verdict\)"):
        read_judgements(write_sheet(tmp_path, [[*ROW[:3], blank]] * 2, suffix))


@pytest.mark.parametrize("suffix", FORMATS)
def test_blank_rows_are_left_out_and_counted_as_rows(tmp_path, suffix, caplog):
    """In the middle and at the end; a row that holds an annotator's name alone is told."""
    row = [*ROW[:3], "0", "Ann"]
    rows = [row, [None] * 5, [" ", "", None, "", ""], [*[None] * 4, "Ann"], row, [None] * 5]
    path = write_sheet(tmp_path, rows, suffix, [*COLUMNS, "annotator"])
    judgements = read_judgements(path)
    assert [row.row - judgements.rows[0].row for row in judgements.rows] == [0, 4]
    assert judgements.unjudged == {path: 0}
    assert [said for said in caplog.messages if "left out" in said] == [
        f"{path}: {3 if suffix in GRIDS else 4} rows hold nothing in {', '.join(COLUMNS)} and are left out"
    ]


def test_up_to_ten_bad_rows_are_named_at_once(tmp_path):
    rows = [[CONTEXT, "", "b", 0] if n % 2 else [CONTEXT, "a", "b", 7] for n in range(24)]
    with pytest.raises(InputError) as error:
        load_preferences(write_sheet(tmp_path, rows))
    said = str(error.value)
    assert "sheet.xlsx: 24 rows cannot be used: rows 2, 4, 6, 8, 10, human_eval: " in said
    assert "; rows 3, 5, 7, 9, 11, policy_response: " in said and said.endswith("; and 14 more")


def test_other_headers_and_verdicts(tmp_path):
    columns = ["Prompt", "Reply 1", "Reply 2", "Winner"]
    path = write_sheet(
        tmp_path, [["hi", "a", "b", "A"], ["ho", "c", "d", " b "], ["he", "e", "f", "Tie"]], columns=columns
    )
    names = dict(zip(COLUMNS, columns, strict=True))
    judgements = read_judgements(path, columns=names, labels={"A": 0, "B": 1, "tie": 3})
    assert [(row.policy_response, row.label) for row in judgements.rows] == [("a", 0), ("c", 1), ("e", 3)]
    with pytest.raises(InputError, match="row 4, Winner: expected one of A, B, got 'Tie'"):
        load_preferences(path, columns=names, labels={"A": 0, "B": 1})
    with pytest.raises(InputError, match=r"missing column human_eval; found Prompt, .*, Winner"):
        load_preferences(path, columns={**names, "human_eval": "human_eval"})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"columns": {"prompt": "context_messages"}}, "columns maps context_messages, .* got prompt"),
        ({"columns": {"human_eval": 3}}, "columns maps .* got human_eval: 3"),
        ({"columns": {"policy_response": "x", "reference_response": "x"}}, "columns names one header twice: .*, x, x,"),
        ({"labels": {True: 0}}, r"labels maps a file's verdicts \(in quotes\) .* got True: 0"),
        ({"labels": {"A": 4}}, "labels maps .* got 'A': 4"),
        ({"labels": {"A": "0"}}, "labels maps .* got 'A': '0'"),
        ({"labels": {"A": [0]}}, "labels maps"),
        ({"encoding": "big5"}, r"encoding is for \.csv and \.tsv files, got .*sheet\.xlsx"),
    ],
)
def test_settings_that_fit_no_sheet(tmp_path, settings, words):
    with pytest.raises(InputError, match=words):
        load_preferences(write_sheet(tmp_path, [ROW]), **settings)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("header", ["human_eval ", "human_eval\xa0", "\ufeffHuman_Eval", " human_eval\n"])
def test_a_padded_header_is_the_column(tmp_path, suffix, header):
    if suffix in (".csv", ".tsv") and "\n" in header:
        pytest.skip("quoted over two lines: the delimiter is found by the header's line")
    assert read_judgements(write_sheet(tmp_path, [ROW], suffix, [*COLUMNS[:3], header])).counts == {0: 1}


@pytest.mark.parametrize("suffix", [".xlsx", ".csv"])
def test_a_double_header_is_named(tmp_path, suffix, caplog):
    rows = [",".join([*COLUMNS, "human_eval"]), "hi,a,b,0,1"]
    (tmp_path / "sheet.csv").write_text("\n".join(rows), encoding="utf-8")
    path = str(tmp_path / "sheet.csv")
    if suffix == ".xlsx":
        path = write_sheet(tmp_path, [[*ROW, 1]], columns=[*COLUMNS, "human_eval "])
    with pytest.raises(InputError, match="2 columns are named human_eval: rename those that do not count"):
        load_preferences(path)


@pytest.mark.parametrize("suffix", [".xlsx", ".csv"])
@pytest.mark.parametrize("above", [[["Judgements, round 3"], []], [[], [], []], [["Title, of it"]]])
def test_rows_above_the_header(tmp_path, suffix, above, caplog):
    rows = [*above, ["id", *COLUMNS], ["7", *ROW[:3], 0], ["8", *ROW[:3], 1]]
    path = tmp_path / f"sheet{suffix}"
    if suffix == ".xlsx":
        book = Workbook()
        for number, row in enumerate(rows, start=1):
            for column, value in enumerate(row, start=2):
                book.active.cell(number, column, value)
        book.save(path)
    else:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    judgements = read_judgements(str(path))
    assert [row.row for row in judgements.rows] == [len(above) + 2, len(above) + 3]
    assert f"the header stands in row {len(above) + 1}" in caplog.messages[0]


def test_fields_beside_the_header(tmp_path):
    """Empty ones at a row's end are none; others would move what they belong to."""
    header = ",".join(COLUMNS)
    path = tmp_path / "sheet.csv"
    path.write_text(f"{header},,\nhi,a,b,0,,\n\nho,a,b,,\nhe,a,b,1,\n", encoding="utf-8")
    judgements = read_judgements(str(path))
    assert judgements.counts == {0: 1, 1: 1} and judgements.unjudged == {str(path): 1}
    for row, fields in (("Dear team, where is it?,a,b,1", 5), ("hi,Yes\nsure,No,0", 2)):
        for more in ("", ",,"):  # columns without a name are no room for what slips
            path.write_text(f"{header}{more}\nhi,a,b,0\n{row}\n", encoding="utf-8")
            with pytest.raises(InputError, match=f"row 3 has {fields} fields, the header 4: put a text that holds"):
                read_judgements(str(path))


def test_lines_of_json_by_either_name(tmp_path):
    items = [{"context": "hi", "a": {"b": ["\u2028"]}}, {"context": "ho"}]
    forms = {"list": json.dumps(items, indent=1), "lines": "\n\n".join(map(json.dumps, items))}
    for form, text in forms.items():
        for suffix in (".json", ".jsonl"):
            (tmp_path / f"t{suffix}").write_text(text, encoding="utf-8")
            contexts = load_contexts(str(tmp_path / f"t{suffix}"))
            assert [p[0]["content"] for p in contexts["prompt"]] == ["hi", "ho"]
            assert list(contexts["row"]) == ([1, 2] if form == "list" else [1, 3])
    for bad in ('{"context": "x"},', '{"context": "x"}{"context": "y"}', "{'context': 'x'}", "null", '{"context": "'):
        (tmp_path / "t.jsonl").write_text("\n".join([*map(json.dumps, items), bad, json.dumps(items[0])]))
        with pytest.raises(InputError, match=r"cannot be read as \.jsonl .*: line 3"):
            load_contexts(str(tmp_path / "t.jsonl"))


def test_a_header_once_more_is_left_out(tmp_path, caplog):
    """As `cat a.csv b.csv` makes it."""
    (tmp_path / "c.csv").write_text("id,context\n1,hello\nid,context\n2,you\n", encoding="utf-8")
    contexts = load_contexts(str(tmp_path / "c.csv"))
    assert [p[0]["content"] for p in contexts["prompt"]] == ["hello", "you"] and list(contexts["row"]) == [2, 4]
    assert "row 3 is the header once more" in caplog.messages[0]


def test_the_line_that_excel_obeys_is_no_row(tmp_path, caplog):
    (tmp_path / "c.csv").write_text("sep=;\nid;context\n1;hello, you\n", encoding="utf-8")
    contexts = load_contexts(str(tmp_path / "c.csv"))
    assert contexts["prompt"][0][0]["content"] == "hello, you" and list(contexts["row"]) == [2] and not caplog.messages


def test_a_title_that_mentions_the_column(tmp_path):
    (tmp_path / "c.csv").write_text("Contexts of round 2\nid;context\n1;hello, you\n", encoding="utf-8")
    assert load_contexts(str(tmp_path / "c.csv"))["prompt"][0][0]["content"] == "hello, you"


def test_the_worksheet_that_has_the_columns_is_read(tmp_path):
    """Numbers exports a summary first."""
    book = Workbook()
    book.active.append(["Export Summary"])
    sheet = book.create_sheet("Table 1")
    sheet.append(["context"])
    sheet.append(["hello"])
    book.save(tmp_path / "c.xlsx")
    assert load_contexts(str(tmp_path / "c.xlsx"))["prompt"][0][0]["content"] == "hello"


def test_a_file_that_is_named_twice_is_read_once(tmp_path):
    path = write_sheet(tmp_path, [ROW])
    assert read_judgements([path, f"{tmp_path}/./sheet.xlsx"]).counts == {0: 1}
    with pytest.raises(InputError, match="path is empty"):
        load_contexts([])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"columns": {"policy_response": "Reference_Response"}}, "columns names one header twice"),
        ({"columns": {"policy_response": " "}}, "columns maps .* got policy_response: ' '"),
        ({"columns": ["x"]}, "columns must be a mapping"),
        ({"labels": {"A": 0, "a": 1}}, "labels says two things of 'a'"),
        ({"labels": {}}, "labels must be a mapping of verdicts"),
        ({"labels": ["A"]}, "labels must be a mapping of verdicts"),
    ],
)
def test_mappings_that_say_nothing_or_two_things(tmp_path, settings, words):
    with pytest.raises(InputError, match=words):
        load_preferences(write_sheet(tmp_path, [ROW]), **settings)


def test_truth_values_are_verdicts_where_labels_says_so(tmp_path):
    path = write_sheet(tmp_path, [[*ROW[:3], True], [*ROW[:3], False]])
    assert read_judgements(path, labels={"TRUE": 0, "FALSE": 1}).counts == {0: 1, 1: 1}


def test_labels_leave_the_blinded_sheets_words(tmp_path, caplog):
    """Rounds are read together: other hands' verdicts, ours by the drop-down, ours in numbers."""
    path = write_sheet(tmp_path, [[*ROW[:3], v] for v in ("A", "A is better", "B 較好", "0", "3")])
    assert read_judgements(path, labels={"A": 0, "B": 1}).counts == {0: 3, 1: 1, 3: 1}
    with pytest.raises(InputError, match="row 3, human_eval: expected one of 1, 2, got '0'"):
        read_judgements(write_sheet(tmp_path, [[*ROW[:3], v] for v in "10"]), labels={1: 0, 2: 1})
    path = write_sheet(tmp_path, [[*ROW[:3], v] for v in "12"])
    assert read_judgements(path, labels={1: 0, 2: 1}).counts == {0: 1, 1: 1} and not caplog.messages
    read_judgements(path)
    assert "no verdict is 0" in caplog.messages[0]


def test_other_headers_in_a_semicolon_file_are_shown_one_by_one(tmp_path):
    (tmp_path / "c.csv").write_text('Prompt;Reply 1;Winner\n"a, b";"c ""d""";A\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"found Prompt, Reply 1, Winner \(for judgements columns maps others\)"):
        load_preferences(str(tmp_path / "c.csv"))


def test_texts_whose_lines_take_turns_are_told(tmp_path, caplog):
    texts = ["hi", "Doctor: hi\nPatient: ho\nDoctor: well?", "Input: 1\nOutput: 2\nInput: 3"]
    contexts = load_contexts(write_items(tmp_path, [{"context": text} for text in texts]))
    assert [p[0]["content"] for p in contexts["prompt"]] == texts
    (said,) = caplog.messages
    assert "2 contexts have lines that take turns (Doctor: and Patient: in row 2)" in said


def test_a_context_comes_once_however_often_it_is_judged():
    turns = [[{"role": "user", "content": text}] for text in ("a", "b", "a", "a", "c", "b")]
    pairs = Dataset.from_dict({"prompt": turns, "row": list(range(6))})
    assert each_context_once(pairs)["row"][:] == [0, 1, 4]
