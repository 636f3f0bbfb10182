"""Our forward and its gradients against transformers on torch CPU, on random checkpoints that transformers saves."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from mindjax.config import ModelConfig
from mindjax.models import hf_weights, qwen3_vl
from tests.parity.reference import (
    DENSE,
    MOE,
    Piece,
    Rows,
    build,
    load_gradients,
    relative_errors,
    transformers_model,
    with_text,
    with_vision,
)

LOGITS_ATOL = 1e-4
GRADIENT_RTOL = 1e-4

CASES: dict[str, list[list[Piece]]] = {
    "non_square_images": [[5, ("image", 2, 6), 4], [3, ("image", 8, 4), 6]],
    "three_images_in_a_row": [[2, ("image", 4, 4), ("image", 2, 2), ("image", 6, 4), 5]],
    "image_first": [[("image", 4, 6), 7], [("image", 2, 4), 3]],
    "two_videos_of_different_length": [[4, ("video", 3, 4, 4), 2, ("video", 1, 2, 6), 5]],
    "image_and_video": [[3, ("image", 4, 2), 2, ("video", 2, 4, 4), 4, ("image", 2, 2), 3]],
    "left_padded_batch": [[20], [2, ("image", 4, 4), 3], [6, ("video", 2, 2, 2), 1]],
    "text_only": [[12], [7]],
}
MIXTURE = [[3, ("image", 4, 6), 2, ("video", 2, 4, 2), 9], [6, ("image", 2, 2), 8], [11]]


@pytest.fixture(scope="module", params=["dense", "moe"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """A transformers model, its configuration, and its weights as we read them from what it saved."""
    return _pair(DENSE if request.param == "dense" else MOE, tmp_path_factory.mktemp(request.param))


def _pair(config: ModelConfig, folder: Path) -> tuple[PreTrainedModel, ModelConfig, dict[str, Any]]:
    model = transformers_model(config, folder)
    layout = "transformers" if config.text.num_experts else None
    return model, config, hf_weights.load(folder, config, dtype=jnp.float32, layout=layout)


@partial(jax.jit, static_argnums=1)
def our_logits(params: dict[str, Any], config: ModelConfig, batch: Any) -> jax.Array:
    return qwen3_vl.logits(params, qwen3_vl.forward(params, config, batch).hidden)


def assert_logits_equal(model: PreTrainedModel, config: ModelConfig, params: dict[str, Any], rows: Rows) -> None:
    with torch.no_grad():
        theirs = model(**rows.inputs).logits.numpy()
    real = np.asarray(rows.batch.segment_ids) > 0
    ours = np.asarray(our_logits(params, config, rows.batch))
    assert theirs[real].std() >= 1.0
    np.testing.assert_allclose(ours[real], theirs[real], rtol=0, atol=LOGITS_ATOL)


@pytest.mark.parametrize("case", CASES)
def test_logits(pair: tuple[Any, ...], case: str, strict: None) -> None:
    model, config, params = pair
    assert_logits_equal(model, config, params, build(model, config, CASES[case]))


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        partial(with_vision, deepstack_visual_indexes=(3, 0, 1)),
        partial(with_vision, deepstack_visual_indexes=(2,)),
        partial(with_vision, deepstack_visual_indexes=()),
        partial(with_text, mrope_section=(4, 7, 5)),
        partial(with_text, mrope_section=(10, 2, 4)),
    ],
    ids=["deepstack_unordered", "deepstack_one", "deepstack_none", "mrope_wide", "mrope_narrow"],
)
def test_odd_configurations(change: Any, moe: bool, tmp_path: Path) -> None:
    model, config, params = _pair(change(MOE if moe else DENSE), tmp_path)
    assert_logits_equal(model, config, params, build(model, config, MIXTURE))


def test_router_without_renormalisation(tmp_path: Path) -> None:
    """transformers' Qwen3-VL-MoE always renormalises; its Qwen3-MoE router, same weights, can do without."""
    config = with_text(MOE, norm_topk_prob=False)
    model, config, params = _pair(config, tmp_path)
    text = config.text
    router_config = Qwen3MoeConfig(
        num_experts=text.num_experts, num_experts_per_tok=text.num_experts_per_tok, norm_topk_prob=False,
        hidden_size=text.hidden_size,
    )  # fmt: skip
    for layer in model.model.language_model.layers:
        router = Qwen3MoeTopKRouter(router_config)
        router.weight = layer.mlp.gate.weight
        layer.mlp.gate = router
    assert_logits_equal(model, config, params, build(model, config, MIXTURE))


def test_packed_row_equals_its_parts(pair: tuple[Any, ...]) -> None:
    """Two conversations in one row, each with vision, against transformers on each alone."""
    model, config, params = pair
    parts = [[4, ("image", 4, 4), 6], [2, ("video", 2, 2, 4), 5]]
    together = build(model, config, parts, seed=3)
    lengths = together.inputs["attention_mask"].sum(1).tolist()
    real = np.asarray(together.batch.segment_ids) > 0

    def pack(field: jax.Array) -> jax.Array:
        return jnp.asarray(np.concatenate([np.asarray(field)[row][real[row]] for row in range(2)])[None])

    batch = together.batch
    packed = replace(
        batch,
        tokens=pack(batch.tokens),
        positions=pack(batch.positions),
        vision_index=pack(batch.vision_index),
        loss_mask=pack(batch.loss_mask),
        segment_ids=jnp.repeat(jnp.array([[2, 1]], jnp.int32), jnp.array(lengths), axis=1),
    )
    with torch.no_grad():
        theirs = model(**together.inputs).logits.numpy()
    expected = np.concatenate([theirs[row][real[row]] for row in range(2)])
    ours = np.asarray(our_logits(params, config, packed))[0]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=LOGITS_ATOL)


@pytest.mark.parametrize(
    "remat", ["none", "full", pytest.param(("qkv", "attention", "mlp_hidden"), marks=pytest.mark.prove)], ids=str
)
def test_gradients_of_every_parameter(pair: tuple[Any, ...], remat: Any, tmp_path: Path, strict: None) -> None:
    """With recompute too: it must change memory, never a number."""
    model, config, params = pair
    rows = build(model, config, MIXTURE, seed=1)
    theirs = _torch_gradients(model, config, rows, tmp_path)

    @jax.jit
    def loss(params: dict[str, Any]) -> jax.Array:
        return -(qwen3_vl.token_logprobs(params, config, rows.batch, remat=remat).logp * rows.batch.loss_mask).sum()

    errors = relative_errors(jax.grad(loss)(params), theirs)
    assert max(errors.values()) < GRADIENT_RTOL, sorted(errors.items(), key=lambda item: -item[1])[:5]


def test_gradients_of_some_tokens(pair: tuple[Any, ...], tmp_path: Path, strict: None) -> None:
    """Of those that a mask names; the others are 0 and take no part."""
    model, config, params = pair
    rows = build(model, config, MIXTURE, seed=1)
    mask = (np.random.default_rng(0).random(rows.batch.tokens.shape) < 0.4).astype(np.float32)
    theirs = _torch_gradients(model, config, rows, tmp_path, mask)

    @jax.jit
    def loss(params: dict[str, Any]) -> jax.Array:
        return -qwen3_vl.token_logprobs(params, config, rows.batch, mask=mask).logp.sum()

    errors = relative_errors(jax.grad(loss)(params), theirs)
    assert max(errors.values()) < GRADIENT_RTOL, sorted(errors.items(), key=lambda item: -item[1])[:5]


def _torch_gradients(
    model: PreTrainedModel, config: ModelConfig, rows: Rows, folder: Path, wanted: np.ndarray | None = None
) -> dict[str, Any]:
    model.zero_grad()
    logp = model(**rows.inputs).logits.log_softmax(-1)[:, :-1]
    logp = logp.gather(-1, rows.inputs["input_ids"][:, 1:, None])[..., 0]
    mask = rows.inputs["attention_mask"]
    weights = mask[:, 1:] * mask[:, :-1] * (1 if wanted is None else torch.from_numpy(wanted)[:, 1:])
    (-(logp * weights).sum()).backward()
    return load_gradients(model, config, folder)


def test_bfloat16(pair: tuple[Any, ...]) -> None:
    """bf16 against the float32 truth: at most 1.25 times as far from it as transformers' own bf16 is.

    No absolute bound is honest here: bf16 keeps 8 bits, and which way a sum rounds depends on its order. What can
    be asked is that we lose no more to bf16 than the reference implementation does: in root mean square for a token, in
    the median over tokens, for a near tie of the router that falls the other way changes a token altogether, and to
    which side that happens is chance (the ratio of sums lies between 0.3 and 2 over seeds, that of medians below 1.1).
    """
    model, config, params = pair
    rows = build(model, config, MIXTURE, seed=2)
    real = np.asarray(rows.batch.segment_ids) > 0
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in rows.inputs.items()}
    with torch.no_grad():
        truth = model(**rows.inputs).logits.numpy()[real]
        theirs = copy.deepcopy(model).bfloat16()(**half).logits.float().numpy()[real]
    ours = np.asarray(our_logits(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), config, rows.batch))[
        real
    ]

    def typical_error(values: np.ndarray) -> float:
        return float(np.median(np.sqrt(np.mean((values - truth) ** 2, axis=-1))))

    assert typical_error(ours) < 1.25 * typical_error(theirs), (typical_error(ours), typical_error(theirs))
