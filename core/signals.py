"""SIGINT and SIGTERM: where they break in, and where they have to wait.

Between `hold` and `release` a signal is only noted, and `check`, called between
training steps, raises it: a state that is to be saved must not be torn in the
middle of a step. Anywhere else it raises at once, as the exception that stands
for it.
"""

import contextlib
import os
import signal
import threading


class Terminated(BaseException):
    """SIGTERM arrived."""


EXCEPTIONS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
_held = False
_pending = None  # the first signal that came


@contextlib.contextmanager
def handled():
    """Lets the two signals raise, or wait, while the context lasts. A second SIGINT ends the process at once.

    Python runs its handlers between two bytecodes only, and a long operation of
    TensorFlow is within one. So the second SIGINT is seen by a thread, through the
    pipe into which the system's own handler writes.
    """
    global _held, _pending
    _held, _pending = False, None
    if threading.current_thread() is not threading.main_thread():
        yield  # whoever runs us here handles signals
        return
    # What is ignored stays ignored: so a shell starts its background jobs.
    signals = [signum for signum in EXCEPTIONS if signal.getsignal(signum) is not signal.SIG_IGN]
    before = {signum: signal.signal(signum, _arrived) for signum in signals}
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    wakeup_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_end_at_second_sigint, args=(reading,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup_before)
        os.close(writing)  # which ends the thread
        for signum, handler in before.items():
            signal.signal(signum, handler)


def hold():
    """Lets signals wait from here on."""
    global _held
    _held = True


def release():
    """Lets signals raise again, and raises the one that waits."""
    global _held
    _held = False
    check()


def pending():
    """Says whether a signal has arrived."""
    return _pending is not None


def check():
    """Raises the signal that has arrived, if one has."""
    if pending():
        raise EXCEPTIONS[_pending]


def _arrived(signum, frame):
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
