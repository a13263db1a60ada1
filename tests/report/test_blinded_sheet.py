import json
import random
import re
import shutil
import subprocess
import zipfile

import openpyxl
import pandas as pd
import pytest
from datasets import Dataset
from openpyxl.utils.escape import unescape
from scipy import stats
from tiny import sample_context

from h2s.data.datasets import COLUMNS, VERDICTS, read_judgements
from h2s.errors import InputError
from h2s.report.blinded_sheet import KEY, SHEET, check_fits_cells, people_verdict, write_blinded_sheet

TRICKY = [
    "plain",
    "=1+1",
    "=cmd|'/c calc'!A1",
    "+1",
    "-1",
    "@SUM(A1)",
    "007",
    "1e5",
    "TRUE",
    "你好，\n換行 🙂",
    "quotes \" and ' and, commas",
    "#N/A",
]
ESCAPES = ["item_x0041_7", "_x005F_x0041_", "a_x000D_\nb", "caf_x00e9_x00e9_"]


@pytest.fixture
def replies():
    """Each tricky text once on the soft side, once on the hard side."""
    texts = TRICKY + [f"other {i}" for i in range(len(TRICKY))]
    others = [f"answer {i}" for i in range(len(TRICKY))] + TRICKY
    return pd.DataFrame(
        {"prompt": [sample_context(i) for i in range(len(texts))], "soft": texts, "hard": others, "conversation": "a"}
    )


def read_key(folder):
    return json.loads((folder / KEY).read_text(encoding="utf-8"))


def read_hidden(folder):
    """The judgement sheet's columns, as every reader finds them: by name."""
    frame = pd.read_excel(folder / SHEET, dtype=object, keep_default_na=False)
    return frame.loc[:, list(COLUMNS)]


def test_blinded_sheet_reads_back_as_it_was(replies, tmp_path):
    path, key, said = write_blinded_sheet(replies, tmp_path, seed=3)
    assert (path, key, said) == (tmp_path / SHEET, tmp_path / KEY, "24 rows")
    sheet = openpyxl.load_workbook(path).worksheets[0]
    rows = list(sheet.iter_rows(min_row=2))
    assert len(rows) == len(replies)
    sides = read_key(tmp_path)["soft_side"]
    for cells, (_, reply), side in zip(rows, replies.iterrows(), sides, strict=True):
        # Text, whatever it looks like: neither formulas nor numbers, also when someone edits it.
        texts = [*cells[:3], *cells[5:]]
        assert {(c.data_type, c.number_format) for c in texts} == {("s", "@")}
        assert json.loads(cells[5].value) == reply["prompt"]
        said = [("User: " if m["role"] == "user" else "Assistant: ") + m["content"] for m in reply["prompt"]]
        assert cells[0].value == "\n".join(said)
        soft, hard = (1, 2) if side == "policy_response" else (2, 1)
        for first in (0, 5):
            assert (cells[first + soft].value, cells[first + hard].value) == (reply["soft"], reply["hard"])
        assert cells[3].value is cells[4].value is None


def test_only_formula_is_what_is_left(replies, tmp_path):
    """In the file's own XML, as a spreadsheet program would read it."""
    write_blinded_sheet(replies, tmp_path, seed=3)
    with zipfile.ZipFile(tmp_path / SHEET) as archive:
        xml = archive.read("xl/worksheets/sheet1.xml").decode()
    assert xml.count("<f>") == xml.count("<f") - xml.count("<formula") == 1
    assert '"left to judge: "&amp;COUNTBLANK(D2:D25)</f>' in xml


def test_same_replies_are_left_out_and_counted(tmp_path):
    """Compared as the cells show them."""
    prompts = [sample_context(i) for i in range(4)]
    table = pd.DataFrame({"prompt": prompts, "soft": ["a", "b", "\x07", "c"], "hard": ["a", "B", "", "d"]})
    *_, said = write_blinded_sheet(table, tmp_path, seed=0)
    assert said == "2 rows; 2 contexts got twice the same reply and are left out"
    key = read_key(tmp_path)
    assert key["identical"] == 2 and len(key["rows"]) == len(key["soft_side"]) == 2
    frame = read_hidden(tmp_path)
    assert [json.loads(cell) for cell in frame["context_messages"]] == [prompts[1], prompts[3]]
    label(tmp_path, [3, 3])
    assert people_verdict([str(tmp_path / SHEET)]).endswith(
        "- 2 contexts got twice the same reply and are not in the sheet"
    )


def test_sheet_of_the_same_replies_alone_shows_them(tmp_path):
    """That of a prefix that was not trained: better than an empty page."""
    table = pd.DataFrame({"prompt": [sample_context(i) for i in range(3)], "soft": "a", "hard": "a"})
    *_, said = write_blinded_sheet(table, tmp_path, seed=0)
    assert said == "3 rows, and all of them twice the same reply: there is nothing to choose"
    assert len(read_hidden(tmp_path)) == 3 and read_key(tmp_path)["identical"] == 0


@pytest.mark.parametrize("text", ESCAPES)
def test_text_that_spells_an_escape_is_stored_escaped(text, tmp_path):
    """What every program shows is the text itself; by hand for one of them."""
    context = [{"role": "user", "content": text}]
    write_blinded_sheet(pd.DataFrame({"prompt": [context], "soft": [text], "hard": ["no"]}), tmp_path, seed=0)
    stored = read_hidden(tmp_path).iloc[0]
    if text == "item_x0041_7":
        assert "item_x005F_x0041_7" in set(stored)
    shown = [re.sub("_x([0-9A-Fa-f]{4})_", lambda m: chr(int(m[1], 16)), str(cell)) for cell in stored[:3]]
    assert text in shown and json.loads(shown[0]) == context


def test_control_characters_are_dropped(tmp_path):
    table = pd.DataFrame(
        {
            "prompt": [sample_context(0)] * 2,
            "soft": ["a\x00b\x1bc\ufffe\uffff", "\x07"],
            "hard": ["", "fine\n"],
            "conversation": "a",
        }
    )
    write_blinded_sheet(table, tmp_path, seed=0)
    frame = pd.read_excel(tmp_path / SHEET, dtype=object, keep_default_na=False)
    texts = {frame["policy_response"][0], frame["reference_response"][0]}
    assert texts == {"abc", "(no text)"}
    assert {frame["policy_response"][1], frame["reference_response"][1]} == {"(no text)", "fine\n"}


def test_sides_are_drawn_with_the_seed(replies, tmp_path):
    keys = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        (tmp_path / name).mkdir()
        write_blinded_sheet(replies, tmp_path / name, seed=seed)
        keys.append(read_key(tmp_path / name))
    assert keys[0] == keys[1] and keys[0]["soft_side"] != keys[2]["soft_side"]
    assert keys[0]["seed"] == 3 and len(keys[0]["soft_side"]) == len(replies)
    # Both sides about equally often, so a habit of choosing the left says nothing.
    many = pd.concat([replies] * 20, ignore_index=True)
    write_blinded_sheet(many, tmp_path, seed=0)
    share = read_key(tmp_path)["soft_side"].count("policy_response") / len(many)
    assert share == pytest.approx(0.5, abs=0.1)


def test_sheet_itself_does_not_tell_the_sides(replies, tmp_path):
    """Not in its cells, its formats, its second page: only in the key."""
    write_blinded_sheet(replies, tmp_path, seed=3)
    book = openpyxl.load_workbook(tmp_path / SHEET)
    looks = {(c.font.b, c.fill.fgColor.rgb, c.alignment.wrap_text) for row in book.active["B2:C25"] for c in row}
    assert len(looks) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([SHEET, KEY])


def label(folder, labels, name=SHEET, order=None, change=None):
    """Fill in a copy by row as written; then reorder the rows, or leave some out, as a person may."""
    book = openpyxl.load_workbook(folder / SHEET)
    sheet = book.worksheets[0]
    rows = [[c.value for c in row] for row in sheet.iter_rows(min_row=2)]
    for row, verdict in zip(rows, labels, strict=True):
        row[3] = verdict
    if change:
        change(rows)
    sheet.delete_rows(2, len(rows))
    for number, row in enumerate([rows[i] for i in order] if order is not None else rows, start=2):
        for column, value in enumerate(row, start=1):
            cell = sheet.cell(number, column, value)
            if column != 4 and value is not None:
                cell.data_type, cell.number_format = "s", "@"  # as it was written
    book.save(folder / name)
    return str(folder / name)


@pytest.mark.parametrize("language", VERDICTS)
def test_filled_sheet_is_read_and_the_better_side_is_chosen(replies, tmp_path, language):
    """As it comes back, by the words; a judge who always prefers what the soft prompt said, two rows set aside."""
    write_blinded_sheet(replies, tmp_path, seed=3, language=language)
    sides = read_key(tmp_path)["soft_side"]
    labels = [0 if side == "policy_response" else 1 for side in sides]
    labels[4], labels[5] = 2, 3
    label(tmp_path, [VERDICTS[language][n] for n in labels], "filled.xlsx")
    judgements = read_judgements(str(tmp_path / "filled.xlsx"))
    assert judgements.counts[2] == judgements.counts[3] == 1
    kept = [i for i in range(len(replies)) if i not in (4, 5)]
    for column, side in (("chosen", "soft"), ("rejected", "hard")):
        assert [[m["content"] for m in reply] for reply in judgements.dataset[column]] == [
            [replies[side][i]] for i in kept
        ]
    assert judgements.dataset["prompt"][:] == [replies["prompt"][i] for i in kept]
    assert judgements.dataset["row"][:] == [i + 2 for i in kept]


# What people said


def labels_of(folder, opinions):
    """soft and hard as the labels of this key's sheet; others, and None, as they are."""
    sides = read_key(folder)["soft_side"]
    first = {"soft": "policy_response", "hard": "reference_response"}
    return [int(side != first[o]) if o in first else o for o, side in zip(opinions, sides, strict=True)]


@pytest.fixture
def judged(replies, tmp_path):
    """24 rows, written; and the labels of a judge who says soft 12 times, hard 5, both poor 4, tie 3."""
    write_blinded_sheet(replies, tmp_path, seed=3)
    return tmp_path, labels_of(tmp_path, ["soft"] * 12 + ["hard"] * 5 + [2] * 4 + [3] * 3)


def wilson(right, rows):
    level = 2 * stats.norm.cdf(stats.t.ppf(0.975, rows - 1)) - 1  # Student's t for the normal quantile
    interval = stats.binomtest(right, rows).proportion_ci(confidence_level=level, method="wilson")
    return f"{right / rows:.3f} [{interval.low:.3f}, {interval.high:.3f}], n={rows} ({rows} conversations)"


def test_verdict_by_hand(judged):
    """Each row is a conversation, so the share with a direction is Wilson's of 12 of 17."""
    folder, labels = judged
    lines = people_verdict([label(folder, labels)]).splitlines()
    p = 2 * stats.binom.cdf(5, 17, 0.5)
    assert lines[:9] == [
        f"Not shown what people prefer: of the judgements with a direction soft is better in {wilson(12, 17)}.",
        "",
        "| people's verdict | rows |",
        "|---|---|",
        "| soft | 12 |",
        "| hard | 5 |",
        "| tie or both good | 3 |",
        "| both poor | 4 |",
        "",
    ]
    # 12 and 7 halves of 24 rows.
    assert lines[9].startswith("With ties and both-poor rows as half: 0.646 [")
    # Mean 3.5 / 24, standard deviation 0.403: d = 0.362, so (1.96 + 0.84)^2 / d^2 and two more for Student's t.
    assert lines[9].endswith(
        f"n=24 (24 conversations); exact sign test p = {p:.3g}. If the difference is as large as it looks here, it "
        "would take about 62 conversations (62 judgements) to show it (80% power)."
    )
    assert lines[11].startswith("Fewer than 30 conversations (24): ")
    assert lines[10:11] + lines[12:] == ["", "", f"- {folder / SHEET}: 24 of 24 rows judged"]


@pytest.mark.parametrize(
    ("soft", "hard", "sentence"),
    [
        (20, 2, f"People prefer soft: of the judgements with a direction soft is better in {wilson(20, 22)}.\n"),
        (2, 20, f"People prefer hard: of the judgements with a direction soft is better in {wilson(2, 22)}.\n"),
        (
            11,
            11,
            f"Not shown what people prefer: of the judgements with a direction soft is better in {wilson(11, 22)}.\n",
        ),
        (0, 0, "Not shown what people prefer: none of 24 judgements has a direction."),
    ],
)
def test_first_sentence_says_what_came_out(judged, soft, hard, sentence):
    folder, _ = judged
    labels = labels_of(folder, ["soft"] * soft + ["hard"] * hard + [3] * (24 - soft - hard))
    assert people_verdict([label(folder, labels)]).startswith(sentence)


def test_rows_of_one_conversation_are_counted_once(replies, tmp_path):
    """24 rows of two conversations, all for soft: as sure as two rows, not as 24."""
    replies["prompt"] = [sample_context(i % 2) for i in range(len(replies))]
    write_blinded_sheet(replies, tmp_path, seed=3)
    verdict = people_verdict([label(tmp_path, labels_of(tmp_path, ["soft"] * 24))])
    # 2 / (2 + t^2), t being 12.706: of two conversations, 1 degree of freedom.
    assert "Not shown" in verdict and "1.000 [0.012, 1.000], n=24 (2 conversations)" in verdict
    assert "| soft | 24 |" in verdict and "exact sign test over conversations p = 0.5." in verdict


def test_equal_replies_are_ties_whatever_is_said(replies, tmp_path):
    """Also of a context that comes twice: the key cannot tell its rows apart."""
    replies["prompt"] = [sample_context(i // 2) for i in range(len(replies))]
    replies["hard"] = replies["soft"] = [f"the same {i // 2}" for i in range(len(replies))]
    write_blinded_sheet(replies, tmp_path, seed=3)
    verdict = people_verdict([label(tmp_path, [0] * 12 + [1] * 12)])
    assert "| soft | 0 |\n| hard | 0 |\n| tie or both good | 24 |" in verdict
    assert "sign test over conversations p = 1." in verdict


def test_sorted_rows_still_match(judged):
    folder, labels = judged
    as_written = people_verdict([label(folder, labels)])
    order = random.Random(0).sample(range(24), 24)
    assert people_verdict([label(folder, labels, order=order)]) == as_written


def test_rows_may_be_left_out_or_left_empty(judged):
    """The number in all is the key's."""
    folder, labels = judged
    kept = [16, 13, 0, 20, 2]
    fewer = people_verdict([label(folder, labels, "fewer.xlsx", kept)])
    some = [verdict if i in kept else ["", " ", None][i % 3] for i, verdict in enumerate(labels)]
    for verdict in (fewer, people_verdict([label(folder, some)])):
        for row in ("| soft | 2 |", "| hard | 2 |", "| both poor | 1 |", "| tie or both good | 0 |"):
            assert row in verdict
        assert verdict.endswith(".xlsx: 5 of 24 rows judged")


def test_sheet_that_nobody_judged_is_one_line(judged):
    folder, _ = judged
    assert complaint(folder / SHEET) == f"{folder / SHEET}: no row is judged yet: column human_eval is empty"


def test_line_ends_of_another_program_still_match(judged):
    """Saved as csv, where they show (in xlsx the XML hides them), with an empty line at the end of each cell."""
    folder, labels = judged
    as_written = people_verdict([label(folder, labels)])
    frame = pd.read_excel(folder / SHEET, dtype=str, keep_default_na=False)
    for column in ("A", "B", *COLUMNS[1:3]):
        frame[column] = frame[column].str.replace("\n", "\r\n") + "\r\n"
    frame.to_csv(folder / "blinded.csv", index=False)
    assert b"\xef\xbc\x8c\r\n" in (folder / "blinded.csv").read_bytes()
    assert people_verdict([str(folder / "blinded.csv")]) == as_written.replace(SHEET, "blinded.csv")


@pytest.mark.parametrize("taken_back", [0, 1, 2])
def test_escapes_still_match_whoever_stored_and_read_them(tmp_path, taken_back):
    """openpyxl takes back an escape of an escape in what Excel saved, and not in what it wrote itself."""
    table = pd.DataFrame({"prompt": [sample_context(0)] * 4, "soft": ESCAPES, "hard": ["b"] * 4})
    write_blinded_sheet(table, tmp_path, seed=0)

    def change(rows):
        for row in rows:
            for _ in range(taken_back):
                row[:] = [unescape(cell) if isinstance(cell, str) else cell for cell in row]

    sheet = label(tmp_path, labels_of(tmp_path, ["soft"] * 4), "back.xlsx", change=change)
    assert "| soft | 4 |" in people_verdict([sheet])


def complaint(*sheets):
    with pytest.raises(InputError) as caught:
        people_verdict([str(sheet) for sheet in sheets])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("column", [5, 6, 7])
def test_changed_hidden_column_is_refused(judged, column):
    """A conversation's too: the row would be taken for another."""
    folder, labels = judged

    def change(rows):
        rows[4][column] = json.dumps(sample_context(99)) if column == 5 else rows[4][column] + "!"

    message = complaint(label(folder, labels, change=change))
    assert "row 6: not a row of the key: its hidden columns context_messages, policy_response" in message


def test_what_people_write_into_the_visible_texts_loses_nothing(judged):
    folder, labels = judged

    def change(rows):
        rows[4][0] = "what?"
        rows[4][1] += " (too long)"
        rows[7][2] = None

    changed = label(folder, labels, "changed.xlsx", change=change)
    plain, *more = people_verdict([changed]).rsplit("\n", 1)
    assert more == ["- 2 rows had a visible text changed; what counts is the hidden columns'"]
    assert plain == people_verdict([label(folder, labels)]).replace(SHEET, "changed.xlsx")


@pytest.mark.parametrize("columns", [[0, 1, 2, 3], [1], [2]])
def test_visible_columns_sorted_without_the_hidden_ones_are_refused(judged, columns):
    folder, labels = judged

    def change(rows):
        for column in columns:
            for row, value in zip(rows, [row[column] for row in rows[::-1]], strict=True):
                row[column] = value

    message = complaint(label(folder, labels, change=change))
    assert "row 2: under A or B stands the text of another place" in message


@pytest.mark.parametrize("places", [(1, 2), (6, 7)])
def test_swapped_columns_are_refused(judged, places):
    """They would turn the verdict round."""
    folder, labels = judged
    first, second = places

    def change(rows):
        for row in rows:
            row[first], row[second] = row[second], row[first]

    assert "row 2" in complaint(label(folder, labels, change=change))


def test_row_that_stands_there_twice_is_refused(judged):
    folder, labels = judged
    message = complaint(label(folder, labels, order=[0, 1, 2, 1]))
    assert message.endswith("row 5: this pair stands there twice: delete one of the two rows")


@pytest.mark.parametrize("verdict", [4, "left", -1, True, "A", "better"])
def test_wrong_row_is_named(judged, verdict):
    folder, labels = judged
    labels[7] = verdict
    assert "row 9, human_eval: expected one of the list: A is better" in complaint(label(folder, labels))


@pytest.mark.parametrize("column", COLUMNS)
def test_missing_column_is_named(judged, column):
    folder, labels = judged
    pd.read_excel(label(folder, labels)).drop(columns=column).to_excel(folder / "less.xlsx", index=False)
    assert f"less.xlsx: missing column {column}; found " in complaint(folder / "less.xlsx")


# Its key


def test_missing_key_is_named(judged):
    folder, labels = judged
    sheet = label(folder, labels)
    (folder / KEY).unlink()
    message = complaint(sheet)
    assert str(folder / KEY) in message and "compare.py" in message


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        "{}",
        '{"rows": []}',
        '{"soft_side": 3, "rows": 3}',
        "\udcff",
        '{"soft_side": ["policy_response"], "rows": []}',
        '{"soft_side": ["policy_response"], "rows": [["a"]]}',
        '{"soft_side": ["left"], "rows": ["a"]}',
    ],
)
@pytest.mark.parametrize("name", [SHEET, "anna.xlsx"])
def test_broken_key_is_named(judged, content, name):
    folder, labels = judged
    sheet = label(folder, labels, name)
    (folder / KEY).write_text(content, encoding="utf-8", errors="surrogateescape")
    message = complaint(sheet)
    assert str(folder / KEY) in message and "not the key" in message


def test_key_of_another_sheet_is_refused(judged, replies):
    """Drawn with another seed: of some rows the digests are not there."""
    folder, labels = judged
    sheet = label(folder, labels)
    (folder / "other").mkdir()
    write_blinded_sheet(replies, folder / "other", seed=4)
    shutil.copy(folder / "other" / KEY, folder / KEY)
    assert "not a row of the key" in complaint(sheet)


def test_sheet_of_another_name_finds_the_one_key_beside_it(judged):
    """That of its rows: also among others, and where the key was copied along."""
    folder, labels = judged
    sheet = label(folder, labels, "from anna.xlsx")
    expected = people_verdict([sheet])
    assert "| soft | 12 |" in expected
    (folder / "other").mkdir()
    write_blinded_sheet(
        pd.DataFrame({"prompt": [sample_context(0)], "soft": ["x"], "hard": ["y"]}), folder / "other", seed=4
    )
    shutil.copy(folder / "other" / KEY, folder / "another.key.json")
    shutil.copy(folder / KEY, folder / "copy.key.json")
    assert people_verdict([sheet]) == expected


def test_sheet_of_another_name_without_its_key(judged, replies):
    folder, labels = judged
    (folder / "back").mkdir()
    sheet = shutil.move(label(folder, labels, "anna.xlsx"), folder / "back" / "anna.xlsx")
    message = complaint(sheet)
    assert f"no key {folder / 'back' / 'anna.key.json'}" in message and "none have rows of" in message
    # With another sheet of the key beside it, the key is found there.
    assert "| soft | 12 | 12 | 24 |" in people_verdict([str(sheet), label(folder, labels)])
    # Two keys that hold some of its rows: nobody knows which.
    write_blinded_sheet(replies, folder / "back", seed=4)
    (folder / "back" / SHEET).unlink()
    shutil.copy(folder / KEY, folder / "back" / "mine.key.json")
    message = complaint(sheet)
    assert "blinded.key.json, " in message and "mine.key.json have rows of" in message


# Several people


def test_several_people(judged):
    """Two agree but for two rows, the third did half: counts a sheet and in all, intervals by conversation."""
    folder, labels = judged
    other = list(labels)
    other[0], other[1] = 2, 2
    half = labels[:12] + [None] * 12
    sheets = [label(folder, verdicts, f"{name}.xlsx") for name, verdicts in
              (("anna", labels), ("ben", other), ("cai", half))]  # fmt: skip
    lines = people_verdict(sheets).splitlines()
    assert lines[2:8] == [
        f"| people's verdict | {sheets[0]} | {sheets[1]} | {sheets[2]} | all |",
        "|---|---|---|---|---|",
        "| soft | 12 | 10 | 12 | 34 |",
        "| hard | 5 | 5 | 0 | 10 |",
        "| tie or both good | 3 | 3 | 0 | 6 |",
        "| both poor | 4 | 6 | 0 | 10 |",
    ]
    # 34 of 44, of 17 conversations: not as sure as 44 rows of their own would be.
    right, low, high = 34 / 44, *stats.binomtest(34, 44).proportion_ci(method="wilson")
    assert f"is better in {right:.3f} [" in lines[0] and lines[0].endswith("n=44 (17 conversations).")
    ends = [float(n) for n in lines[0].split("[")[1].split("]")[0].split(", ")]
    assert ends[0] < low - 0.02 and ends[1] > high + 0.005
    assert [line for line in lines if "rows judged" in line] == [
        f"- {sheets[0]}: 24 of 24 rows judged",
        f"- {sheets[1]}: 24 of 24 rows judged",
        f"- {sheets[2]}: 12 of 24 rows judged",
    ]
    # The first 12 rows have three labels, of which two rows differ; the other 12 have two. Kappa is of the former.
    assert lines[-1].startswith("- 24 pairs were judged by two people or more, and all say the same of 22 (0.917); ")
    assert "over the 12 pairs with 3 judgements each" in lines[-1]


def test_one_sheet_twice_and_sheets_of_two_keys_are_refused(judged, replies):
    folder, labels = judged
    sheet = label(folder, labels)
    assert "one sheet is given twice" in complaint(sheet, folder / "." / SHEET)
    (folder / "other").mkdir()
    write_blinded_sheet(replies, folder / "other", seed=4)
    other = label(folder / "other", labels)
    assert f"{sheet} and {other} are not copies of one sheet" in complaint(sheet, other)


@pytest.mark.skipif(not shutil.which("soffice"), reason="LibreOffice is not installed")
@pytest.mark.parametrize("language", VERDICTS)
def test_libreoffice_opens_and_saves_it(replies, tmp_path, language):
    """Filled in, opened and saved by another program: texts, hidden columns, choices and rows are what they were."""
    texts = [*TRICKY, *ESCAPES[:-1], "caf_x00e9_"]  # of two escapes that overlap LibreOffice spells out one
    table = pd.DataFrame({"prompt": [sample_context(i) for i in range(len(texts))], "soft": texts, "hard": "no"})
    write_blinded_sheet(table, tmp_path, 3, language)
    labels = labels_of(tmp_path, ["soft"] * 14 + [2, None])
    words = [None if verdict is None else VERDICTS[language][verdict] for verdict in labels]
    sheet = label(tmp_path, words)
    as_filled = people_verdict([sheet])
    (tmp_path / "saved").mkdir()
    profile = f"-env:UserInstallation=file://{tmp_path}/profile"
    command = ["soffice", profile, "--headless", "--convert-to", "xlsx:Calc MS Excel 2007 XML", "--outdir"]
    subprocess.run([*command, str(tmp_path / "saved"), sheet], check=True, timeout=180, capture_output=True)
    saved = tmp_path / "saved" / SHEET
    shutil.copy(tmp_path / KEY, tmp_path / "saved" / KEY)
    assert people_verdict([str(saved)]) == as_filled.replace(sheet, str(saved))
    book = openpyxl.load_workbook(saved)
    first = book.worksheets[0]
    assert first["E1"].value.startswith("=") and len(book.worksheets) == 2
    assert openpyxl.load_workbook(saved, data_only=True).worksheets[0]["E1"].value.endswith("1")  # one row is left
    assert first.column_dimensions["F"].hidden and first.column_dimensions["F"].max == 8
    assert first.auto_filter.ref == "A1:H17"
    (choices,) = first.data_validations.dataValidation
    assert choices.formula1 == f'"{",".join(VERDICTS[language].values())}"'
    frame = pd.read_excel(saved, dtype=object, keep_default_na=False)
    replies = set(frame["policy_response"]) | set(frame["reference_response"])
    assert replies == set(frame["A"]) | set(frame["B"]) >= set(TRICKY)
    # Escaped in the file itself; openpyxl takes the escape of the underscore back.
    with zipfile.ZipFile(saved) as archive:
        stored = archive.read("xl/sharedStrings.xml").decode()
    assert "item_x005F_x0041_7" in stored and "item_x0041_7" not in stored


# What a cell cannot hold


def test_replies_that_no_cell_holds_come_back(tmp_path):
    """Too long, blank once the control characters are gone, or half a surrogate pair: written as what can be read."""
    replies = ["x" * 40_000, "\x07 \x07", "\u00a0", "a\ud800b"]
    table = pd.DataFrame(
        {"prompt": [sample_context(i) for i in range(4)], "soft": replies, "hard": [f"plain {i}" for i in range(4)]},
        dtype=object,  # Arrow's strings refuse the surrogate, and so would every file but this one
    )
    write_blinded_sheet(table, tmp_path, seed=0)
    book = openpyxl.load_workbook(tmp_path / SHEET)
    soft = [
        book.worksheets[0].cell(row, 7 if side == "policy_response" else 8).value
        for row, side in enumerate(json.loads((tmp_path / KEY).read_text())["soft_side"], start=2)
    ]
    assert soft == ["x" * 32_766, "(no text)", "(no text)", "ab"]
    for row in range(2, 6):
        book.worksheets[0].cell(row, 4, 3)
    book.save(tmp_path / SHEET)
    # Ties alone are a verdict too, though nothing to learn from.
    assert "| tie or both good | 4 |" in people_verdict([str(tmp_path / SHEET)])
    with pytest.raises(InputError, match="no row is labelled 0 or 1"):
        read_judgements(str(tmp_path / SHEET))


def test_context_that_no_cell_holds():
    check_fits_cells(Dataset.from_dict({"prompt": [sample_context(0)]}))
    long = [{"role": "user", "content": "x" * 32_768}]
    with pytest.raises(InputError, match="context 2 has 32801 characters as JSON"):
        check_fits_cells(Dataset.from_dict({"prompt": [sample_context(0), long]}))


def test_the_same_texts_for_soft_and_hard_stand_on_other_sides(tmp_path):
    """A row is known again by its texts: they must not stand for soft and hard here, for hard and soft there."""
    prompt = [{"role": "user", "content": "q"}]
    for seed in range(6):
        table = pd.DataFrame({"prompt": [prompt] * 2, "soft": ["yes", "no"], "hard": ["no", "yes"]})
        write_blinded_sheet(table, tmp_path, seed)
        rows = read_hidden(tmp_path).to_numpy().tolist()
        key = read_key(tmp_path)
        for row, side, soft in zip(rows, key["soft_side"], table["soft"], strict=True):
            assert row[1 if side == "policy_response" else 2] == soft
        assert len(set(zip(key["rows"], key["soft_side"], strict=True))) == len(set(key["rows"]))


def test_a_verdict_drawn_down_past_the_end(judged):
    folder, labels = judged
    sheet = label(folder, labels)
    book = openpyxl.load_workbook(sheet)
    book.worksheets[0].cell(26, 4, 0)
    book.save(sheet)
    assert f"- {sheet}: 24 of 24 rows judged" in people_verdict([sheet])
