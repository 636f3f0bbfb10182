"""The CPU library's fused operations as JAX functions; no differentiation here. See include/launch_cpu.h."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_cuda import library

Array = jax.Array

TARGETS = (
    "linear",
    "attention",
    "attention_grad",
    "decode_attention",
    "rms_norm",
    "rms_norm_grad",
    "layer_norm",
    "layer_norm_grad",
    "silu_product",
    "silu_product_grad",
    "bias_gelu",
    "bias_gelu_grad",
    "sum_rows",
    "rope",
    "logprobs",
    "logprobs_grad",
    "choose_experts",
    "choose_experts_grad",
    "sort_by_expert",
    "expert_shares",
)


@cache
def available() -> bool:
    """Whether the CPU library is there."""
    handle = library.load("cpu").handle
    if handle is None or not hasattr(handle, "mjk_ffi_attention"):  # a build without JAX has no handlers
        return False
    for name in TARGETS:
        symbol = getattr(handle, f"mjk_ffi_{name}")
        jax.ffi.register_ffi_target(f"mjk_{name}", jax.ffi.pycapsule(symbol), platform="cpu")
    return True


def usable() -> bool:
    """Whether to use them: the library is there, and arrays are whole, for XLA cannot divide a foreign call.

    On a mesh of CPU devices the same operations in jnp are divided like on any other device.
    """
    return jax.device_count() == 1 and available()


def linear(x: Array, w: Array, bias: Array) -> Array:
    """x [..., K] by w [K, N] plus bias [N] float32, rounded once: [..., N]."""
    return _call("linear", jax.ShapeDtypeStruct((*x.shape[:-1], w.shape[1]), x.dtype))(x, w, bias)


def attention(
    q: Array, k: Array, v: Array, q_segment_ids: Array, kv_segment_ids: Array, q_index: Array
) -> tuple[Array, Array]:
    """(out [B, T, N, D], normaliser [B, N, T]) of q [B, T, N, D], k and v [B, S, K, D]."""
    batch, queries, heads, _ = q.shape
    shapes = (_like(q), jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32))
    return _call("attention", shapes)(q, k, v, q_segment_ids, kv_segment_ids, q_index)


def attention_grad(
    q: Array,
    k: Array,
    v: Array,
    q_segment_ids: Array,
    kv_segment_ids: Array,
    q_index: Array,
    out: Array,
    normaliser: Array,
    g: Array,
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv)"""
    call = _call("attention_grad", (_like(q), _like(k), _like(v)))
    return call(q, k, v, q_segment_ids, kv_segment_ids, q_index, out, normaliser, g)


def decode_attention(
    q: Array,
    k: Array,
    v: Array,
    prompt: tuple[Array, Array],
    own: tuple[Array, Array],
    segment_ids: Array,
    number: Array,
    layer: Array,
    step: Array,
) -> tuple[Array, tuple[Array, Array]]:
    """(what q attends to, `own` with k and v at `step` of `layer`, in place); see mjk_decode_attention.

    q [R, 1, H, D], k and v [R, 1, K, D]; `prompt` [L, P, K, S, D] each; `own` [L, R, K, C, D] each, which may hold
    two-byte floats as integers; `number` [R] is that of the row's prompt.
    """
    call = _call("decode_attention", (_like(q), _like(own[0]), _like(own[1])), aliases={5: 1, 6: 2})
    out, *own_after = call(q, k, v, *prompt, *own, segment_ids, number, layer, step)
    return out, tuple(own_after)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """[..., H] by scale [H]."""
    return _call("rms_norm", _like(x))(x, scale, eps=np.float32(eps))


def rms_norm_grad(x: Array, scale: Array, g: Array, eps: float) -> tuple[Array, Array]:
    """(dx in place of g, d_scale [H] float32)"""
    return _call("rms_norm_grad", (_like(x), _sum(scale)), aliases={2: 0})(x, scale, g, eps=np.float32(eps))


def layer_norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    """[..., H] by scale and bias [H]."""
    return _call("layer_norm", _like(x))(x, scale, bias, eps=np.float32(eps))


def layer_norm_grad(x: Array, scale: Array, g: Array, eps: float) -> tuple[Array, Array, Array]:
    """(dx in place of g, d_scale [H] float32, d_bias [H] float32)"""
    shapes = (_like(x), _sum(scale), _sum(scale))
    return _call("layer_norm_grad", shapes, aliases={2: 0})(x, scale, g, eps=np.float32(eps))


def silu_product(gate: Array, up: Array) -> Array:
    return _call("silu_product", _like(gate))(gate, up)


def silu_product_grad(gate: Array, up: Array, g: Array) -> tuple[Array, Array]:
    """(d_gate in place of g, d_up)"""
    return _call("silu_product_grad", (_like(gate), _like(up)), aliases={2: 0})(gate, up, g)


def bias_gelu(x: Array, bias: Array, exact: bool) -> Array:
    """gelu(x + bias), by tanh unless exact, of x [..., N], float32 or of the dtype of bias [N] and of the result."""
    return _bias_gelu(x, bias, exact, (0,))[0]


def bias_gelu_and_sum(x: Array, bias: Array, exact: bool) -> tuple[Array, Array]:
    """(bias_gelu, x + bias in the dtype of the bias)"""
    return _bias_gelu(x, bias, exact, x.shape)


def _bias_gelu(x: Array, bias: Array, exact: bool, shape_of_sum: tuple[int, ...]) -> tuple[Array, Array]:
    shapes = tuple(jax.ShapeDtypeStruct(shape, bias.dtype) for shape in (x.shape, shape_of_sum))
    return _call("bias_gelu", shapes)(x, bias, exact=exact)


def bias_gelu_grad(x: Array, bias: Array, g: Array, exact: bool) -> tuple[Array, Array]:
    """(dx in place of g, d_bias [N] float32)"""
    return _call("bias_gelu_grad", (_like(x), _sum(bias)), aliases={2: 0})(x, bias, g, exact=exact)


def sum_rows(x: Array) -> Array:
    """[..., N] summed over all but the last dimension, [N] float32."""
    return _call("sum_rows", jax.ShapeDtypeStruct(x.shape[-1:], jnp.float32))(x)


def rope(x: Array, cos: Array, sin: Array, sign: float) -> Array:
    """x [B, T, N, D] turned by cos, sin [B, T, D / 2], in place; sign -1 turns back."""
    return _call("rope", _like(x), aliases={0: 0})(x, cos, sin, sign=np.float32(sign))


def logprobs(logits: Array, targets: Array, temperature: Array, count: Array) -> tuple[Array, Array, Array]:
    """(log-probability of the target, entropy, normaliser), [N] each, of the first `count` rows of logits [N, V]."""
    return _call("logprobs", (_sum(targets),) * 3)(logits, targets, temperature, count)


def logprobs_grad(
    logits: Array,
    targets: Array,
    temperature: Array,
    count: Array,
    normaliser: Array,
    entropy: Array,
    d_logp: Array,
    d_entropy: Array,
    dtype: Any,
) -> Array:
    """d_logits [N, V] of that dtype, in place of logits where it is float32"""
    aliases = {0: 0} if dtype == jnp.float32 else None
    call = _call("logprobs_grad", jax.ShapeDtypeStruct(logits.shape, dtype), aliases)
    return call(logits, targets, temperature, count, normaliser, entropy, d_logp, d_entropy)


def choose_experts(logits: Array, segment_ids: Array, choices: int, normalise: bool) -> tuple[Array, Array, Array]:
    """(weights [N, k], chosen [N, k], probabilities [N, E]) of logits [N, E] and segment_ids [N]."""
    of_choice = (logits.shape[0], choices)
    shapes = (
        jax.ShapeDtypeStruct(of_choice, jnp.float32),
        jax.ShapeDtypeStruct(of_choice, jnp.int32),
        _like(logits),
    )
    return _call("choose_experts", shapes)(logits, segment_ids, normalise=normalise)


def choose_experts_grad(
    chosen: Array, probabilities: Array, d_weights: Array, d_probabilities: Array, normalise: bool
) -> Array:
    """d_logits [N, E]"""
    call = _call("choose_experts_grad", _like(probabilities))
    return call(chosen, probabilities, d_weights, d_probabilities, normalise=normalise)


def sort_by_expert(chosen: Array, weights: Array, experts: int) -> tuple[Array, Array, Array, Array]:
    """(token [N k], back [N, k], load [E], scales [N k]) of chosen and weights [N, k]."""
    sorted_ = jax.ShapeDtypeStruct((chosen.size,), jnp.int32)
    load = jax.ShapeDtypeStruct((experts,), jnp.int32)
    scales = jax.ShapeDtypeStruct((chosen.size,), jnp.float32)
    return _call("sort_by_expert", (sorted_, _like(chosen), load, scales))(chosen, weights)


def expert_shares(chosen: Array, segment_ids: Array, experts: int) -> Array:
    """[B, T, E] of chosen [B, T, k] and segment_ids [B, T]."""
    shares = jax.ShapeDtypeStruct((*segment_ids.shape, experts), jnp.float32)
    return _call("expert_shares", shares)(chosen, segment_ids)


def _call(name: str, shapes: Any, aliases: dict[int, int] | None = None) -> Any:
    return jax.ffi.ffi_call(f"mjk_{name}", shapes, vmap_method="sequential", input_output_aliases=aliases)


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _sum(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jnp.float32)
