"""What a terminal shows of a run: bars that leave nothing behind, lines above them, libraries that load in silence."""

import io
import logging
import sys
import time
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

T = TypeVar("T")

# What libraries warn of though a run can do nothing about it, and nothing is wrong.
NOISE = [
    # PEFT 0.21 asks models for it by its old name.
    (".*is_gradient_checkpointing.*", FutureWarning),
    # PEFT looks at every save whether the base model has got more tokens; without network it cannot. None adds any.
    ("Could not find a config file in .* - will assume that the vocabulary was not modified", UserWarning),
    ("Unable to fetch remote file .* silently ignoring the lookup for the file config.json", UserWarning),
]
WEIGHTS_LOAD = 5  # seconds after which a bar says so
BAR = {"leave": False, "delay": 1}
EVERY = 30  # seconds between the lines of a log file, which a bar that is drawn over and over would fill


def any_letter() -> None:
    """From here on a letter that the terminal's encoding lacks is printed as its escape, and read as none: no error."""
    for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stdin, "surrogateescape")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def printable(text: str) -> str:
    """Text without what a terminal would obey: control characters but tabs and line ends are escaped."""
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) == "Cc" and c not in "\t\n" else c for c in text)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Leave out what libraries say of their own working, each by its name. `TRANSFORMERS_VERBOSITY` is obeyed."""

    def later(bar, args, kwargs):
        return bar(*args, **{"delay": WEIGHTS_LOAD, "leave": False, "disable": None} | kwargs)

    previous = transformers_logging.set_tqdm_hook(later)
    try:
        with warnings.catch_warnings():
            for message, category in NOISE:
                warnings.filterwarnings("ignore", message, category)
            yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


def progress_bar(steps: Sequence[T], label: str | None, shown: bool = True) -> Iterator[T]:
    """Steps with a bar that vanishes at their end; in a log file a line every half minute, with the time left."""
    if label is None or not shown or sys.stderr.isatty():
        yield from tqdm(steps, desc=label, disable=label is None or not shown, **BAR)
        return
    began = said = time.monotonic()
    for done, step in enumerate(steps, start=1):
        yield step
        now = time.monotonic()
        if now - said >= EVERY and done < len(steps):
            left = tqdm.format_interval((now - began) / done * (len(steps) - done))
            print(f"{label}: {done} of {len(steps)}, {left} left", file=sys.stderr, flush=True)
            said = now


def above_bars() -> AbstractContextManager:
    """What is printed in it stands on lines of its own, above the bars that are drawn."""
    return tqdm.external_write_mode() if sys.stderr.isatty() else nullcontext()


class TerminalHandler(logging.StreamHandler):
    """Log lines above the bars."""

    def emit(self, record: logging.LogRecord) -> None:
        """One record."""
        with above_bars():
            super().emit(record)
