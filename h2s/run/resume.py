"""What a resumed run must have as it began: written into each checkpoint, and compared.

Rates, limits and what is logged may change: they count from where the run goes on.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainingArguments

from h2s.errors import InputError

BEGAN_WITH = "began_with.json"
# Other batches would be learnt from twice or never; another metric cannot be compared with the best one so far.
SETTINGS = (
    "seed",
    "data_seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "dataloader_drop_last",
    "train_sampling_strategy",
    "metric_for_best_model",
    "greater_is_better",
)


def settings_to_keep(args: TrainingArguments) -> dict[str, Any]:
    """The settings that a resumed run must have."""
    return {name: getattr(args, name) for name in SETTINGS}


def rows_in_short(dataset: Dataset | None, columns: Sequence[str]) -> str | None:
    """A data set by its number of rows and a hash of these columns."""
    if dataset is None:
        return None
    text = json.dumps([list(dataset[column]) for column in columns])
    return f"{len(dataset)} rows ({hashlib.sha256(text.encode()).hexdigest()[:8]})"


def write_began_with(folder: Path, began_with: dict[str, Any]) -> None:
    """Write it into a checkpoint."""
    (folder / BEGAN_WITH).write_text(json.dumps(began_with, ensure_ascii=False), encoding="utf-8")


def check_began_with(folder: Path, now: dict[str, Any]) -> None:
    """Compare a checkpoint with the run that is to go on from it.

    Raises:
        InputError: something differs that must not.
    """
    then = json.loads((folder / BEGAN_WITH).read_text(encoding="utf-8"))
    for name, value in json.loads(json.dumps(now)).items():
        if then.get(name) != value:
            raise InputError(
                f"{name} was {then.get(name)} when the run of {folder} began, now it is {value}: go on with the former"
            )
