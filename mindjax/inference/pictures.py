"""The pictures of many prompts, encoded once: for sampling, and for whatever trains on the answers.

M merged vision tokens of a batch, H hidden size. The features of all batches lie in one table, batch after batch, so
that a row of it has one number, `batch * M + place`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from mindjax.config import ModelConfig
from mindjax.data.packing import BatchShape, pack
from mindjax.models import qwen3_vl
from mindjax.models.qwen3_vl import Params, encode_vision
from mindjax.models.vision import VisionFeatures
from mindjax.types import Batch, VisionInputs
from sharding.mesh import AXES
from sharding.parallel import Parallel
from sharding.rules import partition_spec

if TYPE_CHECKING:
    from mindjax.data.render import Rendered


def prompt_batches(prompts: Sequence[Rendered], shape: BatchShape) -> Iterator[Batch]:
    """One prompt a row, `shape.rows` prompts a batch, in order: the batches that `generate` prefills.

    Raises:
      ValueError: a prompt does not fit the shape.
    """
    for start in range(0, len(prompts), shape.rows):
        yield pack([[prompt] for prompt in prompts[start : start + shape.rows]], shape)


def table_size(prompts: int, shape: BatchShape) -> int:
    """Rows of the table of so many prompts in batches of this shape."""
    return -(-prompts // shape.rows) * (shape.vision_rows * shape.vision_length // shape.merge_size**2)


def encode_pictures(
    params: Params, config: ModelConfig, batches: Iterable[Batch], parallel: Parallel | None = None
) -> VisionFeatures | None:
    """The table of all their pictures, tokens [batches x M, H], in the dtype of the parameters.

    None where the shape of the batches has no place for pictures. With several devices each encodes some of them, and
    the table is whole on all.
    """
    encode = partial(_encode, config=config) if parallel is None else _spread_encode(config, parallel)
    encoded = [encode(params, batch.vision) for batch in batches if batch.vision is not None]
    if len(encoded) <= 1:
        return encoded[0] if encoded else None
    return VisionFeatures(
        jnp.concatenate([features.tokens for features in encoded]),
        jnp.concatenate([features.deepstack for features in encoded], axis=1),
    )


@partial(jax.jit, static_argnames="config")
def _encode(params: Params, vision: VisionInputs, *, config: ModelConfig) -> VisionFeatures:
    return encode_vision(params, config, vision)


@lru_cache(maxsize=8)
def _spread_encode(config: ModelConfig, parallel: Parallel) -> Callable[[Params, VisionInputs], VisionFeatures]:
    devices, merge = parallel.layout.devices, config.vision.merge_unit
    axes = qwen3_vl.logical_axes(config)["vision"]

    def local(params: Params, vision: VisionInputs) -> VisionFeatures:
        features = encode_vision({"vision": params}, config, vision, links=parallel.links, axes={"vision": axes})
        return VisionFeatures(
            parallel.links.gather(features.tokens, AXES, 0), parallel.links.gather(features.deepstack, AXES, 1)
        )

    def encode(params: Params, vision: VisionInputs) -> VisionFeatures:
        rows, length = vision.segment_ids.shape
        padded = jax.tree.map(lambda x: jnp.pad(x, [(0, -rows % devices)] + [(0, 0)] * (x.ndim - 1)), vision)
        specs = jax.tree.map(partition_spec, axes, is_leaf=lambda node: isinstance(node, tuple))
        run = parallel.spmd(local, in_specs=(specs, PartitionSpec(AXES)), out_specs=PartitionSpec())
        features = run(params["vision"], padded)
        count = rows * length // merge
        return VisionFeatures(features.tokens[:count], features.deepstack[:, :count])

    return jax.jit(encode)


def table_rows(batches: Iterable[Batch], shape: BatchShape) -> list[np.ndarray]:
    """For each row of each batch, padding rows too, where its pictures' tokens lie in the table: int32, in token order.

    A prompt of several images has those of the first one first, (rows x columns / merge^2) of them.
    """
    placed = (offset_index(batch, table_size(i * shape.rows, shape)) for i, batch in enumerate(batches))
    return [row[row >= 0] for batch in placed for row in np.asarray(batch.vision_index)]


def offset_index(batch: Batch, first: int) -> Batch:
    """The batch with its pictures' tokens from row `first` of a table on."""
    index = np.asarray(batch.vision_index)
    moved: Any = np.where(index >= 0, index + np.int32(first), index)
    return replace(batch, vision_index=moved)


def read_table(batch: Batch, rows: Sequence[np.ndarray]) -> Batch:
    """The batch, without its patches, reading its pictures from the table (`forward(vision_features=...)`).

    Args:
      batch: packed from the same prompts, with answers behind them, or without, in any arrangement.
      rows: of `table_rows`, one for each conversation in the batch: first those of row 0, in order, then of row 1.

    Raises:
      ValueError: the conversations have another number of picture tokens in all.
    """
    index: Any = np.array(batch.vision_index)
    places, found = index >= 0, np.concatenate([np.zeros(0, np.int32), *rows])
    if places.sum() != len(found):
        raise ValueError(f"the batch has {places.sum()} places for picture tokens, the rows of the table {len(found)}")
    index[places] = found
    return replace(batch, vision_index=index, vision=None)
