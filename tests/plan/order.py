"""Processor seconds of real steps on 8 virtual CPU devices: `python -m tests.plan.order LAYOUT...` prints JSON."""

from __future__ import annotations

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from mindjax.models import qwen3_vl
from mindjax.models.catalog import CATALOG
from mindjax.plan.compile import batch_shapes
from mindjax.plan.cost import Job
from mindjax.sft.train import SFTLoss
from mindjax.train.optimizer import OptimizerConfig
from mindjax.train.state import TrainState
from mindjax.train.step import train_step
from sharding.layout import Layout
from sharding.parallel import Parallel

MODEL = CATALOG["tiny"]


def job(layout: str) -> Job:
    return Job(MODEL, Layout.parse(layout), batch=32, length=256, remat="full")


def seconds(job: Job, steps: int = 3) -> float:
    """Of the processor, in all threads: other work on the machine does not count."""
    parallel = Parallel.of(job.layout)
    assert parallel is not None
    params = qwen3_vl.init(job.model, jax.random.key(0))
    state = TrainState.create(params, OptimizerConfig(), jax.random.key(0), qwen3_vl.shardings(job.model, parallel))
    rng = np.random.default_rng(0)

    def fill(shape: jax.ShapeDtypeStruct) -> jax.Array:
        ones = shape.dtype == jnp.float32
        values = np.ones(shape.shape, np.float32) if ones else np.full(shape.shape, 1, np.int32)
        return jax.device_put(values, shape.sharding)

    shapes = batch_shapes(job, parallel.mesh)
    batch = jax.tree.map(fill, shapes)
    tokens = jax.device_put(rng.integers(0, 1000, shapes.tokens.shape).astype(np.int32), shapes.tokens.sharding)
    nowhere = jax.device_put(np.full(shapes.tokens.shape, -1, np.int32), shapes.tokens.sharding)
    batch = type(batch)(tokens, batch.positions, batch.segment_ids, batch.loss_mask, nowhere)
    step = train_step(SFTLoss(job.model, "token", job.remat, parallel), OptimizerConfig(), "float32")
    state, metrics = step(state, batch, 1e-3)
    jax.block_until_ready(metrics)
    started = time.process_time()
    for _ in range(steps):
        state, metrics = step(state, batch, 1e-3)
        jax.block_until_ready((state, metrics))
    assert np.isfinite(float(metrics["loss"][0]))
    return (time.process_time() - started) / steps


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(json.dumps([name, seconds(job(name))]), flush=True)
