"""The mixture of experts against transformers and NumPy, its padding, and its balance loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_cuda import jax_fused, library
from mindjax.config import TextConfig
from mindjax.models.moe import moe

CONFIG = TextConfig(
    vocab_size=32, hidden_size=24, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, mrope_section=(2, 1, 1), num_experts=6, num_experts_per_tok=2,
    moe_intermediate_size=10,
)  # fmt: skip
ROWS, TIME = 2, 9


def random_params(seed: int = 0) -> dict[str, np.ndarray]:
    rng, c = np.random.default_rng(seed), CONFIG
    shapes = {
        "router": (c.hidden_size, c.num_experts),
        "gate_up": (c.num_experts, c.hidden_size, 2 * c.moe_intermediate_size),
        "down": (c.num_experts, c.moe_intermediate_size, c.hidden_size),
    }
    return {name: (rng.normal(size=shape) / shape[-2] ** 0.5).astype(np.float32) for name, shape in shapes.items()}


def random_x(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(ROWS, TIME, CONFIG.hidden_size)).astype(np.float32)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))


def reference(p: dict[str, np.ndarray], x: np.ndarray, segments: np.ndarray, config: TextConfig):
    """Float64, one token at a time: (y, load, auxiliary loss sum, count)."""
    p = {name: value.astype(np.float64) for name, value in p.items()}
    y, load = np.zeros(x.shape), np.zeros(config.num_experts)
    probabilities = np.zeros((*x.shape[:2], config.num_experts))
    taken = np.zeros_like(probabilities)
    for b, t in np.ndindex(x.shape[:2]):
        if not segments[b, t]:
            continue
        logits = x[b, t].astype(np.float64) @ p["router"]
        probability = np.exp(logits - logits.max())
        probability /= probability.sum()
        probabilities[b, t] = probability
        chosen = np.argsort(-probability)[: config.num_experts_per_tok]
        weights = probability[chosen] / (probability[chosen].sum() if config.norm_topk_prob else 1)
        for expert, weight in zip(chosen, weights, strict=True):
            gate, up = np.split(x[b, t] @ p["gate_up"][expert], 2)
            y[b, t] += weight * ((gate / (1 + np.exp(-gate)) * up) @ p["down"][expert])
            load[expert] += 1
            taken[b, t, expert] = 1
    total, count = 0.0, 0
    for b in range(x.shape[0]):
        for segment in set(segments[b].tolist()) - {0}:
            inside = segments[b] == segment
            total += config.num_experts * (taken[b, inside].mean(0) * probabilities[b, inside].mean(0)).sum()
            count += 1
    return y, load, total, count


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_matches_float64(norm_topk_prob: bool) -> None:
    config = replace(CONFIG, norm_topk_prob=norm_topk_prob)
    p, x = random_params(), random_x()
    segments = np.array([[1] * 4 + [2] * 3 + [0] * 2, [0, 0] + [5] * 7], np.int32)
    y, stats = jax.jit(moe, static_argnums=3)(p, x, segments, config)
    expected, load, total, count = reference(p, x, segments, config)
    assert relative(y, expected) < 1e-6
    np.testing.assert_array_equal(stats.load, load)
    np.testing.assert_allclose(stats.aux_sum, total, rtol=1e-6)
    assert float(stats.aux_count) == count == 3


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_matches_transformers_with_all_gradients(norm_topk_prob: bool) -> None:
    torch = pytest.importorskip("torch")
    if norm_topk_prob:
        from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig as HFConfig
        from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextSparseMoeBlock as Block
    else:  # the only one of the two with the flag
        from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig as HFConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock as Block
    config = replace(CONFIG, norm_topk_prob=norm_topk_prob)
    block = Block(
        HFConfig(
            hidden_size=config.hidden_size,
            num_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            moe_intermediate_size=config.moe_intermediate_size,
            norm_topk_prob=norm_topk_prob,
        )
    )
    p, x, weight = random_params(), random_x(), random_x(2)
    with torch.no_grad():
        block.gate.weight.copy_(torch.from_numpy(p["router"].T.copy()))
        block.experts.gate_up_proj.copy_(torch.from_numpy(p["gate_up"].swapaxes(1, 2).copy()))
        block.experts.down_proj.copy_(torch.from_numpy(p["down"].swapaxes(1, 2).copy()))
    x_torch = torch.from_numpy(x).requires_grad_()
    y_torch = block(x_torch)
    (y_torch * torch.from_numpy(weight)).sum().backward()
    theirs = {
        "router": block.gate.weight.grad.numpy().T,
        "gate_up": block.experts.gate_up_proj.grad.numpy().swapaxes(1, 2),
        "down": block.experts.down_proj.grad.numpy().swapaxes(1, 2),
    }

    def loss(p: dict, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, _ = moe(p, x, jnp.ones((ROWS, TIME), jnp.int32), config)
        return (y * weight).sum(), y

    (_, y), (dp, dx) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(p, x)
    assert relative(y, y_torch.detach().numpy()) < 1e-5
    assert relative(dx, x_torch.grad.numpy()) < 1e-5
    for name, gradient in theirs.items():
        assert relative(dp[name], gradient) < 1e-5, name


def test_padding_neither_routes_nor_counts() -> None:
    p, x = random_params(), random_x()
    segments = np.array([[1] * 6 + [0] * 3, [1] * 9], np.int32)
    poisoned = np.where((segments > 0)[..., None], x, np.nan).astype(np.float32)

    def loss(p: dict, x: jax.Array) -> tuple[jax.Array, tuple]:
        y, stats = moe(p, x, segments, CONFIG)
        return (y**2).sum() + stats.aux_sum, (y, stats)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (clean, (y, stats)), gradient = run(p, x)
    # Activations of padding may be anything finite; NaN stays in its own token.
    (other, (y_other, stats_other)), gradient_other = run(p, np.where((segments > 0)[..., None], x, 1e3))
    assert float(clean) == float(other)
    assert (np.asarray(y)[segments == 0] == 0).all()
    np.testing.assert_array_equal(y, y_other)
    np.testing.assert_array_equal(stats.load, stats_other.load)
    jax.tree.map(np.testing.assert_array_equal, gradient, gradient_other)
    y_nan, _ = jax.jit(moe, static_argnums=3)(p, poisoned, segments, CONFIG)
    np.testing.assert_array_equal(y_nan, y)


def test_balance_loss_adds_up_over_rows_and_reaches_the_router() -> None:
    p, x = random_params(), random_x()
    segments = np.array([[1] * 4 + [2] * 5, [1] * 8 + [0]], np.int32)

    def aux(p: dict, x: jax.Array, segments: jax.Array) -> jax.Array:
        return moe(p, x, segments, CONFIG)[1].aux_sum

    whole, gradient = jax.value_and_grad(aux)(p, x, segments)
    parts = [jax.value_and_grad(aux)(p, x[b : b + 1], segments[b : b + 1]) for b in range(ROWS)]
    np.testing.assert_allclose(whole, sum(value for value, _ in parts), rtol=1e-6)
    assert relative(sum(g["router"] for _, g in parts), gradient["router"]) < 1e-5
    assert np.linalg.norm(gradient["router"]) > 1e-3
    assert not np.any(gradient["down"])


def test_balanced_router_costs_the_number_of_choices() -> None:
    p = random_params() | {"router": np.zeros((CONFIG.hidden_size, CONFIG.num_experts), np.float32)}
    _, stats = moe(p, random_x(), jnp.ones((ROWS, TIME), jnp.int32), CONFIG)
    np.testing.assert_allclose(stats.aux_sum / stats.aux_count, CONFIG.num_experts_per_tok, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 200])
def test_kernels_and_jnp_agree(tokens: int, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not jax_fused.usable():
        pytest.skip(library.load("cpu").problem)
    rng = np.random.default_rng(0)
    p = {name: jnp.asarray(value, dtype) for name, value in random_params().items()}
    x, g = (jnp.asarray(rng.normal(size=(3, tokens, CONFIG.hidden_size)), dtype) for _ in range(2))
    segments = jnp.asarray(np.sort(rng.integers(0, 4, (3, tokens)), axis=1)[:, ::-1], jnp.int32)

    def run() -> Any:
        jax.clear_caches()
        run = jax.jit(lambda p, x: moe(p, x, segments, CONFIG))
        (y, stats), pull = jax.vjp(run, p, x)
        return y, stats, pull((g, replace(jax.tree.map(jnp.zeros_like, stats), aux_sum=jnp.float32(1))))

    kernels = run()
    monkeypatch.setattr(jax_fused, "usable", lambda: False)
    plain = run()
    np.testing.assert_array_equal(kernels[1].load, plain[1].load)
    bound = 1e-5 if dtype == jnp.float32 else 2e-2
    for ours, theirs in zip(jax.tree.leaves(kernels), jax.tree.leaves(plain), strict=True):
        wide = np.asarray(theirs, np.float64)
        assert np.linalg.norm(np.asarray(ours, np.float64) - wide) <= bound * np.linalg.norm(wide)
    jax.clear_caches()
