import math

import pandas as pd
import pytest
import torch
from tiny import sample_context

from h2s.prefix.adapter import soft_prefix
from h2s.report.what_changed import EXAMPLES, layer_movement, what_changed, write_what_changed

LAYERS, WIDTH = 4, 2 * 8  # of the tiny Gemma: key-value heads times their size


def cached(model):
    """What the model is given: each layer's keys and values as PEFT hands them over."""
    with torch.no_grad():
        cache = model.get_prompt(batch_size=1)
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


def relative(before, after):
    return [
        [((a - b).norm() / b.norm()).item() for b, a in zip(*pair, strict=True)]
        for pair in zip(before, after, strict=True)
    ]


def test_nothing_has_moved_at_the_start(policy):
    moved = layer_movement(policy.model)
    assert moved.shape == (LAYERS, 2) and list(moved.columns) == ["keys", "values"]
    assert moved.to_numpy().max() == 0


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("part", ["keys", "values"])
def test_one_layers_part_moved_by_hand(policy, layer, part):
    """Half as much again is a movement of 0.5, and the cache shows that it was that part of that layer."""
    model = policy.model
    before = cached(model)
    at = (2 * layer + (part == "values")) * WIDTH
    with torch.no_grad():
        soft_prefix(model)[:, at : at + WIDTH] *= 1.5
    expected = [[0.0, 0.0] for _ in range(LAYERS)]
    expected[layer][part == "values"] = 0.5
    assert torch.tensor(relative(before, cached(model))) == pytest.approx(torch.tensor(expected), abs=1e-5)
    assert layer_movement(model).to_numpy() == pytest.approx(torch.tensor(expected).numpy(), abs=1e-5)


def test_movement_equals_that_of_the_cache(policy):
    """All parts moved at once, each in its own way, back along the hard prompt too."""
    model = policy.model
    before = cached(model)
    with torch.no_grad():
        noise = torch.randn(soft_prefix(model).shape, generator=torch.Generator().manual_seed(0))
        soft_prefix(model).add_(noise * torch.linspace(0, 2, noise.shape[1]))
    moved = relative(before, cached(model))
    assert layer_movement(model).to_numpy() == pytest.approx(torch.tensor(moved).numpy(), rel=1e-4)
    assert len({round(m, 4) for pair in moved for m in pair}) == 2 * LAYERS


@pytest.fixture
def table():
    rows = range(EXAMPLES + 3)
    return pd.DataFrame(
        {
            "prompt": [sample_context(i) for i in rows],
            "soft": [f"soft\n\n{i}  words" for i in rows],
            "hard": [f"hard {i}" if i else " \n" for i in rows],
            "soft_finished": [i not in (1, 14) for i in rows],
            "kl": [float(i) for i in rows],
            "hard_finished": True,
            "soft_reward": [i + 0.126 for i in rows],
            "hard_reward": -1.0,
            "soft_judge": 0.5,
            "hard_judge": [math.nan if i == 2 else 0.0 for i in rows],
        }
    )


def test_report_shows_both_replies_of_the_contexts_that_changed_most(table, policy):
    model = policy.model
    with torch.no_grad():
        soft_prefix(model)[:, WIDTH : 2 * WIDTH] *= 1.25
    # By the judge: the last, up or down the same, then the others by how far; of the third there is no telling.
    table["soft_judge"] = [0.5, *(0.01 * i for i in range(1, EXAMPLES + 2)), -2.0]
    lines = what_changed(table, layer_movement(model), ["reward", "judge"]).splitlines()
    assert lines[:4] == [
        "# What changed",
        "",
        "The replies that changed most by the judge, gains and losses alike, the largest change first: 12 of 15 "
        "contexts. Both prompts answer from the same random state; nothing here was trained on or chosen by.",
        "",
    ]
    shown = [int(line.rsplit(" ", 2)[1]) for line in lines if line.startswith("- soft")]
    assert shown == [14, 0, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4]
    at = lines.index("> user: walk number 0")
    assert lines[at : at + 9] == [
        "> user: walk number 0",
        ">",
        "> assistant: what did you do?",
        ">",
        "> user: I ran.",
        "",
        "- hard (reward -1.00, judge +0.00): (no text)",
        "- soft (reward +0.13, judge +0.50): soft 0 words",
        "",
    ]
    assert "- soft (reward +14.13, judge -2.00, not finished): soft 14 words" in lines
    assert sum("not finished" in line for line in lines) == 1
    for side in ("soft", "hard"):
        assert sum(line.startswith(f"- {side} (") for line in lines) == EXAMPLES
    assert lines[-6:] == ["| layer | keys | values |", "|---|---|---|", "| 0 | 0.0000 | 0.2500 |"] + [
        f"| {i} | 0.0000 | 0.0000 |" for i in (1, 2, 3)
    ]


def test_without_a_judge_the_reward_says_what_changed_most(table, policy):
    """What it left out comes last, and is still shown where there is room."""
    few = table.head(4).drop(columns=["soft_judge", "hard_judge"])
    few.loc[3, "hard_reward"] = math.nan
    lines = what_changed(few, layer_movement(policy.model), ["reward"]).splitlines()
    assert lines[2].startswith("The replies that changed most by the reward, gains and losses alike, the largest")
    assert [line[-7] for line in lines if line.startswith("- soft")] == ["2", "1", "0", "3"]
    assert "- hard (reward left out): hard 3" in lines


def test_report_without_scores(table, policy, tmp_path):
    moved = layer_movement(policy.model)
    path = write_what_changed(table, moved, [], tmp_path)
    text = path.read_text(encoding="utf-8")
    assert path == tmp_path / "what_changed.md" and text == what_changed(table, moved, [])
    assert "- soft (): soft" not in text and "most by the log-ratio to the hard prompt, the largest" in text
    shown = [line for line in text.splitlines() if line.startswith("- soft")]
    assert shown[:2] == ["- soft (not finished): soft 14 words", "- soft: soft 13 words"] and len(shown) == EXAMPLES
