"""Operations with a CPU kernel of their own, by the kernel and by jnp, against torch in float64, gradients included."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kernels_cuda import jax_fused
from mindjax.inference.cache import Generated, Prefix, decode_attention
from mindjax.ops import activation, dispatch, norm, rotary
from mindjax.ops.attention import attention
from mindjax.ops.levels import put_level
from mindjax.ops.matmul import matmul

EPS = 1e-6
# ||difference|| / ||reference||: float32 sums of some hundred terms, and tails of activations that cancel; bfloat16
# rounds a few times by 2^-9.
BOUNDS = {jnp.float32: 3e-6, jnp.bfloat16: 1e-2}
pytestmark = pytest.mark.usefixtures("path")
dtypes = pytest.mark.parametrize("dtype", BOUNDS, ids=["float32", "bfloat16"])


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def check(
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    inputs: Sequence[np.ndarray],
    dtype: Any,
) -> None:
    """Value and gradients of all `inputs` under a random cotangent."""
    arrays = [jnp.asarray(x, dtype) for x in inputs]
    value, pull = jax.vjp(ours, *arrays)
    cotangent = jnp.asarray(normal(99, *value.shape), dtype)
    gradients = pull(cotangent)
    tensors = [torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in arrays]
    wanted = theirs(*tensors)
    wanted.backward(torch.tensor(np.asarray(cotangent, np.float64)))
    pairs = [(value, wanted.detach()), *((g, t.grad) for g, t in zip(gradients, tensors, strict=True))]
    for place, (got, reference) in enumerate(pairs):
        assert got.dtype == dtype
        error = np.linalg.norm(np.asarray(got, np.float64) - reference.numpy()) / np.linalg.norm(reference.numpy())
        assert error < BOUNDS[dtype], f"{'value' if not place else f'gradient {place}'}: {error:.2e}"


@dtypes
@pytest.mark.parametrize("size", [7, 24, 128, 200])
def test_norms(size: int, dtype: Any) -> None:
    x, scale, bias = normal(0, 3, 45, size) + 0.5, normal(1, size), normal(2, size)
    check(lambda x, s: norm.rms_norm(x, s, EPS), lambda x, s: F.rms_norm(x, (size,), s, EPS), [x, scale], dtype)
    theirs = lambda x, s, b: F.layer_norm(x, (size,), s, b, EPS)  # noqa: E731
    check(lambda x, s, b: norm.layer_norm(x, s, b, EPS), theirs, [x, scale, bias], dtype)


def test_rms_norm_rounds_before_the_scale() -> None:
    """As published: in bfloat16 the normalised value is rounded, then the product again."""
    x, scale = (jnp.asarray(normal(i, 64, 48)[: 64 if i else 1], jnp.bfloat16) for i in (1, 0))
    wide = np.asarray(x, np.float64)
    normalised = jnp.asarray(wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPS), jnp.bfloat16)
    np.testing.assert_array_equal(norm.rms_norm(x, scale[0], EPS), normalised * scale)


@dtypes
@pytest.mark.parametrize("size", [5, 96])
def test_activations(size: int, dtype: Any) -> None:
    # Wide, so that both tails are met.
    x, y = 8 * normal(0, 4, 33, size), normal(1, 4, 33, size)
    check(activation.silu_product, lambda x, y: F.silu(x) * y, [x, y], dtype)
    if dtype == jnp.float32:
        bias = normal(2, size)
        for ours, theirs in ((True, "tanh"), (False, "none")):
            check(
                lambda x, b, how=ours: activation.bias_gelu(x, b, how),
                lambda x, b, how=theirs: F.gelu(x + b, approximate=how),
                [x, bias],
                dtype,
            )


@dtypes
@pytest.mark.parametrize("path", ["kernel"], indirect=True)
@pytest.mark.parametrize("size", [24, 80])
def test_a_row_does_not_depend_on_those_beside_it(size: int, dtype: Any, path: str) -> None:
    """Kernels take several rows together, and the last ones alone."""
    x, g, scale = (jnp.asarray(normal(i, *shape), dtype) for i, shape in enumerate(((7, size), (7, size), (size,))))

    def run(x: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
        plain, pull = jax.vjp(lambda x: norm.rms_norm(x, scale, EPS), x)
        centred, pull_centred = jax.vjp(lambda x: norm.layer_norm(x, scale, scale, EPS), x)
        return plain, *pull(g), centred, *pull_centred(g)

    for together, alone in zip(run(x, g), run(x[2:3], g[2:3]), strict=True):
        np.testing.assert_array_equal(together[2:3], alone)


def test_exact_gelu_to_its_ends() -> None:
    """Element by element: where gelu goes to 0, 1 + erf would have lost everything."""
    x = np.concatenate(
        [np.linspace(-12.5, 6, 1900), 1e-3 * np.linspace(-1, 1, 85), [-3e3, -1e30, -14, 14, 3e3, 1e30, 0]]
    )
    array, zero = jnp.asarray(x, jnp.float32)[None], jnp.zeros(len(x), jnp.float32)
    value, pull = jax.vjp(lambda x: activation.bias_gelu(x, zero, approximate=False), array)
    (slope,) = pull(jnp.ones_like(value))
    wide = torch.tensor(np.asarray(array, np.float64))
    below = torch.special.erfc(-wide / 2**0.5) / 2
    density = torch.exp(-(wide**2) / 2) / (2 * torch.pi) ** 0.5
    wanted, wanted_slope = (wide * below).numpy(), (below + wide * density).numpy()
    # x^2 / 2 in float32 is an exponent that is off by 2^-24 of itself, XLA's by several times that.
    bound = 5e-7 + 1.2e-7 * np.minimum(x**2, 200)
    difference = np.abs(np.asarray(value, np.float64) - wanted)
    assert (difference <= bound * np.abs(wanted) + 1e-37).all()
    assert (np.abs(np.asarray(slope, np.float64) - wanted_slope) <= 3e-7).all()


@dtypes
@pytest.mark.parametrize("approximate", [True, False])
def test_bias_gelu_of_a_float32_product(approximate: bool, dtype: Any) -> None:
    """The sum is rounded once: value and gradients are, to the bit, those of the rounded sum."""
    x, bias, g = jnp.asarray(3 * normal(0, 50, 104)), jnp.asarray(normal(1, 104), dtype), normal(2, 50, 104)
    total = (x + bias.astype(jnp.float32)).astype(dtype)
    value, pull = jax.vjp(lambda x, b: activation.bias_gelu(x, b, approximate), x, bias)
    wanted, pull_wanted = jax.vjp(lambda x, b: activation.bias_gelu(x, b, approximate), total, jnp.zeros_like(bias))
    np.testing.assert_array_equal(value, wanted)
    np.testing.assert_array_equal(activation.bias_gelu(x, bias, approximate), wanted)
    (dx, d_bias), (dx_wanted, d_bias_wanted) = (p(jnp.asarray(g, dtype)) for p in (pull, pull_wanted))
    assert (value.dtype, dx.dtype, d_bias.dtype) == (dtype, jnp.float32, dtype)
    np.testing.assert_array_equal(dx, dx_wanted.astype(jnp.float32))
    np.testing.assert_array_equal(d_bias, d_bias_wanted)


@dtypes
@pytest.mark.parametrize("size", [5, 96])
def test_swiglu(size: int, dtype: Any) -> None:
    def theirs(gate_up: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up * scale[:, None]

    def ours(gate_up: jax.Array, scale: jax.Array) -> jax.Array:
        return activation.swiglu(gate_up, scale.astype(jnp.float32))

    check(ours, theirs, [3 * normal(0, 133, 2 * size), normal(1, 133)], dtype)


@pytest.mark.parametrize("approximate", [True, False])
def test_bias_gelu_in_bfloat16(approximate: bool) -> None:
    """x + bias is rounded as a tensor of the model is: the reference starts from the rounded sum."""
    x, bias, g = (jnp.asarray(normal(i, 40, 96), jnp.bfloat16) for i in range(3))
    value, pull = jax.vjp(lambda x, b: activation.bias_gelu(x, b, approximate), x, bias[0])
    total = torch.tensor(np.asarray(x + bias[:1], np.float64), requires_grad=True)
    wanted_value = F.gelu(total, approximate="tanh" if approximate else "none")
    wanted_value.backward(torch.tensor(np.asarray(g, np.float64)))
    assert total.grad is not None
    difference = np.asarray(value, np.float64) - wanted_value.detach().numpy()
    assert np.linalg.norm(difference) < 1e-2 * np.linalg.norm(wanted_value.detach().numpy())
    for got, wanted in zip(pull(g), (total.grad.numpy(), total.grad.numpy().sum(0)), strict=True):
        assert np.linalg.norm(np.asarray(got, np.float64) - wanted) < 1e-2 * np.linalg.norm(wanted)
    assert value.dtype == jnp.bfloat16


@dtypes
@pytest.mark.parametrize("dim", [6, 64])
def test_rotation(dim: int, dtype: Any) -> None:
    x, angle = normal(0, 2, 9, 3, dim), normal(1, 2, 9, dim // 2)
    cos, sin = np.cos(angle), np.sin(angle)

    def theirs(x: torch.Tensor) -> torch.Tensor:
        c, s = (torch.tensor(part.astype(np.float64))[:, :, None].repeat(1, 1, 1, 2) for part in (cos, sin))
        first, second = x.chunk(2, dim=-1)
        return x * c + torch.cat([-second, first], dim=-1) * s

    check(lambda x: rotary.rotate(x, jnp.asarray(cos), jnp.asarray(sin)), theirs, [x], dtype)


def segments(batch: int, length: int) -> np.ndarray:
    """Several sequences a row, padding at the end; the last row is full."""
    rng = np.random.default_rng(3)
    rows = np.sort(rng.integers(0, 4, (batch, length)), axis=1)[:, ::-1]
    rows[-1] = 1
    return np.ascontiguousarray(rows, np.int32)


@dtypes
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
@pytest.mark.parametrize(
    "shape", [(2, 17, 4, 2, 24), (1, 200, 3, 1, 40), (3, 126, 4, 2, 64), (2, 1, 2, 2, 16)], ids=str
)
def test_attention(shape: tuple[int, ...], causal: bool, dtype: Any) -> None:
    batch, length, heads, kv_heads, dim = shape
    ids = segments(batch, length)
    q, k, v = normal(0, batch, length, heads, dim), *(normal(i, batch, length, kv_heads, dim) for i in (1, 2))
    real = torch.tensor(ids != 0)
    allowed = torch.tensor(ids[:, :, None] == ids[:, None, :]) & real[:, None]
    if causal:
        allowed &= torch.ones(length, length, dtype=torch.bool).tril()

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out = attention(q, k, v, q_segment_ids=jnp.asarray(ids), kv_segment_ids=jnp.asarray(ids), causal=causal)
        return jnp.where(jnp.asarray(ids)[:, :, None, None] != 0, out, 0)

    def theirs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # Rows of padding may see everything here; their answer is not compared.
        mask = (allowed | ~real[:, :, None])[:, None]
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, enable_gqa=True)
        return torch.where(real[:, :, None, None], out.transpose(1, 2), 0.0)

    if length == 1:  # weights are 1, and the gradients of q and k zero: nothing to compare relatively
        np.testing.assert_array_equal(ours(*(jnp.asarray(x, dtype) for x in (q, k, v))), jnp.asarray(v, dtype))
    else:
        check(ours, theirs, [q, k, v], dtype)


@dtypes
@pytest.mark.parametrize("shape", [(205, 77, 4, 2, 33), (31, 230, 7, 1, 88), (13, 5, 2, 2, 128)], ids=str)
@pytest.mark.parametrize("path", ["kernel"], indirect=True)
def test_attention_to_any_keys(shape: tuple[int, ...], dtype: Any, path: str) -> None:
    """Segments in any order, other keys than queries and limits that do not grow, each tensor against float64."""
    queries, keys, heads, kv_heads, dim = shape
    batch, rng = 3, np.random.default_rng(0)
    q_ids, kv_ids = (rng.integers(0, 4, (batch, size)).astype(np.int32) for size in (queries, keys))
    q_ids[1, 1::2] = 0
    q_ids[2], kv_ids[2] = 2, np.arange(keys) % 7 // 6 + 2
    q_index = rng.integers(-keys // 4, keys, queries).astype(np.int32)
    seen = (q_ids[:, :, None] == kv_ids[:, None]) & (q_ids != 0)[:, :, None]
    seen &= (np.arange(keys) <= q_index[:, None]) | (q_index < 0)[:, None]
    sizes = ((queries, heads), (keys, kv_heads), (keys, kv_heads), (queries, heads))
    q, k, v, g = (jnp.asarray(normal(i, batch, *size, dim), dtype) for i, size in enumerate(sizes))
    masks = tuple(jnp.asarray(x) for x in (q_ids, kv_ids, q_index))
    out, normaliser = jax_fused.attention(q, k, v, *masks)
    gradients = jax_fused.attention_grad(q, k, v, *masks, out, normaliser, g)

    tensors = [torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in (q, k, v)]
    wide = [x.repeat_interleave(heads // x.shape[2], 2) for x in tensors]
    scores = torch.einsum("btnd,bsnd->bnts", *wide[:2]) * dim**-0.5
    scores = scores.masked_fill(~torch.tensor(seen)[:, None], -torch.inf)
    blind = torch.tensor(~seen.any(2))[:, None, :, None]
    wanted = torch.einsum("bnts,bsnd->btnd", torch.where(blind, 0.0, scores).softmax(3).where(~blind, 0.0), wide[2])
    wanted.backward(torch.tensor(np.asarray(g, np.float64)))
    references = [wanted.detach(), *(x.grad for x in tensors)]
    for got, reference in zip((out, *gradients), references, strict=True):
        assert reference is not None
        difference = np.linalg.norm(np.asarray(got, np.float64) - reference.numpy())
        assert difference < BOUNDS[dtype] * np.linalg.norm(reference.numpy())
    total = np.asarray(scores.detach().logsumexp(3))
    total[np.isneginf(total)] = np.inf
    np.testing.assert_allclose(normaliser, total, rtol=1e-5, atol=1e-5)
    assert np.isinf(total).any() and not np.asarray(out)[~seen.any(2)].any()


@dtypes
def test_garbage_in_padding_changes_nothing(dtype: Any) -> None:
    ids = jnp.asarray([[1] * 20 + [0] * 13], jnp.int32)
    q, k, v = (jnp.asarray(normal(i, 1, 33, 2, 32), dtype) for i in range(3))
    run = lambda *xs: attention(*xs, q_segment_ids=ids, kv_segment_ids=ids, causal=True)[:, :20]  # noqa: E731
    clean, pull = jax.vjp(run, q, k, v)
    spoilt = [x.at[:, 20:].set(1e4) for x in (q, k, v)]
    dirty, pull_dirty = jax.vjp(run, *spoilt)
    np.testing.assert_array_equal(clean, dirty)
    g = jnp.ones_like(clean)
    for a, b in zip(pull(g), pull_dirty(g), strict=True):
        np.testing.assert_array_equal(a[:, :20], b[:, :20])
        assert not np.asarray(b[:, 20:], np.float32).any()


@dtypes
@pytest.mark.parametrize("kept", [[0, 1, 2, 3, 4, 5], [1, 4, 5]], ids=["all", "some"])
def test_decoding(kept: list[int], dtype: Any) -> None:
    """Three prompts of different length, two samples of each or what is left of them, in a cache of two layers."""
    # Groups of 7 heads are answered as 4, 2 and 1; 88 is four vectors, one and half of one.
    layers, prompts, samples, kv_heads, heads, dim, keys, capacity = 2, 3, 2, 2, 14, 88, 37, 16
    rows, step, layer = prompts * samples, 5, 1
    old = [jnp.asarray(normal(i, layers, prompts, kv_heads, keys, dim), dtype) for i in (0, 1)]
    ids = np.zeros((prompts, keys), np.int32)
    for prompt, length in enumerate((37, 20, 1)):
        ids[prompt, :length] = 1
    prefix = Prefix(*old, jnp.asarray(ids))
    cache = Generated.empty(prefix, samples, capacity)
    history = [jnp.asarray(normal(i, rows, step + 1, kv_heads, dim), dtype) for i in (2, 3)]
    for place in range(step):
        cache = cache.append(jnp.int32(layer), jnp.int32(place), *(part[:, place : place + 1] for part in history))
    cache, history = cache.keep(jnp.asarray(kept)), [part[jnp.asarray(kept)] for part in history]
    q = jnp.asarray(normal(4, len(kept), 1, heads, dim), dtype)
    new = [part[:, step:] for part in history]
    decode = jax.jit(lambda q, k, v, cache: decode_attention(
        q, k, v, prefix, cache, jnp.int32(layer), jnp.int32(step)))  # fmt: skip
    out, after = decode(q, *new, cache)

    wanted_cache = cache.append(jnp.int32(layer), jnp.int32(step), *new)
    np.testing.assert_array_equal(after.k, wanted_cache.k)
    np.testing.assert_array_equal(after.v, wanted_cache.v)
    for place, row in enumerate(kept):
        seen = int(ids[row // samples].sum())
        for head in range(heads):
            k, v = (
                np.concatenate(
                    [np.asarray(o[layer, row // samples, head // 7, :seen]), np.asarray(h[place, :, head // 7])]
                )
                for o, h in zip(old, history, strict=True)
            )
            scores = np.asarray(q[place, 0, head], np.float64) @ k.astype(np.float64).T / np.sqrt(dim)
            weights = np.exp(scores - scores.max())
            wanted = weights / weights.sum() @ v.astype(np.float64)
            error = np.linalg.norm(np.asarray(out[place, 0, head], np.float64) - wanted) / np.linalg.norm(wanted)
            assert error < BOUNDS[dtype]


@dtypes
@pytest.mark.parametrize("shape", [(1, 5, 3), (2, 63, 130, 65), (512, 128, 96)], ids=str)
def test_dense_product(shape: tuple[int, ...], dtype: Any) -> None:
    *lead, k, n = shape
    check(matmul, lambda x, w: x @ w, [normal(0, *lead, k), normal(1, k, n)], dtype)


def test_levels() -> None:
    """Against plain indexing, whose gradient JAX derives."""
    stack, x = jnp.asarray(normal(0, 3, 2, 5, 4)), jnp.asarray(normal(1, 2, 5, 4))
    plain_put = lambda stack, x, level: jnp.where((jnp.arange(3) == level)[:, None, None, None], x[None], stack)  # noqa: E731
    for level in (-1, 0, 2):
        got, pull = jax.vjp(lambda s, x, level=level: put_level(s, x, jnp.int32(level)), stack, x)
        wanted, plain = jax.vjp(lambda s, x, level=level: plain_put(s, x, level), stack, x)
        np.testing.assert_array_equal(got, wanted)
        jax.tree.map(np.testing.assert_array_equal, pull(stack), plain(stack))


def test_a_mesh_of_cpu_devices_takes_the_jnp_path(path: str) -> None:
    """XLA cannot divide a foreign call: with several devices the same operation must not contain one."""
    program = (
        "import jax, jax.numpy as jnp; from mindjax.ops.norm import rms_norm; x = jnp.ones((4, 8));"
        "text = jax.jit(lambda x: rms_norm(x, x[0], 1e-6)).lower(x).as_text(); print('custom_call' in text)"
    )
    for devices, wanted in ((1, "True"), (2, "False")):
        flags = f"--xla_force_host_platform_device_count={devices}"
        ran = subprocess.run([sys.executable, "-c", program], env=os.environ | {"XLA_FLAGS": flags}, text=True,
                             capture_output=True, check=True)  # fmt: skip
        assert ran.stdout.strip() == wanted


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512f"])
def test_lower_instruction_sets(isa: str, path: str) -> None:
    """The tests above, in a process whose library may use no more than that."""
    if path == "jnp" or os.environ.get("MINDJAX_CPU_ISA"):
        return
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "kernel and not isa", __file__],
        env=os.environ | {"MINDJAX_CPU_ISA": isa}, text=True, capture_output=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-3000:]


def test_dispatch_is_decided_by_the_library(path: str) -> None:
    out = dispatch.on_cpu(lambda x: x + 1, lambda x: x - 1, jnp.zeros(()))
    assert float(out) == (1 if path == "kernel" else -1)
