"""How far a prefix may go from its hard prompt, as a setting or an argument."""

from numbers import Real
from typing import Any

from h2s.errors import InputError

# Past 1 the direction of training is extrapolated, and nothing says that it stays good for long.
LARGEST_STRENGTH = 1.5


def check_strength(value: Any) -> None:
    """Check how far a prefix is to go from its hard prompt, at 0, toward where training brought it, at 1.

    Raises:
        InputError: it is no number from 0 to 1.5.
    """
    if not (isinstance(value, Real) and 0 <= float(value) <= LARGEST_STRENGTH):  # NaN is not
        expected = f"a number from 0, the hard prompt, to {LARGEST_STRENGTH} (1 is the trained prefix)"
        raise InputError(f"a strength must be {expected}, got {value!r}")


def read_strengths(value: list[float] | str) -> list[float]:
    """Strengths that are listed, or stand in a text with commas between them.

    Raises:
        InputError: one is none, or stands there twice.
    """
    try:
        strengths = [float(number) for number in (value.split(",") if isinstance(value, str) else value)]
    except ValueError:
        raise InputError(f"strengths must be numbers with commas between them (0.5,1,1.5), got {value!r}") from None
    for strength in strengths:
        check_strength(strength)
    if not strengths:
        raise InputError("strengths are none: leave them out, or give some (0.5,1,1.5)")
    if len(set(strengths)) < len(strengths):
        raise InputError(f"strengths must be given once each, got {value!r}")
    return strengths
