"""What training did to a prefix: the replies that changed most, by both prompts, and how far each layer moved."""

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor

from h2s.data.messages import Messages
from h2s.prefix.adapter import hard_prefix, soft_prefix

WHAT_CHANGED = "what_changed.md"
EXAMPLES = 12


def layer_movement(model: PeftModel) -> pd.DataFrame:
    """How far keys and values of each layer moved from the hard prompt's.

    Where the model is sharded every process calls it, to gather the prefix.

    Returns:
        A row a layer: `keys` and `values`, the norm of the difference over the norm at the start (0 is unmoved).
    """
    start, now = (_keys_and_values(model, weight) for weight in (hard_prefix(model), soft_prefix(model)))
    moved = (now - start).norm(dim=(0, 3)) / start.norm(dim=(0, 3)).clamp(min=1e-12)  # (layers, 2)
    return pd.DataFrame(moved.tolist(), columns=["keys", "values"])


def _keys_and_values(model: PeftModel, weight: torch.Tensor) -> torch.Tensor:
    """PEFT's rows hold key then value, layer by layer: (P, layers * 2 * H) -> (P, layers, 2, H), float32."""
    layers = model.active_peft_config.num_layers
    weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
    return weight.detach().float().reshape(weight.shape[0], layers, 2, -1)


def write_what_changed(table: pd.DataFrame, moved: pd.DataFrame, scores: Sequence[str], folder: Path) -> Path:
    """Write `what_changed.md` into a folder; returns its path."""
    path = folder / WHAT_CHANGED
    path.write_text(what_changed(table, moved, scores), encoding="utf-8")
    return path


def what_changed(table: pd.DataFrame, moved: pd.DataFrame, scores: Sequence[str]) -> str:
    """The report as Markdown: the replies that changed most, side by side, then how far each layer `moved`.

    Most is by the judge, else by the first score, whichever way it changed; without scores by the soft reply's summed
    log-ratio to the hard prompt. What has no such number (a reply left out) comes last.
    """
    by, change = "the log-ratio to the hard prompt", table["kl"]
    if scores:
        name = "judge" if "judge" in scores else scores[0]
        by, change = f"the {name}, gains and losses alike", (table[f"soft_{name}"] - table[f"hard_{name}"]).abs()
    most = table.loc[change.sort_values(ascending=False, kind="stable").index[:EXAMPLES]]
    lines = [
        "# What changed",
        "",
        f"The replies that changed most by {by}, the largest change first: {len(most)} of {len(table)} contexts. Both "
        "prompts answer from the same random state; nothing here was trained on or chosen by.",
        "",
    ]
    for row in most.to_dict("records"):
        lines += [_quoted(row["prompt"]), ""]
        for side in ("hard", "soft"):
            said = [f"{name} {_in_short(row[f'{side}_{name}'])}" for name in scores]
            said += [] if row[f"{side}_finished"] else ["not finished"]
            about = f" ({', '.join(said)})" if said else ""
            lines.append(f"- {side}{about}: {_in_one_line(row[side])}")
        lines.append("")
    lines += ["How far the prefix moved, relative to its own size:", "", "| layer | keys | values |", "|---|---|---|"]
    lines += [f"| {m.Index} | {m.keys:.4f} | {m.values:.4f} |" for m in moved.itertuples()]
    return "\n".join(lines) + "\n"


def _quoted(prompt: Messages) -> str:
    return "\n>\n".join(f"> {m['role']}: {_in_one_line(m['content'])}" for m in prompt)


def _in_short(score: float) -> str:
    return "left out" if math.isnan(score) else f"{score:+.2f}"


def _in_one_line(text: str) -> str:
    return " ".join(text.split()) or "(no text)"
