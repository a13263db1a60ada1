"""A recipe's run: its folder `<output_dir>/<run_name>/`, its log, and how it ends, in one line and with an exit code.

0 done, 1 a fault of the run or the machine, 2 bad input, 130 Ctrl-C, 143 SIGTERM.
"""

import functools
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from h2s.errors import InputError, PushError, RunError, Terminated
from h2s.run.recipe import RECIPE_FILE, resume_mismatch, write_recipe
from h2s.run.terminal import TerminalHandler, above_bars, any_letter, quiet_libraries

if TYPE_CHECKING:
    from transformers import TrainerCallback

# Of the whole package: what any module logs goes to a run's log.
logger = logging.getLogger("h2s")

LOG_FILE = "train.log"
WHERE_TO_PUSH = ("hub_model_id", "hub_private_repo", "hub_revision")
# A launcher passes on what a scheduler has sent to every process: two signals within these seconds are one.
ONE_SIGNAL = 5
# Seconds that another process than the first waits before it ends by the same refusal.
FIRST_SPEAKS = 5


class StopRequest:
    """A SIGTERM that came while a training loop can still save; outside of one it ends the process at once."""

    def __init__(self) -> None:
        self.came_at: float | None = None
        self.can_wait = False

    def __call__(self, number, frame) -> None:
        """Python's signal handler."""
        if self.came_at is None:
            self.came_at = time.monotonic()
        elif time.monotonic() - self.came_at > ONE_SIGNAL:
            raise Terminated
        if not self.can_wait:
            raise Terminated


class Run:
    """What a recipe's run owns, from its first check to its exit code.

    Attributes:
        folder: where its files go; None until `start`.
        can_resume: whether its recipe has checkpoints to go on from.
        stop: whether it was asked to stop.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.can_resume = False
        self.stop = StopRequest()
        self.pushed: list[str] = []  # subfolders whose adapters go to the Hub; "" is the folder itself
        # What is said of files before there is a folder: it goes to the log once there is.
        self.early = MemoryHandler(sys.maxsize, flushLevel=sys.maxsize)

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the run's files; no other does."""
        from accelerate import PartialState

        return PartialState().is_main_process

    def start(self, model: Any, dataset: Any, task: Any, resume: bool | None = None, **defaults: Any) -> Path:
        """Make the run's folder, the same for every process, begin its log and save its recipe.

        Args:
            model: the recipe's section `model`.
            dataset: the recipe's section `dataset`.
            task: the recipe's section `task`, with `output_dir` and `run_name` (a timestamp by default).
            resume: whether a run that exists is resumed, with the same model and split; None where a recipe has no
                checkpoints.
            **defaults: those that the recipe was parsed with.

        Raises:
            InputError: the folder cannot be made, or it exists and holds something and the run does not resume it, or
                it began with another model or split (what it learnt from would be reported on).
        """
        import torch
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list

        # Without `cpu` Accelerate takes each of several CPU processes for the only one; trainers' arguments say it too.
        PartialState(cpu=not torch.cuda.is_available())
        name = [task.run_name or time.strftime("%Y%m%d-%H%M%S")]
        broadcast_object_list(name)
        folder = Path(task.output_dir) / name[0]
        problem = [_make(folder, resume, model, dataset) if self.is_main_process else None]
        broadcast_object_list(problem)
        if problem[0] is not None:
            raise InputError(problem[0])
        self.folder, self.can_resume = folder, resume is not None
        self._start_log(folder)
        if self.is_main_process:
            write_recipe(folder / RECIPE_FILE, model, dataset, task, **defaults)
        return folder

    def check_push(self, task: Any, base: str, *subfolders: str) -> None:
        """Check before anything loads what a push at the end would fail on, if `task` asks for one.

        Args:
            task: the recipe's section `task`.
            base: the base model's folder or Hub name.
            *subfolders: of the run's folder, each with an adapter that goes to `<repository>-<subfolder>`.

        Raises:
            InputError: as `h2s.hub.check_push`.
        """
        if task.push_to_hub:
            from h2s.hub import check_push

            self.pushed = ["", *subfolders]
            check_push(task, base, task.run_name, [part and f"-{part}" for part in self.pushed])
        elif idle := [name for name in WHERE_TO_PUSH if getattr(task, name) is not None]:
            raise InputError(f"{' and '.join(idle)} would have no effect without push_to_hub: true")

    def push(self, task: Any) -> None:
        """Push what `check_push` was told of, now that all is saved and reported.

        Raises:
            PushError: the Hub does not take it.
        """
        from h2s.hub import push_folders

        assert self.folder is not None
        name = task.hub_model_id or self.folder.name
        push_folders({self.folder / part: f"{name}-{part}" if part else name for part in self.pushed}, task)

    def callbacks(self) -> "list[TrainerCallback]":
        """What a trainer does for its run: a readable log, and a checkpoint before it stops."""
        from h2s.run.callbacks import ReadableLog, StopOnSigterm

        return [ReadableLog(), StopOnSigterm(self.stop)]

    def _start_log(self, folder: Path) -> None:
        """From here on, what `logger` says goes to `train.log` and to the terminal, from the first process alone."""
        logger.propagate = False
        logger.removeHandler(self.early)
        if not self.is_main_process:
            logger.addHandler(logging.NullHandler())
            return
        logger.setLevel(logging.DEBUG)
        file = _LogFile(folder / LOG_FILE, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(file)
        terminal = TerminalHandler(sys.stdout)
        terminal.setFormatter(logging.Formatter("%(message)s"))
        terminal.setLevel(logging.INFO)
        terminal.addFilter(lambda record: not getattr(record, "file_only", False))
        logger.addHandler(terminal)
        for record in self.early.buffer:
            logger.handle(record)

    def close(self) -> None:
        """End the log."""
        logger.propagate = True
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()

    def say(self, line: str, everyone: bool = False) -> None:
        """One line on stderr and in the log; from the first process alone, unless it is this process's own affair."""
        rank = int(os.environ.get("RANK", "0"))
        if rank == 0 or everyone:
            with above_bars():
                print(line if rank == 0 else f"process {rank}: {line}", file=sys.stderr, flush=True)
            logger.info(line, extra={"file_only": True})

    def how_to_go_on(self) -> str:
        """What is safe, and the flags that go on from it."""
        if self.folder is None:
            return "nothing was written"
        if not self.can_resume:
            return f"{self.folder} is unfinished: the same command with another run_name starts over"
        where = ["--output_dir", str(self.folder.parent), "--run_name", self.folder.name]
        flags = shlex.join([*where, "--resume_from_checkpoint", "true"])
        saved = [f.name for f in self.folder.glob("checkpoint-*")]
        newest = max(saved, key=lambda name: int(name.rsplit("-", 1)[1])) if saved else "no checkpoint yet"
        kept = ", the kept adapter at its root" if (self.folder / "adapter_model.safetensors").is_file() else ""
        return f"{self.folder} holds {newest}{kept}: the same command with {flags} goes on"


def run_recipe(main: Callable[[Run, list[str] | None], None]) -> Callable[..., None]:
    """Decorate a recipe's `main(run, argv)`: whatever ends it is told in one line with an exit code.

    A fault's traceback goes to `train.log`; before there is a run's folder it is left to Python.
    """

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> None:
        run = Run()
        logger.setLevel(logging.DEBUG)
        logger.addHandler(run.early)
        previous = signal.signal(signal.SIGTERM, run.stop)
        any_letter()
        try:
            with quiet_libraries():
                main(run, argv)
            if run.folder is None:  # there was no log for it
                for record in list(run.early.buffer):
                    if record.levelno >= logging.WARNING:
                        run.say(record.getMessage())
            distributed = sys.modules.get("torch.distributed")
            if distributed is not None and distributed.is_initialized():
                # Left to the interpreter's end, gloo's threads may want its lock when it is gone: an abort, at random.
                # Not after a fault: with NCCL it could wait for processes that are in a collective.
                distributed.destroy_process_group()
        except InputError as error:
            run.say(f"error: {_one_line(error)}")
            if int(os.environ.get("RANK", "0")) > 0:
                # A launcher ends all processes when one has ended: the first must have said what is wrong.
                signal.signal(signal.SIGTERM, previous)
                time.sleep(FIRST_SPEAKS)
            sys.exit(2)
        except KeyboardInterrupt:
            if sys.stderr.isatty():
                print(file=sys.stderr)  # the terminal has written ^C
            run.say(f"interrupted by Ctrl-C; {run.how_to_go_on()}")
            sys.exit(130)
        except Terminated:
            run.say(f"ended by SIGTERM; {run.how_to_go_on()}")
            sys.exit(143)
        except PushError as error:  # it is the last that a run does, and says how to repeat it
            logger.debug("", exc_info=True, extra={"file_only": True})
            run.say(f"error: {_one_line(error)}")
            sys.exit(1)
        except Exception as error:
            if run.folder is None:
                raise
            logger.debug("", exc_info=True, extra={"file_only": True})
            alike = isinstance(error, RunError)
            name = "" if alike else f"{type(error).__name__}: "
            run.say(f"error: {name}{_one_line(error)}; {run.how_to_go_on()}", everyone=not alike)
            sys.exit(1)
        finally:
            signal.signal(signal.SIGTERM, previous)
            run.close()

    return wrapped


def _one_line(error: BaseException) -> str:
    """Without what a terminal would obey: a message may quote a file."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(str(error).split()))


def _make(folder: Path, resume: bool | None, model: Any, dataset: Any) -> str | None:
    """Make it; what stands in the way, if something does."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = any(folder.iterdir()) and not resume
    except OSError as error:
        return f"the run's folder cannot be made ({error}): choose another output_dir"
    if not os.access(folder, os.W_OK):
        return f"{folder} cannot be written to: choose another output_dir"
    if taken:
        or_resume = "" if resume is None else ", or go on with --resume_from_checkpoint true"
        return f"{folder} exists: choose another run_name{or_resume}"
    return resume_mismatch(folder / RECIPE_FILE, model, dataset) if resume else None


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Quiet: a full disk is told of in one line, by what cannot do without it."""
