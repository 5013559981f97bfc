"""SIGINT and SIGTERM: when they raise, and when they wait.

Between `hold` and `release` a signal is only recorded, and `check`, which is
called between training steps, raises it: a checkpoint must not be torn in the
middle of a step. At any other time a signal raises at once.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


class Terminated(BaseException):
    """SIGTERM has arrived."""


EXCEPTIONS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
_held = False
_pending: int | None = None  # the first signal that arrived


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Handles the two signals within the context. A second SIGINT ends the process at once.

    Python runs its handlers only between two bytecodes, and a long operation of
    TensorFlow is within one. So a thread watches for the second SIGINT, through the
    pipe that the interpreter's own C handler writes to.
    """
    global _held, _pending
    _held, _pending = False, None
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can handle signals
        return
    # A signal that is ignored stays ignored: shells start background jobs this way.
    signals = [signum for signum in EXCEPTIONS if signal.getsignal(signum) is not signal.SIG_IGN]
    before = {signum: signal.signal(signum, _on_signal) for signum in signals}
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    wakeup_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_end_at_second_sigint, args=(reading,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup_before)
        os.close(writing)  # ends the thread
        for signum, handler in before.items():
            signal.signal(signum, handler)


def hold() -> None:
    """Makes signals wait from now on."""
    global _held
    _held = True


def release() -> None:
    """Makes signals raise again, and raises the one that has arrived."""
    global _held
    _held = False
    check()


def pending() -> bool:
    """Returns whether a signal has arrived."""
    return _pending is not None


def check() -> None:
    """Raises the signal that has arrived, if one has."""
    if _pending is not None:
        raise EXCEPTIONS[signal.Signals(_pending)]


def _on_signal(signum, frame):
    global _pending
    _pending = _pending or signum
    if not _held:
        raise EXCEPTIONS[signum]


def _end_at_second_sigint(reading):
    arrived = 0
    with open(reading, "rb", buffering=0) as pipe:
        while received := pipe.read(64):
            arrived += received.count(signal.SIGINT)
            if arrived > 1:
                os._exit(128 + signal.SIGINT)
