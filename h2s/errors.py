"""What can go wrong in ways that a person is told in one line."""


def in_short(error: BaseException) -> str:
    """An error's message in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


class InputError(ValueError):
    """What the user gave cannot be used. The message says what was expected, what came, and the remedy.

    ```python
    try:
        contexts = load_contexts("contexts.json")
    except InputError as error:  # contexts.json, row 7, context: the last message must be the user's, …
        print(error)
    ```
    """


class RunError(RuntimeError):
    """A run cannot go on, through no fault of its input's form. Every process raises it; it says what happened."""


class PushError(RunError):
    """The Hub did not take an adapter. Nothing of the run is lost by it; the message says what the Hub said."""


class Terminated(BaseException):
    """A SIGTERM came, and what could be saved is saved."""
