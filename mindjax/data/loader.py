"""From samples to batches: rendering once, and a loader whose whole state is one step number."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from mindjax.data.packing import Plan, SampleSize
from mindjax.data.processor import Processor
from mindjax.data.render import Rendered, render
from mindjax.types import Sample

Rows = Sequence[Sequence[int]]


class RenderedSamples(Sequence[Rendered]):
    """Samples rendered on demand; the recently used ones are kept, for small data sets come round often.

    Args:
      samples: with unique ids.
      processor: see `render`.
      cache_bytes: of rendered arrays to keep.

    Raises:
      ValueError: two samples share an id (the cache would give one's images to the other).
    """

    def __init__(self, samples: Sequence[Sample], processor: Processor, *, cache_bytes: int = 1 << 30):
        seen: set[str] = set()
        twice = [s.id for s in samples if s.id in seen or seen.add(s.id)]  # type: ignore[func-returns-value]
        if twice:
            raise ValueError(f"{len(twice)} samples repeat the id of another, the first is {twice[0]!r}")
        self._samples, self._processor, self._budget = samples, processor, cache_bytes
        self._cache: OrderedDict[str, Rendered] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Rendered:  # type: ignore[override]
        sample = self._samples[index]
        with self._lock:
            if sample.id in self._cache:
                self._cache.move_to_end(sample.id)
                return self._cache[sample.id]
        rendered = render(sample.messages, self._processor)
        with self._lock:
            if sample.id not in self._cache:
                self._cache[sample.id] = rendered
                self._bytes += _bytes(rendered)
            while self._bytes > self._budget and self._cache:
                self._bytes -= _bytes(self._cache.popitem(last=False)[1])
        return rendered


class Loader:
    """Steps of micro-batches from a packing plan; `iterate(start)` continues at any step exactly.

    The groups of successive epochs form one stream, and a step takes the next `micro_batches` of them, whatever the
    layout. `shards` groups side by side make one micro-batch over all devices: group `m * shards + s` of a step is
    shard `s` of micro-batch `m`. A process assembles the shards whose devices it has, so that what a step sees does not
    depend on how many processes there are. Past the end of the data there are empty groups, whose counts are zero.

    Args:
      plan: gives the plan of an epoch.
      assemble: makes the arrays of a group from the sample indices in its rows; called in a thread.
      sizes: of the samples.
      micro_batches: groups in a step, over all devices and processes.
      epochs, steps: how long; give exactly one.
      shards: groups that lie side by side, the batch shards of a layout.
      mine: the shards that this process assembles, see `mindjax.data.placing.shards_of_process`; None is all.
      prefetch: steps made ahead, in that many threads at most 4; 0 makes them on demand.

    Raises:
      ValueError: neither or both of `epochs` and `steps`, no sample left, or groups that cannot lie side by side.
    """

    def __init__(
        self,
        plan: Callable[[int], Plan],
        assemble: Callable[[Rows], Any],
        sizes: Sequence[SampleSize],
        *,
        micro_batches: int = 1,
        epochs: int | None = None,
        steps: int | None = None,
        shards: int = 1,
        mine: Sequence[int] | None = None,
        prefetch: int = 8,
    ):
        if (epochs is None) == (steps is None):
            raise ValueError(f"give epochs or steps, not {'neither' if epochs is None else 'both'}")
        if micro_batches < 1 or shards < 1 or micro_batches % shards:
            raise ValueError(
                f"micro_batches is {micro_batches}, and the layout lays {shards} of them side by side (data x fsdp x "
                f"expert devices): make micro_batches a multiple of {shards}, with fewer rows each for the same "
                "update, or split the batch over fewer devices"
            )
        if mine is not None and not set(mine) <= set(range(shards)):
            raise ValueError(f"shards {sorted(mine)} of {shards} do not exist; they count from 0")
        self._assemble, self._sizes = assemble, sizes
        self._micro, self._shards = micro_batches, shards
        self._mine = range(shards) if mine is None else sorted(set(mine))
        self._prefetch = prefetch
        self._groups: list[Rows] = []
        self.dropped: tuple[int, ...] = ()
        wanted = None if steps is None else steps * micro_batches
        epoch = 0
        while epoch != epochs and (wanted is None or len(self._groups) < wanted):
            result = plan(epoch)
            if not result.groups:
                raise ValueError(f"no sample is left to train on ({len(result.dropped)} were too long)")
            self._groups += result.groups
            self.dropped = result.dropped
            epoch += 1
        self._groups = self._groups[:wanted]
        missing = -len(self._groups) % micro_batches
        self._groups += [[() for _ in self._groups[0]]] * missing

    def __len__(self) -> int:
        """Steps of the whole run."""
        return len(self._groups) // self._micro

    @property
    def groups_per_step(self) -> int:
        """Of the stream of groups, over all devices and processes: step s takes those from s times this many on."""
        return self._micro

    def indices(self, step: int, shard: int | None = None) -> list[int]:
        """The samples of a shard of a step, or of all that this process sees, in the order of their batches."""
        shards = self._mine if shard is None else [shard]
        return [i for shard in shards for group in self._share(step, shard) for row in group for i in row]

    def __getitem__(self, step: int) -> tuple[dict[int, Any], int]:
        """({shard: arrays with a leading axis of its `micro_batches // shards` groups}, tokens of the whole step).

        The tokens are those that are not padding, over all shards and processes.
        """
        parts = {}
        for shard in self._mine:
            batches = [self._assemble(group) for group in self._share(step, shard)]
            parts[shard] = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
        return parts, sum(self._sizes[i].tokens for group in self._step(step) for row in group for i in row)

    def iterate(self, start: int = 0) -> Iterator[tuple[dict[int, Any], int]]:
        """The steps from `start` on, prepared ahead in threads."""
        # Imported here: it takes a second, and `import mindjax` must not.
        import grain

        steps = grain.MapDataset.source(_Steps(self))[start:]
        options = grain.ReadOptions(num_threads=min(4, self._prefetch), prefetch_buffer_size=self._prefetch)
        return iter(steps.to_iter_dataset(options))

    def _step(self, step: int) -> Sequence[Rows]:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        return self._groups[step * self._micro : (step + 1) * self._micro]

    def _share(self, step: int, shard: int) -> Sequence[Rows]:
        return self._step(step)[shard :: self._shards]


class _Steps:
    """A loader as grain sees it."""

    def __init__(self, loader: Loader):
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __getitem__(self, step: int) -> tuple[dict[int, Any], int]:
        return self._loader[int(step)]


def fingerprint(samples: Sequence[Rendered]) -> str:
    """Of the data set that a run was started with: tokens and pixels, in order."""
    digest = hashlib.sha256()
    for rendered in samples:
        digest.update(rendered.tokens.tobytes())
        for patches, grid in rendered.frames:
            digest.update(repr(grid).encode())
            digest.update(patches.tobytes())
    return digest.hexdigest()[:16]


def digest(numbers: Sequence[float] | None) -> str | None:
    """Of per-sample numbers, short enough for a checkpoint's configuration."""
    if numbers is None:
        return None
    return hashlib.sha256(np.asarray(numbers, np.float64).tobytes()).hexdigest()[:16]


def _bytes(rendered: Rendered) -> int:
    arrays = [rendered.tokens, rendered.loss_mask, rendered.positions, rendered.modality]
    return sum(a.nbytes for a in arrays) + sum(patches.nbytes for patches, _ in rendered.frames)
