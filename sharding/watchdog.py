"""Ends a process that makes no progress: one that hangs in Python or in a collective still sends heartbeats."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from types import TracebackType

from sharding.processes import is_first, whole_number

STEP_TIMEOUT = "MINDJAX_STEP_TIMEOUT"
STATUS = 124  # as timeout(1)
# Without process 0 all others abort: one of them is the one that hangs, and is to say where.
LAST_WORDS_SECONDS = 2.0


class Watchdog:
    """A context manager that ends the process, status 124, when no step has finished for a while.

    It says so, with the stack of every thread. What comes before the first step (compiling, reading) is not watched.

    Args:
      seconds: longer than the slowest step, with the evaluation or checkpoint after it; 0 watches nothing; None is
        `MINDJAX_STEP_TIMEOUT`, or 0.
    """

    def __init__(self, seconds: int | None = None):
        self._seconds = whole_number(STEP_TIMEOUT, os.environ, 0) if seconds is None else seconds
        self._steps, self._closed = threading.Event(), False

    def beat(self) -> None:
        """A step has finished."""
        self._steps.set()

    def __enter__(self) -> Watchdog:
        if self._seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._closed = True
        self._steps.set()

    def _watch(self) -> None:
        self._steps.wait()
        while not self._closed:
            self._steps.clear()
            if not self._steps.wait(self._seconds) and not self._closed:
                print(
                    f"mindjax: no step has finished for {self._seconds} s: this process, or one that it waits for, "
                    f"hangs; it ends here, and the same command goes on from the last checkpoint. {STEP_TIMEOUT} sets "
                    "how long a step may take. Where its threads are:",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(sys.stderr)
                if is_first():
                    time.sleep(LAST_WORDS_SECONDS)
                os._exit(STATUS)
