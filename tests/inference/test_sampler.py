"""The sampler against transformers' generate, against the training forward, and against itself."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from kernels_cuda import jax_fused
from mindjax.config import ModelConfig
from mindjax.data.packing import SampleSize, collate_prompts, size_of
from mindjax.data.render import Rendered, append_completion
from mindjax.inference import sampler
from mindjax.inference.sampler import SamplingConfig, generate, prompt_shape, sampling_keys
from mindjax.models import hf_weights, qwen3_vl
from mindjax.types import Completion
from tests.inference.compiled import compilations
from tests.inference.prompts import random_prompt
from tests.parity.reference import DENSE, MOE, transformers_model

# Different lengths, images first, last, several and none: one batch.
PIECES: list[list[Any]] = [
    [5, ("image", 4, 8), 6],
    [("image", 2, 2), 3],
    [17],
    [2, ("image", 4, 4), ("image", 6, 2), 4],
]


@pytest.fixture(scope="module", params=["dense", "moe"])
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """(transformers model, config, parameters, prompts)."""
    # Untied: a random tied model repeats its last token for ever.
    moe = request.param == "moe"
    return build(replace(MOE, tie_word_embeddings=False) if moe else DENSE, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """The same, for what does not depend on the kind of layer."""
    return build(DENSE, tmp_path_factory.mktemp("dense"))


def build(config: ModelConfig, folder: Path) -> tuple[Any, ...]:
    model = transformers_model(config, folder)
    layout = "transformers" if config.text.num_experts else None
    params = hf_weights.load(folder, config, dtype=jnp.float32, layout=layout)
    rng = np.random.default_rng(0)
    return model, config, params, [random_prompt(config, pieces, rng) for pieces in PIECES]


def pictures(config: ModelConfig) -> list[int]:
    return [config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id]


def test_greedy_tokens_equal_transformers(setting: tuple[Any, ...]) -> None:
    """64 tokens, four prompts in one batch; their padding is on the left, ours on the right."""
    model, config, params, prompts = setting
    sampling = SamplingConfig(max_new_tokens=64, temperature=0.0)
    ours = generate(params, config, prompts, sampling=sampling)
    theirs = transformers_greedy(model, config, prompts, 64)
    for row, (completion,) in enumerate(ours):
        assert list(completion.token_ids) == theirs[row]
        assert len(set(theirs[row])) > 8
        assert completion.finish_reason == "length"


def transformers_greedy(model: Any, config: ModelConfig, prompts: list[Rendered], count: int) -> list[list[int]]:
    length = max(len(prompt.tokens) for prompt in prompts)
    pad = [length - len(prompt.tokens) for prompt in prompts]
    frames = [frame for prompt in prompts for frame in prompt.frames]
    inputs = {
        "input_ids": torch.tensor(np.array([[0] * n + p.tokens.tolist() for n, p in zip(pad, prompts, strict=True)])),
        "attention_mask": torch.tensor([[0] * n + [1] * (length - n) for n in pad]),
        "mm_token_type_ids": torch.tensor(
            [[0] * n + p.modality.tolist() for n, p in zip(pad, prompts, strict=True)], dtype=torch.int32
        ),
        "pixel_values": torch.tensor(np.concatenate([patches for patches, _ in frames])),
        "image_grid_thw": torch.tensor([[1, *grid] for _, grid in frames]),
    }
    out = model.generate(
        **inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0,
        suppress_tokens=pictures(config),
    )  # fmt: skip
    return out[:, length:].tolist()


@partial(jax.jit, static_argnums=1)
def trainer_logprobs(params: Any, config: ModelConfig, batch: Any, temperature: Any) -> jax.Array:
    return qwen3_vl.token_logprobs(params, config, batch, temperature=temperature).logp


def check_against_trainer(
    params: Any, config: ModelConfig, prompts: list[Rendered], answers: list[Completion], temperature: float
) -> None:
    """The log-probabilities of sampling are those of the training forward on the whole sequence."""
    full = [append_completion(prompt, answer.token_ids) for prompt, answer in zip(prompts, answers, strict=True)]
    logp = np.asarray(trainer_logprobs(params, config, collate_prompts(full), np.float32(temperature)))
    for row, (sequence, answer) in enumerate(zip(full, answers, strict=True)):
        theirs = logp[row, len(sequence.tokens) - len(answer.token_ids) : len(sequence.tokens)]
        np.testing.assert_allclose(answer.logprobs, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.5, 0.0])
def test_logprobs_are_those_of_the_trainer(setting: tuple[Any, ...], temperature: float) -> None:
    _, config, params, prompts = setting
    sampling = SamplingConfig(max_new_tokens=30, temperature=temperature, num_samples=3)
    answers = generate(params, config, prompts, sampling=sampling, keys=sampling_keys(0, 0, range(4), 3))
    for sample in range(3):
        check_against_trainer(params, config, prompts, [row[sample] for row in answers], temperature or 1.0)
    tokens = [answer.token_ids for row in answers for answer in row]
    assert len(set(tokens)) == (12 if temperature else 4)


def test_bfloat16_rounds_no_more_than_the_training_forward(setting: tuple[Any, ...]) -> None:
    """Against float32 on the same rounded weights and tokens: as far from it as the training forward in bfloat16 is.

    Which way a sum rounds depends on its order, and where it turns a router's choice one token moves by several nats:
    hence medians. Between sampler and forward only the order differs, so they are much closer to each other than to
    the truth; and the sampler's best token is the true best as often as the forward's is.
    """
    _, config, params, prompts = setting
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    for temperature in (1.0, 0.0):
        sampling = SamplingConfig(max_new_tokens=60, temperature=temperature, num_samples=3 if temperature else 1)
        keys = sampling_keys(0, 0, range(4), sampling.num_samples)
        found: list[np.ndarray] = []  # [5, tokens]: as unpacked below
        for answers in zip(*generate(half, config, prompts, sampling=sampling, keys=keys), strict=True):
            full = [append_completion(prompt, a.token_ids) for prompt, a in zip(prompts, answers, strict=True)]
            forward, truth = (np.array(all_logprobs(p, config, collate_prompts(full))) for p in (half, rounded))
            for row, (sequence, answer) in enumerate(zip(full, answers, strict=True)):
                end, tokens = len(sequence.tokens) - 1, np.asarray(answer.token_ids)
                at = np.arange(end - len(tokens), end)
                best, right = (x[row, at].argmax(axis=-1) for x in (forward, truth))
                scores = (answer.logprobs, forward[row, at, tokens], truth[row, at, tokens])
                found.append(np.stack([*scores, tokens == right, best == right]))
        sampler, forward, truth, drawn_right, forward_right = np.concatenate(found, axis=1)
        if temperature:
            error = np.median(abs(forward - truth))
            # With experts 0.03 to 0.055: a near tie of a router in a prompt is in all its answers (docs/log.md).
            assert 0.005 < error < (0.1 if config.text.num_experts else 0.05)
            assert np.median(abs(sampler - truth)) < 1.5 * error
            # Measured 0.28 and 0.49; scores or logits rounded to bfloat16 on the way give 0.5 to 1.1 without experts.
            assert np.median(abs(sampler - forward)) < (0.8 if config.text.num_experts else 0.4) * error
        else:
            assert drawn_right.mean() > forward_right.mean() - 0.05 > 0.8


@partial(jax.jit, static_argnums=1)
def all_logprobs(params: Any, config: ModelConfig, batch: Any) -> jax.Array:
    """[B, T, V] of the next token, without the pictures' tokens."""
    scores = qwen3_vl.logits(params, qwen3_vl.forward(params, config, batch).hidden)
    return jax.nn.log_softmax(scores).at[..., jnp.asarray(pictures(config))].set(-jnp.inf)


def test_rows_do_not_depend_on_their_batch(setting: tuple[Any, ...]) -> None:
    """A prompt alone, with others, in another place, in another order: the same tokens."""
    _, config, params, prompts = setting
    sampling = SamplingConfig(max_new_tokens=24, num_samples=2)
    numbers = [7, 3, 11, 5]
    one = prompt_shape([size_of(prompt) for prompt in prompts], 1, config)
    together = generate(params, config, prompts, sampling=sampling, keys=sampling_keys(1, 2, numbers, 2))
    for order in ([3], [2, 0], [1, 3, 0]):
        some = generate(
            params, config, [prompts[i] for i in order], sampling=sampling, shape=one,
            keys=sampling_keys(1, 2, [numbers[i] for i in order], 2),
        )  # fmt: skip
        assert [[c.token_ids for c in row] for row in some] == [[c.token_ids for c in together[i]] for i in order]
    # More samples of a prompt leave the first ones as they are.
    more = SamplingConfig(max_new_tokens=24, num_samples=3)
    third = generate(params, config, prompts[:1], sampling=more, keys=sampling_keys(1, 2, numbers[:1], 3))[0]
    assert [c.token_ids for c in third[:2]] == [c.token_ids for c in together[0]]


def test_keys_repeat_by_seed_and_differ_otherwise() -> None:
    def bits(*args: Any) -> set[bytes]:
        data = np.asarray(jax.random.key_data(sampling_keys(*args)))
        return {row.tobytes() for row in data.reshape(-1, 2)}

    base = bits(0, 0, [1, 2, 3], 4)
    assert len(base) == 12 and base == bits(0, 0, [3, 2, 1], 4)
    assert not base & bits(1, 0, [1, 2, 3], 4) and not base & bits(0, 1, [1, 2, 3], 4)
    assert not base & bits(0, 0, [4, 5], 4)


def test_stop_tokens_end_rows_early_and_alone(dense: tuple[Any, ...]) -> None:
    _, config, params, prompts = dense
    free = generate(params, config, prompts, sampling=SamplingConfig(max_new_tokens=20, temperature=0.0))
    stops = (free[0][0].token_ids[4], free[2][0].token_ids[9])
    sampling = SamplingConfig(max_new_tokens=20, temperature=0.0, stop_token_ids=stops)
    for (whole,), (cut,) in zip(free, generate(params, config, prompts, sampling=sampling), strict=True):
        first = next((i for i, token in enumerate(whole.token_ids) if token in stops), None)
        expected = whole.token_ids if first is None else whole.token_ids[: first + 1]
        assert cut.token_ids == expected
        assert cut.finish_reason == ("length" if first is None else "stop")
        np.testing.assert_allclose(cut.logprobs, whole.logprobs[: len(expected)], rtol=0, atol=1e-5)
    ignoring = SamplingConfig(max_new_tokens=20, temperature=0.0, stop_token_ids=stops, ignore_eos=True)
    assert generate(params, config, prompts, sampling=ignoring) == free


def test_loop_ends_when_every_row_has(dense: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are counted inside the compiled loop: a stop token at step 3 of 512 leaves the rest undone."""
    _, config, params, prompts = dense
    steps: list[int] = []
    step = sampler._decode_step

    def counting(*args: Any) -> Any:
        jax.debug.callback(lambda index: steps.append(int(index)), args[-2])
        return step(*args)

    monkeypatch.setattr(sampler, "_decode_step", counting)
    sampler._decode.clear_cache()
    free = generate(params, config, prompts[:1], sampling=SamplingConfig(max_new_tokens=8, temperature=0.0))
    jax.effects_barrier()
    assert sorted(steps) == list(range(7)), "the first token comes from the prefill"
    steps.clear()
    stop = free[0][0].token_ids[2]
    first = free[0][0].token_ids.index(stop)
    sampling = SamplingConfig(max_new_tokens=512, temperature=0.0, stop_token_ids=(stop,))
    generate(params, config, prompts[:1], sampling=sampling)
    jax.effects_barrier()
    assert sorted(steps) == list(range(first))
    sampler._decode.clear_cache()


def test_a_step_copies_no_weight(setting: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice of a stack, written before the product reads it, would double a step's memory traffic."""
    _, config, params, prompts = setting
    decode, programs = sampler._decode, []

    def spy(*args: Any, **settings: Any) -> Any:
        programs.append(decode.lower(*args, **settings).compile().as_text())
        return decode(*args, **settings)

    monkeypatch.setattr(sampler, "_decode", spy)
    generate(params, config, prompts, sampling=SamplingConfig(max_new_tokens=2, temperature=0.0))
    matrices = [leaf.shape[1:] for leaf in jax.tree.leaves(params["text"]["layers"]) if leaf.ndim > 2]
    written = {
        tuple(map(int, shape.split(","))) for shape in re.findall(r"= f32\[([\d,]+)\]\S* dynamic-slice", programs[0])
    }
    assert written and not written & {shape for matrix in matrices for shape in (matrix, (1, *matrix))}


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "jnp"])
def test_rows_that_have_ended_are_left_behind(
    setting: tuple[Any, ...], kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 answers of 1 to 12 tokens: the same as whole ones cut there, in loops of 32, 16 and 8 rows."""
    _, config, params, prompts = setting
    sampling = SamplingConfig(max_new_tokens=12, num_samples=8)
    call = partial(generate, params, config, prompts, sampling=sampling, keys=sampling_keys(0, 0, range(4), 8))
    monkeypatch.setattr(sampler, "LEAST_ROWS", 33)
    whole = call()
    monkeypatch.setattr(sampler, "LEAST_ROWS", 8)
    if not kernels:
        monkeypatch.setattr(jax_fused, "usable", lambda: False)
    rows: list[int] = []
    step = sampler._decode_step

    def counting(*args: Any) -> Any:
        jax.debug.callback(lambda: rows.append(args[2].shape[0]))
        return step(*args)

    monkeypatch.setattr(sampler, "_decode_step", counting)
    sampler._decode.clear_cache()
    limits = np.random.default_rng(1).integers(1, 13, (4, 8)).astype(np.int32)
    limits[2, 3] = 12
    cut = call(limits=limits)
    jax.effects_barrier()
    sampler._decode.clear_cache()
    for p, n in np.ndindex(4, 8):
        assert cut[p][n].token_ids == whole[p][n].token_ids[: limits[p, n]] and cut[p][n].finish_reason == "length"
        np.testing.assert_allclose(cut[p][n].logprobs, whole[p][n].logprobs[: limits[p, n]], rtol=0, atol=1e-5)
    unfinished = [(limits > made).sum() for made in range(1, 12)]
    assert rows == [next(size for size in (8, 16, 32) if size >= left) for left in unfinished]
    assert {8, 16, 32} == set(rows)


def test_picture_tokens_are_never_drawn(dense: tuple[Any, ...]) -> None:
    """Nor when the model is nearly sure of one."""
    _, config, params, prompts = dense
    banned = pictures(config)
    loud = jax.tree.map(lambda leaf: leaf, params)
    name = "head" if "head" in loud["text"] else "embed"
    scale = jnp.ones(config.text.vocab_size).at[jnp.asarray(banned)].set(30.0)
    loud["text"] = {**loud["text"], name: loud["text"][name] * (scale if name == "head" else scale[:, None])}
    for temperature in (0.0, 1.0):
        sampling = SamplingConfig(max_new_tokens=16, temperature=temperature, num_samples=4)
        answers = generate(loud, config, prompts, sampling=sampling, keys=sampling_keys(0, 0, range(4), 4))
        drawn = {token for row in answers for answer in row for token in answer.token_ids}
        assert not drawn & set(banned)
    sequence = append_completion(prompts[0], answers[0][0].token_ids)
    logp = np.asarray(trainer_logprobs(loud, config, collate_prompts([sequence]), np.float32(1.0)))
    np.testing.assert_allclose(
        answers[0][0].logprobs, logp[0, len(prompts[0].tokens) : len(sequence.tokens)], atol=1e-3
    )


def test_steady_state_compiles_nothing(dense: tuple[Any, ...]) -> None:
    """Other prompts, lengths, images, temperatures, limits and stop tokens within the buckets."""
    _, config, params, prompts = dense
    rng = np.random.default_rng(5)
    shape = prompt_shape([size_of(prompt) for prompt in prompts], 4, config)

    def call(batch: list[Rendered], step: int, **settings: Any) -> None:
        sampling = SamplingConfig(num_samples=2, **settings)
        keys = sampling_keys(0, step, range(len(batch)), 2)
        generate(params, config, batch, sampling=sampling, keys=keys, shape=shape)

    with compilations() as seen:
        call(prompts, 0, max_new_tokens=9)
    assert seen, "the counter must see the first compilations"
    call(prompts[:3], 0, max_new_tokens=9)  # keys for three prompts
    with compilations() as seen:
        call(prompts, 1, max_new_tokens=16, temperature=0.3, top_k=4, stop_token_ids=(1, 2, 3))
        call([random_prompt(config, [9, ("image", 8, 2), 2], rng) for _ in range(4)], 2, max_new_tokens=12, top_p=0.9)
        call([random_prompt(config, [30], rng) for _ in range(3)], 3, max_new_tokens=10, temperature=0.0)
    assert not seen


def test_bad_requests_are_refused(dense: tuple[Any, ...]) -> None:
    _, config, params, prompts = dense
    with pytest.raises(ValueError, match="needs keys"):
        generate(params, config, prompts, sampling=SamplingConfig())
    with pytest.raises(ValueError, match=r"one per prompt and sample, \(4, 2\)"):
        keys = sampling_keys(0, 0, range(4), 1)
        generate(params, config, prompts, sampling=SamplingConfig(num_samples=2), keys=keys)
    for limits in (np.ones((4, 2), np.int32), np.zeros((4, 1), np.int32), np.full((4, 1), 65)):
        with pytest.raises(ValueError, match=r"limits must be \(4, 1\) numbers from 1 to max_new_tokens, 64"):
            generate(params, config, prompts, sampling=SamplingConfig(temperature=0.0), limits=limits)
    with pytest.raises(ValueError, match="top_p must lie"):
        SamplingConfig(top_p=0.0)
    with pytest.raises(ValueError, match="at most 8 stop tokens"):
        SamplingConfig(stop_token_ids=tuple(range(9)))
    assert generate(params, config, [], sampling=SamplingConfig()) == []


def test_a_row_of_patches_is_little_longer_than_its_frame() -> None:
    unit = DENSE.vision.merge_unit
    lengths = {
        patches: prompt_shape([SampleSize(10, (patches,))], 3, DENSE).vision_length
        for patches in (unit, 36, 144, 260, 1000, 1028, 16_384)
    }
    assert lengths == {unit: unit, 36: 40, 144: 160, 260: 384, 1000: 1024, 1028: 1280, 16_384: 16_384}
    for patches, length in lengths.items():
        assert patches <= length and length % unit == 0
        assert length % 128 == 0 or patches <= 256  # what the TPU's attention takes
