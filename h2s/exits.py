"""How a recipe's run ends: in one line and with an exit code.

0 done, 1 a fault of the run or the machine, 2 bad input, 130 Ctrl-C, 143 SIGTERM.
"""

import functools
import os
import signal
import sys
import time
from collections.abc import Callable

from torch import distributed

from h2s.errors import InputError, RunError, Terminated
from h2s.run_folder import claimed, logger

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
