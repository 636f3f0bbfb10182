"""Run by test_layouts.py in a process with eight CPU devices: one model, one batch, one device against a mesh."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mindjax.config import ModelConfig, TextConfig, VisionConfig
from mindjax.models import hf_weights, qwen3_vl
from mindjax.types import Batch, VisionInputs
from sharding.mesh import make_mesh
from sharding.rules import sharding_for, tree_shardings

DENSE = ModelConfig(
    TextConfig(64, 32, 64, 3, 4, 2, 16, (4, 2, 2)),
    VisionConfig(3, 16, 32, 2, 32, (0, 2), num_position_embeddings=16, patch_size=2),
    image_token_id=60,
    video_token_id=61,
    vision_start_token_id=62,
    vision_end_token_id=63,
)
MOE = replace(DENSE, text=replace(DENSE.text, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24))


def random_params(config: ModelConfig) -> dict[str, Any]:
    """Weights of scale 1 / sqrt(fan in), so that every tensor matters and the router's choices are clear."""
    rng = np.random.default_rng(3)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        scale = 0.5 if leaf.ndim < 2 else leaf.shape[-2] ** -0.5
        return (scale * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree.map(draw, qwen3_vl.abstract_params(config))


def random_batch(config: ModelConfig) -> Batch:
    """Eight rows of 16 tokens: two segments each and padding; the second begins with an image of 4 x 4 patches."""
    rng = np.random.default_rng(5)
    rows, time, patches = 8, 16, 16
    tokens = rng.integers(0, 60, (rows, time), np.int32)
    segments = np.tile(np.repeat(np.int32([1, 2, 0]), [5, 9, 2]), (rows, 1))
    positions = np.concatenate([np.arange(5), np.arange(9), np.zeros(2)]).astype(np.int32)
    vision_index = np.full((rows, time), -1, np.int32)
    vision_index[:, 6:10] = np.arange(rows * 4).reshape(rows, 4)  # four merged tokens a row
    tokens[:, 6:10] = config.image_token_id
    grid = np.stack(np.meshgrid(np.arange(4), np.arange(4), indexing="ij"), -1)
    grid = grid.reshape(2, 2, 2, 2, 2).swapaxes(1, 2).reshape(patches, 2)
    coordinates = np.concatenate([grid, np.full_like(grid, 4)], -1).astype(np.int32)
    vision = VisionInputs(
        rng.standard_normal((rows, patches, config.vision.patch_dim)).astype(np.float32),
        np.tile(coordinates, (rows, 1, 1)),
        np.ones((rows, patches), np.int32),
    )
    loss_mask = (segments > 0).astype(np.float32) * (vision_index < 0)
    return Batch(tokens, np.tile(positions[:, None], (rows, 1, 3)), segments, loss_mask, vision_index, vision)


@partial(jax.jit, static_argnums=1)
def loss_and_gradients(params: dict[str, Any], config: ModelConfig, batch: Batch) -> tuple[jax.Array, Any]:
    def loss(params: dict[str, Any]) -> jax.Array:
        out = qwen3_vl.token_logprobs(params, config, batch)
        total = -jnp.sum(out.logp * batch.loss_mask) / jnp.sum(batch.loss_mask)
        if out.router is not None:
            total = total + 0.01 * jnp.sum(out.router.aux_sum) / jnp.sum(out.router.aux_count)
        return total

    return jax.value_and_grad(loss)(params)


def distances(ours: Any, theirs: Any) -> dict[str, float]:
    flat, _ = jax.tree_util.tree_flatten_with_path(ours)
    return {
        jax.tree_util.keystr(path): float(np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b))
        for (path, a), b in zip(flat, jax.tree.leaves(jax.device_get(theirs)), strict=True)
    }


def main() -> None:
    kind, sizes, folder = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
    config = DENSE if kind == "dense" else MOE
    params, batch = random_params(config), random_batch(config)
    loss, gradients = loss_and_gradients(params, config, batch)

    mesh = make_mesh(sizes)
    rows = jax.tree.map(lambda leaf: jax.device_put(leaf, sharding_for(("batch",), mesh)), batch)
    # Onto the mesh through a file, as a run does.
    hf_weights.save(folder, config, params, layout="published", max_shard_bytes=50_000)
    sharded = hf_weights.load(folder, config, dtype="float32", mesh=mesh)
    layouts = tree_shardings(qwen3_vl.logical_axes(config), mesh)
    assert jax.tree.all(jax.tree.map(lambda leaf, layout: leaf.sharding == layout, sharded, layouts))
    jax.tree.map(np.testing.assert_array_equal, sharded, params)
    largest = max(jax.tree.leaves(sharded), key=lambda leaf: leaf.size)

    mesh_loss, mesh_gradients = loss_and_gradients(sharded, config, rows)
    hf_weights.save(folder, config, sharded)  # a sharded save
    again = hf_weights.load(folder, config, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, again, params)
    print(
        json.dumps(
            {
                "loss": abs(float(mesh_loss) - float(loss)) / abs(float(loss)),
                "gradients": distances(mesh_gradients, gradients),
                "smallest_norm": min(float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(gradients)),
                "shards": len({str(shard.index) for shard in largest.addressable_shards}),
            }
        )
    )


if __name__ == "__main__":
    main()
