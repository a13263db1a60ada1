import csv
import json
import random
import shutil
import subprocess
import zipfile

import openpyxl
import pandas as pd
import pytest
from scipy import stats
from tiny import sample_context

from h2s.data.datasets import COLUMNS, read_judgements
from h2s.errors import InputError
from h2s.report.blinded_sheet import INSTRUCTIONS, KEY, SHEET, check_fits_cells, people_verdict, write_blinded_sheet

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


def test_blinded_sheet_reads_back_as_it_was(replies, tmp_path):
    write_blinded_sheet(replies, tmp_path, seed=3)
    sheet = openpyxl.load_workbook(tmp_path / SHEET).worksheets[0]
    rows = list(sheet.iter_rows(values_only=False))
    assert (
        [c.value for c in rows[0]]
        == list(COLUMNS)
        == [
            "context_messages",
            "policy_response",
            "reference_response",
            "human_eval",
        ]
    )
    assert len(rows) == len(replies) + 1
    sides = read_key(tmp_path)["soft_side"]
    for cells, (_, reply), side in zip(rows[1:], replies.iterrows(), sides, strict=True):
        # Text, whatever it looks like: neither formulas nor numbers.
        assert [c.data_type for c in cells[:3]] == ["s", "s", "s"]
        assert json.loads(cells[0].value) == reply["prompt"]
        soft, hard = (1, 2) if side == "policy_response" else (2, 1)
        assert (cells[soft].value, cells[hard].value) == (reply["soft"], reply["hard"])
        assert cells[3].value is None


def test_no_formula_is_in_the_file(replies, tmp_path):
    """In the file's own XML, as a spreadsheet program would read it."""
    write_blinded_sheet(replies, tmp_path, seed=3)
    with zipfile.ZipFile(tmp_path / SHEET) as archive:
        xml = archive.read("xl/worksheets/sheet1.xml").decode()
    assert "<f>" not in xml and "<f " not in xml


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


def test_drop_down_is_on_the_cells_to_fill_in(replies, tmp_path):
    write_blinded_sheet(replies, tmp_path, seed=3)
    first, second = openpyxl.load_workbook(tmp_path / SHEET).worksheets
    (choices,) = first.data_validations.dataValidation
    assert str(choices.sqref) == f"D2:D{len(replies) + 1}" == f"D2:D{first.max_row}"
    assert (choices.type, choices.formula1) == ("list", '"0,1,2,3"')
    # Set, the attribute hides the arrow.
    assert choices.showErrorMessage and not choices.showDropDown
    assert not second.data_validations.dataValidation


def test_instructions_stand_second(replies, tmp_path):
    """Readers of tables take the first worksheet, so the second disturbs none."""
    write_blinded_sheet(replies, tmp_path, seed=3)
    book = openpyxl.load_workbook(tmp_path / SHEET)
    assert book.sheetnames == ["judgements", "instructions"] and book.active.title == "judgements"
    lines = [row[0] for row in book["instructions"].iter_rows(values_only=True)]
    assert lines == list(INSTRUCTIONS)
    for label, word in enumerate(("column B (policy_response) is", "column C (reference_response) is", "poor", "good")):
        assert any(line.startswith(f"{label} ") and word in line for line in lines)


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


def test_filled_sheet_is_read_and_the_better_side_is_chosen(replies, tmp_path):
    """A judge who always prefers what the soft prompt said, with some rows left without a direction."""
    write_blinded_sheet(replies, tmp_path, seed=3)
    sides = read_key(tmp_path)["soft_side"]
    book = openpyxl.load_workbook(tmp_path / SHEET)
    labels = [0 if side == "policy_response" else 1 for side in sides]
    labels[4], labels[5] = 2, 3
    for row, label in enumerate(labels, start=2):
        book.active.cell(row, 4, label)
    book.save(tmp_path / "filled.xlsx")
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


def fill(folder, labels, order=None, change=None, name=SHEET):
    """Fill in by row as written; then reorder the rows, or leave some out, as a person may."""
    book = openpyxl.load_workbook(folder / SHEET)
    rows = [[c.value for c in row[:3]] + [label] for row, label in zip(book.active["A2:D99"], labels, strict=False)]
    if change:
        change(rows)
    book.active.delete_rows(2, len(rows))
    for number, row in enumerate([rows[i] for i in order] if order is not None else rows, start=2):
        for column, value in enumerate(row, start=1):
            book.active.cell(number, column, value).data_type = "n" if column == 4 else "s"
    book.save(folder / name)
    return str(folder / name)


@pytest.fixture
def judged(replies, tmp_path):
    """24 rows, written; and the labels of a judge who says soft 12 times, hard 5, both poor 4, tie 3."""
    write_blinded_sheet(replies, tmp_path, seed=3)
    opinions = ["soft"] * 12 + ["hard"] * 5 + [2] * 4 + [3] * 3
    sides = read_key(tmp_path)["soft_side"]
    labels = [
        o if isinstance(o, int) else (side == "policy_response") == (o == "hard")
        for o, side in zip(opinions, sides, strict=True)
    ]
    return tmp_path, [int(label) for label in labels]


def wilson(right, rows):
    level = 2 * stats.norm.cdf(stats.t.ppf(0.975, rows - 1)) - 1  # Student's t for the normal quantile
    interval = stats.binomtest(right, rows).proportion_ci(confidence_level=level, method="wilson")
    return f"{right / rows:.3f} [{interval.low:.3f}, {interval.high:.3f}], n={rows} ({rows} conversations)"


def test_verdict_by_hand(judged):
    """Each row is a conversation, so the share with a direction is Wilson's of 12 of 17."""
    folder, labels = judged
    lines = people_verdict(fill(folder, labels)).splitlines()
    p = 2 * stats.binom.cdf(5, 17, 0.5)
    assert lines[:9] == [
        "| people's verdict | rows |",
        "|---|---|",
        "| soft | 12 |",
        "| hard | 5 |",
        "| tie or both good | 3 |",
        "| both poor | 4 |",
        "",
        f"Soft is better in {wilson(12, 17)} of the rows with a direction.",
        "",
    ]
    # 12 and 7 halves of 24 rows.
    assert len(lines) == 10 and lines[9].startswith("With ties and both-poor rows as half: 0.646 [")
    assert lines[9].endswith(f"n=24 (24 conversations); exact sign test p = {p:.3g}.")


def test_rows_of_one_conversation_are_counted_once(replies, tmp_path):
    """24 rows of two conversations, all for soft: as sure as two rows, not as 24."""
    replies["prompt"] = [sample_context(i % 2) for i in range(len(replies))]
    write_blinded_sheet(replies, tmp_path, seed=3)
    labels = [int(side == "reference_response") for side in read_key(tmp_path)["soft_side"]]
    verdict = people_verdict(fill(tmp_path, labels))
    # 2 / (2 + t^2), t being 12.706: of two conversations, 1 degree of freedom.
    assert "1.000 [0.012, 1.000], n=24 (2 conversations)" in verdict and "| soft | 24 |" in verdict
    assert verdict.endswith("exact sign test over conversations p = 0.5.")


def test_equal_replies_are_ties_whatever_is_said(replies, tmp_path):
    """Also of a context that comes twice: the key cannot tell its rows apart."""
    replies["prompt"] = [sample_context(i // 2) for i in range(len(replies))]
    replies["hard"] = replies["soft"] = [f"the same {i // 2}" for i in range(len(replies))]
    write_blinded_sheet(replies, tmp_path, seed=3)
    verdict = people_verdict(fill(tmp_path, [0] * 12 + [1] * 12))
    assert "| soft | 0 |\n| hard | 0 |\n| tie or both good | 24 |" in verdict and verdict.endswith(
        "sign test over conversations p = 1."
    )


def test_sorted_rows_still_match(judged):
    folder, labels = judged
    as_written = people_verdict(fill(folder, labels))
    order = random.Random(0).sample(range(24), 24)
    assert people_verdict(fill(folder, labels, order)) == as_written


def test_rows_may_be_left_out(judged):
    folder, labels = judged
    verdict = people_verdict(fill(folder, labels, [16, 13, 0, 20, 2]))
    for row in ("| soft | 2 |", "| hard | 2 |", "| both poor | 1 |", "| tie or both good | 0 |"):
        assert row in verdict


def test_line_ends_of_another_program_still_match(judged):
    """Saved as csv, where they show (in xlsx the XML hides them), with an empty line at the end of each cell."""
    folder, labels = judged
    as_written = people_verdict(fill(folder, labels))
    frame = pd.read_excel(folder / SHEET, dtype=str, keep_default_na=False)
    for column in COLUMNS[1:3]:
        frame[column] = frame[column].str.replace("\n", "\r\n") + "\r\n"
    frame.to_csv(folder / "blinded.csv", index=False)
    assert b"\xef\xbc\x8c\r\n" in (folder / "blinded.csv").read_bytes()
    assert people_verdict(str(folder / "blinded.csv")) == as_written


def complaint(sheet):
    with pytest.raises(InputError) as caught:
        people_verdict(str(sheet))
    return str(caught.value)


@pytest.mark.parametrize("column", [0, 1, 2])
def test_changed_text_is_refused(judged, column):
    """A conversation's too: the row would be taken for another."""
    folder, labels = judged

    def change(rows):
        rows[4][column] = json.dumps(sample_context(99)) if column == 0 else rows[4][column] + "!"

    message = complaint(fill(folder, labels, change=change))
    assert "row 6" in message and "texts were changed" in message


def test_swapped_columns_are_refused(judged):
    """They would turn the verdict round."""
    folder, labels = judged

    def change(rows):
        for row in rows:
            row[1], row[2] = row[2], row[1]

    assert "row 2" in complaint(fill(folder, labels, change=change))


@pytest.mark.parametrize("label", [None, "", 4, "left", -1, True])
def test_unfilled_or_wrong_row_is_named(judged, label):
    folder, labels = judged
    book = openpyxl.load_workbook(fill(folder, labels))
    book.active["D9"] = label
    book.save(folder / SHEET)
    message = complaint(folder / SHEET)
    assert "row 9" in message and "human_eval" in message


def test_missing_key_is_named(judged):
    folder, labels = judged
    sheet = fill(folder, labels)
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
        '{"soft_side": ["left"], "rows": ["a"]}',
    ],
)
def test_broken_key_is_named(judged, content):
    folder, labels = judged
    sheet = fill(folder, labels)
    (folder / KEY).write_text(content, encoding="utf-8", errors="surrogateescape")
    message = complaint(sheet)
    assert str(folder / KEY) in message and "not the key" in message


def test_key_of_another_sheet_is_refused(judged, replies):
    """Drawn with another seed: of some rows the digests are not there."""
    folder, labels = judged
    sheet = fill(folder, labels)
    (folder / "other").mkdir()
    write_blinded_sheet(replies, folder / "other", seed=4)
    shutil.copy(folder / "other" / KEY, folder / KEY)
    assert "not a row of the key" in complaint(sheet)


def test_sheet_of_another_name_has_the_key_of_that_name(judged):
    folder, labels = judged
    sheet = fill(folder, labels, name="from_anna.xlsx")
    assert "from_anna.key.json" in complaint(sheet)
    shutil.copy(folder / KEY, folder / "from_anna.key.json")
    assert "| soft | 12 |" in people_verdict(sheet)


@pytest.mark.skipif(not shutil.which("soffice"), reason="LibreOffice is not installed")
def test_libreoffice_reads_the_texts_as_they_are(judged):
    """Another program's eyes: the first worksheet as csv, formulas unevaluated, its rows still those of the key."""
    folder, labels = judged
    fill(folder, labels)
    profile = f"-env:UserInstallation=file://{folder}/profile"
    command = ["soffice", profile, "--headless", "--convert-to", "csv:Text - txt - csv (StarCalc):44,34,76,1"]
    subprocess.run([*command, "--outdir", str(folder), str(folder / SHEET)], check=True, timeout=180)
    with open(folder / "blinded.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == list(COLUMNS) and len(rows) == 25
    assert {text for row in rows[1:] for text in row[1:3]} >= set(TRICKY)
    assert people_verdict(str(folder / "blinded.csv")) == people_verdict(str(folder / SHEET))


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
        book.worksheets[0].cell(row, 2 if side == "policy_response" else 3).value
        for row, side in enumerate(json.loads((tmp_path / KEY).read_text())["soft_side"], start=2)
    ]
    assert soft == ["x" * 32_767, "(no text)", "(no text)", "ab"]
    for row in range(2, 6):
        book.worksheets[0].cell(row, 4, 3)
    book.save(tmp_path / SHEET)
    # Ties alone are a verdict too, though nothing to learn from.
    assert "| tie or both good | 4 |" in people_verdict(str(tmp_path / SHEET))
    with pytest.raises(InputError, match="no row is labelled 0 or 1"):
        read_judgements(str(tmp_path / SHEET))


def test_context_that_no_cell_holds():
    check_fits_cells([sample_context(0)])
    long = [{"role": "user", "content": "x" * 32_768}]
    with pytest.raises(InputError, match="context 2 has 32801 characters as JSON"):
        check_fits_cells([sample_context(0), long])
