"""Text files: encodings, delimiters, and quotes as different hands write them."""

import csv
import io

import pytest

from h2s.data.text_files import decode, read_csv
from h2s.errors import InputError

TRADITIONAL = "context,reply\n今天天氣如何？,還行，我去散步了。\n你最近睡得好嗎？,不太好，常常半夜醒來。\n" * 5
SIMPLIFIED = "context,reply\n今天天气怎么样？,还行，我去散步了。\n你最近睡得好吗？,不太好，常常半夜醒来。\n" * 5


def write(folder, content, encoding="utf-8"):
    path = folder / "table.csv"
    path.write_bytes(content.encode(encoding) if isinstance(content, str) else content)
    return str(path)


@pytest.mark.parametrize(
    ("text", "encoding", "told"),
    [
        (TRADITIONAL, "utf-8", False),
        (TRADITIONAL, "utf-8-sig", False),
        (TRADITIONAL, "utf-16", True),
        (TRADITIONAL, "utf-16-le", True),
        (TRADITIONAL, "big5", True),
        (SIMPLIFIED, "gbk", True),
        (SIMPLIFIED, "gb18030", True),
        ("context,reply\nCafé?,Très bien, déjà goûté à Zürich.\n" * 5, "cp1252", True),
        ("plain\nletters\n" * 9, "utf-16-le", True),  # valid UTF-8 with a NUL beside each letter
    ],
)
def test_encodings_are_found(tmp_path, caplog, text, encoding, told):
    assert decode(write(tmp_path, text, encoding)) == text
    assert any("read as" in said and "encoding overrides" in said for said in caplog.messages) == told


def test_a_given_encoding(tmp_path):
    path = write(tmp_path, TRADITIONAL, "big5")
    assert decode(path, "big5") == TRADITIONAL
    with pytest.raises(InputError, match=r"not in the encoding utf-8: .*invalid start byte"):
        decode(path, "utf-8")
    with pytest.raises(InputError, match="encoding 'big-five' is unknown"):
        decode(path, "big-five")


@pytest.mark.parametrize("delimiter", ",;\t")
@pytest.mark.parametrize("names", [["context", "id"], ["context"], ["note", "context", "more, of it"]])
def test_delimiters_are_found(tmp_path, delimiter, names):
    rows = [names, ['He said "so", and; went\taway', *names[1:]], ["a\nb", *names[1:]]]
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(rows)
    assert list(read_csv(write(tmp_path, text.getvalue()), "context").values()) == rows


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_records_are_counted_as_spreadsheets_count_rows(tmp_path, end):
    """A blank line is a row, a line break within quotes begins none."""
    text = end.join(["a,b", "1,2", "", '"x', 'y",3', "4,5"])
    assert read_csv(write(tmp_path, text), "a") == {
        1: ["a", "b"],
        2: ["1", "2"],
        3: [],
        4: [f"x{end}y", "3"],
        5: ["4", "5"],
    }


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        (r'"Press \"send\" now",x', ['Press "send" now', "x"]),
        (r"Press \"send\" now,x", ['Press "send" now', "x"]),
        (r'"[{\"role\": \"user\"}]",x', ['[{"role": "user"}]', "x"]),
        (r'"say ""hi\\""",x', ['say "hi\\\\"', "x"]),  # doubled, as it should be: a backslash is a backslash
        (r'"C:\",x', ["C:\\", "x"]),
        (r'"a ""b"", c",x', ['a "b", c', "x"]),
        ('"a", "b, c"', ["a", "b, c"]),
        (' "a", "b, c"', ["a", "b, c"]),
        ('"he said, ""no"", twice",x', ['he said, "no", twice', "x"]),
        ('"=""007""",x', ["007", "x"]),
        ('="007",x', ["007", "x"]),
        ('5" of snow,x', ['5" of snow', "x"]),
    ],
)
def test_quotes(tmp_path, line, fields):
    assert read_csv(write(tmp_path, f"p,q\n{line}\n"), "p")[2] == fields


@pytest.mark.parametrize("line", ['"a"b,x', '"never closed,x'])
def test_quotes_that_fit_nothing_are_named(tmp_path, line):
    with pytest.raises(InputError, match=r"row 3: .*: a quote within a text is written twice"):
        read_csv(write(tmp_path, f"p,q\n1,2\n{line}\n3,4\n"), "p")


def test_a_long_field(tmp_path):
    assert len(read_csv(write(tmp_path, f"p,q\n{'x' * 200_000},y\n"), "p")[2][0]) == 200_000


def test_backslashes_of_a_text_stay(tmp_path):
    """Where quotes are escaped by backslashes (MySQL, R) only these, line ends and backslashes are."""
    line = r'"[{\"content\": \"a\nb\"}]",regex \d C:\temp' + "\n" + r'"a \"q\" C:\\x",\N' + "\n"
    rows = read_csv(write(tmp_path, "p,q\n" + line), "p")
    assert rows[2] == ['[{"content": "a\\nb"}]', "regex \\d C:\\temp"]
    assert rows[3] == ['a "q" C:\\x', "\\N"]


def test_quotes_of_a_tab_separated_file(tmp_path):
    """Written without any quoting; or with it."""
    rows = [["context", "reply"], ["hi", '"hello'], ["ho", '"Yes," she said.'], ["hu", 'bye"']]
    text = "\n".join("\t".join(row) for row in rows)
    assert list(read_csv(write(tmp_path, text), "context").values()) == rows
    quoted = io.StringIO()
    csv.writer(quoted, delimiter="\t").writerows(rows)
    assert list(read_csv(write(tmp_path, quoted.getvalue()), "context").values()) == rows


def test_a_broken_character_is_named(tmp_path):
    data = "context\nhi 😀\nit’s\nho ".encode() + "😀".encode()[:-2] + "\nhe ’\n".encode()
    with pytest.raises(InputError, match="it is UTF-8, but line 4 holds a broken character"):
        decode(write(tmp_path, data))


@pytest.mark.parametrize(
    "text",
    [
        "It’s late, what now?",
        "I don’t know. You’re right.",
        "50°C is 122°F?",
        "Ça va ?",
        "naïve",
        "Price is 5£",
        "résumé",
    ],
)
def test_a_few_letters_are_no_chinese(tmp_path, text):
    assert decode(write(tmp_path, f"id,context\n1,{text}\n", "cp1252")) == f"id,context\n1,{text}\n"
