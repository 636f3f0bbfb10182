"""Steps whose loss or gradient is not finite, or far above its recent median: what counts as one, and what is kept."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

NO_LIMITS = (float("inf"), float("inf"))
FOLDER, LOG = "spikes", "spikes.jsonl"
_Seen = tuple[int, float, float, bool]  # step, loss, gradient norm, whether it was good


@dataclass(frozen=True)
class SpikeConfig:
    """What becomes of a bad step: one whose loss or gradient is not finite, or above its limit.

    The update of a bad step is never applied; the compiled step sees to that.

    Attributes:
      policy: "stop" ends the run. "skip" leaves the update out and goes on. "rewind" goes back to the last checkpoint
        and on with the data after the bad step; what was trained on since the checkpoint is left out, for parameters
        that led to a spike may be worse than their loss shows (PaLM, arXiv:2204.02311, section 5.1).
      loss, grad_norm: a step is bad above this many times the median of good ones; 0 sets no limit.
      window: steps that the median is over; there is no limit before half as many good ones.
      allowed: bad steps among the last `window`; one more ends the run.
      keep_batches: how many bad batches stay in `<workdir>/spikes`, the latest.
    """

    policy: Literal["stop", "skip", "rewind"] = "stop"
    loss: float = 0.0
    grad_norm: float = 0.0
    window: int = 64
    allowed: int = 8
    keep_batches: int = 4

    def __post_init__(self) -> None:
        if self.policy not in ("stop", "skip", "rewind"):
            raise ValueError(f"spikes.policy is {self.policy!r}; it can be 'stop', 'skip' or 'rewind'")
        for name in ("loss", "grad_norm"):
            if getattr(self, name) and not getattr(self, name) > 1:
                raise ValueError(
                    f"spikes.{name} is {getattr(self, name)}, a multiple of the median: about half of all steps would "
                    "count as spikes; give more than 1 (3 to 10 is usual), or 0 for no limit"
                )
        if self.window < 4 or self.allowed < 1 or self.keep_batches < 0:
            raise ValueError("spikes: window must be at least 4, allowed at least 1, keep_batches not negative")


class SpikeWatch:
    """Remembers recent steps, sets the limits of the next ones, and keeps a log of the bad ones.

    `<workdir>/spikes.jsonl` has a record for each bad step: `left_out`, first and last of the steps whose data is not
    in the parameters, and `groups`, the same in the loader's stream, from 0. All other data is, each group once.

    Args:
      config: see `SpikeConfig`.
      workdir: of the run.
      step: that the run resumes from; records past it belong to steps that will be repeated, and are removed.
      recent: what `recent` was when that step was saved.
    """

    def __init__(self, config: SpikeConfig, workdir: str | Path, step: int = 0, recent: Iterable[Any] = ()):
        self._config, self._workdir = config, Path(workdir)
        # One step more than the window, as limits come from the steps before the last one.
        self._recent: deque[_Seen] = deque(map(tuple, recent), maxlen=config.window + 1)
        kept = [record for record in read_spikes(workdir) if record["step"] <= step]
        if (self._workdir / LOG).exists() and jax.process_index() == 0:
            draft = self._workdir / f"{LOG}.draft"
            draft.write_text("".join(json.dumps(record) + "\n" for record in kept))
            os.replace(draft, self._workdir / LOG)

    @property
    def recent(self) -> list[_Seen]:
        """JSON-able, for a checkpoint."""
        return [*self._recent]

    def limits(self, step: int) -> tuple[float, float]:
        """Loss and gradient norm above which a step is bad.

        They come from the steps up to the one before the last: the metrics of the last are not known yet while it
        runs, and a resumed run must not know more than one that was left alone.
        """
        known = [seen for seen in self._recent if seen[3] and step - 2 - self._config.window < seen[0] <= step - 2]
        if len(known) < self._config.window // 2:
            return NO_LIMITS
        _, loss, norm, _ = (np.median(column) for column in zip(*known, strict=True))
        return _limit(self._config.loss, loss), _limit(self._config.grad_norm, norm)

    def add(self, step: int, values: Mapping[str, float]) -> bool:
        """Takes in the metrics of a step; returns whether it was good."""
        good = not values["skipped"]
        self._recent.append((step, values["loss"] if good else 0.0, values["grad_norm"] if good else 0.0, good))
        return good

    def too_many(self) -> bool:
        """Whether there are more bad steps among the recent ones than are allowed."""
        return sum(not good for *_, good in [*self._recent][-self._config.window :]) > self._config.allowed

    def keep(self, step: int, batch: Any, record: Mapping[str, Any]) -> None:
        """Writes a bad step into the log, and its batch beside it."""
        folder = self._workdir / FOLDER
        if self._config.keep_batches:
            save_batch(folder / f"step_{step}.npz", batch)
            if jax.process_index() == 0:
                numbers = sorted({int(path.stem.partition(".")[0][5:]) for path in folder.glob("step_*.npz")})
                for old in numbers[: -self._config.keep_batches]:
                    for path in folder.glob(f"step_{old}.*npz"):
                        path.unlink(missing_ok=True)
        if jax.process_index() == 0:
            with (self._workdir / LOG).open("a") as file:
                file.write(json.dumps({"step": step, **record}) + "\n")


def read_spikes(workdir: str | Path) -> list[dict[str, Any]]:
    """The records of `<workdir>/spikes.jsonl`; a half-written last line is left out."""
    path = Path(workdir) / LOG
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def describe(step: int, values: Mapping[str, float], limits: tuple[float, float], rate: float) -> str:
    """What was wrong with a step, as a clause."""
    numbers = ", ".join(f"{key} {value:.4g}" for key, value in values.items() if key != "skipped")
    numbers += f", learning rate {rate:.3g}"
    if not np.isfinite([values["loss"], values["grad_norm"]]).all():
        return f"step {step} is not finite ({numbers})"
    return f"step {step} is a spike ({numbers}; limits: loss {limits[0]:.4g}, grad_norm {limits[1]:.4g})"


def save_batch(path: Path, batch: Any) -> Path:
    """Writes the leaves of a batch, or this process's shards of them, and returns where.

    With several processes each writes a file of its own, `NAME.process_1.npz` beside `NAME.npz`.
    """
    if jax.process_index():
        path = path.with_suffix(f".process_{jax.process_index()}.npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(batch):
        name = jax.tree_util.keystr(keys, simple=True, separator="/")
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            arrays |= {f"{name}/{shard.index}": np.asarray(shard.data) for shard in leaf.addressable_shards}
        else:
            arrays[name] = np.asarray(leaf)
    np.savez(path, **arrays)
    return path


def _limit(multiple: float, median: float) -> float:
    return float(multiple * median) if multiple and median > 0 else float("inf")
