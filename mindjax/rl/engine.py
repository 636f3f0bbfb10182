"""What samples answers: the protocol of rollout engines, and the native one.

An engine holds weights of its own, which the trainer replaces in place; the loop does not know which one it talks to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import numpy as np

from mindjax.config import ModelConfig
from mindjax.data.packing import BatchShape
from mindjax.data.render import Rendered
from mindjax.inference.pictures import encode_pictures, prompt_batches, table_rows
from mindjax.inference.sampler import SamplingConfig, generate, rows_for
from mindjax.models import qwen3_vl
from mindjax.models.vision import VisionFeatures
from mindjax.rl.config import RolloutConfig
from mindjax.rl.shapes import smallest
from mindjax.types import Array, Completion
from sharding.parallel import Parallel
from sharding.reshard import reshard

Params = dict[str, Any]


class RolloutEngine(Protocol):
    """Samples answers from weights that it is given."""

    def update(self, params: Params, version: int) -> None:
        """Replaces the weights; whatever old ones computed (prefixes, pictures) is forgotten. Returns when done."""

    def generate(self, prompts: Sequence[Rendered], sampling: SamplingConfig, keys: Array) -> list[list[Completion]]:
        """`sampling.num_samples` answers to each prompt, log-probabilities as `mindjax.inference.sampler.generate`.

        Args:
          prompts: conversations up to where the next token is sampled.
          keys: [prompts, num_samples] PRNG keys; an answer depends on its key, the prompt and the weights alone.
        """

    def close(self) -> None:
        """Lets go of processes and memory; may be called again."""


@dataclass(frozen=True)
class Pictures:
    """What the vision encoder made of the pictures of some prompts.

    Attributes:
      table: features of all of them.
      rows: for each prompt, the rows of the table that are its own, in token order.
    """

    table: VisionFeatures
    rows: Sequence[np.ndarray]


class NativeEngine:
    """Samples in this process, on the trainer's device or on devices of its own.

    Args:
      model: shapes of the model.
      config: see `RolloutConfig`.
      parallel: devices to spread the sampling over; None is one.
      shapes: prefill shapes by the number of samples that a call asks for, rising, so that known ones are compiled once
        (`mindjax.rl.shapes`). A number that is not there takes the smallest bucket of each call.

    Raises:
      ValueError: there are not so many devices.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: RolloutConfig,
        shapes: Mapping[int, Sequence[BatchShape]],
        parallel: Parallel | None = None,
    ):
        here = jax.local_devices()
        if config.devices >= len(here):
            raise ValueError(
                f"rl: rollout.devices is {config.devices}, but there are {len(here)} devices, and the trainer needs "
                "one; 0 shares the trainer's"
            )
        self._model, self._config, self._parallel = model, config, parallel
        self._shapes = {
            samples: [replace(shape, rows=rows_for(shape.rows, parallel)) for shape in of_samples]
            for samples, of_samples in shapes.items()
        }
        self._devices = here[-config.devices :] if config.devices else []
        self._params: list[Params] = []

    def update(self, params: Params, version: int) -> None:
        if self._parallel is not None:
            params = reshard(params, qwen3_vl.shardings(self._model, self._parallel))
        if self._config.weights != "full":
            from mindjax.inference import quantized

            params = quantized.quantize_params(params, self._model, self._config.weights)
        self._params = [jax.device_put(params, device) for device in self._devices] or [params]
        jax.block_until_ready(self._params)

    def encode(self, prompts: Sequence[Rendered], samples: int) -> Pictures | None:
        """The pictures of the prompts, for `generate` with so many samples and for the trainer; None where there are
        none, or where they are encoded on several devices."""
        shape = self._shape(prompts, samples)
        if shape is None or len(self._params) > 1:
            return None
        batches = list(prompt_batches(prompts, shape))
        table = encode_pictures(self._params[0], self._model, batches, self._parallel)
        if self._devices:
            table = jax.device_put(table, jax.local_devices()[0])  # the trainer's
        return None if table is None else Pictures(table, table_rows(batches, shape))

    def generate(
        self, prompts: Sequence[Rendered], sampling: SamplingConfig, keys: Array, pictures: Pictures | None = None
    ) -> list[list[Completion]]:
        """See `RolloutEngine`; `pictures` are those of `encode`, encoded here where they are missing."""
        count = len(self._params)
        shape = self._shape(prompts, sampling.num_samples)
        table = None if pictures is None else pictures.table
        if table is not None and self._devices:
            table = jax.device_put(table, self._devices[0])

        def part(number: int) -> list[list[Completion]]:
            mine = slice(number * len(prompts) // count, (number + 1) * len(prompts) // count)
            return generate(
                self._params[number],
                self._model,
                prompts[mine],
                sampling=sampling,
                keys=keys[mine],
                shape=shape,
                vision_features=table,
                parallel=self._parallel,
            )

        if count == 1:
            return part(0)
        with ThreadPoolExecutor(count) as pool:
            return [answers for answered in pool.map(part, range(count)) for answers in answered]

    def _shape(self, prompts: Sequence[Rendered], samples: int) -> BatchShape | None:
        shapes = self._shapes.get(samples)
        return None if shapes is None else smallest(shapes, prompts)

    def close(self) -> None:
        self._params = []
