"""Runs a Python program that dies when whoever started it dies, of SIGKILL too.

    python scripts/tied.py FD PROGRAM [ARGUMENT...]

FD is the reading end of a pipe that only the starter can write to. The kernel
closes the starter's end whatever it dies of, and a thread here that waits for
just that kills the process group. Pipes do this on Linux and macOS alike.
"""

import os
import runpy
import signal
import sys
import threading


def _die_with_the_starter(pipe):
    os.read(pipe, 1)  # nobody ever writes: this returns at the end of the pipe
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    watcher = threading.Thread(target=_die_with_the_starter, args=(int(sys.argv[1]),), daemon=True)
    watcher.start()
    sys.argv = sys.argv[2:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
