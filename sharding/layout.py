"""How a job is spread over devices: the size of every mesh axis, and how pipeline and context parallelism run."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import jax
from jax.sharding import Mesh

from sharding.mesh import AXES, make_mesh

# Mesh axes that split the batch. Expert devices share the dense work, so they split it too.
BATCH = ("data", "fsdp", "expert")


@dataclass(frozen=True)
class Layout:
    """A layout is config alone: the model, the losses and the data are the same under every one.

    Attributes:
      data: replicas; gradients are summed once an update.
      fsdp: splits the batch, and every weight: gathered layer by layer for use, its gradient scattered back.
      stage: pipeline stages, each with its share of the layers.
      sequence: splits the tokens of a row.
      expert: splits the batch, and the experts: tokens travel to the experts that they chose.
      tensor: splits heads, hidden units and the vocabulary; tokens between the matrices of a layer.
      pipeline_microbatches: parts that the rows of a device are cut into for the pipeline; 0 is one for each stage.
        The bubble is (stage - 1) / (pipeline_rounds * pipeline_microbatches + stage - 1) of a step.
      pipeline_rounds: times that a row passes all stages, a share of the layers each time (a circular schedule).
      context: how attention sees a split row: "ulysses" trades tokens for heads, "ring" sends keys and values round,
        rows cut so that every device has equal causal work.
      dispatch: how tokens reach experts: "gather" brings all of them to every device on `expert`, "ragged" each to the
        experts that it chose, "auto" takes what moves less. See `sharding.expert`.
    """

    data: int = 1
    fsdp: int = 1
    stage: int = 1
    sequence: int = 1
    expert: int = 1
    tensor: int = 1
    pipeline_microbatches: int = 0
    pipeline_rounds: int = 1
    context: Literal["ulysses", "ring"] = "ulysses"
    dispatch: Literal["auto", "gather", "ragged"] = "auto"

    def __post_init__(self) -> None:
        for name in (*AXES, "pipeline_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"layout: {name} must be 1 or more, not {getattr(self, name)}")
        if self.pipeline_microbatches and self.pipeline_microbatches < self.stage:
            raise ValueError(
                f"layout: {self.pipeline_microbatches} pipeline_microbatches leave some of {self.stage} stages idle "
                f"always; give at least {self.stage}, or 0 for that many"
            )
        if self.stage == 1 and (self.pipeline_microbatches > 1 or self.pipeline_rounds > 1):
            raise ValueError("layout: pipeline_microbatches and pipeline_rounds do nothing with one stage")
        if self.context not in ("ulysses", "ring"):
            raise ValueError(f"layout: context must be 'ulysses' or 'ring', not {self.context!r}")
        if self.dispatch not in ("auto", "gather", "ragged"):
            raise ValueError(f"layout: dispatch must be 'auto', 'gather' or 'ragged', not {self.dispatch!r}")

    @classmethod
    def parse(cls, text: str) -> Layout:
        """From "fsdp=8,tensor=4": names of fields and their values.

        Raises:
          ValueError: for an unknown field, or a value of the wrong kind.
        """
        known = {field.name for field in fields(cls)}
        values: dict[str, int | str] = {}
        for part in filter(None, text.split(",")):
            name, equals, value = part.strip().partition("=")
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise ValueError(
                    f"layout {text!r}: no field {name!r}"
                    + (f"; did you mean {near[0]!r}?" if near else f"; the fields are {', '.join(sorted(known))}")
                )
            is_name = name in ("context", "dispatch")
            if not equals or not (is_name or value.isdigit()):
                raise ValueError(f"layout {text!r}: write {name}={'NAME' if is_name else 'NUMBER'}")
            values[name] = value if is_name else int(value)
        return cls(**values)  # type: ignore[arg-type]

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis -> size."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def devices(self) -> int:
        """How many it takes."""
        count = 1
        for size in self.sizes.values():
            count *= size
        return count

    @property
    def batch_shards(self) -> int:
        """Parts that the rows of a micro-batch are split into."""
        return self.data * self.fsdp * self.expert

    @property
    def microbatches(self) -> int:
        """Parts that a device cuts its rows into for the pipeline."""
        return self.pipeline_microbatches or self.stage

    def mesh(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """See `make_mesh`."""
        return make_mesh(self.sizes, devices=devices)

    def __str__(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return ",".join(changed) or "one device"
