import zipfile
from typing import get_args

import openpyxl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openpyxl.utils.escape import unescape

from h2s.data.datasets import VERDICTS
from h2s.report.workbook import WORDS, cell_text, dialogue, judging_workbook, plain_text
from h2s.run.arguments import CompareArguments


@pytest.fixture(params=WORDS)
def language(request):
    return request.param


def book_of(*texts, language="en"):
    """A row a text, standing under A; saved and loaded would be the same."""
    return judging_workbook([("User: hello", text, "b", "[]", text, "b") for text in texts], language)


def test_words_are_there_in_each_language(language):
    words = WORDS[language]
    assert get_args(CompareArguments.__annotations__["language"]) == tuple(WORDS) == tuple(VERDICTS)
    assert words.verdicts is VERDICTS[language]
    assert len(words.instructions) == len(WORDS["en"].instructions)
    for verdict in words.verdicts.values():
        assert sum(verdict in line for line in words.instructions) == 1
    # A drop-down's list is separated by commas and holds 255 characters; its words stand in quotes in the formula.
    assert not any("," in verdict for verdict in words.verdicts.values())
    assert len(",".join(words.verdicts.values())) < 256 and '"' not in words.left


def test_dialogue():
    messages = [{"role": r, "content": c} for r, c in (("user", "a\nb"), ("assistant", "c"), ("user", "你好"))]
    assert dialogue(messages, "en") == "User: a\nb\nAssistant: c\nUser: 你好"
    assert dialogue(messages, "zh-TW") == "使用者：a\nb\n助理：c\n使用者：你好"


def test_what_people_see(language, tmp_path):
    book_of("a", "b", "c", language=language).save(tmp_path / "book.xlsx")
    sheet, page = openpyxl.load_workbook(tmp_path / "book.xlsx").worksheets
    words = WORDS[language]
    assert (sheet.title, page.title) == words.titles
    assert [cell.value for cell in sheet[1]] == [
        words.conversation,
        "A",
        "B",
        "human_eval",
        f'="{words.left}"&COUNTBLANK(D2:D4)',
        "context_messages",
        "policy_response",
        "reference_response",
    ]
    # Not fixed: where rows are sorted, a program fits their heights to them anew.
    with zipfile.ZipFile(tmp_path / "book.xlsx") as archive:
        xml = archive.read("xl/worksheets/sheet1.xml").decode()
    assert xml.count('<row r="4" ht="20">') == 1 and "customHeight" not in xml
    assert [letter for letter in "ABCDEFGH" if sheet.column_dimensions[letter].hidden] == ["F", "G", "H"]
    assert sheet.freeze_panes == "A2" and not sheet.sheet_view.showRowColHeaders
    # Hidden columns too: what is sorted goes with its row.
    assert sheet.auto_filter.ref == "A1:H4"
    (choices,) = sheet.data_validations.dataValidation
    assert str(choices.sqref) == "D2:D4" and choices.type == "list"
    assert choices.formula1 == f'"{",".join(words.verdicts.values())}"'
    # Set, the attribute hides the arrow.
    assert choices.showErrorMessage and not choices.showDropDown
    assert [cell.value for (cell,) in page.iter_rows()] == list(words.instructions)
    assert not page.data_validations.dataValidation


@pytest.mark.parametrize(
    ("text", "width", "height"),
    [
        ("short", 44, 20),
        ("three\n\nlines", 44, 52),
        ("x" * 49, 44, 20),  # 41.65 of the 42 digits that are counted on
        ("x" * 50, 44, 36),
        ("好" * 21, 44, 20),
        ("好" * 22, 44, 36),
        ("好" * 21 * 25, 44, 404),
        ("好" * 21 * 26, 56, 340),  # 546 at 27 a line: 21 lines
        ("x" * 30_000, 68, 409),
    ],
)
def test_column_and_row_fit_the_text(text, width, height):
    sheet = book_of(text, "y").worksheets[0]
    assert (sheet.column_dimensions["B"].width, sheet.row_dimensions[2].height) == (width, height)
    assert (sheet.column_dimensions["C"].width, sheet.row_dimensions[3].height) == (44, 20)


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("plain _x_ 你好", "plain _x_ 你好"),
        ("_x0041_", "_x005F_x0041_"),
        ("_x005F_x0041_", "_x005F_x005F_x005F_x0041_"),
        ("a_x00e9_x00E9_", "a_x005F_x00e9_x005F_x00E9_"),
        ("_x00_ _x00411_ _X0041_", "_x00_ _x00411_ _X0041_"),
        ("a\x00b\x1bc\ufffe\ud800", "abc"),
        ("\x07 ", "(no text)"),
        ("", "(no text)"),
        ("x" * 40_000, "x" * 32_766),
    ],
)
def test_cell_text(text, stored):
    assert cell_text(text) == stored


@given(st.text("_x0415FeE=\r\nA", max_size=30))
def test_what_spells_an_escape_comes_back(text):
    """Taken back once, from left to right, as spreadsheet programs do."""
    stored = cell_text(text)
    assert unescape(stored) == (text if text.strip() else "(no text)")
    assert plain_text(stored) == plain_text(unescape(stored)) == plain_text(plain_text(stored))


@pytest.mark.parametrize("cell", ["a\nb", "a\r\nb\r\n", " a\rb", "a_x000D_\nb", "a_x005F_x000D_\nb"])
def test_plain_text(cell):
    assert plain_text(cell) == "a\nb"
