"""What recompute costs, operator by operator: bytes that a device need not keep against FLOPs that it does again."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mindjax.plan.cost import Job, estimate
from sharding.remat import NAMES, Remat

GIB = 2**30


@dataclass(frozen=True)
class Saving:
    """One choice.

    Attributes:
      name: what is no longer kept.
      bytes: that a device saves.
      flops: that a device does again, in a step.
      share: of the step's FLOPs when everything is kept.
    """

    name: str
    bytes: int
    flops: int
    share: float


def savings(job: Job) -> list[Saving]:
    """By the cost model: first what the models do not mark, then each named point alone, the others kept."""
    names = tuple(NAMES)
    everything = _cost(job, "none")
    marked = _cost(job, names)

    def saving(name: str, kept: tuple[int, int], dropped: tuple[int, int]) -> Saving:
        flops = dropped[1] - kept[1]
        return Saving(name, kept[0] - dropped[0], flops, flops / everything[1])

    return [
        saving("what has no name: norms, gates, vision", everything, marked),
        *(saving(name, marked, _cost(job, tuple(other for other in names if other != name))) for name in names),
        saving("all of these", everything, _cost(job, "full")),
    ]


def as_text(job: Job) -> str:
    """The table as Markdown."""
    lines = ["| recomputed | GiB saved | FLOPs added |", "|---|---|---|"]
    lines += [f"| {row.name} | {row.bytes / GIB:.2f} | {row.share:.1%} |" for row in savings(job)]
    return "\n".join(lines)


def _cost(job: Job, remat: Remat) -> tuple[int, int]:
    """(bytes kept for the backward pass, FLOPs) of a device."""
    cost = estimate(replace(job, remat=remat))
    return int(cost.memory["saved activations"]), int(sum(cost.flops.values()))
