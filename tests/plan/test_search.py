"""The search: it offers every layout, keeps to the memory, and what it writes is a config that `mindjax sft` takes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from mindjax.experiment import load_experiment, to_dataclass
from mindjax.models.catalog import CATALOG
from mindjax.plan.cost import Job
from mindjax.plan.hardware import Topology
from mindjax.plan.search import FILL, LIMITS, distinct, judge, layouts, search, write
from mindjax.sft.train import SFTConfig
from sharding.layout import Layout

TOPOLOGY = Topology.parse("v5p:2x2x2")
JOB = Job(CATALOG["qwen3-vl-2b"], Layout(), batch=32, length=4096, images=1)


def test_layouts_are_all_products() -> None:
    found = list(layouts(8))
    assert all(layout.devices == 8 for layout in found) and len(set(found)) == len(found)
    # Eight as an ordered product of six factors: three twos over six places; those with a sequence once more as a ring.
    plain = [layout for layout in found if layout.context == "ulysses"]
    assert len(plain) == math.comb(3 + 5, 5)
    assert len(found) - len(plain) == sum(layout.sequence > 1 for layout in plain)
    assert max(layout.tensor for layout in layouts(64)) == LIMITS["tensor"]


def test_fastest_first_within_the_memory() -> None:
    found = search(JOB, TOPOLOGY)
    steps = [round(candidate.prediction.step, 4) for candidate in found]
    assert steps == sorted(steps)
    assert all(candidate.bytes <= FILL * TOPOLOGY.chip.hbm for candidate in found)
    best = distinct(found, 5)
    assert len({candidate.job.layout for candidate in best}) == 5 and best[0] is found[0]


def test_what_was_asked_for_is_kept() -> None:
    found = search(JOB, TOPOLOGY, remats=("full",), micro_batches=2)
    assert {(candidate.job.remat, candidate.job.micro_batches) for candidate in found} == {("full", 2)}


def test_nothing_fits_says_how_near() -> None:
    with pytest.raises(ValueError, match=r"nothing fits v5p:2x2x2: the least, .* needs \d+ GiB of 81"):
        search(replace(JOB, model=CATALOG["qwen3-vl-235b-a22b"]), TOPOLOGY)


def test_nothing_divides_says_why() -> None:
    with pytest.raises(ValueError, match="no layout of 8 devices divides this job"):
        search(replace(JOB, batch=1, length=4099), TOPOLOGY)


def test_the_winner_is_a_config(tmp_path: Path) -> None:
    layout = Layout(fsdp=2, stage=2, tensor=2, pipeline_microbatches=4)
    job = replace(JOB, layout=layout, micro_batches=4, remat=("attention", "qkv"))
    path = tmp_path / "plan.py"
    write(job, TOPOLOGY, "qwen3-vl-2b", path)
    config = load_experiment(str(path), ["--config.data.path=x.jsonl", "--config.train.layout.tensor=2"])
    assert config.model == "qwen3-vl-2b"
    train = to_dataclass(SFTConfig, config.train)
    assert train.layout == layout and train.remat == ("attention", "qkv") and train.length == JOB.length
    # Rows of a shard and micro-batches over all shards make the update.
    assert train.rows * train.micro_batches == JOB.batch and train.micro_batches == 4 * layout.batch_shards
    assert judge(job, TOPOLOGY).job == job
