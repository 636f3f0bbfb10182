"""A table of encoded pictures: the sampler and the trainer read it as if they had encoded themselves."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from mindjax.data.packing import BatchShape, pack, size_of
from mindjax.data.render import append_completion
from mindjax.inference import pictures
from mindjax.inference.pictures import encode_pictures, prompt_batches, read_table, table_rows
from mindjax.inference.sampler import SamplingConfig, generate, prompt_shape, sampling_keys
from mindjax.models import qwen3_vl
from tests.inference.prompts import random_prompt
from tests.train import tiny

PIECES: list[list[Any]] = [[5, ("image", 4, 8), 6], [2, ("image", 4, 4), ("image", 6, 2), 4], [7], [("image", 2, 2), 3]]


@pytest.fixture(scope="module")
def setting() -> tuple[Any, ...]:
    """(config, parameters, five prompts, the last with the picture of the first; a shape of two prompts)."""
    rng, config = np.random.default_rng(0), tiny.model()
    prompts = [random_prompt(config, pieces, rng) for pieces in PIECES]
    other = random_prompt(config, PIECES[0], rng)
    prompts.append(replace(other, frames=prompts[0].frames))
    return config, tiny.init(config), prompts, prompt_shape([size_of(prompt) for prompt in prompts], 2, config)


def test_answers_are_those_of_encoding_inside(setting: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three batches, the last half empty: tokens and log-probabilities to the bit, and no picture encoded again."""
    config, params, prompts, shape = setting
    sampling = SamplingConfig(max_new_tokens=12, num_samples=2)
    keys = sampling_keys(0, 0, range(5), 2)
    inside = generate(params, config, prompts, sampling=sampling, keys=keys, shape=shape)
    table = encode_pictures(params, config, prompt_batches(prompts, shape))
    monkeypatch.setattr(pictures, "_encode", None)
    given = generate(params, config, prompts, sampling=sampling, keys=keys, shape=shape, vision_features=table)
    assert given == inside
    turned = replace(table, tokens=table.tokens[::-1], deepstack=table.deepstack[:, ::-1])
    other = generate(params, config, prompts, sampling=sampling, keys=keys, shape=shape, vision_features=turned)
    assert [row == same for row, same in zip(other, inside, strict=True)] == [False, False, True, False, False]


@partial(jax.jit, static_argnums=1)
def logprobs(params: Any, config: Any, batch: Any, features: Any = None) -> Any:
    return qwen3_vl.token_logprobs(params, config, batch, vision_features=features).logp


def test_a_trainer_reads_the_table_in_any_arrangement(setting: tuple[Any, ...]) -> None:
    config, params, prompts, shape = setting
    batches = list(prompt_batches(prompts, shape))
    table, rows = encode_pictures(params, config, batches), table_rows(batches, shape)
    assert [len(row) for row in rows] == [8, 7, 0, 1, 8, 0]
    order = [[4, 1], [2, 0, 1], [3, 3]]  # several answers to a prompt share its rows
    full = [[append_completion(prompts[i], [3, 1, 4, i]) for i in row] for row in order]
    sizes = [size_of(item) for row in full for item in row]
    own = BatchShape(4, 96, 4, max(max(size.frames, default=0) for size in sizes), config.vision.patch_dim)
    batch = pack(full, own)
    reading = read_table(batch, [rows[i] for row in order for i in row])
    assert reading.vision is None
    np.testing.assert_allclose(
        logprobs(params, config, reading, table), logprobs(params, config, batch), rtol=0, atol=1e-5
    )
    wrong = read_table(batch, [rows[i][::-1] for row in order for i in row])
    assert np.abs(logprobs(params, config, wrong, table) - logprobs(params, config, batch)).max() > 1e-2
    with pytest.raises(ValueError, match="32 places for picture tokens, the rows of the table 8"):
        read_table(batch, rows[:1])


def test_text_alone_has_no_table_and_a_strange_one_is_refused(setting: tuple[Any, ...]) -> None:
    config, params, prompts, shape = setting
    text = prompt_shape([size_of(prompts[2])], 1, config)
    assert encode_pictures(params, config, prompt_batches([prompts[2]], text)) is None
    sampling = SamplingConfig(max_new_tokens=2, temperature=0.0)
    table = encode_pictures(params, config, prompt_batches(prompts[:2], shape))
    with pytest.raises(ValueError, match="need the shape"):
        generate(params, config, prompts[:2], sampling=sampling, vision_features=table)
    with pytest.raises(ValueError, match=r"have \d+ tokens, the prompts in this shape"):
        generate(params, config, prompts, sampling=sampling, shape=shape, vision_features=table)
