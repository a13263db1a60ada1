"""What a resumed run must have as it began: written into each checkpoint, and compared.

Rates, and when is logged, evaluated and saved, may change: they count from where the run goes on.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from datasets import Dataset
from transformers import TrainingArguments

from h2s.errors import InputError, in_short

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
    kept = {name: getattr(args, name) for name in SETTINGS}
    kept["data_seed"] = args.seed if args.data_seed is None else args.data_seed
    kept["metric_for_best_model"] = str(args.metric_for_best_model).removeprefix("eval_")
    return kept


def rows_in_short(dataset: Dataset, columns: Sequence[str]) -> str:
    """A data set by its number of rows and a hash of these columns."""
    return f"{len(dataset)} rows ({short_hash([list(dataset[column]) for column in columns])})"


def short_hash(values: Any) -> str:
    """Of what JSON takes, and of what has a text of its own, such as a date."""
    return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()[:8]


def write_began_with(folder: Path, began_with: dict[str, Any]) -> None:
    """Write it into a checkpoint."""
    (folder / BEGAN_WITH).write_text(json.dumps(began_with, ensure_ascii=False), encoding="utf-8")


def check_began_with(folder: Path, now: dict[str, Any]) -> None:
    """Compare a checkpoint with the run that is to go on from it.

    Raises:
        InputError: something differs that must not.
    """
    try:
        then = dict(json.loads((folder / BEGAN_WITH).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{folder / BEGAN_WITH} is damaged ({in_short(error)}): it cannot be resumed") from error
    for name, value in json.loads(json.dumps(now)).items():
        if then.get(name) != value:
            was, now_is = (shorten(str(v), 200, placeholder=" …") for v in (then.get(name), value))
            raise InputError(
                f"{name} was {was} when the run of {folder} began, now it is {now_is}: go on with the former"
            )
