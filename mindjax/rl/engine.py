"""What samples answers: the protocol of rollout engines, and the native one.

An engine holds weights of its own, which the trainer replaces in place; the loop does not know which one it talks to.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

from mindjax.config import ModelConfig
from mindjax.data.packing import SampleSize
from mindjax.data.render import Rendered
from mindjax.inference.pictures import encode_pictures, prompt_batches, table_rows
from mindjax.inference.sampler import SamplingConfig, generate, prompt_shape
from mindjax.models.vision import VisionFeatures
from mindjax.rl.config import RolloutConfig
from mindjax.types import Array, Completion

Params = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """A conversation to go on with.

    Attributes:
      rendered: it, up to where the next token is sampled.
      images: its pictures in order, as they stand in the messages, for engines that process pixels themselves.
    """

    rendered: Rendered
    images: tuple[Any, ...] = ()


class RolloutEngine(Protocol):
    """Samples answers from weights that it is given."""

    def update(self, params: Params, version: int) -> None:
        """Replaces the weights; whatever old ones computed (prefixes, pictures) is forgotten. Returns when done."""

    def generate(self, requests: Sequence[Request], sampling: SamplingConfig, keys: Array) -> list[list[Completion]]:
        """`sampling.num_samples` answers to each request, log-probabilities as `mindjax.inference.sampler.generate`.

        Args:
          keys: [requests, num_samples] PRNG keys; an answer depends on its key, the request and the weights alone.
        """

    def close(self) -> None:
        """Lets go of processes and memory; may be called again."""


@dataclass(frozen=True)
class Pictures:
    """What the vision encoder made of the pictures of some requests.

    Attributes:
      table: features of all of them.
      rows: for each request, the rows of the table that are its own, in token order.
    """

    table: VisionFeatures
    rows: Sequence[np.ndarray]


class NativeEngine:
    """Samples in this process, on the trainer's device or on devices of its own.

    Args:
      model: shapes of the model.
      sizes: of all prompts that will come, so that one shape holds them; None takes the smallest bucket of each call.
      config: see `RolloutConfig`.
      rows: prompts that are prefilled together.

    Raises:
      ValueError: there are not so many devices.
    """

    def __init__(self, model: ModelConfig, sizes: Sequence[SampleSize] | None, config: RolloutConfig, *, rows: int):
        here = jax.local_devices()
        if config.devices >= len(here):
            raise ValueError(
                f"rl: rollout.devices is {config.devices}, but there are {len(here)} devices, and the trainer needs "
                "one; 0 shares the trainer's"
            )
        self._model, self._config = model, config
        self._shape = None if sizes is None else prompt_shape(sizes, rows, model)
        self._devices = here[-config.devices :] if config.devices else []
        self._params: list[Params] = []

    def update(self, params: Params, version: int) -> None:
        if self._config.weights != "full":
            from mindjax.inference import quantized

            params = quantized.quantize_params(params, self._model, self._config.weights)
        self._params = [jax.device_put(params, device) for device in self._devices] or [params]
        jax.block_until_ready(self._params)

    def encode(self, requests: Sequence[Request]) -> Pictures | None:
        """The pictures of the requests, for `generate` and for the trainer; None where there are none, or where they
        are encoded on several devices."""
        if self._shape is None or len(self._params) > 1:
            return None
        batches = list(prompt_batches([request.rendered for request in requests], self._shape))
        table = encode_pictures(self._params[0], self._model, batches)
        return None if table is None else Pictures(table, table_rows(batches, self._shape))

    def generate(
        self, requests: Sequence[Request], sampling: SamplingConfig, keys: Array, pictures: Pictures | None = None
    ) -> list[list[Completion]]:
        """See `RolloutEngine`; `pictures` are those of `encode`, encoded here where they are missing."""
        prompts, count = [request.rendered for request in requests], len(self._params)

        def part(number: int) -> list[list[Completion]]:
            mine = slice(number * len(prompts) // count, (number + 1) * len(prompts) // count)
            return generate(
                self._params[number],
                self._model,
                prompts[mine],
                sampling=sampling,
                keys=keys[mine],
                shape=self._shape,
                vision_features=None if pictures is None else pictures.table,
            )

        if count == 1:
            return part(0)
        with ThreadPoolExecutor(count) as pool:
            return [answers for answered in pool.map(part, range(count)) for answers in answered]

    def close(self) -> None:
        self._params = []
