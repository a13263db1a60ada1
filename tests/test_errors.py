import pytest

from h2s import InputError
from h2s.errors import PushError, RunError, Terminated, in_short


def test_whose_fault_it_is():
    """Bad input is a ValueError, as a user of the API expects; no `except Exception` swallows the end of a run."""
    assert issubclass(InputError, ValueError)
    assert issubclass(RunError, RuntimeError) and not issubclass(RunError, ValueError)
    assert issubclass(PushError, RunError)
    assert not issubclass(Terminated, Exception)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\n  two\tthree"), "one two three"),
        (KeyError(), "KeyError"),
        (OSError("x" * 1000), "x" * 300),
    ],
)
def test_in_short(error, line):
    assert in_short(error) == line
