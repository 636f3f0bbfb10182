"""The plan covers every sample exactly, respects its static shape, and packs to what the parts are."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindjax.data.packing import (
    BatchShape,
    SampleSize,
    bucket,
    collate_prompts,
    epoch_order,
    pack,
    patch_coordinates,
    plan,
    size_of,
)
from tests.train import tiny

SHAPE = tiny.SHAPE
sizes_strategy = st.lists(
    st.builds(SampleSize, st.integers(1, 32), st.lists(st.sampled_from([4, 8, 12, 16]), max_size=3).map(tuple)),
    min_size=1,
    max_size=60,
)


@settings(max_examples=100, deadline=None)
@given(sizes=sizes_strategy, seed=st.integers(0, 5), epoch=st.integers(0, 3), rows=st.integers(1, 3))
def test_plan_covers_every_sample_once_within_the_shape(sizes, seed, epoch, rows):
    shape = replace(SHAPE, rows=rows)
    result = plan(sizes, shape, seed=seed, epoch=epoch)
    placed = [i for group in result.groups for row in group for i in row]
    assert sorted(placed) == list(range(len(sizes)))
    for group in result.groups:
        assert len(group) == rows and any(group)
        for row in group:
            assert sum(sizes[i].tokens for i in row) <= shape.length
    assert plan(sizes, shape, seed=seed, epoch=epoch) == result


@settings(max_examples=60, deadline=None)
@given(sizes=sizes_strategy, seed=st.integers(0, 5))
def test_what_is_planned_can_be_packed(sizes, seed):
    # Each frame needs its tokens in the row.
    rng = np.random.default_rng(seed)
    grids = {4: (2, 2), 8: (2, 4), 12: (2, 6), 16: (4, 4)}
    samples = [
        tiny.sample(rng, max(size.tokens, sum(size.frames) // 4 + 2), tuple(grids[n] for n in size.frames))
        for size in sizes
    ]
    sizes = [size_of(rendered) for rendered in samples]
    for group in plan(sizes, SHAPE, seed=seed).groups:
        batch = pack([[samples[i] for i in row] for row in group], SHAPE)
        merged = batch.vision.patches.reshape(-1, 4, SHAPE.patch_dim)
        for row, items in enumerate(group):
            for segment, i in enumerate(items, 1):
                rendered, here = samples[i], batch.segment_ids[row] == segment
                np.testing.assert_array_equal(batch.tokens[row][here], rendered.tokens)
                np.testing.assert_array_equal(batch.positions[row][here], rendered.positions)
                np.testing.assert_array_equal(batch.loss_mask[row][here][1:], rendered.loss_mask[1:])
                assert batch.loss_mask[row][here][0] == 0
                index = batch.vision_index[row][here]
                assert ((index >= 0) == (rendered.modality > 0)).all()
                expected = [patches.reshape(-1, 4, SHAPE.patch_dim) for patches, _ in rendered.frames]
                if expected:
                    np.testing.assert_array_equal(merged[index[index >= 0]], np.concatenate(expected))
        assert (batch.segment_ids[batch.vision_index >= 0] > 0).all()
        padding = batch.segment_ids == 0
        assert not batch.loss_mask[padding].any() and (batch.vision_index[padding] == -1).all()


def test_the_first_token_of_a_segment_is_never_a_target():
    sample = tiny.sample(np.random.default_rng(0), 8)
    sample = replace(sample, loss_mask=np.ones(8, np.float32))
    batch = pack([[sample, sample]], SHAPE)
    np.testing.assert_array_equal(batch.loss_mask[0, :16], [0, *[1] * 7] * 2)


def test_whether_frames_fit_does_not_depend_on_their_order():
    rng = np.random.default_rng(0)
    small, large = tiny.sample(rng, 6, ((2, 2),)), tiny.sample(rng, 8, ((2, 6),))
    # Four rows of 16 hold four of each only if each row takes one of each.
    for order in ([small, large], [large, small]):
        copies = [[tiny.sample(rng, len(s.tokens), (s.frames[0][1],)) for _ in range(4)] for s in order]
        batch = pack(copies, SHAPE)
        assert (batch.vision.segment_ids > 0).all()


def test_each_frame_is_its_own_vision_segment_and_padding_is_zero():
    rng = np.random.default_rng(0)
    sample = tiny.sample(rng, 20, ((2, 2), (2, 4), (4, 4)))
    vision = pack([[sample]], SHAPE).vision
    lengths = Counter()
    for row in range(SHAPE.vision_rows):
        for segment in set(vision.segment_ids[row].tolist()) - {0}:
            here = vision.segment_ids[row] == segment
            grid = {tuple(c) for c in vision.coordinates[row][here][:, 2:].tolist()}
            assert len(grid) == 1, "a segment mixes images"
            (height, width), n = grid.pop(), here.sum()
            assert n == height * width
            lengths[int(n)] += 1
    assert lengths == Counter({4: 1, 8: 1, 16: 1})
    assert not vision.patches[vision.segment_ids == 0].any()


def test_coordinates_follow_merge_blocks():
    np.testing.assert_array_equal(
        patch_coordinates(2, 4, 2)[:, :2],
        [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]],
    )
    assert (patch_coordinates(2, 4, 2)[:, 2:] == [2, 4]).all()


def test_a_sample_that_does_not_fit_is_an_error_or_listed_never_cut():
    sizes = [SampleSize(10), SampleSize(33), SampleSize(5, (20,)), SampleSize(5, (16,) * 5)]
    with pytest.raises(ValueError, match=r"3 of 4 samples .*index 1"):
        plan(sizes, SHAPE)
    result = plan(sizes, SHAPE, drop_too_long=True)
    assert result.dropped == (1, 2, 3)
    assert [i for group in result.groups for row in group for i in row] == [0]


def test_cut_tokens_are_refused():
    sample = tiny.sample(np.random.default_rng(0), 12, ((4, 4),))
    cut = replace(
        sample,
        tokens=sample.tokens[:3],
        loss_mask=sample.loss_mask[:3],
        positions=sample.positions[:3],
        modality=sample.modality[:3],
    )
    with pytest.raises(ValueError, match="2 image places but images of 4 tokens"):
        pack([[cut]], SHAPE)
    with pytest.raises(ValueError, match="tokens, the batch has 32"):
        pack([[sample, sample, sample]], SHAPE)
    with pytest.raises(ValueError, match="do not fit 4 rows of 16 patches"):
        pack([[tiny.sample(np.random.default_rng(i), 8, ((4, 4),)) for i in range(4)], [sample]], SHAPE)


def test_shared_frames_are_packed_once():
    rng = np.random.default_rng(0)
    prompt = tiny.sample(rng, 8, ((4, 4),))
    batch = pack([[prompt, replace(prompt, tokens=prompt.tokens + 0)], [prompt]], SHAPE)
    assert (batch.vision.segment_ids > 0).sum() == 16
    used = batch.vision_index[batch.vision_index >= 0].reshape(3, 4)
    assert (used == used[0]).all()


def test_order_rises_with_difficulty_and_epochs_differ():
    sizes = [SampleSize(8)] * 64
    difficulty = np.random.default_rng(0).random(64)
    groups = plan(sizes, SHAPE, difficulty=difficulty.tolist()).groups
    means = [np.mean([difficulty[i] for row in group for i in row]) for group in groups]
    assert means == sorted(means)
    assert plan(sizes, SHAPE, epoch=0) != plan(sizes, SHAPE, epoch=1)
    assert plan(sizes, SHAPE, seed=0) != plan(sizes, SHAPE, seed=1)


@settings(max_examples=50, deadline=None)
@given(weights=st.lists(st.floats(0, 3), min_size=1, max_size=20), epochs=st.integers(1, 6))
def test_mixture_shares_are_exact_over_epochs(weights, epochs):
    times = np.zeros(len(weights), int)
    for epoch in range(epochs):
        np.add.at(times, epoch_order(len(weights), seed=3, epoch=epoch, repeats=weights), 1)
    assert (np.abs(times - epochs * np.array(weights)) < 1 + 1e-6).all()
    with pytest.raises(ValueError, match="finite numbers"):
        epoch_order(len(weights), seed=0, epoch=0, repeats=[-1.0] * len(weights))


@settings(max_examples=100, deadline=None)
@given(sizes=sizes_strategy, rows=st.integers(1, 4))
def test_chosen_shape_holds_everything_and_is_a_bucket(sizes, rows):
    vision = replace(tiny.model().vision)
    shape = BatchShape.for_sizes(sizes, rows, vision)
    assert plan(sizes, shape).dropped == ()
    assert shape.length == 64 and shape.vision_length in (0, 16) and shape.patch_dim == vision.patch_dim


@given(st.integers(1, 10_000), st.sampled_from([1, 4, 64]))
def test_buckets_are_few_and_waste_at_most_half(value, smallest):
    size = bucket(value, smallest)
    assert size >= value and (size == smallest or size <= 1.5 * value or size <= 2)


def test_packing_is_tight():
    rng = np.random.default_rng(0)
    sizes = [SampleSize(int(n)) for n in rng.integers(40, 200, 2000)]
    shape = BatchShape(8, 512)
    assert plan(sizes, shape).fill(sizes, shape) > 0.95


def test_prompts_have_a_row_each():
    prompts = tiny.samples(3)
    batch = collate_prompts(prompts)
    assert batch.tokens.shape == (3, 64) and batch.vision.patches.shape[1] == 16
    for row, prompt in enumerate(prompts):
        n = len(prompt.tokens)
        assert (batch.segment_ids[row, :n] == 1).all() and not batch.segment_ids[row, n:].any()
        np.testing.assert_array_equal(batch.tokens[row, :n], prompt.tokens)
    fixed = collate_prompts(prompts[:1], 32, rows=4, vision_rows=2, vision_length=16, patch_dim=96)
    assert fixed.tokens.shape == (4, 32) and fixed.vision.patches.shape == (2, 16, 96)
    assert collate_prompts(prompts[:1]).vision is None
    with pytest.raises(ValueError, match="give patch_dim"):
        collate_prompts(prompts[:1], vision_rows=2, vision_length=16)
    with pytest.raises(ValueError, match="16 patches does not fit a row of 8"):
        collate_prompts([prompts[2]], vision_length=8)
