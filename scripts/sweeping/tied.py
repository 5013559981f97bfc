"""Runs a Python program that ends when the process that started it ends, by SIGKILL too.

    python scripts/sweeping/tied.py FD PROGRAM [ARGUMENT...]

FD is the reading end of a pipe that only the starting process can write to. The kernel
closes that process's end however it ends, and a thread here that waits for it kills the
process group. This works on Linux and macOS.
"""

import os
import runpy
import signal
import sys
import threading


def _end_with_the_starter(pipe):
    os.read(pipe, 1)  # nothing is ever written: this returns when the pipe is closed
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    watcher = threading.Thread(target=_end_with_the_starter, args=(int(sys.argv[1]),), daemon=True)
    watcher.start()
    sys.argv = sys.argv[2:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
