"""Where numbers of a run go: `metrics.jsonl`, TensorBoard, and one live line."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TextIO

LOG_SECONDS = 10.0  # between lines in a file or pipe
TTY_SECONDS = 0.2  # between refreshes in a terminal


class WriteError(ValueError):
    """The numbers of a run cannot be written; the message says where and what to do."""


class MetricsWriter:
    """Appends one record per step to `<workdir>/metrics.jsonl` and to TensorBoard event files.

    Args:
      workdir: created if missing.
      step: the step that the run resumes from. Records past it belong to steps that will be repeated, and a killed
        process may have left half a line; both are removed.

    Raises:
      WriteError: by every method, where the disk is full or the folder cannot be written.
    """

    def __init__(self, workdir: str | Path, step: int = 0):
        # Imported here: it takes a second, and `import mindjax` must not.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import Summary, scalar

        self._event, self._summary, self._scalar = Event, Summary, scalar
        self._path = path = Path(workdir) / "metrics.jsonl"
        kept = [record for record in read_metrics(workdir) if record["step"] <= step]
        with self._advice():
            prefix = path.parent / "tensorboard" / "events"
            prefix.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(".jsonl.draft")
            draft.write_text("".join(json.dumps(record) + "\n" for record in kept))
            os.replace(draft, path)
            self._file = path.open("a")
            # Written by this thread: tensorboardX's own would die on a full disk, and a run wait for it for ever.
            self._tensorboard = EventsWriter(str(prefix), f".{os.getpid()}.{step}")
            # Hides what an earlier process wrote of steps that come again.
            start = SessionLog(status=SessionLog.START)
            self._tensorboard.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds a record; `step` counts finished updates, from 1."""
        with self._advice():
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            scalars = [self._scalar(name, value).value[0] for name, value in values.items()]
            summary = self._summary(value=scalars)
            self._tensorboard.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
            self._tensorboard.flush()

    def sync(self) -> None:
        """Returns once everything is on disk: a checkpoint must never be newer than its metrics."""
        with self._advice():
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with self._advice(), closing(self._tensorboard), closing(self._file):
            self.sync()

    @contextmanager
    def _advice(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise WriteError(
                f"{error.filename or self._path} could not be written: {error.strerror}. Make room on the disk, or the "
                "folder writable, and run the same command to go on from the last checkpoint"
            ) from error


def read_metrics(workdir: str | Path) -> list[dict[str, float]]:
    """The records of `<workdir>/metrics.jsonl`; a half-written last line is left out."""
    path = Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    records = []
    for number, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number != len(lines) - 1:
                raise ValueError(f"{path}, line {number + 1}, is not JSON: {line[:80]!r}") from None
    return records


class Progress:
    """One line that tells step, loss, speed and time left: rewritten in a terminal, repeated now and then in a log.

    Args:
      name: of the run, first in the line.
      step, total: finished steps, and all.
      stream: None means standard error.
    """

    def __init__(self, name: str, step: int, total: int, stream: TextIO | None = None):
        self._name, self._total = name, total
        self._stream = stream if stream is not None else sys.stderr
        self._tty = self._stream.isatty()
        self._shown = 0.0
        self._start: tuple[float, int] | None = None
        self._tokens = 0

    def update(self, step: int, values: dict[str, float], tokens: int) -> None:
        """Reports a finished step; `tokens` are those of this step."""
        now = time.monotonic()
        if self._start is None:
            # The first step compiles; speed counts from its end.
            self._start = (now, step)
        else:
            self._tokens += tokens
        if now - self._shown < (TTY_SECONDS if self._tty else LOG_SECONDS) and step < self._total:
            return
        self._shown = now
        line = f"{self._name} {step}/{self._total}  " + "  ".join(f"{k} {v:.4g}" for k, v in values.items())
        elapsed, done = now - self._start[0], step - self._start[1]
        if done and elapsed > 0:
            left = (self._total - step) * elapsed / done
            line += f"  {self._tokens / elapsed:,.0f} tokens/s  {_clock(left)} left"
        self._print(line)

    def close(self) -> None:
        if self._tty and self._shown:
            self._stream.write("\n")
            self._stream.flush()

    def _print(self, line: str) -> None:
        if self._tty:
            width = shutil.get_terminal_size().columns
            self._stream.write("\r\x1b[K" + line[: width - 1])
        else:
            self._stream.write(line + "\n")
        self._stream.flush()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
