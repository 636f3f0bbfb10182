"""Run by test_layouts.py in a process with many CPU devices: one model, one batch, one device against layouts.

Reads cases, one JSON object a line, and answers each with a line.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mindjax.config import ModelConfig, TextConfig, VisionConfig
from mindjax.dpo.train import DPOLoss, PairBatch
from mindjax.losses.off_policy import OffPolicyConfig
from mindjax.models import hf_weights, qwen3_vl
from mindjax.rl.objective import GSPOLoss
from mindjax.rl.rollout import PolicyBatch
from mindjax.sft.train import SFTLoss
from mindjax.types import Batch, LossOutput, VisionInputs
from sharding.layout import Layout
from sharding.parallel import Parallel
from sharding.remat import Remat

# Five layers are more than stages divide, two key/value heads fewer than four devices on `tensor` need.
DENSE = ModelConfig(
    TextConfig(64, 32, 64, 5, 8, 2, 16, (4, 2, 2)),
    VisionConfig(3, 16, 32, 2, 32, (0, 2), num_position_embeddings=16, patch_size=2),
    image_token_id=60,
    video_token_id=61,
    vision_start_token_id=62,
    vision_end_token_id=63,
)
MOE = replace(
    DENSE,
    text=replace(DENSE.text, num_hidden_layers=4, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24),
)


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


def objective(kind: str, config: ModelConfig, parallel: Parallel | None, remat: Remat) -> tuple[Any, Any]:
    """The loss of a trainer, and what it takes beside the batch."""
    batch, rng = random_batch(config), np.random.default_rng(7)
    rows = len(batch.tokens)
    numbers = np.arange(rows, dtype=np.int32)[:, None]
    trained = np.asarray(batch.loss_mask) > 0
    first, second = (np.asarray(batch.segment_ids) == number for number in (1, 2))
    if kind == "sft":
        return SFTLoss(config, "sample", remat, parallel), batch
    if kind == "dpo":
        replies = np.where(first & trained, 2 * numbers + 1, np.where(second & trained, 2 * numbers + 2, 0))
        reference = rng.standard_normal((rows, 2)).astype(np.float32) - 20
        pairs = PairBatch(batch, replies.astype(np.int32), np.ones(rows, np.float32), reference)
        return DPOLoss(config, 0.1, remat, parallel), pairs
    responses = np.where(second & trained, numbers + 1, 0).astype(np.int32)
    policy = replace(batch, loss_mask=(responses > 0).astype(np.float32))
    old, rollout = (rng.standard_normal(batch.tokens.shape).astype(np.float32) * 0.1 - 4.2 for _ in range(2))
    scores = rng.standard_normal(rows).astype(np.float32)
    loss = GSPOLoss(
        config, 0.5, 0.5, "sequence", 0.8, remat, off_policy=OffPolicyConfig(level="sequence"), parallel=parallel
    )
    return loss, PolicyBatch(policy, responses, scores, rollout, old)


def loss_and_gradients(loss: Any, params: dict[str, Any], batch: Any) -> tuple[jax.Array, Any]:
    """The sum of the loss's terms, each over its count, as the training step has it."""

    def total(params: dict[str, Any]) -> jax.Array:
        terms = loss(params, batch)
        terms = (terms,) if isinstance(terms, LossOutput) else terms
        # The published coefficient of the router's term is too small for its gradient to be seen.
        return sum((scale * term.mean for scale, term in zip((1.0, 10.0), terms)), jnp.float32(0))  # noqa: B905

    return jax.jit(jax.value_and_grad(total))(params)


def distances(ours: Any, theirs: Any) -> dict[str, float]:
    flat, _ = jax.tree_util.tree_flatten_with_path(ours)
    return {
        jax.tree_util.keystr(path): float(np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b))
        for (path, a), b in zip(flat, jax.tree.leaves(jax.device_get(theirs)), strict=True)
    }


def main() -> None:
    expected: dict[tuple[str, str], Any] = {}
    for line in sys.stdin:
        case = json.loads(line)
        config = DENSE if case["model"] == "dense" else MOE
        params, remat = random_params(config), case.get("remat", "none")
        remat = tuple(remat) if isinstance(remat, list) else remat
        key = case["model"], case["objective"]
        if key not in expected:
            expected[key] = loss_and_gradients(*_loss_first(objective(case["objective"], config, None, "none"), params))
        loss, gradients = expected[key]

        layout = Layout.parse(case["layout"])
        parallel = Parallel.of(layout, jax.devices()[: layout.devices])
        assert parallel is not None
        placed = through_files(Path(case["folder"]), config, params, parallel)
        largest = max(jax.tree.leaves(placed["text"]["layers"]), key=lambda leaf: leaf.size)
        found = loss_and_gradients(*_loss_first(objective(case["objective"], config, parallel, remat), placed))
        answer = {
            "loss": abs(float(found[0]) - float(loss)) / abs(float(loss)),
            "gradients": distances(found[1], gradients),
            "smallest_norm": min(float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(gradients)),
            "shards": len({str(shard.index) for shard in largest.addressable_shards}),
        }
        print(json.dumps(answer), flush=True)


def through_files(folder: Path, config: ModelConfig, params: dict[str, Any], parallel: Parallel) -> dict[str, Any]:
    """The parameters loaded onto the mesh from a checkpoint, as a run does; the mesh writes the same one again."""
    hf_weights.save(folder / "one", config, params, layout="published", max_shard_bytes=50_000)
    placed = hf_weights.load(folder / "one", config, dtype="float32", parallel=parallel)
    hf_weights.save(folder / "mesh", config, placed)
    for again in (placed, hf_weights.load(folder / "mesh", config, dtype="float32")):
        jax.tree.map(np.testing.assert_array_equal, again, params)
    assert jax.tree.map(lambda leaf: leaf.sharding, placed) == qwen3_vl.shardings(config, parallel)
    return placed


def _loss_first(of: tuple[Any, Any], params: dict[str, Any]) -> tuple[Any, dict[str, Any], Any]:
    return of[0], params, of[1]


if __name__ == "__main__":
    main()
