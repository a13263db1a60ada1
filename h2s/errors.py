"""Bad input has one class and one way out: one clear line on stderr and exit code 2."""

import functools
import os
import sys
from collections.abc import Callable


class InputError(ValueError):
    """What the user gave cannot be used. The message says what was expected, what came, and the remedy."""


def exits_on_bad_input(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate a recipe's `main`: an [`InputError`] becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> None:
        try:
            main(*args, **kwargs)
        except InputError as error:
            if os.environ.get("RANK", "0") == "0":  # one line, however many processes
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
            sys.exit(2)

    return wrapped
