"""A run's folder `<output_dir>/<run_name>/`: claimed once, with a readable log."""

import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from h2s.errors import InputError
from h2s.recipe import other_split

logger = logging.getLogger("h2s")
LOG_FILE = "train.log"
claimed: list[Path] = []  # the folder of this process's run


def claim(output_dir: str, run_name: str | None, resume: bool = False, dataset: Any = None) -> Path:
    """The run's folder, made by the first process; every process gets the same one.

    Args:
        output_dir: folder of the runs' folders.
        run_name: its name there; a timestamp by default.
        resume: whether one that exists is gone on with.
        dataset: the recipe's section `dataset`; one that is gone on with has to have begun with the same split.

    Raises:
        InputError: the folder cannot be made, or it exists and holds something and the run does not resume it, or
            it began with another split (what it learnt from would be reported on).
    """
    state = PartialState()
    name = [run_name or time.strftime("%Y%m%d-%H%M%S")]
    broadcast_object_list(name)
    folder = Path(output_dir) / name[0]
    problem = [_make(folder, resume, dataset) if state.is_main_process else None]
    broadcast_object_list(problem)
    if problem[0] is not None:
        raise InputError(problem[0])
    claimed[:] = [folder]
    return folder


def _make(folder: Path, resume: bool, dataset: Any) -> str | None:
    """Make it; what stands in the way, if something does."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = any(folder.iterdir()) and not resume
    except OSError as error:
        return f"the run's folder cannot be made ({error}): choose another output_dir"
    if not os.access(folder, os.W_OK):
        return f"{folder} cannot be written to: choose another output_dir"
    if taken:
        return f"{folder} exists: choose another run_name, or go on with --resume_from_checkpoint true"
    return other_split(folder / "recipe.yaml", dataset) if dataset is not None else None


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Quiet: a full disk is told of in one line, by what cannot do without it."""


def start_log(folder: Path) -> None:
    """From here on, what `logger` says goes to `train.log` and to the terminal, from the first process alone."""
    # TRL 1.16 asks models for it by its old name at every generation.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = False
    if not PartialState().is_main_process:
        logger.addHandler(logging.NullHandler())
        return
    logger.setLevel(logging.DEBUG)
    file = _LogFile(folder / LOG_FILE, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger.addHandler(file)
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    terminal.setLevel(logging.INFO)
    terminal.addFilter(lambda record: not getattr(record, "file_only", False))
    logger.addHandler(terminal)
