"""Answers that go round in circles: the detector against its definition, and in the sampler."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mindjax.inference import sampler
from mindjax.inference.redundancy import Cycles
from mindjax.inference.sampler import SamplingConfig, generate, sampling_keys
from tests.inference.compiled import compilations
from tests.inference.prompts import random_prompt
from tests.train import tiny

LONGEST = 6


def definition(tokens: list[int], window: int, count: int, length: int) -> int | None:
    """The first place at which the last n >= count repeats of p <= window tokens are `length` tokens long."""
    for end in range(1, len(tokens) + 1):
        for period in range(1, window + 1):
            # Repeats need not be whole ones: a cycle of 2 three and a half times over is 7 tokens long.
            repeated = max(period * count, length)
            last = tokens[end - repeated : end] if repeated <= end else []
            if last and all(last[i] == last[i % period] for i in range(repeated)):
                return end - 1
    return None


@jax.jit
def detect(tokens: Any, window: Any, count: Any, length: Any) -> Any:
    """[R, T] bool from tokens [R, T]."""

    def step(cycles: Cycles, new: Any) -> Any:
        cycles = cycles.add(new)
        return cycles, cycles.found(window, count, length)

    return jax.lax.scan(step, Cycles.empty(tokens.shape[0], LONGEST), tokens.T)[1].T


# A few tokens, long enough to fall into cycles by chance, and answers made of cycles.
ROW = st.one_of(
    st.lists(st.integers(0, 2), min_size=24, max_size=24),
    st.tuples(st.lists(st.integers(0, 9), max_size=8), st.lists(st.integers(0, 2), min_size=1, max_size=8)).map(
        lambda parts: (parts[0] + parts[1] * 24)[:24]
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(ROW, min_size=3, max_size=3), st.integers(1, LONGEST), st.integers(2, 5), st.integers(0, 12))
@example([[0] * 24, [0, 1] * 12, [1, 0, 0, 0, 0, *range(19)]], 3, 4, 0)
@example([[0] * 24, [0, 1] * 12, [1, 0, 0, 0, 0, *range(19)]], 3, 4, 7)
def test_the_detector_is_its_definition(rows: list[list[int]], window: int, count: int, length: int) -> None:
    found = np.asarray(detect(*map(np.int32, (rows, window, count, length))))
    for row, seen in zip(rows, found, strict=True):
        first = int(seen.argmax()) if seen.any() else None
        assert first == definition(row, window, count, length)


@pytest.fixture(scope="module")
def looping() -> tuple[Any, ...]:
    """(config, parameters, prompts): tied and random, it says its last token again and again, with pauses."""
    rng, config = np.random.default_rng(0), tiny.model()
    prompts = [random_prompt(config, pieces, rng) for pieces in ([9], [("image", 2, 4), 5], [14])]
    return config, tiny.init(config), prompts


def test_looping_answers_are_cut_and_marked(looping: tuple[Any, ...]) -> None:
    config, params, prompts = looping
    keys = sampling_keys(0, 0, range(3), 4)
    sampling = SamplingConfig(max_new_tokens=40, temperature=0.4, num_samples=4)
    free = generate(params, config, prompts, sampling=sampling, keys=keys)
    stop, reasons = 58, set()
    for window, count, length in ((4, 3, 0), (2, 4, 0), (8, 2, 7)):
        repeats = {"repeat_window": window, "repeat_count": count, "repeat_length": length}
        sampling = replace(sampling, stop_token_ids=(stop,), **repeats)
        for row, whole_row in zip(generate(params, config, prompts, sampling=sampling, keys=keys), free, strict=True):
            for cut, whole in zip(row, whole_row, strict=True):
                at = definition(list(whole.token_ids), window, count, length)
                stopped = whole.token_ids.index(stop) if stop in whole.token_ids else None
                ends = min(end for end in (at, stopped, 39) if end is not None)
                reason = "stop" if ends == stopped else "redundant" if ends == at else "length"
                assert cut.finish_reason == reason
                assert cut.token_ids == whole.token_ids[: ends + 1]
                np.testing.assert_allclose(cut.logprobs, whole.logprobs[: ends + 1], rtol=0, atol=1e-5)
                reasons.add(reason)
    assert reasons == set(sampler.FINISH_REASONS)


def test_windows_of_a_bucket_share_a_program_and_off_is_no_part_of_it(
    looping: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, params, prompts = looping

    def call(**repeats: int) -> None:
        sampling = SamplingConfig(max_new_tokens=10, temperature=0.0, **repeats)
        generate(params, config, prompts[:1], sampling=sampling)

    call(repeat_window=5, repeat_count=3)
    with compilations() as seen:
        call(repeat_window=8, repeat_count=2, repeat_length=6)
    assert not seen
    sampler._decode.clear_cache()
    monkeypatch.setattr(Cycles, "add", None)  # whoever looks for cycles fails
    call()
    sampler._decode.clear_cache()


def test_settings_that_do_nothing_are_refused() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"repeat_window": 4}, "at least 2, not 0"),
        ({"repeat_window": 4, "repeat_count": 1}, "at least 2, not 1"),
        ({"repeat_window": -1}, "not be negative: -1"),
        ({"repeat_count": 3}, "nothing without repeat_window"),
        ({"repeat_length": 3}, "nothing without repeat_window"),
    ]
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            SamplingConfig(**options)
