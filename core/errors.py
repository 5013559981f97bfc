"""The two kinds of failure that end a run with one line instead of a traceback."""


class UsageError(Exception):
    """Wrong use or bad input: exit code 2, found before anything is written.

    The message names the rule, what was received, and what to do about it, in
    one line.
    """


class RunError(Exception):
    """A failure while running, unreachable weights or data included: exit code 1."""
