import json
import math

import numpy as np
import openpyxl
import pandas as pd
import pytest
import torch
from conftest import sample_context
from datasets import Dataset

from h2s.contexts import conversation_id
from h2s.evaluation import (
    KEY,
    SHEET,
    add_scores,
    answer_both,
    interval_text,
    mean_interval,
    report,
    summarise,
    write_blinded_sheet,
)
from h2s.preferences import COLUMNS, load_preferences
from h2s.prefix import hard_prompt_active, soft_prefix
from h2s.rollout import Sampling, generate

# Intervals


def test_interval_of_a_sample_is_that_of_theory():
    """Clusters of one row are the ordinary bootstrap: near the mean's standard error times 1.96."""
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    mean, low, high = mean_interval(values, [str(i) for i in range(400)])
    error = values.std() / math.sqrt(400)
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)


def test_interval_equals_scipys_bootstrap():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(2).exponential(1.0, 40)
    _, low, high = mean_interval(values, [str(i) for i in range(40)], resamples=20_000)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_whole_conversations_are_drawn():
    """Rows that repeat their conversation's value add nothing: the interval is that of the conversations."""
    values = np.random.default_rng(3).normal(size=30)
    clusters = [str(i) for i in range(30)]
    once = mean_interval(values, clusters)
    repeated = mean_interval(np.repeat(values, 10), np.repeat(clusters, 10))
    assert repeated == pytest.approx(once)
    as_if_independent = mean_interval(np.repeat(values, 10), list(range(300)))
    assert as_if_independent[2] - as_if_independent[1] < 0.5 * (once[2] - once[1])


def test_interval_of_two_conversations_by_hand():
    """(0 0 0) and (4): a draw holds the first twice, the second twice, or both; the mean weighs rows, so 1 of 4."""
    mean, low, high = mean_interval([0, 0, 0, 4], ["a", "a", "a", "b"])
    assert (mean, low, high) == (1, 0, 4)
    # A single draw holds both half of the time.
    draws = [mean_interval([0, 0, 0, 4], ["a", "a", "a", "b"], resamples=1, seed=s)[1] for s in range(400)]
    assert set(draws) == {0, 1, 4}
    assert draws.count(1) / 400 == pytest.approx(0.5, abs=0.08)


def test_interval_of_one_conversation_is_its_mean():
    assert mean_interval([1, 2, 6], ["a"] * 3) == (3, 3, 3)


def test_interval_is_the_same_each_time():
    values, clusters = np.random.default_rng(4).normal(size=20), [str(i // 2) for i in range(20)]
    assert mean_interval(values, clusters) == mean_interval(values, clusters)
    assert mean_interval(values, clusters, seed=1) != mean_interval(values, clusters)


def test_interval_text():
    assert interval_text([1, 2, 6], ["a"] * 3) == "3.000 [3.000, 3.000], n=3 (1 conversations)"


# The comparison in numbers


@pytest.fixture
def table():
    """Four contexts of two conversations. Differences 2, -1, 0, 3: mean 1; a's 0.5, b's 1.5."""
    return pd.DataFrame(
        {
            "conversation": ["a", "a", "b", "b"],
            "prompt": [sample_context(i) for i in range(4)],
            "soft": ["s0", "s1", "s2", "s3"],
            "hard": ["h0", "h1", "h2", "h3"],
            "soft_reward": [3.0, 0.0, 1.0, 4.0],
            "hard_reward": [1.0, 1.0, 1.0, 1.0],
            "soft_tokens": [4, 6, 8, 10],
            "hard_tokens": [2, 2, 4, 4],
            "soft_finished": [True, True, True, False],
            "hard_finished": [True, False, False, True],
            "kl": [0.5, 1.5, 2.0, 0.0],
        }
    )


def test_summarise_by_hand(table):
    assert summarise(table) == {
        "soft_reward": 2.0,
        "hard_reward": 1.0,
        "reward_difference": 1.0,
        "reward_difference_low": 0.5,
        "reward_difference_high": 1.5,
        "reward_win": 0.5,
        "reward_tie": 0.25,
        "kl": 1.0,
        "soft_tokens": 7.0,
        "hard_tokens": 3.0,
        "soft_unfinished": 0.25,
        "hard_unfinished": 0.5,
        "contexts": 4.0,
    }


def test_report_by_hand(table):
    lines = report(table, ["reward"]).splitlines()
    assert lines == [
        "| | soft | hard | soft minus hard (95% interval) |",
        "|---|---|---|---|",
        "| reward | 2.000 | 1.000 | +1.000 [+0.500, +1.500] |",
        "| reward: wins of 4 | 2 | 1 | 1 ties |",
        "| tokens | 7.000 | 3.000 | +4.000 [+3.000, +5.000] |",
        "| unfinished | 0.250 | 0.500 | -0.250 [-0.500, +0.000] |",
        "| KL to the hard prompt, nats a reply | 1.000 [1.000, 1.000], n=4 (2 conversations) | 0 | |",
        "",
        "n = 4 contexts of 2 conversations.",
    ]


def test_report_without_a_reward(table):
    lines = report(table.drop(columns=["soft_reward", "hard_reward"]), []).splitlines()
    assert not any("reward" in line for line in lines) and lines[2].startswith("| tokens |")


def test_add_scores(table):
    asked = []

    def reward(prompts, completions):
        asked.append((prompts, completions))
        return [10 * len(p) + int(c[1]) for p, c in zip(prompts, completions, strict=True)]

    add_scores(table, "judge", reward)
    prompts = [sample_context(i) for i in range(4)]
    assert asked == [(prompts, ["s0", "s1", "s2", "s3"]), (prompts, ["h0", "h1", "h2", "h3"])]
    assert table["soft_judge"].tolist() == [30, 11, 12, 33] == table["hard_judge"].tolist()


# Replies


@pytest.fixture
def rows(prompts):
    contexts = [sample_context(i) for i in range(6)]
    ids = [conversation_id(c) for c in contexts]
    return Dataset.from_dict({"prompt": contexts, "prompt_ids": prompts, "conversation": ids})


def answer(policy_parts, rows, temperature=1.0, batch_size=4, seed=7):
    model, tokenizer, _ = policy_parts
    return answer_both(model, tokenizer, rows, Sampling(8, temperature), batch_size, seed, progress=False)


def move(model):
    with torch.no_grad():
        noise = torch.randn(soft_prefix(model).shape, generator=torch.Generator().manual_seed(0))
        soft_prefix(model).add_(2 * noise)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_at_the_start_soft_is_hard(policy_parts, rows, temperature):
    table = answer(policy_parts, rows, temperature)
    assert table["soft"].tolist() == table["hard"].tolist()
    assert table["soft_tokens"].tolist() == table["hard_tokens"].tolist()
    assert table["kl"].abs().max() < 1e-4
    assert table["prompt"].tolist() == rows["prompt"] and table["conversation"].tolist() == rows["conversation"]
    if temperature:
        assert table["soft"].nunique() > 3


def test_same_seed_gives_the_same_hard_completions(policy_parts, rows):
    """However far the soft prefix has moved meanwhile."""
    before = answer(policy_parts, rows)
    move(policy_parts[0])
    after = answer(policy_parts, rows)
    assert after["hard"].tolist() == before["hard"].tolist()
    assert after["soft"].tolist() != before["soft"].tolist()
    assert after["kl"].mean() > 0.1
    assert answer(policy_parts, rows, seed=8)["hard"].tolist() != before["hard"].tolist()


def test_replies_and_kl_are_those_of_the_two_prompts(policy_parts, rows, prompts):
    """By another path: `generate` at the same seed, and PEFT's own forward, row by row."""
    model, tokenizer, _ = policy_parts
    move(model)
    table = answer(policy_parts, rows, batch_size=6)
    torch.manual_seed(7)
    soft = generate(model, prompts, Sampling(8), [1, 5], 0)

    def logps(prompt, completion):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0].double().log_softmax(-1)
        return logits[len(prompt) - 1 : -1].gather(-1, torch.tensor(completion)[:, None]).sum().item()

    for i, (prompt, completion) in enumerate(zip(prompts, soft, strict=True)):
        ended = completion[-1] in (1, 5)
        assert table["soft_tokens"][i] == len(completion) and table["soft_finished"][i] == ended
        body = completion[:-1] if ended else completion
        assert table["soft"][i] == tokenizer.decode(body, skip_special_tokens=True).strip()
        under_soft = logps(prompt, completion)
        with hard_prompt_active(model):
            kl = under_soft - logps(prompt, completion)
        assert table["kl"][i] == pytest.approx(kl, abs=1e-3)


def test_random_state_outside_is_left_alone(policy_parts, rows):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    answer(policy_parts, rows)
    assert torch.equal(torch.get_rng_state(), before)
    assert policy_parts[0].active_adapter == "default"
    assert soft_prefix(policy_parts[0]).requires_grad


# The blinded sheet

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
    import zipfile

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
    """Not in its cells, its formats, its properties: only in the key."""
    write_blinded_sheet(replies, tmp_path, seed=3)
    book = openpyxl.load_workbook(tmp_path / SHEET)
    assert len(book.worksheets) == 1
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
    preferences = load_preferences(str(tmp_path / "filled.xlsx"))
    kept = [i for i in range(len(replies)) if i not in (4, 5)]
    assert preferences.counts[2] == preferences.counts[3] == 1
    assert preferences.dataset["chosen"] == [replies["soft"][i] for i in kept]
    assert preferences.dataset["rejected"] == [replies["hard"][i] for i in kept]
    assert preferences.dataset["prompt"] == [replies["prompt"][i] for i in kept]
    assert preferences.dataset["row"] == [i + 2 for i in kept]
