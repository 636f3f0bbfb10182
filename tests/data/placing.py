"""Program of test_placing.py: batches placed on 8 devices from what each process has, compared with the parts.

    python -m tests.data.placing LAYOUT

It runs as one process or as several; the last line is JSON, of process 0.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mindjax.data.packing import pack
from mindjax.data.placing import global_batch, shards_of_process
from mindjax.dpo.train import Pair, pack_pairs
from mindjax.rl.rollout import PolicyBatch
from sharding.layout import BATCH, Layout
from sharding.processes import is_first, start
from tests.train import tiny

MICRO, UNIT = 2, 4


def part_of(shard: int) -> dict[str, Any]:
    """One of each kind of batch, stacked over micro-batches; every process could make every part, and makes its own."""
    rng = np.random.default_rng(shard)
    made = []
    for _ in range(MICRO):
        samples = [tiny.sample(rng, 12, ((2, 4),)), tiny.sample(rng, 15, ((4, 4),)), tiny.sample(rng, 14)]
        batch = pack([samples[:2], samples[2:]], tiny.SHAPE)
        pairs = [Pair(sample, sample) for sample in samples[:2]]
        ids = rng.integers(0, 5, batch.tokens.shape).astype(np.int32)
        policy: Any = PolicyBatch(batch, ids, rng.normal(size=4).astype(np.float32), batch.loss_mask)
        pair = pack_pairs([[0], [1]], pairs, tiny.SHAPE, rng.normal(size=(2, 2)).astype(np.float32))
        made.append({"batch": batch, "pairs": pair, "policy": policy, "plain": np.full((3, 1), shard, np.int32)})
    return jax.tree.map(lambda *leaves: np.stack(leaves), *made)


def meanings(part: dict[str, Any]) -> dict[str, np.ndarray]:
    """What every number stands for, by row: equal for parts and for the whole where the numbering is right."""
    found: dict[str, list[np.ndarray]] = {"patches": [], "reference": [], "advantages": [], "tokens": [], "plain": []}
    for micro in range(MICRO):
        take = lambda leaf: np.asarray(leaf)[micro]  # noqa: B023, E731
        batch, pairs, policy = (jax.tree.map(take, part[key]) for key in ("batch", "pairs", "policy"))
        patches = batch.vision.patches.reshape(-1, UNIT * batch.vision.patches.shape[-1])
        for index in (batch.vision_index, pairs.batch.vision_index, policy.batch.vision_index):
            source = (
                patches
                if index is not pairs.batch.vision_index
                else pairs.batch.vision.patches.reshape(-1, patches.shape[-1])
            )
            found["patches"].append(np.where(index[..., None] >= 0, source[index], 0.0))
        of_reply = np.concatenate([[0.0], pairs.reference.reshape(-1)])
        found["reference"].append(of_reply[pairs.reply_ids])
        found["advantages"].append(np.concatenate([[0.0], policy.advantages])[policy.response_ids])
        found["tokens"].append(batch.tokens)
        found["plain"].append(take(part["plain"]))
    return {key: np.stack(values) for key, values in found.items()}


def main(text: str) -> None:
    start()
    layout = Layout.parse(text)
    mesh, shards = layout.mesh(), layout.batch_shards
    mine = shards_of_process(mesh)
    placed = global_batch({shard: part_of(shard) for shard in mine}, shards, mesh, 2)
    split = {leaf.sharding.spec[1] for leaf in jax.tree.leaves(placed)}
    # Gathered to every host, where devices of one batch shard must agree.
    whole = jax.tree.map(lambda leaf: multihost_utils.process_allgather(leaf, tiled=True), placed)
    got = meanings(whole)
    wanted = [meanings(part_of(shard)) for shard in range(shards)]
    wrong = [key for key in got if not np.array_equal(got[key], np.concatenate([w[key] for w in wanted], axis=1))]
    seen = sum(int((value != 0).sum()) for value in got.values())
    if is_first():
        rows = placed["batch"].tokens.addressable_shards[0].data.shape[1]
        result = {"wrong": wrong, "mine": mine, "split": [list(s) for s in split] == [list(BATCH)], "rows": rows}
        print(json.dumps({**result, "seen": seen, "processes": jax.process_count()}))


if __name__ == "__main__":
    main(sys.argv[1])
