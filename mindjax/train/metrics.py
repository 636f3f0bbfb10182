"""Where numbers of a run go: `metrics.jsonl`, TensorBoard, and one live line."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TextIO

LOG_SECONDS = 10.0  # between lines in a file or pipe
TTY_SECONDS = 0.2  # between refreshes in a terminal


class MetricsWriter:
    """Appends one record per step to `<workdir>/metrics.jsonl` and to TensorBoard event files.

    Args:
      workdir: created if missing.
      step: the step that the run resumes from. Records past it belong to steps that will be repeated, and a killed
        process may have left half a line; both are removed.
    """

    def __init__(self, workdir: str | Path, step: int = 0):
        # Imported here: it takes a second, and `import mindjax` must not.
        from tensorboardX import SummaryWriter

        path = Path(workdir) / "metrics.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_metrics(workdir) if record["step"] <= step]
        draft = path.with_suffix(".jsonl.draft")
        draft.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(draft, path)
        self._file = path.open("a")
        self._tensorboard = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=step + 1, flush_secs=30)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds a record; `step` counts finished updates, from 1."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def sync(self) -> None:
        """Returns once everything is on disk: a checkpoint must never be newer than its metrics."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()
        self._tensorboard.close()


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
