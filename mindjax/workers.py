"""Independent jobs in several processes, each on a core of its own."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from mindjax.train.loop import Interrupted, stop_signals

Job = tuple[str, int]  # a kind, whose jobs share what is compiled, and a number


def side_by_side(jobs: Sequence[Job], start: Callable[[], Callable[[Job], None]], workers: int) -> Iterator[Job]:
    """Does the jobs in processes of their own and yields each when it is done.

    A worker goes on with the kind that it has done last while there are jobs of it.

    Args:
      jobs: none depends on another.
      start: called once in each process, gives what does a job there; it has to be picklable.
      workers: how many processes, at most.

    Raises:
      Interrupted: after Ctrl-C or SIGTERM, which every worker gets as SIGTERM and acts on first.
      RuntimeError: a job failed, or its process died.
    """
    context = multiprocessing.get_context("spawn")
    workers = min(workers, len(jobs))
    left, last = list(jobs), dict.fromkeys(range(workers), ("", 0))
    pipes: dict[Any, int] = {}
    processes = []
    with stop_signals() as stop:
        try:
            for number in range(workers):
                ours, theirs = context.Pipe()
                processes.append(context.Process(target=_work, args=(start, number, os.getpid(), theirs)))
                processes[-1].start()
                theirs.close()
                pipes[ours] = number
            while pipes and not stop.is_set():
                for pipe in wait(list(pipes), timeout=0.5):
                    assert isinstance(pipe, Connection)
                    number = pipes[pipe]
                    try:
                        done, error = pipe.recv()
                    except EOFError:
                        raise RuntimeError(f"the process of {last[number]} died") from None
                    if error:
                        raise RuntimeError(f"{last[number]} failed:\n{error}")
                    if done:
                        yield done
                    if left:
                        kind, others = last[number][0], {kind for n, (kind, _) in last.items() if n != number}
                        last[number] = max(left, key=lambda job: (job[0] == kind, job[0] not in others))
                        left.remove(last[number])
                        pipe.send(last[number])
                    else:
                        pipe.send(None)
                        del pipes[pipe]
        finally:
            if pipes:  # not all are through
                for process in processes:
                    process.terminate()
            for process in processes:
                process.join()
        if stop.is_set():
            raise Interrupted("stopped; run the same command to go on")


def _work(start: Callable[[], Callable[[Job], None]], number: int, parent: int, pipe: Connection) -> None:
    """Does jobs from the pipe until None comes; sends (None, "") when ready, (job, "") or (None, error) after one."""
    os.setpgrp()  # Ctrl-C in a terminal is for the parent, which passes it on
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[number % len(cores)]})
    job: Job | None
    try:
        do = start()
        pipe.send((None, ""))
        while (job := pipe.recv()) is not None:
            do(job)
            pipe.send((job, ""))
    except Interrupted:
        pass
    except Exception:
        pipe.send((None, traceback.format_exc()))


def _follow(parent: int) -> None:
    """Ends this process once its parent is gone: two must never do one job."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
