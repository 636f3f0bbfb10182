"""Finds a layout: enumerates those that divide, ranks them by the cost model, and writes one as an experiment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

from mindjax.plan import roofline
from mindjax.plan.cost import Cost, Job, check, estimate
from mindjax.plan.hardware import Topology
from mindjax.plan.roofline import Prediction, Wires
from sharding.layout import Layout
from sharding.mesh import AXES
from sharding.remat import NAMES, Remat

# Of the memory, what the model's estimate may fill: the compiler found up to 1 GiB more than it, and once, with nothing
# recomputed, 30.
FILL = 0.85
# Largest axes that are tried: beyond them an exchange in every layer, or the bubble, costs more than any layout saves.
LIMITS = {"stage": 16, "sequence": 16, "tensor": 16, "expert": 64}
REMATS: tuple[Remat, ...] = ("none", NAMES, ("attention", "qkv"), ("attention",), "full")


@dataclass(frozen=True)
class Candidate:
    """A layout with what the cost model says of it."""

    job: Job
    cost: Cost
    prediction: Prediction

    @property
    def bytes(self) -> float:
        return float(sum(self.cost.memory.values()))


def judge(job: Job, topology: Topology) -> Candidate:
    """The cost model's answer for one job.

    Raises:
      ValueError: the layout does not divide the job.
    """
    cost = estimate(job, fused=topology.chip.kind == "tpu")
    return Candidate(job, cost, roofline.of_cost(cost, _wires(topology, tuple(job.layout.sizes.values()))))


@lru_cache(maxsize=4096)
def _wires(topology: Topology, sizes: tuple[int, ...]) -> Wires:
    return Wires(topology, dict(zip(AXES, sizes, strict=True)))


def layouts(devices: int, limits: dict[str, int] | None = None) -> Iterator[Layout]:
    """Every way to write a number of devices as a product of axes within limits; ring where tokens are split too."""
    limits = {**LIMITS, **(limits or {})}

    def split(left: int, axes: Sequence[str]) -> Iterator[dict[str, int]]:
        if not axes:
            if left == 1:
                yield {}
            return
        for size in range(1, min(left, limits.get(axes[0], left)) + 1):
            if left % size == 0:
                for rest in split(left // size, axes[1:]):
                    yield {axes[0]: size, **rest}

    for sizes in split(devices, AXES[::-1]):
        yield Layout(**sizes)  # type: ignore[arg-type]
        if sizes["sequence"] > 1:
            yield Layout(**sizes, context="ring")  # type: ignore[arg-type]


def search(
    job: Job, topology: Topology, *, remats: Sequence[Remat] = REMATS, micro_batches: int = 0
) -> list[Candidate]:
    """Layouts that fit the memory, fastest first by the cost model.

    Args:
      job: what to run; its layout, remat and micro-batches are not read.
      topology: the devices.
      remats: policies to choose from.
      micro_batches: 0 tries every power of two that divides.

    Raises:
      ValueError: nothing divides, or nothing fits; it says what came nearest.
    """
    found: list[Candidate] = []
    nearest: Candidate | None = None
    problem = ""
    text = job.model.text
    limits = {"expert": text.num_experts or 1, "stage": text.num_hidden_layers}
    for layout in layouts(topology.devices, {k: min(v, LIMITS[k]) for k, v in limits.items()}):
        if layout.batch_shards > job.batch:
            continue
        for tried in _variants(replace(job, layout=layout), micro_batches):
            try:
                check(tried)
            except ValueError as error:
                problem = problem or str(error)
                continue
            for remat in remats:
                candidate = judge(replace(tried, remat=remat), topology)
                if candidate.bytes <= FILL * topology.chip.hbm:
                    found.append(candidate)
                elif nearest is None or candidate.bytes < nearest.bytes:
                    nearest = candidate
    if not found:
        if nearest is None:
            raise ValueError(f"no layout of {topology.devices} devices divides this job; for one of them: {problem}")
        raise ValueError(
            f"nothing fits {topology.name}: the least, {nearest.job.layout} with remat {nearest.job.remat!r}, needs "
            f"{nearest.bytes / 2**30:.0f} GiB of {FILL * topology.chip.hbm / 2**30:.0f} on a device; take more or "
            "larger devices, or shorter rows"
        )
    # Of equals, the layout with fewer axes, and the policy that recomputes less.
    found.sort(key=lambda c: (round(c.prediction.step, 4), sum(size > 1 for size in c.job.layout.sizes.values())))
    return found


def distinct(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """The first of each layout."""
    best: dict[Layout, Candidate] = {}
    for candidate in candidates:
        best.setdefault(candidate.job.layout, candidate)
        if len(best) == count:
            break
    return list(best.values())


def _variants(job: Job, micro_batches: int) -> Iterator[Job]:
    """The job with each number of micro-batches, and, with a pipeline, with each number of parts."""
    rows = job.batch // job.layout.batch_shards
    counts = [micro_batches] if micro_batches else [n for n in (2**i for i in range(12)) if rows % n == 0]
    for count in counts:
        if job.layout.stage == 1:
            yield replace(job, micro_batches=count)
            continue
        for parts in (n for n in (2**i for i in range(8)) if n >= job.layout.stage and rows // count % n == 0):
            for rounds in (1, 2):
                layout = replace(job.layout, pipeline_microbatches=parts, pipeline_rounds=rounds)
                yield replace(job, micro_batches=count, layout=layout)


_EXPERIMENT = '''"""{title}

mindjax sft --config={path} --config.data.path=conversations.jsonl
"""

from ml_collections import ConfigDict

from experiments import sft

SIZES = ("debug",)


def get_config(size: str = "") -> ConfigDict:
    config = sft.get_config(size)
    config.model = {model!r}
    with config.unlocked(), config.train.ignore_type():
        config.train.update({train})
    return config
'''


def write(job: Job, topology: Topology, model: str, path: Path) -> None:
    """The job as an experiment file that `mindjax sft --config=` takes.

    Rows are those of one batch shard, and micro-batches count over all of them.
    """
    default = asdict(Layout())
    layout = {name: value for name, value in asdict(job.layout).items() if value != default[name]}
    train = {
        "layout": layout,
        "rows": job.rows,
        "length": job.length,
        "micro_batches": job.micro_batches * job.layout.batch_shards,
        "remat": job.remat,
        "dtype": "bfloat16",
    }
    lines = "".join(f'                "{name}": {value!r},\n' for name, value in train.items())
    title = f"Supervised fine-tuning of {model} on {topology.name}: {job.batch} rows of {job.length} tokens an update."
    body = "\n            {\n" + lines + "            }\n        "
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_EXPERIMENT.format(title=title, path=path.name, model=model, train=body).replace("'", '"'))
