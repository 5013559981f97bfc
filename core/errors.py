"""The two kinds of failure that end a run with one line instead of a traceback."""


class UsageError(Exception):
    """Wrong use or bad input: exit code 2, raised before anything is written.

    The message is one line: the rule, what was received, and what to do.
    """


class RunError(Exception):
    """A failure while running, unreachable weights or data included: exit code 1."""


def one_line(error: BaseException, longest: int = 300) -> str:
    """Returns the message of an error as one line of at most about `longest` characters, or its type's name."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= longest else text[:longest] + "..."
