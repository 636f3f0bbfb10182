"""Batched sampling: prompts of different lengths with images, several samples of each, one program.

P prompts, N samples of each, R rows (P x N, fewer once many have ended), V vocabulary, C capacity for new tokens (a
bucket of max_new_tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mindjax.config import ModelConfig
from mindjax.data.packing import BatchShape, SampleSize, bucket, size_of
from mindjax.inference.cache import Generated, Prefix, decode_attention
from mindjax.inference.draw import draw as draw_token
from mindjax.inference.pictures import encode_pictures, offset_index, prompt_batches, table_size
from mindjax.inference.redundancy import Cycles
from mindjax.models.qwen3_vl import Params, decoder_layer, embed, forward, logical_axes, logits
from mindjax.models.rope import text_rope
from mindjax.models.spread import cut_params, parameter_axes, whole_gate_up
from mindjax.models.vision import VisionFeatures
from mindjax.ops.layer import in_place
from mindjax.ops.norm import rms_norm
from mindjax.ops.pallas_attention import LANES
from mindjax.ops.scan import scan_layers
from mindjax.types import Batch, Completion
from sharding.layout import BATCH
from sharding.links import ONE_DEVICE, Links
from sharding.parallel import Parallel

if TYPE_CHECKING:
    from mindjax.data.render import Rendered

Array = jax.Array

# Stop tokens enter the compiled loop as an array of this length, so that their number compiles nothing.
MAX_STOP_TOKENS = 8
FINISH_REASONS = ("length", "stop", "redundant")
# Rows that have ended are left behind each time half of those in the loop have, down to this many. Every size is a loop
# of its own in the program, so there are not many.
LEAST_ROWS = 8


@dataclass(frozen=True)
class SamplingConfig:
    """How to draw answers. Compiled in are `num_samples` and the buckets of `max_new_tokens` and `repeat_window`.

    An answer goes round in circles, and ends with finish_reason "redundant", as soon as its last tokens are one cycle
    of at most `repeat_window` tokens, `repeat_count` times over and exactly. The repeats stay in the answer. What an
    answer may rightly repeat so often is cut as well: with `repeat_count` 4 and nothing else, the zeros of 10000.
    `repeat_length` guards against that: it spares repeats that are shorter than so many tokens in all.

    Attributes:
      max_new_tokens: where an answer is cut.
      temperature: logits are divided by it; 0 takes the most likely token.
      top_k: draw among this many most likely tokens only; 0 does not limit.
      top_p: draw among the most likely tokens whose probabilities first sum to this; 1 does not limit.
      num_samples: answers per prompt.
      stop_token_ids: tokens that end an answer, and are its last token.
      ignore_eos: whether to go on to `max_new_tokens` whatever stop token is drawn.
      repeat_window: tokens of the longest cycle that is looked for; 0 looks for none, at no cost.
      repeat_count: how often a cycle must have come, at least 2.
      repeat_length: how many tokens all its repeats together must have.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_samples: int = 1
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    repeat_window: int = 0
    repeat_count: int = 0
    repeat_length: int = 0

    def __post_init__(self) -> None:
        checks = [
            (self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, not {self.max_new_tokens}"),
            (self.temperature >= 0, f"temperature must not be negative: {self.temperature}; 0 is greedy"),
            (self.top_k >= 0, f"top_k must not be negative: {self.top_k}; 0 does not limit"),
            (0 < self.top_p <= 1, f"top_p must lie in (0, 1], not {self.top_p}"),
            (self.num_samples >= 1, f"num_samples must be at least 1, not {self.num_samples}"),
            (len(self.stop_token_ids) <= MAX_STOP_TOKENS, f"at most {MAX_STOP_TOKENS} stop tokens, not "
             f"{len(self.stop_token_ids)}"),
            (self.repeat_window >= 0, f"repeat_window must not be negative: {self.repeat_window}; 0 looks for none"),
            (self.repeat_count >= 2 or not self.repeat_window, "repeat_window needs a repeat_count of at least 2, not "
             f"{self.repeat_count}"),
            (self.repeat_window or not (self.repeat_count or self.repeat_length), "repeat_count and repeat_length do "
             "nothing without repeat_window"),
        ]  # fmt: skip
        problems = [message for ok, message in checks if not ok]
        if problems:
            raise ValueError("sampling: " + "; ".join(problems))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Controls:
    """What of a SamplingConfig the compiled loop reads: scalars, and stop tokens padded with -1."""

    temperature: Any
    top_k: Any
    top_p: Any
    stop_token_ids: Any
    repeats: Any  # (window, count, length)

    @classmethod
    def of(cls, sampling: SamplingConfig) -> _Controls:
        stop = np.full(MAX_STOP_TOKENS, -1, np.int32)
        if not sampling.ignore_eos:
            stop[: len(sampling.stop_token_ids)] = sampling.stop_token_ids
        return cls(
            np.float32(sampling.temperature), np.int32(sampling.top_k), np.float32(sampling.top_p),
            stop, (np.int32(sampling.repeat_window), np.int32(sampling.repeat_count), np.int32(sampling.repeat_length)),
        )  # fmt: skip


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    """The loop's carry."""

    step: Array
    token: Array  # [R], the newest
    done: Array  # [R]
    answers: _Answers
    generated: Generated
    cycles: Cycles | None  # None where none are looked for

    def keep(self, rows: int) -> _State:
        """With so many rows, all of those that are not done among them."""
        places = jnp.sort(jnp.argsort(self.done, stable=True)[:rows])

        def at_places(x: Any) -> Any:
            return jax.tree.map(lambda part: part[places], x)

        return _State(
            self.step, self.token[places], self.done[places], at_places(self.answers), self.generated.keep(places),
            at_places(self.cycles),
        )  # fmt: skip


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Answers:
    """What rows have answered so far."""

    tokens: Array  # [R, C]
    logprobs: Array  # [R, C]
    lengths: Array  # [R]
    reasons: Array  # [R], index in FINISH_REASONS


def sampling_keys(seed: int, step: int, prompts: Sequence[int], num_samples: int) -> Array:
    """PRNG keys [len(prompts), num_samples], each from (seed, step, prompt, sample) alone.

    So a row's random numbers do not depend on which rows share its batch, the same seed always repeats, and no two
    (step, prompt, sample) share numbers by accident.

    Args:
      seed: of the run.
      step: of the training loop; any number that tells calls apart.
      prompts: a number for each prompt that is its own wherever it stands, e.g. its place in the data set.
      num_samples: per prompt.
    """
    return _fold_keys(np.uint32(seed), np.uint32(step), np.asarray(prompts, np.uint32), num_samples)


@partial(jax.jit, static_argnames="num_samples")
def _fold_keys(seed: Array, step: Array, prompts: Array, num_samples: int) -> Array:
    key = jax.random.fold_in(jax.random.key(seed), step)
    by_prompt = jax.vmap(partial(jax.random.fold_in, key))(prompts)
    samples = jnp.arange(num_samples, dtype=jnp.uint32)
    return jax.vmap(lambda key: jax.vmap(partial(jax.random.fold_in, key))(samples))(by_prompt)


def prompt_shape(sizes: Sequence[SampleSize], rows: int, config: ModelConfig) -> BatchShape:
    """The bucket that holds any `rows` of the prompts, so that a loop over them compiles once.

    Args:
      sizes: of all prompts that will come (`mindjax.data.packing.size_of`).
      rows: prompts in one batch.
      config: gives patch and merge sizes.
    """
    if not sizes:
        raise ValueError("there are no prompts to choose a shape for")
    length = bucket(max(size.tokens for size in sizes))
    common = {"patch_dim": config.vision.patch_dim, "merge_size": config.vision.spatial_merge_size}
    largest = max((frame for size in sizes for frame in size.frames), default=0)
    if not largest:
        return BatchShape(rows, length, **common)
    # Each frame has a row. Finer than a bucket, which may be a third too long; but TPU kernels take whole registers.
    eighth = (1 << (largest - 1).bit_length()) // 8
    step = max(config.vision.merge_unit, eighth, LANES if largest > 2 * LANES else 1)
    vision_length = -(-largest // step) * step
    vision_rows = bucket(rows * max(len(size.frames) for size in sizes), 1)
    return BatchShape(rows, length, vision_rows, vision_length, **common)


def generate(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[Rendered],
    *,
    sampling: SamplingConfig,
    keys: Array | None = None,
    limits: np.ndarray | None = None,
    shape: BatchShape | None = None,
    max_rows: int = 64,
    vision_features: VisionFeatures | None = None,
    parallel: Parallel | None = None,
) -> list[list[Completion]]:
    """Draws `num_samples` answers to each prompt.

    A prompt and its images pass the model once, whatever `num_samples`. Tokens that stand for pictures (image and
    video places, vision start and end) are never drawn: a text model that emits one would break its own context.

    The log-probabilities that come back are those of the distribution drawn from: at the given temperature and, when
    top_k or top_p limit it, renormalised over what was left. Two things are fixed so that without top_k and top_p
    they are exactly what `token_logprobs` of the training forward gives at that temperature: the picture tokens are
    not renormalised away, and greedy answers (temperature 0) report log-probabilities at temperature 1.

    Args:
      params, config: the model; the dtype of the parameters is that of the computation and of the cache.
      prompts: rendered with `add_generation_prompt`.
      sampling: see `SamplingConfig`.
      keys: [len(prompts), num_samples] PRNG keys (`sampling_keys`); may be None for greedy answers.
      limits: [len(prompts), num_samples] tokens, where an answer is to be cut earlier than at `max_new_tokens`.
      shape: of the prefill batches, when a loop wants the same for every call (`prompt_shape`); the smallest bucket
        by default.
      max_rows: prompts x samples in one device batch where `shape` does not say how many prompts; more prompts come
        in several batches of the same shape.
      vision_features: `encode_pictures(params, config, prompt_batches(prompts, shape))` of the same parameters, where
        the caller has it; the answers are the same as without.
      parallel: devices that share the work, over `data`, `expert` and `tensor`; the parameters lie there
        (`qwen3_vl.shardings`). None is one device.

    Returns:
      For each prompt its completions.

    Raises:
      ValueError: keys are missing, keys or limits have another shape, limits are not from 1 to `max_new_tokens`, the
        prompts do not fit `shape`, or `vision_features` come without a shape or are of another one.
    """
    if not prompts:
        return []
    samples = sampling.num_samples
    if limits is None:
        limits = np.full((len(prompts), samples), sampling.max_new_tokens, np.int32)
    elif limits.shape != (len(prompts), samples) or limits.min() < 1 or limits.max() > sampling.max_new_tokens:
        raise ValueError(
            f"limits must be {(len(prompts), samples)} numbers from 1 to max_new_tokens, {sampling.max_new_tokens}; "
            f"they have shape {limits.shape} and go from {limits.min()} to {limits.max()}"
        )
    if keys is None:
        if sampling.temperature > 0:
            raise ValueError("sampling at a temperature needs keys; see mindjax.inference.sampler.sampling_keys")
        keys = jax.random.key(0)
        key_data = np.broadcast_to(np.asarray(jax.random.key_data(keys)), (len(prompts), samples, 2))
    elif keys.shape != (len(prompts), samples):
        raise ValueError(f"keys have shape {keys.shape}; give one per prompt and sample, {(len(prompts), samples)}")
    else:
        key_data = np.asarray(jax.random.key_data(keys))
    if shape is None:
        if vision_features is not None:
            raise ValueError("vision_features need the shape that they were encoded in")
        rows = bucket(min(len(prompts), max(1, max_rows // samples)), 1)
        rows = rows_for(rows, parallel)
        shape = prompt_shape([size_of(prompt) for prompt in prompts], rows, config)
    capacity = bucket(sampling.max_new_tokens, 16)
    longest_cycle = bucket(sampling.repeat_window, 8) if sampling.repeat_window else 0
    controls = _Controls.of(sampling)
    if vision_features is not None:
        expected, given = table_size(len(prompts), shape), vision_features.tokens.shape[0]
        if expected != given:
            raise ValueError(f"vision_features have {given} tokens, the prompts in this shape {expected}")

    completions: list[list[Completion]] = []
    for start, batch in zip(range(0, len(prompts), shape.rows), prompt_batches(prompts, shape), strict=True):
        chunk = prompts[start : start + shape.rows]
        chunk_keys = np.zeros((shape.rows, *key_data.shape[1:]), key_data.dtype)
        chunk_keys[: len(chunk)] = key_data[start : start + len(chunk)]
        chunk_limits = np.ones((shape.rows, samples), np.int32)
        chunk_limits[: len(chunk)] = limits[start : start + len(chunk)]
        positions = np.zeros(shape.rows, np.int32)
        positions[: len(chunk)] = [prompt.next_position for prompt in chunk]
        features = vision_features
        if features is None:
            features = encode_pictures(params, config, [batch], parallel)
        else:
            batch = offset_index(batch, table_size(start, shape))
        settings = {"capacity": capacity, "longest_cycle": longest_cycle, "impl": str(jax.random.key_impl(keys))}
        if parallel is None:
            prefix, hidden = _prefill(params, replace(batch, vision=None), features, config=config)
            result = _decode(
                params, prefix, hidden, positions, chunk_keys, chunk_limits, controls, config=config, **settings
            )
        else:
            run = _spread(config, parallel, **settings)
            result = run(params, replace(batch, vision=None), features, positions, chunk_keys, chunk_limits, controls)
        answers = jax.device_get(result)
        for p in range(len(chunk)):
            completions.append([
                Completion(
                    tuple(answers.tokens[row, : answers.lengths[row]].tolist()),
                    tuple(answers.logprobs[row, : answers.lengths[row]].tolist()),
                    FINISH_REASONS[answers.reasons[row]],
                )
                for row in range(p * samples, (p + 1) * samples)
            ])  # fmt: skip
    return completions


def rows_for(rows: int, parallel: Parallel | None) -> int:
    """The least number of prompts of a batch, not below `rows`, that the devices share evenly."""
    shards = 1 if parallel is None else parallel.layout.batch_shards
    return -(-rows // shards) * shards


@lru_cache(maxsize=8)
def _spread(
    config: ModelConfig, parallel: Parallel, *, capacity: int, longest_cycle: int, impl: str
) -> Callable[..., _Answers]:
    """`_prefill` and `_decode` on many devices, each with its prompts and its part of the model.

    Raises:
      ValueError: the layout splits what sampling does not.
    """
    layout = parallel.layout
    if layout.fsdp * layout.stage * layout.sequence > 1:
        raise ValueError(f"layout {layout}: sampling is spread over data, expert and tensor; set the others to 1")
    links = replace(parallel.links, split_tokens=False)  # a new token a row cannot be split

    def local(
        params: Params,
        batch: Batch,
        features: VisionFeatures | None,
        positions: Array,
        key_data: Array,
        limits: Array,
        controls: _Controls,
    ) -> _Answers:
        prefix, hidden = prefill(params, batch, features, config=config, links=links)
        return decode(
            params, prefix, hidden, positions, key_data, limits, controls,
            config=config, capacity=capacity, longest_cycle=longest_cycle, impl=impl, links=links,
        )  # fmt: skip

    def run(params: Params, *inputs: Any) -> _Answers:
        rows, whole = PartitionSpec(BATCH), PartitionSpec()
        params, specs = cut_params(params, parameter_axes(logical_axes(config), config, parallel), config, parallel)
        call = parallel.spmd(
            lambda params, *rest: local(whole_gate_up(params, layout), *rest),
            in_specs=(specs, rows, whole, rows, rows, rows, whole),
            out_specs=rows,
        )
        return jax.lax.with_sharding_constraint(call(params, *inputs), NamedSharding(parallel.mesh, whole))

    return jax.jit(run)


def prefill(
    params: Params,
    batch: Batch,
    vision_features: VisionFeatures | None,
    *,
    config: ModelConfig,
    links: Links = ONE_DEVICE,
) -> tuple[Prefix, Array]:
    """The prompts' cache, and the hidden state [P, H] that predicts the first new token."""
    output = forward(params, config, batch, vision_features=vision_features, keep_kv=True, links=links)
    last = jnp.maximum(jnp.sum(batch.segment_ids != 0, axis=1, dtype=jnp.int32) - 1, 0)
    hidden = jnp.take_along_axis(output.hidden, last[:, None, None], axis=1)[:, 0]
    return Prefix.from_prefill(output.state, batch.segment_ids), hidden


def decode(
    params: Params,
    prefix: Prefix,
    hidden: Array,
    positions: Array,
    key_data: Array,
    limits: Array,
    controls: _Controls,
    *,
    config: ModelConfig,
    capacity: int,
    longest_cycle: int,
    impl: str,
    links: Links = ONE_DEVICE,
) -> _Answers:
    """Samples until every row is done, and leaves rows behind that are.

    Args:
      prefix, hidden: of `_prefill`.
      positions: [P] int32, where the generated tokens of a prompt continue.
      key_data: [P, N, ...] of the rows.
      limits: [P, N] int32, the most tokens of an answer.
      longest_cycle: what `controls.repeats` may ask for at most; 0 compiles no detection.
      links: to the other devices; rows, heads and capacity are then this device's.

    Returns:
      of all P x N rows.
    """
    prompts, samples = key_data.shape[:2]
    rows = prompts * samples
    keys = jax.random.wrap_key_data(key_data.reshape(rows, -1), impl=impl)
    positions, limits = jnp.repeat(positions, samples), limits.reshape(rows)
    exists = jnp.repeat(jnp.any(prefix.segment_ids != 0, axis=1), samples)
    banned = (config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id)

    def draw(state: _State, scores: Array) -> _State:
        """Adds a token to every row that is not done."""
        row, step, answers = state.generated.row, state.step, state.answers
        token, logprob = draw_token(
            scores, keys[row], step, temperature=controls.temperature, top_k=controls.top_k, top_p=controls.top_p,
            banned=banned,
        )  # fmt: skip
        reason = jnp.any(token[:, None] == controls.stop_token_ids[None], axis=1).astype(jnp.int32)
        cycles = state.cycles
        if cycles is not None:
            cycles = cycles.add(token)
            # Never a stop token as well: it would have ended the answer when it first came.
            reason = jnp.where(cycles.found(*controls.repeats), 2, reason)
        reason = jnp.where(state.done, answers.reasons, reason)
        token = jnp.where(state.done, 0, token)
        logprob = jnp.where(state.done, jnp.float32(0), logprob)
        return _State(
            step=step + 1,
            token=token,
            done=state.done | (reason > 0) | (step + 1 >= limits[row]),
            answers=_Answers(
                tokens=jax.lax.dynamic_update_slice(answers.tokens, token[:, None], (0, step)),
                logprobs=jax.lax.dynamic_update_slice(answers.logprobs, logprob[:, None], (0, step)),
                lengths=answers.lengths + (~state.done).astype(jnp.int32),
                reasons=reason,
            ),
            generated=state.generated,
            cycles=cycles,
        )

    def advance(state: _State) -> _State:
        """The newest tokens pass the model, and the next ones are drawn."""
        index = state.step - 1
        hidden, generated = _decode_step(
            params,
            config,
            state.token,
            positions[state.generated.row] + index,
            state.done,
            prefix,
            state.generated,
            index,
            links,
        )
        return draw(replace(state, generated=generated), logits(params, hidden, links))

    empty = _State(
        step=jnp.int32(0),
        token=jnp.zeros(rows, jnp.int32),
        done=~exists,
        answers=_Answers(
            tokens=jnp.zeros((rows, capacity), jnp.int32),
            logprobs=jnp.zeros((rows, capacity), jnp.float32),
            lengths=jnp.zeros(rows, jnp.int32),
            reasons=jnp.zeros(rows, jnp.int32),
        ),
        generated=Generated.empty(prefix, samples, capacity),
        cycles=Cycles.empty(rows, longest_cycle) if longest_cycle else None,
    )
    # The samples of a prompt draw their first token from the same scores.
    state = draw(empty, jnp.repeat(logits(params, hidden, links), samples, axis=0))
    answers, left = state.answers, rows
    while left:
        fewer = left // 2 if left // 2 >= LEAST_ROWS else 0
        state = jax.lax.while_loop(partial(_more_than, fewer, links), advance, state)
        answers = _written(answers, state) if left < rows else state.answers
        state, left = state.keep(fewer) if fewer else state, fewer
    return answers


def _written(answers: _Answers, state: _State) -> _Answers:
    """The answers of all rows with those of the rows in `state`."""
    row = state.generated.row
    return jax.tree.map(lambda old, new: old.at[row].set(new), answers, state.answers)


_prefill = jax.jit(prefill, static_argnames=("config", "links"))
_decode = jax.jit(decode, static_argnames=("config", "capacity", "longest_cycle", "impl", "links"))


def _more_than(rows: int, links: Links, state: _State) -> Array:
    """Whether more than so many rows are not done; devices that share experts go on together."""
    left = jnp.sum(~state.done, dtype=jnp.int32)
    return links.largest(left, "expert") > rows


def _decode_step(
    params: Params,
    config: ModelConfig,
    tokens: Array,
    positions: Array,
    done: Array,
    prefix: Prefix,
    generated: Generated,
    index: Array,
    links: Links,
) -> tuple[Array, Generated]:
    """One token per row through all layers, the same layers that train; the cache travels as the scan's carry.

    Args:
      tokens, positions, done: [R].
      index: scalar, the place of these tokens among the generated ones.

    Returns:
      hidden [R, H] after the final norm, and the cache with these tokens.
    """
    x = embed(params["text"]["embed"], tokens[:, None], links)
    rope = text_rope(jnp.broadcast_to(positions[:, None, None], (*positions.shape, 1, 3)), config.text)
    segments = (~done).astype(jnp.int32)[:, None]  # finished rows are padding: no expert sees them

    sliced, whole = params["text"]["layers"], lambda p, _: p
    if links == ONE_DEVICE:
        sliced, whole = in_place(sliced)

    def block(carry: tuple[Array, Generated], layer: tuple[Any, Array]) -> Any:
        x, cache = carry
        p, number = whole(*layer), layer[1]

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, Generated]:
            return decode_attention(q, k, v, prefix, cache, number, index)

        x, _, cache = decoder_layer(p, x, rope, segments, config.text, attend, links)
        return (x, cache), None

    numbers = jnp.arange(config.text.num_hidden_layers, dtype=jnp.int32)
    (x, generated), _ = scan_layers(block, (x, generated), (sliced, numbers))
    return rms_norm(x[:, 0], params["text"]["norm"], config.text.rms_norm_eps), generated
