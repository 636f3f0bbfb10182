"""The loader: exact coverage and resume for any number of processes, and one rendering per sample."""

from __future__ import annotations

from collections import Counter

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


@settings(max_examples=40, deadline=None)
@given(sizes=sizes_strategy, epochs=st.integers(1, 3), micro=st.sampled_from([1, 2, 4]))
def test_each_epoch_brings_every_sample_once_over_all_processes(sizes, epochs, micro):
    whole = make(sizes, epochs=epochs, micro_batches=micro)
    seen = Counter(i for step in range(len(whole)) for i in whole.indices(step))
    assert seen == Counter(dict.fromkeys(range(len(sizes)), epochs))
    for count in (c for c in (1, 2, 4) if micro % c == 0):
        shards = [
            make(sizes, epochs=epochs, micro_batches=micro, process_index=p, process_count=count) for p in range(count)
        ]
        for step in range(len(whole)):
            assert [i for shard in shards for i in shard.indices(step)] == whole.indices(step)
            parts = np.concatenate([shard[step][0] for shard in shards])
            np.testing.assert_array_equal(parts, whole[step][0])


def test_resume_at_any_step_is_exact_and_ordered():
    sizes = [SampleSize(int(n)) for n in np.random.default_rng(0).integers(1, 16, 50)]
    data = make(sizes, steps=9, micro_batches=2)
    everything = list(data.iterate())
    assert len(everything) == len(data) == 9
    for start in (0, 1, 5, 8, 9):
        rest = list(data.iterate(start))
        assert len(rest) == 9 - start
        for (a, tokens_a), (b, tokens_b) in zip(rest, everything[start:], strict=True):
            np.testing.assert_array_equal(a, b)
            assert tokens_a == tokens_b
    total = sum(sizes[i].tokens for i in data.indices(3))
    assert everything[3][1] == total and everything[3][0].shape == (2, 32)


def test_length_settings_are_checked():
    sizes = [SampleSize(4)] * 4
    with pytest.raises(ValueError, match="give epochs or steps, not neither"):
        make(sizes)
    with pytest.raises(ValueError, match="not both"):
        make(sizes, epochs=1, steps=1)
    with pytest.raises(ValueError, match="3 micro-batches cannot be shared by 2 processes"):
        make(sizes, epochs=1, micro_batches=3, process_count=2)
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
