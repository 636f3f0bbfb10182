"""Judges what no time bound holds for, mathematics and foreign patterns, in a process that can be killed.

`math-verify` compares with SymPy, which a hostile answer keeps busy for ever, or makes take all memory, inside C code
that no exception reaches; and its own timeout works on a main thread alone. So it runs in a child: bounded in seconds
of processor time, which do not depend on what else the machine does, and in memory; killed past that, and replaced.

The child is this file, started by its path: it imports neither this package nor JAX.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from typing import Any

MAX_EXPRESSION = 2_000  # characters; longer ones are refused, as no answer is a page of mathematics
WALL = 4  # by the clock, so many times the processor time: a busy machine is no reason to call an answer wrong
START_SECONDS = 120.0  # until the child has loaded SymPy, on a machine that does much else
_REMEMBERED = 4096  # verdicts; the answers of a group repeat each other


class Worker:
    """Starts its process with the first question, and another one after each that had to be killed.

    A question costs at most `timeout` seconds of processor time and `WALL` times that by the clock, and then the answer
    is no. The start of a process, 1 to 2 s, comes once on top; it does not count as the question's time. Questions
    of several threads are asked one after the other.
    """

    def __init__(self, timeout: float = 3.0, memory: int = 1 << 30) -> None:
        """
        Args:
          timeout: seconds of processor time for one question.
          memory: bytes of address space the process may take.
        """
        if timeout <= 0:
            raise ValueError(f"worker: timeout is {timeout} seconds, it has to be positive")
        self.timeout, self.memory = timeout, memory
        self.counts: Counter[str] = Counter()
        self._process: subprocess.Popen[str] | None = None
        self._ready = False
        self._lock = threading.Lock()
        self._remembered = functools.lru_cache(_REMEMBERED)(self._ask)  # an exception, hence a kill, is not kept

    @property
    def pid(self) -> int | None:
        """Of the process, None while there is none."""
        return self._process.pid if self._process else None

    def maths(self, gold: str, said: str) -> bool:
        """Whether what was said equals the right answer; both LaTeX, or a text with LaTeX between dollars."""
        if len(said) > MAX_EXPRESSION:
            self.counts["too_long"] += 1
            return False
        return self._answer("maths", gold, said)

    def matches(self, pattern: str, text: str) -> bool:
        """Whether the regular expression matches all of the text; a dot matches line ends too."""
        return self._answer("matches", pattern, text)

    def close(self) -> None:
        """Ends the process; a later question starts another."""
        with self._lock:
            self._kill()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _answer(self, *question: str) -> bool:
        with self._lock:
            try:
                return self._remembered(*question)
            except TimeoutError:
                self.counts["timeouts"] += 1
            except ChildProcessError:
                self.counts["failures"] += 1
            # Starts while the caller goes on: the next question should not wait for it.
            self._kill()
            self._start()
            return False

    def _ask(self, *question: str) -> bool:
        """
        Raises:
          TimeoutError: it took too long.
          ChildProcessError: the process ended, or ran out of memory or stack.
          RuntimeError: the process does not start.
        """
        for last in (False, True):
            process = self._process or self._start()
            if not self._ready:
                started = self._exchange(process, "", START_SECONDS)
                if started != {"ready": True}:
                    self._kill()
                    raise RuntimeError(f"the process that judges mathematics does not start: {started}")
                self._ready = True
            try:
                answer = self._exchange(process, json.dumps(question) + "\n", WALL * self.timeout)
            except ChildProcessError:
                # Somebody else killed it, perhaps while it idled: the question is not to blame, and has one more try.
                if last or process.returncode != -signal.SIGKILL:
                    raise
                self._kill()
                continue
            if "error" in answer:
                raise ChildProcessError(answer["error"])
            return answer["right"]
        raise AssertionError("unreachable")

    def _start(self) -> subprocess.Popen[str]:
        self._process = subprocess.Popen(
            # -P: the modules beside this file are not modules of that process.
            [sys.executable, "-P", __file__, str(self.timeout), str(self.memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="ascii",
        )
        return self._process

    def _exchange(self, process: subprocess.Popen[str], question: str, seconds: float) -> dict[str, Any]:
        """Writes a line, if any, and reads the next one; `seconds` are by the clock."""
        assert process.stdin is not None and process.stdout is not None
        late = threading.Event()

        def kill() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, kill)
        timer.start()
        line = ""
        try:
            process.stdin.write(question)
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            pass  # it has ended; how, is looked at below
        finally:
            timer.cancel()
        if line.endswith("\n"):
            return json.loads(line)
        if process.wait() == -signal.SIGPROF or late.is_set():
            raise TimeoutError
        raise ChildProcessError(f"it ended with {process.returncode}")

    def _kill(self) -> None:
        process, self._process, self._ready = self._process, None, False
        if process is not None:
            process.kill()
            process.communicate()  # closes the pipes and waits


def main(timeout: float, memory: int) -> None:
    """The child: one JSON line in, [question, ...] , and one out, {"right": ...} or {"error": ...}."""
    import resource

    # What a library prints must not look like an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    questions = {"maths": _maths, "matches": _matches}
    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        print(json.dumps({"missing": f"{error}; pip install math-verify"}), file=answers, flush=True)
        return
    # No file is written from here on; what was imported has been compiled.
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        # Its signal ends the process, whatever it is in the middle of, and whether or not its parent still lives.
        signal.setitimer(signal.ITIMER_PROF, timeout)
        answer: dict[str, Any]
        try:
            answer = {"right": questions[name](*arguments)}
        except Exception as error:
            answer = {"error": type(error).__name__}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), file=answers, flush=True)


def _matches(pattern: str, text: str) -> bool:
    import re

    return re.fullmatch(pattern, text, re.DOTALL) is not None


def _maths(gold: str, said: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify

    # LaTeX alone: its other way to read picks a number out of any sentence. Its timeouts are off, as here is one.
    right, given = (
        parse(
            text if any(mark in text for mark in ("$", "\\(", "\\[")) else f"${text}$",
            [LatexExtractionConfig()],
            parsing_timeout=None,
            raise_on_error=True,
        )
        for text in (gold, said)
    )
    return bool(verify(right, given, timeout_seconds=None, raise_on_error=True))


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
