"""The workbook that people fill in: its words in each language, its looks, and how a cell holds a text."""

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openpyxl import Workbook
from openpyxl.formatting.rule import FormulaRule
from openpyxl.styles import Alignment, Border, Font, PatternFill, Side
from openpyxl.utils.escape import unescape
from openpyxl.worksheet.datavalidation import DataValidation
from openpyxl.worksheet.dimensions import RowDimension

from h2s.data.cells import is_blank
from h2s.data.datasets import COLUMNS, VERDICTS

CONTEXT, *SIDES, VERDICT = COLUMNS
HIDDEN = (CONTEXT, *SIDES)
VISIBLE = ("A", "B")  # the headings over the replies of SIDES
# What XML cannot hold; openpyxl's own list lacks the last three, and a file that holds them cannot be opened.
ILLEGAL_CHARACTERS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
# A text that spells out an escape of OOXML, such as _x0041_: every program would read the character in its place.
SPELT_ESCAPE = re.compile("_(?=x[0-9A-Fa-f]{4}_)")
CELL = 32_767  # characters; openpyxl cuts what is longer without a word
LINE, TALLEST = 16, 409  # points: a line of text in any script, the tallest row that Excel shows
LINES = TALLEST // LINE
RULE = Border(bottom=Side("thin", "BFBFBF"))
BOLD = Font(name="Calibri", size=11, bold=True)
WIDTHS = (44, 56, 68)  # of a column of texts, in digits: three of the first fit a laptop's screen


@dataclass(frozen=True)
class Words:
    """The sheet's own words in one language.

    Attributes:
        verdicts: the drop-down's choices by label.
        titles: of the two worksheets.
        conversation: heading of the readable conversation.
        roles: who speaks, as it stands before a message.
        left: what stands before the number of rows that are left to judge.
        choose: what the cell says that refuses a value.
        instructions: the second worksheet, a paragraph a line.
    """

    verdicts: dict[int, str]
    titles: tuple[str, str]
    conversation: str
    roles: dict[str, str]
    left: str
    choose: str
    instructions: tuple[str, ...]


WORDS = {
    "en": Words(
        VERDICTS["en"],
        ("judgements", "instructions"),
        "conversation",
        {"user": "User: ", "assistant": "Assistant: "},
        "left to judge: ",
        "Please choose one of the four from the list.",
        (
            "How to judge",
            "Each row of the first sheet is a conversation and two replies to its last message, under the headings A "
            "and B. Read all three, then click the yellow cell (human_eval) and choose from its list:",
            *(f"   •  {words}" for words in VERDICTS["en"].values()),
            "Judge each row by itself. In every row chance has drawn which reply stands under A, so neither side says "
            "anything about who wrote it.",
            "The heading on the right counts the rows that are left. You may stop and go on later; rows that you leave "
            "empty are not counted.",
            "A text that is longer than its row shows: click it, and all of it stands in the line above the sheet, "
            "whose lower edge can be drawn down.",
            "You may sort and filter with the arrows of the headings, and write in the texts. Please leave the hidden "
            "columns as they are.",
            "Save the file as an Excel workbook (.xlsx), under any name, and send it back.",
        ),
    ),
    "zh-TW": Words(
        VERDICTS["zh-TW"],
        ("評分", "說明"),
        "對話",
        {"user": "使用者：", "assistant": "助理："},
        "尚未評分：",
        "請從清單的四個選項中選一個。",
        (
            "評分方式",
            "第一張工作表的每一列是一段對話，以及對最後一則訊息的兩個回覆，分別在標題 A 與 B 之下。"
            "請三者都讀過，再點選黃色儲存格（human_eval），從清單中選擇：",
            *(f"   •  {words}" for words in VERDICTS["zh-TW"].values()),
            "每一列請單獨判斷。哪一個回覆放在 A 是逐列隨機決定的，左右位置與回覆的來源無關。",
            "右邊的標題會顯示還剩幾列。可以中途停下，之後再繼續；留空的列不計入。",
            "文字比列高長時，點選該儲存格，完整內容會顯示在工作表上方的資料編輯列；把它的下緣往下拉即可看到更多。",
            "可以用標題的箭頭排序與篩選，也可以在文字上做記號。請不要更動隱藏的欄。",
            "完成後請存成 Excel 活頁簿（.xlsx），檔名不限，再寄回來。",
        ),
    ),
}


def dialogue(messages: list[dict[str, str]], language: str) -> str:
    """A conversation as people read it: a line a message, each with who speaks."""
    return "\n".join(WORDS[language].roles[m["role"]] + m["content"] for m in messages)


class _FittedRow(RowDimension):
    """A row whose height is a program's own to change: where openpyxl's are fixed, a sorted text would be cut."""

    customHeight = None


def judging_workbook(rows: Sequence[tuple[str, ...]], language: str) -> Workbook:
    """A worksheet to be judged and one of instructions.

    Args:
        rows: of each pair the conversation and the replies A and B as people read them, then the cells of `HIDDEN`.
        language: one of `WORDS`.
    """
    words = WORDS[language]
    book = Workbook()
    sheet = book.active
    sheet.title = words.titles[0]
    last = len(rows) + 1
    to_fill = f"D2:D{last}"
    sheet.append([words.conversation, *VISIBLE, VERDICT, f'="{words.left}"&COUNTBLANK({to_fill})', *HIDDEN])
    for number, texts in enumerate(rows, start=2):
        for column, text in zip((1, 2, 3, 6, 7, 8), texts, strict=True):
            cell = sheet.cell(number, column, text)
            # A reply that begins with "=" is text, not a formula, also once someone has clicked into it.
            cell.data_type, cell.number_format = "s", "@"
            cell.alignment = Alignment(wrap_text=column <= 3, vertical="top")
        sheet.cell(number, 4).alignment = Alignment(vertical="top")
        for cell in sheet[number][:4]:
            cell.border = RULE  # the yellow hides the program's own lines
    widths = [_width([texts[place] for texts in rows]) for place in range(3)]
    for number, texts in enumerate(rows, start=2):  # Excel would fit the heights itself, LibreOffice does not
        lines = max(_lines(text, width) for text, width in zip(texts[:3], widths, strict=True))
        sheet.row_dimensions[number] = _FittedRow(sheet, number, ht=_height(lines))
    for letter, width in zip("ABCDE", (*widths, 18, 18), strict=True):
        sheet.column_dimensions[letter].width = width
    for letter in "FGH":
        sheet.column_dimensions[letter].hidden = True
    for cell in sheet[1]:
        cell.font, cell.fill = BOLD, PatternFill("solid", fgColor="E7E6E6")
    sheet.freeze_panes = "A2"
    sheet.auto_filter.ref = f"A1:H{last}"  # so that sorting moves the hidden columns too
    sheet.sheet_view.showRowColHeaders = False  # a program's own column B would be the one under the heading A
    yellow = PatternFill(bgColor="FFF2CC", fill_type="solid")
    sheet.conditional_formatting.add(to_fill, FormulaRule(formula=["ISBLANK(D2)"], fill=yellow, border=RULE))
    choices = DataValidation(type="list", formula1=f'"{",".join(words.verdicts.values())}"', allow_blank=True)
    choices.showErrorMessage, choices.errorTitle, choices.error = True, VERDICT, words.choose
    sheet.add_data_validation(choices)
    choices.add(to_fill)
    page = book.create_sheet(words.titles[1])
    page.column_dimensions["A"].width = 100
    page.sheet_view.showGridLines = False
    for number, line in enumerate(words.instructions, start=1):
        page.cell(number, 1, line).alignment = Alignment(wrap_text=True, vertical="top")
        page.row_dimensions[number] = _FittedRow(page, number, ht=_height(_lines(line, 100)))
    page["A1"].font = BOLD
    return book


def _width(texts: Sequence[str]) -> int:
    """The least width at which every text fits into the tallest row, else the greatest."""
    return next((w for w in WIDTHS if all(_lines(text, w) <= LINES for text in texts)), WIDTHS[-1])


def _lines(text: str, width: int) -> int:
    """How many lines a cell of a width in characters wraps a text into: about, and rather more."""
    # In digits a Chinese character is two wide, a Latin letter some 0.85; two are lost to where a line may break.
    wide = [sum(2 if unicodedata.east_asian_width(c) in "WF" else 0.85 for c in line) for line in text.split("\n")]
    return sum(max(1, math.ceil(digits / (width - 2))) for digits in wide)


def _height(lines: int) -> int:
    return min(lines * LINE + 4, TALLEST)


def escaped(text: str) -> str:
    """A text as a workbook's XML spells it: without what XML cannot hold, and what looks like an escape escaped."""
    return SPELT_ESCAPE.sub("_x005F_", ILLEGAL_CHARACTERS.sub("", text))


def cell_text(text: str) -> str:
    """Text for a cell, never empty."""
    text = escaped(text)[: CELL - 1]  # a full one is taken for one that was cut
    return "(no text)" if is_blank(text) else text


def plain_text(cell: Any) -> str:
    """A cell's text as it is known again, whatever program stored it and however it was read.

    Excel ends lines with \\n, some of its like with \\r\\n, and XML cannot tell a lone \\r from \\n. Readers differ in
    how often they take an escape of an escape back: here all are.
    """
    text = str(cell)
    while (shorter := unescape(text)) != text:
        text = shorter
    return re.sub(r"\r\n?", "\n", text).strip()
