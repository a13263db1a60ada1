"""A run: its folder `<output_dir>/<run_name>/`, its log, and how it ends, in one line and with an exit code.

0 done, 1 a fault of the run or the machine, 2 bad input, 130 Ctrl-C, 143 SIGTERM.
"""

import functools
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import distributed

from h2s.errors import InputError, RunError, Terminated
from h2s.run.recipe import split_mismatch

logger = logging.getLogger("h2s")


LOG_FILE = "train.log"


claimed: list[Path] = []  # the folder of this process's run


def create_run_folder(output_dir: str, run_name: str | None, resume: bool = False, dataset: Any = None) -> Path:
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
    return split_mismatch(folder / "recipe.yaml", dataset) if dataset is not None else None


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


# A launcher passes on what a scheduler has sent to every process: two signals within these seconds are one.
ONE_SIGNAL = 5


class _StopRequest:
    """Whether a SIGTERM came while a training loop can still save; outside of one it ends the process at once."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.came_at: float | None = None
        self.can_wait = False

    def __call__(self, number, frame) -> None:
        if self.came_at is None:
            self.came_at = time.monotonic()
        elif time.monotonic() - self.came_at > ONE_SIGNAL:
            raise Terminated
        if not self.can_wait:
            raise Terminated


stop_request = _StopRequest()


def say(line: str, everyone: bool = False) -> None:
    """One line on stderr and in the log; from the first process alone, unless it is this process's own affair."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 or everyone:
        print(line if rank == 0 else f"process {rank}: {line}", file=sys.stderr, flush=True)
        logger.info(line, extra={"file_only": True})


def reports_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate a recipe's `main`: whatever ends it is told in one line with an exit code.

    A fault's traceback goes to `train.log`; before there is a run's folder it is left to Python.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> None:
        claimed.clear()
        stop_request.reset()
        previous = signal.signal(signal.SIGTERM, stop_request)
        try:
            main(*args, **kwargs)
            if distributed.is_initialized():
                # Left to the interpreter's end, gloo's threads may want its lock when it is gone: an abort, at random.
                # Not after a fault: with NCCL it could wait for processes that are in a collective.
                distributed.destroy_process_group()
        except InputError as error:
            say(f"error: {_one_line(error)}")
            sys.exit(2)
        except KeyboardInterrupt:
            say(f"interrupted by Ctrl-C; {_how_to_go_on()}")
            sys.exit(130)
        except Terminated:
            say(f"ended by SIGTERM; {_how_to_go_on()}")
            sys.exit(143)
        except Exception as error:
            if not claimed:
                raise
            logger.debug("", exc_info=True, extra={"file_only": True})
            alike = isinstance(error, RunError)
            name = "" if alike else f"{type(error).__name__}: "
            say(f"error: {name}{_one_line(error)}; {_how_to_go_on()}", everyone=not alike)
            sys.exit(1)
        finally:
            signal.signal(signal.SIGTERM, previous)

    return wrapped


def _one_line(error: BaseException) -> str:
    """Without what a terminal would obey: a message may quote a file."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(error).split()))


def _how_to_go_on() -> str:
    """What is safe, and the flags that go on from it."""
    if not claimed:
        return "nothing was written"
    folder = claimed[0]
    flags = f"--output_dir {folder.parent} --run_name {folder.name} --resume_from_checkpoint true"
    saved = [f.name for f in folder.glob("checkpoint-*")]
    newest = max(saved, key=lambda name: int(name.rsplit("-", 1)[1])) if saved else "no checkpoint yet"
    best = ", the best adapter at its root" if (folder / "adapter_model.safetensors").is_file() else ""
    return f"{folder} holds {newest}{best}: the same command with {flags} goes on"
