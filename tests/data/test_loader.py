"""The loader: exact coverage and resume for any layout and number of processes, and one rendering per sample."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindjax.data import loader as loader_module
from mindjax.data.loader import Loader, RenderedSamples, digest, fingerprint
from mindjax.data.packing import BatchShape, SampleSize, plan
from mindjax.types import Sample
from tests.train import tiny

SHAPE = BatchShape(rows=2, length=16)


def make(sizes, **options):
    def assemble(rows):
        flat = [i for row in rows for i in row]
        return np.pad(np.array(flat, np.int32), (0, 32 - len(flat)), constant_values=-1)

    return Loader(lambda epoch: plan(sizes, SHAPE, epoch=epoch), assemble, sizes, **options)


sizes_strategy = st.lists(st.builds(SampleSize, st.integers(1, 16)), min_size=1, max_size=30)


def processes_of(shards, count):
    """The shards of each of `count` processes: neighbours together, a shard in several processes where few are left."""
    return [sorted({p * shards // count, *range(p * shards // count, (p + 1) * shards // count)}) for p in range(count)]


@settings(max_examples=40, deadline=None)
@given(sizes=sizes_strategy, epochs=st.integers(1, 3), shards=st.sampled_from([1, 2, 4]), micro=st.integers(1, 3))
def test_each_epoch_brings_every_sample_once_under_any_layout(sizes, epochs, shards, micro):
    options = {"epochs": epochs, "micro_batches": shards * micro}
    one = make(sizes, **options)
    seen = Counter(i for step in range(len(one)) for i in one.indices(step))
    assert seen == Counter(dict.fromkeys(range(len(sizes)), epochs))
    for count in (1, 2, 4, 8):
        loaders = [make(sizes, shards=shards, mine=mine, **options) for mine in processes_of(shards, count)]
        for step in range(len(one)):
            (whole,), tokens = one[step][0].values(), one[step][1]
            parts = {}
            for loader, mine in zip(loaders, processes_of(shards, count), strict=True):
                loaded, loaded_tokens = loader[step]
                assert sorted(loaded) == mine and loaded_tokens == tokens  # of the whole step, not of this process
                assert loader.indices(step) == [i for s in mine for i in loaded[s].ravel() if i >= 0]
                parts |= loaded
            # Group m * shards + s is shard s of micro-batch m: side by side they are the step of one device.
            together = np.stack([parts[shard] for shard in range(shards)], axis=1)
            np.testing.assert_array_equal(together.reshape(whole.shape), whole)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), sizes=sizes_strategy, epochs=st.integers(1, 3))
def test_no_sample_is_lost_or_repeated_over_restarts_with_other_processes(data, sizes, epochs):
    """A run that is stopped after any step, any number of times, goes on with any layout and process count."""
    seen, step, groups = Counter(), 0, 4
    total = len(make(sizes, epochs=epochs, micro_batches=groups))
    while step < total:
        stop = data.draw(st.integers(step + 1, total))
        shards, count = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.sampled_from([1, 2, 4]))
        for own in range(count):  # processes whose devices share a shard load it each; the batch has it once
            mine = [s for s in processes_of(shards, count)[own] if s * count // shards == own]
            loader = make(sizes, epochs=epochs, micro_batches=groups, shards=shards, mine=mine)
            for parts, _ in islice(loader.iterate(step), stop - step):
                seen.update(int(i) for part in parts.values() for i in part.ravel() if i >= 0)
        step = stop
    assert seen == Counter(dict.fromkeys(range(len(sizes)), epochs))


def test_resume_at_any_step_is_exact_and_ordered():
    sizes = [SampleSize(int(n)) for n in np.random.default_rng(0).integers(1, 16, 50)]
    data = make(sizes, steps=9, micro_batches=4, shards=2)
    everything = list(data.iterate())
    assert len(everything) == len(data) == 9
    for start in (0, 1, 5, 8, 9):
        rest = list(data.iterate(start))
        assert len(rest) == 9 - start
        for (a, tokens_a), (b, tokens_b) in zip(rest, everything[start:], strict=True):
            assert sorted(a) == sorted(b) == [0, 1]
            for shard in (0, 1):
                np.testing.assert_array_equal(a[shard], b[shard])
            assert tokens_a == tokens_b
    total = sum(sizes[i].tokens for i in data.indices(3))
    assert everything[3][1] == total and everything[3][0][1].shape == (2, 32)


def test_length_settings_are_checked():
    sizes = [SampleSize(4)] * 4
    with pytest.raises(ValueError, match="give epochs or steps, not neither"):
        make(sizes)
    with pytest.raises(ValueError, match="not both"):
        make(sizes, epochs=1, steps=1)
    with pytest.raises(ValueError, match=r"micro_batches is 3, .* 2 of them side by side.*a multiple of 2"):
        make(sizes, epochs=1, micro_batches=3, shards=2)
    with pytest.raises(ValueError, match=r"shards \[1, 2\] of 2 do not exist"):
        make(sizes, epochs=1, micro_batches=2, shards=2, mine=[2, 1])
    with pytest.raises(IndexError):
        make(sizes, steps=2)[2]


def test_a_sample_is_rendered_once_while_it_fits_the_cache(monkeypatch):
    rendered = tiny.samples(6)
    calls = Counter()

    def render(messages, processor):
        calls[messages[0]["content"]] += 1
        return rendered[int(messages[0]["content"])]

    monkeypatch.setattr(loader_module, "render", render)
    samples = [Sample(({"role": "user", "content": str(i)},), id=f"s{i}") for i in range(6)]
    cached = RenderedSamples(samples, None)
    for _ in range(3):
        assert [r is rendered[i] for i, r in enumerate(cached)] == [True] * 6
    assert set(calls.values()) == {1}
    uncached = RenderedSamples(samples, None, cache_bytes=0)
    assert [uncached[0] is rendered[0] for _ in range(3)] == [True] * 3
    assert calls["0"] == 4
    with pytest.raises(ValueError, match="repeat the id of another, the first is 's0'"):
        RenderedSamples([samples[0], samples[1], samples[0]], None)


def test_fingerprints_notice_a_changed_word_or_pixel():
    first, second = tiny.samples(4), tiny.samples(4)
    assert fingerprint(first) == fingerprint(second)
    second[1].frames[0][0][0, 0] += 1
    assert fingerprint(first) != fingerprint(second)
    third = tiny.samples(4)
    third[0].tokens[0] ^= 1
    assert fingerprint(first) != fingerprint(third)
    assert fingerprint(first[::-1]) != fingerprint(first)
    assert digest(None) is None and digest([1.0]) != digest([2.0])
