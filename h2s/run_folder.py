"""A run's folder `<output_dir>/<run_name>/`: claimed once, with a readable log."""

import logging
import sys
import time
import warnings
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from h2s.errors import InputError

logger = logging.getLogger("h2s")
LOG_FILE = "train.log"
claimed: list[Path] = []  # the folder of this process's run


def claim(output_dir: str, run_name: str | None, resume: bool = False) -> Path:
    """The run's folder, made by the first process; every process gets the same one.

    Raises:
        InputError: the folder exists and holds something, and the run does not resume it.
    """
    state = PartialState()
    name = [run_name or time.strftime("%Y%m%d-%H%M%S")]
    broadcast_object_list(name)
    folder = Path(output_dir) / name[0]
    taken = [folder.is_dir() and any(folder.iterdir()) and not resume]
    broadcast_object_list(taken)
    if taken[0]:
        raise InputError(f"{folder} exists: choose another run_name, or go on with --resume_from_checkpoint true")
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    state.wait_for_everyone()
    claimed[:] = [folder]
    return folder


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
    file = logging.FileHandler(folder / LOG_FILE, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger.addHandler(file)
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    terminal.setLevel(logging.INFO)
    terminal.addFilter(lambda record: not getattr(record, "file_only", False))
    logger.addHandler(terminal)
