"""The two kinds of failure that end a run with one line instead of a traceback."""


class UsageError(Exception):
    """Wrong use or bad input: exit code 2, raised before anything is written.

    The message is one line: the rule, what was received, and what to do.
    """


class RunError(Exception):
    """A failure while running, unreachable weights or data included: exit code 1."""
